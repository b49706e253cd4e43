//! Bytes of the container: header, manifest, spans, padding and digests. Knows nothing of plans.

use rayon::prelude::*;

use crate::wire::{Codec, Digest, Manifest, Payload};
use crate::{BundleError, FORMAT_VERSION, MAGIC};

pub(crate) const HEADER: usize = 88;
const HASHED_HEADER: usize = 56;
pub(crate) const MAX_MANIFEST: u32 = 16 << 20;
const ALIGN: u64 = 64;

/// What zstd may inflate a payload by: above it the writer stores the payload as it is. Bounds what a small file allocates.
const MAX_RATIO: u64 = 4096;

/// Fixed, single-threaded: equal input gives equal bytes. Bit rows gain little from more.
const ZSTD_LEVEL: i32 = 3;

/// Payloads above this are hashed by all threads.
const WIDE_HASH: usize = 4 << 20;

/// A payload on its way into a file.
pub(crate) struct Packed {
    name: String,
    raw: u64,
    codec: Codec,
    bytes: Vec<u8>,
    digest: blake3::Hash,
}

/// Compresses and hashes one payload.
pub(crate) fn pack(name: String, raw: Vec<u8>) -> Result<Packed, BundleError> {
    let packed =
        zstd::bulk::compress(&raw, ZSTD_LEVEL).map_err(|e| BundleError::unwritable(&name, format!("zstd: {e}")))?;
    let raw_len = raw.len() as u64;
    let gains = packed.len() < raw.len() && raw_len / MAX_RATIO < packed.len() as u64;
    let (codec, bytes) = if gains { (Codec::Zstd, packed) } else { (Codec::None, raw) };
    let digest = hash(&bytes);
    Ok(Packed { name, raw: raw_len, codec, bytes, digest })
}

/// The file: `manifest`, its payload table filled in here, and the payloads in order.
pub(crate) fn assemble(mut manifest: Manifest, payloads: Vec<Packed>) -> Result<Vec<u8>, BundleError> {
    let mut end = 0_u64;
    manifest.payloads = payloads
        .iter()
        .map(|p| {
            let offset = end.next_multiple_of(ALIGN);
            end = offset + p.bytes.len() as u64;
            Payload {
                name: p.name.clone(),
                offset,
                stored: p.bytes.len() as u64,
                raw: p.raw,
                codec: p.codec,
                blake3: Digest(p.digest),
            }
        })
        .collect();
    let json = manifest.to_json();
    // A manifest that reads back as something else (a NaN noise level, say) would never open.
    if Manifest::from_json(&json).ok().as_ref() != Some(&manifest) {
        return Err(BundleError::unwritable("manifest", "a value has no JSON form"));
    }
    let manifest_len = u32::try_from(json.len()).ok().filter(|&n| n <= MAX_MANIFEST).ok_or_else(|| {
        BundleError::unwritable("manifest", format!("{} bytes exceed the limit of {MAX_MANIFEST}", json.len()))
    })?;
    let area = (HEADER + json.len()).next_multiple_of(ALIGN as usize);
    let file_len = area as u64 + end;

    let mut file = Vec::with_capacity(area + end as usize);
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    file.extend_from_slice(&manifest_len.to_le_bytes());
    file.extend_from_slice(&file_len.to_le_bytes());
    file.extend_from_slice(blake3::hash(&json).as_bytes());
    let digest = blake3::hash(&file);
    file.extend_from_slice(digest.as_bytes());
    file.extend_from_slice(&json);
    for (span, packed) in manifest.payloads.iter().zip(payloads) {
        file.resize(area + span.offset as usize, 0);
        file.extend_from_slice(&packed.bytes);
    }
    debug_assert_eq!(file.len() as u64, file_len);
    Ok(file)
}

/// A file whose every byte is accounted for: header and manifest sound, spans in order, digests right, padding zero.
pub(crate) struct Container<'a> {
    /// The manifest; what it says about the plan is not yet checked.
    pub(crate) manifest: Manifest,
    /// Stored bytes of each entry of `manifest.payloads`.
    pub(crate) payloads: Vec<&'a [u8]>,
    /// The digest that ends the header.
    pub(crate) digest: blake3::Hash,
}

impl<'a> Container<'a> {
    /// Checks and splits `file`.
    pub(crate) fn read(file: &'a [u8]) -> Result<Self, BundleError> {
        let (manifest_len, digest) = read_header(file)?;
        let json_end = HEADER + manifest_len;
        let json = &file[HEADER..json_end];
        if blake3::hash(json).as_bytes() != &file[24..HASHED_HEADER] {
            return Err(BundleError::corrupt("manifest", "its bytes do not have the digest that the header gives"));
        }
        let manifest = Manifest::from_json(json)?;
        let area = json_end.next_multiple_of(ALIGN as usize);
        let payloads = spans(file, json_end, area, &manifest.payloads)?;
        Ok(Self { manifest, payloads, digest })
    }
}

/// Length of the manifest, at most what the file holds, and the header's digest.
fn read_header(file: &[u8]) -> Result<(usize, blake3::Hash), BundleError> {
    let corrupt = |why: String| Err(BundleError::corrupt("header", why));
    if !file.starts_with(&MAGIC) {
        return Err(BundleError::NotABundle);
    }
    let Some((header, rest)) = file.split_at_checked(HEADER) else {
        return corrupt(format!("the file ends after {} of its {HEADER} bytes", file.len()));
    };
    let digest = blake3::hash(&header[..HASHED_HEADER]);
    if digest.as_bytes() != &header[HASHED_HEADER..] {
        return corrupt("its bytes do not have the digest that ends it".into());
    }
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let version = u32_at(8);
    if version != FORMAT_VERSION {
        return Err(BundleError::VersionNotReadable { found: version, readable: FORMAT_VERSION });
    }
    let file_len = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
    if file_len != file.len() as u64 {
        return corrupt(format!("the file should have {file_len} bytes and has {}", file.len()));
    }
    let manifest_len = u32_at(12);
    if manifest_len > MAX_MANIFEST || manifest_len as usize > rest.len() {
        return corrupt(format!("a manifest of {manifest_len} bytes exceeds the file or the limit of {MAX_MANIFEST}"));
    }
    Ok((manifest_len as usize, digest))
}

/// The stored bytes of each payload, after checking order, bounds, padding and digests.
fn spans<'a>(file: &'a [u8], json_end: usize, area: usize, table: &[Payload]) -> Result<Vec<&'a [u8]>, BundleError> {
    let mut payloads = Vec::with_capacity(table.len());
    let mut end = json_end;
    let mut start = area;
    for entry in table {
        let what = || format!("payload {}", entry.name);
        let offset = (start - area) as u64;
        if entry.offset != offset {
            let why = format!("it should be at offset {offset} of the payload area and is at {}", entry.offset);
            return Err(BundleError::corrupt(what(), why));
        }
        let bytes = usize::try_from(entry.stored)
            .ok()
            .and_then(|stored| start.checked_add(stored))
            .and_then(|stop| file.get(start..stop))
            .ok_or_else(|| BundleError::corrupt(what(), format!("{} bytes run past the end", entry.stored)))?;
        check_zero(file, end, start, &what())?;
        payloads.push(bytes);
        end = start + bytes.len();
        // No overflow: `end` is within the file, and no slice reaches the last 64 bytes of the address space.
        start = end.next_multiple_of(ALIGN as usize);
    }
    if table.is_empty() {
        return Err(BundleError::corrupt("manifest field payloads", "it is empty"));
    }
    if end != file.len() {
        let why = format!("{} bytes after the last payload", file.len() - end);
        return Err(BundleError::corrupt("the end of the file", why));
    }
    // Collected in order, so that the error named first does not depend on threads.
    let digests: Vec<_> = payloads.par_iter().map(|bytes| hash(bytes)).collect();
    for (entry, digest) in table.iter().zip(digests) {
        if digest != entry.blake3.0 {
            let why = "its bytes do not have the digest that the manifest gives";
            return Err(BundleError::corrupt(format!("payload {}", entry.name), why));
        }
    }
    Ok(payloads)
}

fn check_zero(file: &[u8], from: usize, to: usize, before: &str) -> Result<(), BundleError> {
    let padding = file.get(from..to).unwrap_or_default();
    if padding.iter().any(|&b| b != 0) {
        return Err(BundleError::corrupt(format!("padding before {before}"), "it is not zero"));
    }
    Ok(())
}

fn hash(bytes: &[u8]) -> blake3::Hash {
    if bytes.len() < WIDE_HASH { blake3::hash(bytes) } else { blake3::Hasher::new().update_rayon(bytes).finalize() }
}

/// The raw bytes of a payload. `expected` is the raw length the plan's dimensions imply, where they imply one; nothing is
/// allocated before the declared length is checked against it and against what so many stored bytes may hold.
pub(crate) fn unpack(entry: &Payload, stored: &[u8], expected: Option<u64>) -> Result<Vec<u8>, BundleError> {
    let corrupt = |why: String| BundleError::corrupt(format!("payload {}", entry.name), why);
    if let Some(expected) = expected
        && entry.raw != expected
    {
        return Err(corrupt(format!("it should hold {expected} bytes and declares {}", entry.raw)));
    }
    match entry.codec {
        Codec::None if entry.raw == entry.stored => Ok(stored.to_vec()),
        Codec::None => Err(corrupt(format!("{} bytes are stored for {}", entry.stored, entry.raw))),
        Codec::Zstd if entry.raw / MAX_RATIO >= entry.stored => {
            Err(corrupt(format!("{} stored bytes cannot hold {}", entry.stored, entry.raw)))
        }
        Codec::Zstd => {
            let capacity = usize::try_from(entry.raw).map_err(|e| corrupt(e.to_string()))?;
            let mut raw = Vec::new();
            raw.try_reserve_exact(capacity).map_err(|e| corrupt(format!("{capacity} bytes: {e}")))?;
            // A frame that holds more than the reserved bytes is an error of zstd's.
            let written = zstd::bulk::Decompressor::new()
                .and_then(|mut zstd| zstd.decompress_to_buffer(stored, &mut raw))
                .map_err(|e| corrupt(format!("zstd: {e}")))?;
            if written != capacity {
                return Err(corrupt(format!("it should hold {capacity} bytes and holds {written}")));
            }
            Ok(raw)
        }
    }
}

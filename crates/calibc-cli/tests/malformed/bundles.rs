//! Malformed bundles: damaged files, and files whose digests are right and whose content is not. And one made by the real
//! binary, flipped byte by byte.

use calibc_bundle::{Bundle, BundleError};

use crate::folder::{Folder, link, pipe};
use crate::parts::Rng;
use crate::support::{BAD_INPUT as BAD, Bench, IO};
use crate::{Case, case};

/// Bytes of a bundle's header.
const HEADER: usize = 88;

/// The bundle damaged, and tensors that fit it.
fn file(folder: &Folder, edit: impl FnOnce(&mut Vec<u8>)) {
    folder.qkv(|_| {});
    folder.bundle_file(edit);
}

/// The bundle spoilt beneath right digests, and tensors that fit it.
fn parts(folder: &Folder, edit: impl FnOnce(&mut crate::parts::Parts)) {
    folder.qkv(|_| {});
    folder.bundle(edit);
}

fn other(folder: &Folder, bytes: &[u8]) {
    folder.qkv(|_| {});
    folder.write("in/bundle", bytes);
}

pub(crate) const CASES: &[Case] = &[
    // No bundles.
    case("missing file", IO, &["in/bundle"], |f| f.qkv(|_| {})),
    case("not a file", IO, &["in/bundle", "not a regular file"], |f| {
        f.qkv(|_| {});
        std::fs::create_dir(f.path("in/bundle")).unwrap();
    }),
    case("not a file", IO, &["in/bundle", "not a regular file"], |f| {
        f.qkv(|_| {});
        pipe(&f.path("in/bundle"));
    }),
    case("not a file", IO, &["in/bundle", "not a regular file"], |f| {
        f.qkv(|_| {});
        link("/dev/zero".as_ref(), &f.path("in/bundle"));
    }),
    case("not a bundle", BAD, &["in/bundle", "not a calibc bundle"], |f| other(f, b"")),
    case("not a bundle", BAD, &["in/bundle", "not a calibc bundle"], |f| other(f, b"calib")),
    case("not a bundle", BAD, &["in/bundle", "not a calibc bundle"], |f| other(f, &b"PK\x03\x04".repeat(1000))),
    case("not a bundle", BAD, &["in/bundle", "not a calibc bundle"], |f| file(f, |b| b[0] ^= 0x20)),
    // Damage.
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b.truncate(8))),
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b.truncate(HEADER))),
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b.truncate(b.len() / 2))),
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b.truncate(b.len() - 1))),
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b.push(0))),
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b.extend([7; 4096]))),
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b[8] ^= 2)),
    case("damaged header", BAD, &["in/bundle", "corrupt at header"], |f| file(f, |b| b[20] ^= 0x80)),
    case("damaged manifest", BAD, &["in/bundle", "corrupt at manifest"], |f| file(f, |b| b[HEADER + 5] ^= 1)),
    case("damaged payload", BAD, &["in/bundle", "corrupt at payload"], |f| file(f, |b| *b.last_mut().unwrap() ^= 1)),
    // Another release's.
    case("version", BAD, &["in/bundle", "format 1", "format 2"], |f| parts(f, |p| p.version = 1)),
    case("version", BAD, &["in/bundle", "format 4294967295"], |f| parts(f, |p| p.version = u32::MAX)),
    case("abi", BAD, &["in/bundle", "abi 7;", "abi 5;"], |f| {
        parts(f, |p| p.edit("\"abi\":\"abi 5;", "\"abi\":\"abi 7;"))
    }),
    // Manifests that lie.
    case("manifest", BAD, &["manifest: ", "unknown field"], |f| parts(f, |p| p.edit("\"geometry\":", "\"geometri\":"))),
    case("geometry", BAD, &["manifest field geometry", "frames is 0"], |f| {
        parts(f, |p| p.edit("\"frames\":3", "\"frames\":0"))
    }),
    case("geometry", BAD, &["manifest field geometry"], |f| {
        parts(f, |p| p.edit("\"frames\":3", "\"frames\":4294967295"))
    }),
    case("number", BAD, &["manifest: "], |f| parts(f, |p| p.edit("\"frames\":3", "\"frames\":4294967296"))),
    case("number", BAD, &["manifest: ", "out of range"], |f| {
        parts(f, |p| p.edit("\"sigmas\":[", "\"sigmas\":[1e999,"))
    }),
    case("model", BAD, &["manifest field model"], |f| parts(f, |p| p.edit("\"layers\":2", "\"layers\":4294967295"))),
    case("length", BAD, &["payload ops", "72 bytes"], |f| parts(f, |p| p.part("ops").set(vec![0xff; 68]))),
    case("symbol", BAD, &["manifest field kernels[0]", "symbol"], |f| {
        parts(f, |p| p.head = p.head.replacen("\"symbol\":\"c", "\"symbol\":\"../", 1));
    }),
    // Payloads that lie.
    case("compression", BAD, &["payload ops", "zstd"], |f| parts(f, |p| p.part("ops").bytes.truncate(10))),
    // 16 MiB of blanks in some hundred bytes, announced as 2^62.
    case("bomb", BAD, &["payload spec"], |f| {
        parts(f, |p| {
            let spec = p.part("spec");
            (spec.raw, spec.codec) = (1 << 62, "zstd".into());
            spec.bytes = zstd::bulk::compress(&vec![b' '; 1 << 24], 19).unwrap();
        });
    }),
    case("mask", BAD, &["payload masks/0", "bit"], |f| {
        parts(f, |p| {
            let mut words = p.part("masks/0").words();
            words[0] = u32::MAX;
            p.part("masks/0").set_words(&words);
        });
    }),
    case("plan", BAD, &["corrupt at plan", "m0 q2"], |f| {
        parts(f, |p| {
            let mut words = p.part("masks/0").words();
            words[2] = 0;
            p.part("masks/0").set_words(&words);
        });
    }),
    case("plan", BAD, &["corrupt at plan", "m1000"], |f| {
        parts(f, |p| {
            let mut words = p.part("ops").words();
            words[5] = 1000;
            p.part("ops").set_words(&words);
        });
    }),
    case("plan", BAD, &["corrupt at plan", "s0.l0"], |f| {
        parts(f, |p| {
            let mut words = p.part("schedule").words();
            words[0] = 77;
            p.part("schedule").set_words(&words);
        });
    }),
    case("text", BAD, &["payload spec", "utf-8"], |f| parts(f, |p| p.part("spec").set(vec![0xff]))),
    case("report", BAD, &["payload report"], |f| parts(f, |p| p.part("report").set(b"[".repeat(100_000)))),
    case("payload missing", BAD, &["manifest field payloads", "`masks/1`"], |f| {
        parts(f, |p| drop(p.payloads.remove(0)))
    }),
    case("payload unknown", BAD, &["manifest field payloads", "`ops`"], |f| {
        parts(f, |p| p.payloads.push(p.payloads[2].clone()));
    }),
];

/// A bundle of the real binary, small: one variant for one architecture.
fn compiled() -> Option<(Bench, Vec<u8>)> {
    let bench = Bench::new()?;
    bench.file("spec.yaml", "target: {dtypes: [bf16], lse: false, archs: [sm_80]}\n");
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "--spec", "spec.yaml", "-q"]);
    let bytes = bench.bytes("plan.bundle");
    Some((bench, bytes))
}

/// Where the payloads start.
fn payloads(file: &[u8]) -> usize {
    (HEADER + u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize).next_multiple_of(64)
}

#[test]
fn every_flipped_byte_of_header_and_manifest_is_detected() {
    let Some((_bench, mut file)) = compiled() else { return };
    for at in 0..payloads(&file) {
        // Every bit alone, and all of them.
        for flip in (0..8).map(|bit| 1 << bit).chain([0xff]) {
            file[at] ^= flip;
            match Bundle::parse(&file).expect_err("a flipped byte") {
                BundleError::NotABundle => assert!(at < 8, "{at}"),
                BundleError::Corrupt { what, .. } => {
                    let known = ["header", "manifest"].contains(&what.as_str()) || what.starts_with("padding");
                    assert!(at >= 8 && known, "{at}: {what}");
                }
                error => panic!("{at}: {error}"),
            }
            file[at] ^= flip;
        }
    }
    Bundle::parse(&file).unwrap();
}

#[test]
fn flipped_bytes_of_payloads_are_detected() {
    let Some((bench, mut file)) = compiled() else { return };
    let start = payloads(&file);
    let mut rng = Rng(0xf11b);
    let sampled = (0..4000).map(|_| start + rng.below((file.len() - start) as u32) as usize).collect::<Vec<_>>();
    // The ends of the area as well.
    for (i, at) in sampled.into_iter().chain([start, file.len() - 1]).enumerate() {
        let flip = 1 + rng.below(255) as u8;
        file[at] ^= flip;
        match Bundle::parse(&file) {
            Err(BundleError::Corrupt { what, .. }) if what.starts_with("pa") => {}
            other => panic!("{at}: {:?}", other.map(|b| b.digest())),
        }
        // The binary says the same.
        if i % 200 == 0 {
            std::fs::write(bench.path("flipped"), &file).unwrap();
            let ended = bench.run(&["verify", "flipped"]).expect(BAD);
            assert!(ended.stderr.contains("flipped: bundle is corrupt at pa"), "{}", ended.stderr);
        }
        file[at] ^= flip;
    }
    Bundle::parse(&file).unwrap();
}

#[test]
fn every_truncation_is_detected() {
    let Some((_bench, file)) = compiled() else { return };
    for len in (0..file.len()).filter(|len| *len < payloads(&file) || len % 61 == 0) {
        match Bundle::parse(&file[..len]) {
            Err(BundleError::NotABundle) => assert!(len < 8),
            Err(BundleError::Corrupt { what, .. }) => assert!(len >= 8 && what == "header", "{len}: {what}"),
            other => panic!("{len}: {:?}", other.map(|b| b.digest())),
        }
    }
}

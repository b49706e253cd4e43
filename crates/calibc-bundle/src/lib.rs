//! The file that ships: bytes to a validated bundle and back.
//!
//! ```text
//! Plan + kernels + spec + report --encode--> bytes --write--> plan.bundle --open--> Bundle { plan, kernels, ... }
//! ```
//!
//! ```
//! use calibc_bundle::{Bundle, Contents, encode};
//! use calibc_ir::{DType, Geometry, HeadId, Model, Plan, Schedule, Variant, WorkItem};
//!
//! let model = Model { name: "tiny".into(), layers: 2, heads: 4, head_dim: 64 };
//! let mut plan = Plan::dense(model, Geometry::video(3, 16, 16), vec![1.0, 0.5]);
//! plan.variants = vec![Variant { dtype: DType::Bf16, head_dim: 64, lse: false, anchors: false, ragged: false }];
//! let items: Vec<_> = (0..4).flat_map(|head| (0..4).map(move |tile| WorkItem::new(HeadId(head), tile))).collect();
//! plan.schedule = Some(Schedule { list_of: vec![0; 4], list_ptr: vec![0, 16], items });
//! let report = serde_json::json!({ "density": 1.0 });
//! let contents = Contents { plan: &plan, kernels: &[], spec: "", report: &report, calibc_version: "0.1.0" };
//! let bytes = encode(&contents)?;
//! assert_eq!(Bundle::parse(&bytes)?.plan(), &plan);
//! assert!(Bundle::parse(&bytes[..bytes.len() - 1]).is_err());
//! # Ok::<(), calibc_bundle::BundleError>(())
//! ```
//!
//! # Layout, format version 2
//!
//! Little-endian throughout.
//!
//! ```text
//! at  0  magic              8 bytes   89 63 61 6c 69 62 63 0a ("\x89calibc\n")
//!     8  format version     u32       2
//!    12  manifest length    u32       at most 16 MiB
//!    16  file length        u64
//!    24  manifest digest    32 bytes  BLAKE3 of the manifest
//!    56  header digest      32 bytes  BLAKE3 of bytes 0..56; Bundle::digest, it commits to every byte of the file
//!    88  manifest           JSON, UTF-8
//!        zero padding to a multiple of 64; here the payload area starts
//!        payload, zero padding to a multiple of 64, payload, ..., payload
//! ```
//!
//! The file ends with the last payload. Every byte is covered: by a digest, or by the demand that padding is zero.
//!
//! # Manifest
//!
//! ```text
//! calibc_version   version of the compiler
//! abi              launch contract of the kernels, calibc_ir::abi::describe()
//! model            { name, layers, heads, head_dim }
//! geometry         { frames, height, width, text_tokens, text_position: none|before|after,
//!                    layout: "raster" | {"tile": [frames, height, width]}, kv_tokens: n|null }
//! sigmas           noise level of each step; their number is the number of steps
//! anchors          anchor rows per frame of the anchor heads, null without such heads
//! masks            [{ step, masks }]: chunk i holds the next `masks` masks in id order, which are first used at `step`
//! schedule         { lists, items }
//! variants         [{ dtype: bf16|fp16, head_dim, lse, anchors, ragged }]
//! kernels          [{ variant: index, family: portable|hopper, arch: "sm_80", symbol, threads, shared_bytes (dynamic),
//!                     registers, static_shared_bytes, stack_bytes, spill_stores, spill_loads, nvrtc: [major, minor] }],
//!                  ascending by (variant, family, arch)
//! payloads         [{ name, offset, stored, raw, codec: none|zstd, blake3 }], in file order
//! ```
//!
//! `offset` counts from the start of the payload area, `stored` and `raw` are lengths in bytes, `blake3` is the digest of the
//! stored bytes. The manifest has exactly one spelling (compact, fields in the order above): re-encoding what was read must
//! give the same bytes, so there is no room for unknown fields, duplicate keys or anything a reader would skip.
//!
//! # Payloads
//!
//! Exactly these, in this order:
//!
//! ```text
//! masks/<i>                 one per chunk: bit rows of each mask, u32 words as calibc_ir::BlockMask holds them
//! ops                       u32 per site, step-major, then layer, then head: a mask id, OP_DENSE or OP_ANCHORS of calibc_ir::abi
//! schedule                  u32: list_of[steps * layers], list_ptr[lists + 1], items[items]
//! anchors                   u32: number of queries, then queries, copy_ptr, copies of calibc_ir::AnchorTable; with `anchors` only
//! spec                      the effective spec, YAML
//! report                    numbers of the compile report, JSON
//! source/<kernel>           CUDA text, once per variant and family that has a kernel; <kernel> is calibc_ir::Family::symbol
//! cubin/<kernel>/<arch>     machine code, one per kernel
//! ```
//!
//! A payload is stored as one zstd frame where this makes it smaller, but never by more than a factor of 4096: together with
//! lengths that must follow from the plan's dimensions, this bounds what opening a small file can allocate.
//!
//! # Versions
//!
//! A reader reads one format version. Whatever changes here (a field, a payload, an order) changes the version; magic, version
//! and the header's digest keep their places in every version, so that a later file is told from a damaged one.
//!
//! 1: one kernel per variant and architecture. 2: kernels have a family.
//!
//! # Promises
//!
//! - Same contents, same bytes: no time, path, host or thread count enters; zstd runs single-threaded at a fixed level.
//! - [`Bundle::parse`] checks everything once: bytes, dimensions, masks, ops, schedule (through [`calibc_ir`]'s verifier) and
//!   kernels. A bundle's plan always has variants and a schedule. Afterwards no look-up fails, and no input makes it panic.
//! - [`write()`] leaves the old file or the new one, never half of one, whenever the process is killed.
//! - No CUDA here. A digest is not a signature: a cubin is code, and loading one is trusting whoever wrote the file.

mod bundle;
mod encode;
mod error;
mod layout;
mod plan;
mod wire;
mod write;

pub use bundle::{Bundle, Expected, Section};
pub use encode::{Contents, encode};
pub use error::BundleError;
pub use wire::Codec;
pub use write::write;

use calibc_ir::{Arch, Family, Variant};

/// First bytes of a bundle.
pub const MAGIC: [u8; 8] = *b"\x89calibc\n";

/// The one format version this build writes and reads.
pub const FORMAT_VERSION: u32 = 2;

/// One compiled kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What it is specialised for; one of the plan's variants.
    pub variant: Variant,
    /// How it is built, and so how it is launched.
    pub family: Family,
    /// What its machine code runs on; one that its family compiles for.
    pub arch: Arch,
    /// Name of the entry point, a C identifier.
    pub symbol: String,
    /// CUDA text it was compiled from; the same for every architecture of a variant and family.
    pub source: String,
    /// Machine code. Loading it is running it: trust whoever gave the file.
    pub cubin: Vec<u8>,
    /// Threads of a block, 1..=1024.
    pub threads: u32,
    /// Dynamic shared memory in bytes (what [`calibc_ir::abi`] adds at launch not included).
    pub shared_bytes: u32,
    /// What the compiler said it uses.
    pub resources: Resources,
    /// Version of the NVRTC that compiled it, (major, minor).
    pub nvrtc: (u32, u32),
}

/// Resources of a kernel per thread or block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block, in bytes.
    pub static_shared_bytes: u32,
    /// Stack of a thread, in bytes.
    pub stack_bytes: u32,
    /// Bytes of spill stores.
    pub spill_stores: u32,
    /// Bytes of spill loads.
    pub spill_loads: u32,
}

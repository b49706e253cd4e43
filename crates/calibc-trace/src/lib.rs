//! Reads, checks, streams and writes calibration traces: what dense runs of a model say about its attention.
//!
//! ```text
//! manifest.json ──parse──▶ Manifest ─┐
//! p000/s000.cond.safetensors ──map──▶ digest, header, values ──▶ Trace ──site by site──▶ BlockEnergy ──vote──▶ ThresholdMap
//! ```
//!
//! [`Trace::open`] checks a whole trace and stops at the first problem; [`check`] lists them all. An open trace holds
//! positions only: every question maps the shards it needs and unmaps them, so memory does not grow with the trace.
//! [`threshold`] turns the energies of a site into one number per block, from which the mask at any epsilon is a compare.
//! [`writer`] writes the same format, [`session`] does so for captures that may be killed or run side by side, [`merge`] puts traces
//! together, and [`planted`] fills one with known structure. Prompts of the `holdout` split can be
//! read ([`Trace::energy`]) but never take part in a vote.
//!
//! Never here: a mask chosen, a policy, anything printed. Bad input never panics; each kind of problem is its own
//! [`TraceError`], which names file, tensor and cure.

mod encoding;
mod error;
mod folder;
mod json;
mod manifest;
mod mapped;
pub mod merge;
pub mod planted;
pub mod random;
mod sensitivity;
pub mod session;
mod shard;
pub mod space;
pub mod summary;
pub mod threshold;
mod trace;
pub mod writer;

pub use encoding::Encoding;
pub use error::{At, Others, TraceError};
pub use manifest::{FORMAT, FileEntry, MANIFEST, Manifest, Prompt, Shard, Split, VERSION};
pub use sensitivity::Sensitivity;
pub use trace::{Progress, Trace, check};

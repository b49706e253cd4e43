//! One compile session: traces and spec in, bundle out.
//!
//! ```text
//! plans/*.yaml --spec--> Spec ---+
//!                                +--resolve--> Job --opt--> Plan --codegen--> CUDA --nvrtc--> cubins --bundle--> bytes
//! traces/ -----trace--> Trace ---+                    \--recall--> report ----------------------------------/
//! ```
//!
//! [`compile`] runs one session ([`compile_masks`] one for masks in memory) and returns bytes; it writes nothing but the compile cache. An [`Observer`] hears of progress
//! and can stop it. [`spec`] is the strict reader of `plans/`, [`masks`] the mask file of explicit policies and of
//! `calibc export`.
//!
//! Same traces, spec and tools: same bytes. No time, path, host or thread count enters them. Never here: printing, exit codes,
//! execution on a GPU.

mod error;
mod evidence;
pub mod kernels;
pub mod masks;
mod observe;
mod report;
pub mod resolve;
mod session;
pub mod spec;

pub use error::{DriverError, Family};
pub use kernels::{KernelTarget, VERSION};
pub use observe::{Event, Observer, Silent, Stage};
pub use session::{CacheChoice, Emit, LayerMasks, Options, Output, Packed, TraceCount, compile, compile_masks};

/// Names of the passes, in order.
pub use calibc_opt::PASSES;

//! CUDA text to cubin: finding libnvrtc, compiling, caching.
//!
//! ```text
//! --nvrtc, CALIBC_NVRTC, Python environments, CUDA_HOME, the system
//!            |
//!            v find
//! Request -> Nvrtc::compile -> build gate -> Compiled { cubin, resources, warnings, log }
//!        \-> Cache::compile (the same, kept on disk under a digest of everything that decides the bytes)
//! ```
//!
//! ```no_run
//! use calibc_nvrtc::{Cache, Nvrtc, Request};
//!
//! let nvrtc = Nvrtc::find(None)?;
//! let cache = Cache::open(None)?;
//! let source = "extern \"C\" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }";
//! let request = Request { source, symbol: "twice", arch: "sm_90a" };
//! let (compiled, from_cache) = cache.compile(&nvrtc, &request, "0.1.0")?;
//! println!("{} registers, cached: {from_cache}", compiled.resources.registers);
//! # Ok::<(), calibc_nvrtc::NvrtcError>(())
//! ```
//!
//! The library that was found is the one that is used: it is opened by its path, never by a search that something else in
//! the process could answer. No GPU and no driver are needed, and nothing here panics when libnvrtc is missing.
//!
//! What never happens here: a cubin with spilled registers, tensor-core instructions that ptxas reports as serialised, or no machine
//! code is never returned ([`GateFailure`]); a damaged cache entry is never used; a cache that cannot be written never fails a build.

mod cache;
mod cubin;
mod error;
mod ffi;
mod find;
mod nvrtc;
mod report;
#[doc(hidden)]
pub mod testing;

pub use cache::{Cache, Cleared, Entry};
pub use error::{Failure, GateFailure, NvrtcError, Tried, WhyNot};
pub use find::set_python_packages;
pub use nvrtc::{Compiled, Nvrtc, Request, SUPPORTED_MAJORS};
pub use report::Resources;

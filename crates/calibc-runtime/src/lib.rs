//! Opens a bundle and executes it, on CUDA or on the CPU reference.
//!
//! ```text
//! Bundle --Engine::new--> kernels + tables on the GPU --attention(step, layer, q, k, v, out)--> LaunchArgs (checked) --> one launch
//! Plan   --reference::attention--> f32 on the CPU          reference::masked: an independent f64 check of sampled rows
//! ```
//!
//! Tensors are borrowed: device memory by raw address ([`DeviceTensor`]), host memory by slice ([`HostTensor`]), both with logical
//! shape `[batch, head, token, head_dim]` and strides. Whatever does not fit the plan is a typed error before anything runs.
//!
//! It never links the compiler, never allocates or waits in a launch, never owns a caller's stream or tensor, and without a
//! driver it answers with [`RuntimeError::NoDriver`] where a GPU is asked for.

mod capture;
#[expect(unsafe_code, reason = "calls into the CUDA driver")]
pub mod cuda;
mod error;
mod launch;
pub mod reference;
mod residency;
mod shape;
mod step_image;
mod tensor;
mod tensor_map;

pub use calibc_bundle::{Bundle, BundleError};
pub use capture::{CaptureArgs, CaptureCall, CaptureCode, CaptureParams};
pub use cuda::Engine;
pub use error::{Dim, Operand, RuntimeError};
pub use launch::{Call, LaunchArgs, LaunchPlan, Params, StepArg};
pub use residency::Residency;
pub use tensor::{DeviceLse, DeviceTensor, HostData, HostTensor};
pub use tensor_map::TensorMapSpec;

//! The CUDA backend: cubins and tables of a bundle on one GPU, and one launch per layer.
//!
//! The driver library is loaded at run time: a program that links this crate starts on machines without a GPU, and gets
//! [`crate::RuntimeError::NoDriver`] when it asks for one. Everything lives in the device's primary context, which is also PyTorch's, so
//! pointers and streams pass freely between the two. No function changes the calling thread's current context.

mod capture;
mod device;
mod encode;
mod engine;
mod partials;
mod stream;
mod tables;

pub use capture::CaptureKernel;
pub use device::{Device, DeviceBuffer, DeviceInfo};
pub use engine::Engine;
pub use stream::{Marks, Stream, Timer};

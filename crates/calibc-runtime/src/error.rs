//! Everything that can go wrong between a plan and a running layer.

use std::fmt;

use calibc_bundle::BundleError;
use calibc_ir::verify::VerifyError;
use calibc_ir::{DType, LayerId, StepId, Variant};
use thiserror::Error;

/// One of the tensors of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The attention output.
    Out,
    /// The log-sum-exp.
    Lse,
    /// The block energies of a capture.
    Energy,
    /// The block deviations of a capture.
    Deviation,
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::Out => "out",
            Self::Lse => "lse",
            Self::Energy => "energy",
            Self::Deviation => "deviation",
        })
    }
}

/// A dimension of a tensor in its logical order `[batch, head, token, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// The batch.
    Batch,
    /// Attention heads.
    Head,
    /// Tokens of the sequence.
    Token,
    /// Elements of a head.
    HeadDim,
}

impl Dim {
    /// The dimensions in logical order.
    pub const ALL: [Self; 4] = [Self::Batch, Self::Head, Self::Token, Self::HeadDim];
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Batch => "batch",
            Self::Head => "head",
            Self::Token => "token",
            Self::HeadDim => "head_dim",
        })
    }
}

/// Why a layer was not executed. Every variant but [`RuntimeError::Driver`] is found before anything reaches a GPU.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The step is not one of the plan's.
    #[error("step {step} is out of range: the plan has {num_steps} steps")]
    Step {
        /// The step asked for.
        step: u32,
        /// Steps of the plan.
        num_steps: u32,
    },
    /// The layer is not one of the plan's.
    #[error("layer {layer} is out of range: the plan has {num_layers} layers")]
    Layer {
        /// The layer asked for.
        layer: u32,
        /// Layers of the plan.
        num_layers: u32,
    },
    /// A tensor's size is not the plan's, or not that of the tensors beside it.
    #[error("{operand} has {dim} size {got}, but this plan and the other tensors need {want}")]
    Size {
        /// The tensor.
        operand: Operand,
        /// The dimension.
        dim: Dim,
        /// Its size.
        got: usize,
        /// The size it must have.
        want: usize,
    },
    /// A sequence is shorter or longer than the plan allows.
    #[error("{operand} has {got} tokens, but this plan is for {}", range(*.min, *.max))]
    Length {
        /// `Q` or `K`.
        operand: Operand,
        /// Its tokens.
        got: usize,
        /// Fewest tokens: the video tokens where text stands last, else `max`.
        min: u32,
        /// Most tokens.
        max: u32,
    },
    /// The batch is empty or larger than a launch can hold.
    #[error("batch size {batch} is not in 1..=65535; split the batch")]
    Batch {
        /// Its size.
        batch: usize,
    },
    /// A batch whose tiles one launch cannot count.
    #[error("batch size {batch} times the {items} tiles of the layer is more than a launch can count; split the batch")]
    Work {
        /// Its size.
        batch: usize,
        /// Tiles of the layer, per batch element.
        items: u32,
    },
    /// A query that is not one of the call's.
    #[error("query {position} is out of range: q has {q_len} tokens")]
    Position {
        /// The query asked for.
        position: u32,
        /// Query tokens.
        q_len: u32,
    },
    /// The tensors of a call differ in element type.
    #[error("{operand} is {got} but q is {want}; q, k, v and out must have one element type")]
    DType {
        /// The tensor.
        operand: Operand,
        /// Its element type.
        got: DType,
        /// The element type of q.
        want: DType,
    },
    /// The bundle has no kernel for what the call asks.
    #[error("the bundle has no {dtype} kernel {} log-sum-exp output; compile it with this element type and output enabled", with(*.lse))]
    NoVariant {
        /// Element type of the call.
        dtype: DType,
        /// Whether the log-sum-exp is asked for.
        lse: bool,
    },
    /// The innermost dimension is not contiguous.
    #[error("{operand} has {dim} stride {stride}; its innermost dimension must be contiguous (stride 1)")]
    InnerStride {
        /// The tensor.
        operand: Operand,
        /// Its innermost dimension.
        dim: Dim,
        /// Its stride in elements.
        stride: i64,
    },
    /// A stride is negative.
    #[error("{operand} has {dim} stride {stride}; strides must not be negative")]
    NegativeStride {
        /// The tensor.
        operand: Operand,
        /// The dimension.
        dim: Dim,
        /// Its stride in elements.
        stride: i64,
    },
    /// A stride breaks the 16-byte alignment of rows.
    #[error(
        "{operand} has {dim} stride {stride}; kernels read 16 bytes at a time, so it must be a multiple of 8 elements"
    )]
    StrideAlignment {
        /// The tensor.
        operand: Operand,
        /// The dimension.
        dim: Dim,
        /// Its stride in elements.
        stride: i64,
    },
    /// Two elements of an output share memory.
    #[error(
        "{operand} has strides {strides:?} for shape {shape:?}: its elements overlap in memory, so it cannot be written"
    )]
    Overlap {
        /// `Out` or `Lse`.
        operand: Operand,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides in elements.
        strides: Vec<i64>,
    },
    /// The tensor's extent does not fit the address space, or the host slice behind it.
    #[error("{operand} with shape {shape:?} and strides {strides:?} reaches past the end of its memory")]
    Extent {
        /// The tensor.
        operand: Operand,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides in elements.
        strides: Vec<i64>,
    },
    /// A null address.
    #[error("{operand} is a null pointer")]
    Null {
        /// The tensor.
        operand: Operand,
    },
    /// An address that is not aligned.
    #[error("{operand} starts at {ptr:#x}, which is not a multiple of {align} bytes")]
    Alignment {
        /// The tensor.
        operand: Operand,
        /// Its address.
        ptr: u64,
        /// The alignment it needs.
        align: u64,
    },
    /// The address of the step is null or not aligned.
    #[error("the step's device address {ptr:#x} must be non-null and a multiple of 4 bytes")]
    StepPointer {
        /// The address.
        ptr: u64,
    },
    /// A tensor is on another GPU.
    #[error("{operand} is on GPU {got}, but the engine was made for GPU {want}")]
    Device {
        /// The tensor.
        operand: Operand,
        /// Its GPU.
        got: u32,
        /// The engine's GPU.
        want: u32,
    },
    /// The softmax scale is unusable.
    #[error("softmax scale {scale} must be finite and above 0")]
    Scale {
        /// The scale.
        scale: f32,
    },
    /// A window that cannot hold a step and the next.
    #[error("a window of {steps} steps cannot hold the next step beside the one that runs; it needs at least 2")]
    Window {
        /// Its size.
        steps: u32,
    },
    /// A stream is being captured into a graph, which would outlive the window of steps it reads.
    #[error(
        "step {step} cannot be captured into a graph by an engine that holds a window of steps; keep all steps resident, \
         or read the step from device memory and enter it before each replay, outside of any capture"
    )]
    CapturedStep {
        /// The step.
        step: u32,
    },
    /// The bundle's kernels were not made for what the plan has.
    #[error("the bundle's kernels {} do not serve this plan: {what}", joined(.available))]
    Unserved {
        /// What they lack.
        what: String,
        /// The bundle's variants.
        available: Vec<Variant>,
    },
    /// The plan contradicts itself.
    #[error("the plan is not valid: {error}")]
    Invalid {
        /// The first error the verifier found.
        error: VerifyError,
    },
    /// A number of sampled rows that capture kernels do not have.
    #[error("a capture of {rows} rows per block is not possible; use 16, 32, 64 or 128 (all)")]
    RowsPerBlock {
        /// The rows asked for.
        rows: u32,
    },
    /// The tensors of a capture do not belong together, or not to its kernel.
    #[error("{operand} has {dim} size {got}, but this capture needs {want}")]
    CaptureShape {
        /// The tensor.
        operand: Operand,
        /// The dimension.
        dim: Dim,
        /// Its size.
        got: usize,
        /// The size it must have.
        want: usize,
    },
    /// A dimension that is empty or too large to capture.
    #[error("{operand} has {dim} size {got}, but a capture needs 1 to {most}")]
    CaptureSize {
        /// The tensor.
        operand: Operand,
        /// The dimension.
        dim: Dim,
        /// Its size.
        got: usize,
        /// The largest size.
        most: usize,
    },
    /// A tensor of another element type than the capture kernel's.
    #[error("{operand} is {got}, but this capture kernel is for {want}")]
    CaptureDType {
        /// The tensor.
        operand: Operand,
        /// Its element type.
        got: DType,
        /// The kernel's.
        want: DType,
    },
    /// The plan was never scheduled.
    #[error("the plan has no work lists; run the schedule pass before launching it")]
    Unscheduled,
    /// The plan contradicts itself.
    #[error("the plan has no valid op for head {head} at {step}.{layer}; run the verifier on it")]
    Plan {
        /// The step.
        step: StepId,
        /// The layer.
        layer: LayerId,
        /// The head.
        head: usize,
    },
    /// There is no NVIDIA driver.
    #[error("no CUDA driver: libcuda was not found; install the NVIDIA driver, or use the CPU reference")]
    NoDriver,
    /// There is no such GPU.
    #[error(
        "no CUDA device {ordinal}: the driver shows {count} (check CUDA_VISIBLE_DEVICES), or use the CPU reference"
    )]
    NoDevice {
        /// The ordinal asked for.
        ordinal: u32,
        /// GPUs the driver shows.
        count: u32,
    },
    /// A kernel needs more shared memory than the GPU has.
    #[error("kernel {symbol} needs {need} bytes of shared memory, but this GPU gives a block {have}")]
    SharedMemory {
        /// The kernel.
        symbol: String,
        /// Bytes it needs.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The driver cannot describe a tensor to the GPU's tensor memory accelerator.
    #[error(
        "cannot make a tensor map of {operand} with shape {shape:?} and strides {strides:?}: {name} ({message}); \
         strides must be below 2^40 bytes: pass a contiguous copy"
    )]
    TensorMap {
        /// `Q`, `K` or `V`.
        operand: Operand,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides in elements.
        strides: Vec<i64>,
        /// The driver's name of the error.
        name: String,
        /// The driver's sentence.
        message: String,
    },
    /// A copy runs past the end of a device buffer.
    #[error("{len} bytes at offset {at} do not fit a device buffer of {size} bytes")]
    BufferRange {
        /// Where the copy starts.
        at: usize,
        /// Its length.
        len: usize,
        /// Size of the buffer.
        size: usize,
    },
    /// The bundle cannot serve this GPU, or could not be read.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A call into the driver failed.
    #[error("cannot {action}: {name} ({message})")]
    Driver {
        /// What was being done.
        action: String,
        /// The driver's name of the error, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// The driver's sentence.
        message: String,
    },
}

fn range(min: u32, max: u32) -> String {
    if min == max { format!("exactly {max}") } else { format!("{min} to {max}") }
}

fn joined(variants: &[Variant]) -> String {
    variants.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn with(lse: bool) -> &'static str {
    if lse { "with" } else { "without" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_is_wanted() {
        let text = RuntimeError::Length { operand: Operand::Q, got: 7, min: 8, max: 8 }.to_string();
        assert_eq!(text, "q has 7 tokens, but this plan is for exactly 8");
        let text = RuntimeError::Length { operand: Operand::K, got: 7, min: 8, max: 12 }.to_string();
        assert_eq!(text, "k has 7 tokens, but this plan is for 8 to 12");
        let text = RuntimeError::NoVariant { dtype: DType::Fp16, lse: true }.to_string();
        assert!(text.starts_with("the bundle has no fp16 kernel with log-sum-exp output"), "{text}");
    }
}

//! One layer on the GPU with tensors from host memory: upload, launch, wait, download.

use calibc_runtime::cuda::{DeviceBuffer, Engine, Stream};
use calibc_runtime::{DeviceLse, DeviceTensor, RuntimeError, StepArg};
use half::{bf16, f16};

use crate::tensors::{Data, Tensor};

fn upload(engine: &Engine, tensor: &Tensor) -> Result<DeviceBuffer, RuntimeError> {
    let device = engine.device();
    match &tensor.data {
        Data::F32(data) => device.upload(data),
        Data::Bf16(data) => device.upload(data),
        Data::Fp16(data) => device.upload(data),
    }
}

/// Runs `layer` at `step`; returns the output in the type and memory order of `q`, and the log-sum-exp `[batch, head, token]`
/// if asked for. Outputs are NaN before the launch, so that a row the kernel did not write is seen.
pub(crate) fn attention(
    engine: &Engine,
    step: u32,
    layer: u32,
    [q, k, v]: [&Tensor; 3],
    lse: bool,
    scale: Option<f32>,
) -> Result<(Tensor, Option<Vec<f32>>), RuntimeError> {
    // f32 has no kernel; callers turn it down with their own words, this is the runtime's for it.
    let dtype = q.dtype().ok_or(RuntimeError::NoVariant { dtype: calibc_ir::DType::Bf16, lse })?;
    let device = engine.device();
    let ordinal = device.ordinal();
    let buffers = [upload(engine, q)?, upload(engine, k)?, upload(engine, v)?];
    let describe = |tensor: &Tensor, buffer: &DeviceBuffer| {
        let dtype = tensor.dtype().unwrap_or(dtype);
        if tensor.tokens_major {
            DeviceTensor::bshd(buffer.ptr(), dtype, ordinal, tensor.shape)
        } else {
            DeviceTensor::bhsd(buffer.ptr(), dtype, ordinal, tensor.shape)
        }
    };
    let [qd, kd, vd] = [(q, &buffers[0]), (k, &buffers[1]), (v, &buffers[2])].map(|(t, b)| describe(t, b));
    let out_buffer = device.alloc(buffers[0].bytes())?;
    out_buffer.fill(0xff)?;
    let out = describe(q, &out_buffer);
    let [batch, heads, tokens, _] = q.shape;
    let lse_buffer = if lse { Some(device.alloc(batch * heads * tokens * 4)?) } else { None };
    if let Some(buffer) = &lse_buffer {
        buffer.fill(0xff)?;
    }
    let lse_out = lse_buffer.as_ref().map(|b| DeviceLse::contiguous(b.ptr(), ordinal, [batch, heads, tokens]));
    // The copies above are complete before this stream, which waits for no other, begins.
    device.synchronize()?;
    let stream = Stream::new(device)?;
    #[expect(unsafe_code, reason = "the runtime's launch takes device addresses")]
    // SAFETY: every tensor describes a buffer of this function, allocated with the size of its host tensor on the engine's GPU and
    // alive until after `synchronize`; the outputs are buffers of their own; `stream` belongs to the same primary context.
    unsafe {
        engine.attention(StepArg::Host(step), layer, &qd, &kd, &vd, &out, lse_out.as_ref(), scale, stream.raw())?;
    }
    stream.synchronize()?;
    let data = match dtype {
        calibc_ir::DType::Bf16 => Data::Bf16(out_buffer.download::<bf16>()?),
        calibc_ir::DType::Fp16 => Data::Fp16(out_buffer.download::<f16>()?),
    };
    let lse = lse_buffer.map(|buffer| buffer.download::<f32>()).transpose()?;
    Ok((Tensor { data, shape: q.shape, tokens_major: q.tokens_major }, lse))
}

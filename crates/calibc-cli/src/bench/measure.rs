//! Times launches on the GPU, and on the host what a launch costs the caller.
#![expect(unsafe_code, reason = "the runtime's launch takes device addresses")]

use std::time::Instant;

use calibc_bundle::Bundle;
use calibc_ir::{BLOCK, DType, Geometry, LayerId, Plan, StepId};
use calibc_runtime::cuda::{Device, DeviceBuffer, Engine, Marks, Stream};
use calibc_runtime::{DeviceLse, DeviceTensor, Residency, RuntimeError, StepArg};
use calibc_trace::random::SplitMix64;
use half::{bf16, f16};

use super::stats::Measured;
use crate::args::MemoryLayout;
use crate::tensors::normal;

/// Elements that are made and uploaded at a time.
const CHUNK: usize = 1 << 22;
/// Launches whose host cost is measured.
const CALLS: u32 = 2048;
/// Launches between two waits for the GPU: few enough that it never makes the host wait.
const CALLS_AHEAD: u32 = 32;

/// How q, k, v and the outputs look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensors {
    pub(super) batch: u32,
    pub(super) dtype: DType,
    pub(super) layout: MemoryLayout,
    pub(super) lse: bool,
    pub(super) seed: u64,
}

/// q, k, v and out on the GPU, and the log-sum-exp if it is written.
pub(super) struct Operands {
    tensors: [DeviceTensor; 4],
    lse: Option<DeviceLse>,
    // What the tensors describe.
    _buffers: Vec<DeviceBuffer>,
}

impl Operands {
    /// Random tensors of the shape that `plan` wants.
    pub(super) fn new(device: &Device, plan: &Plan, how: &Tensors) -> Result<Self, RuntimeError> {
        let shape = |tokens: u32| [how.batch, plan.model.heads, tokens, plan.model.head_dim].map(|n| n as usize);
        let [q, kv] = [plan.geometry.q_tokens(), plan.geometry.kv_tokens()].map(shape);
        let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
        let mut numbers = Normals::new(how.seed, how.dtype);
        let mut buffers = Vec::new();
        for shape in [q, kv, kv] {
            buffers.push(numbers.upload(device, elements(shape))?);
        }
        buffers.push(device.alloc(2 * elements(q))?);
        let make = match how.layout {
            MemoryLayout::Bhsd => DeviceTensor::bhsd,
            MemoryLayout::Bshd => DeviceTensor::bshd,
        };
        let tensors = [(0, q), (1, kv), (2, kv), (3, q)]
            .map(|(i, shape)| make(buffers[i].ptr(), how.dtype, device.ordinal(), shape));
        let [batch, heads, tokens, _] = q;
        let lse = match how.lse {
            false => None,
            true => {
                buffers.push(device.alloc(4 * batch * heads * tokens)?);
                buffers.last().map(|b| DeviceLse::contiguous(b.ptr(), device.ordinal(), [batch, heads, tokens]))
            }
        };
        Ok(Self { tensors, lse, _buffers: buffers })
    }

    /// Submits one launch.
    ///
    /// # Safety
    /// `self`, `engine` and `stream` live until the launch has run.
    unsafe fn launch(
        &self,
        engine: &Engine,
        step: StepId,
        layer: LayerId,
        stream: &Stream,
    ) -> Result<(), RuntimeError> {
        let [q, k, v, out] = &self.tensors;
        // SAFETY: the tensors describe buffers of `self`, allocated with their sizes on one GPU, which is the engine's or the
        // engine says so; the outputs are buffers of their own; the rest is the caller's promise.
        unsafe { engine.attention(StepArg::Host(step.0), layer.0, q, k, v, out, self.lse.as_ref(), None, stream.raw()) }
    }
}

/// Normal numbers by the million: draws from a table of them.
struct Normals {
    table: Vec<u16>,
    numbers: SplitMix64,
}

impl Normals {
    fn new(seed: u64, dtype: DType) -> Self {
        let mut numbers = SplitMix64::new(seed);
        let bits = |x: f32| match dtype {
            DType::Bf16 => bf16::from_f32(x).to_bits(),
            DType::Fp16 => f16::from_f32(x).to_bits(),
        };
        let table = (0..1 << 16).map(|_| bits(normal(&mut numbers))).collect();
        Self { table, numbers }
    }

    fn fill(&mut self, to: &mut [u16]) {
        for four in to.chunks_mut(4) {
            let bits = self.numbers.next();
            four.iter_mut().zip(0..).for_each(|(to, i)| *to = self.table[(bits >> (16 * i)) as u16 as usize]);
        }
    }

    fn upload(&mut self, device: &Device, elements: usize) -> Result<DeviceBuffer, RuntimeError> {
        let buffer = device.alloc(2 * elements)?;
        let mut chunk = vec![0; elements.min(CHUNK)];
        for start in (0..elements).step_by(CHUNK) {
            let chunk = &mut chunk[..(elements - start).min(CHUNK)];
            self.fill(chunk);
            buffer.write(2 * start, chunk)?;
        }
        Ok(buffer)
    }
}

/// One thing that rounds time: a layer of an engine.
#[derive(Clone, Copy)]
pub(super) struct Timed<'a> {
    pub(super) engine: &'a Engine,
    pub(super) step: StepId,
    pub(super) layer: LayerId,
}

/// Runs rounds over `timed`, each beginning one further on, and returns the milliseconds of each by round. `during` is called
/// while the GPU is at work, once a round; `progress` after each with the number of rounds done.
pub(super) fn rounds(
    timed: &[Timed<'_>],
    operands: &Operands,
    stream: &Stream,
    [warmup, count]: [u32; 2],
    mut during: impl FnMut(),
    mut progress: impl FnMut(u32),
) -> Result<Vec<Vec<f64>>, RuntimeError> {
    let Some(first) = timed.first() else { return Ok(Vec::new()) };
    let mut marks = Marks::new(first.engine.device(), timed.len() + 1)?;
    let mut times = vec![Vec::with_capacity(count as usize); timed.len()];
    for round in 0..warmup + count {
        let order: Vec<usize> = (0..timed.len()).map(|i| (i + round as usize) % timed.len()).collect();
        let launch = |i: usize| {
            let Timed { engine, step, layer } = timed[i];
            // SAFETY: all of them outlive this function, which waits for the last launch of every round; where it fails, the
            // engine and the buffers wait for the GPU as they are dropped.
            unsafe { operands.launch(engine, step, layer, stream) }
        };
        // Keeps the GPU busy while the host catches up, so that no timed launch waits for its submission.
        launch(order[order.len() - 1])?;
        marks.set(0, stream)?;
        for (place, &i) in order.iter().enumerate() {
            launch(i)?;
            marks.set(place + 1, stream)?;
        }
        marks.wait(order.len() / 2)?;
        during();
        marks.wait(order.len())?;
        if round >= warmup {
            for (place, &i) in order.iter().enumerate() {
                times[i].push(f64::from(marks.milliseconds(place, place + 1)?));
            }
        }
        progress(round + 1);
    }
    Ok(times)
}

/// Microseconds that a launch takes the calling thread, with all steps resident or a window of two. Launches are of a tiny plan, so
/// that the GPU keeps up; the way through the host is that of any other.
pub(super) fn host_cost(
    bundle: &Bundle,
    device: &Device,
    residency: Residency,
    dtype: DType,
    lse: bool,
) -> Result<Option<Measured>, RuntimeError> {
    const STEPS: u32 = 4;
    const LAYERS: u32 = 16;
    let plan = super::dense_plan(bundle.plan(), Geometry::sequence(BLOCK, BLOCK), [STEPS, LAYERS, 1]);
    let engine = Engine::for_plan(device.ordinal(), bundle, &plan, residency)?;
    let how = Tensors { batch: 1, dtype, layout: MemoryLayout::Bhsd, lse, seed: 0 };
    let operands = Operands::new(device, &plan, &how)?;
    let stream = Stream::new(device)?;
    let mut micros = Vec::with_capacity(CALLS as usize);
    for call in 0..CALLS_AHEAD + CALLS {
        let (step, layer) = (StepId(call / LAYERS % STEPS), LayerId(call % LAYERS));
        let start = Instant::now();
        // SAFETY: the stream is waited for below before anything goes; where that fails, the engine and the buffers wait for the
        // GPU as they are dropped.
        unsafe { operands.launch(&engine, step, layer, &stream) }?;
        let took = start.elapsed();
        // The first ones bring code and tables to the GPU.
        if call >= CALLS_AHEAD {
            micros.push(took.as_secs_f64() * 1e6);
        }
        if call % CALLS_AHEAD == CALLS_AHEAD - 1 {
            stream.synchronize()?;
        }
    }
    Ok(Measured::new(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_normal_and_reproducible() {
        let draw = |seed, n| {
            let mut bits = vec![0; n];
            Normals::new(seed, DType::Bf16).fill(&mut bits);
            bits
        };
        let values = draw(3, 40_001);
        assert_eq!(values, draw(3, 40_001));
        assert_ne!(values, draw(4, 40_001));
        assert_eq!(values[..9], draw(3, 9), "whatever the length");
        let x = |bits: &u16| f64::from(bf16::from_bits(*bits).to_f32());
        let mean = values.iter().map(x).sum::<f64>() / 40_001.0;
        let variance = values.iter().map(|v| (x(v) - mean).powi(2)).sum::<f64>() / 40_001.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
    }
}

//! A problem on the GPU: inputs among NaN, outputs poisoned, guard bands on both sides.

use std::sync::Arc;

use anyhow::{Context, ensure};
use calibc_bundle::{Bundle, Contents, Kernel, encode};
use calibc_ir::{DType, Plan};
use calibc_runtime::cuda::{Device, DeviceBuffer, Stream};
use calibc_runtime::{DeviceLse, DeviceTensor, Engine, RuntimeError, StepArg};

use crate::problem::{Inputs, Problem, widen};

/// Every byte of memory that is not an input element. A NaN in bf16, fp16 and f32.
const POISON: u8 = 0xff;
/// Elements on either side of a tensor.
const GUARD: usize = 1024;

/// Where the elements of a `[batch, head, token, head_dim]` tensor lie in a buffer.
struct Place {
    shape: [usize; 4],
    strides: [usize; 4],
    elements: usize,
}

impl Place {
    fn new(shape: [usize; 4], token_major: bool, gaps: bool) -> Self {
        let [b, h, s, d] = shape;
        let (row, block) = if gaps { (d + 8, 16) } else { (d, 0) };
        let (head, token, batch) = if token_major {
            (row, h * row + block, s * (h * row + block) + block)
        } else {
            (s * row + block, row, h * (s * row + block) + block)
        };
        Self { shape, strides: [batch, head, token, 1], elements: b * batch + 2 * GUARD }
    }

    fn row(&self, b: usize, h: usize, s: usize) -> usize {
        GUARD + b * self.strides[0] + h * self.strides[1] + s * self.strides[2]
    }

    /// (first element in the buffer, first element in the contiguous tensor) of every row.
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let [batch, heads, tokens, head_dim] = self.shape;
        (0..batch * heads * tokens)
            .map(move |i| (self.row(i / tokens / heads, i / tokens % heads, i % tokens), i * head_dim))
    }

    fn tensor(&self, buffer: &DeviceBuffer, dtype: DType, device: u32) -> DeviceTensor {
        let ptr = buffer.ptr() + 2 * GUARD as u64;
        DeviceTensor { ptr, dtype, device, shape: self.shape, strides: self.strides.map(|n| n as i64) }
    }
}

/// What the GPU wrote, contiguous.
pub(crate) struct Written {
    pub(crate) out: Vec<f32>,
    pub(crate) lse: Option<Vec<f32>>,
    pub(crate) bits: Vec<u16>,
}

/// The problem's bundle, encoded and parsed.
pub(crate) fn bundle(problem: &Problem, plan: &Plan, kernel: &Kernel) -> anyhow::Result<Bundle> {
    // The engine loads every variant of the plan; the suite needs the one it runs.
    let mut plan = plan.clone();
    plan.variants = vec![problem.variant(&plan)];
    let report = serde_json::Value::Null;
    let kernels = [kernel.clone()];
    let contents = Contents { plan: &plan, kernels: &kernels, spec: "", report: &report, calibc_version: "test" };
    Ok(Bundle::parse(&encode(&contents)?)?)
}

/// A problem whose tensors lie on the GPU.
pub(crate) struct Loaded<'a> {
    problem: &'a Problem,
    engine: Arc<Engine>,
    stream: Arc<Stream>,
    places: [Place; 2],
    inputs: [DeviceBuffer; 3],
    out: DeviceBuffer,
    lse: DeviceBuffer,
    step: DeviceBuffer,
}

impl<'a> Loaded<'a> {
    pub(crate) fn new(
        device: &Device,
        problem: &'a Problem,
        plan: &Plan,
        kernel: &Kernel,
        inputs: &Inputs,
    ) -> anyhow::Result<Self> {
        let engine = Engine::new(device.ordinal(), &bundle(problem, plan, kernel)?)?;
        Self::on(Arc::new(engine), Arc::new(Stream::new(device)?), problem, inputs)
    }

    /// A problem with tensors of its own, for an engine and a stream that others may use too.
    pub(crate) fn on(
        engine: Arc<Engine>,
        stream: Arc<Stream>,
        problem: &'a Problem,
        inputs: &Inputs,
    ) -> anyhow::Result<Self> {
        let device = engine.device();
        let mut places = problem.shapes().map(|shape| Place::new(shape, problem.token_major, problem.gaps));
        if problem.one_kv_head {
            places[1].strides[1] = 0;
        }
        let upload = |place: &Place, data: &[u16], head_dim: usize| {
            let mut image = vec![u16::from_ne_bytes([POISON; 2]); place.elements];
            for (to, from) in place.rows() {
                image[to..to + head_dim].copy_from_slice(&data[from..from + head_dim]);
            }
            device.upload(&image)
        };
        let [q, kv] = &places;
        let d = problem.head_dim as usize;
        let (out, lse, step) = (
            device.alloc(q.elements * 2)?,
            device.alloc((q.shape[..3].iter().product::<usize>() + 2 * GUARD) * 4)?,
            device.upload(&[problem.step.0])?,
        );
        let inputs = [upload(q, &inputs.data[0], d)?, upload(kv, &inputs.data[1], d)?, upload(kv, &inputs.data[2], d)?];
        Ok(Self { problem, stream, inputs, out, lse, step, engine, places })
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Sets the step that the kernel will read from device memory.
    pub(crate) fn set_step(&self, step: u32) -> anyhow::Result<()> {
        Ok(self.step.write(0, &[step])?)
    }

    pub(crate) fn poison(&self) -> anyhow::Result<()> {
        self.out.fill(POISON)?;
        Ok(self.lse.fill(POISON)?)
    }

    /// Submits the launch, the step the problem's or, if `on_device`, from device memory.
    pub(crate) fn submit(&self, on_device: bool) -> Result<(), RuntimeError> {
        self.submit_at(if on_device { StepArg::Device(self.step.ptr()) } else { StepArg::Host(self.problem.step.0) })
    }

    /// Submits the launch at any step.
    pub(crate) fn submit_at(&self, step: StepArg) -> Result<(), RuntimeError> {
        let device = self.engine.device().ordinal();
        let [q, kv] = &self.places;
        let dtype = self.problem.dtype;
        let [q_in, k_in, v_in] = &self.inputs;
        let [batch, heads, tokens, _] = q.shape;
        let lse = DeviceLse::contiguous(self.lse.ptr() + 4 * GUARD as u64, device, [batch, heads, tokens]);
        #[expect(unsafe_code, reason = "raw device pointers")]
        // SAFETY: every buffer and the stream live in `self`, places lie inside their buffers by construction, and callers
        // synchronise the stream before they touch a buffer again.
        unsafe {
            self.engine.attention(
                step,
                self.problem.layer.0,
                &q.tensor(q_in, dtype, device),
                &kv.tensor(k_in, dtype, device),
                &kv.tensor(v_in, dtype, device),
                &q.tensor(&self.out, dtype, device),
                self.problem.lse.then_some(&lse),
                self.problem.softmax_scale,
                self.stream.raw(),
            )
        }
    }

    /// Poisons the outputs, runs, and collects them.
    pub(crate) fn run(&self) -> anyhow::Result<Written> {
        self.poison()?;
        self.submit(self.problem.step_on_device)?;
        self.stream.synchronize()?;
        self.collect()
    }

    /// The outputs; every element must have been written, and nothing else.
    pub(crate) fn collect(&self) -> anyhow::Result<Written> {
        let place = &self.places[0];
        let head_dim = place.shape[3];
        let poison = u16::from_ne_bytes([POISON; 2]);
        let mut image = self.out.download::<u16>()?;
        let mut bits = vec![0; place.shape.iter().product()];
        for (from, to) in place.rows() {
            let row = &mut image[from..from + head_dim];
            let unwritten = row.iter().filter(|&&bits| bits == poison).count();
            ensure!(unwritten == 0, "{unwritten} elements of row {} were not written", to / head_dim);
            bits[to..to + head_dim].copy_from_slice(row);
            row.fill(poison);
        }
        let touched = image.iter().position(|&bits| bits != poison);
        ensure!(touched.is_none(), "element {touched:?} of the buffer lies outside the output but was written");

        let image = self.lse.download::<u32>()?;
        let (before, rest) = image.split_at(GUARD);
        let (lse, after) = rest.split_at(rest.len() - GUARD);
        let clean = |words: &[u32]| words.iter().all(|&word| word == u32::from_ne_bytes([POISON; 4]));
        ensure!(clean(before) && clean(after), "memory beside the log-sum-exp was written");
        let lse = if self.problem.lse {
            ensure!(!lse.contains(&u32::from_ne_bytes([POISON; 4])), "log-sum-exps were not written");
            Some(lse.iter().map(|&bits| f32::from_bits(bits)).collect())
        } else {
            ensure!(clean(lse), "the log-sum-exp was written though it was not asked for");
            None
        };
        let out = bits.iter().map(|&bits| widen(self.problem.dtype, bits)).collect();
        Ok(Written { out, lse, bits })
    }

    /// Whether nothing at all was written since [`Loaded::poison`].
    pub(crate) fn untouched(&self) -> anyhow::Result<bool> {
        let clean = |bytes: Vec<u8>| bytes.iter().all(|&byte| byte == POISON);
        Ok(clean(self.out.download()?) && clean(self.lse.download()?))
    }
}

/// The first GPU, or why there is none.
pub(crate) fn first_gpu() -> anyhow::Result<Device> {
    Device::open(0).context("no CUDA device")
}

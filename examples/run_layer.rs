//! Runs one layer of a bundle on random q, k and v: on the first GPU where there is one, else on the CPU.
//!
//! ```sh
//! cargo run --release --bin run_layer -- plan.bundle [STEP [LAYER]]
//! ```
//!
//! Prints what the layer computes, how long it takes, and how far sampled rows are from naive masked attention.
#![expect(clippy::print_stdout, reason = "a program")]

use std::time::Instant;

use anyhow::{Context, Result, bail};
use calibc_ir::{BlockMask, DType, LayerId, Plan, Site, StepId};
use calibc_runtime::cuda::{Device, DeviceBuffer, Stream, Timer};
use calibc_runtime::reference::{self, Options, masked};
use calibc_runtime::{Bundle, DeviceTensor, Engine, HostTensor, Operand, RuntimeError, StepArg};
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};

const RUNS: usize = 9;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().context("usage: run_layer BUNDLE [STEP [LAYER]]")?;
    let mut number =
        || args.next().map_or(Ok(0), |n| n.parse::<u32>().with_context(|| format!("`{n}` is not a number")));
    let (step, layer) = (StepId(number()?), LayerId(number()?));

    let bundle = Bundle::open(path.as_ref())?;
    let plan = bundle.plan();
    if step.0 >= plan.num_steps() || layer.0 >= plan.model.layers {
        bail!(
            "{step}.{layer} is not in this bundle: it has {} steps and {} layers",
            plan.num_steps(),
            plan.model.layers
        );
    }
    let geometry = &plan.geometry;
    let ops = plan.layer_ops(step, layer);
    let density = ops.iter().map(|&op| plan.density(op)).sum::<f64>() / ops.len() as f64;
    println!("{}: {geometry}, {} heads of {}", plan.model.name, plan.model.heads, plan.model.head_dim);
    println!(
        "{step}.{layer}: density {density:.3}, mask rows of {} bytes",
        4 * BlockMask::words_for(geometry.num_kv_blocks())
    );

    let problem = Problem::new(plan, step, layer);
    let out = match Device::open(0) {
        Ok(device) => problem.on_gpu(&device, &bundle, density)?,
        Err(error @ (RuntimeError::NoDriver | RuntimeError::NoDevice { .. })) => {
            println!("{error}");
            problem.on_cpu()?
        }
        Err(error) => return Err(error.into()),
    };
    println!("relative error of sampled rows: {:.1e}", problem.error(&out)?);
    Ok(())
}

/// One layer with its inputs: bits of `dtype`, contiguous `[1, heads, tokens, head_dim]`.
struct Problem<'a> {
    plan: &'a Plan,
    step: StepId,
    layer: LayerId,
    dtype: DType,
    shapes: [[usize; 4]; 3],
    inputs: [Vec<u16>; 3],
}

impl<'a> Problem<'a> {
    fn new(plan: &'a Plan, step: StepId, layer: LayerId) -> Self {
        let dtype = plan.variants.first().map_or(DType::Bf16, |variant| variant.dtype);
        let [heads, head_dim] = [plan.model.heads, plan.model.head_dim].map(|n| n as usize);
        let shape = |tokens: u32| [1, heads, tokens as usize, head_dim];
        let shapes =
            [shape(plan.geometry.q_tokens()), shape(plan.geometry.kv_tokens()), shape(plan.geometry.kv_tokens())];
        let mut state = 1u64;
        let inputs = shapes.map(|shape| random(shape.iter().product(), dtype, &mut state));
        Self { plan, step, layer, dtype, shapes, inputs }
    }

    fn on_host<R>(&self, run: impl FnOnce(&[HostTensor<'_>; 3]) -> Result<R, RuntimeError>) -> Result<R, RuntimeError> {
        let operands = [Operand::Q, Operand::K, Operand::V];
        let view = |i: usize| match self.dtype {
            DType::Bf16 => HostTensor::bhsd(operands[i], self.inputs[i].reinterpret_cast::<bf16>(), self.shapes[i]),
            DType::Fp16 => HostTensor::bhsd(operands[i], self.inputs[i].reinterpret_cast::<f16>(), self.shapes[i]),
        };
        run(&[view(0)?, view(1)?, view(2)?])
    }

    fn on_cpu(&self) -> Result<Vec<f32>> {
        let start = Instant::now();
        let options = Options { round_to: Some(self.dtype), ..Options::default() };
        let output =
            self.on_host(|[q, k, v]| reference::attention(self.plan, self.step, self.layer, q, k, v, &options))?;
        println!("CPU reference, {}: {:.2} s", self.dtype, start.elapsed().as_secs_f64());
        Ok(output.out)
    }

    fn on_gpu(&self, device: &Device, bundle: &Bundle, density: f64) -> Result<Vec<f32>> {
        let engine = Engine::new(device.ordinal(), bundle)?;
        println!("{}: {:.1} MB of tables", engine.info().name, engine.table_bytes() as f64 / 1e6);
        let [q, k, v] = [0, 1, 2].map(|i| device.upload(&self.inputs[i]));
        let (q, k, v) = (q?, k?, v?);
        let out = device.alloc(q.bytes())?;
        let tensor =
            |buffer: &DeviceBuffer, shape| DeviceTensor::bhsd(buffer.ptr(), self.dtype, device.ordinal(), shape);
        let [q_shape, kv_shape, _] = self.shapes;
        let (tq, tk, tv) = (tensor(&q, q_shape), tensor(&k, kv_shape), tensor(&v, kv_shape));
        let stream = Stream::new(device)?;
        let mut timer = Timer::new(device)?;
        let mut times = Vec::new();
        for _ in 0..RUNS {
            times.push(timer.measure(&stream, || {
                let (step, layer) = (StepArg::Host(self.step.0), self.layer.0);
                #[expect(unsafe_code, reason = "raw device pointers")]
                // SAFETY: the tensors describe buffers and the stream a stream that live until `measure` has waited for the launch.
                unsafe {
                    engine.attention(step, layer, &tq, &tk, &tv, &tensor(&out, q_shape), None, None, stream.raw())
                }
            })?);
        }
        times.sort_by(f32::total_cmp);
        let median = f64::from(times[RUNS / 2]);
        let [_, heads, q_tokens, head_dim] = q_shape.map(|n| n as f64);
        let flops = 4.0 * heads * q_tokens * kv_shape[2] as f64 * head_dim * density;
        println!("CUDA, {}: {median:.3} ms ({:.0} TFLOP/s of kept blocks)", self.dtype, flops / median / 1e9);
        let bits: Vec<u16> = out.download()?;
        Ok(bits.iter().map(|&bits| widen(self.dtype, bits)).collect())
    }

    /// Relative Frobenius error of a few rows of every head against naive attention in f64.
    fn error(&self, out: &[f32]) -> Result<f64> {
        let [_, heads, tokens, head_dim] = self.shapes[0];
        let rows: Vec<u32> = (0..4).map(|i| (i * tokens / 4 + tokens / 9) as u32).collect();
        let (mut error, mut norm) = (0.0, 0.0);
        for head in 0..heads {
            let site = Site::new(self.step.0, self.layer.0, head as u32);
            let want = self.on_host(|[q, k, v]| masked::rows(self.plan, site, 0, q, k, v, None, &rows))?;
            for (&row, want) in rows.iter().zip(want) {
                let got = &out[(head * tokens + row as usize) * head_dim..][..head_dim];
                error += got.iter().zip(&want.out).map(|(&got, want)| (f64::from(got) - want).powi(2)).sum::<f64>();
                norm += want.out.iter().map(|want| want * want).sum::<f64>();
            }
        }
        Ok((error / norm).sqrt())
    }
}

/// Roughly normal numbers, as bits of `dtype`.
fn random(count: usize, dtype: DType, state: &mut u64) -> Vec<u16> {
    let mut uniform = || {
        // An xorshift generator.
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let normal = (0..count).map(|_| 2.0 * (uniform() + uniform() + uniform()));
    match dtype {
        DType::Bf16 => normal.map(|x| bf16::from_f32(x).to_bits()).collect(),
        DType::Fp16 => normal.map(|x| f16::from_f32(x).to_bits()).collect(),
    }
}

fn widen(dtype: DType, bits: u16) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_bits(bits).to_f32(),
        DType::Fp16 => f16::from_bits(bits).to_f32(),
    }
}

//! Capture kernels against the CPU reference on randomised problems, on sampled blocks of full-size problems, and how long they take.
//!
//! Without a GPU the tests report a skip with its reason; `CALIBC_REQUIRE_GPU=1` makes that a failure. The executable can be carried
//! to another machine, with an NVRTC there or kernels as `kernels` describes. `CALIBC_TEST_PROBLEM=17` runs one problem,
//! `CALIBC_TEST_FAMILY=hopper` one family.

mod kernels;
mod large;
mod problem;
mod rounding;

use std::io::Write;

use anyhow::ensure;
use calibc_codegen::{CaptureVariant, Statistic};
use calibc_ir::{DType, Family};
use calibc_nvrtc::testing::SKIP_PREFIX;
use calibc_runtime::cuda::{CaptureKernel, Device, DeviceBuffer, Stream};
use calibc_runtime::reference::capture::{Statistics, block_statistics};
use calibc_runtime::{CaptureCall, DeviceLse, DeviceTensor};
use calibc_trace::Encoding;

use problem::{COUNT, Inputs, Problem};

/// Prints past the test harness, which would swallow it.
pub(crate) fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// The first GPU; where there is none, kernels are made for another machine if a folder is named, and the test is over.
pub(crate) fn gpu() -> Option<Device> {
    match Device::open(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var_os("CALIBC_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!required, "CALIBC_REQUIRE_GPU=1, but {error}");
            let name = std::thread::current().name().unwrap_or("a test").to_owned();
            let _ = std::io::stderr().write_all(format!("{SKIP_PREFIX}{name}: {error}\n").as_bytes());
            None
        }
    }
}

/// Elements on either side of a result, and the byte in and around it before the kernel runs: a NaN as f32.
const GUARD: usize = 256;
const POISON: u8 = 0xff;

/// A problem's tensors on the GPU.
struct Loaded<'a> {
    problem: &'a Problem,
    tensors: Vec<(DeviceBuffer, DeviceTensor)>,
    lse: DeviceBuffer,
    stream: Stream,
}

impl<'a> Loaded<'a> {
    fn new(device: &Device, problem: &'a Problem, inputs: &Inputs) -> anyhow::Result<Self> {
        let Problem { heads, q_len, kv_len, head_dim, dtype, .. } = *problem;
        let upload = |data: &Vec<u16>, tokens: usize| -> anyhow::Result<(DeviceBuffer, DeviceTensor)> {
            let shape = [1, heads, tokens, head_dim];
            if !problem.token_major {
                let buffer = device.upload(data)?;
                let tensor = DeviceTensor::bhsd(buffer.ptr(), dtype, 0, shape);
                return Ok((buffer, tensor));
            }
            let mut moved = vec![0; data.len()];
            for (row, values) in data.chunks_exact(head_dim).enumerate() {
                let (head, token) = (row / tokens, row % tokens);
                moved[(token * heads + head) * head_dim..][..head_dim].copy_from_slice(values);
            }
            let buffer = device.upload(&moved)?;
            let tensor = DeviceTensor::bshd(buffer.ptr(), dtype, 0, shape);
            Ok((buffer, tensor))
        };
        let [q, k, v] = &inputs.data;
        let tensors = [(q, q_len), (k, kv_len), (v, kv_len), (&inputs.out, q_len)];
        Ok(Self {
            problem,
            tensors: tensors.into_iter().map(|(data, tokens)| upload(data, tokens)).collect::<Result<_, _>>()?,
            lse: device.upload(&inputs.lse)?,
            stream: Stream::new(device)?,
        })
    }

    /// Bytes of both results of one launch, whose guards must be untouched.
    #[expect(unsafe_code, reason = "a launch borrows device memory")]
    fn run(&self, kernel: &CaptureKernel) -> anyhow::Result<[Vec<u8>; 2]> {
        let Problem { heads, q_len, kv_len, .. } = *self.problem;
        let size = kernel.code().statistic_bytes as usize;
        let bytes = heads * q_len.div_ceil(128) * kv_len.div_ceil(128) * size;
        let guard = GUARD * size;
        let results = [(), ()].map(|()| kernel.device().alloc(bytes + 2 * guard));
        let [energy, deviation] = results;
        let results = [energy?, deviation?];
        for result in &results {
            result.fill(POISON)?;
        }
        let call = CaptureCall {
            q: &self.tensors[0].1,
            k: &self.tensors[1].1,
            v: &self.tensors[2].1,
            out: &self.tensors[3].1,
            lse: &DeviceLse::contiguous(self.lse.ptr(), 0, [1, heads, q_len]),
            rows_per_block: self.problem.rows_per_block,
            seed: self.problem.seed(),
            softmax_scale: self.problem.scale,
            energy: results[0].ptr() + guard as u64,
            deviation: results[1].ptr() + guard as u64,
        };
        // SAFETY: every address is that of a buffer of this GPU with the size its shape says, alive until the stream is waited for.
        unsafe { kernel.block_statistics(&call, self.stream.raw()) }?;
        self.stream.synchronize()?;
        let mut parts = Vec::new();
        for result in &results {
            let all: Vec<u8> = result.download()?;
            let around = all[..guard].iter().chain(&all[guard + bytes..]);
            ensure!(around.copied().all(|byte| byte == POISON), "wrote outside of its results");
            parts.push(all[guard..guard + bytes].to_vec());
        }
        let deviation = parts.pop().unwrap_or_default();
        Ok([parts.pop().unwrap_or_default(), deviation])
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Largest relative error of energies; what is next to nothing is taken against [`FLOOR`].
fn energy_error(got: &[f32], want: &[f64]) -> f64 {
    let each = got.iter().zip(want).map(|(&got, &want)| (f64::from(got) - want).abs() / want.max(FLOOR));
    each.fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

/// What energies may be off by, relatively: scores and masses are computed in f32.
pub(crate) const ENERGY_TOLERANCE: f64 = 2e-4;

/// Below 2^-31.9 a code is 0 whatever the value.
pub(crate) const FLOOR: f64 = 2.5e-10;

/// The relative error of energies, and that of deviations relative to `bounds`.
fn check(
    loaded: &Loaded<'_>,
    kernels: &[CaptureKernel; 2],
    want: &Statistics,
    bounds: &[f64],
) -> anyhow::Result<(f64, f64)> {
    let [plain, coded] = kernels;
    let got = loaded.run(plain)?;
    ensure!(got == loaded.run(plain)?, "a second run gave other bits");
    let got = got.map(|bytes| floats(&bytes));
    let codes = loaded.run(coded)?;
    for (values, codes) in got.iter().zip(&codes) {
        let mut want = Vec::new();
        Encoding::Log2U8.encode(values, &mut want);
        ensure!(*codes == want, "codes are not those of the values");
    }
    for row in got[0].chunks_exact(want.shape[2]) {
        let sum: f64 = row.iter().map(|&x| f64::from(x)).sum();
        ensure!((sum - 1.0).abs() < 1e-3, "energies of a row sum to {sum}");
    }
    assert_eq!([got[0].len(), got[1].len()], [want.energy.len(), bounds.len()]);
    let deviation = rounding::of_bound(got[1].iter().map(|&x| f64::from(x)), &want.deviation, bounds);
    Ok((energy_error(&got[0], &want.energy), deviation))
}

#[test]
fn cuda_statistics_agree_with_the_reference() {
    let Some(device) = gpu() else {
        if std::env::var_os("CALIBC_TEST_KERNELS").is_some() {
            kernels::prepare().unwrap();
        }
        return;
    };
    let info = device.info().unwrap();
    let arch = kernels::arch_for(info.compute_capability).unwrap();
    print(&format!("\n{} ({arch})\n", info.name));
    let only = std::env::var("CALIBC_TEST_PROBLEM").ok().map(|n| n.parse::<u64>().expect("a problem's number"));
    let mut failures = Vec::new();
    let mut worst = [[(0.0, 0.0); 2]; 2];
    for family in kernels::families(arch) {
        // By element type, then head_dim.
        let load = |dtype, head_dim| {
            Statistic::ALL
                .map(|s| kernels::load(CaptureVariant { dtype, head_dim, statistic: s }, family, arch).unwrap())
        };
        let loaded = DType::ALL.map(|dtype| [64, 128].map(|head_dim| load(dtype, head_dim)));
        for number in (0..COUNT).filter(|n| only.is_none_or(|only| only == *n)) {
            let problem = Problem::new(number);
            let inputs = problem.inputs();
            let want = inputs
                .with(&problem, |[q, k, v]| {
                    block_statistics(q, k, v, problem.rows_per_block, problem.seed(), problem.scale)
                })
                .unwrap();
            let kernels = &loaded[problem.dtype as usize][problem.head_dim / 128];
            let bounds = rounding::bounds(&problem, &inputs, &want.deviation);
            let verdict =
                Loaded::new(&device, &problem, &inputs).and_then(|loaded| check(&loaded, kernels, &want, &bounds));
            let good = matches!(&verdict, Ok((e, d)) if *e <= ENERGY_TOLERANCE && *d <= 1.0);
            let text = match verdict {
                Err(error) => format!("{error:#}"),
                Ok((e, d)) => {
                    let worst = &mut worst[family as usize][problem.dtype as usize];
                    *worst = (f64::max(worst.0, e), f64::max(worst.1, d));
                    format!("energy {e:.1e} deviation {d:.2} of its bound")
                }
            };
            print(&format!("{} {family:8} {text}  {problem}\n", if good { "ok  " } else { "FAIL" }));
            if !good {
                failures.push(format!("{family} #{number}"));
            }
        }
        for dtype in DType::ALL {
            let (e, d) = worst[family as usize][dtype as usize];
            print(&format!(
                "worst {family} {dtype}: relative error of energies {e:.1e}, of deviations {d:.2} of the bound\n"
            ));
        }
    }
    assert!(failures.is_empty(), "failed: {}", failures.join(", "));
}

#[test]
fn full_size_statistics_agree_on_sampled_blocks() {
    let Some(device) = gpu() else { return };
    let arch = kernels::arch_for(device.info().unwrap().compute_capability).unwrap();
    for family in kernels::families(arch) {
        for (tokens, rows) in [(75_600, 16), (75_600, 128), (32_760, 16), (32_760, 128)] {
            // All rows in the portable kernel take as long as portable dense attention.
            if (family, rows) == (Family::Portable, 128) {
                continue;
            }
            large::run(&device, family, arch, tokens, rows).unwrap();
        }
    }
}

mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What the suite claims to cover, it covers.
    #[test]
    fn problems_cover_every_dimension() {
        let problems: Vec<Problem> = (0..COUNT).map(Problem::new).collect();
        let seen = |of: &dyn Fn(&Problem) -> u64| problems.iter().map(of).collect::<BTreeSet<u64>>().len();
        assert_eq!(seen(&|p| u64::from(p.rows_per_block) * 4 + p.dtype as u64 * 2 + p.head_dim as u64 / 128), 16);
        assert_eq!(seen(&|p| u64::from(p.token_major) * 2 + u64::from(p.scale.is_some())), 4);
        assert_eq!(seen(&|p| p.q_len as u64), 11);
        assert!(problems.iter().filter(|p| p.kv_len > 32 * 128).count() >= 4, "more than a span of key blocks");
        assert!(problems.iter().filter(|p| p.kv_len % 128 != 0 && p.q_len != p.kv_len).count() >= 8);
    }
}

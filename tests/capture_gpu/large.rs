//! Full-size problems: sampled query blocks against brute force, and the time of a launch.

use anyhow::ensure;
use calibc_codegen::{CaptureVariant, Statistic};
use calibc_ir::capture::sampled_rows;
use calibc_ir::{Arch, DType, Family};
use calibc_runtime::cuda::{Device, Stream, Timer};
use calibc_runtime::{CaptureCall, DeviceLse, DeviceTensor};
use calibc_trace::random::SplitMix64;
use rayon::prelude::*;

use crate::problem::{narrow, normal, widen};
use crate::{ENERGY_TOLERANCE, FLOOR, kernels, print};

const HEADS: usize = 40;
const D: usize = 128;
const DTYPE: DType = DType::Bf16;
/// What deviations may be off by, relatively. No block has much of the mass nor values that agree: rounding errors average out.
const DEVIATION_TOLERANCE: f64 = 2e-2;
/// Random elements, repeated to fill a tensor; no whole number of heads.
const PERIOD: usize = 4_000_037;

/// Element `at` of a tensor `[head, token, D]` that starts at `phase` in the repeated numbers.
fn element(numbers: &[u16], phase: usize, at: usize) -> f32 {
    widen(DTYPE, numbers[(at + phase) % PERIOD])
}

/// The dense attention of one row.
struct Attended {
    out: Vec<f64>,
    lse: f64,
    /// By key block, as the next.
    mass: Vec<f64>,
    apart: Vec<f64>,
}

/// Brute force of one query block, all in f64: exact outputs and log-sum-exps of its rows, and its statistics.
struct Exact {
    first: usize,
    out: Vec<Vec<f64>>,
    lse: Vec<f64>,
    energy: Vec<f64>,
    deviation: Vec<f64>,
}

fn exact(numbers: &[u16], phases: [usize; 3], tokens: usize, head: usize, block: usize, sampled: &[u32]) -> Exact {
    let first = block * 128;
    let rows: Vec<usize> = (first..tokens.min(first + 128)).collect();
    let at = |which: usize, token: usize, d: usize| {
        f64::from(element(numbers, phases[which], (head * tokens + token) * D + d))
    };
    let tensor = |which: usize| -> Vec<f64> {
        (0..tokens).into_par_iter().flat_map_iter(|token| (0..D).map(move |d| at(which, token, d))).collect()
    };
    let (keys, values) = (tensor(1), tensor(2));
    let scale = 1.0 / f64::from(D as u32).sqrt();
    let each: Vec<Attended> = rows
        .par_iter()
        .map(|&row| {
            let q: Vec<f64> = (0..D).map(|d| at(0, row, d)).collect();
            let weights: Vec<f64> = keys
                .chunks_exact(D)
                .map(|key| (q.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * scale).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            let partial: Vec<(f64, Vec<f64>)> = (weights.chunks(128).zip(values.chunks(128 * D)))
                .map(|(weights, values)| {
                    let mut sum = vec![0.0; D];
                    for (weight, value) in weights.iter().zip(values.chunks_exact(D)) {
                        sum.iter_mut().zip(value).for_each(|(to, x)| *to += weight / total * x);
                    }
                    (weights.iter().sum::<f64>() / total, sum)
                })
                .collect();
            let mut out = vec![0.0; D];
            partial.iter().for_each(|(_, sum)| out.iter_mut().zip(sum).for_each(|(to, x)| *to += x));
            let apart = |(mass, sum): &(f64, Vec<f64>)| sum.iter().zip(&out).map(|(x, o)| (x - mass * o).powi(2)).sum();
            let apart = partial.iter().map(apart).collect();
            let mass = partial.iter().map(|(mass, _)| *mass).collect();
            Attended { out, lse: total.ln(), mass, apart }
        })
        .collect();
    let square = each.iter().map(|row| row.out.iter().map(|x| x * x).sum::<f64>()).sum::<f64>() / each.len() as f64;
    let blocks = tokens.div_ceil(128);
    let mean = |of: &dyn Fn(usize, usize) -> f64, c: usize| {
        sampled.iter().map(|&row| of(row as usize - first, c)).sum::<f64>() / sampled.len() as f64
    };
    let energy = (0..blocks).map(|c| mean(&|i, c| each[i].mass[c], c)).collect();
    let deviation = (0..blocks).map(|c| (mean(&|i, c| each[i].apart[c], c) / square).min(1.0)).collect();
    let (out, lse) = each.into_iter().map(|row| (row.out, row.lse)).unzip();
    Exact { first, out, lse, energy, deviation }
}

#[expect(unsafe_code, reason = "a launch borrows device memory")]
pub(crate) fn run(device: &Device, family: Family, arch: Arch, tokens: usize, rows: u32) -> anyhow::Result<()> {
    let mut random = SplitMix64::new(tokens as u64);
    let numbers: Vec<u16> = (0..PERIOD).map(|_| narrow(DTYPE, normal(&mut random))).collect();
    let phases = [0, 1_000_003, 2_500_009];
    let elements = HEADS * tokens * D;
    let tensor = |phase: usize| -> anyhow::Result<_> {
        let buffer = device.alloc(elements * 2)?;
        let rotated: Vec<u16> = numbers[phase..].iter().chain(&numbers[..phase]).copied().collect();
        for at in (0..elements).step_by(PERIOD) {
            buffer.write(at * 2, &rotated[..PERIOD.min(elements - at)])?;
        }
        Ok(buffer)
    };
    let [q, k, v] = phases.map(tensor);
    let (q, k, v, out) = (q?, k?, v?, tensor(3_141_592)?);
    let nearly = (tokens as f32).ln() + 0.5;
    let lse = device.upload(&vec![nearly; HEADS * tokens])?;

    let seed = 0xfeed_0123_4567_89ab;
    let blocks = tokens.div_ceil(128);
    let picks = [(0, 0), (17, blocks / 3), (39, blocks - 1)];
    let mut want = Vec::new();
    for (head, block) in picks {
        let sampled = &sampled_rows(tokens as u32, rows, seed, head as u32)[block];
        let exact = exact(&numbers, phases, tokens, head, block, sampled);
        let at = head * tokens + exact.first;
        let rounded: Vec<u16> = exact.out.iter().flatten().map(|&x| narrow(DTYPE, x as f32)).collect();
        out.write(at * D * 2, &rounded)?;
        lse.write(at * 4, &exact.lse.iter().map(|&x| x as f32).collect::<Vec<f32>>())?;
        want.push(exact);
    }
    let shape = [1, HEADS, tokens, D];
    let [qt, kt, vt, ot] = [&q, &k, &v, &out].map(|buffer| DeviceTensor::bhsd(buffer.ptr(), DTYPE, 0, shape));
    let lse_tensor = DeviceLse::contiguous(lse.ptr(), 0, [1, HEADS, tokens]);
    let stream = Stream::new(device)?;
    let mut timer = Timer::new(device)?;
    let flops = 4.0 * (HEADS * blocks * rows as usize * tokens * D) as f64;
    for statistic in Statistic::ALL {
        let kernel = kernels::load(CaptureVariant { dtype: DTYPE, head_dim: D as u32, statistic }, family, arch)?;
        let results = [
            device.alloc(HEADS * blocks * blocks * statistic.bytes())?,
            device.alloc(HEADS * blocks * blocks * statistic.bytes())?,
        ];
        let call = CaptureCall {
            q: &qt,
            k: &kt,
            v: &vt,
            out: &ot,
            lse: &lse_tensor,
            rows_per_block: rows,
            seed,
            softmax_scale: None,
            energy: results[0].ptr(),
            deviation: results[1].ptr(),
        };
        // SAFETY: every address is that of a buffer of this GPU with the size its shape says, alive until the stream is waited for.
        let submit = || unsafe { kernel.block_statistics(&call, stream.raw()) };
        let mut times: Vec<f32> = (0..6).map(|_| timer.measure(&stream, submit)).collect::<Result<_, _>>()?;
        times.remove(0);
        times.sort_by(f32::total_cmp);
        let ms = times[times.len() / 2];
        print(&format!(
            "{family:8} {HEADS} x {tokens} x {D}, {rows:3} rows, {statistic:7}: {ms:8.2} ms, {:4.0} TFLOP/s\n",
            flops / f64::from(ms) * 1e-9
        ));
        if statistic != Statistic::F32 {
            continue;
        }
        let got = [results[0].download::<f32>()?, results[1].download::<f32>()?];
        let (mut worst_e, mut worst_d) = (0.0, 0.0);
        for ((head, block), exact) in picks.into_iter().zip(&want) {
            let at = (head * blocks + block) * blocks;
            let worst = |got: &[f32], want: &[f64]| {
                got[at..at + blocks]
                    .iter()
                    .zip(want)
                    .map(|(&got, &want)| (f64::from(got) - want).abs() / want.max(FLOOR))
                    .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
            };
            worst_e = f64::max(worst_e, worst(&got[0], &exact.energy));
            worst_d = f64::max(worst_d, worst(&got[1], &exact.deviation));
        }
        print(&format!(
            "{:8} relative error on {} blocks of rows: energies {worst_e:.1e}, deviations {worst_d:.1e}\n",
            "",
            picks.len()
        ));
        ensure!(
            worst_e <= ENERGY_TOLERANCE && worst_d <= DEVIATION_TOLERANCE,
            "{family} {tokens} {rows}: energies {worst_e:.1e}, deviations {worst_d:.1e}"
        );
    }
    Ok(())
}

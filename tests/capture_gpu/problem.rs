//! Randomised attention calls with their exact output and log-sum-exp.

use std::fmt;

use calibc_ir::DType;
use calibc_ir::capture::ROWS_PER_BLOCK;
use calibc_runtime::{HostTensor, Operand};
use calibc_trace::random::SplitMix64;
use half::{bf16, f16};
use rayon::prelude::*;

#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) number: u64,
    pub(crate) dtype: DType,
    pub(crate) heads: usize,
    pub(crate) q_len: usize,
    pub(crate) kv_len: usize,
    pub(crate) head_dim: usize,
    pub(crate) rows_per_block: u32,
    /// `[batch, token, head, head_dim]` in memory, else `[batch, head, token, head_dim]`.
    pub(crate) token_major: bool,
    pub(crate) scale: Option<f32>,
    /// Standard deviation of the scores.
    pub(crate) sharpness: f32,
}

/// Problems of the suite.
pub(crate) const COUNT: u64 = 48;

impl Problem {
    pub(crate) fn new(number: u64) -> Self {
        let mut random = SplitMix64::new(number);
        let mut pick = |from: &[usize]| from[random.below(from.len() as u64) as usize];
        let lengths = [1, 7, 40, 127, 128, 129, 200, 256, 500, 777, 1100];
        let q_len = lengths[number as usize % lengths.len()];
        let kv_len = if pick(&[0, 1]) == 0 { q_len } else { pick(&[1, 33, 128, 130, 640, 4300, 9000]) };
        Self {
            number,
            dtype: DType::ALL[number as usize % 2],
            heads: pick(&[1, 2, 3]),
            q_len,
            kv_len,
            head_dim: [128, 64][number as usize / 2 % 2],
            rows_per_block: ROWS_PER_BLOCK[number as usize / 4 % 4],
            token_major: pick(&[0, 1]) == 1,
            scale: (pick(&[0, 1, 2]) == 0).then_some(0.2),
            sharpness: [0.3, 1.0, 3.0][number as usize % 3],
        }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.number.wrapping_mul(0x1234_5678_9abc_def1)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, dtype, heads, q_len, kv_len, head_dim, rows_per_block, token_major, sharpness, .. } = self;
        let order = if *token_major { "bshd" } else { "bhsd" };
        write!(
            f,
            "#{number} {dtype} {heads} x {q_len}/{kv_len} x {head_dim}, {rows_per_block} rows, {order}, sharp {sharpness}"
        )
    }
}

/// Roughly normal, variance 1.
pub(crate) fn normal(random: &mut SplitMix64) -> f32 {
    let sum: f64 = (0..6).map(|_| random.unit()).sum();
    ((sum - 3.0) * std::f64::consts::SQRT_2) as f32
}

pub(crate) fn narrow(dtype: DType, x: f32) -> u16 {
    match dtype {
        DType::Bf16 => bf16::from_f32(x).to_bits(),
        DType::Fp16 => f16::from_f32(x).to_bits(),
    }
}

pub(crate) fn widen(dtype: DType, bits: u16) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_bits(bits).to_f32(),
        DType::Fp16 => f16::from_bits(bits).to_f32(),
    }
}

/// q, k and v as bits, `[head, token, head_dim]`, and what dense attention makes of them.
pub(crate) struct Inputs {
    pub(crate) data: [Vec<u16>; 3],
    /// Rounded to the element type.
    pub(crate) out: Vec<u16>,
    pub(crate) lse: Vec<f32>,
}

impl Problem {
    pub(crate) fn inputs(&self) -> Inputs {
        let (h, d) = (self.heads, self.head_dim);
        let mut random = SplitMix64::new(self.seed() ^ 1);
        // Values share an offset, as those of models do; queries and keys have a direction in common, so that blocks differ.
        let scale = self.scale.unwrap_or(1.0 / (d as f32).sqrt());
        let spread = (self.sharpness / (scale * (d as f32).sqrt())).sqrt();
        let lens = [self.q_len, self.kv_len, self.kv_len];
        let data = std::array::from_fn(|i| {
            (0..h * lens[i] * d)
                .map(|at| {
                    let token = at / d % lens[i];
                    let wave = ((token / 128) as f32 * 1.3 + (at % d) as f32 * 0.4).sin();
                    let x = normal(&mut random) + 0.7 * wave;
                    narrow(self.dtype, if i < 2 { x * spread } else { x + 0.5 })
                })
                .collect()
        });
        let wide: [Vec<f32>; 3] = [0, 1, 2].map(|i: usize| {
            let data: &[Vec<u16>; 3] = &data;
            data[i].iter().map(|&bits| widen(self.dtype, bits)).collect()
        });
        let rows: Vec<(Vec<f64>, f64)> = (0..h * self.q_len)
            .into_par_iter()
            .map(|row| {
                let head = row / self.q_len;
                let keys = &wide[1][head * self.kv_len * d..][..self.kv_len * d];
                let values = &wide[2][head * self.kv_len * d..][..self.kv_len * d];
                attend(&wide[0][row * d..][..d], keys, values, f64::from(scale))
            })
            .collect();
        let out = rows.iter().flat_map(|(out, _)| out.iter().map(|&x| narrow(self.dtype, x as f32))).collect();
        let lse = rows.iter().map(|(_, lse)| *lse as f32).collect();
        Inputs { data, out, lse }
    }
}

/// Textbook attention of one query: output and log-sum-exp.
pub(crate) fn attend(q: &[f32], keys: &[f32], values: &[f32], scale: f64) -> (Vec<f64>, f64) {
    let d = q.len();
    let dot = |key: &[f32]| q.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.chunks_exact(d).map(dot).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    let mut out = vec![0.0; d];
    for (score, value) in scores.iter().zip(values.chunks_exact(d)) {
        let weight = (score - max).exp() / total;
        out.iter_mut().zip(value).for_each(|(to, &x)| *to += weight * f64::from(x));
    }
    (out, max + total.ln())
}

impl Inputs {
    /// Runs `f` on host views of q, k and v.
    pub(crate) fn with<R>(&self, problem: &Problem, f: impl FnOnce(&[HostTensor<'_>; 3]) -> R) -> R {
        use half::slice::HalfBitsSliceExt;
        let operands = [Operand::Q, Operand::K, Operand::V];
        let lens = [problem.q_len, problem.kv_len, problem.kv_len];
        f(&std::array::from_fn(|i| {
            let shape = [1, problem.heads, lens[i], problem.head_dim];
            let view = match problem.dtype {
                DType::Bf16 => HostTensor::bhsd(operands[i], self.data[i].reinterpret_cast::<bf16>(), shape),
                DType::Fp16 => HostTensor::bhsd(operands[i], self.data[i].reinterpret_cast::<f16>(), shape),
            };
            view.expect("the data has the shape's size")
        }))
    }
}

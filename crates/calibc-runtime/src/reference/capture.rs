//! Block statistics on the CPU, in f64: what capture kernels are held against, and what captures models that run on the CPU.
//!
//! Output and log-sum-exp of the dense attention are computed here, so nothing of a GPU's rounding is in the result.

use calibc_ir::BLOCK;
use calibc_ir::capture::{ROWS_PER_BLOCK, sampled_rows};
use rayon::prelude::*;

use crate::error::{Dim, Operand, RuntimeError};
use crate::tensor::HostTensor;

/// Energies and deviations of one attention call.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// `[heads, q_blocks, kv_blocks]`.
    pub shape: [usize; 3],
    /// Mean softmax mass of the sampled rows of a query block on a key block.
    pub energy: Vec<f64>,
    /// Mean over the same rows i of `|(PV)_ic - m_ic O_i|^2`, over the mean of `|O_i|^2` over all rows of the block; at most 1.
    pub deviation: Vec<f64>,
}

/// The dense attention of one query row.
struct Row {
    /// Softmax mass by key block.
    mass: Vec<f64>,
    /// Partial output by key block, `head_dim` elements each.
    partial: Vec<f64>,
    /// Output.
    out: Vec<f64>,
}

/// One head, widened.
struct Head {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    kv_len: usize,
    head_dim: usize,
    scale: f64,
}

impl Head {
    fn row(&self, token: usize) -> Row {
        let d = self.head_dim;
        let q = &self.q[token * d..][..d];
        let dot = |key: &[f32]| q.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let mut weights: Vec<f64> = self.k.chunks_exact(d).map(|key| dot(key) * self.scale).collect();
        let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        weights.iter_mut().for_each(|score| *score = (*score - max).exp());
        let total: f64 = weights.iter().sum();
        let blocks = self.kv_len.div_ceil(BLOCK as usize);
        let (mut mass, mut partial, mut out) = (vec![0.0; blocks], vec![0.0; blocks * d], vec![0.0; d]);
        for (token, (weight, value)) in weights.iter().zip(self.v.chunks_exact(d)).enumerate() {
            let (block, weight) = (token / BLOCK as usize, weight / total);
            mass[block] += weight;
            let to = &mut partial[block * d..][..d];
            to.iter_mut().zip(value).for_each(|(to, &x)| *to += weight * f64::from(x));
        }
        for block in partial.chunks_exact(d) {
            out.iter_mut().zip(block).for_each(|(to, x)| *to += x);
        }
        Row { mass, partial, out }
    }

    /// The statistics of one query block: energies, then deviations.
    fn block(&self, all: std::ops::Range<usize>, sampled: &[u32]) -> (Vec<f64>, Vec<f64>) {
        let blocks = self.kv_len.div_ceil(BLOCK as usize);
        let (mut energy, mut deviation) = (vec![0.0; blocks], vec![0.0; blocks]);
        let mut square = 0.0;
        let count = all.len() as f64;
        for token in all {
            let row = self.row(token);
            square += row.out.iter().map(|x| x * x).sum::<f64>() / count;
            // A row that was drawn twice counts twice.
            let times = sampled.iter().filter(|&&drawn| drawn as usize == token).count() as f64 / sampled.len() as f64;
            if times == 0.0 {
                continue;
            }
            for (block, partial) in row.partial.chunks_exact(self.head_dim).enumerate() {
                let m = row.mass[block];
                let apart: f64 = partial.iter().zip(&row.out).map(|(x, o)| (x - m * o).powi(2)).sum();
                energy[block] += times * m;
                deviation[block] += times * apart;
            }
        }
        for x in &mut deviation {
            *x = if square > 0.0 {
                (*x / square).min(1.0)
            } else if *x > 0.0 {
                1.0
            } else {
                0.0
            };
        }
        (energy, deviation)
    }
}

/// The block statistics of a dense attention whose tensors have one batch element. `rows_per_block` and `seed` choose the rows
/// ([`calibc_ir::capture`]); the scale is `1 / sqrt(head_dim)` if absent.
///
/// # Errors
/// Shapes that do not belong together, an empty sequence, or a setting that a capture kernel would refuse too.
pub fn block_statistics(
    q: &HostTensor<'_>,
    k: &HostTensor<'_>,
    v: &HostTensor<'_>,
    rows_per_block: u32,
    seed: u64,
    softmax_scale: Option<f32>,
) -> Result<Statistics, RuntimeError> {
    if !ROWS_PER_BLOCK.contains(&rows_per_block) {
        return Err(RuntimeError::RowsPerBlock { rows: rows_per_block });
    }
    let [_, heads, q_len, head_dim] = q.shape();
    let kv_len = k.shape()[2];
    let wanted = [(Operand::Q, q, q_len), (Operand::K, k, kv_len), (Operand::V, v, kv_len)];
    for (operand, tensor, tokens) in wanted {
        for ((dim, got), want) in Dim::ALL.into_iter().zip(tensor.shape()).zip([1, heads, tokens, head_dim]) {
            if got != want {
                return Err(RuntimeError::CaptureShape { operand, dim, got, want });
            }
        }
        let most = calibc_ir::MAX_TOKENS as usize;
        if tokens == 0 || tokens > most {
            return Err(RuntimeError::CaptureSize { operand, dim: Dim::Token, got: tokens, most });
        }
    }
    let scale = softmax_scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt());
    if !(scale.is_finite() && scale > 0.0) {
        return Err(RuntimeError::Scale { scale });
    }
    let shape = [heads, q_len.div_ceil(BLOCK as usize), kv_len.div_ceil(BLOCK as usize)];
    let (mut energy, mut deviation) = (Vec::new(), Vec::new());
    for head in 0..heads {
        let widen = |tensor: &HostTensor<'_>, tokens: usize| {
            let mut rows = vec![0.0; tokens * head_dim];
            rows.chunks_exact_mut(head_dim.max(1))
                .enumerate()
                .for_each(|(token, row)| tensor.read(0, head, token, row));
            rows
        };
        let (q, k, v) = (widen(q, q_len), widen(k, kv_len), widen(v, kv_len));
        let of = Head { q, k, v, kv_len, head_dim, scale: f64::from(scale) };
        let sampled = sampled_rows(q_len as u32, rows_per_block, seed, head as u32);
        let blocks: Vec<(Vec<f64>, Vec<f64>)> = (sampled.par_iter().enumerate())
            .map(|(block, rows)| {
                let first = block * BLOCK as usize;
                of.block(first..q_len.min(first + BLOCK as usize), rows)
            })
            .collect();
        for (e, d) in blocks {
            energy.extend(e);
            deviation.extend(d);
        }
    }
    Ok(Statistics { shape, energy, deviation })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that differ without a generator.
    fn values(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * step).sin() * 2.0).collect()
    }

    fn run(lens: [usize; 2], heads: usize, d: usize, rows: u32, seed: u64) -> Statistics {
        let [q_len, kv_len] = lens;
        let data = [values(heads * q_len * d, 0.37), values(heads * kv_len * d, 0.91), values(heads * kv_len * d, 1.7)];
        let shapes = [q_len, kv_len, kv_len].map(|len| [1, heads, len, d]);
        let operands = [Operand::Q, Operand::K, Operand::V];
        let [q, k, v] = std::array::from_fn(|i| HostTensor::bhsd(operands[i], data[i].as_slice(), shapes[i]).unwrap());
        block_statistics(&q, &k, &v, rows, seed, None).unwrap()
    }

    #[test]
    fn energies_of_a_row_sum_to_one_and_deviations_cancel() {
        for rows in ROWS_PER_BLOCK {
            let s = run([300, 200], 2, 8, rows, 5);
            assert_eq!(s.shape, [2, 3, 2]);
            for (energy, deviation) in s.energy.chunks_exact(2).zip(s.deviation.chunks_exact(2)) {
                assert!((energy.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{energy:?}");
                // With two key blocks, dropping one or the other deviates by the same vector.
                assert!((deviation[0] - deviation[1]).abs() < 1e-12 && deviation[0] > 0.0, "{deviation:?}");
            }
        }
    }

    /// Written out once more from the definition, on all rows.
    #[test]
    fn statistics_are_those_of_the_definition() {
        let (q_len, kv_len, d) = (130, 150, 4);
        let (q, k, v) = (values(q_len * d, 0.37), values(kv_len * d, 0.91), values(kv_len * d, 1.7));
        let s = run([q_len, kv_len], 1, d, 128, 0);
        let p = |i: usize, j: usize| -> f64 {
            let dot: f32 = (0..d).map(|x| q[i * d + x] * k[j * d + x]).sum();
            (f64::from(dot) / 2.0).exp()
        };
        for r in 0..2 {
            let rows: Vec<usize> = (r * 128..q_len.min(r * 128 + 128)).collect();
            for c in 0..2 {
                let keys = c * 128..kv_len.min(c * 128 + 128);
                let (mut energy, mut apart, mut square) = (0.0, 0.0, 0.0);
                for &i in &rows {
                    let total: f64 = (0..kv_len).map(|j| p(i, j)).sum();
                    energy += keys.clone().map(|j| p(i, j) / total).sum::<f64>();
                    let mass: f64 = keys.clone().map(|j| p(i, j) / total).sum();
                    for x in 0..d {
                        let value = |j: usize| p(i, j) / total * f64::from(v[j * d + x]);
                        let out: f64 = (0..kv_len).map(value).sum();
                        let part: f64 = keys.clone().map(value).sum();
                        apart += (part - mass * out).powi(2);
                        square += out * out;
                    }
                }
                let (e, x) = (s.energy[r * 2 + c], s.deviation[r * 2 + c]);
                assert!((e - energy / rows.len() as f64).abs() < 1e-6, "energy {r} {c}: {e}");
                assert!((x - (apart / square).min(1.0)).abs() < 1e-5 * x, "deviation {r} {c}: {x}");
            }
        }
    }

    /// The mean over many samples is the value over all rows.
    #[test]
    fn samples_are_unbiased() {
        let all = run([128, 256], 1, 8, 128, 0);
        let draws = 300;
        let (mut energy, mut deviation) = ([0.0; 2], [0.0; 2]);
        for seed in 0..draws {
            let s = run([128, 256], 1, 8, 16, seed);
            for c in 0..2 {
                energy[c] += s.energy[c] / draws as f64;
                deviation[c] += s.deviation[c] / draws as f64;
            }
        }
        for c in 0..2 {
            assert!((energy[c] / all.energy[c] - 1.0).abs() < 0.02, "{energy:?} {:?}", all.energy);
            assert!((deviation[c] / all.deviation[c] - 1.0).abs() < 0.04, "{deviation:?} {:?}", all.deviation);
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        let data = [0.0f32; 64];
        let tensor = |operand, shape| HostTensor::bhsd(operand, &data[..], shape).unwrap();
        let (q, k) = (tensor(Operand::Q, [1, 2, 4, 8]), tensor(Operand::K, [1, 2, 4, 8]));
        let v = tensor(Operand::V, [1, 2, 3, 8]);
        let error = block_statistics(&q, &k, &v, 16, 0, None).unwrap_err();
        assert!(matches!(error, RuntimeError::CaptureShape { operand: Operand::V, dim: Dim::Token, got: 3, want: 4 }));
        let error = block_statistics(&q, &k, &k, 8, 0, None).unwrap_err();
        assert!(matches!(error, RuntimeError::RowsPerBlock { rows: 8 }));
    }
}

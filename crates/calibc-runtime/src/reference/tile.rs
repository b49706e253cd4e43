//! The arithmetic of one tile: attention of up to [`BLOCK`] queries over a sequence of key blocks, with an online softmax in f32.
//!
//! Written so that loops vectorise. No fused multiply-add and no library `exp`: a tile's bits do not depend on the machine.

use calibc_ir::BLOCK;

use crate::tensor::HostTensor;

const ROWS: usize = BLOCK as usize;
/// Columns of the register block.
const LANES: usize = 16;
/// Rows of the register block.
const STRIP: usize = 4;

/// `exp(x)` for `x <= 0`, to within 3 units in the last place; 0 below the normal range. NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.336_54;
    // ln 2 in two parts: the first has few enough bits for n * HIGH to be exact.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let f = (clamped - n * HIGH) - n * LOW;
    // Taylor to degree 7 on |f| <= ln(2) / 2: the rest is below 6e-9.
    let p = 1.0 / 5040.0;
    let p = p * f + 1.0 / 720.0;
    let p = p * f + 1.0 / 120.0;
    let p = p * f + 1.0 / 24.0;
    let p = p * f + 1.0 / 6.0;
    let p = p * f + 0.5;
    let p = p * (f * f) + f + 1.0;
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LOWEST { 0.0 } else { p * scale }
}

/// `c[i][j] += sum over p of a[i][p] * b[p][j]` for the first `rows` rows, a multiple of [`STRIP`]; row lengths are `k` for `a`
/// and `n`, a multiple of [`LANES`], for `b` and `c`.
#[inline(always)]
fn multiply_add(a: &[f32], b: &[f32], c: &mut [f32], rows: usize, k: usize, n: usize) {
    let strips = a[..rows * k].chunks_exact(STRIP * k).zip(c[..rows * n].chunks_exact_mut(STRIP * n));
    for (a, c) in strips {
        let (a01, a23) = a.split_at(2 * k);
        let (a0, a1) = a01.split_at(k);
        let (a2, a3) = a23.split_at(k);
        for j in (0..n).step_by(LANES) {
            let mut sum = [[0.0f32; LANES]; STRIP];
            let a = a0.iter().zip(a1).zip(a2.iter().zip(a3));
            for (b, ((&a0, &a1), (&a2, &a3))) in b.chunks_exact(n).zip(a) {
                let b = &b[j..j + LANES];
                for l in 0..LANES {
                    sum[0][l] += a0 * b[l];
                    sum[1][l] += a1 * b[l];
                    sum[2][l] += a2 * b[l];
                    sum[3][l] += a3 * b[l];
                }
            }
            for (c, sum) in c.chunks_exact_mut(n).zip(&sum) {
                c[j..j + LANES].iter_mut().zip(sum).for_each(|(c, sum)| *c += sum);
            }
        }
    }
}

/// Scratch and running state of one tile.
pub(super) struct Tile {
    head_dim: usize,
    /// `head_dim` up to a multiple of [`LANES`]; the elements between are 0.
    width: usize,
    queries: usize,
    /// `[ROWS, width]`, scaled.
    q: Vec<f32>,
    /// `[width, ROWS]`: the key block, transposed.
    k: Vec<f32>,
    /// `[ROWS, width]`.
    v: Vec<f32>,
    /// `[ROWS, ROWS]`: scores, then weights.
    p: Vec<f32>,
    /// `[ROWS, width]`: unnormalised output.
    out: Vec<f32>,
    /// One key.
    key: Vec<f32>,
    max: [f32; ROWS],
    sum: [f32; ROWS],
}

impl Tile {
    pub(super) fn new(head_dim: usize) -> Self {
        let zeros = |n: usize| vec![0.0; n];
        let width = head_dim.next_multiple_of(LANES);
        Self {
            head_dim,
            width,
            queries: 0,
            q: zeros(ROWS * width),
            k: zeros(ROWS * width),
            v: zeros(ROWS * width),
            p: zeros(ROWS * ROWS),
            out: zeros(ROWS * width),
            key: zeros(head_dim),
            max: [f32::NEG_INFINITY; ROWS],
            sum: [0.0; ROWS],
        }
    }

    /// Starts over with the queries at `positions`, at most [`BLOCK`] of them.
    pub(super) fn load_queries(
        &mut self,
        q: &HostTensor<'_>,
        (batch, head): (usize, usize),
        positions: impl Iterator<Item = u32>,
        scale: f32,
    ) {
        self.queries = 0;
        for (row, position) in self.q.chunks_exact_mut(self.width).zip(positions) {
            let row = &mut row[..self.head_dim];
            q.read(batch, head, position as usize, row);
            row.iter_mut().for_each(|x| *x *= scale);
            self.queries += 1;
        }
        self.out.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
    }

    /// Attends to the keys of `block` that lie before `kv_len`.
    pub(super) fn attend(
        &mut self,
        k: &HostTensor<'_>,
        v: &HostTensor<'_>,
        (batch, head): (usize, usize),
        block: u32,
        kv_len: u32,
    ) {
        let start = (block * BLOCK) as usize;
        let keys = (kv_len as usize).saturating_sub(start).min(ROWS);
        if keys == 0 {
            return;
        }
        for j in 0..ROWS {
            let value = &mut self.v[j * self.width..][..self.head_dim];
            // Past the last key: weights are 0 there, and 0 * 0 adds nothing.
            if j < keys {
                k.read(batch, head, start + j, &mut self.key);
                v.read(batch, head, start + j, value);
            } else {
                self.key.fill(0.0);
                value.fill(0.0);
            }
            self.key.iter().enumerate().for_each(|(d, &x)| self.k[d * ROWS + j] = x);
        }
        self.update(keys);
    }

    fn update(&mut self, keys: usize) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            #[expect(unsafe_code, reason = "calling a function compiled for wider registers")]
            // SAFETY: avx2 was detected in the line above.
            return unsafe { self.update_avx2(keys) };
        }
        self.update_any(keys);
    }

    /// The same code, so the same bits, in registers twice as wide.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn update_avx2(&mut self, keys: usize) {
        self.update_any(keys);
    }

    #[inline(always)]
    fn update_any(&mut self, keys: usize) {
        let rows = self.queries.next_multiple_of(STRIP);
        let Self { width, q, k, v, p, out, max, sum, .. } = self;
        let width = *width;
        p[..rows * ROWS].fill(0.0);
        multiply_add(q, k, p, rows, width, ROWS);
        for (i, row) in p[..rows * ROWS].chunks_exact_mut(ROWS).enumerate() {
            row[keys..].fill(f32::NEG_INFINITY);
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for chunk in row.chunks_exact(LANES) {
                for l in 0..LANES {
                    lanes[l] = if chunk[l] > lanes[l] { chunk[l] } else { lanes[l] };
                }
            }
            let new_max = lanes.iter().fold(max[i], |m, &x| if x > m { x } else { m });
            // A row of -inf scores has no maximum to subtract.
            let shift = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
            let mut lanes = [0.0; LANES];
            for chunk in row.chunks_exact_mut(LANES) {
                for l in 0..LANES {
                    chunk[l] = exp(chunk[l] - shift);
                    lanes[l] += chunk[l];
                }
            }
            let keep = exp(max[i] - shift);
            max[i] = new_max;
            sum[i] = sum[i] * keep + lanes.iter().sum::<f32>();
            out[i * width..][..width].iter_mut().for_each(|x| *x *= keep);
        }
        multiply_add(p, v, out, rows, ROWS, width);
    }

    /// Output (written to `row`) and log-sum-exp of query `i`: zeros and `-inf` if it attended to nothing.
    pub(super) fn finish(&self, i: usize, row: &mut [f32]) -> f32 {
        let out = &self.out[i * self.width..][..self.head_dim];
        if self.max[i] == f32::NEG_INFINITY && self.sum[i] == 0.0 {
            row.fill(0.0);
            return f32::NEG_INFINITY;
        }
        row.iter_mut().zip(out).for_each(|(to, &x)| *to = x / self.sum[i]);
        self.max[i] + self.sum[i].ln()
    }

    /// Queries loaded.
    pub(super) fn queries(&self) -> usize {
        self.queries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_a_few_units() {
        for i in 0..200_000 {
            let x = -88.0 * (i as f32 / 200_000.0);
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            // Below the lowest x the result would leave the normal range: it is 0.
            let close = if x < -87.33 { got <= 1.3e-38 } else { (got - want).abs() <= 3.0 * 6e-8 * want };
            assert!(close, "exp({x}) = {got}, not {want}");
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_product_of_ragged_rows() {
        let (rows, k, n) = (8, 64, 32);
        let a: Vec<f32> = (0..rows * k).map(|i| (i % 7) as f32 - 3.0).collect();
        let b: Vec<f32> = (0..k * n).map(|i| (i % 5) as f32 - 2.0).collect();
        let mut c = vec![1.0; rows * n];
        multiply_add(&a, &b, &mut c, rows, k, n);
        for (i, j) in (0..rows).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let want: f32 = 1.0 + (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum::<f32>();
            assert_eq!(c[i * n + j], want);
        }
    }
}

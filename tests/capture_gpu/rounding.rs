//! How far off a deviation may be, from what a kernel rounds.
//!
//! A kernel is given O rounded to the element type, and rounds the weights p to it before it multiplies them with V; all else is in
//! f32. With u the type's unit roundoff, element d of a row's x = PV - m O on a key block is therefore off by at most
//!
//! ```text
//! e_d = (u + w) (sum_j p_j |v_jd| + m |O_d|)
//! ```
//!
//! where w stands for scores, exponentials and sums in f32, and a p_j below what the element type can tell from nothing counts as that
//! much. By Cauchy-Schwarz the mean M of |x|^2 over the sampled rows is then off by at most `2 sqrt(M E) + E`, E being the mean of
//! |e|^2: that is `c1 u sqrt(M) + c2 u^2` with the constants of each element counted out. A deviation is M over the mean square of the
//! block's outputs, which their rounding moves by a factor of `(1 + u)^2` at most.
//!
//! A tolerance relative to M would not do: where values agree or one key block has nearly all of the mass, x is a small difference of
//! large terms, and e does not shrink with it.

use calibc_ir::DType;
use calibc_ir::capture::sampled_rows;
use rayon::prelude::*;

use crate::problem::{Inputs, Problem, widen};

/// Relative error of a weight or a mass before it is rounded.
const F32_ERROR: f64 = 1.0 / 32768.0;
/// Squares that f32 loses.
const F32_UNDERFLOW: f64 = 1e-30;

/// Largest relative error of rounding to the element type.
fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 2f64.powi(-9),
        DType::Fp16 => 2f64.powi(-11),
    }
}

/// Kernels keep weights times this, and from where on downwards their rounding errors no longer shrink.
fn weights(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::Bf16 => (1.0, 2f64.powi(-126)),
        DType::Fp16 => (32768.0, 2f64.powi(-14 - 15)),
    }
}

/// A sampled row: its token, softmax probabilities and dense output, the latter as the kernel is given it.
struct Row {
    token: usize,
    weights: Vec<f64>,
    out: Vec<f64>,
}

/// The sampled rows of a query block, whose tokens are `all`.
struct Block<'a> {
    dtype: DType,
    all: std::ops::Range<usize>,
    rows: Vec<Row>,
    /// The head's, `[kv_len, head_dim]`.
    values: &'a [f32],
    /// The head's, `[q_len, head_dim]`.
    out: &'a [f32],
}

impl Block<'_> {
    fn out(&self, token: usize) -> Vec<f64> {
        let d = self.rows[0].out.len();
        self.out[token * d..][..d].iter().map(|&x| f64::from(x)).collect()
    }

    /// Mean of |O|^2 over some rows.
    fn square(&self, tokens: impl ExactSizeIterator<Item = usize>) -> f64 {
        let count = tokens.len() as f64;
        tokens.map(|token| self.out(token).iter().map(|x| x * x).sum::<f64>()).sum::<f64>() / count
    }

    /// Mean of |e|^2 on each key block, over the mean square of outputs.
    fn errors(&self) -> Vec<f64> {
        let d = self.rows[0].out.len();
        let per_weight = unit_roundoff(self.dtype) + F32_ERROR;
        let least = weights(self.dtype).1;
        let of_row = |row: &Row| -> Vec<f64> {
            let blocks = row.weights.chunks(128).zip(self.values.chunks(128 * d));
            let error = |(weights, values): (&[f64], &[f32])| {
                let mass: f64 = weights.iter().sum();
                let mut e: Vec<f64> = row.out.iter().map(|o| mass * o.abs()).collect();
                for (p, value) in weights.iter().zip(values.chunks_exact(d)) {
                    e.iter_mut().zip(value).for_each(|(e, v)| *e += p.max(least) * f64::from(v.abs()));
                }
                e.iter().map(|e| (e * per_weight).powi(2)).sum()
            };
            blocks.map(error).collect()
        };
        self.mean(of_row, self.square(self.all.clone()))
    }

    /// Means over rows of what `of` gives for each key block, over `norm`.
    fn mean(&self, of: impl Fn(&Row) -> Vec<f64>, norm: f64) -> Vec<f64> {
        let rows: Vec<Vec<f64>> = self.rows.iter().map(of).collect();
        let by_block = |c: usize| rows.iter().map(|row| row[c]).sum::<f64>() / rows.len() as f64 / norm;
        (0..rows[0].len()).map(by_block).collect()
    }
}

/// What `of` gives for each key block of each query block, `[head, q_block, kv_block]`.
fn by_block(problem: &Problem, inputs: &Inputs, of: impl Fn(&Block<'_>) -> Vec<f64> + Sync) -> Vec<f64> {
    let Problem { heads, q_len, kv_len, head_dim: d, dtype, rows_per_block, .. } = *problem;
    let wide = |data: &[u16]| -> Vec<f32> { data.iter().map(|&x| widen(dtype, x)).collect() };
    let [q, k, v] = [0, 1, 2].map(|i: usize| wide(&inputs.data[i]));
    let out = wide(&inputs.out);
    let scale = f64::from(problem.scale.unwrap_or(1.0 / (d as f32).sqrt()));
    let mut work = Vec::new();
    for head in 0..heads {
        let sampled = sampled_rows(q_len as u32, rows_per_block, problem.seed(), head as u32);
        work.extend(sampled.into_iter().enumerate().map(|(block, rows)| (head, block, rows)));
    }
    let statistics = |(head, block, tokens): &(usize, usize, Vec<u32>)| {
        let keys = &k[head * kv_len * d..][..kv_len * d];
        let row = |&token: &u32| {
            let token = token as usize;
            let at = head * q_len + token;
            let weight = |key: &[f32]| {
                let products = q[at * d..][..d].iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b));
                (products.sum::<f64>() * scale - f64::from(inputs.lse[at])).exp()
            };
            let out = out[at * d..][..d].iter().map(|&x| f64::from(x)).collect();
            Row { token, weights: keys.chunks_exact(d).map(weight).collect(), out }
        };
        of(&Block {
            dtype,
            all: block * 128..q_len.min(block * 128 + 128),
            rows: tokens.iter().map(row).collect(),
            values: &v[head * kv_len * d..][..kv_len * d],
            out: &out[head * q_len * d..][..q_len * d],
        })
    };
    work.par_iter().map(statistics).collect::<Vec<_>>().concat()
}

/// How far each deviation, in truth `exact`, may be off: `[head, q_block, kv_block]`.
pub(crate) fn bounds(problem: &Problem, inputs: &Inputs, exact: &[f64]) -> Vec<f64> {
    let u = unit_roundoff(problem.dtype);
    let errors = by_block(problem, inputs, |block| block.errors());
    let bound = |(deviation, e): (&f64, f64)| {
        let of_outputs = (1.0 + u).powi(2) - 1.0;
        2.0 * (deviation * e).sqrt() + e + deviation * of_outputs + F32_UNDERFLOW
    };
    exact.iter().zip(errors).map(bound).collect()
}

/// Largest error relative to its bound.
pub(crate) fn of_bound(got: impl Iterator<Item = f64>, exact: &[f64], bounds: &[f64]) -> f64 {
    let each = got.zip(exact).zip(bounds).map(|((got, exact), bound)| (got - exact).abs() / bound);
    each.fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

mod tests {
    use calibc_runtime::reference::capture::block_statistics;

    use super::*;
    use crate::problem::{COUNT, narrow};

    /// What a kernel might get wrong.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Fault {
        /// x = PV.
        NoMass,
        /// x = PV - O.
        WholeOutput,
        /// O of the block's next row.
        OtherRow,
        /// m of the next key block.
        OtherMass,
        /// The last key of a block is left out of PV.
        LostKey,
        /// The denominator is of the sampled rows only.
        SampledDenominator,
        /// The denominator counts a row too many.
        LongDenominator,
    }

    impl Fault {
        const ALL: [Self; 7] = [
            Self::NoMass,
            Self::WholeOutput,
            Self::OtherRow,
            Self::OtherMass,
            Self::LostKey,
            Self::SampledDenominator,
            Self::LongDenominator,
        ];

        /// Whether it makes more of a difference than rounding must; a fault of the denominator hides behind it in one problem or another.
        fn shows(self, problem: &Problem) -> bool {
            let Problem { q_len, kv_len, dtype, rows_per_block, .. } = *problem;
            match self {
                Self::NoMass => true,
                Self::WholeOutput | Self::OtherMass => kv_len > 128,
                Self::OtherRow => q_len > 1 && kv_len > 1,
                // One of more keys may have no weight.
                Self::LostKey => kv_len <= 128 && problem.sharpness < 3.0,
                Self::SampledDenominator => {
                    let drawn = q_len >= 128 && rows_per_block < 128;
                    drawn && kv_len > 128 && problem.sharpness == 3.0
                }
                Self::LongDenominator => dtype == DType::Fp16 && kv_len > 128,
            }
        }
    }

    impl Block<'_> {
        /// What a kernel computes, in f64.
        fn emulate(&self, fault: Option<Fault>) -> Vec<f64> {
            let d = self.rows[0].out.len();
            let (unit, _) = weights(self.dtype);
            let rounded = |p: f64| f64::from(widen(self.dtype, narrow(self.dtype, (p * unit) as f32))) / unit;
            let of_row = |row: &Row| -> Vec<f64> {
                let masses: Vec<f64> = row.weights.chunks(128).map(|weights| weights.iter().sum()).collect();
                let next = if row.token + 1 < self.all.end { row.token + 1 } else { self.all.start };
                let out = if fault == Some(Fault::OtherRow) { self.out(next) } else { row.out.clone() };
                let apart = |(c, (weights, values)): (usize, (&[f64], &[f32]))| {
                    let used = weights.len() - usize::from(fault == Some(Fault::LostKey));
                    let mut x = vec![0.0; d];
                    for (p, value) in weights[..used].iter().zip(values.chunks_exact(d)) {
                        x.iter_mut().zip(value).for_each(|(x, &v)| *x += rounded(*p) * f64::from(v));
                    }
                    let mass = match fault {
                        Some(Fault::NoMass) => 0.0,
                        Some(Fault::WholeOutput) => 1.0,
                        Some(Fault::OtherMass) => masses[(c + 1) % masses.len()],
                        _ => masses[c],
                    };
                    x.iter().zip(&out).map(|(x, o)| (x - mass * o).powi(2)).sum()
                };
                row.weights.chunks(128).zip(self.values.chunks(128 * d)).enumerate().map(apart).collect()
            };
            let norm = match fault {
                Some(Fault::SampledDenominator) => self.square(self.rows.iter().map(|row| row.token)),
                Some(Fault::LongDenominator) => {
                    self.square(self.all.clone()) * self.all.len() as f64 / (self.all.len() + 1) as f64
                }
                _ => self.square(self.all.clone()),
            };
            self.mean(of_row, norm).into_iter().map(|x| x.min(1.0)).collect()
        }
    }

    /// Rounding alone stays within the bound and comes near it; whatever is wrong does not.
    #[test]
    fn bounds_admit_rounding_and_nothing_else() {
        let mut worst: f64 = 0.0;
        let mut caught = [[0; 2]; Fault::ALL.len()];
        for problem in (0..COUNT).map(Problem::new).filter(|p| p.heads * p.q_len * p.kv_len < 1 << 20) {
            let inputs = problem.inputs();
            let exact = inputs
                .with(&problem, |[q, k, v]| {
                    block_statistics(q, k, v, problem.rows_per_block, problem.seed(), problem.scale)
                })
                .unwrap()
                .deviation;
            let bounds = bounds(&problem, &inputs, &exact);
            let with = |fault| {
                let got = by_block(&problem, &inputs, |block| block.emulate(fault));
                of_bound(got.into_iter(), &exact, &bounds)
            };
            let right = with(None);
            assert!(right <= 1.0, "{problem}: rounding is {right} of the bound");
            worst = worst.max(right);
            for (fault, caught) in Fault::ALL.into_iter().zip(&mut caught) {
                let wrong = with(Some(fault));
                assert!(wrong > 1.0 || !fault.shows(&problem), "{problem}: {fault:?} is {wrong} of the bound");
                caught[problem.dtype as usize] += u32::from(wrong > 1.0);
            }
        }
        assert!(worst > 0.25, "rounding is {worst} of the bound: it is loose");
        assert!(caught.iter().flatten().all(|&times| times > 0), "{:?} were caught {caught:?} times", Fault::ALL);
    }
}

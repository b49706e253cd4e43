//! From energies to threshold maps: the paper's per-prompt top-p masks and their vote, as one number per block.
//!
//! ```text
//! energies of a row --rank--> entry levels (one row per prompt) --n-th smallest--> tau;   tau < epsilon = kept
//! ```
//!
//! All arithmetic is `f64` and its order is part of the result: an entry level is the sum, from 0.0 and in rank order, of
//! the energies ranked before the block (highest first, ties: lower index first).

use calibc_ir::{BlockEnergy, ThresholdMap};

use crate::encoding::ENERGY_OF_CODE;

/// Least number of votes out of `prompts` that reach the share `rho`: the least `n >= 1` with `n / prompts >= rho`.
/// `None` if no number of votes does (`rho` above 1, or not a number).
pub fn votes_needed(prompts: usize, rho: f64) -> Option<usize> {
    (1..=prompts).find(|&n| n as f64 / prompts as f64 >= rho)
}

/// Writes the entry level of every block of one row of energies (finite, at least 0).
pub fn entry_levels(row: &[f64], levels: &mut [f64]) {
    Ranking::default().entry_levels(row, levels);
}

/// The threshold map of one site: `tau` is the [`votes_needed`]-th smallest entry level over the prompts, and infinite
/// where no number of votes reaches `rho`.
///
/// # Panics
/// If there are no energies, or their shapes differ.
pub fn threshold_map(energies: &[BlockEnergy], rho: f64) -> ThresholdMap {
    let first = energies.first().expect("at least one prompt votes");
    let (rows, cols) = (first.rows, first.cols);
    assert!(energies.iter().all(|e| (e.rows, e.cols) == (rows, cols)), "energies of one shape");
    let mut ranking = Ranking::default();
    vote(rows, cols, energies.len(), rho, |prompt, row, levels| {
        ranking.entry_levels(energies[prompt].row(row), levels);
    })
}

/// [`threshold_map`] straight from `log2-u8` codes, several times faster: codes order energies, so ranking is counting.
pub(crate) fn threshold_map_of_codes(codes: &[&[u8]], rows: u32, cols: u32, rho: f64) -> ThresholdMap {
    vote(rows, cols, codes.len(), rho, |prompt, row, levels| {
        entry_levels_of_codes(&codes[prompt][row as usize * cols as usize..][..cols as usize], levels);
    })
}

/// Scratch space for ranking rows.
#[derive(Default)]
struct Ranking {
    keys: Vec<u128>,
}

impl Ranking {
    fn entry_levels(&mut self, row: &[f64], levels: &mut [f64]) {
        // Non-negative floats order like their bits. Inverted, with the index below: ascending keys are the ranking.
        self.keys.clear();
        self.keys.extend((0u32..).zip(row).map(|(i, &e)| u128::from(!(e + 0.0).to_bits()) << 32 | u128::from(i)));
        self.keys.sort_unstable();
        let mut level = 0.0;
        for &key in &self.keys {
            let column = key as u32 as usize;
            levels[column] = level;
            level += row[column];
        }
    }
}

fn entry_levels_of_codes(row: &[u8], levels: &mut [f64]) {
    let mut counts = [0u32; 256];
    for &code in row {
        counts[usize::from(code)] += 1;
    }
    // The level at which each code starts, by the same additions in the same order as rank by rank.
    let mut next = [0.0; 256];
    let mut level = 0.0;
    for (code, &count) in counts.iter().enumerate() {
        next[code] = level;
        for _ in 0..count {
            level += ENERGY_OF_CODE[code];
        }
    }
    for (&code, entry) in row.iter().zip(levels) {
        let code = usize::from(code);
        *entry = next[code];
        next[code] += ENERGY_OF_CODE[code];
    }
}

/// The vote: `entry(prompt, row, levels)` fills one row of entry levels.
fn vote(rows: u32, cols: u32, prompts: usize, rho: f64, mut entry: impl FnMut(usize, u32, &mut [f64])) -> ThresholdMap {
    let width = cols as usize;
    let Some(n) = votes_needed(prompts, rho) else {
        return ThresholdMap { rows, cols, tau: vec![f64::INFINITY; rows as usize * width] };
    };
    let mut tau = Vec::with_capacity(rows as usize * width);
    let mut levels = vec![0.0; prompts * width];
    for row in 0..rows {
        for (prompt, levels) in levels.chunks_exact_mut(width).enumerate() {
            entry(prompt, row, levels);
        }
        tau.extend_from_slice(nth_smallest(&mut levels, width, n - 1));
    }
    ThresholdMap { rows, cols, tau }
}

/// Column by column, the `n`-th smallest (from 0) of the rows of `levels`, in place.
fn nth_smallest(levels: &mut [f64], width: usize, n: usize) -> &[f64] {
    // Selection sort on whole rows: each pass leaves the least of the rest in row `i`. Prompts are few, and compares of
    // whole rows vectorise, which a sort per column would not.
    for i in 0..=n {
        let (least, rest) = levels[i * width..].split_at_mut(width);
        for row in rest.chunks_exact_mut(width) {
            for (a, b) in least.iter_mut().zip(row) {
                let (low, high) = if *b < *a { (*b, *a) } else { (*a, *b) };
                (*a, *b) = (low, high);
            }
        }
    }
    &levels[n * width..][..width]
}

#[cfg(test)]
mod tests {
    use calibc_ir::BlockMask;
    use proptest::prelude::*;

    use super::*;
    use crate::encoding::Encoding;

    /// The recipe as the paper writes it: per prompt, keep blocks from the strongest down until their energies reach
    /// epsilon; then keep the blocks that at least a share `rho` of the prompts keeps.
    fn brute_force(energies: &[BlockEnergy], rho: f64, epsilon: f64) -> BlockMask {
        let (rows, cols) = (energies[0].rows, energies[0].cols);
        let mut votes = vec![0u32; (rows * cols) as usize];
        for energy in energies {
            for r in 0..rows {
                let row = energy.row(r);
                let mut order: Vec<usize> = (0..row.len()).collect();
                order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
                let mut reached = 0.0;
                for c in order {
                    if reached >= epsilon {
                        break;
                    }
                    votes[r as usize * cols as usize + c] += 1;
                    reached += row[c];
                }
            }
        }
        BlockMask::from_fn(rows, cols, |r, c| {
            let votes = votes[(r * cols + c) as usize];
            // A block nobody votes for is never kept, whatever rho is.
            votes > 0 && f64::from(votes) / energies.len() as f64 >= rho
        })
    }

    /// Rows of every kind: arbitrary, full of ties (few distinct values), one-hot, all zero but one tiny.
    fn row(cols: usize) -> impl Strategy<Value = Vec<f64>> {
        let normal = |row: Vec<f64>| {
            let sum: f64 = row.iter().sum();
            row.iter().map(|e| if sum > 0.0 { e / sum } else { 0.0 }).collect::<Vec<_>>()
        };
        prop_oneof![
            prop::collection::vec(0.0..1.0f64, cols).prop_map(normal),
            prop::collection::vec((0..4u8).prop_map(f64::from), cols).prop_map(normal),
            prop::collection::vec(any::<u8>(), cols)
                .prop_map(|codes| codes.iter().map(|&c| ENERGY_OF_CODE[usize::from(c)]).collect()),
            (0..cols).prop_map(move |hot| (0..cols).map(|c| f64::from(u8::from(c == hot))).collect()),
        ]
    }

    fn site() -> impl Strategy<Value = Vec<BlockEnergy>> {
        (1..=9usize, 1..4usize, 1..12usize).prop_flat_map(|(prompts, rows, cols)| {
            let energy = prop::collection::vec(row(cols), rows).prop_map(move |values| BlockEnergy {
                rows: rows as u32,
                cols: cols as u32,
                values: values.concat(),
            });
            prop::collection::vec(energy, prompts)
        })
    }

    fn share() -> impl Strategy<Value = f64> {
        let fraction = (0..=9u32, 1..=9u32).prop_map(|(a, b)| f64::from(a) / f64::from(b));
        prop_oneof![fraction, 0.0..1.1f64, Just(0.5), Just(0.0), Just(1.0), Just(f64::NAN)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn comparing_the_map_is_the_vote_over_top_p_masks(
            energies in site(), rho in share(), epsilon in -0.1..1.2f64, pick in any::<prop::sample::Index>(),
        ) {
            let map = threshold_map(&energies, rho);
            prop_assert_eq!(map.mask(epsilon), brute_force(&energies, rho, epsilon), "epsilon {}", epsilon);
            // Exactly at an entry level, and just beside it: where off-by-one-rounding would show.
            let mut levels = vec![0.0; energies[0].cols as usize];
            entry_levels(energies[pick.index(energies.len())].row(0), &mut levels);
            let level = levels[pick.index(levels.len())];
            for epsilon in [level, level.next_up(), level.next_down()] {
                prop_assert_eq!(map.mask(epsilon), brute_force(&energies, rho, epsilon), "at level {}", epsilon);
            }
        }

        #[test]
        fn counting_codes_equals_sorting_energies(
            codes in prop::collection::vec(prop::collection::vec(prop_oneof![any::<u8>(), 60..70u8, Just(255)], 24), 1..6),
            rho in share(),
        ) {
            let energies: Vec<_> = codes
                .iter()
                .map(|c| BlockEnergy { rows: 3, cols: 8, values: Encoding::Log2U8.decode(c).collect() })
                .collect();
            let slices: Vec<&[u8]> = codes.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(threshold_map_of_codes(&slices, 3, 8, rho), threshold_map(&energies, rho));
        }
    }

    #[test]
    fn votes_are_counted_by_division_as_the_recipe_does() {
        assert_eq!([1, 2, 3, 4].map(|p| votes_needed(p, 0.5)), [Some(1), Some(1), Some(2), Some(2)]);
        assert_eq!(votes_needed(10, 0.7), Some(7));
        assert_eq!(votes_needed(3, 2.0 / 3.0), Some(2));
        assert_eq!((votes_needed(5, 0.0), votes_needed(5, 1.0)), (Some(1), Some(5)));
        assert_eq!((votes_needed(5, 1.01), votes_needed(0, 0.5), votes_needed(2, f64::NAN)), (None, None, None));
    }

    #[test]
    fn ties_enter_lower_index_first() {
        let mut levels = [0.0; 4];
        entry_levels(&[0.25, 0.5, -0.0, 0.25], &mut levels);
        assert_eq!(levels, [0.5, 0.0, 1.0, 0.75]);
    }
}

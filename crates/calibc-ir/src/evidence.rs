//! What calibration says about one site: block energies of one prompt, and threshold maps over several.

use crate::mask::BlockMask;

/// Block energies of one prompt at one site, `[q_blocks, kv_blocks]` row-major: the mean over the query rows of block `r` of
/// the softmax mass on block `c` (CalibAtt eq. 5). Decoded values are used as they are, never renormalised.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockEnergy {
    /// Query blocks.
    pub rows: u32,
    /// Key blocks.
    pub cols: u32,
    /// Row-major energies.
    pub values: Vec<f64>,
}

impl BlockEnergy {
    /// The energies of row `r`.
    pub fn row(&self, r: u32) -> &[f64] {
        let cols = self.cols as usize;
        &self.values[r as usize * cols..][..cols]
    }

    /// Energy of row `r` that `mask` keeps.
    pub fn recall(&self, mask: &BlockMask, r: u32) -> f64 {
        let row = self.row(r);
        mask.kept(r).map(|c| row[c as usize]).sum()
    }
}

/// `tau[r,c]`: the epsilon above which the vote over all prompts keeps block `(r, c)`. Everything the recipe needs of a site.
///
/// The paper's per-prompt mask at epsilon keeps the blocks whose *entry level* (sum of the energies ranked before it in its
/// row) is below epsilon; the vote `mean(mask) >= rho` therefore keeps exactly `tau < epsilon`, where `tau` is the `n`-th
/// smallest entry level over the prompts and `n` the least number of votes with `n / prompts >= rho`.
#[derive(Clone, Debug, PartialEq)]
pub struct ThresholdMap {
    /// Query blocks.
    pub rows: u32,
    /// Key blocks.
    pub cols: u32,
    /// Row-major thresholds.
    pub tau: Vec<f64>,
}

impl ThresholdMap {
    /// The mask at `epsilon`: `tau < epsilon`.
    pub fn mask(&self, epsilon: f64) -> BlockMask {
        // Word by word: this runs once per site, over every block of the plan.
        let word = |taus: &[f64]| taus.iter().rev().fold(0, |word, &tau| word << 1 | u32::from(tau < epsilon));
        let rows = self.tau.chunks_exact(self.cols.max(1) as usize);
        let words = rows.flat_map(|row| row.chunks(32).map(word)).collect();
        BlockMask::from_words(self.rows, self.cols, words)
            .expect("tau is [rows, cols], and bits past a row's end stay 0")
    }

    /// Density of the mask at `epsilon`.
    pub fn density(&self, epsilon: f64) -> f64 {
        self.tau.iter().filter(|&&t| t < epsilon).count() as f64 / self.tau.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_the_compare_block_by_block() {
        let tau: Vec<f64> = (0..3 * 70).map(|i| f64::from(i * 37 % 101) / 100.0).collect();
        let map = ThresholdMap { rows: 3, cols: 70, tau };
        for epsilon in [0.0, 0.37, 0.371, 1.0, 2.0] {
            let want = BlockMask::from_fn(3, 70, |r, c| map.tau[(r * 70 + c) as usize] < epsilon);
            assert_eq!(map.mask(epsilon), want);
            assert_eq!(map.density(epsilon), want.density());
        }
    }
}

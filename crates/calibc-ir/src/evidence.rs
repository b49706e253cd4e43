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
        let cols = self.cols as usize;
        BlockMask::from_fn(self.rows, self.cols, |r, c| self.tau[r as usize * cols + c as usize] < epsilon)
    }

    /// Density of the mask at `epsilon`.
    pub fn density(&self, epsilon: f64) -> f64 {
        self.tau.iter().filter(|&&t| t < epsilon).count() as f64 / self.tau.len() as f64
    }
}

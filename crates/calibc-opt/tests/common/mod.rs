//! A calibration held in memory, with threshold maps written straight from their definition.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use std::collections::BTreeMap;

use calibc_ir::{BlockEnergy, BlockMask, HeadId, LayerId, Site, StepId, ThresholdMap};
use calibc_opt::{Calibration, Sensitivity, Split};
use thiserror::Error;

#[derive(Clone, Debug, Default)]
pub struct Mock {
    pub covered: Vec<StepId>,
    /// Per prompt, by site.
    pub calibration: Vec<BTreeMap<Site, BlockEnergy>>,
    pub holdout: Vec<BTreeMap<Site, BlockEnergy>>,
    pub similarity: BTreeMap<Site, f64>,
    pub error: BTreeMap<Site, f64>,
    /// Per calibration prompt, by site; empty: not recorded.
    pub deviation: Vec<BTreeMap<Site, BlockEnergy>>,
    /// Per holdout prompt, by site.
    pub holdout_deviation: Vec<BTreeMap<Site, BlockEnergy>>,
    /// By site, per calibration prompt.
    pub errors: BTreeMap<Site, Vec<f64>>,
    /// Of steps, and of heads by site.
    pub weights: Option<(Vec<f32>, Vec<f32>)>,
}

#[derive(Debug, Error)]
#[error("no energies of {0}")]
pub struct Absent(pub Site);

impl Mock {
    pub fn prompts(&self, split: Split) -> &[BTreeMap<Site, BlockEnergy>] {
        match split {
            Split::Calibration => &self.calibration,
            Split::Holdout => &self.holdout,
        }
    }
}

/// Columns of a row by energy, highest first, ties by index.
pub fn ranked(row: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    order
}

/// The paper's per-prompt mask: fewest blocks, strongest first, that reach `epsilon`.
pub fn top_p(energy: &BlockEnergy, epsilon: f64) -> BlockMask {
    let mut mask = BlockMask::empty(energy.rows, energy.cols);
    for r in 0..energy.rows {
        let mut mass = 0.0;
        for c in ranked(energy.row(r)) {
            if mass >= epsilon {
                break;
            }
            mask.set(r, c as u32);
            mass += energy.row(r)[c];
        }
    }
    mask
}

/// The paper's vote: blocks that a share `rho` of the masks keeps.
pub fn vote(masks: &[BlockMask], rho: f64) -> BlockMask {
    BlockMask::from_fn(masks[0].rows(), masks[0].cols(), |r, c| {
        masks.iter().filter(|mask| mask.get(r, c)).count() as f64 / masks.len() as f64 >= rho
    })
}

impl Calibration for Mock {
    type Error = Absent;

    fn covered_steps(&self) -> &[StepId] {
        &self.covered
    }

    fn num_prompts(&self, split: Split) -> usize {
        self.prompts(split).len()
    }

    fn energy(
        &self,
        split: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<BlockEnergy, Absent> {
        let site = Site { step, layer, head };
        self.prompts(split)[prompt].get(&site).cloned().ok_or(Absent(site))
    }

    fn threshold_map(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        rho: f64,
        leave_out: Option<usize>,
    ) -> Result<ThresholdMap, Absent> {
        let prompts = (0..self.calibration.len()).filter(|&p| Some(p) != leave_out);
        let energies: Vec<_> =
            prompts.map(|p| self.energy(Split::Calibration, p, step, layer, head)).collect::<Result<_, _>>()?;
        let (rows, cols) = (energies[0].rows, energies[0].cols);
        let mut levels = vec![Vec::new(); (rows * cols) as usize];
        for energy in &energies {
            for r in 0..rows {
                let mut before = 0.0;
                for c in ranked(energy.row(r)) {
                    levels[(r * cols) as usize + c].push(before);
                    before += energy.row(r)[c];
                }
            }
        }
        let needed = (1..=energies.len()).find(|&n| n as f64 / energies.len() as f64 >= rho).unwrap();
        let tau = levels.into_iter().map(|mut of_block| {
            of_block.sort_by(f64::total_cmp);
            of_block[needed - 1]
        });
        Ok(ThresholdMap { rows, cols, tau: tau.collect() })
    }

    fn anchor_similarity(&self, step: StepId, layer: LayerId, head: HeadId, _: u16) -> Result<Option<f64>, Absent> {
        Ok(self.similarity.get(&Site { step, layer, head }).copied())
    }

    fn anchor_error(&self, step: StepId, layer: LayerId, head: HeadId, _: u16) -> Result<Option<f64>, Absent> {
        Ok(self.error.get(&Site { step, layer, head }).copied())
    }

    fn anchor_errors(&self, step: StepId, layer: LayerId, head: HeadId, _: u16) -> Result<Option<Vec<f64>>, Absent> {
        Ok(self.errors.get(&Site { step, layer, head }).cloned())
    }

    fn has_deviations(&self) -> bool {
        !self.deviation.is_empty()
    }

    fn deviation(
        &self,
        split: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<Option<BlockEnergy>, Absent> {
        let of_prompts = match split {
            Split::Calibration => &self.deviation,
            Split::Holdout => &self.holdout_deviation,
        };
        Ok(of_prompts[prompt].get(&Site { step, layer, head }).cloned())
    }

    fn sensitivity(&self) -> Option<Sensitivity<'_>> {
        self.weights.as_ref().map(|(step, head)| Sensitivity { step, head })
    }
}

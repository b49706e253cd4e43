//! What `calibc trace info` shows: geometry, coverage, and how dense the recipe's masks are.

use calibc_ir::{HeadId, LayerId, StepId};
use rayon::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::TraceError;
use crate::manifest::Split;
use crate::trace::{Progress, Trace};

/// The epsilons that density is shown at.
pub const EPSILONS: [f64; 4] = [0.8, 0.9, 0.95, 0.99];

/// Density of threshold maps over a trace: the mean over sites, at each of a list of epsilons. Before any rule about text
/// blocks, empty rows or anchor rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Density {
    /// The epsilons.
    pub epsilons: Vec<f64>,
    /// The vote's share.
    pub rho: f64,
    /// All sites of the covered steps, by epsilon.
    pub overall: Vec<f64>,
    /// By layer, then epsilon.
    pub layers: Vec<Vec<f64>>,
    /// By covered step, then epsilon.
    pub steps: Vec<(StepId, Vec<f64>)>,
}

/// Where a trace has data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// Steps of the sampler.
    pub sampler_steps: usize,
    /// Steps with energies of their own, ascending.
    pub covered_steps: Vec<StepId>,
    /// Prompts that choose masks.
    pub calibration_prompts: usize,
    /// Prompts that only tell what masks cost.
    pub holdout_prompts: usize,
    /// Branches captured, each with the number of its covered steps.
    pub branches: Vec<(String, usize)>,
    /// Shards of all branches.
    pub shards: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Whether every shard read has `block_deviation`, `anchor_similarity`, `anchor_error`.
    pub extras: [(&'static str, bool); 3],
    /// Whether there is a sensitivity file.
    pub sensitivity: bool,
}

impl Trace {
    /// Where the trace has data.
    pub fn coverage(&self) -> Coverage {
        let manifest = self.manifest();
        let branches = manifest.branches.iter().enumerate();
        Coverage {
            sampler_steps: manifest.sigmas.len(),
            covered_steps: self.covered_steps().to_vec(),
            calibration_prompts: self.num_prompts(Split::Calibration),
            holdout_prompts: self.num_prompts(Split::Holdout),
            branches: branches.map(|(b, name)| (name.clone(), manifest.covered_steps(b).len())).collect(),
            shards: manifest.shards.len(),
            bytes: manifest.shards.iter().filter_map(|s| s.file.bytes).fold(0, u64::saturating_add),
            extras: self.extras(),
            sensitivity: self.sensitivity().is_some(),
        }
    }

    /// Density of every site's threshold map at `epsilons`, averaged per layer, per step and over all. Reads every
    /// calibration prompt once, in parallel over sites; `progress` counts sites.
    ///
    /// # Errors
    /// As [`Trace::threshold_map`].
    pub fn density(&self, epsilons: &[f64], rho: f64, progress: Progress<'_>) -> Result<Density, TraceError> {
        let (layers, heads) = (self.manifest().model.layers, self.manifest().model.heads);
        let per_step = layers as usize * heads as usize;
        let total = self.covered_steps().len() * per_step;
        let done = AtomicU64::new(0);
        let site = |i: usize| {
            let step = self.covered_steps()[i / per_step];
            let (layer, head) = ((i % per_step) as u32 / heads, i as u32 % heads);
            let map = self.threshold_map(step, LayerId(layer), HeadId(head), rho, None)?;
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, total as u64);
            Ok(epsilons.iter().map(|&e| map.density(e)).collect())
        };
        let sites: Vec<Vec<f64>> = (0..total).into_par_iter().map(site).collect::<Result<_, TraceError>>()?;
        // Summed in site order, whichever thread was first.
        let mean = |pick: &dyn Fn(usize) -> bool| -> Vec<f64> {
            let chosen: Vec<_> = sites.iter().enumerate().filter(|(i, _)| pick(*i)).map(|(_, d)| d).collect();
            (0..epsilons.len()).map(|e| chosen.iter().map(|d| d[e]).sum::<f64>() / chosen.len() as f64).collect()
        };
        Ok(Density {
            epsilons: epsilons.to_vec(),
            rho,
            overall: mean(&|_| true),
            layers: (0..layers as usize).map(|l| mean(&|i| i % per_step / heads as usize == l)).collect(),
            steps: (self.covered_steps().iter().enumerate())
                .map(|(s, &step)| (step, mean(&|i| i / per_step == s)))
                .collect(),
        })
    }
}

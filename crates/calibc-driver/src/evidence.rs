//! Traces as the optimiser's evidence.

use calibc_ir::{BlockEnergy, HeadId, LayerId, StepId, ThresholdMap};
use calibc_opt::{Calibration, Sensitivity, Split};
use calibc_trace::threshold::{entry_levels, votes_needed};
use calibc_trace::{Trace, TraceError};

/// A trace as passes see it.
pub(crate) struct TraceEvidence<'a>(pub(crate) &'a Trace);

fn split(split: Split) -> calibc_trace::Split {
    match split {
        Split::Calibration => calibc_trace::Split::Calibration,
        Split::Holdout => calibc_trace::Split::Holdout,
    }
}

impl Calibration for TraceEvidence<'_> {
    type Error = TraceError;

    fn covered_steps(&self) -> &[StepId] {
        self.0.covered_steps()
    }

    fn num_prompts(&self, which: Split) -> usize {
        self.0.num_prompts(split(which))
    }

    fn energy(
        &self,
        which: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<BlockEnergy, TraceError> {
        self.0.energy(split(which), prompt, step, layer, head)
    }

    fn threshold_map(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        rho: f64,
        leave_out: Option<usize>,
    ) -> Result<ThresholdMap, TraceError> {
        self.0.threshold_map(step, layer, head, rho, leave_out)
    }

    /// Every prompt's entry levels once, then a vote without each.
    fn leave_one_out(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        rho: f64,
    ) -> Result<Vec<ThresholdMap>, TraceError> {
        let prompts = self.num_prompts(Split::Calibration);
        let Some(votes) = votes_needed(prompts.saturating_sub(1), rho) else {
            // Nobody is left to vote: the trace has the words for it.
            return (0..prompts).map(|p| self.threshold_map(step, layer, head, rho, Some(p))).collect();
        };
        let (mut rows, mut cols) = (0, 0);
        let mut levels = Vec::with_capacity(prompts);
        for prompt in 0..prompts {
            let energy = self.energy(Split::Calibration, prompt, step, layer, head)?;
            (rows, cols) = (energy.rows, energy.cols);
            let mut level = vec![0.0; energy.values.len()];
            let width = cols as usize;
            energy.values.chunks_exact(width).zip(level.chunks_exact_mut(width)).for_each(|(e, l)| entry_levels(e, l));
            levels.push(level);
        }
        let mut maps =
            vec![ThresholdMap { rows, cols, tau: Vec::with_capacity(rows as usize * cols as usize) }; prompts];
        let mut order: Vec<(f64, usize)> = Vec::with_capacity(prompts);
        for block in 0..rows as usize * cols as usize {
            order.clear();
            order.extend(levels.iter().enumerate().map(|(p, level)| (level[block], p)));
            order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            for (place, &(_, prompt)) in order.iter().enumerate() {
                // Without a prompt that ranks among the first `votes`, the next one moves up.
                let at = if place < votes { votes } else { votes - 1 };
                maps[prompt].tau.push(order[at].0);
            }
        }
        Ok(maps)
    }

    fn anchor_similarity(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<f64>, TraceError> {
        self.0.anchor_similarity(step, layer, head, anchors)
    }

    fn anchor_error(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<f64>, TraceError> {
        self.0.anchor_error(step, layer, head, anchors)
    }

    fn anchor_errors(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<Vec<f64>>, TraceError> {
        self.0.anchor_errors(step, layer, head, anchors)
    }

    fn has_deviations(&self) -> bool {
        self.0.has_deviations()
    }

    fn deviation(
        &self,
        which: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<Option<BlockEnergy>, TraceError> {
        self.0.deviation(split(which), prompt, step, layer, head)
    }

    fn sensitivity(&self) -> Option<Sensitivity<'_>> {
        self.0.sensitivity().map(|measured| Sensitivity { step: &measured.step, head: &measured.head })
    }
}

#[cfg(test)]
mod tests {
    use calibc_trace::Encoding;
    use calibc_trace::planted::Planted;

    use super::*;

    #[test]
    fn leaving_out_in_one_go_is_leaving_out_one_by_one() {
        for (calibration, encoding) in [(2, Encoding::F32), (3, Encoding::Log2U8), (5, Encoding::F16)] {
            let dir = tempfile::tempdir().unwrap();
            Planted { calibration, encoding, ..Planted::default() }.write(dir.path()).unwrap();
            let trace = Trace::open(dir.path(), &|_, _| ()).unwrap();
            let evidence = TraceEvidence(&trace);
            for rho in [0.01, 0.34, 0.5, 0.67, 1.0] {
                let (step, layer, head) = (StepId(2), LayerId(1), HeadId(3));
                let maps = evidence.leave_one_out(step, layer, head, rho).unwrap();
                for (prompt, map) in maps.iter().enumerate() {
                    assert_eq!(
                        *map,
                        trace.threshold_map(step, layer, head, rho, Some(prompt)).unwrap(),
                        "{rho} {prompt}"
                    );
                }
            }
        }
    }
}

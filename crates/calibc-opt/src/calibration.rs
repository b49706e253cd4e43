//! Where evidence comes from: the trait a trace implements, and what passes see of it.

use std::error::Error;

use calibc_ir::{BlockEnergy, HeadId, LayerId, Plan, Site, StepId, ThresholdMap};
use thiserror::Error;

use crate::error::OptError;

/// Which prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// The prompts that choose masks.
    Calibration,
    /// Prompts kept back: they never choose a mask, only judge it.
    Holdout,
}

/// Evidence, one site at a time. Steps asked for are covered ones; prompts are indices into their split.
pub trait Calibration: Sync {
    /// Why evidence cannot be read.
    type Error: Error + Send + Sync + 'static;

    /// The steps with energies, ascending.
    fn covered_steps(&self) -> &[StepId];

    /// Prompts of a split.
    fn num_prompts(&self, split: Split) -> usize;

    /// Block energies of one prompt, `[q_blocks, kv_blocks]`.
    fn energy(
        &self,
        split: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<BlockEnergy, Self::Error>;

    /// Threshold map of the vote over calibration prompts at `rho`, without prompt `leave_out`.
    fn threshold_map(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        rho: f64,
        leave_out: Option<usize>,
    ) -> Result<ThresholdMap, Self::Error>;

    /// [`Calibration::threshold_map`] without each calibration prompt in turn. Worth overriding: the entry levels of a prompt
    /// serve all the votes it takes part in.
    fn leave_one_out(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        rho: f64,
    ) -> Result<Vec<ThresholdMap>, Self::Error> {
        let prompts = 0..self.num_prompts(Split::Calibration);
        prompts.map(|prompt| self.threshold_map(step, layer, head, rho, Some(prompt))).collect()
    }

    /// Similarity of rows to their nearest anchor row, mean over calibration prompts; `None` where it was not recorded.
    fn anchor_similarity(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<f64>, Self::Error>;

    /// Relative error of copied outputs, mean over calibration prompts; `None` where it was not recorded.
    fn anchor_error(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<f64>, Self::Error>;

    /// Relative error of copied outputs for each calibration prompt; `None` where it was not recorded.
    fn anchor_errors(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<Vec<f64>>, Self::Error> {
        let _ = (step, layer, head, anchors);
        Ok(None)
    }

    /// Whether [`Calibration::deviation`] knows every site of every prompt.
    fn has_deviations(&self) -> bool {
        false
    }

    /// Deviations of one prompt, `[q_blocks, kv_blocks]`: the squared relative change of a row's output when a block of it is
    /// dropped, to first order. `None` where they were not recorded.
    fn deviation(
        &self,
        split: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<Option<BlockEnergy>, Self::Error> {
        let _ = (split, prompt, step, layer, head);
        Ok(None)
    }

    /// What errors of steps and heads cost; `None` where it was not measured.
    fn sensitivity(&self) -> Option<Sensitivity<'_>> {
        None
    }
}

/// What errors of steps and heads cost the result (all finite, at least 0).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sensitivity<'a> {
    /// `[steps]`: squared error of the result per mean squared error of what the model predicts at the step.
    pub step: &'a [f32],
    /// `[steps, layers, heads]`: mean squared error of what the model predicts per unit of dropped deviation.
    pub head: &'a [f32],
}

/// No evidence at all: enough for explicit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoCalibration;

/// [`NoCalibration`] was asked for evidence.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("there are no traces")]
pub struct NoEvidence;

impl Calibration for NoCalibration {
    type Error = NoEvidence;

    fn covered_steps(&self) -> &[StepId] {
        &[]
    }

    fn num_prompts(&self, _: Split) -> usize {
        0
    }

    fn energy(&self, _: Split, _: usize, _: StepId, _: LayerId, _: HeadId) -> Result<BlockEnergy, NoEvidence> {
        Err(NoEvidence)
    }

    fn threshold_map(
        &self,
        _: StepId,
        _: LayerId,
        _: HeadId,
        _: f64,
        _: Option<usize>,
    ) -> Result<ThresholdMap, NoEvidence> {
        Err(NoEvidence)
    }

    fn anchor_similarity(&self, _: StepId, _: LayerId, _: HeadId, _: u16) -> Result<Option<f64>, NoEvidence> {
        Ok(None)
    }

    fn anchor_error(&self, _: StepId, _: LayerId, _: HeadId, _: u16) -> Result<Option<f64>, NoEvidence> {
        Ok(None)
    }
}

/// For each of `steps` steps the covered step whose energies it takes: the nearest, ties to the earlier. `covered` is
/// ascending; the result is empty where `covered` is.
pub fn nearest_covered(steps: u32, covered: &[StepId]) -> Vec<StepId> {
    // min_by_key keeps the first of equals, and covered steps ascend.
    (0..steps).filter_map(|t| covered.iter().copied().min_by_key(|s| s.0.abs_diff(t))).collect()
}

/// [`Calibration`] as passes see it: by site, with one error type, and evidence of the plan's shape only.
pub(crate) trait Evidence: Sync {
    fn covered(&self) -> &[StepId];
    fn prompts(&self, split: Split) -> usize;
    fn energy_of(&self, split: Split, prompt: usize, site: Site, shape: Shape) -> Result<BlockEnergy, OptError>;
    fn thresholds(&self, site: Site, rho: f64, shape: Shape) -> Result<ThresholdMap, OptError>;
    fn thresholds_without_each(&self, site: Site, rho: f64, shape: Shape) -> Result<Vec<ThresholdMap>, OptError>;
    fn similarity(&self, site: Site, anchors: u16) -> Result<Option<f64>, OptError>;
    fn copy_error(&self, site: Site, anchors: u16) -> Result<Option<f64>, OptError>;
    fn copy_errors(&self, site: Site, anchors: u16) -> Result<Option<Vec<f64>>, OptError>;
    fn has_deviations(&self) -> bool;
    fn deviation_of(&self, split: Split, prompt: usize, site: Site, shape: Shape) -> Result<BlockEnergy, OptError>;
    fn weights(&self) -> Option<Sensitivity<'_>>;
}

/// Query and key blocks.
pub(crate) type Shape = (u32, u32);

pub(crate) fn shape_of(plan: &Plan) -> Shape {
    (plan.geometry.num_q_blocks(), plan.geometry.num_kv_blocks())
}

impl<C: Calibration> Evidence for C {
    fn covered(&self) -> &[StepId] {
        self.covered_steps()
    }

    fn prompts(&self, split: Split) -> usize {
        self.num_prompts(split)
    }

    fn energy_of(&self, split: Split, prompt: usize, site: Site, shape: Shape) -> Result<BlockEnergy, OptError> {
        let energy = self.energy(split, prompt, site.step, site.layer, site.head).map_err(at(site))?;
        check(site, shape, (energy.rows, energy.cols), energy.values.len())?;
        Ok(energy)
    }

    fn thresholds(&self, site: Site, rho: f64, shape: Shape) -> Result<ThresholdMap, OptError> {
        let map = self.threshold_map(site.step, site.layer, site.head, rho, None).map_err(at(site))?;
        check(site, shape, (map.rows, map.cols), map.tau.len())?;
        Ok(map)
    }

    fn thresholds_without_each(&self, site: Site, rho: f64, shape: Shape) -> Result<Vec<ThresholdMap>, OptError> {
        let maps = self.leave_one_out(site.step, site.layer, site.head, rho).map_err(at(site))?;
        maps.iter().try_for_each(|map| check(site, shape, (map.rows, map.cols), map.tau.len()))?;
        Ok(maps)
    }

    fn similarity(&self, site: Site, anchors: u16) -> Result<Option<f64>, OptError> {
        self.anchor_similarity(site.step, site.layer, site.head, anchors).map_err(at(site))
    }

    fn copy_error(&self, site: Site, anchors: u16) -> Result<Option<f64>, OptError> {
        self.anchor_error(site.step, site.layer, site.head, anchors).map_err(at(site))
    }

    fn copy_errors(&self, site: Site, anchors: u16) -> Result<Option<Vec<f64>>, OptError> {
        self.anchor_errors(site.step, site.layer, site.head, anchors).map_err(at(site))
    }

    fn has_deviations(&self) -> bool {
        Calibration::has_deviations(self)
    }

    fn deviation_of(&self, split: Split, prompt: usize, site: Site, shape: Shape) -> Result<BlockEnergy, OptError> {
        let deviation = self.deviation(split, prompt, site.step, site.layer, site.head).map_err(at(site))?;
        let deviation = deviation.ok_or(OptError::NoDeviation { site })?;
        check(site, shape, (deviation.rows, deviation.cols), deviation.values.len())?;
        Ok(deviation)
    }

    fn weights(&self) -> Option<Sensitivity<'_>> {
        self.sensitivity()
    }
}

fn at<E: Error + Send + Sync + 'static>(site: Site) -> impl Fn(E) -> OptError {
    move |source| OptError::Calibration { site, source: Box::new(source) }
}

fn check(site: Site, expected: Shape, found: Shape, len: usize) -> Result<(), OptError> {
    if found == expected && len == found.0 as usize * found.1 as usize {
        return Ok(());
    }
    Err(OptError::EvidenceShape { site, expected, found })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uncovered_steps_take_the_nearest_and_ties_the_earlier() {
        let nearest = |covered: &[u32]| -> Vec<u32> {
            let covered: Vec<_> = covered.iter().copied().map(StepId).collect();
            nearest_covered(7, &covered).into_iter().map(|s| s.0).collect()
        };
        assert_eq!(nearest(&[1, 3, 6]), [1, 1, 1, 3, 3, 6, 6]);
        assert_eq!(nearest(&[2]), [2; 7]);
        assert_eq!(nearest(&[]), [0; 0]);
    }
}

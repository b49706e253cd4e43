//! Policies: how masks are chosen.

use std::fmt;
use std::sync::Arc;

use calibc_ir::{BlockMask, Geometry, Site};

use crate::error::OptError;

/// How masks are chosen.
#[derive(Clone, Debug)]
pub enum Policy {
    /// The recipe of CalibAtt (arXiv 2603.05503).
    CalibAtt(CalibAtt),
    /// A target density, spent where it is worth most.
    Budget(Budget),
    /// The user's own masks.
    Explicit(Explicit),
}

impl Policy {
    /// Checks every constant, for a plan of this geometry.
    pub fn validate(&self, geometry: &Geometry) -> Result<(), OptError> {
        let recipe = match self {
            Self::CalibAtt(recipe) => recipe,
            Self::Budget(budget) => return budget.validate(geometry),
            Self::Explicit(_) => return Ok(()),
        };
        let wrong = |field, value, expected| Err(OptError::Policy { field, value, expected });
        for (field, value) in [("A", recipe.a), ("C", recipe.c), ("k", recipe.k)] {
            if !value.is_finite() {
                return wrong(field, value, "a finite number");
            }
        }
        if !(recipe.rho > 0.0 && recipe.rho <= 1.0) {
            return wrong("rho", recipe.rho, "above 0 and at most 1");
        }
        match recipe.repetition {
            Some(Repetition { gamma, .. }) if !gamma.is_finite() => wrong("gamma", gamma, "a finite number"),
            Some(Repetition { anchors, .. }) => check_anchors(anchors, geometry),
            None => Ok(()),
        }
    }
}

/// A number of anchor rows that frames of `geometry` can have.
pub(crate) fn check_anchors(anchors: u16, geometry: &Geometry) -> Result<(), OptError> {
    if anchors == 0 || u32::from(anchors) > geometry.height {
        return Err(OptError::Anchors { anchors, height: geometry.height });
    }
    Ok(())
}

/// The recipe of CalibAtt: a block is kept where enough prompts need it to reach `epsilon(t)` of the mass of its row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CalibAtt {
    /// Where epsilon ends.
    pub a: f64,
    /// Where epsilon starts, at the noisiest step.
    pub c: f64,
    /// How fast it falls.
    pub k: f64,
    /// Share of the calibration prompts that must vote for a block, in (0, 1].
    pub rho: f64,
    /// When heads use anchor rows instead of a mask; `None`: never.
    pub repetition: Option<Repetition>,
}

/// When a head counts as repetitive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Repetition {
    /// Anchor rows per frame.
    pub anchors: u16,
    /// Least similarity of rows to their nearest anchor row.
    pub gamma: f64,
}

impl Repetition {
    /// The paper's: 5 anchor rows, gamma 0.87.
    pub const PAPER: Self = Self { anchors: 5, gamma: 0.87 };
}

impl CalibAtt {
    /// The paper's constants for long schedules (50 steps) over `tokens` tokens: A = 0.796 + 1.41e-6 * tokens, C = 0.99,
    /// k = 16, rho = 0.5.
    pub fn long(tokens: u32) -> Self {
        let a = 0.796 + 1.41e-6 * f64::from(tokens);
        Self { a, c: 0.99, k: 16.0, rho: 0.5, repetition: Some(Repetition::PAPER) }
    }

    /// The paper's constants for 4-step distilled models: A = 0.763, C = 0.863, k = 5.64, rho = 0.5.
    pub fn distilled() -> Self {
        Self { a: 0.763, c: 0.863, k: 5.64, rho: 0.5, repetition: Some(Repetition::PAPER) }
    }

    /// `A + (C - A) * exp(-k * t / T)` in f64, in this order of operations, for step `t` of `T`.
    pub fn epsilon(&self, step: u32, num_steps: u32) -> f64 {
        self.a + (self.c - self.a) * (-self.k * f64::from(step) / f64::from(num_steps)).exp()
    }
}

/// One global optimum: given a density, the plan of least predicted loss.
///
/// Dropping block `(r, c)` at a site costs `w(t) * u(t, l, h)` times what it adds to the loss of its row, anchor rows there
/// `w * u * q_blocks * error^2` (with `u` as [`HeadWeights`] says); what a site keeps costs attention work. One price of work, the same
/// for all sites, decides each block and each head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Share of the dense attention work that the plan may do, in (0, 1].
    pub density: f64,
    /// Share of its mean energy that every row keeps, from 0 to below 1; its strongest block in any case.
    pub row_recall: f64,
    /// Least density of any step, 0 to `density`.
    pub step_floor: f64,
    /// Anchor rows per frame that heads may use instead of a mask; `None`: never.
    pub anchors: Option<u16>,
    /// What a block is worth at its site.
    pub importance: Importance,
    /// How the prompts are put together.
    pub over_prompts: OverPrompts,
    /// What steps weigh.
    pub step_weights: StepWeights,
    /// What heads weigh.
    pub head_weights: HeadWeights,
    /// Whether evidence that the traces lack may be replaced by a guess, with a warning.
    pub fallbacks: bool,
}

impl Budget {
    /// The usual [`Budget::row_recall`].
    pub const ROW_RECALL: f64 = 0.1;

    /// All evidence there is, anchor rows where they pay, and a tenth of its attention for every row: next to nothing where rows keep
    /// enough as it is, and no row is left with its strongest block alone.
    pub fn new(density: f64) -> Self {
        Self {
            density,
            row_recall: Self::ROW_RECALL,
            step_floor: 0.0,
            anchors: Some(Repetition::PAPER.anchors),
            importance: Importance::Deviation,
            over_prompts: OverPrompts::Mean,
            step_weights: StepWeights::Sensitivity,
            head_weights: HeadWeights::Tempered,
            fallbacks: true,
        }
    }

    fn validate(&self, geometry: &Geometry) -> Result<(), OptError> {
        let wrong = |field, value, expected| Err(OptError::Policy { field, value, expected });
        if !(self.density > 0.0 && self.density <= 1.0) {
            return wrong("density", self.density, "above 0 and at most 1");
        }
        if !(0.0..1.0).contains(&self.row_recall) {
            return wrong("row_recall", self.row_recall, "at least 0 and below 1");
        }
        if !(0.0..=self.density).contains(&self.step_floor) {
            return wrong("step_floor", self.step_floor, "at least 0 and at most the density");
        }
        self.anchors.map_or(Ok(()), |anchors| check_anchors(anchors, geometry))
    }
}

/// What a block is worth at its site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Importance {
    /// Its deviation (D2): what dropping it alone does to the output of the row.
    Deviation,
    /// Its energy squared: what stands for the deviation where values were not looked at.
    Energy,
}

/// How what the calibration prompts say is put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverPrompts {
    /// The mean over them: least loss on average.
    Mean,
    /// The largest: least loss for the prompt that suffers most from a block.
    Max,
}

/// What errors at a step weigh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepWeights {
    /// As measured.
    Sensitivity,
    /// [`StepWeights::assumed`].
    Default,
    /// All alike.
    Uniform,
}

impl StepWeights {
    /// What stands for measured weights: falling by `e^-2.3`, to a tenth, from the first step to the end. Errors of the first steps
    /// move the composition and later steps build on them; measured weights replace this guess.
    pub fn assumed(step: u32, num_steps: u32) -> f64 {
        (-2.3 * f64::from(step) / f64::from(num_steps)).exp()
    }
}

/// What errors of a head weigh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadWeights {
    /// The square root of what was measured. Measured weights hold for small errors, on the prompts they were measured on: heads that look
    /// harmless there are not all harmless elsewhere, once they have lost most of their attention.
    Tempered,
    /// As measured.
    Sensitivity,
    /// All alike.
    Uniform,
}

/// The user's own choice at one site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SiteMask {
    /// Dense attention.
    Dense,
    /// Anchor rows, so many per frame.
    Anchors(u16),
    /// A mask, `[q_blocks, kv_blocks]`.
    Mask(BlockMask),
}

/// Gives the user's masks, site by site, from any thread. A closure will do.
pub trait MaskSource: Send + Sync {
    /// The choice at `site`. Asked once per compile and site.
    fn site(&self, site: Site) -> SiteMask;
}

impl<F: Fn(Site) -> SiteMask + Send + Sync> MaskSource for F {
    fn site(&self, site: Site) -> SiteMask {
        self(site)
    }
}

/// Masks that need no calibration. Text blocks are made dense where a mask drops them; a row without any block is an error,
/// because no evidence says which one to keep.
#[derive(Clone)]
pub struct Explicit {
    source: Arc<dyn MaskSource>,
}

impl Explicit {
    /// The masks of `source`.
    pub fn new(source: impl MaskSource + 'static) -> Self {
        Self { source: Arc::new(source) }
    }

    pub(crate) fn site(&self, site: Site) -> SiteMask {
        self.source.site(site)
    }
}

impl fmt::Debug for Explicit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Explicit").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epsilon_falls_from_c_to_a() {
        let paper = CalibAtt::long(75_600);
        assert_eq!(paper.epsilon(0, 50), 0.99);
        assert!((paper.a - 0.902596).abs() < 1e-12);
        let by_hand = 0.902596 + (0.99 - 0.902596) * (-16.0_f64 * 10.0 / 50.0).exp();
        assert!((paper.epsilon(10, 50) - by_hand).abs() < 1e-12);
        assert!((paper.epsilon(49, 50) - paper.a).abs() < 1e-6);
    }

    #[test]
    fn unusable_budgets_are_named() {
        let geometry = Geometry::video(1, 4, 128);
        let refused = |change: fn(&mut Budget)| {
            let mut budget = Budget { anchors: None, step_floor: 0.1, ..Budget::new(0.5) };
            change(&mut budget);
            Policy::Budget(budget).validate(&geometry).unwrap_err().to_string()
        };
        assert_eq!(refused(|b| b.density = 0.0), "policy field density is 0; it must be above 0 and at most 1");
        assert_eq!(refused(|b| b.density = f64::NAN), "policy field density is NaN; it must be above 0 and at most 1");
        assert_eq!(refused(|b| b.row_recall = 1.0), "policy field row_recall is 1; it must be at least 0 and below 1");
        assert_eq!(
            refused(|b| b.step_floor = 0.6),
            "policy field step_floor is 0.6; it must be at least 0 and at most the density"
        );
        assert_eq!(
            refused(|b| b.anchors = Some(5)),
            "5 anchor rows per frame; a frame of this geometry has 4 rows, so use 1 to 4"
        );
    }

    #[test]
    fn unusable_constants_are_named() {
        let geometry = Geometry::video(1, 4, 128);
        let refused = |change: fn(&mut CalibAtt)| {
            let mut recipe = CalibAtt { repetition: None, ..CalibAtt::distilled() };
            change(&mut recipe);
            Policy::CalibAtt(recipe).validate(&geometry).unwrap_err().to_string()
        };
        assert_eq!(refused(|r| r.rho = 0.0), "policy field rho is 0; it must be above 0 and at most 1");
        assert_eq!(refused(|r| r.rho = f64::NAN), "policy field rho is NaN; it must be above 0 and at most 1");
        assert_eq!(refused(|r| r.c = f64::INFINITY), "policy field C is inf; it must be a finite number");
        assert_eq!(
            refused(|r| r.repetition = Some(Repetition::PAPER)),
            "5 anchor rows per frame; a frame of this geometry has 4 rows, so use 1 to 4"
        );
    }
}

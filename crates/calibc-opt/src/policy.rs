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
    /// The user's own masks.
    Explicit(Explicit),
}

impl Policy {
    /// Checks every constant, for a plan of this geometry.
    pub fn validate(&self, geometry: &Geometry) -> Result<(), OptError> {
        let Self::CalibAtt(recipe) = self else { return Ok(()) };
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

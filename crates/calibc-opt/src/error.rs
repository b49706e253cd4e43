//! The errors of policies and passes.

use std::error::Error;

use calibc_ir::verify::VerifyError;
use calibc_ir::{Site, StepId};
use thiserror::Error;

/// Why there is no plan.
#[derive(Debug, Error)]
pub enum OptError {
    /// A constant of the policy is not usable.
    #[error("policy field {field} is {value}; it must be {expected}")]
    Policy {
        /// The field.
        field: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        expected: &'static str,
    },
    /// The policy needs evidence and there is none.
    #[error("the policy chooses masks from calibration prompts, but there are none; add traces or use explicit masks")]
    NoEvidence,
    /// The policy wants evidence that the traces lack, and may not do without.
    #[error("{problem}; {cure}, or set `missing: warn` to go without")]
    Missing {
        /// What is not there.
        problem: String,
        /// How to get it.
        cure: &'static str,
    },
    /// Deviations are there for some sites and not for others.
    #[error("the calibration of {site} has no deviations, although other sites have; capture all prompts with them")]
    NoDeviation {
        /// The site asked for.
        site: Site,
    },
    /// Sensitivities are for another model or sampler.
    #[error(
        "the sensitivities are for {} steps and {} heads in all, the plan has {} and {}; measure them for this model and sampler",
        found.0, found.1, expected.0, expected.1
    )]
    SensitivityShape {
        /// Steps, and heads of all steps and layers, of the plan.
        expected: (usize, usize),
        /// Those of the sensitivities.
        found: (usize, usize),
    },
    /// No head weighs anything.
    #[error("every sensitivity is 0, so that nothing says what to keep; measure them again, or choose other weights")]
    NoWeight,
    /// Evidence could not be read.
    #[error("cannot read the calibration of {site}")]
    Calibration {
        /// The site asked for.
        site: Site,
        /// What the source of the evidence says.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Evidence does not fit the plan.
    #[error(
        "the calibration of {site} has {}x{} blocks where the plan has {}x{}; use the traces of this geometry",
        found.0, found.1, expected.0, expected.1
    )]
    EvidenceShape {
        /// The site asked for.
        site: Site,
        /// Query and key blocks of the plan.
        expected: (u32, u32),
        /// Query and key blocks of the evidence.
        found: (u32, u32),
    },
    /// A covered step is not one of the plan's.
    #[error("the calibration covers {step}, but the plan has {steps} steps; use the traces of this sampler")]
    CoveredStep {
        /// The covered step.
        step: StepId,
        /// Steps of the plan.
        steps: u32,
    },
    /// An explicit mask does not fit the plan.
    #[error("the mask of {site} has {}x{} blocks where the geometry has {}x{}", found.0, found.1, expected.0, expected.1)]
    MaskShape {
        /// The site.
        site: Site,
        /// Query and key blocks of the plan.
        expected: (u32, u32),
        /// Query and key blocks of the mask.
        found: (u32, u32),
    },
    /// An explicit mask leaves a query block without keys.
    #[error("the mask of {site} keeps no key block for query block {row}; keep at least one")]
    EmptyRow {
        /// The site.
        site: Site,
        /// The query block.
        row: u32,
    },
    /// More anchor rows than a frame has rows, or none.
    #[error("{anchors} anchor rows per frame; a frame of this geometry has {height} rows, so use 1 to {height}")]
    Anchors {
        /// Anchor rows asked for.
        anchors: u16,
        /// Rows of a frame.
        height: u32,
    },
    /// Explicit ops with several numbers of anchor rows.
    #[error("{site} uses {anchors} anchor rows and an earlier site {expected}; one number must serve the whole plan")]
    MixedAnchors {
        /// The site.
        site: Site,
        /// Its anchor rows.
        anchors: u16,
        /// Those of the first anchor site.
        expected: u16,
    },
    /// The target names no element type.
    #[error("the target has no element type; name bf16, fp16 or both")]
    NoDtypes,
    /// The plan handed to the pipeline is not valid.
    #[error("the plan to optimise is not valid: {}", first_of(errors))]
    VerifyInput {
        /// Everything the verifier found.
        errors: Vec<VerifyError>,
    },
    /// A pass broke the plan: a bug of calibc.
    #[error("internal error: pass {pass} left a broken plan: {}", first_of(errors))]
    VerifyAfterPass {
        /// The pass.
        pass: &'static str,
        /// Everything the verifier found.
        errors: Vec<VerifyError>,
    },
    /// The caller's cancel flag was set.
    #[error("cancelled")]
    Cancelled,
}

fn first_of(errors: &[VerifyError]) -> String {
    let shown: Vec<String> = errors.iter().take(3).map(ToString::to_string).collect();
    let more = errors.len() - shown.len();
    shown.join("; ") + &if more > 0 { format!("; and {more} more") } else { String::new() }
}

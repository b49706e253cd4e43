//! The pipeline: passes in order, the verifier around each.

use calibc_ir::verify::{Stage, verify_at};
use calibc_ir::{DType, Plan};

use crate::calibration::{Calibration, Evidence};
use crate::error::OptError;
use crate::hooks::{Hooks, PassReport, Watch};
use crate::passes::budget::Selection;
use crate::passes::{protect, repetition, schedule, select, share, variants};
use crate::policy::Policy;

/// What a plan is compiled for.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Element types to make kernels for.
    pub dtypes: Vec<DType>,
    /// Kernels with and without log-sum-exp output where true, else without only.
    pub lse: bool,
    /// How far masks may be merged.
    pub share: ShareLimits,
    /// Bytes of L2 that K and V of the heads at work may fill.
    pub l2_bytes: u64,
    /// Tiles at work at a time on the whole GPU.
    pub running_tiles: u32,
}

impl Default for Target {
    /// Both element types with and without log-sum-exp, only equal masks shared, on an H100: 132 tiles at a time, and 32 of
    /// its 50 MB of L2 (the budget FlashAttention-3 plans with, too).
    fn default() -> Self {
        let share = ShareLimits::default();
        Self { dtypes: DType::ALL.to_vec(), lse: true, share, l2_bytes: 32 << 20, running_tiles: 132 }
    }
}

/// How far masks may be merged. A merge keeps what any of its masks keeps, so it never loses recall; it costs density.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ShareLimits {
    /// Most a site's density may grow over that of the mask the policy chose for it. 0: only equal masks are shared, and the
    /// masks stay the policy's, bit for bit.
    pub max_extra_density: f64,
}

/// Names of the passes of [`standard`], in order.
pub const PASSES: [&str; 6] = ["select", "protect", "repetition", "share", "variants", "schedule"];

/// Every pass, in order.
pub fn standard(policy: &Policy, target: &Target) -> Pipeline {
    Pipeline::new(policy)
        // First: later passes see masks, not energies (but for rows that would stay empty).
        .then(select::Select { policy: policy.clone() })
        // Before any pass that merges or counts blocks: text rows and empty rows change densities.
        .then(protect::Protect { policy: policy.clone() })
        // After protect, so that an unusable mask is reported even where anchor rows would have replaced it.
        .then(repetition::DetectRepetition { policy: policy.clone() })
        // After repetition: masks of anchor heads are gone and need not be shared with.
        .then(share::Share { limits: target.share })
        // After the last pass that changes ops: variants depend on the kinds of ops there are.
        .then(variants::AssignVariants { dtypes: target.dtypes.clone(), lse: target.lse })
        // Last: work lists depend on every mask.
        .then(schedule::ScheduleWork { target: target.clone() })
}

/// One step of the pipeline: a struct with its knobs.
pub(crate) trait Pass: Send + Sync {
    /// The name, one of [`PASSES`].
    fn name(&self) -> &'static str;

    /// What must hold before.
    fn needs(&self) -> Stage {
        Stage::Protected
    }

    /// What holds after.
    fn gives(&self) -> Stage {
        Stage::Protected
    }

    /// Changes the plan.
    fn run(&self, plan: &mut Plan, cx: &Context<'_>) -> Result<Outcome, OptError>;
}

/// What passes see beside the plan.
pub(crate) struct Context<'a> {
    pub(crate) evidence: &'a dyn Evidence,
    pub(crate) watch: Watch<'a>,
}

/// What a pass did.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) changed: bool,
    pub(crate) remarks: Vec<String>,
    pub(crate) selection: Option<Selection>,
}

impl Outcome {
    pub(crate) fn changed(remark: String) -> Self {
        Self { changed: true, remarks: vec![remark], selection: None }
    }
}

/// Passes in order.
pub struct Pipeline {
    policy: Policy,
    passes: Vec<Box<dyn Pass>>,
}

impl Pipeline {
    fn new(policy: &Policy) -> Self {
        Self { policy: policy.clone(), passes: Vec::new() }
    }

    fn then(mut self, pass: impl Pass + 'static) -> Self {
        self.passes.push(Box::new(pass));
        self
    }

    /// Names of the passes, in order.
    pub fn names(&self) -> Vec<&'static str> {
        self.passes.iter().map(|pass| pass.name()).collect()
    }

    /// Only the named passes, in their order: to stop early, to find the guilty one, to test one.
    pub fn only(mut self, names: &[&str]) -> Self {
        self.passes.retain(|pass| names.contains(&pass.name()));
        self
    }

    /// Runs the passes over `plan` (from [`Plan::dense`] for the whole pipeline). The verifier runs before the first pass and
    /// after every pass.
    pub fn run<C: Calibration>(&self, mut plan: Plan, calibration: &C, mut hooks: Hooks<'_>) -> Result<Plan, OptError> {
        let stage = self.passes.first().map_or(Stage::Protected, |pass| pass.needs());
        verify_at(&plan, stage).map_err(|errors| OptError::VerifyInput { errors })?;
        self.policy.validate(&plan.geometry)?;
        let cx = Context { evidence: calibration, watch: Watch::new(&hooks) };
        for pass in &self.passes {
            cx.watch.check()?;
            let name = pass.name();
            let Outcome { changed, remarks, selection } = pass.run(&mut plan, &cx)?;
            verify_at(&plan, pass.gives()).map_err(|errors| OptError::VerifyAfterPass { pass: name, errors })?;
            let report = PassReport { pass: name, changed, remarks, selection };
            tracing::debug!(pass = name, changed, remarks = ?report.remarks, "pass done");
            if let Some(after_pass) = &mut hooks.after_pass {
                after_pass(&report, &plan);
            }
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::CalibAtt;

    #[test]
    fn the_names_are_those_of_the_passes() {
        let pipeline = standard(&Policy::CalibAtt(CalibAtt::distilled()), &Target::default());
        assert_eq!(pipeline.names(), PASSES);
        assert_eq!(pipeline.only(&["schedule", "share"]).names(), ["share", "schedule"]);
    }
}

//! Policies and passes: a plan whose every site is dense goes in, a plan with masks, variants and work lists comes out.
//!
//! ```text
//!  Calibration (energies, threshold maps,          Target (dtypes, limits, machine)
//!        |      deviations, sensitivities)               |
//!  Plan::dense -> select -> protect -> repetition -> share -> variants -> schedule -> Plan
//!        |          \________ Policy ________/
//!        +--> recall_report: what the plan costs on prompts that did not choose it, and the loss it is predicted to make
//! ```
//!
//! ```
//! use calibc_ir::{AttnOp, BlockMask, Geometry, Model, Plan, Site};
//! use calibc_opt::{Explicit, Hooks, NoCalibration, Policy, SiteMask, Target, standard};
//!
//! let model = Model { name: "toy".into(), layers: 1, heads: 2, head_dim: 128 };
//! let plan = Plan::dense(model, Geometry::video(1, 16, 32), vec![1.0]);
//! let diagonal = |_: Site| SiteMask::Mask(BlockMask::from_fn(4, 4, |r, c| r == c));
//! let pipeline = standard(&Policy::Explicit(Explicit::new(diagonal)), &Target::default());
//! let plan = pipeline.run(plan, &NoCalibration, Hooks::default())?;
//! assert!(matches!(plan.ops[1], AttnOp::BlockSparse { .. }));
//! assert_eq!(plan.schedule.map(|s| s.items.len()), Some(8));
//! # Ok::<(), calibc_opt::OptError>(())
//! ```
//!
//! Evidence comes through the [`Calibration`] trait, site by site: no pass holds more of a trace than the sites at work, and the
//! policy [`Budget`], which looks at the whole plan at once, the few blocks that rows keep in any case. The
//! verifier runs before the first pass and after every pass, in release builds too; what it finds after a pass is a bug here, not
//! in the input. A pass is pure in (plan, policy, target, evidence): parallel work is collected in order, petgraph stays private
//! and is walked in id order, and the same input gives the same plan on any number of threads.
//!
//! Nothing here reads files, knows CUDA, or prints.

mod calibration;
mod error;
mod hooks;
mod passes;
mod pipeline;
mod policy;
mod report;
mod scoring;

pub use calibration::{Calibration, NoCalibration, NoEvidence, Sensitivity, Split, nearest_covered};
pub use error::OptError;
pub use hooks::{AfterPass, Hooks, PassReport, Progress};
pub use passes::budget::Selection;
pub use passes::schedule::schedule;
pub use pipeline::{PASSES, Pipeline, ShareLimits, Target, standard};
pub use policy::{
    Budget, CalibAtt, Explicit, HeadWeights, Importance, MaskSource, OverPrompts, Policy, Repetition, SiteMask,
    StepWeights,
};
pub use report::{AnchorReport, Basis, Group, Judged, OpCounts, Recall, Report, WorstRow, recall_report};
pub use scoring::Weighed;

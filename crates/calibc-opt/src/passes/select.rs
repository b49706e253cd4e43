//! select: the policy chooses an op for every site.

use calibc_ir::verify::Stage;
use calibc_ir::{AttnOp, BlockMask, HeadId, LayerId, Plan, Site, StepId};
use rayon::prelude::*;

use super::{budget, sources};
use crate::calibration::shape_of;
use crate::error::OptError;
use crate::pipeline::{Context, Outcome, Pass};
use crate::policy::{CalibAtt, Explicit, Policy, SiteMask, check_anchors};

/// The policy's ops. Masks that keep everything become dense. `budget` has a file of its own.
///
/// With `calibatt`, one covered step is at work at a time: the threshold map of each of its heads is computed once and gives
/// the masks of all the steps nearest to it, each under its own epsilon.
pub(crate) struct Select {
    pub(crate) policy: Policy,
}

impl Pass for Select {
    fn name(&self) -> &'static str {
        "select"
    }

    fn needs(&self) -> Stage {
        Stage::Selected
    }

    fn gives(&self) -> Stage {
        Stage::Selected
    }

    fn run(&self, plan: &mut Plan, cx: &Context<'_>) -> Result<Outcome, OptError> {
        plan.masks = Default::default();
        let mut selection = None;
        match &self.policy {
            Policy::CalibAtt(recipe) => calibatt(recipe, plan, cx)?,
            Policy::Budget(budget) => selection = Some(budget::select(budget, plan, cx)?),
            Policy::Explicit(explicit) => explicit_ops(explicit, plan, cx)?,
        }
        let count = |kind: fn(&AttnOp) -> bool| plan.ops.iter().filter(|op| kind(op)).count();
        let dense = count(|op| matches!(op, AttnOp::Dense));
        let sparse = count(|op| matches!(op, AttnOp::BlockSparse { .. }));
        let anchors = count(|op| matches!(op, AttnOp::AnchorRows { .. }));
        let mut remark = format!("{sparse} sites get one of {} masks, {dense} stay dense", plan.masks.len());
        if anchors > 0 {
            remark += &format!(", {anchors} use anchor rows");
        }
        Ok(Outcome { selection, ..Outcome::changed(remark) })
    }
}

fn calibatt(recipe: &CalibAtt, plan: &mut Plan, cx: &Context<'_>) -> Result<(), OptError> {
    let sources = sources(plan, cx.evidence)?;
    let (steps, shape) = (plan.num_steps(), shape_of(plan));
    let (layers, heads) = (plan.model.layers as usize, plan.model.heads as usize);
    let used = sources.chunk_by(|a, b| a == b).count();
    let work = cx.watch.work("select", (used * layers * heads) as u64);
    let mut start = 0;
    // Steps with the same source are neighbours, so masks are interned in site order.
    for same in sources.chunk_by(|a, b| a == b) {
        let targets = start..start + same.len() as u32;
        start = targets.end;
        let mut columns: Vec<_> = work
            .map((0..layers * heads).into_par_iter(), |i| {
                let site = Site { step: same[0], layer: LayerId((i / heads) as u32), head: HeadId((i % heads) as u32) };
                let map = cx.evidence.thresholds(site, recipe.rho, shape)?;
                let mask = |t| Some(map.mask(recipe.epsilon(t, steps))).filter(|mask| !mask.is_full());
                Ok(targets.clone().map(mask).collect::<Vec<_>>())
            })?
            .into_iter()
            .map(Vec::into_iter)
            .collect();
        for step in targets {
            let first = plan.site_index(Site { step: StepId(step), layer: LayerId(0), head: HeadId(0) });
            for (i, masks) in columns.iter_mut().enumerate() {
                plan.ops[first + i] = op_of(masks.next().flatten(), plan);
            }
        }
    }
    Ok(())
}

pub(super) fn op_of(mask: Option<BlockMask>, plan: &mut Plan) -> AttnOp {
    mask.map_or(AttnOp::Dense, |mask| AttnOp::BlockSparse { mask: plan.masks.intern(mask) })
}

fn explicit_ops(explicit: &Explicit, plan: &mut Plan, cx: &Context<'_>) -> Result<(), OptError> {
    let expected = shape_of(plan);
    let layer_sites = (plan.model.layers * plan.model.heads) as usize;
    let sites: Vec<Site> = plan.sites().collect();
    let work = cx.watch.work("select", sites.len() as u64);
    let mut anchors = None;
    for (step, sites) in sites.chunks(layer_sites).enumerate() {
        let chosen = work.map(sites.par_iter(), |&site| {
            let choice = explicit.site(site);
            match &choice {
                SiteMask::Mask(mask) if (mask.rows(), mask.cols()) != expected => {
                    Err(OptError::MaskShape { site, expected, found: (mask.rows(), mask.cols()) })
                }
                SiteMask::Anchors(n) => check_anchors(*n, &plan.geometry).map(|()| choice),
                _ => Ok(choice),
            }
        })?;
        for (i, (&site, choice)) in sites.iter().zip(chosen).enumerate() {
            plan.ops[step * layer_sites + i] = match choice {
                SiteMask::Mask(mask) => op_of(Some(mask).filter(|mask| !mask.is_full()), plan),
                SiteMask::Dense => AttnOp::Dense,
                SiteMask::Anchors(n) => {
                    let expected = *anchors.get_or_insert(n);
                    if n != expected {
                        return Err(OptError::MixedAnchors { site, anchors: n, expected });
                    }
                    AttnOp::AnchorRows { anchors: n }
                }
            };
        }
    }
    Ok(())
}

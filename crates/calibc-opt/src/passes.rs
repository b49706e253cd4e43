//! The passes, a file each; their order stands in [`crate::standard`].

pub(crate) mod protect;
pub(crate) mod repetition;
pub(crate) mod schedule;
pub(crate) mod select;
pub(crate) mod share;
pub(crate) mod variants;

use calibc_ir::{AttnOp, BlockMask, MaskId, MaskTable, Plan, StepId};

use crate::calibration::{Evidence, nearest_covered};
use crate::error::OptError;

/// Rebuilds the mask table in normal form: the ops refer to `masks` by index; equal masks become one, masks that keep
/// everything become dense ops, and ids are dense in order of first use by site.
pub(crate) fn intern(plan: &mut Plan, masks: Vec<BlockMask>) {
    enum New {
        Waiting(BlockMask),
        Op(AttnOp),
    }
    let mut table = MaskTable::default();
    let mut new: Vec<New> = masks.into_iter().map(New::Waiting).collect();
    for op in &mut plan.ops {
        let AttnOp::BlockSparse { mask } = *op else { continue };
        let slot = &mut new[mask.index()];
        // Moved out on first use; the placeholder is overwritten at once.
        if let New::Waiting(mask) = std::mem::replace(slot, New::Op(AttnOp::Dense))
            && !mask.is_full()
        {
            *slot = New::Op(AttnOp::BlockSparse { mask: table.intern(mask) });
        }
        if let New::Op(new) = slot {
            *op = *new;
        }
    }
    plan.masks = table;
}

/// Takes the masks out of the plan, for a pass that puts them back with [`intern`].
pub(crate) fn take_masks(plan: &mut Plan) -> Vec<BlockMask> {
    std::mem::take(&mut plan.masks).into_masks()
}

/// The covered step each step takes its energies from, if there is evidence at all.
pub(crate) fn sources(plan: &Plan, evidence: &dyn Evidence) -> Result<Vec<StepId>, OptError> {
    let (steps, covered) = (plan.num_steps(), evidence.covered());
    if let Some(&step) = covered.iter().find(|step| step.0 >= steps) {
        return Err(OptError::CoveredStep { step, steps });
    }
    if covered.is_empty() || evidence.prompts(crate::Split::Calibration) == 0 {
        return Err(OptError::NoEvidence);
    }
    Ok(nearest_covered(steps, covered))
}

/// The id of entry `index` of a mask vector in the making.
pub(crate) fn entry(index: usize) -> MaskId {
    MaskId(u32::try_from(index).expect("the verifier bounds sites, and so masks, by u32"))
}

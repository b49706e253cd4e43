//! The passes, a file each; their order stands in [`crate::standard`].

pub(crate) mod budget;
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
    let mut table = MaskTable::default();
    // Masks are moved into the table on first use: none is ever held twice.
    let mut waiting: Vec<Option<BlockMask>> = masks.into_iter().map(Some).collect();
    let mut settled = vec![AttnOp::Dense; waiting.len()];
    for op in &mut plan.ops {
        if let AttnOp::BlockSparse { mask } = *op {
            if let Some(bits) = waiting[mask.index()].take().filter(|bits| !bits.is_full()) {
                settled[mask.index()] = AttnOp::BlockSparse { mask: table.intern(bits) };
            }
            *op = settled[mask.index()];
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

//! A plan's tables in device memory, as [`calibc_ir::abi`] lays them out. All steps are resident; masks are stored once each.

use bytemuck::{Pod, Zeroable};
use calibc_ir::{AnchorTable, AttnOp, Plan, abi};

use super::device::{Device, DeviceBuffer};
use crate::error::RuntimeError;
use crate::launch::Params;

/// Words of host memory that masks pass through on their way to the GPU (16 MiB).
const STAGING_WORDS: usize = 4 << 20;

/// One work list: its first item and their number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct WorkList {
    begin: u32,
    count: u32,
}

/// The four tables of a step, in the order of [`abi::STEP_TABLE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct StepTable {
    lists: u64,
    items: u64,
    ops: u64,
    masks: u64,
}

/// The op words of a plan, in the order of its sites.
fn op_words(plan: &Plan) -> Vec<u32> {
    (plan.ops.iter())
        .map(|op| match op {
            AttnOp::Dense => abi::OP_DENSE,
            AttnOp::AnchorRows { .. } => abi::OP_ANCHORS,
            AttnOp::BlockSparse { mask } => mask.0,
        })
        .collect()
}

/// One work list per (step, layer), step-major.
fn work_lists(plan: &Plan) -> Result<Vec<WorkList>, RuntimeError> {
    let schedule = plan.schedule.as_ref().ok_or(RuntimeError::Unscheduled)?;
    let list = |&list: &u32| {
        let ends = &schedule.list_ptr[list as usize..][..2];
        WorkList { begin: ends[0], count: ends[1] - ends[0] }
    };
    Ok(schedule.list_of.iter().map(list).collect())
}

/// The tables of one plan. Held for their memory; kernels see the addresses in [`Tables::fill`].
#[derive(Debug)]
pub(super) struct Tables {
    steps: DeviceBuffer,
    anchors: Option<Anchors>,
    /// What `steps` points into.
    held: [DeviceBuffer; 4],
}

#[derive(Debug)]
struct Anchors {
    num_queries: u32,
    queries: DeviceBuffer,
    copy_ptr: DeviceBuffer,
    copies: DeviceBuffer,
}

impl Tables {
    /// Uploads the tables of a scheduled plan.
    pub(super) fn upload(device: &Device, plan: &Plan, anchors: Option<&AnchorTable>) -> Result<Self, RuntimeError> {
        let schedule = plan.schedule.as_ref().ok_or(RuntimeError::Unscheduled)?;
        let items: Vec<u32> = schedule.items.iter().map(|item| item.0).collect();
        let lists = device.upload(&work_lists(plan)?)?;
        let items = device.upload(&items)?;
        let ops = device.upload(&op_words(plan))?;
        let masks = upload_masks(device, plan)?;
        let layers = u64::from(plan.model.layers);
        let step_tables: Vec<StepTable> = (0..u64::from(plan.num_steps()))
            .map(|step| StepTable {
                lists: lists.ptr() + step * layers * size_of::<WorkList>() as u64,
                items: items.ptr(),
                ops: ops.ptr() + step * layers * u64::from(plan.model.heads) * 4,
                masks: masks.ptr(),
            })
            .collect();
        let anchors = match anchors {
            None => None,
            Some(table) => Some(Anchors {
                num_queries: table.queries.len() as u32,
                queries: device.upload(&table.queries)?,
                copy_ptr: device.upload(&table.copy_ptr)?,
                copies: device.upload(&table.copies)?,
            }),
        };
        Ok(Self { steps: device.upload(&step_tables)?, anchors, held: [lists, items, ops, masks] })
    }

    /// Fills in the addresses.
    pub(super) fn fill(&self, params: &mut Params) {
        params.steps = self.steps.ptr();
        if let Some(anchors) = &self.anchors {
            params.num_anchor_queries = anchors.num_queries;
            params.anchor_queries = anchors.queries.ptr();
            params.anchor_copy_ptr = anchors.copy_ptr.ptr();
            params.anchor_copies = anchors.copies.ptr();
        }
    }

    /// Device memory they take.
    pub(super) fn bytes(&self) -> usize {
        let anchors = self.anchors.iter().flat_map(|a| [&a.queries, &a.copy_ptr, &a.copies]);
        self.held.iter().chain([&self.steps]).chain(anchors).map(DeviceBuffer::bytes).sum()
    }
}

/// All masks, one after the other in id order, through a staging vector of bounded size.
fn upload_masks(device: &Device, plan: &Plan) -> Result<DeviceBuffer, RuntimeError> {
    let words = plan.masks.iter().map(|(_, mask)| mask.words().len()).sum::<usize>();
    let buffer = device.alloc(words * 4)?;
    let mut staging: Vec<u32> = Vec::with_capacity(words.min(STAGING_WORDS));
    let mut written = 0;
    for (_, mask) in plan.masks.iter() {
        if staging.len() + mask.words().len() > STAGING_WORDS {
            buffer.write(written, &staging)?;
            written += staging.len() * 4;
            staging.clear();
        }
        staging.extend_from_slice(mask.words());
    }
    buffer.write(written, &staging)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use calibc_ir::{BlockMask, Geometry, Model, Schedule, WorkItem};

    use super::*;

    #[test]
    fn words_and_lists_follow_the_contract() {
        let model = Model { name: "m".into(), layers: 2, heads: 2, head_dim: 64 };
        let mut plan = Plan::dense(model, Geometry::video(2, 10, 20), vec![1.0]);
        let ids = [BlockMask::full(4, 4), BlockMask::from_fn(4, 4, |r, c| r == c)].map(|m| plan.masks.intern(m));
        plan.ops[1] = AttnOp::BlockSparse { mask: ids[1] };
        plan.ops[2] = AttnOp::AnchorRows { anchors: 5 };
        assert_eq!(op_words(&plan), [u32::MAX, 1, u32::MAX - 1, u32::MAX]);
        assert!(matches!(work_lists(&plan), Err(RuntimeError::Unscheduled)));
        let items = (0..7).map(WorkItem).collect();
        plan.schedule = Some(Schedule { list_of: vec![1, 0], list_ptr: vec![0, 3, 7], items });
        let lists = [WorkList { begin: 3, count: 4 }, WorkList { begin: 0, count: 3 }];
        assert_eq!(work_lists(&plan).unwrap(), lists);
        assert_eq!(abi::STEP_TABLE, ["lists", "items", "ops", "masks"]);
    }
}

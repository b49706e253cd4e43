//! What one step's slot in GPU memory holds, and where in host memory it comes from. Needs no GPU.
//!
//! ```text
//! image of a step:   lists [layer] | ops [layer * heads + head] | items | masks the step uses, in id order
//! host memory:       the head (lists, ops, items) of each step, and each mask once where that keeps copies few
//! ```
//!
//! Work lists begin and masks count within the image. Equal masks of several steps share host memory; a step whose masks would then
//! lie in more than [`MAX_RUNS`] places gets copies of its own, so that an upload is always a few submissions.

use bytemuck::{Pod, Zeroable};
use calibc_ir::{AttnOp, BlockMask, LayerId, MaskId, Plan, StepId, abi};

use crate::error::RuntimeError;

/// Most places in host memory that one step's masks are copied from.
const MAX_RUNS: usize = 32;

/// Parts of an image begin at multiples of so many words (256 bytes).
const ALIGN_WORDS: usize = 64;

/// One work list: its first item, and their number with [`abi::SPLIT_TAIL`] where that pays.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct WorkList {
    pub(crate) begin: u32,
    pub(crate) count: u32,
}

/// Whether the tiles of a layer are all of one length: no head skips blocks of its own.
pub(crate) fn splits(ops: &[AttnOp]) -> bool {
    !ops.iter().any(|op| matches!(op, AttnOp::BlockSparse { .. }))
}

/// The count of a list of `items` items as kernels read it.
pub(crate) fn list_count(items: usize, splits: bool) -> u32 {
    items as u32 | if splits { abi::SPLIT_TAIL } else { 0 }
}

/// The op word of a head, its mask by the index that `index` gives it.
pub(crate) fn op_word(op: AttnOp, index: impl FnOnce(MaskId) -> u32) -> u32 {
    match op {
        AttnOp::Dense => abi::OP_DENSE,
        AttnOp::AnchorRows { .. } => abi::OP_ANCHORS,
        AttnOp::BlockSparse { mask } => index(mask),
    }
}

/// A copy from host memory into the image, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) host: usize,
    pub(crate) image: usize,
    pub(crate) words: usize,
}

/// One step's image. Offsets are in words from its start; lists are at 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepImage {
    pub(crate) ops: usize,
    pub(crate) items: usize,
    pub(crate) masks: usize,
    pub(crate) words: usize,
    /// What to copy.
    pub(crate) runs: Vec<Run>,
    /// The masks the step uses, ascending: a mask's place here is its index.
    used: Vec<MaskId>,
}

/// The images of all steps of a plan, and what host memory they come from.
#[derive(Clone, Debug)]
pub(crate) struct StepImages {
    pub(crate) steps: Vec<StepImage>,
    /// Words of host memory.
    pub(crate) host_words: usize,
    /// Where each mask is written, some more than once.
    placed: Vec<(MaskId, usize)>,
}

impl StepImages {
    /// Lays out the steps of a scheduled plan that has passed the verifier.
    pub(crate) fn new(plan: &Plan) -> Result<Self, RuntimeError> {
        let schedule = plan.schedule.as_ref().ok_or(RuntimeError::Unscheduled)?;
        let layers = plan.model.layers as usize;
        let sites = layers * plan.model.heads as usize;
        let mask_words = mask_words(plan);
        let mut images = Self { steps: Vec::new(), host_words: 0, placed: Vec::new() };
        let mut place_of: Vec<Option<usize>> = vec![None; plan.masks.len()];
        for (ops, lists) in plan.ops.chunks_exact(sites).zip(schedule.list_of.chunks_exact(layers)) {
            let mut used: Vec<MaskId> = (ops.iter())
                .filter_map(|op| match op {
                    AttnOp::BlockSparse { mask } => Some(*mask),
                    _ => None,
                })
                .collect();
            used.sort_unstable();
            used.dedup();
            let items: usize = distinct(lists).iter().map(|&list| schedule.list(list).len()).sum();
            let ops_at = aligned(2 * layers);
            let items_at = aligned(ops_at + sites);
            let masks_at = aligned(items_at + items);
            let mut runs = vec![Run { host: images.host_words, image: 0, words: masks_at }];
            images.host_words += masks_at;

            // Where this step's masks lie if those that already have a place stay there.
            let mut fresh = images.host_words;
            let mut places: Vec<usize> = Vec::with_capacity(used.len());
            for mask in &used {
                places.push(place_of[mask.index()].unwrap_or(fresh));
                fresh += if place_of[mask.index()].is_none() { mask_words } else { 0 };
            }
            let jumps = places.windows(2).filter(|pair| pair[1] != pair[0] + mask_words).count();
            if jumps >= MAX_RUNS {
                places = (0..used.len()).map(|i| images.host_words + i * mask_words).collect();
            }
            for (&mask, &host) in used.iter().zip(&places) {
                if host >= images.host_words {
                    images.placed.push((mask, host));
                    // The latest place: the next step is likely to use the same masks.
                    place_of[mask.index()] = Some(host);
                }
            }
            for (index, &host) in places.iter().enumerate() {
                let image = masks_at + index * mask_words;
                match runs.last_mut().filter(|run| index > 0 && run.host + run.words == host) {
                    Some(run) => run.words += mask_words,
                    None => runs.push(Run { host, image, words: mask_words }),
                }
            }
            let end = places.iter().map(|place| place + mask_words).max().unwrap_or(0);
            images.host_words = images.host_words.max(end);
            let words = masks_at + used.len() * mask_words;
            images.steps.push(StepImage { ops: ops_at, items: items_at, masks: masks_at, words, runs, used });
        }
        Ok(images)
    }

    /// Words of a slot that any step fits.
    pub(crate) fn slot_words(&self) -> usize {
        aligned(self.steps.iter().map(|step| step.words).max().unwrap_or(0))
    }

    /// Writes the plan they were laid out for into `host`, which has `host_words` words, all zero.
    pub(crate) fn write(&self, plan: &Plan, host: &mut [u32]) -> Result<(), RuntimeError> {
        let schedule = plan.schedule.as_ref().ok_or(RuntimeError::Unscheduled)?;
        let layers = plan.model.layers as usize;
        for (step, image) in (0..).map(StepId).zip(&self.steps) {
            let head = &mut host[image.runs[0].host..][..image.masks];
            let lists = &schedule.list_of[step.index() * layers..][..layers];
            let (mut begins, mut end) = (Vec::new(), 0);
            for list in distinct(lists) {
                let items = schedule.list(list);
                let to = &mut head[image.items + end..][..items.len()];
                to.iter_mut().zip(items).for_each(|(to, item)| *to = item.0);
                begins.push((list, end as u32, items.len()));
                end += items.len();
            }
            for ((to, list), layer) in head.chunks_exact_mut(2).zip(lists).zip(0..) {
                let at =
                    begins.binary_search_by_key(list, |&(list, ..)| list).expect("every list is among the distinct");
                let (_, begin, items) = begins[at];
                to.copy_from_slice(&[begin, list_count(items, splits(plan.layer_ops(step, LayerId(layer))))]);
            }
            let index = |mask: MaskId| image.used.binary_search(&mask).expect("every mask is among those used") as u32;
            let ops = (0..plan.model.layers).flat_map(|layer| plan.layer_ops(step, LayerId(layer)));
            head[image.ops..].iter_mut().zip(ops).for_each(|(to, &op)| *to = op_word(op, index));
        }
        for &(mask, at) in &self.placed {
            let words = plan.masks[mask].words();
            host[at..at + words.len()].copy_from_slice(words);
        }
        Ok(())
    }
}

/// Words of one mask.
fn mask_words(plan: &Plan) -> usize {
    plan.geometry.num_q_blocks() as usize * BlockMask::words_for(plan.geometry.num_kv_blocks())
}

fn aligned(words: usize) -> usize {
    words.next_multiple_of(ALIGN_WORDS)
}

fn distinct(lists: &[u32]) -> Vec<u32> {
    let mut lists = lists.to_vec();
    lists.sort_unstable();
    lists.dedup();
    lists
}

#[cfg(test)]
mod tests {
    use calibc_ir::{Geometry, HeadId, Model, Schedule, WorkItem};
    use proptest::prelude::*;

    use super::*;

    /// A plan of `steps` x 2 x `heads` sites on 3 x 3 blocks whose masks are drawn from `pool` different ones.
    fn plan(steps: usize, heads: u32, pool: u64, mut draw: impl FnMut(u64) -> u64) -> Plan {
        let model = Model { name: "m".into(), layers: 2, heads, head_dim: 64 };
        let mut plan = Plan::dense(model, Geometry::sequence(300, 300), vec![1.0; steps]);
        let (mut list_of, mut list_ptr, mut items) = (Vec::new(), vec![0], Vec::new());
        for site in 0..plan.ops.len() {
            plan.ops[site] = match draw(8) {
                0 => AttnOp::Dense,
                1 => AttnOp::AnchorRows { anchors: 1 },
                _ => {
                    let bits = draw(pool);
                    let mask = BlockMask::from_fn(3, 3, |r, c| r == c || bits >> (3 * r + c) & 1 == 1);
                    AttnOp::BlockSparse { mask: plan.masks.intern(mask) }
                }
            };
        }
        for _ in 0..2 * steps {
            let lists = list_ptr.len() as u64 - 1;
            match draw(lists + 2) {
                list if list < lists => list_of.push(list as u32),
                _ => {
                    let count = 1 + draw(5) as u32;
                    items.extend((0..count).map(|i| WorkItem::new(HeadId(i % heads), i)));
                    list_of.push(lists as u32);
                    list_ptr.push(items.len() as u32);
                }
            }
        }
        plan.schedule = Some(Schedule { list_of, list_ptr, items });
        plan
    }

    /// Copies a step as an upload would, into a slot full of other things.
    fn uploaded(images: &StepImages, host: &[u32], step: usize) -> Vec<u32> {
        let mut slot = vec![0xdead_beef; images.slot_words()];
        for run in &images.steps[step].runs {
            slot[run.image..run.image + run.words].copy_from_slice(&host[run.host..run.host + run.words]);
        }
        slot
    }

    /// Whether the slot says what the plan says of `step`.
    fn check(plan: &Plan, images: &StepImages, slot: &[u32], step: usize) {
        let image = &images.steps[step];
        let schedule = plan.schedule.as_ref().unwrap();
        let mask_words = mask_words(plan);
        for layer in 0..2 {
            let [begin, count] = [slot[2 * layer], slot[2 * layer + 1] & !abi::SPLIT_TAIL].map(|n| n as usize);
            let sparse = |op: &AttnOp| matches!(op, AttnOp::BlockSparse { .. });
            let ops = plan.layer_ops(StepId(step as u32), LayerId(layer as u32));
            assert_eq!(slot[2 * layer + 1] >= abi::SPLIT_TAIL, !ops.iter().any(sparse));
            let items: Vec<WorkItem> =
                slot[image.items + begin..][..count].iter().map(|&item| WorkItem(item)).collect();
            assert_eq!(items, schedule.list(schedule.list_of[2 * step + layer]));
            let heads = plan.model.heads as usize;
            for (head, &op) in plan.layer_ops(StepId(step as u32), LayerId(layer as u32)).iter().enumerate() {
                match (op, slot[image.ops + layer * heads + head]) {
                    (AttnOp::Dense, word) => assert_eq!(word, abi::OP_DENSE),
                    (AttnOp::AnchorRows { .. }, word) => assert_eq!(word, abi::OP_ANCHORS),
                    (AttnOp::BlockSparse { mask }, index) => {
                        let words = &slot[image.masks + index as usize * mask_words..][..mask_words];
                        assert_eq!(words, plan.masks[mask].words());
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_slot_says_what_the_plan_says(seed: u64, steps in 1..8_usize, heads in 1..40_u32, pool in 1..300_u64) {
            let mut state = seed | 1;
            let plan = plan(steps, heads, pool, |n| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                (state >> 33) % n
            });
            let images = StepImages::new(&plan).unwrap();
            let mut host = vec![0; images.host_words];
            images.write(&plan, &mut host).unwrap();
            for step in 0..steps {
                prop_assert!(images.steps[step].runs.len() <= MAX_RUNS + 1);
                prop_assert!(images.steps[step].words <= images.slot_words());
                check(&plan, &images, &uploaded(&images, &host, step), step);
            }
        }
    }

    /// Two layers of `heads` block-sparse heads per step; `mask` gives each site its mask.
    fn sparse(steps: usize, heads: usize, mask: impl Fn(usize) -> usize) -> Plan {
        let mut plan = plan(steps, heads as u32, 1, |n| n - 1);
        plan.masks = Default::default();
        for site in 0..plan.ops.len() {
            let bits = mask(site);
            let mask = BlockMask::from_fn(3, 3, |r, c| bits >> (3 * r + c) & 1 == 1);
            plan.ops[site] = AttnOp::BlockSparse { mask: plan.masks.intern(mask) };
        }
        plan
    }

    #[test]
    fn steps_that_share_masks_share_memory() {
        let same = |steps| StepImages::new(&sparse(steps, 50, |site| site % 100)).unwrap();
        let (one, many) = (same(1), same(9));
        let masks = 100 * 3;
        assert_eq!(many.host_words, 9 * one.host_words - 8 * masks, "the masks once");
        assert!(many.steps.iter().all(|step| step.runs.len() == 2));
        // Different masks in each step: one copy of the head and one of the masks.
        let apart = StepImages::new(&sparse(3, 50, |site| site)).unwrap();
        assert!(apart.steps.iter().all(|step| step.runs.len() == 2));
        assert_eq!(apart.host_words, 3 * one.host_words);
    }

    #[test]
    fn a_step_whose_masks_lie_all_over_gets_its_own() {
        // The second step takes every other mask of the first, the third again the same.
        let pick = |site: usize| if site < 200 { site } else { site % 100 * 2 };
        let images = StepImages::new(&sparse(3, 100, pick)).unwrap();
        assert!(images.steps.iter().all(|step| step.runs.len() == 2), "{:?}", images.steps);
        assert_eq!(images.steps[1].runs[1].host, images.steps[2].runs[1].host);
    }

    #[test]
    fn a_plan_needs_its_schedule() {
        let mut unscheduled = sparse(1, 2, |site| site);
        unscheduled.schedule = None;
        assert!(matches!(StepImages::new(&unscheduled), Err(RuntimeError::Unscheduled)));
    }
}

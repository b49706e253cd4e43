//! schedule: the order of work of every (step, layer).
//!
//! The heads of a layer are cut into groups whose keys and values fit in L2 together; groups run one after another, costliest
//! heads first. Inside a group, tiles run longest first, so that the short ones fill the tail; tiles of about the same
//! length (within [`LENGTHS`]-ths of a whole row) run head by head along a space-filling curve of the latent grid, so that
//! neighbours on the machine read the same keys. Where all heads fit, that is longest-first over the whole layer. Where not even
//! one does, tiles run head by head in the order of the sequence: reading keys together then saves more than a short tail
//! (measured on an H200 at 75,600 tokens: 3 to 4 % over the curve, 2 to 4 % over longest-first).
//!
//! Last, the shares of persistent CTAs are made even. Of `G` of them ([`Target::running_tiles`]) the one at place `c` runs items
//! `c`, `c + G`, `c + 2G`, ... of a list: one of every round of `G`. In the order above the first places of a round tend to get its
//! longest items, round after round, and the kernel lasts as long as the fullest CTA. So within every round the costliest item
//! goes to the place with the least work so far (a short last round is counted first). Items stay in their round: neighbours still
//! read the same keys at the same time. Further batches run the list again from another place on; a place's items are an even share whichever CTA runs them. Kernels
//! that are not persistent take items in list order, which changes only within a round.
//!
//! Simulated, banded masks of density 0.25, alike in all heads up to six times as wide in the last as in the first; work of the
//! fullest of 132 CTAs over the mean, before and after:
//!
//! | heads x tiles | before | after |
//! |---|---|---|
//! | 40 x 256 | 1.7 to 2.2 % | 0.1 to 0.2 % |
//! | 12 x 256 | 4.8 to 8.1 % | 0.3 to 0.6 % |
//! | 40 x 591 | 0.3 to 0.4 % | under 0.1 % |
//!
//! Measured on an H200 (40 heads of 32,760 tokens, head_dim 128, density 0.25), the short round not yet counted first: 1 to 2.5 % faster.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use calibc_ir::{
    AnchorTable, AttnOp, BLOCK, BlockMask, Geometry, HeadId, LayerId, MaskId, Plan, Schedule, StepId, WorkItem,
};
use rayon::prelude::*;

use crate::error::OptError;
use crate::hooks::{Hooks, Watch};
use crate::pipeline::{Context, Outcome, Pass, Target};

/// Tiles whose cost differs by less than this part of a whole row count as equally long.
const LENGTHS: u32 = 16;

/// An item's work beside its key blocks (loading queries, storing outputs), in key blocks.
const ITEM_COST: u64 = 1;

/// Emits the work lists.
pub(crate) struct ScheduleWork {
    pub(crate) target: Target,
}

impl Pass for ScheduleWork {
    fn name(&self) -> &'static str {
        "schedule"
    }

    fn run(&self, plan: &mut Plan, cx: &Context<'_>) -> Result<Outcome, OptError> {
        let schedule = build(plan, &self.target, cx.watch)?;
        let (lists, items) = (schedule.list_ptr.len() - 1, schedule.items.len());
        plan.schedule = Some(schedule);
        Ok(Outcome::changed(format!("{lists} work lists of {items} items")))
    }
}

/// The work lists of a plan that passes the verifier ([`calibc_ir::verify::verify`]; the verifier bounds their items by `u32`).
pub fn schedule(plan: &Plan, target: &Target) -> Schedule {
    match build(plan, target, Watch::new(&Hooks::default())) {
        Ok(schedule) => schedule,
        Err(error) => unreachable!("only a cancel flag stops scheduling, and there is none: {error}"),
    }
}

fn build(plan: &Plan, target: &Target, watch: Watch<'_>) -> Result<Schedule, OptError> {
    let layers = plan.model.layers;
    let order = Order::new(plan, target);
    let work = watch.work("schedule", u64::from(plan.num_steps()) * u64::from(layers));
    let mut lists = Lists::new();
    for step in 0..plan.num_steps() {
        let ops = |layer| plan.layer_ops(StepId(step), LayerId(layer));
        let step_lists = work.map((0..layers).into_par_iter(), |layer| Ok(order.list(ops(layer))))?;
        step_lists.into_iter().for_each(|list| lists.push(&list));
    }
    Ok(lists.schedule)
}

/// What all lists of a plan have in common.
struct Order<'a> {
    plan: &'a Plan,
    /// Heads of a group.
    group: usize,
    /// Whether tiles run longest first, equals along the curve; else in the order of the sequence.
    by_length: bool,
    /// Place of each query block on the curve.
    curve: Vec<u32>,
    /// Tiles of an anchor head.
    anchor_tiles: u32,
    /// Items of a round: one for each persistent CTA.
    round: usize,
}

impl<'a> Order<'a> {
    fn new(plan: &'a Plan, target: &Target) -> Self {
        let (g, model) = (&plan.geometry, &plan.model);
        // Keys and values, two bytes per element.
        let head_bytes = 4 * u64::from(g.kv_tokens()) * u64::from(model.head_dim);
        let fit = target.l2_bytes / head_bytes;
        // So many heads are at work at a time in any order that runs one head after another.
        let at_work = target.running_tiles.div_ceil(g.num_q_blocks());
        let group = fit.max(at_work.into()).clamp(1, model.heads.into()) as usize;
        let anchor_tiles = plan.anchors().map_or(0, |anchors| AnchorTable::new(g, anchors).num_tiles());
        let round = target.running_tiles.max(1) as usize;
        Self { plan, group, by_length: fit > 0, curve: curve(g), anchor_tiles, round }
    }

    /// Cost of each tile of a head, in key blocks.
    fn costs(&self, op: AttnOp) -> Vec<u32> {
        let (rows, cols) = (self.plan.geometry.num_q_blocks(), self.plan.geometry.num_kv_blocks());
        match op {
            AttnOp::Dense => vec![cols; rows as usize],
            AttnOp::BlockSparse { mask } => row_counts(&self.plan.masks[mask]),
            AttnOp::AnchorRows { .. } => vec![cols; self.anchor_tiles as usize],
        }
    }

    fn list(&self, ops: &[AttnOp]) -> Vec<WorkItem> {
        let mut items = self.in_order(ops);
        even_out(&mut items, self.round);
        items.into_iter().map(|(item, _)| item).collect()
    }

    /// The items of a layer, rounds not yet evened out, each with its cost in key blocks.
    fn in_order(&self, ops: &[AttnOp]) -> Vec<(WorkItem, u32)> {
        let cols = self.plan.geometry.num_kv_blocks();
        // Heads that share a mask share its costs.
        let mut of_mask: HashMap<MaskId, Vec<u32>> = HashMap::new();
        let mut heads: Vec<(HeadId, AttnOp, Vec<u32>)> = (0..)
            .map(HeadId)
            .zip(ops)
            .map(|(head, &op)| match op {
                AttnOp::BlockSparse { mask } => {
                    (head, op, of_mask.entry(mask).or_insert_with(|| self.costs(op)).clone())
                }
                _ => (head, op, self.costs(op)),
            })
            .collect();
        let total = |costs: &[u32]| costs.iter().map(|&c| u64::from(c)).sum::<u64>();
        // Stable: equal heads stay in id order.
        heads.sort_by_cached_key(|(_, _, costs)| std::cmp::Reverse(total(costs)));
        let mut items = Vec::with_capacity(heads.iter().map(|(_, _, costs)| costs.len()).sum());
        for group in heads.chunks(self.group) {
            let start = items.len();
            for (rank, (head, op, costs)) in group.iter().enumerate() {
                for (tile, &cost) in (0..).zip(costs) {
                    let place = match op {
                        AttnOp::BlockSparse { .. } | AttnOp::Dense if self.by_length => self.curve[tile as usize],
                        _ => tile,
                    };
                    // 0 is the longest class: whole rows and those within a class of them.
                    let short = if self.by_length { cols - cost.min(cols) } else { 0 };
                    let class = u64::from(short) * u64::from(LENGTHS) / u64::from(cols);
                    items.push((class, rank, place, WorkItem::new(*head, tile), cost));
                }
            }
            items[start..].sort_unstable();
        }
        items.into_iter().map(|(.., item, cost)| (item, cost)).collect()
    }
}

/// Reorders the items within each round of `round` so that items at the same place of all rounds add up to about the same cost
/// at every place. A list of no more than one round stays as it is.
fn even_out(items: &mut [(WorkItem, u32)], round: usize) {
    if items.len() <= round {
        return;
    }
    let mut loads = vec![0_u64; round];
    let mut places: Vec<usize> = Vec::with_capacity(round);
    let mut sorted: Vec<(WorkItem, u32)> = Vec::with_capacity(round);
    // Every place gets one item of a round, so least load to highest cost is one pass over both in order. A short last
    // round goes first, so that the whole ones make up for the places that get an item more.
    let (whole, short) = items.split_at_mut(items.len() - items.len() % round);
    for items in std::iter::once(short).chain(whole.chunks_mut(round)) {
        places.clear();
        places.extend(0..items.len());
        places.sort_unstable_by_key(|&place| (loads[place], place));
        sorted.clear();
        sorted.extend_from_slice(items);
        // Stable: of equal items the earlier one comes first.
        sorted.sort_by_key(|&(_, cost)| std::cmp::Reverse(cost));
        for (&place, &item) in places.iter().zip(&sorted) {
            items[place] = item;
            loads[place] += u64::from(item.1) + ITEM_COST;
        }
    }
}

fn row_counts(mask: &BlockMask) -> Vec<u32> {
    (0..mask.rows()).map(|r| mask.row_count(r)).collect()
}

/// Place of each query block on a Z-order curve of the latent grid, whose cells are as large as the largest block; text blocks
/// stand at the end they have in the sequence.
fn curve(g: &Geometry) -> Vec<u32> {
    #[derive(Clone, Copy)]
    struct Extent {
        tokens: u32,
        sum: [u64; 3],
        low: [u32; 3],
        high: [u32; 3],
    }
    let none = Extent { tokens: 0, sum: [0; 3], low: [u32::MAX; 3], high: [0; 3] };
    let mut blocks = vec![none; g.num_q_blocks() as usize];
    for f in 0..g.frames {
        for y in 0..g.height {
            for x in 0..g.width {
                let block = &mut blocks[(g.position(f, y, x) / BLOCK) as usize];
                block.tokens += 1;
                for (d, at) in [f, y, x].into_iter().enumerate() {
                    block.sum[d] += u64::from(at);
                    block.low[d] = block.low[d].min(at);
                    block.high[d] = block.high[d].max(at);
                }
            }
        }
    }
    // The typical block sets the cell: the median, because a block at the seam of two tiles or frames spans far more.
    let cell: [u32; 3] = std::array::from_fn(|d| {
        let mut spans: Vec<u32> = blocks.iter().filter(|b| b.tokens > 0).map(|b| b.high[d] - b.low[d] + 1).collect();
        spans.sort_unstable();
        spans[spans.len() / 2]
    });
    let text_first = g.text_position == calibc_ir::TextPosition::Before;
    let place = |block: &Extent| -> u64 {
        if block.tokens == 0 {
            return if text_first { 0 } else { u64::MAX };
        }
        let at = std::array::from_fn(|d| (block.sum[d] / u64::from(block.tokens)) as u32 / cell[d]);
        interleave(at)
    };
    let mut order: Vec<(u64, u32)> = (0..).zip(&blocks).map(|(i, block)| (place(block), i)).collect();
    order.sort_unstable();
    let mut places = vec![0; blocks.len()];
    (0..).zip(order).for_each(|(place, (_, block))| places[block as usize] = place);
    places
}

/// Z-order: the bits of three coordinates in turn. 21 bits are enough: no grid has more than 2^15 blocks.
fn interleave(at: [u32; 3]) -> u64 {
    let bits = (0..21).flat_map(|bit| (0..3).map(move |d| (bit, d)));
    bits.fold(0, |key, (bit, d)| key | u64::from(at[d] >> bit & 1) << (3 * bit + (2 - d)))
}

/// The schedule in the making; equal lists become one.
struct Lists {
    schedule: Schedule,
    // Hash -> lists with that hash. Looked up, never iterated.
    by_hash: HashMap<u64, Vec<u32>>,
    hasher: RandomState,
}

impl Lists {
    fn new() -> Self {
        let schedule = Schedule { list_ptr: vec![0], ..Schedule::default() };
        Self { schedule, by_hash: HashMap::new(), hasher: RandomState::new() }
    }

    fn push(&mut self, list: &[WorkItem]) {
        let schedule = &mut self.schedule;
        let known = self.by_hash.entry(self.hasher.hash_one(list)).or_default();
        let id = known.iter().copied().find(|&id| schedule.list(id) == list).unwrap_or_else(|| {
            let id = (schedule.list_ptr.len() - 1) as u32;
            schedule.items.extend_from_slice(list);
            schedule.list_ptr.push(u32::try_from(schedule.items.len()).expect("the verifier bounds work items by u32"));
            known.push(id);
            id
        });
        schedule.list_of.push(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use calibc_ir::{Layout, Model, TextPosition};
    use proptest::prelude::*;

    #[test]
    fn the_curve_keeps_neighbours_of_the_grid_together() {
        // 4 frames of 8 rows of 64: a block is 2 rows, 4 blocks a frame; Z-order visits 2x2 cells of (frame, row pair).
        let places = curve(&Geometry::video(4, 8, 64));
        assert_eq!(places, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        // Tiles of exactly one block: 2x2x2 of them, in Z-order already.
        let tiles = Geometry { layout: Layout::Tile([2, 8, 8]), ..Geometry::video(4, 16, 16) };
        assert_eq!(curve(&tiles), [0, 1, 2, 3, 4, 5, 6, 7]);
        let text = Geometry { text_tokens: 300, text_position: TextPosition::Before, ..Geometry::video(1, 4, 128) };
        assert_eq!(curve(&text)[..3], [0, 1, 2]);
    }

    #[test]
    fn every_block_has_its_own_place() {
        for g in [
            Geometry::video(7, 11, 13),
            Geometry::sequence(1000, 77),
            Geometry { layout: Layout::Tile([2, 8, 8]), ..Geometry::video(5, 20, 27) },
            Geometry { text_tokens: 999, text_position: TextPosition::After, ..Geometry::video(1, 1, 1) },
        ] {
            let mut places = curve(&g);
            places.sort_unstable();
            assert_eq!(places, (0..g.num_q_blocks()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn long_tiles_run_first_within_what_l2_holds() {
        let model = Model { name: "t".into(), layers: 1, heads: 2, head_dim: 128 };
        let mut plan = Plan::dense(model, Geometry::video(1, 4, 128), vec![1.0]);
        let rows = |costs: [u32; 4]| BlockMask::from_fn(4, 4, |r, c| c < costs[r as usize]);
        for (head, costs) in [[1, 2, 3, 4], [4, 3, 3, 1]].into_iter().enumerate() {
            plan.ops[head] = AttnOp::BlockSparse { mask: plan.masks.intern(rows(costs)) };
        }
        let items = |l2_bytes| {
            let target = Target { l2_bytes, running_tiles: 1, ..Target::default() };
            schedule(&plan, &target).items.iter().map(|i| (i.head().0, i.tile())).collect::<Vec<_>>()
        };
        // Both heads fit: one longest-first order. Only one fits: the costly head first, longest-first inside.
        let head_bytes = 4 * 512 * 128;
        assert_eq!(items(2 * head_bytes), [(1, 0), (0, 3), (1, 1), (1, 2), (0, 2), (0, 1), (1, 3), (0, 0)]);
        assert_eq!(items(2 * head_bytes - 1), [(1, 0), (1, 1), (1, 2), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]);
        // None fits: in the order of the sequence.
        assert_eq!(items(head_bytes - 1), [(1, 0), (1, 1), (1, 2), (1, 3), (0, 0), (0, 1), (0, 2), (0, 3)]);
    }

    /// One layer at density 0.25: a head keeps a band of keys around each query, as wide on either side as `widths` say, in
    /// thousandths of the sequence, from the first head to the last.
    fn banded(heads: u32, geometry: Geometry, widths: [u32; 2]) -> Plan {
        let model = Model { name: "t".into(), layers: 1, heads, head_dim: 128 };
        let mut plan = Plan::dense(model, geometry, vec![1.0]);
        let blocks = geometry.num_q_blocks();
        for head in 0..heads {
            let width = blocks * (widths[0] + (widths[1] - widths[0]) * head / (heads - 1)) / 1000;
            let mask = BlockMask::from_fn(blocks, blocks, |r, c| r.abs_diff(c) <= width);
            plan.ops[head as usize] = AttnOp::BlockSparse { mask: plan.masks.intern(mask) };
        }
        let density = plan.ops.iter().map(|&op| plan.density(op)).sum::<f64>() / f64::from(heads);
        assert!((density - 0.25).abs() < 0.01, "{density}");
        plan
    }

    /// How far the work of the fullest CTA is above the mean, if each runs every `ctas`-th item.
    fn imbalance(items: &[(WorkItem, u32)], ctas: usize) -> f64 {
        let loads: Vec<u64> = (0..ctas)
            .map(|cta| items.iter().skip(cta).step_by(ctas).map(|&(_, cost)| u64::from(cost) + ITEM_COST).sum())
            .collect();
        let mean = loads.iter().sum::<u64>() as f64 / ctas as f64;
        *loads.iter().max().unwrap() as f64 / mean - 1.0
    }

    #[test]
    fn persistent_ctas_get_even_shares() {
        let (short, long) = (Geometry::video(21, 30, 52), Geometry::video(21, 45, 80));
        let (alike, apart) = ([134, 134], [40, 240]);
        for (heads, geometry, widths, limit) in [
            (40, short, alike, 0.0025),
            (40, short, apart, 0.001),
            (12, short, alike, 0.007),
            (12, short, apart, 0.004),
            (10, long, apart, 0.002),
        ] {
            let plan = banded(heads, geometry, widths);
            let target = Target::default();
            let order = Order::new(&plan, &target);
            let mut items = order.in_order(&plan.ops);
            let ctas = target.running_tiles as usize;
            let before = imbalance(&items, ctas);
            even_out(&mut items, ctas);
            let after = imbalance(&items, ctas);
            let case = format!("{heads} x {}, {widths:?}: {before:.4}, {after:.4}", geometry.num_q_blocks());
            assert!(before > 2.0 * limit, "uneven as it was: {case}");
            assert!(after < limit, "{case}");
            // The list is this order, every time.
            let items: Vec<_> = items.into_iter().map(|(item, _)| item).collect();
            let lists = schedule(&plan, &target);
            assert_eq!(lists.items, items, "{case}");
            assert_eq!(lists, schedule(&plan, &target), "{case}");
        }
    }

    fn numbered(costs: &[u32]) -> Vec<(WorkItem, u32)> {
        (0..).map(WorkItem).zip(costs.iter().copied()).collect()
    }

    fn evened(costs: &[u32], round: usize) -> Vec<u32> {
        let mut items = numbered(costs);
        even_out(&mut items, round);
        items.into_iter().map(|(WorkItem(i), _)| i).collect()
    }

    #[test]
    fn the_costliest_item_of_a_round_goes_to_the_least_load() {
        // Loads 10, 6, 6 after the first round; equal loads take the lower place first, equal items the earlier.
        assert_eq!(evened(&[5, 9, 5, 3, 7, 7], 3), [1, 0, 2, 3, 4, 5]);
        // The short round comes first: loads 7, 5, 0.
        assert_eq!(evened(&[9, 1, 1, 4, 6], 3), [2, 1, 0, 4, 3]);
        // Nothing to even out: one round, or all alike.
        assert_eq!(evened(&[1, 2, 3], 3), [0, 1, 2]);
        assert_eq!(evened(&[1, 2, 3], 4), [0, 1, 2]);
        assert_eq!(evened(&[], 3), [0; 0]);
        assert_eq!(evened(&[4; 9], 3), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }

    proptest! {
        #[test]
        fn rounds_keep_their_items((costs, round) in (prop::collection::vec(0..20_u32, 0..200), 1..40_usize)) {
            let got = evened(&costs, round);
            prop_assert_eq!(&got, &evened(&costs, round));
            for (start, got) in (0..).step_by(round).zip(got.chunks(round)) {
                let mut got = got.to_vec();
                got.sort_unstable();
                prop_assert_eq!(&got, &(start..start + got.len() as u32).collect::<Vec<_>>());
            }
        }

        #[test]
        fn every_item_goes_to_the_least_load_left((costs, round) in (prop::collection::vec(0..20_u32, 0..200), 1..40_usize)) {
            prop_assume!(costs.len() > round);
            // One item at a time, looking at every place.
            let mut loads = vec![0_u64; round];
            let mut want = Vec::new();
            let all = numbered(&costs);
            let (whole, short) = all.split_at(costs.len() / round * round);
            for items in std::iter::once(short).chain(whole.chunks(round)) {
                let mut places = vec![None; items.len()];
                let mut left = items.to_vec();
                while !left.is_empty() {
                    let next = (0..left.len()).min_by_key(|&i| (std::cmp::Reverse(left[i].1), i)).unwrap();
                    let place = (0..places.len()).filter(|&p| places[p].is_none()).min_by_key(|&p| (loads[p], p)).unwrap();
                    let (WorkItem(item), cost) = left.remove(next);
                    places[place] = Some(item);
                    loads[place] += u64::from(cost) + ITEM_COST;
                }
                want.extend(places.into_iter().flatten());
            }
            want.rotate_left(short.len());
            prop_assert_eq!(evened(&costs, round), want);
        }
    }
}

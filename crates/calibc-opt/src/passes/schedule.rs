//! schedule: the order of work of every (step, layer).
//!
//! The heads of a layer are cut into groups whose keys and values fit in L2 together; groups run one after another, costliest
//! heads first. Inside a group, tiles run longest first, so that the short ones fill the tail; tiles of about the same
//! length (within [`LENGTHS`]-ths of a whole row) run head by head along a space-filling curve of the latent grid, so that
//! neighbours on the machine read the same keys. Where all heads fit, that is longest-first over the whole layer. Where not even
//! one does, tiles run head by head in the order of the sequence: reading keys together then saves more than a short tail
//! (measured on an H200 at 75,600 tokens: 3 to 4 % over the curve, 2 to 4 % over longest-first).
//!
//! A tile is a query block, or a block and a half at head_dim 64 ([`abi::tile_rows`]): it costs what its rows cost on average.
//!
//! Tiles come in pairs, which run side by side: on the two CTAs of a cluster, where at head_dim 128 what both keep is loaded once. A pair is two tiles of a
//! head that follow each other in the sequence: such neighbours keep much the same, and about as much. Pairs are what is put in the order
//! above: as long as the longer tile, in the place of the first. Where a head has an odd number of tiles, the last one waits for that of
//! another head.
//!
//! Last, the shares of persistent CTAs are made even. Of `G` of them ([`Target::running_tiles`]) the one at place `c` runs items
//! `c`, `c + G`, `c + 2G`, ... of a list: one of every round of `G`. In the order above the first places of a round tend to get its
//! longest items, round after round, and the kernel lasts as long as the fullest CTA. So within every round the costliest pair
//! goes to the cluster with the least work so far (a short last round is counted first); then the fullest and the emptiest cluster exchange
//! pairs, as long as that helps. Pairs stay in their round: neighbours still
//! read the same keys at the same time. Further batches run the list again from another place on; a place's items are an even share whichever CTA runs them. Kernels
//! that are not persistent take items in list order, which changes only within a round.
//!
//! Simulated, banded masks of density 0.25, alike in all heads up to six times as wide in the last as in the first; work of the
//! fullest of 132 CTAs over the mean, before and after:
//!
//! | heads x tiles | before | after |
//! |---|---|---|
//! | 40 x 256 | 2.0 to 2.1 % | under 0.1 % |
//! | 12 x 256 | 4.7 to 8.2 % | 0.3 % |
//! | 10 x 591 | 1.1 % | 0.1 % |
//!
//! Measured on an H200 (40 heads of 32,760 tokens, head_dim 128, density 0.25), when tiles were dealt singly: 1 to 2.5 % faster.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use calibc_ir::{
    AnchorTable, AttnOp, BLOCK, BlockMask, Geometry, HeadId, LayerId, MaskId, Plan, Schedule, StepId, WorkItem, abi,
};
use rayon::prelude::*;

use crate::error::OptError;
use crate::hooks::{Hooks, Watch};
use crate::pipeline::{Context, Outcome, Pass, Target};

/// Tiles whose cost differs by less than this part of a whole row count as equally long.
const LENGTHS: u32 = 16;

/// An item's work beside its key blocks (loading queries, storing outputs), in key blocks.
const ITEM_COST: u64 = 1;

/// Exchanges that even out a list, for every place at most.
const EXCHANGES: usize = 8;

/// A tile and its cost in key blocks.
type Tile = (WorkItem, u32);

/// Two tiles that run side by side; only the last of a list may be alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    first: Tile,
    second: Option<Tile>,
}

impl Pair {
    /// As long as the longer one.
    fn cost(&self) -> u32 {
        self.first.1.max(self.second.map_or(0, |(_, cost)| cost))
    }

    /// Work of both, in key blocks.
    fn work(&self) -> u64 {
        self.tiles().map(|(_, cost)| u64::from(cost) + ITEM_COST).sum()
    }

    fn tiles(self) -> impl Iterator<Item = Tile> {
        [Some(self.first), self.second].into_iter().flatten()
    }
}

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
    /// Query rows of a tile.
    tile_rows: u32,
    /// Query rows of a head, and computed ones of an anchor head.
    rows: [u32; 2],
    /// Pairs of a round: one for each cluster of persistent CTAs.
    round: usize,
}

impl<'a> Order<'a> {
    fn new(plan: &'a Plan, target: &Target) -> Self {
        let (g, model) = (&plan.geometry, &plan.model);
        // Keys and values, two bytes per element.
        let head_bytes = 4 * u64::from(g.kv_tokens()) * u64::from(model.head_dim);
        let fit = target.l2_bytes / head_bytes;
        // So many heads are at work at a time in any order that runs one head after another.
        let at_work = target.running_tiles.div_ceil(plan.num_tiles(AttnOp::Dense));
        let group = fit.max(at_work.into()).clamp(1, model.heads.into()) as usize;
        let computed = plan.anchors().map_or(0, |anchors| AnchorTable::new(g, anchors).queries.len() as u32);
        let rows = [g.q_tokens(), computed];
        let round = (target.running_tiles / abi::CLUSTER).max(1) as usize;
        let tile_rows = abi::tile_rows(model.head_dim);
        Self { plan, group, by_length: fit > 0, curve: curve(g), tile_rows, rows, round }
    }

    /// Cost of each tile of a head, in key blocks.
    fn costs(&self, op: AttnOp) -> Vec<u32> {
        let rows = self.rows[usize::from(matches!(op, AttnOp::AnchorRows { .. }))];
        let kept = match op {
            AttnOp::BlockSparse { mask } => row_counts(&self.plan.masks[mask]),
            _ => vec![self.plan.geometry.num_kv_blocks(); rows.div_ceil(BLOCK) as usize],
        };
        tile_costs(&kept, rows, self.tile_rows)
    }

    fn list(&self, ops: &[AttnOp]) -> Vec<WorkItem> {
        let mut pairs = self.in_order(ops);
        even_out(&mut pairs, self.round);
        pairs.into_iter().flat_map(Pair::tiles).map(|(item, _)| item).collect()
    }

    /// The pairs of a layer, rounds not yet evened out.
    fn in_order(&self, ops: &[AttnOp]) -> Vec<Pair> {
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
        let mut pairs = Vec::with_capacity(heads.iter().map(|(_, _, costs)| costs.len().div_ceil(2)).sum());
        let mut waiting: Option<Tile> = None;
        for group in heads.chunks(self.group) {
            let start = pairs.len();
            for (rank, (head, op, costs)) in group.iter().enumerate() {
                let tile = |i: usize| (WorkItem::new(*head, i as u32), costs[i]);
                for at in (0..costs.len()).step_by(2) {
                    let pair = match (at + 1 < costs.len(), waiting) {
                        (true, _) => Pair { first: tile(at), second: Some(tile(at + 1)) },
                        (false, Some(first)) => {
                            waiting = None;
                            Pair { first, second: Some(tile(at)) }
                        }
                        (false, None) => {
                            waiting = Some(tile(at));
                            continue;
                        }
                    };
                    let place = match op {
                        AttnOp::BlockSparse { .. } | AttnOp::Dense if self.by_length => {
                            self.curve[at * self.tile_rows as usize / BLOCK as usize]
                        }
                        _ => at as u32,
                    };
                    // 0 is the longest class: whole rows and those within a class of them.
                    let short = if self.by_length { cols - pair.cost().min(cols) } else { 0 };
                    let class = u64::from(short) * u64::from(LENGTHS) / u64::from(cols);
                    pairs.push((class, rank, place, pair));
                }
            }
            pairs[start..].sort_by_key(|&(class, rank, place, _)| (class, rank, place));
        }
        let mut pairs: Vec<Pair> = pairs.into_iter().map(|(.., pair)| pair).collect();
        pairs.extend(waiting.map(|first| Pair { first, second: None }));
        pairs
    }
}

/// Reorders the pairs within each round of `round` so that pairs at the same place of all rounds add up to about the same cost
/// at every place, and so do the tiles of either side of a place. A list of no more than one round stays as it is, and so does a tile
/// without another one.
fn even_out(pairs: &mut [Pair], round: usize) {
    if pairs.len() <= round {
        return;
    }
    let lone = usize::from(pairs.last().is_some_and(|pair| pair.second.is_none()));
    let (pairs, lone) = pairs.split_at_mut(pairs.len() - lone);
    let mut loads = vec![0_u64; round];
    for pair in &*lone {
        loads[pairs.len() % round] += pair.work();
    }
    deal(pairs, &mut loads);
    exchange(pairs, &mut loads);
    take_sides(pairs, round);
}

/// At every place, the costlier tile of a pair goes to the side with less work; pairs that differ most come first, so that the others
/// even out what is left.
fn take_sides(pairs: &mut [Pair], round: usize) {
    let apart = |pair: &Pair| pair.second.map_or(0, |(_, cost)| cost.abs_diff(pair.first.1));
    let mut order: Vec<usize> = Vec::with_capacity(pairs.len().div_ceil(round));
    for place in 0..round.min(pairs.len()) {
        order.clear();
        order.extend((place..pairs.len()).step_by(round));
        order.sort_by_key(|&i| std::cmp::Reverse(apart(&pairs[i])));
        // Of the first side, more than of the second.
        let mut ahead = 0_i64;
        for &i in &order {
            let Pair { first, second: Some(second) } = &mut pairs[i] else { continue };
            if second.1 != first.1 && (second.1 > first.1) == (ahead < 0) {
                std::mem::swap(first, second);
            }
            ahead += i64::from(first.1) - i64::from(second.1);
        }
    }
}

/// In every round the costliest pair goes to the place with the least load. A short last round goes first, so that the whole ones make up
/// for the places that get a pair more.
fn deal(pairs: &mut [Pair], loads: &mut [u64]) {
    let round = loads.len();
    let mut places: Vec<usize> = Vec::with_capacity(round);
    let mut sorted: Vec<Pair> = Vec::with_capacity(round);
    let (whole, short) = pairs.split_at_mut(pairs.len() - pairs.len() % round);
    for pairs in std::iter::once(short).chain(whole.chunks_mut(round)) {
        places.clear();
        places.extend(0..pairs.len());
        places.sort_unstable_by_key(|&place| (loads[place], place));
        sorted.clear();
        sorted.extend_from_slice(pairs);
        // Stable: of equal pairs the earlier one comes first.
        sorted.sort_by_key(|pair| std::cmp::Reverse(pair.work()));
        for (&place, &pair) in places.iter().zip(&sorted) {
            pairs[place] = pair;
            loads[place] += pair.work();
        }
    }
}

/// As long as it evens them out, the places with the most and the least work exchange pairs of one round: those whose costs differ
/// by about half of what the loads do.
fn exchange(pairs: &mut [Pair], loads: &mut [u64]) {
    let round = loads.len();
    for _ in 0..EXCHANGES * round {
        let by_load = |&place: &usize| (loads[place], place);
        let (Some(most), Some(least)) = ((0..round).max_by_key(by_load), (0..round).min_by_key(by_load)) else {
            return;
        };
        let gap = loads[most] - loads[least];
        let better = (0..pairs.len().div_ceil(round))
            .map(|n| (n * round + most, n * round + least))
            .filter(|&(a, b)| a.max(b) < pairs.len())
            .map(|(a, b)| (pairs[a].work().saturating_sub(pairs[b].work()), a, b))
            .filter(|&(less, ..)| less > 0 && less < gap)
            .min_by_key(|&(less, a, _)| (gap.abs_diff(2 * less), a));
        let Some((less, a, b)) = better else { return };
        pairs.swap(a, b);
        loads[most] -= less;
        loads[least] += less;
    }
}

/// Cost of each tile of `tile_rows` of the `rows` query rows whose blocks keep so many key blocks: the mean over its rows, those of a
/// block that is not there cost nothing.
fn tile_costs(kept: &[u32], rows: u32, tile_rows: u32) -> Vec<u32> {
    let cost = |tile: u32| {
        let (start, end) = (tile * tile_rows, (tile + 1) * tile_rows);
        let of_block = |(block, &kept): (u32, &u32)| {
            let rows = end.min((block + 1) * BLOCK) - start.max(block * BLOCK);
            u64::from(rows) * u64::from(kept)
        };
        let blocks = (start / BLOCK..end.div_ceil(BLOCK)).zip(kept.iter().skip((start / BLOCK) as usize));
        blocks.map(of_block).sum::<u64>().div_ceil(tile_rows.into()) as u32
    };
    (0..rows.div_ceil(tile_rows)).map(cost).collect()
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
    use calibc_ir::{HEAD_DIMS, Layout, MAX_TOKENS, Model, TextPosition};
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
    fn a_tile_costs_what_its_rows_cost_on_average() {
        let costs = |kept: &[u32], rows| tile_costs(kept, rows, abi::tile_rows(64));
        // Two thirds of the first block and one of the second, then the other way round.
        assert_eq!(costs(&[30, 60, 3], 384), [40, 22]);
        // Rounded up: a tile that keeps anything costs something.
        assert_eq!(costs(&[1, 0, 0], 300), [1, 0]);
        // Half of the first tile's second block is not there; the second tile of 385 rows has a strip of one block.
        assert_eq!(costs(&[30], 128), [20]);
        assert_eq!(costs(&[30, 60], 129), [40]);
        assert_eq!(costs(&[30, 60, 3, 9], 385), [40, 22, 6]);
        // A whole head costs what its blocks do.
        assert_eq!(costs(&[9; 6], 6 * BLOCK), [9; 4]);
        assert_eq!(tile_costs(&[4, 7, 1], 300, abi::tile_rows(128)), [4, 7, 1]);
    }

    #[test]
    fn tiles_fit_16_bits() {
        assert!(HEAD_DIMS.iter().all(|&head_dim| MAX_TOKENS.div_ceil(abi::tile_rows(head_dim)) <= 1 << 16));
    }

    #[test]
    fn long_pairs_run_first_within_what_l2_holds() {
        let model = Model { name: "t".into(), layers: 1, heads: 2, head_dim: 128 };
        let mut plan = Plan::dense(model, Geometry::video(1, 4, 128), vec![1.0]);
        let rows = |costs: [u32; 4]| BlockMask::from_fn(4, 4, |r, c| c < costs[r as usize]);
        for (head, costs) in [[1, 2, 3, 4], [4, 3, 3, 1]].into_iter().enumerate() {
            plan.ops[head] = AttnOp::BlockSparse { mask: plan.masks.intern(rows(costs)) };
        }
        let items = |l2_bytes| {
            let target = Target { l2_bytes, running_tiles: 1, ..Target::default() };
            let pairs = Order::new(&plan, &target).in_order(&plan.ops);
            pairs.into_iter().flat_map(Pair::tiles).map(|(i, _)| (i.head().0, i.tile())).collect::<Vec<_>>()
        };
        // Both heads fit: one longest-first order. Only one fits: the costly head first, longest-first inside.
        let head_bytes = 4 * 512 * 128;
        assert_eq!(items(2 * head_bytes), [(1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (0, 0), (0, 1)]);
        assert_eq!(items(2 * head_bytes - 1), [(1, 0), (1, 1), (1, 2), (1, 3), (0, 2), (0, 3), (0, 0), (0, 1)]);
        // None fits: in the order of the sequence.
        assert_eq!(items(head_bytes - 1), [(1, 0), (1, 1), (1, 2), (1, 3), (0, 0), (0, 1), (0, 2), (0, 3)]);
    }

    #[test]
    fn tiles_without_a_neighbour_of_their_head_pair_up() {
        let model = Model { name: "t".into(), layers: 1, heads: 3, head_dim: 128 };
        let plan = Plan::dense(model, Geometry::video(1, 3, 128), vec![1.0]);
        let list = schedule(&plan, &Target { running_tiles: 100, ..Target::default() }).items;
        let places: Vec<_> = list.iter().map(|i| (i.head().0, i.tile())).collect();
        // Of the first two heads the last tile each; that of the third is alone, at the end.
        assert_eq!(places, [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]);
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
    fn imbalance(pairs: &[Pair], ctas: usize) -> f64 {
        let tiles: Vec<Tile> = pairs.iter().copied().flat_map(Pair::tiles).collect();
        let loads: Vec<u64> = (0..ctas)
            .map(|cta| tiles.iter().skip(cta).step_by(ctas).map(|&(_, cost)| u64::from(cost) + ITEM_COST).sum())
            .collect();
        let mean = loads.iter().sum::<u64>() as f64 / ctas as f64;
        *loads.iter().max().unwrap() as f64 / mean - 1.0
    }

    #[test]
    fn persistent_ctas_get_even_shares() {
        let (short, long) = (Geometry::video(21, 30, 52), Geometry::video(21, 45, 80));
        let (alike, apart) = ([134, 134], [40, 240]);
        for (heads, geometry, widths, limit) in [
            (40, short, alike, 0.001),
            (40, short, apart, 0.001),
            (12, short, alike, 0.004),
            (12, short, apart, 0.004),
            (10, long, apart, 0.002),
        ] {
            let plan = banded(heads, geometry, widths);
            let target = Target::default();
            let order = Order::new(&plan, &target);
            let mut pairs = order.in_order(&plan.ops);
            let ctas = target.running_tiles as usize;
            let before = imbalance(&pairs, ctas);
            even_out(&mut pairs, ctas / 2);
            let after = imbalance(&pairs, ctas);
            let case = format!("{heads} x {}, {widths:?}: {before:.4}, {after:.4}", geometry.num_q_blocks());
            assert!(before > 2.0 * limit, "uneven as it was: {case}");
            assert!(after < limit, "{case}");
            // The list is this order, every time.
            let items: Vec<_> = pairs.into_iter().flat_map(Pair::tiles).map(|(item, _)| item).collect();
            let lists = schedule(&plan, &target);
            assert_eq!(lists.items, items, "{case}");
            assert_eq!(lists, schedule(&plan, &target), "{case}");
        }
    }

    /// Pairs of tiles of these costs, numbered in order.
    fn numbered(costs: &[[u32; 2]]) -> Vec<Pair> {
        let pair = |(i, &[a, b]): (u32, &[u32; 2])| Pair {
            first: (WorkItem(2 * i), a),
            second: Some((WorkItem(2 * i + 1), b)),
        };
        (0..).zip(costs).map(pair).collect()
    }

    fn evened(costs: &[[u32; 2]], round: usize) -> Vec<u32> {
        let mut pairs = numbered(costs);
        even_out(&mut pairs, round);
        pairs.into_iter().flat_map(Pair::tiles).map(|(WorkItem(i), _)| i).collect()
    }

    #[test]
    fn the_costliest_pair_of_a_round_goes_to_the_least_load() {
        let twice = |costs: &[u32]| costs.iter().map(|&cost| [cost; 2]).collect::<Vec<_>>();
        let firsts = |costs: &[u32], round| {
            evened(&twice(costs), round).into_iter().step_by(2).map(|i| i / 2).collect::<Vec<_>>()
        };
        // Loads 10, 6, 6 after the first round; equal loads take the lower place first, equal pairs the earlier.
        assert_eq!(firsts(&[5, 9, 5, 3, 7, 7], 3), [1, 0, 2, 3, 4, 5]);
        // The short round comes first: loads 7, 5, 0.
        assert_eq!(firsts(&[9, 1, 1, 4, 6], 3), [2, 1, 0, 4, 3]);
        // Nothing to even out: one round, or all alike.
        assert_eq!(firsts(&[1, 2, 3], 3), [0, 1, 2]);
        assert_eq!(firsts(&[1, 2, 3], 4), [0, 1, 2]);
        assert_eq!(firsts(&[], 3), [0; 0]);
        assert_eq!(firsts(&[4; 9], 3), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        // Sides: the pair that differs most comes first, then the other one evens it out.
        assert_eq!(evened(&[[5, 3], [6, 2]], 1), [0, 1, 3, 2]);
    }

    #[test]
    fn a_tile_alone_stays_last() {
        for count in 1..12 {
            let mut pairs = numbered(&vec![[3, 4]; count]);
            pairs[count - 1].second = None;
            even_out(&mut pairs, 4);
            assert_eq!(pairs.iter().position(|pair| pair.second.is_none()), Some(count - 1), "{count}");
        }
    }

    proptest! {
        #[test]
        fn rounds_keep_their_pairs((costs, round) in (prop::collection::vec([0..20_u32, 0..20_u32], 0..200), 1..40_usize)) {
            let got = evened(&costs, round);
            prop_assert_eq!(&got, &evened(&costs, round));
            for (start, got) in (0..).step_by(2 * round).zip(got.chunks(2 * round)) {
                // Tiles of a pair stay together.
                prop_assert!(got.chunks(2).all(|pair| pair[0] / 2 == pair[1] / 2));
                let mut got = got.to_vec();
                got.sort_unstable();
                prop_assert_eq!(&got, &(start..start + got.len() as u32).collect::<Vec<_>>());
            }
        }

        #[test]
        fn exchanges_even_out(costs in prop::collection::vec([0..20_u32, 0..20_u32], 0..200), round in 1..40_usize) {
            let mut pairs = numbered(&costs);
            let mut loads = vec![0; round];
            deal(&mut pairs, &mut loads);
            let sums = |pairs: &[Pair]| {
                let mut sums = vec![0; round];
                pairs.iter().enumerate().for_each(|(i, pair)| sums[i % round] += pair.work());
                sums
            };
            prop_assert_eq!(&loads, &sums(&pairs));
            let dealt = loads.clone();
            exchange(&mut pairs, &mut loads);
            prop_assert_eq!(&loads, &sums(&pairs));
            prop_assert!(loads.iter().max() <= dealt.iter().max() && loads.iter().min() >= dealt.iter().min());
        }

        #[test]
        fn every_pair_is_dealt_to_the_least_load_left(costs in prop::collection::vec([0..20_u32, 0..20_u32], 0..200), round in 1..40_usize) {
            // One pair at a time, looking at every place.
            let mut loads = vec![0_u64; round];
            let mut want = Vec::new();
            let all = numbered(&costs);
            let (whole, short) = all.split_at(costs.len() / round * round);
            for pairs in std::iter::once(short).chain(whole.chunks(round)) {
                let mut places = vec![None; pairs.len()];
                let mut left = pairs.to_vec();
                while !left.is_empty() {
                    let next = (0..left.len()).min_by_key(|&i| (std::cmp::Reverse(left[i].work()), i)).unwrap();
                    let place = (0..places.len()).filter(|&p| places[p].is_none()).min_by_key(|&p| (loads[p], p)).unwrap();
                    let pair = left.remove(next);
                    loads[place] += pair.work();
                    places[place] = Some(pair);
                }
                want.extend(places.into_iter().flatten());
            }
            want.rotate_left(short.len());
            let mut dealt = all;
            deal(&mut dealt, &mut vec![0; round]);
            prop_assert_eq!(dealt, want);
        }
    }
}

//! What a layer has to compute: query-key pairs, to the token.

use std::ops::Range;

use calibc_ir::{AnchorTable, AttnOp, BLOCK, BlockMask, LayerId, Plan, StepId};

/// Query-key pairs of every (step, layer) of a plan, summed over heads, for one batch element and whole sequences.
pub(super) struct Work<'a> {
    plan: &'a Plan,
    /// Pairs of each mask, of a dense head and of an anchor head.
    masks: Vec<u64>,
    dense: u64,
    anchors: u64,
}

impl<'a> Work<'a> {
    pub(super) fn new(plan: &'a Plan) -> Self {
        let [q, kv] = [plan.geometry.q_tokens(), plan.geometry.kv_tokens()];
        let computed =
            plan.anchors().map_or(0, |anchors| AnchorTable::new(&plan.geometry, anchors).queries.len() as u64);
        Self {
            plan,
            masks: plan.masks.iter().map(|(_, mask)| mask_pairs(mask, q, kv)).collect(),
            dense: u64::from(q) * u64::from(kv),
            anchors: computed * u64::from(kv),
        }
    }

    /// Pairs that the heads of a layer compute.
    pub(super) fn pairs(&self, step: StepId, layer: LayerId) -> u64 {
        let of = |op: &AttnOp| match op {
            AttnOp::Dense => self.dense,
            AttnOp::AnchorRows { .. } => self.anchors,
            AttnOp::BlockSparse { mask } => self.masks[mask.index()],
        };
        self.plan.layer_ops(step, layer).iter().map(of).sum()
    }

    /// Pairs of a layer whose heads are all dense.
    pub(super) fn dense_pairs(&self) -> u64 {
        self.dense * u64::from(self.plan.model.heads)
    }
}

/// Pairs that a mask keeps of `q` queries and `kv` keys: the last block of either may be short.
fn mask_pairs(mask: &BlockMask, q: u32, kv: u32) -> u64 {
    let tokens = |block: u32, all: u32| u64::from(all.saturating_sub(block * BLOCK).min(BLOCK));
    let short = u64::from(BLOCK) - tokens(mask.cols() - 1, kv);
    let keys = |row: u32| {
        let blocks = u64::from(mask.row_count(row)) * u64::from(BLOCK);
        blocks - if mask.get(row, mask.cols() - 1) { short } else { 0 }
    };
    (0..mask.rows()).map(|row| tokens(row, q) * keys(row)).sum()
}

/// Floating-point operations of `pairs`: two multiply-adds per pair and element of a head.
pub(super) fn flops(pairs: u64, head_dim: u32, batch: u32) -> f64 {
    4.0 * pairs as f64 * f64::from(head_dim) * f64::from(batch)
}

/// `count` (step, layer) pairs of those in `steps` x `layers`, at even quantiles of the work they are; in the order of the plan.
pub(super) fn at_quantiles(work: &Work<'_>, steps: &[u32], layers: &[u32], count: usize) -> Vec<(StepId, LayerId)> {
    let all = steps.iter().flat_map(|&step| layers.iter().map(move |&layer| (StepId(step), LayerId(layer))));
    let mut ranked: Vec<(u64, (StepId, LayerId))> = all.map(|(s, l)| (work.pairs(s, l), (s, l))).collect();
    ranked.sort_unstable();
    ranked.dedup();
    let mut chosen: Vec<(StepId, LayerId)> = quantiles(ranked.len(), count).map(|i| ranked[i].1).collect();
    chosen.sort_unstable();
    chosen
}

/// `count` places of `0..n`, ends included, as evenly as can be; the middle if it is one; all if there are no more.
fn quantiles(n: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(n);
    let range: Range<usize> = 0..count;
    range.map(move |i| if count == 1 { (n - 1) / 2 } else { (i * (n - 1) + (count - 1) / 2) / (count - 1) })
}

#[cfg(test)]
mod tests {
    use calibc_ir::{Geometry, Layout, Model, TextPosition, anchor_rows};
    use proptest::prelude::*;

    use super::*;

    fn geometry() -> impl Strategy<Value = Geometry> {
        let text = prop_oneof![
            Just((0, TextPosition::None)),
            (1..200_u32).prop_map(|n| (n, TextPosition::Before)),
            (1..200_u32).prop_map(|n| (n, TextPosition::After)),
        ];
        let layout = prop_oneof![Just(Layout::Raster), Just(Layout::Tile([2, 4, 4]))];
        let grid = (1..4_u32, 1..9_u32, 1..16_u32, text, layout).prop_map(
            |(f, h, w, (text_tokens, text_position), layout)| Geometry {
                text_tokens,
                text_position,
                layout,
                ..Geometry::video(f, h, w)
            },
        );
        prop_oneof![grid, (1..500_u32, 1..500_u32).prop_map(|(q, kv)| Geometry::sequence(q, kv))]
    }

    /// Token by token.
    fn brute_force(plan: &Plan, op: AttnOp) -> u64 {
        let g = &plan.geometry;
        let keys = u64::from(g.kv_tokens());
        match op {
            AttnOp::Dense => (0..g.q_tokens()).map(|_| keys).sum(),
            AttnOp::BlockSparse { mask } => {
                let mask = &plan.masks[mask];
                let kept = |q: u32| (0..g.kv_tokens()).filter(|kv| mask.get(q / BLOCK, kv / BLOCK)).count() as u64;
                (0..g.q_tokens()).map(kept).sum()
            }
            AttnOp::AnchorRows { anchors } => {
                let rows = anchor_rows(g.height, u32::from(anchors));
                let text = g.text_blocks();
                let mut computed: Vec<u32> = (0..g.q_tokens()).filter(|q| text.contains(&(q / BLOCK))).collect();
                for f in 0..g.frames {
                    computed.extend(rows.iter().flat_map(|&y| (0..g.width).map(move |x| g.position(f, y, x))));
                }
                computed.sort_unstable();
                computed.dedup();
                computed.len() as u64 * keys
            }
        }
    }

    proptest! {
        #[test]
        fn pairs_are_those_of_tokens(
            geometry in geometry(), kinds in proptest::collection::vec(0..4_u8, 1..5), bits: u64, anchors in 1..9_u16,
        ) {
            let model = Model { name: "m".into(), layers: 1, heads: kinds.len() as u32, head_dim: 64 };
            let mut plan = Plan::dense(model, geometry, vec![1.0]);
            let (rows, cols) = (geometry.num_q_blocks(), geometry.num_kv_blocks());
            for (head, kind) in (0..).zip(&kinds) {
                plan.ops[head] = match kind {
                    0 => AttnOp::Dense,
                    1 => AttnOp::AnchorRows { anchors: anchors.min(geometry.height as u16) },
                    _ => {
                        let mut state = bits ^ head as u64;
                        let mask = BlockMask::from_fn(rows, cols, |_, _| {
                            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405);
                            state >> 62 != 0
                        });
                        AttnOp::BlockSparse { mask: plan.masks.intern(mask) }
                    }
                };
            }
            let work = Work::new(&plan);
            let want: u64 = plan.ops.iter().map(|&op| brute_force(&plan, op)).sum();
            prop_assert_eq!(work.pairs(StepId(0), LayerId(0)), want);
            prop_assert_eq!(work.dense_pairs(), kinds.len() as u64 * brute_force(&plan, AttnOp::Dense));
            prop_assert_eq!(flops(want, 64, 3), (want * 4 * 64 * 3) as f64);
        }

        #[test]
        fn quantiles_are_even_and_reach_both_ends(n in 1..200_usize, count in 1..50_usize) {
            let places: Vec<usize> = quantiles(n, count).collect();
            prop_assert_eq!(places.len(), n.min(count));
            prop_assert!(places.windows(2).all(|pair| pair[0] < pair[1]) && *places.last().unwrap() < n, "{:?}", places);
            if places.len() > 1 {
                prop_assert_eq!((places[0], *places.last().unwrap()), (0, n - 1));
                let gaps: Vec<usize> = places.windows(2).map(|pair| pair[1] - pair[0]).collect();
                prop_assert!(gaps.iter().max().unwrap() - gaps.iter().min().unwrap() <= 1, "{:?}", places);
            }
        }
    }

    #[test]
    fn layers_are_chosen_by_the_work_they_are() {
        let model = Model { name: "m".into(), layers: 3, heads: 1, head_dim: 64 };
        let mut plan = Plan::dense(model, Geometry::sequence(1280, 1280), vec![1.0, 0.5]);
        for (op, kept) in plan.ops.iter_mut().zip([5, 1, 9, 3, 7, 1]) {
            let mask = plan.masks.intern(BlockMask::from_fn(10, 10, |_, c| c < kept));
            *op = AttnOp::BlockSparse { mask };
        }
        let work = Work::new(&plan);
        let chosen = |steps: &[u32], layers: &[u32], count| -> Vec<(u32, u32)> {
            at_quantiles(&work, steps, layers, count).into_iter().map(|(s, l)| (s.0, l.0)).collect()
        };
        // Work 5, 1, 9 and 3, 7, 1: the least, the middle and the most, in the order of the plan.
        assert_eq!(chosen(&[0, 1], &[0, 1, 2], 3), [(0, 0), (0, 1), (0, 2)]);
        assert_eq!(chosen(&[1], &[0, 1, 2], 1), [(1, 0)]);
        assert_eq!(chosen(&[1], &[0, 1, 2], 9), [(1, 0), (1, 1), (1, 2)]);
        assert_eq!(chosen(&[1, 0, 1], &[2], 9), [(0, 2), (1, 2)]);
    }
}

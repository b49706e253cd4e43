//! share: masks that differ little become one, across steps first, then across the heads of a layer.
//!
//! Equal masks are one already: masks are interned. Beyond that the paper shares the masks of later steps whose
//! intersection over union reaches tau = 0.97 and ORs them (CalibAtt, table S1); here the bound is what a merge costs, the
//! extra density at a site, because that is what the user pays.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use calibc_ir::{AttnOp, BlockMask, MaskId, Plan};
use petgraph::stable_graph::{NodeIndex, StableUnGraph};
use petgraph::visit::{EdgeRef, IntoEdgeReferences};
use rayon::prelude::*;

use super::{intern, take_masks};
use crate::error::OptError;
use crate::hooks::Watch;
use crate::pipeline::{Context, Outcome, Pass, ShareLimits};

/// Merges masks within [`ShareLimits`]. With the default limits nothing but equal masks would be merged, and those are.
pub(crate) struct Share {
    pub(crate) limits: ShareLimits,
}

impl Pass for Share {
    fn name(&self) -> &'static str {
        "share"
    }

    fn run(&self, plan: &mut Plan, cx: &Context<'_>) -> Result<Outcome, OptError> {
        let blocks = f64::from(plan.geometry.num_q_blocks()) * f64::from(plan.geometry.num_kv_blocks());
        let limit = self.limits.max_extra_density;
        if limit.is_nan() || limit < 0.0 {
            let (field, expected) = ("max_extra_density", "at least 0");
            return Err(OptError::Policy { field, value: limit, expected });
        }
        // Blocks a site may gain. Different masks cost at least one block to merge.
        let limit = (limit.min(1.0) * blocks).floor() as u64;
        let before = plan.masks.len();
        if limit == 0 || before < 2 {
            return Ok(Outcome::default());
        }
        let masks = take_masks(plan);
        let mut clusters: Vec<Cluster> = masks.into_iter().map(Cluster::new).collect();
        let mut remarks = Vec::new();
        for (along, candidates) in [("steps", along_steps as fn(&Plan) -> _), ("heads", along_heads)] {
            let count = clusters.len();
            clusters = merge(plan, clusters, candidates(plan), limit, cx.watch)?;
            remarks.push(format!("{} masks merged along {along}", count - clusters.len()));
        }
        intern(plan, clusters.into_iter().map(|cluster| cluster.mask).collect());
        Ok(Outcome { changed: plan.masks.len() != before, remarks, ..Outcome::default() })
    }
}

/// A node of the merge graph: the masks merged so far.
struct Cluster {
    /// Keeps what any of them keeps: no recall is lost.
    mask: BlockMask,
    /// Blocks the smallest of them keeps: the site that pays most.
    least: u64,
}

impl Cluster {
    fn new(mask: BlockMask) -> Self {
        Self { least: mask.count(), mask }
    }

    /// Blocks the worst-off site would gain by a merge, if at most `limit`. A merge never makes a later one cheaper.
    fn extra(&self, other: &Self, limit: u64) -> Option<u64> {
        let most = self.least.min(other.least) + limit;
        let rows = self.mask.words().chunks(256).zip(other.mask.words().chunks(256));
        let mut union = 0;
        for (a, b) in rows {
            union += a.iter().zip(b).map(|(a, b)| u64::from((a | b).count_ones())).sum::<u64>();
            if union > most {
                return None;
            }
        }
        Some(union - self.least.min(other.least))
    }
}

type Pairs = BTreeSet<(MaskId, MaskId)>;

fn note(pairs: &mut Pairs, a: MaskId, b: MaskId) {
    if a != b {
        pairs.insert((a.min(b), a.max(b)));
    }
}

fn mask_of(op: AttnOp) -> Option<MaskId> {
    if let AttnOp::BlockSparse { mask } = op { Some(mask) } else { None }
}

/// Masks that follow one another at the same layer and head; longer runs grow by merging neighbours.
fn along_steps(plan: &Plan) -> Pairs {
    let sites = (plan.model.layers * plan.model.heads) as usize;
    let mut pairs = Pairs::new();
    for site in 0..sites {
        let masks: Vec<_> = plan.ops.iter().skip(site).step_by(sites).copied().filter_map(mask_of).collect();
        masks.windows(2).for_each(|pair| note(&mut pairs, pair[0], pair[1]));
    }
    pairs
}

/// Masks of the heads of one layer at one step.
fn along_heads(plan: &Plan) -> Pairs {
    let mut pairs = Pairs::new();
    for ops in plan.ops.chunks(plan.model.heads as usize) {
        let masks: BTreeSet<_> = ops.iter().copied().filter_map(mask_of).collect();
        for &a in &masks {
            masks.range(a..).for_each(|&b| note(&mut pairs, a, b));
        }
    }
    pairs
}

/// Merges candidates, cheapest first (ties by id), until none is within the limit. The ops of `plan` refer to the clusters by
/// index, before and after.
fn merge(
    plan: &mut Plan,
    clusters: Vec<Cluster>,
    candidates: Pairs,
    limit: u64,
    watch: Watch<'_>,
) -> Result<Vec<Cluster>, OptError> {
    // Node indices are mask ids: a stable graph hands them out in order and keeps them when nodes go.
    let node = |id: MaskId| NodeIndex::<u32>::from(id.0);
    let candidates: Vec<(MaskId, MaskId)> = candidates.into_iter().collect();
    let work = watch.work("share", candidates.len() as u64);
    let costs =
        work.map(candidates.par_iter(), |&(a, b)| Ok(clusters[a.index()].extra(&clusters[b.index()], limit)))?;
    let mut graph = StableUnGraph::<Cluster, u64>::with_capacity(clusters.len(), candidates.len());
    let nodes = clusters.len();
    for cluster in clusters {
        graph.add_node(cluster);
    }
    for ((a, b), cost) in candidates.into_iter().zip(costs) {
        cost.map(|cost| graph.add_edge(node(a), node(b), cost));
    }
    // Stale entries are left in the queue; they are known by an edge that is gone or costs something else.
    let mut queue: BinaryHeap<_> =
        graph.edge_references().map(|e| Reverse((*e.weight(), e.source(), e.target()))).collect();
    let mut merged_into: Vec<Option<NodeIndex>> = vec![None; nodes];
    while let Some(Reverse((cost, kept, gone))) = queue.pop() {
        watch.check()?;
        if graph.find_edge(kept, gone).is_none_or(|edge| graph[edge] != cost) {
            continue;
        }
        let around: BTreeSet<NodeIndex> =
            graph.neighbors(kept).chain(graph.neighbors(gone)).filter(|&n| n != kept && n != gone).collect();
        let Some(absorbed) = graph.remove_node(gone) else { continue };
        merged_into[gone.index()] = Some(kept);
        let cluster = &mut graph[kept];
        cluster.mask.union_with(&absorbed.mask);
        cluster.least = cluster.least.min(absorbed.least);
        for other in around {
            let (a, b) = (kept.min(other), kept.max(other));
            match graph[a].extra(&graph[b], limit) {
                Some(cost) => {
                    graph.update_edge(a, b, cost);
                    queue.push(Reverse((cost, a, b)));
                }
                None => {
                    graph.find_edge(a, b).map(|edge| graph.remove_edge(edge));
                }
            }
        }
    }
    // A cluster's survivor is its lowest id, so one ascending walk settles every chain.
    let mut left = Vec::new();
    let mut index: Vec<MaskId> = Vec::with_capacity(nodes);
    for (i, into) in merged_into.into_iter().enumerate() {
        let id = match into {
            Some(survivor) => index[survivor.index()],
            None => super::entry(left.len()),
        };
        index.push(id);
        left.extend(graph.remove_node(NodeIndex::new(i)));
    }
    for op in &mut plan.ops {
        if let AttnOp::BlockSparse { mask } = op {
            *mask = index[mask.index()];
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(rows: &[&[u32]]) -> BlockMask {
        BlockMask::from_fn(rows.len() as u32, 40, |r, c| rows[r as usize].contains(&c))
    }

    #[test]
    fn the_cost_is_what_the_smaller_mask_gains() {
        let (a, b) = (Cluster::new(mask(&[&[0, 1], &[39]])), Cluster::new(mask(&[&[1, 2, 3, 4], &[39]])));
        assert_eq!(a.extra(&b, 3), Some(3));
        assert_eq!(b.extra(&a, 3), Some(3));
        assert_eq!(a.extra(&b, 2), None);
        let big = |keep: fn(u32) -> bool| Cluster::new(BlockMask::from_fn(300, 300, |_, c| keep(c)));
        let (even, all) = (big(|c| c % 2 == 0), big(|_| true));
        assert_eq!(even.extra(&all, 300 * 150), Some(300 * 150));
        assert_eq!(even.extra(&all, 300 * 150 - 1), None);
    }
}

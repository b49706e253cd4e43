//! What each block of a site is worth: weights, importances and floors, for the policy `budget` and for the predicted loss.
//!
//! A row of blocks that keeps the share `m` of its energy loses
//!
//! ```text
//! dropped * kept / ((dropped + kept) * m^2)        of the importances that it drops and keeps
//! ```
//!
//! of its output, squared. Few blocks add up: their errors are taken as independent. Dropping more raises the weight of what stays,
//! and all errors with it, by 1/m; and as the errors of all blocks of a row cancel, those of the last ones are those of the first
//! again, with another sign. (Of `n` blocks of equal mass and random values, `s` dropped: s/n / (1 - s/n) times the sum of all importances,
//! which is what the mean of a sample is off by.)
//!
//! Blocks of a row are dropped in the order of their importances, least first. What a block is worth is what dropping it adds to the
//! loss, evened out so that it never falls along the row: one price then decides for every block which of them are dropped, and what they are
//! worth adds up to the loss.
//!
//! All arithmetic is `f64` in a fixed order, and part of the result: over the prompts from 0.0 in their order, then one division;
//! sums over a row from 0.0 in the order of columns, or of dropping. A score is `((w * u) / largest) * worth`, rounded to `f32`. Scores order
//! like their bits, so that a threshold is an integer.

use calibc_ir::{BlockMask, Geometry, Plan, Site};

use crate::calibration::{Evidence, Shape, Split, shape_of};
use crate::error::OptError;
use crate::passes::protect::protect_text;
use crate::policy::{Budget, HeadWeights, Importance, OverPrompts, StepWeights};

/// What was weighed with, after fallbacks.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighed {
    /// What blocks are worth.
    pub importance: Importance,
    /// What steps weigh.
    pub step_weights: StepWeights,
    /// What heads weigh.
    pub head_weights: HeadWeights,
    /// The weight of each step.
    pub steps: Vec<f64>,
}

/// A replacement for evidence that is not there.
struct Lack {
    what: String,
    instead: String,
    cure: &'static str,
}

/// Collects what evidence lacks: a warning each, or the error.
pub(crate) struct Lacks {
    allowed: bool,
    pub(crate) warnings: Vec<String>,
}

impl Lacks {
    fn note(&mut self, lack: Lack) -> Result<(), OptError> {
        let Lack { what, instead, cure } = lack;
        if !self.allowed {
            return Err(OptError::Missing { problem: what, cure });
        }
        self.warnings.push(format!("{what}: {instead}; {cure}"));
        Ok(())
    }

    /// No site knows the error of `anchors` anchor rows.
    pub(crate) fn no_anchor_errors(&mut self, anchors: u16) -> Result<(), OptError> {
        self.note(Lack {
            what: format!("the traces record no output error for {anchors} anchor rows"),
            instead: "every head gets a mask".to_owned(),
            cure: "capture with that number of anchor rows, or set `anchors: off`",
        })
    }
}

/// The scores of sites.
pub(crate) struct Scoring {
    pub(crate) weighed: Weighed,
    /// By site; empty: 1 each.
    heads: Vec<f64>,
    /// The largest `w * u` of the plan, times the most that a row's loss can grow by: scores are relative to it, and so never leave
    /// the range of keys.
    pub(crate) largest: f64,
    pub(crate) over_prompts: OverPrompts,
    row_recall: f64,
    geometry: Geometry,
    shape: Shape,
    sites: (usize, usize),
}

/// What is known of one site's blocks, over one or several prompts: `[q_blocks, kv_blocks]` each.
pub(crate) struct SiteScores {
    energy: Vec<f64>,
    importance: Vec<f64>,
}

/// A row keeps at least this share of its energy as far as losses go: nothing is known of rows that keep less.
const LEAST_KEPT: f64 = 1.0 / 64.0;

/// The loss of a row that keeps the share `mass` of its energy, of the importances it drops and keeps.
fn row_loss(dropped: f64, kept: f64, mass: f64) -> f64 {
    let all = dropped + kept;
    if all > 0.0 {
        let mass = mass.max(LEAST_KEPT);
        dropped * kept / all / (mass * mass)
    } else {
        0.0
    }
}

impl SiteScores {
    /// What a mask loses, in the unit of importances: the sum over its rows.
    pub(crate) fn loss(&self, mask: &BlockMask) -> f64 {
        let cols = mask.cols() as usize;
        let rows = self.energy.chunks_exact(cols).zip(self.importance.chunks_exact(cols));
        let of_row = |(r, (energy, importance)): (u32, (&[f64], &[f64]))| {
            let (mut dropped, mut kept, mut gone, mut stays) = (0.0, 0.0, 0.0, 0.0);
            for (c, (energy, importance)) in (0..).zip(energy.iter().zip(importance)) {
                let (worth, mass) = if mask.get(r, c) { (&mut kept, &mut stays) } else { (&mut dropped, &mut gone) };
                *worth += importance;
                *mass += energy;
            }
            row_loss(dropped, kept, share_of(stays, gone + stays))
        };
        (0..).zip(rows).map(of_row).sum()
    }

    /// What every block is worth beside those of `forced`, which stay, and which are worth nothing here.
    pub(crate) fn worth(&self, forced: &BlockMask) -> Vec<f64> {
        let cols = forced.cols() as usize;
        let mut worth = vec![0.0; self.energy.len()];
        let mut row = Row::default();
        let rows = self.energy.chunks_exact(cols).zip(self.importance.chunks_exact(cols));
        for (r, ((energy, importance), worth)) in (0..).zip(rows.zip(worth.chunks_exact_mut(cols))) {
            row.order.clear();
            row.order.extend((0..cols as u16).filter(|&c| !forced.get(r, c.into())));
            row.fill(energy, importance, worth);
        }
        worth
    }
}

/// `part` of `all`; everything where there is nothing.
fn share_of(part: f64, all: f64) -> f64 {
    if all > 0.0 { part / all } else { 1.0 }
}

/// The work of [`SiteScores::worth`] on one row; it is kept for its memory.
#[derive(Default)]
struct Row {
    /// The columns that may be dropped.
    order: Vec<u16>,
    /// The lower convex hull of losses over numbers of blocks dropped.
    hull: Vec<(usize, f64)>,
}

impl Row {
    fn fill(&mut self, energy: &[f64], importance: &[f64], worth: &mut [f64]) {
        let Self { order, hull } = self;
        let all: f64 = importance.iter().fold(0.0, |sum, value| sum + value);
        let mass: f64 = energy.iter().fold(0.0, |sum, value| sum + value);
        // Least first, of equal ones the first.
        order.sort_unstable_by(|&a, &b| {
            importance[usize::from(a)].total_cmp(&importance[usize::from(b)]).then(a.cmp(&b))
        });
        hull.clear();
        hull.push((0, 0.0));
        let (mut dropped, mut gone) = (0.0, 0.0);
        for (count, &column) in (1..).zip(order.iter()) {
            dropped += importance[usize::from(column)];
            gone += energy[usize::from(column)];
            let loss = row_loss(dropped, (all - dropped).max(0.0), share_of(mass - gone, mass));
            // What lies above the line from its neighbours goes.
            while let [.., (before, low), (last, high)] = hull[..]
                && (high - low) * (count - last) as f64 >= (loss - high) * (last - before) as f64
            {
                hull.pop();
            }
            hull.push((count, loss));
        }
        for pair in hull.windows(2) {
            let ((from, low), (to, high)) = (pair[0], pair[1]);
            let each = ((high - low) / (to - from) as f64).max(0.0);
            order[from..to].iter().for_each(|&column| worth[usize::from(column)] = each);
        }
    }
}

/// Blocks that rows keep whatever they are worth, text blocks left out: columns by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Floor {
    ends: Vec<u32>,
    columns: Vec<u16>,
}

impl Scoring {
    /// The scores that `budget` wants, or what the evidence allows of them.
    pub(crate) fn new(budget: &Budget, plan: &Plan, evidence: &dyn Evidence) -> Result<(Self, Lacks), OptError> {
        let mut lacks = Lacks { allowed: budget.fallbacks, warnings: Vec::new() };
        let (mut importance, mut step_weights, mut head_weights) =
            (budget.importance, budget.step_weights, budget.head_weights);
        if importance == Importance::Deviation && !evidence.has_deviations() {
            lacks.note(Lack {
                what: "the traces have no deviations (`block_deviation`)".to_owned(),
                instead:
                    "squared energies stand for them, which say how much attention a block gets, not what it changes"
                        .to_owned(),
                cure: "capture with deviations",
            })?;
            importance = Importance::Energy;
        }
        let measured = evidence.weights();
        let (by_step, by_head) = (step_weights == StepWeights::Sensitivity, head_weights != HeadWeights::Uniform);
        if measured.is_none() && (by_step || by_head) {
            let steps =
                by_step.then_some("step weights are assumed to fall to a tenth from the first step to the last");
            let heads = by_head.then_some("all heads weigh the same");
            lacks.note(Lack {
                what: "the traces have no sensitivities".to_owned(),
                instead: steps.into_iter().chain(heads).collect::<Vec<_>>().join(", "),
                cure: "measure them with `calibc.sensitivity`",
            })?;
            step_weights = if by_step { StepWeights::Default } else { step_weights };
            head_weights = HeadWeights::Uniform;
        }
        let num_steps = plan.num_steps();
        let expected = (num_steps as usize, plan.ops.len());
        if let Some(found) = measured.map(|m| (m.step.len(), m.head.len())).filter(|&found| found != expected) {
            return Err(OptError::SensitivityShape { expected, found });
        }
        let steps: Vec<f64> = match (step_weights, measured) {
            (StepWeights::Sensitivity, Some(measured)) => measured.step.iter().map(|&w| f64::from(w)).collect(),
            (StepWeights::Default, _) => (0..num_steps).map(|t| StepWeights::assumed(t, num_steps)).collect(),
            _ => vec![1.0; num_steps as usize],
        };
        let heads: Vec<f64> = match (head_weights, measured) {
            (HeadWeights::Sensitivity, Some(measured)) => measured.head.iter().map(|&u| f64::from(u)).collect(),
            (HeadWeights::Tempered, Some(measured)) => measured.head.iter().map(|&u| f64::from(u).sqrt()).collect(),
            _ => Vec::new(),
        };
        let mut scoring = Self {
            weighed: Weighed { importance, step_weights, head_weights, steps },
            heads,
            largest: 1.0,
            over_prompts: budget.over_prompts,
            row_recall: budget.row_recall,
            geometry: plan.geometry,
            shape: shape_of(plan),
            sites: (plan.model.layers as usize, plan.model.heads as usize),
        };
        scoring.largest = plan.sites().map(|site| scoring.weight(site)).fold(0.0, f64::max) / (LEAST_KEPT * LEAST_KEPT);
        if scoring.largest > 0.0 { Ok((scoring, lacks)) } else { Err(OptError::NoWeight) }
    }

    /// `w * u` of a site, `u` as `head_weights` says.
    pub(crate) fn weight(&self, site: Site) -> f64 {
        let index = (site.step.index() * self.sites.0 + site.layer.index()) * self.sites.1 + site.head.index();
        self.weighed.steps[site.step.index()] * self.heads.get(index).copied().unwrap_or(1.0)
    }

    /// The weight of a site as a share of the largest.
    pub(crate) fn relative(&self, site: Site) -> f64 {
        self.weight(site) / self.largest
    }

    /// The importances at `source`, the covered step of a site, of one prompt.
    fn importance_of(
        &self,
        evidence: &dyn Evidence,
        split: Split,
        prompt: usize,
        source: Site,
    ) -> Result<Vec<f64>, OptError> {
        Ok(match self.weighed.importance {
            Importance::Deviation => evidence.deviation_of(split, prompt, source, self.shape)?.values,
            Importance::Energy => {
                let mut energy = evidence.energy_of(split, prompt, source, self.shape)?.values;
                energy.iter_mut().for_each(|e| *e *= *e);
                energy
            }
        })
    }

    /// What is known at `source`, the covered step of a site, of one prompt.
    pub(crate) fn site_of(
        &self,
        evidence: &dyn Evidence,
        split: Split,
        prompt: usize,
        source: Site,
    ) -> Result<SiteScores, OptError> {
        let energy = evidence.energy_of(split, prompt, source, self.shape)?.values;
        Ok(SiteScores { energy, importance: self.importance_of(evidence, split, prompt, source)? })
    }

    /// What is known at `source`, the covered step of a site, over the calibration prompts.
    pub(crate) fn site(&self, evidence: &dyn Evidence, source: Site) -> Result<SiteScores, OptError> {
        let prompts = evidence.prompts(Split::Calibration);
        let (mut energy, mut importance) = (vec![0.0; self.blocks()], vec![0.0; self.blocks()]);
        for prompt in 0..prompts {
            let of_prompt = self.site_of(evidence, Split::Calibration, prompt, source)?;
            fold(OverPrompts::Mean, &mut energy, &of_prompt.energy);
            fold(self.over_prompts, &mut importance, &of_prompt.importance);
        }
        Ok(SiteScores {
            energy: finish(OverPrompts::Mean, energy, prompts),
            importance: finish(self.over_prompts, importance, prompts),
        })
    }

    /// [`Scoring::site`] without each calibration prompt in turn; there are at least two.
    pub(crate) fn without_each(&self, evidence: &dyn Evidence, source: Site) -> Result<Vec<SiteScores>, OptError> {
        let prompts = evidence.prompts(Split::Calibration);
        let (mut energies, mut importances) = (Vec::new(), Vec::new());
        for prompt in 0..prompts {
            let of_prompt = self.site_of(evidence, Split::Calibration, prompt, source)?;
            energies.push(of_prompt.energy);
            importances.push(of_prompt.importance);
        }
        let energies = others(OverPrompts::Mean, energies);
        let importances = others(self.over_prompts, importances);
        Ok(energies
            .into_iter()
            .zip(importances)
            .map(|(energy, importance)| SiteScores { energy, importance })
            .collect())
    }

    /// Squared relative error of a site at `anchors` anchor rows; `None` where it was not recorded.
    pub(crate) fn anchor_importance(
        &self,
        evidence: &dyn Evidence,
        source: Site,
        anchors: u16,
    ) -> Result<Option<f64>, OptError> {
        let Some(errors) = evidence.copy_errors(source, anchors)? else { return Ok(None) };
        let mut all = [0.0];
        errors.iter().for_each(|error| fold(self.over_prompts, &mut all, &[error * error]));
        let [mean] = all;
        Ok(Some(match self.over_prompts {
            OverPrompts::Mean => mean / errors.len() as f64,
            OverPrompts::Max => mean,
        }))
    }

    /// Row by row, strongest first (ties: the lower index), the fewest blocks that reach the recall floor, and at least one.
    pub(crate) fn floor(&self, SiteScores { energy, .. }: &SiteScores) -> Floor {
        let (rows, cols) = (self.shape.0 as usize, self.shape.1 as usize);
        let mut floor = Floor { ends: Vec::with_capacity(rows), columns: Vec::with_capacity(rows) };
        let mut order: Vec<u16> = Vec::with_capacity(cols);
        for row in energy.chunks_exact(cols) {
            let start = floor.columns.len();
            if self.row_recall > 0.0 {
                order.clear();
                order.extend(0..cols as u16);
                let rank = |a: &u16, b: &u16| row[usize::from(*b)].total_cmp(&row[usize::from(*a)]).then(a.cmp(b));
                let (mut ranked, mut reached, mut next) = (0, 0.0, 0);
                // The first block is taken at a level of 0, below any floor. A few suffice mostly: ranks are settled as they are
                // needed, a stretch at a time.
                while reached < self.row_recall && next < cols {
                    if next == ranked {
                        ranked = cols.min(4 * ranked + 16);
                        if ranked < cols {
                            order[next..].select_nth_unstable_by(ranked - next, rank);
                        }
                        order[next..ranked].sort_unstable_by(rank);
                    }
                    floor.columns.push(order[next]);
                    reached += row[usize::from(order[next])];
                    next += 1;
                }
                floor.columns[start..].sort_unstable();
            } else {
                // Strictly greater: the first of equals stays.
                floor.columns.push((1..cols).fold(0, |best, c| if row[c] > row[best] { c } else { best }) as u16);
            }
            floor.ends.push(floor.columns.len() as u32);
        }
        floor
    }

    /// The blocks that stay whatever they are worth: the floor and text blocks.
    pub(crate) fn forced(&self, floor: &Floor) -> BlockMask {
        let mut mask = BlockMask::empty(self.shape.0, self.shape.1);
        let mut start = 0;
        for (row, &end) in (0..).zip(&floor.ends) {
            floor.columns[start..end as usize].iter().for_each(|&column| mask.set(row, column.into()));
            start = end as usize;
        }
        protect_text(&mut mask, &self.geometry);
        mask
    }

    fn blocks(&self) -> usize {
        self.shape.0 as usize * self.shape.1 as usize
    }
}

/// Calls `f` with the row, the column and the worth of every block that `forced` leaves free, in order.
pub(crate) fn for_each_free(forced: &BlockMask, worth: &[f64], mut f: impl FnMut(u32, u32, f64)) {
    for (r, row) in (0..).zip(worth.chunks_exact(forced.cols() as usize)) {
        for ((base, &word), values) in (0..).step_by(32).zip(forced.row(r)).zip(row.chunks(32)) {
            for (bit, &value) in (0..).zip(values) {
                if word >> bit & 1 == 0 {
                    f(r, base + bit, value);
                }
            }
        }
    }
}

/// Above every key there is: blocks of larger scores, which lose more than all else of their row together, count as equal.
pub(crate) const KEYS: u32 = 0x4000_0000;

/// The score of a block, as an integer of the same order below [`KEYS`].
pub(crate) fn key(relative: f64, worth: f64) -> u32 {
    ((relative * worth) as f32).to_bits().min(KEYS - 1)
}

fn fold(over: OverPrompts, all: &mut [f64], one: &[f64]) {
    let pairs = all.iter_mut().zip(one);
    match over {
        OverPrompts::Mean => pairs.for_each(|(all, one)| *all += one),
        OverPrompts::Max => pairs.for_each(|(all, one)| *all = all.max(*one)),
    }
}

fn finish(over: OverPrompts, mut all: Vec<f64>, prompts: usize) -> Vec<f64> {
    if over == OverPrompts::Mean {
        all.iter_mut().for_each(|value| *value /= prompts as f64);
    }
    all
}

/// For each of `parts` what the others come to: those before it and those after it are each put together once.
fn others(over: OverPrompts, parts: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let left = parts.len() - 1;
    let mut after = vec![vec![0.0; parts[0].len()]; parts.len()];
    for prompt in (0..left).rev() {
        let (these, rest) = after.split_at_mut(prompt + 1);
        these[prompt].copy_from_slice(&rest[0]);
        fold(over, &mut these[prompt], &parts[prompt + 1]);
    }
    let mut before = vec![0.0; parts[0].len()];
    for (part, after) in parts.iter().zip(&mut after) {
        fold(over, after, &before);
        fold(over, &mut before, part);
    }
    after.into_iter().map(|all| finish(over, all, left)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_scores_and_stay_below_their_bound() {
        let scores = [0.0, 1e-45, 1e-30, 0.25, 0.5, 1.0, 1.12];
        assert!(scores.windows(2).all(|pair| key(1.0, pair[0]) < key(1.0, pair[1])));
        assert_eq!((key(0.0, 1.0), key(1.0, 1e9)), (0, KEYS - 1));
        assert_eq!(f32::from_bits(key(0.5, 0.5)), 0.25);
    }

    #[test]
    fn what_blocks_are_worth_adds_up_to_the_loss_of_their_row() {
        // A row that loses more at first than later: an average over the block that bends it.
        let energy = vec![0.02, 0.5, 0.1, 0.3, 0.08];
        let importance = vec![1e-5, 0.4, 0.002, 0.1, 0.0021];
        let scores = SiteScores { energy, importance };
        let forced = BlockMask::from_fn(1, 5, |_, c| c == 1);
        let worth = scores.worth(&forced);
        assert!(worth[0] < worth[2] && worth[2] <= worth[4] && worth[4] < worth[3] && worth[1] == 0.0, "{worth:?}");
        // At the corners of the hull the sums are the losses.
        let loss = |kept: &[u32]| scores.loss(&BlockMask::from_fn(1, 5, |_, c| kept.contains(&c)));
        let close = |a: f64, b: f64| (a - b).abs() < 1e-12 * b;
        assert!(close(worth[0], loss(&[1, 2, 3, 4])), "{worth:?}");
        assert!(close(worth[0] + worth[2] + worth[4], loss(&[1, 3])), "{worth:?}");
        assert!(close(worth.iter().sum(), loss(&[1])), "{worth:?}");
        assert_eq!((loss(&[0, 1, 2, 3, 4]), row_loss(0.0, 0.0, 0.0)), (0.0, 0.0));
    }

    /// Random values of equal mass: the mean of some of them against the mean of all.
    #[test]
    fn a_row_of_like_blocks_loses_what_a_sample_is_off_by() {
        let n = 16;
        let scores = SiteScores { energy: vec![1.0 / 16.0; n], importance: vec![1.0 / 16.0; n] };
        for kept in 1..=16_u32 {
            let mask = BlockMask::from_fn(1, n as u32, |_, c| c < kept);
            let want = 16.0 / f64::from(kept) - 1.0;
            assert!((scores.loss(&mask) - want).abs() < 1e-9, "{kept}");
        }
    }

    #[test]
    fn others_leave_out_one_each() {
        let parts: Vec<Vec<f64>> = [1.0, 2.0, 4.0, 8.0].iter().map(|&v| vec![v, -v + 8.0]).collect();
        let means: Vec<f64> = others(OverPrompts::Mean, parts.clone()).iter().map(|all| all[0] * 3.0).collect();
        assert_eq!(means, [14.0, 13.0, 11.0, 7.0]);
        let most: Vec<Vec<f64>> = others(OverPrompts::Max, parts);
        assert_eq!(most, [[8.0, 6.0], [8.0, 7.0], [8.0, 7.0], [4.0, 7.0]]);
    }

    #[test]
    fn free_blocks_are_visited_in_order_across_words() {
        let forced = BlockMask::from_fn(2, 70, |r, c| (r + c) % 3 == 0);
        let importance: Vec<f64> = (0..140).map(f64::from).collect();
        let mut seen = Vec::new();
        for_each_free(&forced, &importance, |r, c, value| {
            assert_eq!(value, f64::from(r * 70 + c));
            seen.push((r, c));
        });
        let want: Vec<_> =
            (0..2).flat_map(|r| (0..70).map(move |c| (r, c))).filter(|&(r, c)| !forced.get(r, c)).collect();
        assert_eq!(seen, want);
    }
}

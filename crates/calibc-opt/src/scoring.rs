//! What each block of a site is worth: weights, importances and floors, for the policy `budget` and for the predicted loss.
//!
//! All arithmetic is `f64` in a fixed order, and part of the result: over the prompts from 0.0 in their order, then one division;
//! a score is `((w * u) / largest) * importance`, rounded to `f32`. Scores order like their bits, so that a threshold is an integer.

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
    /// The largest `w * u` of the plan: scores are relative to it, and so never leave the range of `f32`.
    pub(crate) largest: f64,
    pub(crate) over_prompts: OverPrompts,
    row_recall: f64,
    geometry: Geometry,
    shape: Shape,
    sites: (usize, usize),
}

/// What one site's blocks are worth, and which of them stay whatever they are worth.
pub(crate) struct SiteScores {
    /// Over the prompts, `[q_blocks, kv_blocks]`.
    pub(crate) importance: Vec<f64>,
    pub(crate) floor: Floor,
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
        let (by_step, by_head) = (step_weights == StepWeights::Sensitivity, head_weights == HeadWeights::Sensitivity);
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
        scoring.largest = plan.sites().map(|site| scoring.weight(site)).fold(0.0, f64::max);
        if scoring.largest > 0.0 { Ok((scoring, lacks)) } else { Err(OptError::NoWeight) }
    }

    /// `w * u` of a site.
    pub(crate) fn weight(&self, site: Site) -> f64 {
        let index = (site.step.index() * self.sites.0 + site.layer.index()) * self.sites.1 + site.head.index();
        self.weighed.steps[site.step.index()] * self.heads.get(index).copied().unwrap_or(1.0)
    }

    /// The weight of a site as a share of the largest.
    pub(crate) fn relative(&self, site: Site) -> f64 {
        self.weight(site) / self.largest
    }

    /// The importances at `source`, the covered step of a site, of one prompt.
    pub(crate) fn importance_of(
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

    /// The importances at `source`, the covered step of a site.
    pub(crate) fn importance(&self, evidence: &dyn Evidence, source: Site) -> Result<Vec<f64>, OptError> {
        let prompts = evidence.prompts(Split::Calibration);
        let mut all = vec![0.0; self.blocks()];
        for prompt in 0..prompts {
            fold(self.over_prompts, &mut all, &self.importance_of(evidence, Split::Calibration, prompt, source)?);
        }
        Ok(finish(self.over_prompts, all, prompts))
    }

    /// The scores at `source`, the covered step of a site.
    pub(crate) fn site(&self, evidence: &dyn Evidence, source: Site) -> Result<SiteScores, OptError> {
        let prompts = evidence.prompts(Split::Calibration);
        let mut energy = vec![0.0; self.blocks()];
        for prompt in 0..prompts {
            let of_prompt = evidence.energy_of(Split::Calibration, prompt, source, self.shape)?;
            fold(OverPrompts::Mean, &mut energy, &of_prompt.values);
        }
        let floor = self.floor(&finish(OverPrompts::Mean, energy, prompts));
        Ok(SiteScores { importance: self.importance(evidence, source)?, floor })
    }

    /// [`Scoring::site`] without each calibration prompt in turn; there are at least two.
    pub(crate) fn without_each(&self, evidence: &dyn Evidence, source: Site) -> Result<Vec<SiteScores>, OptError> {
        let prompts = evidence.prompts(Split::Calibration);
        let (mut energies, mut importances) = (Vec::new(), Vec::new());
        for prompt in 0..prompts {
            energies.push(evidence.energy_of(Split::Calibration, prompt, source, self.shape)?.values);
            importances.push(self.importance_of(evidence, Split::Calibration, prompt, source)?);
        }
        let energies = others(OverPrompts::Mean, energies);
        let importances = others(self.over_prompts, importances);
        let both = energies.into_iter().zip(importances);
        Ok(both.map(|(energy, importance)| SiteScores { importance, floor: self.floor(&energy) }).collect())
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
    fn floor(&self, energy: &[f64]) -> Floor {
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

/// Calls `f` with the row, the column and the importance of every block that `forced` leaves free, in order.
pub(crate) fn for_each_free(forced: &BlockMask, importance: &[f64], mut f: impl FnMut(u32, u32, f64)) {
    for (r, row) in (0..).zip(importance.chunks_exact(forced.cols() as usize)) {
        for ((base, &word), values) in (0..).step_by(32).zip(forced.row(r)).zip(row.chunks(32)) {
            for (bit, &value) in (0..).zip(values) {
                if word >> bit & 1 == 0 {
                    f(r, base + bit, value);
                }
            }
        }
    }
}

/// Above every key there is: scores are at most 1, but for the rounding of encodings.
pub(crate) const KEYS: u32 = 0x4000_0000;

/// The score of a block, as an integer of the same order below [`KEYS`].
pub(crate) fn key(relative: f64, importance: f64) -> u32 {
    ((relative * importance) as f32).to_bits().min(KEYS - 1)
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

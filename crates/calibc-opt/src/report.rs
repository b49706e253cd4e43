//! What a plan costs on prompts that did not choose it.

use std::fmt;

use calibc_ir::{AttnOp, BlockMask, HeadId, LayerId, MaskId, Plan, Site, StepId};
use rayon::prelude::*;

use crate::calibration::{Calibration, Evidence, Shape, Split, shape_of};
use crate::error::OptError;
use crate::hooks::{Hooks, Watch, Work};
use crate::passes::budget::Selection;
use crate::passes::protect::{empty_rows, fill_rows, protect_text};
use crate::passes::sources;
use crate::policy::{Budget, CalibAtt, OverPrompts, Policy};
use crate::scoring::{Scoring, SiteScores, Weighed, for_each_free, key};

/// Which prompts judge the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Prompts of the holdout split, under the plan's masks.
    Holdout,
    /// Each calibration prompt under the masks the others choose (before any sharing, which only adds blocks). With `budget` the
    /// others say what blocks are worth, and the threshold and the sites at anchor rows stay the plan's: one prompt hardly moves
    /// them, and masks of another threshold would differ in density.
    LeaveOneOut,
    /// The calibration prompts under the plan's masks: explicit masks, which they did not choose, or a single prompt, which did.
    Calibration,
    /// There are no traces.
    None,
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Holdout => "holdout",
            Self::LeaveOneOut => "leave-one-out",
            Self::Calibration => "calibration",
            Self::None => "none",
        })
    }
}

/// What a plan keeps and loses.
///
/// Recall of a row = the energy its mask keeps; decoded energies are taken as they are, so that a whole row may miss 1 by the
/// error of the encoding. It is measured over the rows of block-sparse sites at the steps that have energies; dense sites lose
/// nothing and are not counted, and anchor sites are judged by their own measures.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Which prompts judge.
    pub basis: Basis,
    /// How many.
    pub prompts: usize,
    /// The steps recall is measured at: those the traces cover.
    pub evaluated_steps: Vec<StepId>,
    /// Distinct masks of the plan.
    pub masks: usize,
    /// Everything together.
    pub overall: Group,
    /// By layer.
    pub layers: Vec<Group>,
    /// By step. Steps that are not evaluated have no recall.
    pub steps: Vec<Group>,
    /// Anchor sites; `None` where the plan has none.
    pub anchors: Option<AnchorReport>,
    /// What losses were predicted with; `None` where nothing says what blocks are worth: deviations were not recorded, and the policy
    /// does not weigh energies.
    pub weighed: Option<Weighed>,
    /// What the policy `budget` found.
    pub selection: Option<Selection>,
}

/// A set of sites.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Its ops.
    pub ops: OpCounts,
    /// Mean over its sites of the computed share of dense work ([`Plan::density`]).
    pub density: f64,
    /// Recall of its block-sparse rows; `None` where none was measured.
    pub recall: Option<Recall>,
    /// The loss that what its sites drop is predicted to cost, by the calibration prompts; `None` where it is not known. With
    /// measured sensitivities and deviations: squared error of the result, summed over sites as if their errors were independent.
    pub loss: Option<f64>,
    /// The same for its block-sparse sites at evaluated steps, by the prompts that judge; `None` where none was measured, and where
    /// losses are of the prompt that suffers most.
    pub judged: Option<Judged>,
}

/// A predicted loss put to the test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    /// Mean loss of the prompts that judge, under masks that they did not choose.
    pub loss: f64,
    /// What the calibration prompts predict for the same sites.
    pub predicted: f64,
}

/// Sites by op.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Dense.
    pub dense: u64,
    /// Block-sparse.
    pub block_sparse: u64,
    /// Anchor rows.
    pub anchor_rows: u64,
}

/// Recall over rows, prompts and sites.
#[derive(Clone, Debug, PartialEq)]
pub struct Recall {
    /// Rows measured.
    pub rows: u64,
    /// Mean over them.
    pub mean: f64,
    /// 5th percentile (nearest rank), rounded down to a multiple of 1e-4: rows are counted in a histogram, not kept.
    pub p5: f64,
    /// The worst row, exact; the first in site, prompt and row order among equals.
    pub worst: WorstRow,
}

/// Where recall is worst.
#[derive(Clone, Debug, PartialEq)]
pub struct WorstRow {
    /// Its recall.
    pub recall: f64,
    /// The site.
    pub site: Site,
    /// The query block.
    pub q_block: u32,
    /// The prompt, as an index into the split that judges.
    pub prompt: usize,
}

/// What anchor sites cost, as recorded in the traces (over calibration prompts, at evaluated steps).
#[derive(Clone, Debug, PartialEq)]
pub struct AnchorReport {
    /// Anchor rows per frame.
    pub anchors: u16,
    /// Anchor sites of the plan.
    pub sites: u64,
    /// Anchor sites at evaluated steps.
    pub evaluated: u64,
    /// Mean similarity of rows to their nearest anchor row, over the evaluated sites that record it.
    pub mean_similarity: Option<f64>,
    /// Mean relative error of the copied outputs, over the evaluated sites that record it.
    pub mean_error: Option<f64>,
}

/// Judges a plan that passed the pipeline with `policy`, which found `selection` ([`crate::PassReport::selection`]).
pub fn recall_report<C: Calibration>(
    plan: &Plan,
    policy: &Policy,
    selection: Option<&Selection>,
    calibration: &C,
    hooks: &Hooks<'_>,
) -> Result<Report, OptError> {
    report(plan, policy, selection, calibration, Watch::new(hooks))
}

/// Sites measured between two sequential sums: enough for every thread, few enough to hold their rows.
const CHUNK: usize = 64;

fn report(
    plan: &Plan,
    policy: &Policy,
    selection: Option<&Selection>,
    evidence: &dyn Evidence,
    watch: Watch<'_>,
) -> Result<Report, OptError> {
    let scoring = scoring(plan, policy, evidence)?;
    let judge = Judge::new(plan, policy, selection, scoring.as_ref(), evidence);
    let evaluated_steps = if judge.basis == Basis::None { Vec::new() } else { evidence.covered().to_vec() };
    if let Some(&step) = evaluated_steps.iter().find(|step| step.0 >= plan.num_steps()) {
        return Err(OptError::CoveredStep { step, steps: plan.num_steps() });
    }
    let mut overall = Sums::default();
    let mut layers = vec![Sums::default(); plan.model.layers as usize];
    let mut steps = vec![Sums::default(); plan.num_steps() as usize];
    let densities: Vec<f64> = plan.masks.iter().map(|(_, mask)| mask.density()).collect();
    let anchor_density = plan.anchors().map(|anchors| plan.density(AttnOp::AnchorRows { anchors }));
    for (site, &op) in plan.sites().zip(&plan.ops) {
        for group in [&mut overall, &mut layers[site.layer.index()], &mut steps[site.step.index()]] {
            match op {
                AttnOp::Dense => group.op(|ops| &mut ops.dense, 1.0),
                AttnOp::BlockSparse { mask } => group.op(|ops| &mut ops.block_sparse, densities[mask.index()]),
                AttnOp::AnchorRows { .. } => group.op(|ops| &mut ops.anchor_rows, anchor_density.unwrap_or(1.0)),
            }
        }
    }
    let evaluated = |site: &Site| evaluated_steps.binary_search(&site.step).is_ok();
    let sites = || plan.sites().filter(evaluated).map(|site| (site, plan.op(site)));
    let sparse: Vec<(Site, MaskId)> = sites()
        .filter_map(|(site, op)| if let AttnOp::BlockSparse { mask } = op { Some((site, mask)) } else { None })
        .collect();
    let anchor_sites: Vec<Site> =
        sites().filter(|(_, op)| matches!(op, AttnOp::AnchorRows { .. })).map(|(site, _)| site).collect();
    // The losses come from the covered steps, once for all the steps that take their evidence there.
    let layer_sites = (plan.model.layers * plan.model.heads) as usize;
    let losses = scoring.as_ref().map_or(0, |_| evidence.covered().len() * layer_sites);
    let work = watch.work("report", (sparse.len() + anchor_sites.len() + losses) as u64);
    let mut judged: Vec<(Site, f64)> = Vec::new();
    for chunk in sparse.chunks(CHUNK) {
        let measured = work.map(chunk.par_iter(), |&(site, mask)| judge.measure(site, mask))?;
        for (&(site, _), Measured { recalls, loss }) in chunk.iter().zip(measured) {
            for group in [&mut overall, &mut layers[site.layer.index()], &mut steps[site.step.index()]] {
                group.recalls(site, &recalls, judge.shape.0);
            }
            judged.extend(loss.map(|loss| (site, loss)));
        }
    }
    if let Some(scoring) = &scoring {
        let losses = predicted_losses(plan, scoring, evidence, &work)?;
        for (site, &loss) in plan.sites().zip(&losses) {
            for group in [&mut overall, &mut layers[site.layer.index()], &mut steps[site.step.index()]] {
                group.loss = group.loss.zip(loss).map(|(sum, loss)| sum + loss);
            }
        }
        for (site, loss) in judged {
            let Some(predicted) = losses[plan.site_index(site)] else { continue };
            for group in [&mut overall, &mut layers[site.layer.index()], &mut steps[site.step.index()]] {
                let sum = group.judged.get_or_insert(Judged { loss: 0.0, predicted: 0.0 });
                sum.loss += loss;
                sum.predicted += predicted;
            }
        }
    }
    let anchors = match plan.anchors() {
        Some(anchors) => {
            let measured = work.map(anchor_sites.par_iter(), |&site| {
                Ok((evidence.similarity(site, anchors)?, evidence.copy_error(site, anchors)?))
            })?;
            Some(AnchorReport {
                anchors,
                sites: overall.ops.anchor_rows,
                evaluated: anchor_sites.len() as u64,
                mean_similarity: mean(measured.iter().filter_map(|m| m.0)),
                mean_error: mean(measured.iter().filter_map(|m| m.1)),
            })
        }
        None => None,
    };
    Ok(Report {
        basis: judge.basis,
        prompts: judge.prompts,
        evaluated_steps,
        masks: plan.masks.len(),
        overall: overall.group(scoring.is_some()),
        layers: layers.iter().map(|sums| sums.group(scoring.is_some())).collect(),
        steps: steps.iter().map(|sums| sums.group(scoring.is_some())).collect(),
        anchors,
        weighed: scoring.map(|scoring| scoring.weighed),
        selection: selection.cloned(),
    })
}

/// What blocks are worth, if anything says so: as `budget` weighs them, and for the other policies by deviations.
fn scoring(plan: &Plan, policy: &Policy, evidence: &dyn Evidence) -> Result<Option<Scoring>, OptError> {
    let budget = match policy {
        Policy::Budget(budget) => *budget,
        _ if evidence.has_deviations() && evidence.prompts(Split::Calibration) > 0 => Budget::new(1.0),
        _ => return Ok(None),
    };
    match Scoring::new(&budget, plan, evidence) {
        Ok((scoring, _)) => Ok(Some(scoring)),
        // No loss can be told apart from none.
        Err(OptError::NoWeight) => Ok(None),
        Err(error) => Err(error),
    }
}

/// By site: what it is predicted to lose; `None` at anchor rows of unknown error.
fn predicted_losses(
    plan: &Plan,
    scoring: &Scoring,
    evidence: &dyn Evidence,
    work: &Work<'_>,
) -> Result<Vec<Option<f64>>, OptError> {
    let sources = sources(plan, evidence)?;
    let heads = plan.model.heads as usize;
    let layer_sites = plan.model.layers as usize * heads;
    let q_blocks = f64::from(plan.geometry.num_q_blocks());
    let mut losses = Vec::with_capacity(plan.ops.len());
    let mut start = 0;
    for same in sources.chunk_by(|a, b| a == b) {
        let steps = start..start + same.len() as u32;
        start = steps.end;
        let columns = work.map((0..layer_sites).into_par_iter(), |i| {
            let (layer, head) = (LayerId((i / heads) as u32), HeadId((i % heads) as u32));
            let source = Site { step: same[0], layer, head };
            let ops: Vec<(Site, AttnOp)> = steps
                .clone()
                .map(|step| Site { step: StepId(step), ..source })
                .map(|site| (site, plan.op(site)))
                .collect();
            let sparse = ops.iter().any(|(_, op)| matches!(op, AttnOp::BlockSparse { .. }));
            let scores = if sparse { Some(scoring.site(evidence, source)?) } else { None };
            let loss = |&(site, op): &(Site, AttnOp)| {
                let dropped = match op {
                    AttnOp::Dense => Some(0.0),
                    AttnOp::BlockSparse { mask } => scores.as_ref().map(|scores| scores.loss(&plan.masks[mask])),
                    AttnOp::AnchorRows { anchors } => {
                        scoring.anchor_importance(evidence, source, anchors)?.map(|error| q_blocks * error)
                    }
                };
                Ok(dropped.map(|dropped| scoring.weight(site) * dropped))
            };
            ops.iter().map(loss).collect::<Result<Vec<_>, OptError>>()
        })?;
        losses.extend((0..same.len()).flat_map(|t| columns.iter().map(move |column| column[t])));
    }
    Ok(losses)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u64), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// Measures recall at one site.
struct Judge<'a> {
    plan: &'a Plan,
    evidence: &'a dyn Evidence,
    basis: Basis,
    /// How masks are chosen anew, where they must be.
    choice: Option<Choice<'a>>,
    /// What says how much is lost on a prompt.
    scoring: Option<&'a Scoring>,
    split: Split,
    prompts: usize,
    shape: Shape,
}

/// What was measured at one site.
struct Measured {
    /// Of every row, prompt by prompt.
    recalls: Vec<f64>,
    /// The mean over the prompts.
    loss: Option<f64>,
}

/// How masks are chosen without a prompt.
#[derive(Clone, Copy)]
enum Choice<'a> {
    CalibAtt(CalibAtt),
    Budget(&'a Selection, &'a Scoring),
}

impl<'a> Judge<'a> {
    fn new(
        plan: &'a Plan,
        policy: &Policy,
        selection: Option<&'a Selection>,
        scoring: Option<&'a Scoring>,
        evidence: &'a dyn Evidence,
    ) -> Self {
        let [calibration, holdout] = [Split::Calibration, Split::Holdout].map(|split| evidence.prompts(split));
        let (basis, choice) = match (policy, selection.zip(scoring)) {
            _ if evidence.covered().is_empty() || holdout + calibration == 0 => (Basis::None, None),
            _ if holdout > 0 => (Basis::Holdout, None),
            (Policy::CalibAtt(recipe), _) if calibration > 1 => (Basis::LeaveOneOut, Some(Choice::CalibAtt(*recipe))),
            (Policy::Budget(_), Some((selection, scoring))) if calibration > 1 => {
                (Basis::LeaveOneOut, Some(Choice::Budget(selection, scoring)))
            }
            _ => (Basis::Calibration, None),
        };
        let (split, prompts) = match basis {
            Basis::Holdout => (Split::Holdout, holdout),
            Basis::LeaveOneOut | Basis::Calibration => (Split::Calibration, calibration),
            Basis::None => (Split::Calibration, 0),
        };
        // Prompts that chose the masks are no test of what they predicted, and a mean is none of a maximum.
        let tests = matches!(basis, Basis::Holdout | Basis::LeaveOneOut);
        let scoring = scoring.filter(|scoring| tests && scoring.over_prompts == OverPrompts::Mean);
        Self { plan, evidence, basis, choice, scoring, split, prompts, shape: shape_of(plan) }
    }

    fn measure(&self, site: Site, mask: MaskId) -> Result<Measured, OptError> {
        let rows = self.shape.0;
        let mut dropped = 0.0;
        let mut recalls = Vec::with_capacity(self.prompts * rows as usize);
        let chosen = self.choice.map(|choice| self.chosen_without_each(choice, site)).transpose()?;
        for prompt in 0..self.prompts {
            let energy = self.evidence.energy_of(self.split, prompt, site, self.shape)?;
            let mask = match &chosen {
                Some(masks) => masks.get(prompt).ok_or(OptError::NoEvidence)?,
                None => &self.plan.masks[mask],
            };
            recalls.extend((0..rows).map(|r| energy.recall(mask, r)));
            if let Some(scoring) = self.scoring {
                dropped += scoring.site_of(self.evidence, self.split, prompt, site)?.loss(mask);
            }
        }
        let loss = self.scoring.map(|scoring| scoring.weight(site) * dropped / self.prompts as f64);
        Ok(Measured { recalls, loss })
    }

    /// The masks that are chosen without each prompt in turn.
    fn chosen_without_each(&self, choice: Choice<'_>, site: Site) -> Result<Vec<BlockMask>, OptError> {
        match choice {
            Choice::CalibAtt(recipe) => {
                let epsilon = recipe.epsilon(site.step.0, self.plan.num_steps());
                let maps = self.evidence.thresholds_without_each(site, recipe.rho, self.shape)?;
                maps.iter().enumerate().map(|(prompt, map)| self.protected(map.mask(epsilon), site, prompt)).collect()
            }
            Choice::Budget(selection, scoring) => {
                let (relative, cut) = (scoring.relative(site), selection.keys[site.step.index()]);
                let choose = |scores: &SiteScores| {
                    let forced = scoring.forced(&scoring.floor(scores));
                    let mut mask = forced.clone();
                    for_each_free(&forced, &scores.worth(&forced), |r, c, value| {
                        if key(relative, value) >= cut {
                            mask.set(r, c);
                        }
                    });
                    mask
                };
                Ok(scoring.without_each(self.evidence, site)?.iter().map(choose).collect())
            }
        }
    }

    /// What select and protect make of a mask chosen without `prompt`.
    fn protected(&self, mut mask: BlockMask, site: Site, prompt: usize) -> Result<BlockMask, OptError> {
        protect_text(&mut mask, &self.plan.geometry);
        let empty = empty_rows(&mask);
        if !empty.is_empty() {
            fill_rows(&mut mask, &empty, self.evidence, site, self.shape, Some(prompt))?;
        }
        Ok(mask)
    }
}

/// Bins of the histogram: 1e-4 wide, up to 1.1; the encodings let a whole row reach 1.06.
const BINS: usize = 11_000;
const PER_BIN: f64 = 10_000.0;

/// A [`Group`] in the making.
#[derive(Clone)]
struct Sums {
    ops: OpCounts,
    density: f64,
    loss: Option<f64>,
    judged: Option<Judged>,
    rows: u64,
    recall: f64,
    worst: Option<WorstRow>,
    histogram: Vec<u64>,
}

impl Default for Sums {
    fn default() -> Self {
        let ops = OpCounts::default();
        Self {
            ops,
            density: 0.0,
            loss: Some(0.0),
            judged: None,
            rows: 0,
            recall: 0.0,
            worst: None,
            histogram: Vec::new(),
        }
    }
}

impl Sums {
    fn op(&mut self, kind: impl Fn(&mut OpCounts) -> &mut u64, density: f64) {
        *kind(&mut self.ops) += 1;
        self.density += density;
    }

    fn recalls(&mut self, site: Site, recalls: &[f64], rows: u32) {
        self.histogram.resize(BINS, 0);
        // One sum per site, added in site order: the same on any number of threads.
        self.recall += recalls.iter().sum::<f64>();
        self.rows += recalls.len() as u64;
        for (i, &recall) in recalls.iter().enumerate() {
            self.histogram[((recall * PER_BIN) as usize).min(BINS - 1)] += 1;
            if self.worst.as_ref().is_none_or(|worst| recall < worst.recall) {
                let (prompt, q_block) = (i / rows as usize, (i % rows as usize) as u32);
                self.worst = Some(WorstRow { recall, site, q_block, prompt });
            }
        }
    }

    fn group(&self, predicted: bool) -> Group {
        let OpCounts { dense, block_sparse, anchor_rows } = self.ops;
        let density = self.density / (dense + block_sparse + anchor_rows) as f64;
        let recall = self.worst.clone().map(|worst| {
            let rank = self.rows.div_ceil(20);
            let mut below = 0;
            let bin = self.histogram.iter().position(|&count| {
                below += count;
                below >= rank
            });
            let p5 = bin.unwrap_or(0) as f64 / PER_BIN;
            Recall { rows: self.rows, mean: self.recall / self.rows as f64, p5, worst }
        });
        Group { ops: self.ops, density, recall, loss: self.loss.filter(|_| predicted), judged: self.judged }
    }
}

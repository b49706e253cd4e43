//! The selection of the policy `budget`: one price of attention work for the whole plan, found exactly, over streamed sites.
//!
//! At a price, a site with a mask keeps the blocks whose score is at least the price; a site at anchor rows costs the same at any
//! price. Each takes the form whose loss plus priced work is less, so that work falls as the price rises, and the target fixes the
//! price. Three sweeps over the calibration do it, a fourth in rare cases, none of which holds more than the sites at work:
//!
//! ```text
//! survey   scores by bucket (1/128 octave)      -> at each price of a grid: which sites use anchor rows, and what all sites cost
//! refine   the other sites' scores to the bit   -> the score at the cut, and how many of its equals stay
//! choose   masks: above the cut, and equals in site order, row by row, until the work is spent
//! ```
//!
//! The choice between mask and anchor rows is made at the grid's lowest price within the target, with scores rounded to their
//! bucket's middle; what is left is filled by the cut, which is exact: the plan's density misses the target by less than a block. A
//! step below its floor gets a price of its own.
//!
//! Counts are integers, added in any order: the result does not depend on threads.

mod curve;

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use calibc_ir::{AnchorTable, AttnOp, BlockMask, HeadId, LayerId, Plan, Site, StepId};
use rayon::prelude::*;

use self::curve::{Anchored, Bound, COARSE, Count, Curve, Cut, GRID, Level, Span};
use super::sources;
use crate::calibration::shape_of;
use crate::error::OptError;
use crate::hooks::Work;
use crate::pipeline::Context;
use crate::policy::Budget;
use crate::scoring::{Floor, Scoring, Weighed, for_each_free, key};

/// What the policy `budget` found.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// The density asked for.
    pub target: f64,
    /// The density of the plan as it was selected: of all sites, anchor rows included.
    pub density: f64,
    /// The density that floors and text blocks alone would have.
    pub floor: f64,
    /// What was weighed with.
    pub weighed: Weighed,
    /// By step: blocks of less loss than this are dropped. `None` where nothing but the floor is kept.
    pub thresholds: Vec<Option<f64>>,
    /// By step: the loss that a block's work was worth when heads chose between masks and anchor rows. The threshold lies at or below
    /// it, as far as the work goes that whole heads left over.
    pub prices: Vec<f64>,
    /// Steps that the floor of steps holds up, ascending.
    pub held: Vec<StepId>,
    /// Anchor rows per frame that sites could use, and how many of them do.
    pub anchors: Option<(u16, u64)>,
    /// What evidence lacks, and what that costs.
    pub warnings: Vec<String>,
    /// By step, the key at the cut.
    pub(crate) keys: Vec<u32>,
}

/// Steps that take their evidence from one covered step.
struct Run {
    source: StepId,
    targets: Range<u32>,
}

/// What the survey leaves of one site of a covered step.
struct Surveyed {
    floor: Floor,
    /// Blocks of the floor and of text.
    forced: u64,
    /// Whether the error of anchor rows is known.
    has_error: bool,
    /// By target step: the prices at which anchor rows are the better form.
    spans: Vec<Span>,
}

/// The plan's dimensions, and how its evidence is swept.
struct Sweep<'a> {
    cx: &'a Context<'a>,
    scoring: &'a Scoring,
    runs: Vec<Run>,
    /// Layers x heads.
    sites: usize,
    heads: usize,
    q_blocks: u64,
    blocks: u64,
    /// Attention work is counted in units of which a block costs this many, so that anchor rows cost a whole number.
    block_units: u64,
    /// Anchor rows per frame, and what a site at them costs.
    anchors: Option<(u16, u64)>,
}

impl Sweep<'_> {
    /// `f` of every site of every covered step that a step of the plan takes its evidence from: by run, then layer and head.
    fn map<R: Send>(
        &self,
        work: &Work<'_>,
        f: impl Fn(&Run, Site, usize) -> Result<R, OptError> + Sync,
    ) -> Result<Vec<R>, OptError> {
        work.map((0..self.runs.len() * self.sites).into_par_iter(), |i| {
            let run = &self.runs[i / self.sites];
            f(run, self.at(run.source, i % self.sites), i)
        })
    }

    /// Site `i` of a step, by layer and head.
    fn at(&self, step: StepId, i: usize) -> Site {
        Site { step, layer: LayerId((i / self.heads) as u32), head: HeadId((i % self.heads) as u32) }
    }

    /// Units of dense attention at `steps` steps.
    fn dense(&self, steps: usize) -> u128 {
        steps as u128 * self.sites as u128 * u128::from(self.blocks) * u128::from(self.block_units)
    }

    fn bound(&self, units: u128) -> Bound {
        Bound { units, block: self.block_units, anchored: self.anchors.map_or(0, |(_, units)| units) }
    }

    /// First sweep: the levels' curves, and what later sweeps need to know of each site.
    fn survey(&self, work: &Work<'_>, levels: &[Level]) -> Result<Vec<Surveyed>, OptError> {
        let level = |step: u32| &levels[step as usize % levels.len()];
        self.map(work, |run, source, _| {
            let scores = self.scoring.site(self.cx.evidence, source)?;
            let floor = self.scoring.floor(&scores);
            let forced = self.scoring.forced(&floor);
            let worth = scores.worth(&forced);
            let count = forced.count();
            let error = match self.anchors {
                Some((anchors, _)) => self.scoring.anchor_importance(self.cx.evidence, source, anchors)?,
                None => None,
            };
            let mut spans = Vec::with_capacity(run.targets.len());
            let mut buckets = vec![0_u32; COARSE];
            for step in run.targets.clone() {
                let relative = self.scoring.relative(Site { step: StepId(step), ..source });
                buckets.fill(0);
                for_each_free(&forced, &worth, |_, _, value| buckets[(key(relative, value) >> 16) as usize] += 1);
                let anchored = self.anchors.zip(error).map(|((_, units), error)| Anchored {
                    loss: relative * (self.q_blocks as f64 * error),
                    blocks: units as f64 / self.block_units as f64,
                });
                spans.push(level(step).add(count, &buckets, anchored));
            }
            Ok(Surveyed { floor, forced: count, has_error: error.is_some(), spans })
        })
    }

    /// Second sweep: scores of the sites with masks, by group of steps.
    fn refine(
        &self,
        work: &Work<'_>,
        surveyed: &[Surveyed],
        groups: &Groups,
        counts: &[Count],
    ) -> Result<(), OptError> {
        self.map(work, |run, source, i| {
            let Surveyed { floor, forced, spans, .. } = &surveyed[i];
            let targets = || run.targets.clone().zip(spans);
            for (step, _) in targets().filter(|(step, span)| groups.anchored(*step, **span)) {
                counts[groups.of[step as usize]].anchored.fetch_add(1, Relaxed);
            }
            let masked: Vec<u32> =
                targets().filter(|(step, span)| !groups.anchored(*step, **span)).map(|(step, _)| step).collect();
            if masked.is_empty() {
                return Ok(());
            }
            let mask = self.scoring.forced(floor);
            let worth = self.scoring.site(self.cx.evidence, source)?.worth(&mask);
            let mut buckets = vec![0_u32; COARSE];
            let mut near = Vec::new();
            for step in masked {
                let relative = self.scoring.relative(Site { step: StepId(step), ..source });
                let count = &counts[groups.of[step as usize]];
                buckets.fill(0);
                near.clear();
                for_each_free(&mask, &worth, |_, _, value| {
                    let key = key(relative, value);
                    let bucket = (key >> 16) as usize;
                    buckets[bucket] += 1;
                    if count.window.contains(&bucket) {
                        near.push(key);
                    }
                });
                count.forced.fetch_add(*forced, Relaxed);
                count.add(&buckets, &near);
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Last sweep: the ops of every site, a covered step at a time.
    fn choose(
        &self,
        work: &Work<'_>,
        surveyed: &mut [Surveyed],
        groups: &Groups,
        cuts: &[Cut],
        plan: &mut Plan,
    ) -> Result<(), OptError> {
        let mut left: Vec<u64> = cuts.iter().map(|cut| cut.equals).collect();
        for (run, surveyed) in self.runs.iter().zip(surveyed.chunks_mut(self.sites)) {
            let mut columns: Vec<_> = work
                .map(surveyed.par_iter_mut().enumerate(), |(i, surveyed)| {
                    let source = self.at(run.source, i);
                    let targets = || run.targets.clone().zip(&surveyed.spans);
                    if targets().all(|(step, span)| groups.anchored(step, *span)) {
                        return Ok(targets().map(|_| None).collect());
                    }
                    let forced = self.scoring.forced(&surveyed.floor);
                    let worth = self.scoring.site(self.cx.evidence, source)?.worth(&forced);
                    let choice = |(step, span): (u32, &Span)| {
                        let site = Site { step: StepId(step), ..source };
                        let cut = cuts[groups.of[step as usize]].key;
                        (!groups.anchored(step, *span))
                            .then(|| Chosen::new(&forced, &worth, self.scoring.relative(site), cut))
                    };
                    Ok(targets().map(choice).collect::<Vec<_>>())
                })?
                .into_iter()
                .map(Vec::into_iter)
                .collect();
            // In site order: which of the equals stay depends on it, and masks are interned by it.
            for step in run.targets.clone() {
                let first = plan.site_index(self.at(StepId(step), 0));
                let left = &mut left[groups.of[step as usize]];
                for (i, chosen) in columns.iter_mut().enumerate() {
                    plan.ops[first + i] = match (chosen.next().flatten(), self.anchors) {
                        (Some(chosen), _) => super::select::op_of(chosen.settle(left), plan),
                        (None, Some((anchors, _))) => AttnOp::AnchorRows { anchors },
                        (None, None) => AttnOp::Dense,
                    };
                }
            }
        }
        Ok(())
    }
}

/// A mask but for the blocks exactly at the cut.
struct Chosen {
    mask: BlockMask,
    equals: Option<BlockMask>,
}

impl Chosen {
    fn new(forced: &BlockMask, worth: &[f64], relative: f64, cut: u32) -> Self {
        let mut chosen = Self { mask: forced.clone(), equals: None };
        for_each_free(forced, worth, |r, c, value| {
            let key = key(relative, value);
            if key > cut {
                chosen.mask.set(r, c);
            } else if key == cut {
                chosen.equals.get_or_insert_with(|| BlockMask::empty(forced.rows(), forced.cols())).set(r, c);
            }
        });
        chosen
    }

    /// The mask with the first `left` of the blocks at the cut; none if it keeps everything.
    fn settle(mut self, left: &mut u64) -> Option<BlockMask> {
        if let Some(equals) = self.equals.filter(|_| *left > 0) {
            let count = equals.count();
            if count <= *left {
                self.mask.union_with(&equals);
                *left -= count;
            } else {
                let blocks = (0..equals.rows()).flat_map(|r| equals.kept(r).map(move |c| (r, c)));
                blocks.take(*left as usize).for_each(|(r, c)| self.mask.set(r, c));
                *left = 0;
            }
        }
        Some(self.mask).filter(|mask| !mask.is_full())
    }
}

/// Steps that share a price: all of them, but for those that a floor holds up, which have one each.
struct Groups {
    /// By step.
    of: Vec<usize>,
    /// By group: the price, as a place in the grid.
    prices: Vec<usize>,
    /// By group: the work it may do, and whether a part of a block more is better than less.
    targets: Vec<(u128, bool)>,
    held: Vec<StepId>,
}

impl Groups {
    /// One price for all steps.
    fn one(sweep: &Sweep<'_>, steps: usize, units: u128, curve: &Curve) -> Self {
        let price = curve::price(&[curve], &sweep.bound(units));
        Self { of: vec![0; steps], prices: vec![price], targets: vec![(units, false)], held: Vec::new() }
    }

    /// Steps that would do less work than `floor` at the price of the others are held up to it, until none is left that would.
    fn with_floor(sweep: &Sweep<'_>, curves: &[Curve], units: u128, floor: u128) -> Self {
        let mut held = vec![false; curves.len()];
        let (price, rest) = loop {
            let count = held.iter().filter(|&&held| held).count();
            let rest = units.saturating_sub(count as u128 * floor);
            let free: Vec<&Curve> =
                curves.iter().zip(&held).filter(|(_, held)| !**held).map(|(curve, _)| curve).collect();
            let price = curve::price(&free, &sweep.bound(rest));
            let mut more = false;
            for (curve, held) in curves.iter().zip(&mut held) {
                if !*held && sweep.bound(0).cost(&[curve], price) < floor {
                    (*held, more) = (true, true);
                }
            }
            if !more {
                break (price, rest);
            }
        };
        let mut groups = Self { of: Vec::new(), prices: vec![price], targets: vec![(rest, false)], held: Vec::new() };
        for (step, (curve, held)) in (0..).zip(curves.iter().zip(held)) {
            groups.of.push(if held { groups.prices.len() } else { 0 });
            if held {
                groups.held.push(StepId(step));
                groups.prices.push(curve::price(&[curve], &sweep.bound(floor)));
                groups.targets.push((floor, true));
            }
        }
        groups
    }

    fn anchored(&self, step: u32, span: Span) -> bool {
        span.contains(self.prices[self.of[step as usize]])
    }

    /// Where the scores of each group are cut, or the bucket that must be looked into.
    fn cuts(&self, sweep: &Sweep<'_>, counts: &[Count]) -> Vec<Result<Cut, usize>> {
        let cut = |(count, &(units, up)): (&Count, &(u128, bool))| {
            let (forced, anchored) = (count.forced.load(Relaxed), count.anchored.load(Relaxed));
            let rest = units.saturating_sub(sweep.bound(0).units_of(forced, anchored));
            let block = u128::from(sweep.block_units);
            let wanted = if up { rest.div_ceil(block) } else { rest / block };
            count.cut(wanted.min(u128::from(u64::MAX)) as u64)
        };
        counts.iter().zip(&self.targets).map(cut).collect()
    }
}

/// Chooses an op for every site.
pub(crate) fn select(budget: &Budget, plan: &mut Plan, cx: &Context<'_>) -> Result<Selection, OptError> {
    let sources = sources(plan, cx.evidence)?;
    let (scoring, mut lacks) = Scoring::new(budget, plan, cx.evidence)?;
    let (q_blocks, kv_blocks) = shape_of(plan);
    let steps = sources.len();
    let mut runs: Vec<Run> = Vec::new();
    for (step, &source) in (0..).zip(&sources) {
        match runs.last_mut() {
            Some(run) if run.source == source => run.targets.end = step + 1,
            _ => runs.push(Run { source, targets: step..step + 1 }),
        }
    }
    let blocks = u64::from(q_blocks) * u64::from(kv_blocks);
    let mut sweep = Sweep {
        cx,
        scoring: &scoring,
        runs,
        sites: plan.model.layers as usize * plan.model.heads as usize,
        heads: plan.model.heads as usize,
        q_blocks: u64::from(q_blocks),
        blocks,
        block_units: u64::from(plan.geometry.q_tokens()),
        anchors: budget.anchors.map(|n| (n, AnchorTable::new(&plan.geometry, n).queries.len() as u64 * blocks)),
    };
    let parts = (sweep.runs.len() * sweep.sites) as u64;
    let mut work = cx.watch.work("select", 3 * parts);

    let levels: Vec<Level> = (0..if budget.step_floor > 0.0 { steps } else { 1 }).map(|_| Level::new()).collect();
    let mut surveyed = sweep.survey(&work, &levels)?;
    if let Some((anchors, _)) = sweep.anchors
        && !surveyed.iter().any(|site| site.has_error)
    {
        lacks.no_anchor_errors(anchors)?;
        sweep.anchors = None;
    }
    let curves: Vec<Curve> = levels.into_iter().map(Level::curve).collect();
    let units = share(budget.density, sweep.dense(steps), f64::floor);
    let groups = match curves.as_slice() {
        [curve] if budget.step_floor == 0.0 => Groups::one(&sweep, steps, units, curve),
        curves => Groups::with_floor(&sweep, curves, units, share(budget.step_floor, sweep.dense(1), f64::ceil)),
    };
    drop(curves);

    // Without anchor rows the cut lies in the bucket below the price. With them the price is met by heads that change their form, a
    // whole head at a time, and what is left is filled from a few buckets below.
    let width = if sweep.anchors.is_some() { 4 } else { 1 };
    let windows = groups.prices.iter().map(|&price| price.min(COARSE).saturating_sub(width)..price.min(COARSE));
    let mut counts: Vec<Count> = windows.map(Count::new).collect();
    let cuts = loop {
        sweep.refine(&work, &surveyed, &groups, &counts)?;
        let found: Vec<Result<Cut, usize>> = groups.cuts(&sweep, &counts);
        if let Ok(cuts) = found.iter().copied().collect::<Result<Vec<Cut>, usize>>() {
            break cuts;
        }
        work.more(parts);
        let missed = found.iter().map(|cut| cut.as_ref().err().map_or(0..0, |&bucket| bucket..bucket + 1));
        counts = counts
            .iter()
            .zip(missed)
            .map(|(count, missed)| Count::new(if missed.is_empty() { count.window.clone() } else { missed }))
            .collect();
    };
    sweep.choose(&work, &mut surveyed, &groups, &cuts, plan)?;

    let anchored: u64 = counts.iter().map(|count| count.anchored.load(Relaxed)).sum();
    let kept: u64 = counts.iter().zip(&cuts).map(|(count, cut)| count.forced.load(Relaxed) + cut.kept).sum();
    let done = sweep.bound(0).units_of(kept, anchored);
    let dense = sweep.dense(steps);
    let forced = sweep
        .runs
        .iter()
        .zip(surveyed.chunks(sweep.sites))
        .map(|(run, sites)| run.targets.len() as u64 * sites.iter().map(|site| site.forced).sum::<u64>());
    let floor = forced.sum::<u64>() as f64 / (steps as f64 * sweep.sites as f64 * blocks as f64);
    let selection = Selection {
        target: budget.density,
        density: done as f64 / dense as f64,
        floor,
        thresholds: groups.of.iter().map(|&group| cuts[group].threshold(scoring.largest)).collect(),
        prices: groups.of.iter().map(|&group| curve::price_at(groups.prices[group]) * scoring.largest).collect(),
        keys: groups.of.iter().map(|&group| cuts[group].key).collect(),
        held: groups.held,
        anchors: sweep.anchors.map(|(anchors, _)| (anchors, anchored)),
        weighed: scoring.weighed.clone(),
        warnings: lacks.warnings,
    };
    // Steps that are held up round up to a block.
    let rounding = selection.held.len() as u128 * u128::from(sweep.block_units);
    Ok(selection.with_shortfall(done > units + rounding, budget))
}

impl Selection {
    /// Says so where the target was too low for the floors.
    fn with_shortfall(mut self, missed: bool, budget: &Budget) -> Self {
        if missed {
            self.warnings.push(format!(
                "floors and text blocks keep a density of {:.4}, more than the {} asked for; lower `row_recall`, or ask for more",
                self.density, budget.density
            ));
        }
        self
    }
}

/// A share of `units`, rounded.
fn share(share: f64, units: u128, round: impl Fn(f64) -> f64) -> u128 {
    (round(share * units as f64) as u128).min(units)
}

const _: () = assert!(COARSE <= GRID, "every bucket has its place in the grid");

//! protect: text blocks are dense, as rows and as columns, and no row stays empty.

use calibc_ir::verify::Stage;
use calibc_ir::{AttnOp, BlockMask, Geometry, Plan, Site, StepId};
use rayon::prelude::*;

use super::{entry, intern, sources, take_masks};
use crate::calibration::{Evidence, Shape, Split, shape_of};
use crate::error::OptError;
use crate::pipeline::{Context, Outcome, Pass};
use crate::policy::Policy;

/// Rows and columns of text blocks keep everything. A row that would keep nothing (calibration prompts that agree on no block)
/// keeps its strongest block: the one of highest mean energy over the calibration prompts, the lower index among equals.
///
/// With explicit masks an empty row is an error: no evidence says which block the user meant.
pub(crate) struct Protect {
    pub(crate) policy: Policy,
}

impl Pass for Protect {
    fn name(&self) -> &'static str {
        "protect"
    }

    fn needs(&self) -> Stage {
        Stage::Selected
    }

    fn run(&self, plan: &mut Plan, cx: &Context<'_>) -> Result<Outcome, OptError> {
        let geometry = plan.geometry;
        // The common case, left without touching (and hashing) the masks again.
        if geometry.text_blocks().is_empty() && plan.masks.iter().all(|(_, mask)| empty_rows(mask).is_empty()) {
            return Ok(Outcome::default());
        }
        let mut masks = take_masks(plan);
        let work = cx.watch.work("protect", masks.len() as u64);
        let found = work.map(masks.par_iter_mut(), |mask| {
            let text = protect_text(mask, &geometry);
            Ok((text, empty_rows(mask)))
        })?;
        let text = found.iter().filter(|(text, _)| *text).count();
        let empty: Vec<&[u32]> = found.iter().map(|(_, rows)| rows.as_slice()).collect();
        // Equal masks of several sites may differ in what evidence says about their empty rows: each site gets its own.
        let holes: Vec<(usize, Site, usize)> = plan
            .sites()
            .enumerate()
            .filter_map(|(i, site)| match plan.ops[i] {
                AttnOp::BlockSparse { mask } if !empty[mask.index()].is_empty() => Some((i, site, mask.index())),
                _ => None,
            })
            .collect();
        if let Some(&(_, site, mask)) = holes.first() {
            if let Policy::Explicit(_) = self.policy {
                return Err(OptError::EmptyRow { site, row: empty[mask][0] });
            }
            let (sources, shape) = (sources(plan, cx.evidence)?, shape_of(plan));
            let work = cx.watch.work("protect", holes.len() as u64);
            let filled = work.map(holes.par_iter(), |&(_, site, mask)| {
                let mut filled = masks[mask].clone();
                fill_rows(&mut filled, empty[mask], cx.evidence, source(site, &sources), shape, None)?;
                Ok(filled)
            })?;
            for (&(i, ..), mask) in holes.iter().zip(filled) {
                plan.ops[i] = AttnOp::BlockSparse { mask: entry(masks.len()) };
                masks.push(mask);
            }
        }
        let rows: usize = holes.iter().map(|&(_, _, mask)| empty[mask].len()).sum();
        let mut outcome = Outcome { changed: text > 0 || !holes.is_empty(), ..Outcome::default() };
        if text > 0 {
            outcome.remarks.push(format!("text blocks made dense in {text} masks"));
        }
        if rows > 0 {
            outcome.remarks.push(format!("{rows} empty rows at {} sites keep their strongest block", holes.len()));
        }
        intern(plan, masks);
        Ok(outcome)
    }
}

/// The site whose energies stand for `site`.
pub(crate) fn source(site: Site, sources: &[StepId]) -> Site {
    Site { step: sources[site.step.index()], ..site }
}

/// Keeps the rows and columns of text blocks whole; whether that changed anything.
pub(crate) fn protect_text(mask: &mut BlockMask, geometry: &Geometry) -> bool {
    let text = geometry.text_blocks();
    let before = if text.is_empty() { return false } else { mask.count() };
    for block in text {
        mask.fill_row(block);
        mask.fill_col(block);
    }
    mask.count() != before
}

/// Rows that keep nothing.
pub(crate) fn empty_rows(mask: &BlockMask) -> Vec<u32> {
    (0..mask.rows()).filter(|&r| mask.row(r).iter().all(|&word| word == 0)).collect()
}

/// Keeps the strongest block of each of `rows`, by the mean over calibration prompts other than `leave_out`.
pub(crate) fn fill_rows(
    mask: &mut BlockMask,
    rows: &[u32],
    evidence: &dyn Evidence,
    source: Site,
    shape: Shape,
    leave_out: Option<usize>,
) -> Result<(), OptError> {
    let cols = shape.1 as usize;
    let mut sums = vec![0.0; rows.len() * cols];
    for prompt in (0..evidence.prompts(Split::Calibration)).filter(|&p| Some(p) != leave_out) {
        let energy = evidence.energy_of(Split::Calibration, prompt, source, shape)?;
        for (sums, &r) in sums.chunks_exact_mut(cols).zip(rows) {
            sums.iter_mut().zip(energy.row(r)).for_each(|(sum, e)| *sum += e);
        }
    }
    // The mean is the sum over a number all columns share. Strictly greater: the first of equals stays.
    for (sums, &r) in sums.chunks_exact(cols).zip(rows) {
        let strongest = (1..cols).fold(0, |best, c| if sums[c] > sums[best] { c } else { best });
        mask.set(r, strongest as u32);
    }
    Ok(())
}

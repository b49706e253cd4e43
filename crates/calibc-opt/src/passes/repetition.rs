//! repetition: heads whose rows resemble their nearest anchor row compute the anchor rows only.

use calibc_ir::{AttnOp, Plan, Site};
use rayon::prelude::*;

use super::protect::source;
use super::{intern, sources, take_masks};
use crate::error::OptError;
use crate::pipeline::{Context, Outcome, Pass};
use crate::policy::{CalibAtt, Policy, Repetition};

/// With `calibatt`: anchor rows where the mean similarity over the calibration prompts is at least gamma, whatever the mask
/// there (CalibAtt 4.2). Sites whose traces record no similarity keep their masks. Explicit ops stay as the user wrote them.
pub(crate) struct DetectRepetition {
    pub(crate) policy: Policy,
}

impl Pass for DetectRepetition {
    fn name(&self) -> &'static str {
        "repetition"
    }

    fn run(&self, plan: &mut Plan, cx: &Context<'_>) -> Result<Outcome, OptError> {
        let Policy::CalibAtt(CalibAtt { repetition: Some(Repetition { anchors, gamma }), .. }) = self.policy else {
            return Ok(Outcome::default());
        };
        let sources = sources(plan, cx.evidence)?;
        let sites: Vec<Site> = plan.sites().collect();
        let work = cx.watch.work("repetition", sites.len() as u64);
        let similar = work.map(sites.par_iter(), |&site| {
            let similarity = cx.evidence.similarity(source(site, &sources), anchors)?;
            Ok(similarity.is_some_and(|similarity| similarity >= gamma))
        })?;
        let count = similar.iter().filter(|&&similar| similar).count();
        if count == 0 {
            return Ok(Outcome::default());
        }
        for (op, _) in plan.ops.iter_mut().zip(similar).filter(|(_, similar)| *similar) {
            *op = AttnOp::AnchorRows { anchors };
        }
        let masks = take_masks(plan);
        intern(plan, masks);
        Ok(Outcome::changed(format!("{count} sites use {anchors} anchor rows per frame")))
    }
}

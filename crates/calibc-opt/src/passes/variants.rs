//! variants: which kernels the plan needs.

use calibc_ir::{DType, Plan, Variant};

use crate::error::OptError;
use crate::pipeline::{Context, Outcome, Pass};

/// One kernel per element type, with and without log-sum-exp, serving exactly the features the plan has; in symbol order.
pub(crate) struct AssignVariants {
    pub(crate) dtypes: Vec<DType>,
    pub(crate) lse: bool,
}

impl Pass for AssignVariants {
    fn name(&self) -> &'static str {
        "variants"
    }

    fn run(&self, plan: &mut Plan, _: &Context<'_>) -> Result<Outcome, OptError> {
        if self.dtypes.is_empty() {
            return Err(OptError::NoDtypes);
        }
        let (head_dim, anchors, ragged) = (plan.model.head_dim, plan.anchors().is_some(), plan.geometry.ragged());
        let lse: &[bool] = if self.lse { &[false, true] } else { &[false] };
        let all = self
            .dtypes
            .iter()
            .flat_map(|&dtype| lse.iter().map(move |&lse| Variant { dtype, head_dim, lse, anchors, ragged }));
        let mut variants: Vec<Variant> = all.collect();
        variants.sort_unstable();
        variants.dedup();
        let changed = plan.variants != variants;
        let names: Vec<String> = variants.iter().map(ToString::to_string).collect();
        plan.variants = variants;
        Ok(Outcome { changed, remarks: vec![names.join(" ")], ..Outcome::default() })
    }
}

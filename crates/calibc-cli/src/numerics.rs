//! Does a plan compute what it says? Sampled layers, executed on random inputs, against an independent masked attention.

use std::collections::BTreeSet;

use calibc_bundle::Bundle;
use calibc_ir::{AttnOp, BLOCK, DType, HeadId, LayerId, Plan, Site, StepId, TextPosition, Variant};
use calibc_runtime::Operand;
use calibc_runtime::cuda::Engine;
use calibc_runtime::reference::{self, masked};
use calibc_trace::random::SplitMix64;

use crate::exit::Failure;
use crate::tensors::random;

/// Query positions of each head that are compared.
const POSITIONS: usize = 48;

/// Multiply-adds up to which the CPU executes whole layers; beyond, one head of the layer.
const WHOLE_LAYER: f64 = 4e11;

/// The comparison of one layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Comparison {
    pub(crate) step: StepId,
    pub(crate) layer: LayerId,
    /// Heads compared.
    pub(crate) heads: Vec<u32>,
    /// The kernel's symbol; `None` is the CPU reference in f32.
    pub(crate) kernel: Option<String>,
    /// Query rows compared.
    pub(crate) rows: usize,
    /// Relative Frobenius error of the rows compared.
    pub(crate) error: f64,
    /// What it may be.
    pub(crate) tolerance: f64,
    /// Largest difference of a log-sum-exp, where one was computed.
    pub(crate) lse_error: Option<f64>,
}

/// Largest difference a log-sum-exp may have.
pub(crate) const LSE_TOLERANCE: f64 = 1e-3;

impl Comparison {
    pub(crate) fn passes(&self) -> bool {
        // Written so that NaN fails.
        self.error <= self.tolerance && self.lse_error.is_none_or(|error| error <= LSE_TOLERANCE)
    }
}

/// What a device computed for one layer: outputs `[batch, head, token, head_dim]` and log-sum-exps, both contiguous.
struct Computed {
    out: Vec<f32>,
    lse: Vec<f32>,
}

/// Layers to compare: sampled, and such that each kind of op of the plan occurs where `count` allows.
pub(crate) fn sample_layers(plan: &Plan, count: u32, random: &mut SplitMix64) -> Vec<(StepId, LayerId)> {
    let kinds = |op: &AttnOp| match op {
        AttnOp::Dense => 0,
        AttnOp::BlockSparse { .. } => 1,
        AttnOp::AnchorRows { .. } => 2,
    };
    let pairs = plan.num_steps() as usize * plan.model.layers as usize;
    let pair =
        |i: usize| (StepId((i / plan.model.layers as usize) as u32), LayerId((i % plan.model.layers as usize) as u32));
    let mut chosen = BTreeSet::new();
    for kind in [2, 1, 0] {
        // From a random place, the first layer that has the kind.
        let start = random.below(pairs as u64) as usize;
        let found = (0..pairs).map(|i| (start + i) % pairs).find(|&i| {
            let (step, layer) = pair(i);
            plan.layer_ops(step, layer).iter().any(|op| kinds(op) == kind)
        });
        if chosen.len() < count as usize {
            chosen.extend(found);
        }
    }
    while chosen.len() < (count as usize).min(pairs) {
        chosen.insert(random.below(pairs as u64) as usize);
    }
    chosen.into_iter().map(pair).collect()
}

/// Positions to compare: the ends of the sequence, of text and of blocks, and random ones.
fn sample_positions(plan: &Plan, tokens: u32, random: &mut SplitMix64) -> Vec<u32> {
    let text = plan.geometry.text_range();
    let mut positions: BTreeSet<u32> = [0, BLOCK - 1, BLOCK, tokens / BLOCK * BLOCK, tokens - 1, text.start, text.end]
        .into_iter()
        .filter(|&p| p < tokens)
        .collect();
    while positions.len() < POSITIONS.min(tokens as usize) {
        positions.insert(random.below(u64::from(tokens)) as u32);
    }
    positions.into_iter().collect()
}

/// A plan of one step, one layer and one head that does what `site` does in `plan`.
fn single_head(plan: &Plan, site: Site) -> Plan {
    let mut model = plan.model.clone();
    (model.layers, model.heads) = (1, 1);
    let mut alone = Plan::dense(model, plan.geometry, vec![plan.sigmas[site.step.index()]]);
    alone.ops[0] = match plan.op(site) {
        AttnOp::BlockSparse { mask } => AttnOp::BlockSparse { mask: alone.masks.intern(plan.masks[mask].clone()) },
        op => op,
    };
    alone
}

/// Executes one sampled layer of `bundle` and compares it. With an engine the GPU executes it, else the CPU reference.
pub(crate) fn compare(
    bundle: &Bundle,
    engine: Option<(&Engine, Variant)>,
    (step, layer): (StepId, LayerId),
    numbers: &mut SplitMix64,
) -> Result<Comparison, Failure> {
    let whole = bundle.plan();
    let work: f64 = whole.layer_ops(step, layer).iter().map(|&op| whole.density(op)).sum::<f64>()
        * f64::from(whole.geometry.q_tokens())
        * f64::from(whole.geometry.kv_tokens())
        * f64::from(whole.model.head_dim)
        * 2.0;
    let first = numbers.below(u64::from(whole.model.heads)) as u32;
    // The CPU computes one head where a layer would take minutes; the head then stands alone in a plan of its own.
    let alone;
    let (plan, at, heads) = if engine.is_none() && work > WHOLE_LAYER {
        alone = single_head(whole, Site { step, layer, head: HeadId(first) });
        (&alone, (StepId(0), LayerId(0)), vec![first])
    } else {
        (whole, (step, layer), (0..whole.model.heads).collect())
    };
    let kernel = engine.and_then(|(engine, variant)| Some(engine.family(&variant)?.symbol(&variant)));
    let dtype = engine.map(|(_, variant)| variant.dtype);
    let (n, d) = (plan.model.heads as usize, plan.model.head_dim as usize);
    // Text after the video may be shorter than planned: then a random part of it is left out.
    let missing = match plan.geometry.text_position {
        TextPosition::After => numbers.below(u64::from(plan.geometry.text_tokens) + 1) as u32,
        _ => 0,
    };
    let tokens = plan.geometry.q_tokens() - missing;
    let (q_len, kv_len) = (tokens as usize, (plan.geometry.kv_tokens() - missing) as usize);
    let mut tensor = |tokens| random(numbers, [1, n, tokens, d], dtype);
    let [q, k, v] = [tensor(q_len), tensor(kv_len), tensor(kv_len)];
    let views = [q.view(Operand::Q)?, k.view(Operand::K)?, v.view(Operand::V)?];
    let computed = match engine {
        Some((engine, variant)) => {
            let (out, lse) = crate::gpu::attention(engine, at.0.0, at.1.0, [&q, &k, &v], variant.lse, None)?;
            Computed { out: out.into_f32(), lse: lse.unwrap_or_default() }
        }
        None => {
            let [q, k, v] = &views;
            let output = reference::attention(plan, at.0, at.1, q, k, v, &reference::Options::default())?;
            Computed { out: output.out, lse: output.lse }
        }
    };
    let tolerance = match dtype {
        None => 1e-4,
        Some(DType::Bf16) => 4e-3,
        Some(DType::Fp16) => 1e-3,
    };
    let mut comparison = Comparison { step, layer, heads, kernel, rows: 0, error: 0.0, tolerance, lse_error: None };
    // The GPU writes in the memory order of q, the reference always head by head.
    let swapped = engine.is_some() && q.tokens_major;
    let (mut difference, mut size) = (0.0, 0.0);
    for head in 0..plan.model.heads {
        let positions = sample_positions(plan, tokens, numbers);
        let site = Site { step: at.0, layer: at.1, head: HeadId(head) };
        let [q, k, v] = &views;
        let rows = masked::rows(plan, site, 0, q, k, v, None, &positions)?;
        for (&position, row) in positions.iter().zip(&rows) {
            let at = head as usize * q_len + position as usize;
            let start = if swapped { position as usize * n + head as usize } else { at } * d;
            for (&got, want) in computed.out[start..][..d].iter().zip(&row.out) {
                difference += (f64::from(got) - want).powi(2);
                size += want.powi(2);
            }
            if let Some(&lse) = computed.lse.get(at) {
                let error = (f64::from(lse) - row.lse).abs();
                // Written so that NaN stays: max would lose it.
                let worst = comparison.lse_error.unwrap_or(0.0);
                comparison.lse_error = Some(if worst.is_nan() || error <= worst { worst } else { error });
            }
        }
        comparison.rows += positions.len();
    }
    comparison.error = (difference / size).sqrt();
    Ok(comparison)
}

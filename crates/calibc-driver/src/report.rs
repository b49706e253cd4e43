//! The report's numbers as they are stored in a bundle.

use calibc_opt::{Group, HeadWeights, Importance, Judged, OpCounts, Report, StepWeights};
use serde_json::{Value, json};

/// The report as JSON:
///
/// ```text
/// { basis, prompts, evaluated_steps, masks, overall: group, layers: [group], steps: [group],
///   anchors: { anchors, sites, evaluated, mean_similarity, mean_error } | null,
///   weighed: { importance, step_weights, head_weights, steps: [weight] } | null, budget: budget | null, warnings: [text] }
/// group  = { ops: { dense, block_sparse, anchor_rows }, density, recall: recall | null, loss: number | null,
///            judged: { loss, predicted } | null }
/// budget = { target, density, floor, anchors, anchor_sites, held_steps: [step], thresholds: [number | null], prices: [number] }
/// recall = { rows, mean, p5, worst: { recall, site, q_block, prompt } }
/// ```
pub(crate) fn report_json(report: &Report) -> Value {
    // Destructured whole: a new number of the report must find its place here.
    let Report { basis, prompts, evaluated_steps, masks, overall, layers, steps, anchors, weighed, selection } = report;
    json!({
        "basis": basis.to_string(),
        "prompts": prompts,
        "evaluated_steps": evaluated_steps.iter().map(|s| s.0).collect::<Vec<_>>(),
        "masks": masks,
        "overall": group(overall),
        "layers": layers.iter().map(group).collect::<Vec<_>>(),
        "steps": steps.iter().map(group).collect::<Vec<_>>(),
        "anchors": anchors.as_ref().map(|a| json!({
            "anchors": a.anchors,
            "sites": a.sites,
            "evaluated": a.evaluated,
            "mean_similarity": a.mean_similarity,
            "mean_error": a.mean_error,
        })),
        "weighed": weighed.as_ref().map(|w| json!({
            "importance": match w.importance {
                Importance::Deviation => "deviation",
                Importance::Energy => "energy",
            },
            "step_weights": match w.step_weights {
                StepWeights::Sensitivity => "sensitivity",
                StepWeights::Default => "default",
                StepWeights::Uniform => "uniform",
            },
            "head_weights": match w.head_weights {
                HeadWeights::Tempered => "tempered",
                HeadWeights::Sensitivity => "sensitivity",
                HeadWeights::Uniform => "uniform",
            },
            "steps": w.steps,
        })),
        "budget": selection.as_ref().map(|s| json!({
            "target": s.target,
            "density": s.density,
            "floor": s.floor,
            "anchors": s.anchors.map(|(anchors, _)| anchors),
            "anchor_sites": s.anchors.map(|(_, sites)| sites),
            "held_steps": s.held.iter().map(|s| s.0).collect::<Vec<_>>(),
            "thresholds": s.thresholds,
            "prices": s.prices,
        })),
        "warnings": selection.as_ref().map_or(&[][..], |s| &s.warnings),
    })
}

fn group(group: &Group) -> Value {
    let Group { ops: OpCounts { dense, block_sparse, anchor_rows }, density, recall, loss, judged } = group;
    json!({
        "ops": { "dense": dense, "block_sparse": block_sparse, "anchor_rows": anchor_rows },
        "density": density,
        "recall": recall.as_ref().map(|r| json!({
            "rows": r.rows,
            "mean": r.mean,
            "p5": r.p5,
            "worst": {
                "recall": r.worst.recall,
                "site": r.worst.site.to_string(),
                "q_block": r.worst.q_block,
                "prompt": r.worst.prompt,
            },
        })),
        "loss": loss,
        "judged": judged.map(|Judged { loss, predicted }| json!({ "loss": loss, "predicted": predicted })),
    })
}

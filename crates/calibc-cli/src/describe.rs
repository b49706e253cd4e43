//! Words and numbers for plans and bundles, shared by `compile` and `inspect`.

use calibc_bundle::{Bundle, Kernel};
use calibc_driver::spec::GeometrySpec;
use calibc_ir::{AnchorTable, AttnOp, Plan};
use serde_json::{Value, json};

use crate::console::{bytes, count};

/// Adds the fields of `more` to `value`; both are objects.
pub(crate) fn merge(value: &mut Value, mut more: Value) {
    if let (Value::Object(value), Value::Object(more)) = (value, &mut more) {
        value.append(more);
    }
}

/// Sites by op: dense, block-sparse, anchor rows.
pub(crate) fn op_counts<'a>(ops: impl IntoIterator<Item = &'a AttnOp>) -> [u64; 3] {
    let mut counts = [0; 3];
    for op in ops {
        counts[match op {
            AttnOp::Dense => 0,
            AttnOp::BlockSparse { .. } => 1,
            AttnOp::AnchorRows { .. } => 2,
        }] += 1;
    }
    counts
}

/// Density of each site, in the order of the plan.
fn densities(plan: &Plan) -> impl Iterator<Item = f64> + '_ {
    let masks: Vec<f64> = plan.masks.iter().map(|(_, mask)| mask.density()).collect();
    let tokens = f64::from(plan.geometry.q_tokens());
    let anchors = plan.anchors().map(|anchors| AnchorTable::new(&plan.geometry, anchors).queries.len() as f64 / tokens);
    plan.ops.iter().map(move |op| match op {
        AttnOp::Dense => 1.0,
        AttnOp::BlockSparse { mask } => masks[mask.index()],
        AttnOp::AnchorRows { .. } => anchors.unwrap_or(1.0),
    })
}

/// Mean over all sites of the computed share of the dense work.
pub(crate) fn density(plan: &Plan) -> f64 {
    densities(plan).sum::<f64>() / plan.ops.len() as f64
}

/// Which problem the plan is for: one line.
pub(crate) fn head(plan: &Plan) -> String {
    let model = &plan.model;
    format!(
        "{}: {} x {} x {} x {}, {}\n",
        model.name,
        count(u64::from(plan.num_steps()), "step"),
        count(u64::from(model.layers), "layer"),
        count(u64::from(model.heads), "head"),
        model.head_dim,
        plan.geometry
    )
}

/// Sites by op and density: two lines.
pub(crate) fn sites(plan: &Plan) -> String {
    let [dense, sparse, anchors] = op_counts(&plan.ops);
    let density = density(plan);
    format!(
        "sites     {}: {dense} dense, {sparse} block-sparse ({}), {anchors} at anchor rows\n\
         density   {density:.3}: {:.1} % of the attention work is saved\n",
        plan.ops.len(),
        count(plan.masks.len() as u64, "distinct mask"),
        100.0 * (1.0 - density)
    )
}

/// What the report says of recall: one line, or two with anchor sites.
pub(crate) fn recall(report: &Value) -> String {
    let number = |at: &str| report.pointer(at).and_then(Value::as_f64);
    let basis = report.pointer("/basis").and_then(Value::as_str).unwrap_or("none");
    let prompts = report.pointer("/prompts").and_then(Value::as_u64).unwrap_or(0);
    let whose = match basis {
        "holdout" => format!("on {}", count(prompts, "holdout prompt")),
        "leave-one-out" => format!("leaving one of {} out", count(prompts, "prompt")),
        "calibration" => format!("on {} of the calibration", count(prompts, "prompt")),
        _ => "no traces".to_owned(),
    };
    let mut text = match (number("/overall/recall/mean"), number("/overall/recall/p5")) {
        (Some(mean), Some(p5)) => {
            let worst = number("/overall/recall/worst/recall").unwrap_or(f64::NAN);
            let site = report.pointer("/overall/recall/worst/site").and_then(Value::as_str).unwrap_or("?");
            let row = report.pointer("/overall/recall/worst/q_block").and_then(Value::as_u64).unwrap_or(0);
            format!("recall    {mean:.3} mean, {p5:.3} 5th percentile, {worst:.3} worst row ({site} q{row}), {whose}\n")
        }
        _ => format!("recall    not measured ({whose})\n"),
    };
    let anchors = report.pointer("/anchors");
    if let (Some(error), Some(n)) =
        (number("/anchors/mean_error"), anchors.and_then(|a| a.pointer("/evaluated")).and_then(Value::as_u64))
    {
        let similarity = number("/anchors/mean_similarity").unwrap_or(f64::NAN);
        text += &format!(
            "anchors   {}: mean similarity {similarity:.3}, mean output error {error:.3}\n",
            count(n, "measured site")
        );
    }
    text
}

/// What the policy `budget` did: a line or a few; nothing for the other policies.
pub(crate) fn budget(report: &Value) -> String {
    let number = |at: &str| report.pointer(at).and_then(Value::as_f64);
    let whole = |at: &str| report.pointer(at).and_then(Value::as_u64);
    let Some(target) = number("/budget/target") else { return loss(report) };
    let mut text = format!("budget    {target} asked for, floors take {:.3}", number("/budget/floor").unwrap_or(0.0));
    if let (Some(anchors), Some(sites)) = (whole("/budget/anchors"), whole("/budget/anchor_sites")) {
        text += &format!(", {} at {anchors} anchor rows per frame", count(sites, "site"));
    }
    let held: Vec<String> = (report.pointer("/budget/held_steps").and_then(Value::as_array).into_iter().flatten())
        .map(|step| format!("s{step}"))
        .collect();
    if !held.is_empty() {
        text += &format!("; held at the floor of steps: {}", held.join(" "));
    }
    text + "\n" + &loss(report)
}

/// What the traces lacked: a line each.
pub(crate) fn warnings(report: &Value) -> String {
    let warnings = report.pointer("/warnings").and_then(Value::as_array);
    warnings.into_iter().flatten().filter_map(Value::as_str).map(|text| format!("warning   {text}\n")).collect()
}

/// The predicted loss: one line where there is one.
fn loss(report: &Value) -> String {
    let number = |at: &str| report.pointer(at).and_then(Value::as_f64);
    let word = |at: &str| report.pointer(at).and_then(Value::as_str).unwrap_or("?");
    let Some(loss) = number("/overall/loss") else { return String::new() };
    // The unit is that of the weights, and any size is possible.
    let loss = if (0.1..1e6).contains(&loss) { format!("{loss:.4}") } else { format!("{loss:.3e}") };
    let mut text = format!("loss      {loss} predicted");
    if let (Some(found), Some(predicted)) = (number("/overall/judged/loss"), number("/overall/judged/predicted"))
        && predicted > 0.0
    {
        text += &format!(", {:.2} times that on other prompts", found / predicted);
    }
    // Every step has its threshold; they differ only where a floor of steps holds.
    let thresholds = report.pointer("/budget/thresholds").and_then(Value::as_array);
    let values: Vec<f64> = thresholds.into_iter().flatten().filter_map(Value::as_f64).collect();
    if let (Some(&least), Some(&most)) =
        (values.iter().min_by(|a, b| a.total_cmp(b)), values.iter().max_by(|a, b| a.total_cmp(b)))
    {
        text += &format!(", blocks kept from {least:.3e}");
        if least < most {
            text += &format!(" to {most:.3e}");
        }
    }
    let (step, head) = (word("/weighed/step_weights"), word("/weighed/head_weights"));
    let weights = match (step, head) {
        ("sensitivity", "sensitivity") => "measured weights".to_owned(),
        ("sensitivity", "tempered") => "measured weights, tempered by head".to_owned(),
        _ => format!("step weights {step}, head weights {head}"),
    };
    text + &format!(" ({}, {weights})\n", word("/weighed/importance"))
}

/// Where the bytes are: one line.
pub(crate) fn sizes(bundle: &Bundle) -> String {
    let of = |prefixes: &[&str]| -> u64 {
        let sections = bundle.sections().iter();
        sections.filter(|s| prefixes.iter().any(|p| s.name.starts_with(p))).map(|s| s.stored).sum()
    };
    format!(
        "sizes     masks {}, ops and work lists {}, kernels {}, sources {}, spec and report {}\n",
        bytes(of(&["masks/"])),
        bytes(of(&["ops", "schedule", "anchors"])),
        bytes(of(&["cubin/"])),
        bytes(of(&["source/"])),
        bytes(of(&["spec", "report"])),
    )
}

/// Everything about a plan that is a few numbers.
pub(crate) fn plan_json(plan: &Plan) -> Value {
    let [dense, block_sparse, anchor_rows] = op_counts(&plan.ops);
    let model = &plan.model;
    json!({
        "model": { "name": model.name, "layers": model.layers, "heads": model.heads, "head_dim": model.head_dim },
        "geometry": GeometrySpec::from_ir(&plan.geometry),
        "tokens": plan.geometry.q_tokens(),
        "q_blocks": plan.geometry.num_q_blocks(),
        "kv_blocks": plan.geometry.num_kv_blocks(),
        "steps": plan.num_steps(),
        "sigmas": plan.sigmas,
        "sites": plan.ops.len(),
        "ops": { "dense": dense, "block_sparse": block_sparse, "anchor_rows": anchor_rows },
        "anchors": plan.anchors(),
        "masks": plan.masks.len(),
        "density": density(plan),
        "variants": plan.variants.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

/// A kernel, without its code.
pub(crate) fn kernel_json(kernel: &Kernel) -> Value {
    let r = kernel.resources;
    json!({
        "symbol": kernel.symbol,
        "family": kernel.family.to_string(),
        "arch": kernel.arch.to_string(),
        "dtype": kernel.variant.dtype.to_string(),
        "head_dim": kernel.variant.head_dim,
        "lse": kernel.variant.lse,
        "cubin_bytes": kernel.cubin.len(),
        "threads": kernel.threads,
        "registers": r.registers,
        "static_shared_bytes": r.static_shared_bytes,
        "dynamic_shared_bytes": kernel.shared_bytes,
        "stack_bytes": r.stack_bytes,
        "spill_stores": r.spill_stores,
        "spill_loads": r.spill_loads,
        "nvrtc": [kernel.nvrtc.0, kernel.nvrtc.1],
    })
}

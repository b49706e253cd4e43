//! `calibc trace check|info|merge`.

use calibc_trace::summary::EPSILONS;
use calibc_trace::{Trace, TraceError, merge as merging};
use serde_json::{Value, json};

use crate::args::{TraceArgs, TraceInfoArgs, TraceMergeArgs};
use crate::console::{Console, bytes, count};
use crate::exit::{Exit, Failure};
use crate::progress::{Bars, Unit};

/// The name of an error's variant: a stable word for scripts.
fn kind(error: &TraceError) -> String {
    let debug = format!("{error:?}");
    debug.split([' ', '{', '(']).next().unwrap_or_default().to_owned()
}

pub(crate) fn check(console: &Console, args: &TraceArgs) -> Result<Exit, Failure> {
    let bars = Bars::of(console);
    let problems = calibc_trace::check(&args.traces, &|done, total| bars.show("checking", done, total, Unit::Bytes));
    drop(bars);
    let exit = match problems.as_slice() {
        [] => Exit::Ok,
        // Where nothing but the file system is at fault, the traces may be fine.
        problems if problems.iter().all(TraceError::is_io) => Exit::Io,
        _ => Exit::BadInput,
    };
    if args.json {
        let problems: Vec<Value> =
            problems.iter().map(|p| json!({ "problem": kind(p), "message": p.to_string() })).collect();
        console.json("trace-check", json!({ "ok": problems.is_empty(), "problems": problems }))?;
        return Ok(exit);
    }
    let lines: String = problems.iter().map(|p| format!("{p}\n")).collect();
    console.data(&lines)?;
    console.note(&match problems.len() as u64 {
        0 => format!("{}: no problems", args.traces.display()),
        n => format!("{}: {}", args.traces.display(), count(n, "problem")),
    });
    Ok(exit)
}

pub(crate) fn info(console: &Console, args: &TraceInfoArgs) -> Result<Exit, Failure> {
    let bars = Bars::of(console);
    let trace = Trace::open(&args.trace.traces, &|done, total| bars.show("reading traces", done, total, Unit::Bytes))?;
    bars.finish("reading traces");
    let density = trace.density(&EPSILONS, args.rho, &|done, total| bars.show("merging", done, total, Unit::Count))?;
    drop(bars);
    let (manifest, coverage) = (trace.manifest(), trace.coverage());
    let (model, geometry) = (&manifest.model, &manifest.geometry);
    let extras: Vec<&str> = coverage.extras.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    if args.trace.json {
        let value = json!({
            "model": { "name": model.name, "layers": model.layers, "heads": model.heads, "head_dim": model.head_dim },
            "geometry": calibc_driver::spec::GeometrySpec::from_ir(geometry),
            "tokens": geometry.q_tokens(),
            "q_blocks": geometry.num_q_blocks(),
            "kv_blocks": geometry.num_kv_blocks(),
            "sigmas": manifest.sigmas,
            "encoding": manifest.encoding.name(),
            "coverage": {
                "steps": coverage.sampler_steps,
                "covered_steps": coverage.covered_steps.iter().map(|s| s.0).collect::<Vec<_>>(),
                "calibration_prompts": coverage.calibration_prompts,
                "holdout_prompts": coverage.holdout_prompts,
                "branches": coverage.branches.iter().map(|(name, steps)| json!({ "name": name, "covered_steps": steps })).collect::<Vec<_>>(),
                "shards": coverage.shards,
                "bytes": coverage.bytes,
                "extras": extras,
                "sensitivity": coverage.sensitivity,
            },
            "density": {
                "rho": density.rho,
                "epsilons": density.epsilons,
                "overall": density.overall,
                "layers": density.layers,
                "steps": density.steps.iter().map(|(s, d)| json!({ "step": s.0, "density": d })).collect::<Vec<_>>(),
            },
        });
        console.json("trace-info", value)?;
        return Ok(Exit::Ok);
    }
    let covered: Vec<String> = coverage.covered_steps.iter().map(|s| s.0.to_string()).collect();
    let branches: Vec<&str> = coverage.branches.iter().map(|(name, _)| name.as_str()).collect();
    let mut with = extras.join(", ");
    if coverage.sensitivity {
        with += if with.is_empty() { "sensitivity" } else { ", sensitivity" };
    }
    let mut text = format!(
        "{}: {} layers x {} heads x {}\n\
         grid      {geometry}, {} x {} blocks\n\
         prompts   {} calibration, {} holdout\n\
         steps     {} of {} covered: {}\n\
         energies  {}, branch {}{}\n\
         size      {} in {}\n\n\
         density at epsilon (rho {})\n{:10}",
        model.name,
        model.layers,
        model.heads,
        model.head_dim,
        geometry.num_q_blocks(),
        geometry.num_kv_blocks(),
        coverage.calibration_prompts,
        coverage.holdout_prompts,
        covered.len(),
        coverage.sampler_steps,
        covered.join(" "),
        manifest.encoding.name(),
        branches.join(", "),
        if with.is_empty() { String::new() } else { format!(", with {with}") },
        bytes(coverage.bytes),
        count(coverage.shards as u64, "shard"),
        density.rho,
        ""
    );
    density.epsilons.iter().for_each(|e| text += &format!("{e:>8}"));
    let mut row = |name: String, values: &[f64]| {
        text += &format!("\n{name:10}");
        values.iter().for_each(|d| text += &format!("{d:>8.3}"));
    };
    row("all".to_owned(), &density.overall);
    density.layers.iter().enumerate().for_each(|(l, values)| row(format!("l{l}"), values));
    density.steps.iter().for_each(|(step, values)| row(step.to_string(), values));
    text.push('\n');
    console.data(&text)?;
    Ok(Exit::Ok)
}

pub(crate) fn merge(console: &Console, args: &TraceMergeArgs) -> Result<Exit, Failure> {
    let manifest = if args.parts { merging::merge_parts(&args.out)? } else { merging::merge(&args.out, &args.traces)? };
    let (prompts, shards) = (manifest.prompts.len() as u64, manifest.shards.len() as u64);
    console.note(&format!("{}: {} in {}", args.out.display(), count(prompts, "prompt"), count(shards, "shard")));
    Ok(Exit::Ok)
}

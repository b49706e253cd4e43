//! `calibc verify` and `calibc run`.

use std::time::Instant;

use calibc_bundle::Bundle;
use calibc_ir::{LayerId, StepId, verify};
use calibc_runtime::Operand;
use calibc_runtime::cuda::Engine;
use calibc_runtime::reference;
use calibc_trace::random::SplitMix64;
use serde_json::{Value, json};

use crate::args::{Device, RunArgs, VerifyArgs};
use crate::console::{Console, count, seconds};
use crate::exit::{Exit, Failure, open_bundle};
use crate::numerics::{Comparison, compare, sample_layers};
use crate::progress::{Bars, Unit};
use crate::tensors::{Tensor, read_qkv, write_out};

pub(crate) fn verify(console: &Console, args: &VerifyArgs) -> Result<Exit, Failure> {
    // Opening checks every byte and runs the verifier on the plan; what follows is what a bundle may lack and still be sound.
    let bundle = open_bundle(&args.bundle)?;
    let plan = bundle.plan();
    let mut problems: Vec<String> = verify::verify(plan).err().into_iter().flatten().map(|e| e.to_string()).collect();
    if plan.schedule.is_none() {
        problems.push("the plan has no work lists; compile it again".to_owned());
    }
    for variant in &plan.variants {
        if !bundle.kernels().iter().any(|kernel| kernel.variant == *variant) {
            problems.push(format!("no kernel for variant {variant}; compile it again"));
        }
    }
    let comparisons = if args.numerics && problems.is_empty() { numerics(console, args, &bundle)? } else { Vec::new() };
    let failed = comparisons.iter().filter(|c| !c.passes()).count() as u64;
    let exit = if problems.is_empty() && failed == 0 { Exit::Ok } else { Exit::Negative };
    if args.json {
        let layers: Vec<Value> = comparisons
            .iter()
            .map(|c| {
                json!({
                    "step": c.step.0, "layer": c.layer.0, "heads": c.heads, "rows": c.rows, "kernel": c.kernel,
                    "error": c.error, "tolerance": c.tolerance, "lse_error": c.lse_error, "ok": c.passes(),
                })
            })
            .collect();
        let value = json!({
            "ok": exit == Exit::Ok, "digest": bundle.digest(), "problems": problems,
            "numerics": if args.numerics { json!({ "device": device(args.device), "layers": layers }) } else { Value::Null },
        });
        console.json("verify", value)?;
        return Ok(exit);
    }
    let mut text: String = problems.iter().map(|p| format!("{p}\n")).collect();
    if problems.is_empty() {
        let (sites, sections) = (plan.ops.len() as u64, bundle.sections().len() as u64);
        text += &format!(
            "ok      digests of {}, {}, {}\n",
            count(sections, "section"),
            count(sites, "site"),
            count(bundle.kernels().len() as u64, "kernel")
        );
    }
    for c in &comparisons {
        let heads = match c.heads.as_slice() {
            [head] => format!(".h{head}"),
            heads => format!(" ({} heads)", heads.len()),
        };
        text += &format!(
            "{}  {}.{}{heads} by {}, {} rows: relative error {:.1e} (at most {:.0e}){}\n",
            if c.passes() { "ok    " } else { "DIFFER" },
            c.step,
            c.layer,
            c.kernel.as_deref().unwrap_or("the reference"),
            c.rows,
            c.error,
            c.tolerance,
            c.lse_error.map_or(String::new(), |error| format!(", lse off by {error:.1e}")),
        );
    }
    console.data(&text)?;
    Ok(exit)
}

fn device(device: Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda => "cuda",
    }
}

fn numerics(console: &Console, args: &VerifyArgs, bundle: &Bundle) -> Result<Vec<Comparison>, Failure> {
    let mut random = SplitMix64::new(args.seed);
    let layers = sample_layers(bundle.plan(), args.samples, &mut random);
    // On the GPU every variant is tried; on the CPU there is one way to compute.
    let engine = match args.device {
        Device::Cpu => None,
        Device::Cuda => Some(Engine::new(0, bundle)?),
    };
    let backends: Vec<_> = match &engine {
        None => vec![None],
        Some(engine) => bundle.plan().variants.iter().map(|&variant| Some((engine, variant))).collect(),
    };
    let bars = Bars::of(console);
    let total = (layers.len() * backends.len()) as u64;
    let mut comparisons = Vec::new();
    for &layer in &layers {
        for &backend in &backends {
            bars.show("comparing", comparisons.len() as u64, total, Unit::Count);
            comparisons.push(compare(bundle, backend, layer, &mut random)?);
        }
    }
    Ok(comparisons)
}

pub(crate) fn run(console: &Console, args: &RunArgs) -> Result<Exit, Failure> {
    let bundle = open_bundle(&args.bundle)?;
    let [q, k, v] = read_qkv(&args.input, args.tokens_major)?;
    let start = Instant::now();
    let (out, lse) = match args.device {
        Device::Cpu => {
            let views = [q.view(Operand::Q)?, k.view(Operand::K)?, v.view(Operand::V)?];
            let [qv, kv, vv] = &views;
            let options = reference::Options { softmax_scale: args.scale, round_to: None };
            let (step, layer) = (StepId(args.step), LayerId(args.layer));
            let output = reference::attention(bundle.plan(), step, layer, qv, kv, vv, &options)?;
            (Tensor::from_f32(output.out, output.shape, &q), Some(output.lse))
        }
        Device::Cuda => {
            let dtypes = [&q, &k, &v].map(Tensor::dtype);
            if dtypes[0].is_none() || dtypes.iter().any(|dtype| *dtype != dtypes[0]) {
                return Err(Failure::bad_input("on cuda q, k and v must be all BF16 or all F16"));
            }
            let engine = Engine::new(0, &bundle)?;
            crate::gpu::attention(&engine, args.step, args.layer, [&q, &k, &v], args.lse, args.scale)?
        }
    };
    let [batch, heads, tokens, _] = out.shape;
    let lse = lse.as_deref().filter(|_| args.lse).map(|lse| (lse, [batch, heads, tokens]));
    write_out(&args.output, &out, lse)?;
    console.note(&format!(
        "s{}.l{}: {batch} x {heads} heads x {tokens} tokens on {} in {} -> {}",
        args.step,
        args.layer,
        device(args.device),
        seconds(start.elapsed()),
        args.output.display()
    ));
    Ok(Exit::Ok)
}

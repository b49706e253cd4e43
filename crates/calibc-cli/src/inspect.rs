//! `calibc inspect` and `calibc export`.

use calibc_bundle::Bundle;
use calibc_ir::{AttnOp, BlockMask, Plan, Site};
use serde_json::{Value, json};

use crate::args::{ExportArgs, InspectArgs};
use crate::console::{Console, bytes};
use crate::describe;
use crate::exit::{Exit, Failure, open_bundle};

/// Widest drawing of a mask, in characters.
const WIDTH: u32 = 128;

pub(crate) fn inspect(console: &Console, args: &InspectArgs) -> Result<Exit, Failure> {
    let bundle = open_bundle(&args.bundle)?;
    if let (Some(step), Some(layer), Some(head)) = (args.step, args.layer, args.head) {
        draw(console, bundle.plan(), Site::new(step, layer, head), args.json)?;
    } else if args.spec {
        console.data(bundle.spec())?;
    } else if args.plan {
        console.data(&bundle.plan().to_string())?;
    } else if args.json {
        console.json("bundle", whole_json(&bundle))?;
    } else {
        console.data(&whole(&bundle))?;
    }
    Ok(Exit::Ok)
}

fn whole(bundle: &Bundle) -> String {
    let plan = bundle.plan();
    let mut text = describe::head(plan);
    text += &describe::sites(plan);
    text += &describe::budget(bundle.report());
    text += &describe::recall(bundle.report());
    text += &describe::warnings(bundle.report());
    text += &describe::sizes(bundle);
    text += &format!(
        "bundle    {}, format {}, calibc {}, blake3 {}\n\nkernels\n",
        bytes(bundle.file_len()),
        calibc_bundle::FORMAT_VERSION,
        bundle.calibc_version(),
        bundle.digest()
    );
    for kernel in bundle.kernels() {
        let r = kernel.resources;
        text += &format!(
            "  {:48} {:7} {:3} registers, {:6} B shared, {} B spilled, {:>7}, NVRTC {}.{}\n",
            kernel.symbol,
            kernel.arch.to_string(),
            r.registers,
            kernel.shared_bytes + r.static_shared_bytes,
            r.spill_stores + r.spill_loads,
            bytes(kernel.cubin.len() as u64),
            kernel.nvrtc.0,
            kernel.nvrtc.1
        );
    }
    for (title, prefix, groups) in [("layer", "l", "/layers"), ("step", "s", "/steps")] {
        let loss = bundle.report().pointer("/overall/loss").and_then(Value::as_f64);
        let groups = bundle.report().pointer(groups).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        // Shares add up to 1: where the work went, and where the loss is left.
        let work: f64 = groups.iter().filter_map(|group| group["density"].as_f64()).sum();
        text += &format!("\n{title:6} density  work");
        text += if loss.is_some() { "  loss" } else { "" };
        text += "  recall    p5  worst   dense sparse anchors\n";
        for (i, group) in groups.iter().enumerate() {
            let number = |at: &str| group.pointer(at).and_then(Value::as_f64);
            let shown = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.3}"));
            let ops = |at: &str| group.pointer(at).and_then(Value::as_u64).unwrap_or(0);
            let percent = |part: Option<f64>, of: f64| {
                part.filter(|_| of > 0.0).map_or("-".to_owned(), |part| format!("{:.1}%", 100.0 * part / of))
            };
            text += &format!(
                "{:6} {:>7} {:>5}",
                format!("{prefix}{i}"),
                shown(number("/density")),
                percent(number("/density"), work)
            );
            if let Some(loss) = loss {
                text += &format!(" {:>5}", percent(number("/loss"), loss));
            }
            text += &format!(
                " {:>7} {:>5} {:>6} {:>7} {:>6} {:>7}\n",
                shown(number("/recall/mean")),
                shown(number("/recall/p5")),
                shown(number("/recall/worst/recall")),
                ops("/ops/dense"),
                ops("/ops/block_sparse"),
                ops("/ops/anchor_rows"),
            );
        }
    }
    text + "\nsections and the effective spec: --json, --spec; the plan as text: --plan; a mask: --step --layer --head\n"
}

fn whole_json(bundle: &Bundle) -> Value {
    let mut value = describe::plan_json(bundle.plan());
    let sections: Vec<Value> = bundle
        .sections()
        .iter()
        .map(|s| json!({ "name": s.name, "stored": s.stored, "raw": s.raw, "codec": format!("{:?}", s.codec).to_lowercase() }))
        .collect();
    let more = json!({
        "format_version": calibc_bundle::FORMAT_VERSION,
        "calibc": bundle.calibc_version(),
        "digest": bundle.digest(),
        "bytes": bundle.file_len(),
        "kernels": bundle.kernels().iter().map(describe::kernel_json).collect::<Vec<_>>(),
        "sections": sections,
        "report": bundle.report(),
        "spec": bundle.spec(),
    });
    describe::merge(&mut value, more);
    value
}

/// Draws what `site` computes.
fn draw(console: &Console, plan: &Plan, site: Site, as_json: bool) -> Result<(), Failure> {
    let model = &plan.model;
    for (what, index, count) in [
        ("step", site.step.0, plan.num_steps()),
        ("layer", site.layer.0, model.layers),
        ("head", site.head.0, model.heads),
    ] {
        if index >= count {
            return Err(Failure::usage(format_args!("there is no {what} {index}; the plan has {count}, from 0")));
        }
    }
    let op = plan.op(site);
    let (rows, cols) = (plan.geometry.num_q_blocks(), plan.geometry.num_kv_blocks());
    let (mask, shared) = match op {
        AttnOp::BlockSparse { mask } => {
            let same = plan.ops.iter().filter(|other| **other == op).count();
            (Some(&plan.masks[mask]), same - 1)
        }
        _ => (None, 0),
    };
    if as_json {
        let value = json!({
            "site": site.to_string(),
            "op": op.to_string(),
            "density": plan.density(op),
            "shared_with": shared,
            "q_blocks": rows,
            "kv_blocks": cols,
            "mask": mask.map(|mask| (0..rows).map(|r| line(mask, r)).collect::<Vec<_>>()),
        });
        return console.json("mask", value);
    }
    let mut text = format!("{site}: {op}, {rows} x {cols} blocks, density {:.3}", plan.density(op));
    if shared > 0 {
        text += &format!(", shared with {shared} more");
    }
    text.push('\n');
    match mask {
        Some(mask) => text += &drawing(mask),
        None if op == AttnOp::Dense => text += "every block is kept\n",
        None => {
            text += "queries of the anchor rows attend to every block; their outputs are copied to the rows nearest to them\n"
        }
    }
    console.data(&text)
}

fn line(mask: &BlockMask, r: u32) -> String {
    (0..mask.cols()).map(|c| if mask.get(r, c) { '#' } else { '.' }).collect()
}

/// One character per block; where that is too wide, one per square of blocks, by the share kept.
fn drawing(mask: &BlockMask) -> String {
    let side = mask.cols().div_ceil(WIDTH).max(1);
    if side == 1 {
        return (0..mask.rows()).map(|r| line(mask, r) + "\n").collect();
    }
    let mut text = format!(
        "each character is {side} x {side} blocks: `.` none, `-` under a third, `+` under two, `*` more, `#` all\n"
    );
    for top in (0..mask.rows()).step_by(side as usize) {
        for left in (0..mask.cols()).step_by(side as usize) {
            let (bottom, right) = ((top + side).min(mask.rows()), (left + side).min(mask.cols()));
            let all = (bottom - top) * (right - left);
            let kept = (top..bottom).map(|r| (left..right).filter(|&c| mask.get(r, c)).count() as u32).sum::<u32>();
            text.push(match kept {
                0 => '.',
                kept if kept == all => '#',
                kept if kept * 3 < all => '-',
                kept if kept * 3 < all * 2 => '+',
                _ => '*',
            });
        }
        text.push('\n');
    }
    text
}

pub(crate) fn export(console: &Console, args: &ExportArgs) -> Result<Exit, Failure> {
    let bundle = open_bundle(&args.bundle)?;
    let size = calibc_driver::masks::write(bundle.plan(), &args.masks)?;
    console.note(&format!("{} ({})", args.masks.display(), bytes(size)));
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_masks_are_drawn_block_by_block_and_wide_ones_by_squares() {
        let mask = BlockMask::from_fn(3, 4, |r, c| c <= r);
        assert_eq!(drawing(&mask), "#...\n##..\n###.\n");
        let kept = |r: u32, c: u32| match c {
            0 | 1 => true,
            2 | 3 => r == 0,
            4 | 5 => c == 4 || r.is_multiple_of(2),
            6 => !r.is_multiple_of(2),
            _ => false,
        };
        let mask = BlockMask::from_fn(4, 200, kept);
        let text = drawing(&mask);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!((lines.len(), lines[0].len()), (2, 100));
        assert_eq!((&lines[0][..5], &lines[1][..5]), ("#+*-.", "#.*-."));
    }
}

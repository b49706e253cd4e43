//! Every other command.

use std::process::Stdio;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::support::*;

#[test]
fn traces_are_checked_and_described() {
    let bench = Bench::bare();
    calibc_trace::planted::Planted::default().write(&bench.path("traces")).unwrap();
    let good = bench.ok(&["trace", "check", "traces"]);
    assert_eq!(good.stdout, "");
    assert!(bench.ok(&["trace", "check", "traces", "--json"]).json("trace-check")["ok"].as_bool().unwrap());
    let info = bench.ok(&["trace", "info", "traces"]);
    for word in
        ["4x16x16 = 1024 tokens", "3 calibration, 1 holdout", "2 of 4 covered: 0 2", "log2-u8", "0.95", "l1", "s2"]
    {
        assert!(info.stdout.contains(word), "no {word}: {}", info.stdout);
    }
    let json = bench.ok(&["trace", "info", "traces", "--json"]).json("trace-info");
    assert_eq!(json["density"]["layers"].as_array().unwrap().len(), 2);
    assert_eq!(json["coverage"]["covered_steps"], serde_json::json!([0, 2]));
    // All problems are listed, not the first alone.
    for shard in ["p000/s000", "p002/s002"] {
        let path = bench.path(&format!("traces/{shard}.cond.safetensors"));
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    std::fs::remove_file(bench.path("traces/p001/s000.cond.safetensors")).unwrap();
    let bad = bench.run(&["trace", "check", "traces"]).expect(BAD_INPUT);
    assert_eq!(bad.stdout.lines().count(), 3, "{}", bad.stdout);
    assert!(bad.stderr.contains("3 problems"), "{}", bad.stderr);
    let json = bench.run(&["trace", "check", "traces", "--json"]).expect(BAD_INPUT).json("trace-check");
    let problems: Vec<_> = json["problems"].as_array().unwrap().iter().map(|p| p["problem"].clone()).collect();
    assert_eq!(problems, ["DigestMismatch", "FileMissing", "DigestMismatch"]);
    bench.run(&["trace", "info", "traces"]).expect(BAD_INPUT);
    bench.run(&["trace", "check", "nosuch"]).expect(IO);
}

#[test]
fn bundles_are_described_and_drawn() {
    let Some(bench) = Bench::new() else { return };
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    let text = bench.ok(&["inspect", "plan.bundle"]).stdout;
    for word in ["registers", "0 B spilled", "layer  density  work  recall", "s3", "blake3"] {
        assert!(text.contains(word), "no {word}: {text}");
    }
    let json = bench.ok(&["inspect", "plan.bundle", "--json"]).json("bundle");
    assert_eq!(json["sites"], 32);
    assert_eq!(json["kernels"].as_array().unwrap().len(), 8);
    let stored: u64 = json["sections"].as_array().unwrap().iter().map(|s| s["stored"].as_u64().unwrap()).sum();
    assert!(stored < json["bytes"].as_u64().unwrap());
    let density = json["density"].as_f64().unwrap();
    assert!((density - json["report"]["overall"]["density"].as_f64().unwrap()).abs() < 1e-12);
    let plan = calibc_ir::text::parse(&bench.ok(&["inspect", "plan.bundle", "--plan"]).stdout).unwrap();
    // Every site's drawing says what the plan says.
    for site in plan.sites() {
        let [s, l, h] = [site.step.0, site.layer.0, site.head.0].map(|n| n.to_string());
        let args = ["inspect", "plan.bundle", "--json", "--step", &s, "--layer", &l, "--head", &h];
        let drawn = bench.ok(&args).json("mask");
        assert_eq!(drawn["op"], plan.op(site).to_string());
        if let calibc_ir::AttnOp::BlockSparse { mask } = plan.op(site) {
            for r in 0..8 {
                let row = drawn["mask"][r as usize].as_str().unwrap().chars().map(|c| c == '#');
                assert!(row.eq((0..8).map(|c| plan.masks[mask].get(r, c))), "{site} row {r}");
            }
        }
    }
    let drawn = bench.ok(&["inspect", "plan.bundle", "--step", "0", "--layer", "1", "--head", "2"]).stdout;
    assert!(drawn.starts_with("s0.l1.h2: "), "{drawn}");
    bench.run(&["inspect", "plan.bundle", "--step", "4", "--layer", "0", "--head", "0"]).expect(USAGE);
    bench.run(&["inspect", "plan.bundle", "--step", "0"]).expect(USAGE);
    bench.run(&["inspect", "nosuch.bundle"]).expect(IO);
    bench.run(&["inspect", "traces/manifest.json"]).expect(BAD_INPUT);
}

#[test]
fn bundles_are_verified() {
    let Some(bench) = Bench::new() else { return };
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    bench.ok(&["verify", "plan.bundle"]);
    let json = bench.ok(&["verify", "plan.bundle", "--numerics", "--samples", "4", "--json"]).json("verify");
    let layers = json["numerics"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 4);
    assert!(layers.iter().all(|l| l["ok"] == true && l["error"].as_f64().unwrap() < 1e-5));
    // Another seed, other inputs; the same seed, the same numbers.
    let numerics = |seed: &str| bench.ok(&["verify", "plan.bundle", "--numerics", "--seed", seed]).stdout;
    assert_eq!(numerics("5"), numerics("5"));
    assert_ne!(numerics("5"), numerics("6"));
    // A plan with text behind the video, of which callers may bring less.
    let mut joint = calibc_trace::planted::Planted { seed: 9, ..Default::default() };
    (joint.geometry.text_tokens, joint.geometry.text_position) = (150, calibc_ir::TextPosition::After);
    joint.write(&bench.path("joint")).unwrap();
    bench.ok(&["compile", "joint", "-o", "joint.bundle", "-q"]);
    bench.ok(&["verify", "joint.bundle", "--numerics", "--samples", "6"]);
    // Any flipped byte is found.
    let bytes = bench.bytes("plan.bundle");
    for at in (0..bytes.len()).step_by(bytes.len() / 23) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        std::fs::write(bench.path("flipped.bundle"), flipped).unwrap();
        let ended = bench.run(&["verify", "flipped.bundle"]).expect(BAD_INPUT);
        assert!(ended.stderr.starts_with("error: "), "byte {at}: {}", ended.stderr);
    }
    std::fs::write(bench.path("short.bundle"), &bytes[..bytes.len() / 2]).unwrap();
    bench.run(&["verify", "short.bundle"]).expect(BAD_INPUT);
    // Sound, but nothing could run it: a negative result.
    let bundle = calibc_bundle::Bundle::parse(&bytes).unwrap();
    let contents = calibc_bundle::Contents {
        plan: bundle.plan(),
        kernels: &[],
        spec: bundle.spec(),
        report: bundle.report(),
        calibc_version: bundle.calibc_version(),
    };
    std::fs::write(bench.path("hollow.bundle"), calibc_bundle::encode(&contents).unwrap()).unwrap();
    let hollow = bench.run(&["verify", "hollow.bundle"]).expect(NEGATIVE);
    assert!(hollow.stdout.contains("no kernel for variant calibc_attn_bf16_hd64"), "{}", hollow.stdout);
    bench.run(&["verify", "plan.bundle", "--samples", "2"]).expect(USAGE);
    bench.run(&["verify", "plan.bundle", "--numerics", "--samples", "0"]).expect(USAGE);
}

/// q, k and v of `[batch, heads, tokens, dim]` with values that depend on the logical index alone.
fn qkv(path: &std::path::Path, dtype: Dtype, shape: [usize; 4], tokens_major: bool) {
    let [b, n, s, d] = shape;
    let element = |tensor: usize, i: [usize; 4]| {
        let z = [tensor, i[0], i[1], i[2], i[3]]
            .iter()
            .fold(7u64, |z, &x| (z ^ x as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23));
        ((z >> 40) as f32 / (1 << 24) as f32 - 0.5) * 2.0
    };
    let tensor = |which: usize| {
        let mut bytes = Vec::new();
        let mut push = |i: [usize; 4]| match dtype {
            Dtype::F32 => bytes.extend(element(which, i).to_le_bytes()),
            Dtype::F16 => bytes.extend(half::f16::from_f32(element(which, i)).to_le_bytes()),
            _ => bytes.extend(half::bf16::from_f32(element(which, i)).to_le_bytes()),
        };
        for b in 0..b {
            for (x, y) in if tokens_major {
                (0..s).flat_map(|s| (0..n).map(move |n| (n, s))).collect::<Vec<_>>()
            } else {
                (0..n).flat_map(|n| (0..s).map(move |s| (n, s))).collect()
            } {
                (0..d).for_each(|d| push([b, x, y, d]));
            }
        }
        bytes
    };
    let stored = if tokens_major { vec![b, s, n, d] } else { vec![b, n, s, d] };
    let data = [tensor(0), tensor(1), tensor(2)];
    let views = ["q", "k", "v"]
        .into_iter()
        .zip(&data)
        .map(|(name, data)| (name, TensorView::new(dtype, stored.clone(), data).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

#[test]
fn a_layer_runs_on_tensors_of_a_file() {
    let Some(bench) = Bench::new() else { return };
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    let run = |input: &str, output: &str, more: &[&str]| {
        let args = ["run", "plan.bundle", "--step", "1", "--layer", "1", "--input", input, "-o", output];
        bench.run(&[&args[..], more].concat())
    };
    let shape = [2, 4, 1024, 64];
    qkv(&bench.path("a"), Dtype::F32, shape, false);
    qkv(&bench.path("b"), Dtype::F32, shape, true);
    run("a", "a.out", &["--lse"]).expect(OK);
    run("b", "b.out", &["--tokens-major"]).expect(OK);
    let (a, b) = (bench.bytes("a.out"), bench.bytes("b.out"));
    let (a, b) = (SafeTensors::deserialize(&a).unwrap(), SafeTensors::deserialize(&b).unwrap());
    let lse = a.tensor("lse").unwrap();
    assert_eq!((lse.dtype(), lse.shape()), (Dtype::F32, &[2, 4, 1024][..]));
    assert!(b.tensor("lse").is_err(), "only where it is asked for");
    let (a, b) = (a.tensor("out").unwrap(), b.tensor("out").unwrap());
    assert_eq!((a.shape(), b.shape()), (&shape[..], &[2, 1024, 4, 64][..]));
    let row = |view: &TensorView<'_>, at: usize| view.data()[at * 256..][..256].to_vec();
    for (batch, head, token) in [(0, 0, 0), (0, 3, 1023), (1, 2, 517), (1, 1, 128)] {
        let (at, swapped) = ((batch * 4 + head) * 1024 + token, (batch * 1024 + token) * 4 + head);
        assert_eq!(row(&a, at), row(&b, swapped), "{batch} {head} {token}");
    }
    for dtype in [Dtype::BF16, Dtype::F16] {
        qkv(&bench.path("half"), dtype, [1, 4, 1024, 64], false);
        run("half", "half.out", &["--scale", "0.2"]).expect(OK);
        let half = bench.bytes("half.out");
        assert_eq!(SafeTensors::deserialize(&half).unwrap().tensor("out").unwrap().dtype(), dtype);
    }
    // What does not fit is refused, in words, and writes nothing.
    let refuse = |input: &str, more: &[&str], code: i32, words: &str| {
        let ended = run(input, "no.out", more).expect(code);
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
        assert!(!bench.path("no.out").exists());
    };
    qkv(&bench.path("heads"), Dtype::F32, [1, 3, 1024, 64], false);
    refuse("heads", &[], BAD_INPUT, "head");
    qkv(&bench.path("tokens"), Dtype::F32, [1, 4, 1000, 64], false);
    refuse("tokens", &[], BAD_INPUT, "1000");
    qkv(&bench.path("dim"), Dtype::F32, [1, 4, 1024, 32], false);
    refuse("dim", &[], BAD_INPUT, "32");
    refuse("a", &["--tokens-major"], BAD_INPUT, "head");
    refuse("a", &["--scale", "-1"], USAGE, "");
    refuse("a", &["--scale=-1"], BAD_INPUT, "softmax scale");
    refuse("a", &["--device", "cuda"], BAD_INPUT, "BF16");
    refuse("nosuch", &[], IO, "nosuch");
    refuse("traces/manifest.json", &[], BAD_INPUT, "safetensors");
    refuse("a.out", &[], BAD_INPUT, "no tensor `q`, only lse, out");
    let beyond = ["run", "plan.bundle", "--step", "4", "--layer", "0", "--input", "a", "-o", "no.out"];
    bench.run(&beyond).expect(BAD_INPUT);
}

#[test]
fn a_missing_gpu_is_told_as_such() {
    let Some(bench) = Bench::new() else { return };
    if calibc_runtime::cuda::Device::count().is_ok_and(|n| n > 0) {
        return skip("a_missing_gpu_is_told_as_such", "there is a GPU");
    }
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    bench.run(&["verify", "plan.bundle", "--numerics", "--device", "cuda"]).expect(ENVIRONMENT);
    qkv(&bench.path("half"), Dtype::BF16, [1, 4, 1024, 64], false);
    let run = ["run", "plan.bundle", "--step", "0", "--layer", "0", "--input", "half", "-o", "out", "--device", "cuda"];
    bench.run(&run).expect(ENVIRONMENT);
    for more in [&[][..], &["--json", "--batch", "2", "--layout", "bshd", "--dtype", "fp16", "--lse"]] {
        let timed = bench.run(&[&["bench", "plan.bundle"], more].concat()).expect(ENVIRONMENT);
        assert!(timed.stdout.is_empty() && timed.stderr.starts_with("error: no CUDA d"), "{}", timed.stderr);
    }
}

#[test]
fn layers_are_timed_where_there_is_a_gpu() {
    let Some(bench) = Bench::new() else { return };
    match calibc_runtime::cuda::Device::count() {
        Ok(n) if n > 0 => {}
        Ok(_) => return skip("layers_are_timed_where_there_is_a_gpu", "no CUDA device"),
        Err(error) => return skip("layers_are_timed_where_there_is_a_gpu", &error.to_string()),
    }
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    let json = bench.ok(&["bench", "plan.bundle", "--json", "--rounds", "3", "--batch", "2"]).json("bench");
    let layers = json["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 5);
    let at: Vec<_> = layers.iter().map(|l| (l["step"].as_u64().unwrap(), l["layer"].as_u64().unwrap())).collect();
    assert!(at.is_sorted(), "{at:?}");
    for row in layers.iter().chain([&json["dense"]]) {
        let number = |at: &str| row.pointer(at).and_then(serde_json::Value::as_f64).unwrap();
        assert!(
            0.0 < number("/ms/min") && number("/ms/min") <= number("/ms/max") && number("/tflops") > 0.0,
            "{row:#}"
        );
    }
    for residency in ["all_steps", "window"] {
        let host = &json["host"][residency];
        assert!(host["calls"].as_u64().unwrap() >= 1000 && host["median_us"].as_f64().unwrap() > 0.0, "{host:#}");
    }
    let text = bench.ok(&["bench", "plan.bundle", "--rounds", "2", "--step", "1", "--layer", "0"]).stdout;
    assert!(text.contains("\ns1.l0 ") && text.contains("\ndense ") && text.contains("us median"), "{text}");
}

#[test]
fn a_bench_is_turned_down_before_any_gpu_is_looked_for() {
    let Some(bench) = Bench::new() else { return };
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    for wrong in [
        &["--rounds", "0"][..],
        &["--samples", "0"],
        &["--batch", "0"],
        &["--layout", "bdsh"],
        &["--dtype", "fp8"],
        &["--step", "4"],
        &["--step", "0,1,9"],
        &["--layer", "2"],
    ] {
        let ended = bench.run(&[&["bench", "plan.bundle"], wrong].concat()).expect(USAGE);
        assert!(!ended.stderr.is_empty(), "{wrong:?}");
    }
    bench.run(&["bench"]).expect(USAGE);
    bench.run(&["bench", "nosuch.bundle"]).expect(IO);
    bench.run(&["bench", "traces/manifest.json"]).expect(BAD_INPUT);
}

#[test]
fn the_doctor_tells_what_is_there() {
    let bench = Bench::bare();
    let missing = bench.run(&["doctor"]).expect(ENVIRONMENT);
    assert!(missing.stdout.contains("missing  no usable libnvrtc"), "{}", missing.stdout);
    let json = bench.run(&["doctor", "--json"]).expect(ENVIRONMENT).json("doctor");
    assert_eq!(json["can_compile"], false);
    let Some(bench) = Bench::new() else { return };
    let json = bench.ok(&["doctor", "--json", "--cache-dir", "fresh"]).json("doctor");
    assert_eq!(json["can_compile"], true);
    assert_eq!(json["cache"]["entries"], 0);
    assert!(json["nvrtc"]["version"][0].as_u64().unwrap() >= 12);
    assert!(!bench.path("fresh").exists(), "looking creates nothing");
    assert!(bench.ok(&["doctor"]).stdout.contains("ok       NVRTC"));
}

#[test]
fn the_cache_is_listed_and_cleared() {
    let Some(bench) = Bench::new() else { return };
    let dir = bench.path("cache");
    let cache = dir.to_str().unwrap();
    let with = |args: &[&str]| bench.ok(&[args, &["--cache-dir", cache]].concat());
    assert_eq!(with(&["cache", "dir"]).stdout, format!("{cache}\n"));
    assert_eq!(with(&["cache", "ls"]).stdout, "");
    with(&["cache", "clear"]);
    let spec = "target: {dtypes: [bf16], lse: false, archs: [sm_80]}\n";
    bench.file("one.yaml", spec);
    with(&["compile", "traces", "-o", "plan.bundle", "-q", "--spec", "one.yaml"]);
    let listed = with(&["cache", "ls"]);
    assert_eq!(listed.stdout.lines().count(), 1);
    assert!(listed.stdout.contains("calibc_attn_bf16_hd64"), "{}", listed.stdout);
    let entries = with(&["cache", "ls", "--json"]).json("cache");
    assert_eq!(entries["entries"][0]["arch"], "sm_80");
    with(&["cache", "clear"]);
    assert_eq!(with(&["cache", "ls"]).stdout, "");
    // A cache that cannot be is an error where it is the subject, and a warning where it only helps.
    bench.file("file", "");
    bench.run(&["cache", "ls", "--cache-dir", "file"]).expect(IO);
}

#[test]
fn texts_for_other_tools() {
    let bench = Bench::bare();
    let schema: serde_json::Value = serde_json::from_str(&bench.ok(&["schema"]).stdout).unwrap();
    assert!(schema["properties"]["policy"].is_object());
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(bench.ok(&["completions", shell]).stdout.contains("calibc"), "{shell}");
    }
    bench.run(&["completions", "tcsh"]).expect(USAGE);
    assert_eq!(bench.ok(&["--version"]).stdout, format!("calibc {}\n", env!("CARGO_PKG_VERSION")));
    assert!(bench.ok(&["--help"]).stdout.contains("Exit codes"));
    bench.run(&[]).expect(USAGE);
    bench.run(&["nosuch"]).expect(USAGE);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let bench = Bench::bare();
    let mut child = bench.command(&["schema"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Closed before anything is read: a pipe holds less than the schema only on odd systems, so the first write may succeed.
    drop(child.stdout.take());
    let ended = ended(child.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(OK), ""));
}

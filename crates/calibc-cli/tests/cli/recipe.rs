//! The masks of the compiler against an independent implementation of the recipe (tests/python/recipe.py), bit for bit.

use std::path::{Path, PathBuf};
use std::process::Command;

use calibc_ir::{Geometry, Layout, Model, TextPosition};
use calibc_trace::Encoding;
use calibc_trace::planted::Planted;

use crate::support::*;

/// A Python with NumPy: `CALIBC_PYTHON`, else the system's. Told on stderr where there is none; `CALIBC_REQUIRE_PYTHON=1`
/// makes that an error.
fn python(test: &str) -> Option<PathBuf> {
    let named = std::env::var_os("CALIBC_PYTHON").map(PathBuf::from);
    let found = named.into_iter().chain([PathBuf::from("python3")]).find(|python| {
        Command::new(python).args(["-c", "import numpy"]).output().is_ok_and(|output| output.status.success())
    });
    if found.is_none() {
        let required = std::env::var_os("CALIBC_REQUIRE_PYTHON").is_some_and(|value| value == "1");
        assert!(!required, "CALIBC_REQUIRE_PYTHON=1, but there is no Python 3 with NumPy");
        skip(test, "no Python 3 with NumPy; run `cargo xtask provision`, or name one with CALIBC_PYTHON");
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Compiles `traces` with `spec` and compares with the recipe under the same constants.
#[track_caller]
fn compare(bench: &Bench, python: &Path, traces: &Path, spec: &str, constants: &[&str]) {
    // Masks need no kernels: the plan is enough, but the exporter wants a bundle, so one small kernel is made.
    bench.file("spec.yaml", &format!("target: {{dtypes: [bf16], lse: false, archs: [sm_80]}}\n{spec}"));
    let traces = traces.to_str().unwrap();
    bench.ok(&["compile", traces, "-o", "plan.bundle", "-q", "--spec", "spec.yaml"]);
    bench.ok(&["export", "plan.bundle", "--masks", "got.safetensors", "-q"]);
    let recipe = root().join("tests/python/recipe.py");
    let run = |args: &[&str]| {
        ended(Command::new(python).arg(&recipe).args(args).current_dir(bench.path("")).output().unwrap()).expect(OK)
    };
    run(&[&[traces, "-o", "want.safetensors"], constants].concat());
    run(&["--compare", "got.safetensors", "want.safetensors"]);
}

#[test]
fn masks_of_the_example_traces_are_the_recipes() {
    let Some(python) = python("masks_of_the_example_traces_are_the_recipes") else { return };
    let Some(bench) = Bench::new() else { return };
    compare(&bench, &python, &root().join("examples/traces"), "", &[]);
}

#[test]
fn masks_of_planted_traces_are_the_recipes() {
    let Some(python) = python("masks_of_planted_traces_are_the_recipes") else { return };
    let Some(bench) = Bench::new() else { return };
    let text = |text_tokens, text_position, geometry| Geometry { text_tokens, text_position, ..geometry };
    let cases = [
        // Text before, ragged last block, every step covered.
        (
            Planted {
                geometry: text(77, TextPosition::Before, Geometry::video(3, 11, 13)),
                covered: vec![0, 1, 2, 3],
                calibration: 4,
                seed: 2,
                ..Planted::default()
            },
            "",
            vec![],
        ),
        // Text after, tiles, exact votes, one prompt more than half.
        (
            Planted {
                geometry: Geometry {
                    layout: Layout::Tile([2, 4, 4]),
                    ..text(200, TextPosition::After, Geometry::video(3, 10, 17))
                },
                num_steps: 9,
                covered: vec![1, 4, 7],
                calibration: 5,
                holdout: 2,
                encoding: Encoding::F16,
                seed: 3,
                ..Planted::default()
            },
            "policy: {kind: calibatt, rho: 0.6, repetition: {gamma: 0.5}}\n",
            vec!["--rho", "0.6", "--gamma", "0.5"],
        ),
        // f32, other constants, no anchors, a single prompt, seven heads.
        (
            Planted {
                model: Model { name: "odd".into(), layers: 3, heads: 7, head_dim: 128 },
                geometry: Geometry::video(5, 9, 15),
                num_steps: 4,
                covered: vec![0, 3],
                calibration: 1,
                holdout: 0,
                encoding: Encoding::F32,
                anchor_counts: vec![],
                seed: 4,
                ..Planted::default()
            },
            "policy: {kind: calibatt, schedule: distilled, repetition: off}\n",
            vec!["--a", "0.763", "--c", "0.863", "--k", "5.64", "--anchors", "0"],
        ),
        // Very strict votes over few blocks: rows that nobody agrees on.
        (
            Planted { calibration: 9, seed: 5, ..Planted::default() },
            "policy: {kind: calibatt, rho: 1.0, schedule: {a_base: 0.05, a_per_token: 0, c: 0.2, k: 1}}\n",
            vec!["--rho", "1.0", "--a", "0.05", "--c", "0.2", "--k", "1"],
        ),
    ];
    for (i, (planted, spec, constants)) in cases.into_iter().enumerate() {
        let traces = bench.path(&format!("planted{i}"));
        planted.write(&traces).unwrap();
        compare(&bench, &python, &traces, spec, &constants);
    }
}

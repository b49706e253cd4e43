//! Masks of planted traces of every shape, as compiled and exported by the real binary, against independent implementations of the
//! recipe (tests/python/recipe.py) and of the policy `budget` (tests/python/budget.py): equal bit for bit, whatever the constants.

#[path = "cli/support.rs"]
#[allow(dead_code, reason = "shared with other test binaries")]
mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use calibc_ir::{Geometry, Layout, Model, TextPosition};
use calibc_trace::Encoding;
use calibc_trace::planted::Planted;
use safetensors::SafeTensors;

use support::*;

/// The recipe's constants where they are not the paper's; `a` is where epsilon ends.
#[derive(Clone, Copy, Default)]
struct Constants {
    a: Option<f64>,
    c: Option<f64>,
    k: Option<f64>,
    rho: Option<f64>,
    gamma: Option<f64>,
    /// 0: no anchor rows.
    anchors: Option<u16>,
}

impl Constants {
    fn policy(self) -> String {
        let field = |name: &str, value: Option<f64>| value.map(|v| format!("{name}: {v:?}"));
        let a = self.a.map(|a| format!("a_base: {a:?}, a_per_token: 0"));
        let schedule: Vec<_> = [a, field("c", self.c), field("k", self.k)].into_iter().flatten().collect();
        let anchors = self.anchors.map(|n| format!("anchors: {n}"));
        let repetition: Vec<_> = [anchors, field("gamma", self.gamma)].into_iter().flatten().collect();
        let repetition = match self.anchors {
            Some(0) => "off".to_owned(),
            _ => format!("{{{}}}", repetition.join(", ")),
        };
        let rho = field("rho", self.rho).unwrap_or_default();
        let schedule = schedule.join(", ");
        format!("policy: {{kind: calibatt, schedule: {{{schedule}}}, repetition: {repetition}, {rho}}}\n")
    }

    fn arguments(self) -> Vec<String> {
        let Self { a, c, k, rho, gamma, anchors } = self;
        let numbers = [("--a", a), ("--c", c), ("--k", k), ("--rho", rho), ("--gamma", gamma)];
        let numbers = numbers.into_iter().filter_map(|(name, value)| Some((name, format!("{:?}", value?))));
        let anchors = anchors.map(|n| ("--anchors", n.to_string()));
        numbers.chain(anchors).flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }
}

/// A Python with NumPy: `CALIBC_PYTHON`, else the system's; without one, a line on stderr, or a failure where
/// `CALIBC_REQUIRE_PYTHON` is 1.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = PYTHON.get_or_init(|| {
        let named = std::env::var_os("CALIBC_PYTHON").map(PathBuf::from);
        named.into_iter().chain([PathBuf::from("python3")]).find(|python| {
            Command::new(python).args(["-c", "import numpy"]).output().is_ok_and(|output| output.status.success())
        })
    });
    if found.is_none() {
        let required = std::env::var_os("CALIBC_REQUIRE_PYTHON").is_some_and(|value| value == "1");
        assert!(!required, "CALIBC_REQUIRE_PYTHON=1, but there is no Python 3 with NumPy");
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        skip(&test, "no Python 3 with NumPy; run `cargo xtask provision`, or name one with CALIBC_PYTHON");
    }
    found.as_deref()
}

/// Runs the recipe script in the bench's folder.
fn recipe(bench: &Bench, python: &Path, args: &[&str]) -> Ended {
    script(bench, python, "recipe.py", args)
}

fn script(bench: &Bench, python: &Path, name: &str, args: &[&str]) -> Ended {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/python").join(name);
    let mut command = Command::new(python);
    command.arg(script).args(args).current_dir(bench.path("")).env("PYTHONDONTWRITEBYTECODE", "1");
    ended(command.output().unwrap())
}

/// Ops of all heads in a mask file, and how many blocks are dropped.
fn summary(file: &[u8]) -> (BTreeSet<u8>, usize) {
    let file = SafeTensors::deserialize(file).unwrap();
    let (mut ops, mut dropped) = (BTreeSet::new(), 0);
    for (name, tensor) in file.tensors() {
        match name.ends_with(".op") {
            true => ops.extend(tensor.data()),
            false => dropped += tensor.data().iter().filter(|&&kept| kept == 0).count(),
        }
    }
    (ops, dropped)
}

/// Compiles and exports, and lets the recipe do the same. Returns the ops that occur.
#[track_caller]
fn compare(
    bench: &Bench,
    python: &Path,
    planted: &Planted,
    constants: Option<Constants>,
    context: &str,
) -> BTreeSet<u8> {
    masks(bench, planted, &constants.map(Constants::policy).unwrap_or_default());
    // Frames of fewer rows than anchors go without, as the compiler decides by itself.
    let mut arguments = constants.unwrap_or_default().arguments();
    if planted.geometry.height < 5 && constants.is_none_or(|c| c.anchors.is_none()) {
        arguments.extend(["--anchors".to_owned(), "0".to_owned()]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    recipe(bench, python, &[&["planted", "-o", "wanted"], &arguments[..]].concat()).expect(OK);
    same(bench, python, context)
}

/// Compiles planted traces and exports the masks.
#[track_caller]
fn masks(bench: &Bench, planted: &Planted, policy: &str) {
    let _ = std::fs::remove_dir_all(bench.path("planted"));
    planted.write(&bench.path("planted")).unwrap();
    // Masks need no kernels, a bundle does: one small one is enough.
    let target = "target: {dtypes: [bf16], lse: false, archs: [sm_80]}\n";
    bench.file("spec.yaml", &[target, policy].concat());
    bench.ok(&["compile", "planted", "-o", "bundle", "--spec", "spec.yaml", "-q"]);
    bench.ok(&["export", "bundle", "--masks", "masks", "-q"]);
}

/// Compares the masks with those that were wanted. Returns the ops that occur.
#[track_caller]
fn same(bench: &Bench, python: &Path, context: &str) -> BTreeSet<u8> {
    let same = recipe(bench, python, &["--compare", "wanted", "masks"]);
    assert_eq!(same.code, Some(OK), "{context}: {}{}", same.stdout, same.stderr);
    let (ops, dropped) = summary(&bench.bytes("masks"));
    assert_eq!(ops.contains(&1), dropped > 0, "{context}");
    ops
}

/// The same for the policy `budget` with these fields.
#[track_caller]
fn compare_budget(bench: &Bench, python: &Path, planted: &Planted, fields: &[(&str, &str)]) -> BTreeSet<u8> {
    let yaml: Vec<String> = fields.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    masks(bench, planted, &format!("policy: {{kind: budget, {}}}\n", yaml.join(", ")));
    let mut arguments = vec!["planted".to_owned(), "-o".to_owned(), "wanted".to_owned()];
    for &(name, value) in fields {
        let value = if value == "off" { "0" } else { value };
        arguments.extend([format!("--{}", name.replace('_', "-")), value.to_owned()]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    script(bench, python, "budget.py", &arguments).expect(OK);
    same(bench, python, &format!("{fields:?}"))
}

fn text(text_tokens: u32, text_position: TextPosition, geometry: Geometry) -> Geometry {
    Geometry { text_tokens, text_position, ..geometry }
}

fn tiled(tile: [u32; 3], geometry: Geometry) -> Geometry {
    Geometry { layout: Layout::Tile(tile), ..geometry }
}

/// Every kind of geometry, and encodings in turn, under the paper's constants.
#[test]
fn every_geometry_and_encoding_with_the_papers_constants() {
    let (Some(python), Some(bench)) = (python(), Bench::new()) else { return };
    let geometries = [
        ("one block", Geometry::video(1, 8, 16)),
        ("one ragged block", Geometry::video(1, 5, 7)),
        ("raster", Geometry::video(4, 16, 16)),
        ("raster, ragged", Geometry::video(3, 11, 13)),
        ("low frames", Geometry::video(9, 4, 23)),
        ("more than a word of blocks", Geometry::video(9, 21, 25)),
        ("tiles", tiled([2, 4, 8], Geometry::video(4, 16, 16))),
        ("tiles that do not divide, ragged", tiled([2, 3, 5], Geometry::video(5, 10, 13))),
        ("text before", text(256, TextPosition::Before, Geometry::video(3, 8, 32))),
        ("text before, ragged", text(77, TextPosition::Before, Geometry::video(3, 11, 13))),
        ("text after", text(128, TextPosition::After, Geometry::video(2, 16, 16))),
        ("text after, in the video's last block", text(7, TextPosition::After, Geometry::video(3, 10, 17))),
        ("tiles, text after, ragged", text(200, TextPosition::After, tiled([1, 4, 4], Geometry::video(3, 10, 17)))),
    ];
    let mut seen = BTreeSet::new();
    for (i, (name, geometry)) in geometries.into_iter().enumerate() {
        // One encoding for every second geometry, all for the others.
        for (e, encoding) in [Encoding::Log2U8, Encoding::F16, Encoding::F32].into_iter().enumerate() {
            if i % 3 != e && i % 2 == 0 {
                continue;
            }
            let planted = Planted {
                geometry,
                encoding,
                num_steps: 5,
                covered: vec![0, 3],
                calibration: 2 + (i as u32 + e as u32) % 3,
                holdout: i as u32 % 3,
                anchor_counts: vec![geometry.height.min(5) as u16],
                repetitive: 0.4,
                seed: 100 + i as u64,
                ..Planted::default()
            };
            seen.extend(compare(&bench, python, &planted, None, &format!("{name}, {encoding:?}")));
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2], "every op occurs");
}

/// Without any spec, the kernels of the default target.
#[test]
fn no_spec_is_the_papers_recipe() {
    let (Some(python), Some(bench)) = (python(), Bench::new()) else { return };
    bench.ok(&["compile", "traces", "-o", "bundle", "--arch", "sm_80", "-q"]);
    bench.ok(&["export", "bundle", "--masks", "masks", "-q"]);
    recipe(&bench, python, &["traces", "-o", "wanted"]).expect(OK);
    recipe(&bench, python, &["--compare", "wanted", "masks"]).expect(OK);
    // The comparison can fail: another constant, another mask.
    recipe(&bench, python, &["traces", "-o", "other", "--rho", "1.0"]).expect(OK);
    let other = recipe(&bench, python, &["--compare", "other", "masks"]).expect(NEGATIVE);
    assert!(other.stdout.contains("differ, first at ["), "{}", other.stdout);
}

#[test]
fn changed_constants() {
    let (Some(python), Some(bench)) = (python(), Bench::new()) else { return };
    let none = Constants::default();
    let constants = [
        // Shares that votes of five prompts meet exactly, and just miss.
        Constants { rho: Some(0.2), ..none },
        Constants { rho: Some(0.6), ..none },
        Constants { rho: Some(0.6000000000000001), ..none },
        Constants { rho: Some(1.0), ..none },
        Constants { rho: Some(1e-9), anchors: Some(0), ..none },
        // Schedules: flat, rising, of the distilled model, everything and nothing.
        Constants { a: Some(0.9), c: Some(0.9), k: Some(0.0), ..none },
        Constants { a: Some(0.95), c: Some(0.5), k: Some(2.0), ..none },
        Constants { a: Some(0.763), c: Some(0.863), k: Some(5.64), ..none },
        Constants { a: Some(1.0), c: Some(1.0), anchors: Some(0), ..none },
        Constants { a: Some(0.0), c: Some(0.0), ..none },
        // So few blocks that prompts often agree on none.
        Constants { a: Some(0.05), c: Some(0.2), k: Some(1.0), rho: Some(1.0), ..none },
        Constants { a: Some(-0.5), c: Some(0.3), k: Some(3.0), rho: Some(0.8), ..none },
        // Repetition: everywhere, nowhere, at other counts, and at one that was not measured.
        Constants { gamma: Some(-1.0), ..none },
        Constants { gamma: Some(1.0), ..none },
        Constants { gamma: Some(0.6), anchors: Some(3), ..none },
        Constants { gamma: Some(0.935), anchors: Some(8), ..none },
        Constants { anchors: Some(4), ..none },
        Constants { a: Some(0.7), c: Some(0.97), k: Some(9.5), rho: Some(0.4), gamma: Some(0.9), anchors: Some(3) },
    ];
    let mut seen = Vec::new();
    for (i, constants) in constants.into_iter().enumerate() {
        let planted = Planted {
            model: Model { name: "planted".into(), layers: 2, heads: 3 + i as u32 % 3, head_dim: [64, 128][i % 2] },
            geometry: text(50, TextPosition::After, Geometry::video(4, 12, 17)),
            // Steps 2 and 6 lie between two that are covered: the earlier one serves.
            num_steps: 9,
            covered: vec![0, 4, 8],
            calibration: 5,
            holdout: 2,
            encoding: [Encoding::Log2U8, Encoding::F16, Encoding::F32][i % 3],
            anchor_counts: vec![3, 5, 8],
            repetitive: 0.5,
            seed: 200 + i as u64,
            ..Planted::default()
        };
        seen.push(compare(&bench, python, &planted, Some(constants), &format!("constants {i}")));
    }
    let all: BTreeSet<u8> = seen.iter().flatten().copied().collect();
    assert_eq!(all.into_iter().collect::<Vec<_>>(), [0, 1, 2], "every op occurs");
    assert!(seen[12].iter().eq(&[2]), "every head is repetitive: {:?}", seen[12]);
    assert!(!seen[13].contains(&2) && !seen[16].contains(&2), "no head is repetitive");
}

/// Who votes: the prompts of the calibration split, of the `cond` branch where there is one, and the nearest covered step.
#[test]
fn coverage_prompts_and_branches() {
    let (Some(python), Some(bench)) = (python(), Bench::new()) else { return };
    let base = Planted { geometry: Geometry::video(3, 10, 20), repetitive: 0.3, ..Planted::default() };
    let branches = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let cases = [
        Planted { calibration: 1, holdout: 0, ..base.clone() },
        Planted { calibration: 9, holdout: 4, ..base.clone() },
        Planted { num_steps: 1, covered: vec![0], ..base.clone() },
        Planted { num_steps: 30, covered: vec![29], ..base.clone() },
        Planted { num_steps: 24, covered: vec![1, 2, 7, 16], ..base.clone() },
        Planted { branches: branches(&["uncond", "cond"]), ..base.clone() },
        Planted { branches: branches(&["uncond"]), ..base.clone() },
        Planted { anchor_counts: vec![], ..base.clone() },
        Planted { repetitive: 1.0, deviation: true, ..base.clone() },
        Planted { model: Model { name: "wide".into(), layers: 1, heads: 17, head_dim: 128 }, ..base.clone() },
    ];
    for (i, planted) in cases.into_iter().enumerate() {
        compare(&bench, python, &Planted { seed: 300 + i as u64, ..planted }, None, &format!("case {i}"));
    }
}

/// The policy `budget`: every field, evidence that is there and that is not, and every kind of geometry.
#[test]
fn budgets() {
    let (Some(python), Some(bench)) = (python(), Bench::new()) else { return };
    let base = Planted {
        model: Model { name: "planted".into(), layers: 2, heads: 3, head_dim: 64 },
        geometry: Geometry::video(3, 12, 20),
        num_steps: 7,
        covered: vec![0, 4],
        anchor_counts: vec![3, 5],
        repetitive: 0.5,
        deviation: true,
        sensitivity: true,
        ..Planted::default()
    };
    let joint = text(90, TextPosition::After, Geometry::video(3, 10, 17));
    let geometry = |geometry| Planted { geometry, ..base.clone() };
    type Fields = &'static [(&'static str, &'static str)];
    let cases: Vec<(Planted, Fields)> = vec![
        (base.clone(), &[("density", "0.5")]),
        (base.clone(), &[("density", "0.25"), ("anchors", "off"), ("row_recall", "0")]),
        (base.clone(), &[("density", "0.6"), ("row_recall", "0.45"), ("anchors", "3")]),
        (base.clone(), &[("density", "0.4"), ("step_floor", "0.3")]),
        (base.clone(), &[("density", "0.4"), ("step_floor", "0.4"), ("anchors", "off")]),
        (base.clone(), &[("density", "0.5"), ("step_weights", "default"), ("head_weights", "uniform")]),
        (base.clone(), &[("density", "0.5"), ("step_weights", "uniform"), ("over_prompts", "max")]),
        (base.clone(), &[("density", "0.5"), ("importance", "energy")]),
        // A target below the floors, everything, and a number of anchor rows that was not measured.
        (base.clone(), &[("density", "0.01"), ("row_recall", "0.3")]),
        (base.clone(), &[("density", "1")]),
        (base.clone(), &[("density", "0.3"), ("anchors", "4")]),
        // Without evidence, part by part, and with other encodings.
        (Planted { deviation: false, ..base.clone() }, &[("density", "0.5")]),
        (Planted { sensitivity: false, ..base.clone() }, &[("density", "0.5")]),
        (Planted { anchor_counts: vec![], encoding: Encoding::F16, ..base.clone() }, &[("density", "0.45")]),
        (Planted { encoding: Encoding::F32, calibration: 1, holdout: 0, ..base.clone() }, &[("density", "0.35")]),
        // Few distinct scores and so many equals at the cut: one prompt, equal weights.
        (
            Planted { calibration: 1, ..base.clone() },
            &[("density", "0.3"), ("anchors", "off"), ("step_weights", "uniform"), ("head_weights", "uniform")],
        ),
        // Every geometry.
        (geometry(Geometry::video(1, 8, 16)), &[("density", "0.7")]),
        (geometry(Geometry::video(3, 11, 13)), &[("density", "0.4")]),
        (geometry(Geometry::video(7, 21, 25)), &[("density", "0.3"), ("row_recall", "0.2")]),
        (geometry(tiled([2, 3, 5], Geometry::video(5, 10, 13))), &[("density", "0.4")]),
        (geometry(text(77, TextPosition::Before, Geometry::video(3, 11, 13))), &[("density", "0.6")]),
        (geometry(joint), &[("density", "0.7"), ("step_floor", "0.6"), ("anchors", "3")]),
        (geometry(tiled([1, 4, 4], joint)), &[("density", "0.65")]),
    ];
    let mut seen = BTreeSet::new();
    for (i, (planted, fields)) in cases.into_iter().enumerate() {
        seen.extend(compare_budget(&bench, python, &Planted { seed: 400 + i as u64, ..planted }, fields));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2], "every op occurs");
}

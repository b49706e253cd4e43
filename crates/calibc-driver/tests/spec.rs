//! Specs: what is refused, and how the refusal reads.

use std::path::Path;

use calibc_driver::spec::{AnchorsSpec, PolicySpec, RepetitionSpec, ScheduleSpec, Spec};
use calibc_opt::{Budget, HeadWeights, Importance, OverPrompts, StepWeights};

fn parse(text: &str) -> Result<Spec, String> {
    Spec::parse(text, Path::new("p.yaml")).map_err(|e| e.to_string())
}

const GRID: &str = "geometry: {frames: 4, height: 8, width: 8}\n";

/// One wrong spec per line of the table: what the reader sees for it.
#[test]
fn refusals_name_place_and_cure() {
    let cases: &[(&str, &str)] = &[
        ("empty", ""),
        ("only a comment", "# nothing\n"),
        ("not yaml", "name: [1, 2\n"),
        ("a list", "- 1\n- 2\n"),
        ("a tab", "model:\n\tlayers: 3\n"),
        ("unknown section", "geometri: {frames: 4, height: 8, width: 8}\n"),
        ("unknown section, nothing near", "zzz: 1\n"),
        ("unknown field", "geometry:\n  frames: 4\n  heigth: 8\n  width: 8\n"),
        ("unknown policy field", "policy:\n  kind: calibatt\n  rho: 0.5\n  gamma: 0.9\n"),
        ("field of the other policy", "policy:\n  kind: explicit\n  masks: m.safetensors\n  rho: 0.5\n"),
        ("unknown schedule field", "policy:\n  kind: calibatt\n  schedule:\n    a_bse: 0.8\n"),
        ("unknown schedule", "policy:\n  kind: calibatt\n  schedule: distiled\n"),
        ("unknown repetition field", "policy:\n  kind: calibatt\n  repetition: {anchor: 5}\n"),
        ("repetition on", "policy:\n  kind: calibatt\n  repetition: on\n"),
        ("unknown kind", "name: x\npolicy:\n  kind: calibat\n"),
        ("kind missing", "name: x\npolicy:\n  rho: 0.5\n"),
        ("policy is a word", "policy: calibatt\n"),
        ("text where a number stands", "geometry:\n  frames: four\n  height: 8\n  width: 8\n"),
        ("fraction where a whole number stands", "geometry: {frames: 4.5, height: 8, width: 8}\n"),
        ("negative", "geometry: {frames: -4, height: 8, width: 8}\n"),
        ("zero", "geometry: {frames: 4, height: 0, width: 8}\n"),
        ("overflow", "geometry: {frames: 4294967296, height: 8, width: 8}\n"),
        ("too many tokens", "geometry: {frames: 65536, height: 65536, width: 8}\n"),
        ("field missing", "geometry: {frames: 4, height: 8}\n"),
        ("field twice", "name: a\nname: b\n"),
        ("nothing where text stands", "policy: {kind: explicit, masks: }\n"),
        ("text without place", "geometry: {frames: 4, height: 8, width: 8, text_tokens: 7}\n"),
        ("unknown text position", "geometry: {frames: 4, height: 8, width: 8, text_position: afterwards}\n"),
        ("unknown layout", "geometry: {frames: 4, height: 8, width: 8, layout: rastr}\n"),
        ("short tile", "geometry: {frames: 4, height: 8, width: 8, layout: {tile: [2, 8]}}\n"),
        ("zero tile", "geometry: {frames: 4, height: 8, width: 8, layout: {tile: [2, 0, 8]}}\n"),
        ("head_dim", "model:\n  layers: 2\n  heads: 2\n  head_dim: 96\n"),
        ("rho 0", "policy:\n  kind: calibatt\n  rho: 0\n"),
        ("rho NaN", "policy:\n  kind: calibatt\n  rho: .nan\n"),
        ("infinite k", "policy:\n  kind: calibatt\n  schedule: {k: .inf}\n"),
        (
            "more anchors than rows",
            "geometry: {frames: 4, height: 4, width: 8}\npolicy:\n  kind: calibatt\n  repetition: {gamma: 0.9}\n",
        ),
        ("budget without a density", "policy:\n  kind: budget\n"),
        ("no density", "policy:\n  kind: budget\n  density: 0\n"),
        ("more than all", "policy:\n  kind: budget\n  density: 1.5\n"),
        ("density in words", "policy:\n  kind: budget\n  density: half\n"),
        ("row_recall of 1", "policy: {kind: budget, density: 0.5, row_recall: 1}\n"),
        ("row_recall NaN", "policy: {kind: budget, density: 0.5, row_recall: .nan}\n"),
        ("step_floor above the density", "policy:\n  kind: budget\n  density: 0.5\n  step_floor: 0.6\n"),
        ("unknown budget field", "policy:\n  kind: budget\n  density: 0.5\n  row_recal: 0.5\n"),
        ("field of calibatt", "policy:\n  kind: budget\n  density: 0.5\n  rho: 0.5\n"),
        ("unknown importance", "policy:\n  kind: budget\n  density: 0.5\n  importance: D2\n"),
        ("unknown weights", "policy:\n  kind: budget\n  density: 0.5\n  step_weights: sensitivities\n"),
        ("default weights of heads", "policy:\n  kind: budget\n  density: 0.5\n  head_weights: default\n"),
        ("unknown average", "policy: {kind: budget, density: 0.5, over_prompts: median}\n"),
        ("missing", "policy: {kind: budget, density: 0.5, missing: ignore}\n"),
        ("anchors on", "policy:\n  kind: budget\n  density: 0.5\n  anchors: on\n"),
        ("anchors true", "policy:\n  kind: budget\n  density: 0.5\n  anchors: true\n"),
        ("no anchors", "policy:\n  kind: budget\n  density: 0.5\n  anchors: 0\n"),
        ("negative anchors", "policy:\n  kind: budget\n  density: 0.5\n  anchors: -2\n"),
        ("very many anchors", "policy:\n  kind: budget\n  density: 0.5\n  anchors: 65536\n"),
        ("anchors in a mapping", "policy:\n  kind: budget\n  density: 0.5\n  anchors: {anchors: 5}\n"),
        (
            "more budget anchors than rows",
            "geometry: {frames: 4, height: 4, width: 8}\npolicy:\n  kind: budget\n  density: 0.5\n  anchors: 9\n",
        ),
        ("unknown arch", "target:\n  archs: [sm_80, sm_91]\n"),
        ("no arch", "target:\n  archs: []\n"),
        ("unknown dtype", "target: {dtypes: [bf16, float16]}\n"),
        ("lse is a word", "target: {lse: yes}\n"),
        ("share out of range", "share: {max_extra_density: 2}\n"),
        ("no steps", "steps: 0\n"),
        ("steps and sigmas differ", "steps: 3\nsigmas: [1.0, 0.5]\n"),
        ("negative sigma", "sigmas: [1.0, -0.5]\n"),
        ("merge key", "a: &a {frames: 4}\ngeometry: {<<: *a, height: 8, width: 8}\n"),
        ("two documents", "name: a\n---\nname: b\n"),
    ];
    let shown: String =
        cases.iter().map(|(name, text)| format!("{name}\n  {}\n", parse(text).expect_err(name))).collect();
    insta::assert_snapshot!("refusals", shown);
}

#[test]
fn defaults_are_the_papers() {
    let spec = parse(GRID).unwrap();
    assert_eq!(spec.policy, PolicySpec::default());
    insta::assert_snapshot!("defaults", spec.to_yaml().unwrap());
    assert_eq!(ScheduleSpec::LONG.a(32_760), 0.796 + 1.41e-6 * 32_760.0);
}

#[test]
fn short_forms_mean_what_they_say() {
    let policy = |text: &str| match parse(&format!("policy: {{kind: calibatt, {text}}}")).unwrap().policy {
        PolicySpec::CalibAtt(policy) => policy,
        _ => unreachable!("the kind is calibatt"),
    };
    assert_eq!(policy("schedule: distilled").schedule, ScheduleSpec::DISTILLED);
    assert_eq!(policy("schedule: {c: 1}").schedule, ScheduleSpec { c: 1.0, ..ScheduleSpec::LONG });
    for off in ["off", "'off'", "false"] {
        assert_eq!(policy(&format!("repetition: {off}")).repetition, RepetitionSpec::Off, "{off}");
    }
    assert_eq!(policy("repetition: {}").repetition, RepetitionSpec::default());
}

#[test]
fn a_budget_needs_a_density_and_nothing_else() {
    let policy = |text: &str| match parse(&format!("policy: {{kind: budget, density: 0.5, {text}}}")).unwrap().policy {
        PolicySpec::Budget(policy) => policy,
        _ => unreachable!("the kind is budget"),
    };
    assert_eq!(policy("").to_policy(), Budget::new(0.5));
    for off in ["off", "'off'", "false"] {
        assert_eq!(policy(&format!("anchors: {off}")).anchors, AnchorsSpec::Off, "{off}");
    }
    assert_eq!(policy("anchors: 3").to_policy().anchors, Some(3));
    let all = "row_recall: 0.3, step_floor: 0.5, anchors: off, importance: energy, over_prompts: max, step_weights: default, \
               head_weights: uniform, missing: error";
    let want = Budget {
        density: 0.5,
        row_recall: 0.3,
        step_floor: 0.5,
        anchors: None,
        importance: Importance::Energy,
        over_prompts: OverPrompts::Max,
        step_weights: StepWeights::Default,
        head_weights: HeadWeights::Uniform,
        fallbacks: false,
    };
    assert_eq!(policy(all).to_policy(), want);
    assert_eq!(policy("step_weights: uniform").to_policy().step_weights, StepWeights::Uniform);
}

#[test]
fn what_is_written_reads_back() {
    for text in [
        GRID.to_owned(),
        "name: 'on'\npolicy: {kind: calibatt, repetition: off, schedule: distilled, rho: 0.1}\n".to_owned(),
        "policy: {kind: budget, density: 0.35}\n".to_owned(),
        "policy: {kind: budget, density: 1, anchors: off, step_floor: 0.5, importance: energy, missing: error}\n"
            .to_owned(),
        format!(
            "{GRID}policy: {{kind: explicit, masks: a b.safetensors, default: dense}}\nsigmas: [1, 0.3333333333333333]\n"
        ),
        "geometry: {frames: 2, height: 9, width: 9, layout: {tile: [2, 8, 8]}}\ntarget: {archs: [sm_120]}\n".to_owned(),
    ] {
        let spec = parse(&text).unwrap();
        let yaml = spec.to_yaml().unwrap();
        assert_eq!(parse(&yaml).unwrap(), spec, "{yaml}");
    }
}

/// Every spec of `plans/`, and the sequence length it stands for.
#[test]
fn presets_have_the_geometries_of_their_models() {
    let plans = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plans");
    let mut paths: Vec<_> = std::fs::read_dir(plans).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let lines: Vec<String> = paths
        .iter()
        .map(|path| {
            let spec = Spec::read(path).unwrap_or_else(|e| panic!("{e}"));
            let (model, geometry) = (spec.model.unwrap(), spec.geometry.unwrap().to_ir());
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            assert_eq!(spec.name, Some(stem.clone()), "a plan is named like its file");
            format!(
                "{stem}: {} layers x {} heads x {}, {geometry}, {} blocks, {} in the last, {} steps",
                model.layers,
                model.heads,
                model.head_dim,
                geometry.num_q_blocks(),
                geometry.video_tokens() % 128,
                spec.steps.unwrap()
            )
        })
        .collect();
    insta::assert_snapshot!("presets", lines.join("\n"));
}

/// What the page on policies shows can be compiled.
#[test]
fn specs_of_the_docs_are_specs() {
    let page = include_str!("../../../docs/policy.md");
    let specs: Vec<&str> = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(specs.len(), 2);
    for text in specs {
        let policy = parse(text).unwrap_or_else(|e| panic!("{e}: {text}")).policy;
        assert!(matches!(policy, PolicySpec::Budget(_)), "{text}");
    }
}

#[test]
fn schema_is_the_one_reviewed() {
    insta::assert_snapshot!("schema", serde_json::to_string_pretty(&Spec::json_schema()).unwrap());
}

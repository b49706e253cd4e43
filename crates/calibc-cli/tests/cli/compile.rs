//! `calibc compile`: results, refusals, determinism.

use crate::support::*;

#[test]
fn two_compiles_are_byte_identical_and_the_second_takes_its_kernels_from_the_cache() {
    let Some(bench) = Bench::new() else { return };
    let compile = |out: &str, threads: &str, cache: &str| {
        let mut command = bench.command(&["compile", "traces", "-o", out, "--json", "--cache-dir", cache]);
        let value = ended(command.env("RAYON_NUM_THREADS", threads).output().unwrap()).expect(OK).json("compile");
        let cached: Vec<bool> =
            value["kernels"].as_array().unwrap().iter().map(|k| k["cached"].as_bool().unwrap()).collect();
        assert_eq!(cached.len(), 8, "two element types, with and without lse, two architectures");
        cached
    };
    assert_eq!(compile("a.bundle", "1", "cache"), [false; 8]);
    assert_eq!(compile("b.bundle", "4", "cache"), [true; 8]);
    assert_eq!(bench.bytes("a.bundle"), bench.bytes("b.bundle"));
    // Without any cache, from another folder's copy of the traces: still the same bytes.
    std::fs::create_dir(bench.path("elsewhere")).unwrap();
    std::fs::rename(bench.path("traces"), bench.path("elsewhere/t")).unwrap();
    bench.ok(&["compile", "elsewhere/t", "-o", "c.bundle", "--no-cache", "-q"]);
    assert_eq!(bench.bytes("a.bundle"), bench.bytes("c.bundle"));
}

#[test]
fn the_summary_is_for_people_and_goes_where_it_belongs() {
    let Some(bench) = Bench::new() else { return };
    let loud = bench.ok(&["compile", "traces", "-o", "plan.bundle"]);
    for word in ["planted:", "sites", "density", "recall", "kernels", "bundle", "time", "1 holdout prompt"] {
        assert!(loud.stdout.contains(word), "no {word}: {}", loud.stdout);
    }
    assert_eq!(loud.stderr, "", "no bars off a terminal");
    let quiet = bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
    let verbose = bench.ok(&["compile", "traces", "-o", "plan.bundle", "-v"]);
    assert!(verbose.stderr.contains("select: ") && verbose.stderr.contains("from the cache"), "{}", verbose.stderr);
}

#[test]
fn each_refusal_has_its_exit_code_and_leaves_no_file() {
    let Some(bench) = Bench::new() else { return };
    bench.file("typo.yaml", "geometry:\n  frames: 4\n  heigth: 16\n  width: 16\n");
    bench.file("other.yaml", "geometry: {frames: 4, height: 16, width: 17}\nsteps: 9\n");
    bench.file("explicit.yaml", "policy: {kind: explicit, masks: missing.safetensors}\n");
    bench.file("policy.yaml", "model: {layers: 2, heads: 4, head_dim: 64}\n");
    bench.file("notes.txt", "not a folder of traces");
    std::fs::create_dir(bench.path("folder")).unwrap();
    let before = bench.names();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["traces"], USAGE, "-o OUT"),
        (&[], USAGE, "required"),
        (&["-o", "x.bundle"], USAGE, "required"),
        (&["traces", "-o", "x.bundle", "--nosuch"], USAGE, "--nosuch"),
        (&["traces", "-o", "x.bundle", "--arch", "sm_75"], USAGE, "sm_80"),
        (&["traces", "-o", "x.bundle", "--emit", "ptx"], USAGE, "cubin"),
        (&["traces", "-o", "x.bundle", "--dump-after", "fuse"], USAGE, "no pass `fuse`"),
        (&["--emit", "plan", "--json", "traces"], USAGE, "stdout"),
        (&["-o", "x.bundle", "--spec", "policy.yaml"], USAGE, "give a folder of traces"),
        (
            &["traces", "-o", "x.bundle", "--spec", "typo.yaml"],
            BAD_INPUT,
            "typo.yaml:3:3: unknown field `heigth`; did you mean `height`?",
        ),
        (
            &["traces", "-o", "x.bundle", "--spec", "other.yaml"],
            BAD_INPUT,
            "geometry.width: spec 17, traces 16\n  steps: spec 9, traces 4",
        ),
        (&["nosuch", "-o", "x.bundle"], IO, "nosuch"),
        (&["folder", "-o", "x.bundle"], BAD_INPUT, "manifest.json"),
        (&["traces", "-o", "x.bundle", "--spec", "nosuch.yaml"], IO, "nosuch.yaml"),
        (&["traces", "-o", "x.bundle", "--spec", "explicit.yaml"], IO, "missing.safetensors"),
        (&["traces", "-o", "x.bundle", "--nvrtc", "/nowhere"], ENVIRONMENT, "libnvrtc"),
        (&["traces", "-o", "folder"], IO, "folder"),
        (&["traces", "-o", "no/such/x.bundle"], IO, "no/such"),
        (&["traces", "-o", "notes.txt/x.bundle"], IO, "notes.txt"),
        (&["traces", "-o", "notes.txt", "--emit", "cuda"], IO, "notes.txt"),
    ];
    for (args, code, words) in cases {
        let ended = bench.run(&[&["compile"], *args].concat()).expect(*code);
        assert!(ended.stderr.contains(words), "{args:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{args:?}");
        assert_eq!(bench.names(), before, "{args:?} leaves something behind");
    }
}

#[test]
fn a_damaged_trace_gives_no_bundle_and_keeps_the_old_one() {
    let Some(bench) = Bench::new() else { return };
    bench.ok(&["compile", "traces", "-o", "plan.bundle", "-q"]);
    let old = bench.bytes("plan.bundle");
    let shard = bench.path("traces/p001/s002.cond.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let ended = bench.run(&["compile", "traces", "-o", "plan.bundle"]).expect(BAD_INPUT);
    assert!(ended.stderr.contains("p001/s002.cond.safetensors: blake3 is"), "{}", ended.stderr);
    assert_eq!(bench.bytes("plan.bundle"), old);
    assert_eq!(bench.names(), ["plan.bundle", "traces"]);
}

#[test]
fn every_stage_can_be_had() {
    let Some(bench) = Bench::new() else { return };
    let plan = bench.ok(&["compile", "traces", "--emit", "plan"]);
    let parsed = calibc_ir::text::parse(&plan.stdout).unwrap();
    assert_eq!(parsed.model.name, "planted");
    bench.ok(&["compile", "traces", "--emit", "plan", "-o", "plan.txt", "-q"]);
    assert_eq!(bench.bytes("plan.txt"), plan.stdout.as_bytes());
    bench.ok(&["compile", "traces", "--emit", "cuda", "-o", "cuda", "-q"]);
    bench.ok(&["compile", "traces", "--emit", "cubin", "-o", "cubin", "--arch", "sm_80,sm_120", "-q"]);
    let files = |name: &str, ending: &str| {
        let entries = std::fs::read_dir(bench.path(name)).unwrap().map(|e| e.unwrap().path());
        entries.filter(|p| p.to_string_lossy().ends_with(ending)).count()
    };
    // The default target has architectures of both families.
    assert_eq!((files("cuda", ".cu"), files("cuda", "_hopper.cu")), (8, 4));
    assert_eq!((files("cubin", ".sm_80.cubin"), files("cubin", ".sm_120.cubin")), (4, 4));
    // The plan needs no NVRTC, nor do the sources.
    let mut command = bench.command(&["compile", "traces", "--emit", "cuda", "-o", "cuda2", "-q"]);
    ended(command.env("CALIBC_NVRTC", "/nowhere").output().unwrap()).expect(OK);
}

#[test]
fn portable_kernels_can_be_had_for_every_architecture() {
    let Some(bench) = Bench::new() else { return };
    bench.file("spec.yaml", "target: {dtypes: [bf16], lse: false, archs: [sm_90a]}\n");
    let kernel = |name: &str, more: &[&str]| {
        bench.ok(&[&["compile", "traces", "-o", name, "--spec", "spec.yaml", "-q"], more].concat());
        let json = bench.ok(&["inspect", name, "--json"]).json("bundle");
        let kernels = json["kernels"].as_array().unwrap();
        assert_eq!((kernels.len(), &kernels[0]["arch"]), (1, &"sm_90a".into()));
        let [symbol, family] = ["symbol", "family"].map(|field| kernels[0][field].as_str().unwrap().to_owned());
        assert!(bench.ok(&["inspect", name]).stdout.contains(&format!("  {symbol} ")));
        (symbol.ends_with("_hopper"), family)
    };
    assert_eq!(kernel("a.bundle", &[]), (true, "hopper".to_owned()));
    assert_eq!(kernel("b.bundle", &["--portable"]), (false, "portable".to_owned()));
    // The effective spec says so by itself.
    bench.file("spec.yaml", &bench.ok(&["inspect", "b.bundle", "--spec"]).stdout);
    assert_eq!(kernel("c.bundle", &[]), (false, "portable".to_owned()));
    assert_eq!(bench.bytes("b.bundle"), bench.bytes("c.bundle"));
}

#[test]
fn plans_are_dumped_after_passes() {
    let Some(bench) = Bench::new() else { return };
    let base = ["compile", "traces", "--emit", "plan", "-o", "plan.txt", "-q"];
    bench.ok(&[&base[..], &["--dump-after", "all", "--dump-dir", "dumps"]].concat());
    let mut names: Vec<_> = std::fs::read_dir(bench.path("dumps"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let want: Vec<String> =
        calibc_driver::PASSES.iter().enumerate().map(|(i, pass)| format!("{i:02}-{pass}.txt")).collect();
    assert_eq!(names, want);
    for name in &names {
        let text = String::from_utf8(bench.bytes(&format!("dumps/{name}"))).unwrap();
        calibc_ir::text::parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let ended = bench.ok(&[&base[..], &["--dump-after", "select,share"]].concat());
    assert_eq!(ended.stderr.matches("plan planted").count(), 2, "two dumps on stderr");
}

#[test]
fn a_spec_changes_the_plan_and_is_kept_in_the_bundle() {
    let Some(bench) = Bench::new() else { return };
    bench.file(
        "spec.yaml",
        "name: mine\ngeometry: {frames: 4, height: 16, width: 16}\n\
         policy: {kind: calibatt, rho: 1.0, repetition: off, schedule: {c: 0.9, a_base: 0.7}}\n\
         target: {dtypes: [bf16], lse: false, archs: [sm_90]}\n",
    );
    bench.ok(&["compile", "traces", "-o", "a.bundle", "--spec", "spec.yaml", "-q"]);
    bench.ok(&["compile", "traces", "-o", "b.bundle", "-q"]);
    let [a, b] = ["a.bundle", "b.bundle"].map(|name| bench.ok(&["inspect", name, "--json"]).json("bundle"));
    assert_eq!(a["ops"]["anchor_rows"], 0);
    assert!(b["ops"]["anchor_rows"].as_u64().unwrap() > 0);
    assert!(a["density"].as_f64().unwrap() < b["density"].as_f64().unwrap());
    let kernels: Vec<_> = a["kernels"].as_array().unwrap().iter().map(|k| k["arch"].clone()).collect();
    assert_eq!(kernels, ["sm_90"]);
    // The effective spec compiles to the same bundle again.
    let effective = bench.ok(&["inspect", "a.bundle", "--spec"]).stdout;
    assert!(effective.contains("name: mine") && effective.contains("rho: 1.0") && effective.contains("k: 16.0"));
    bench.file("effective.yaml", &effective);
    bench.ok(&["compile", "traces", "-o", "c.bundle", "--spec", "effective.yaml", "-q"]);
    assert_eq!(bench.bytes("a.bundle"), bench.bytes("c.bundle"));
}

#[test]
fn a_budget_is_met_and_says_where_it_went() {
    let Some(bench) = Bench::new() else { return };
    let planted = calibc_trace::planted::Planted { deviation: true, sensitivity: true, ..Default::default() };
    planted.write(&bench.path("rich")).unwrap();
    let spec = |fields: &str| {
        let target = "target: {dtypes: [bf16], lse: false, archs: [sm_80]}";
        bench.file("spec.yaml", &format!("policy: {{kind: budget, density: 0.5, {fields}}}\n{target}\n"));
    };
    spec("");
    let ended = bench.ok(&["compile", "rich", "-o", "a.bundle", "--spec", "spec.yaml"]);
    assert_eq!(ended.stderr, "", "nothing is missing");
    for words in [
        "budget    0.5 asked for, floors take 0.",
        " at 5 anchor rows per frame",
        "\nloss ",
        "(deviation, measured weights, tempered by head)",
    ] {
        assert!(ended.stdout.contains(words), "no {words}: {}", ended.stdout);
    }
    let text = bench.ok(&["inspect", "a.bundle"]).stdout;
    assert!(text.contains("step   density  work  loss  recall") && !text.contains("warning"), "{text}");
    let json = bench.ok(&["inspect", "a.bundle", "--json"]).json("bundle");
    let report = &json["report"];
    let number =
        |at: &str| report.pointer(at).and_then(serde_json::Value::as_f64).unwrap_or_else(|| panic!("{at}: {report}"));
    let block = 1.0 / (json["sites"].as_f64().unwrap() * 64.0);
    assert!((0.5 - block..=0.5).contains(&number("/overall/density")), "{}", number("/overall/density"));
    assert_eq!(number("/budget/target"), 0.5);
    // Where the loss is, by step and by layer, and the threshold of every step.
    let sum =
        |at: &str| report[at].as_array().unwrap().iter().map(|group| group["loss"].as_f64().unwrap()).sum::<f64>();
    for at in ["steps", "layers"] {
        assert!((sum(at) / number("/overall/loss") - 1.0).abs() < 1e-9, "{at}");
    }
    assert_eq!(report["budget"]["thresholds"].as_array().unwrap().len(), 4);
    assert_eq!((&report["weighed"]["importance"], &report["warnings"]), (&"deviation".into(), &serde_json::json!([])));
    assert_eq!(
        bench.ok(&["compile", "rich", "-o", "a.bundle", "--spec", "spec.yaml", "--json"]).json("compile")["report"],
        *report
    );
    // Prompts that did not choose the plan lose about what was predicted.
    let held_out = number("/overall/judged/loss") / number("/overall/judged/predicted");
    assert!((0.5..2.0).contains(&held_out) && ended.stdout.contains(" times that on other prompts"), "{held_out}");
    // The effective spec, every field filled in, compiles to the same bundle again.
    let effective = bench.ok(&["inspect", "a.bundle", "--spec"]).stdout;
    assert!(effective.contains("anchors: 5") && effective.contains("missing: warn"), "{effective}");
    bench.file("effective.yaml", &effective);
    bench.ok(&["compile", "rich", "-o", "again.bundle", "--spec", "effective.yaml", "-q"]);
    assert_eq!(bench.bytes("a.bundle"), bench.bytes("again.bundle"));
    // The recipe's plan is predicted a loss as well, and a larger one at a density that is no smaller.
    bench.ok(&["compile", "rich", "-o", "r.bundle", "-q", "--arch", "sm_80"]);
    let recipe = bench.ok(&["inspect", "r.bundle", "--json"]).json("bundle");
    let density = recipe["density"].as_f64().unwrap();
    bench.file("spec.yaml", &format!("policy: {{kind: budget, density: {density}}}\ntarget: {{archs: [sm_80]}}\n"));
    bench.ok(&["compile", "rich", "-o", "b.bundle", "--spec", "spec.yaml", "-q"]);
    let budget = bench.ok(&["inspect", "b.bundle", "--json"]).json("bundle");
    let loss = |bundle: &serde_json::Value| bundle["report"]["overall"]["loss"].as_f64().unwrap();
    assert!(loss(&budget) < loss(&recipe), "{} against {}", loss(&budget), loss(&recipe));
    assert!(bench.ok(&["inspect", "r.bundle"]).stdout.contains("\nloss "));
}

#[test]
fn a_budget_says_what_evidence_lacks() {
    let Some(bench) = Bench::new() else { return };
    bench.file("spec.yaml", "policy: {kind: budget, density: 0.5, anchors: 3}\ntarget: {archs: [sm_80]}\n");
    let compile = ["compile", "traces", "-o", "a.bundle", "--spec", "spec.yaml"];
    let ended = bench.ok(&compile);
    let warnings: Vec<&str> = ended.stderr.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
    assert_eq!(warnings.len(), 3, "{}", ended.stderr);
    for (warning, words) in
        warnings.iter().zip(["no deviations", "no sensitivities", "no output error for 3 anchor rows"])
    {
        assert!(warning.contains(words), "{warning}");
    }
    assert_eq!(bench.ok(&[&compile[..], &["-q"]].concat()).stderr, "");
    // The bundle remembers.
    let text = bench.ok(&["inspect", "a.bundle"]).stdout;
    let remembered: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("warning   ")).collect();
    assert_eq!(remembered, warnings);
    let json = bench.ok(&["inspect", "a.bundle", "--json"]).json("bundle");
    assert_eq!(json["report"]["warnings"], serde_json::json!(warnings));
    assert_eq!(json["report"]["weighed"]["step_weights"], "default");
    // Floors that take more than the target are told, too.
    bench.file("spec.yaml", "policy: {kind: budget, density: 0.2, row_recall: 0.9}\ntarget: {archs: [sm_80]}\n");
    let ended = bench.ok(&compile);
    assert!(ended.stderr.contains("more than the 0.2 asked for; lower `row_recall`"), "{}", ended.stderr);
    // A shared mask keeps what any of its sites keeps: the report's density is the plan's.
    bench.file(
        "spec.yaml",
        "policy: {kind: budget, density: 0.4}\nshare: {max_extra_density: 0.05}\ntarget: {archs: [sm_80]}\n",
    );
    bench.ok(&[&compile[..], &["-q"]].concat());
    let json = bench.ok(&["inspect", "a.bundle", "--json"]).json("bundle");
    let number = |at: &str| json["report"].pointer(at).and_then(serde_json::Value::as_f64).unwrap();
    assert!(number("/overall/density") > number("/budget/density") && number("/budget/density") <= 0.4);
}

#[test]
fn exported_masks_compile_again_without_traces() {
    let Some(bench) = Bench::new() else { return };
    bench.ok(&["compile", "traces", "-o", "a.bundle", "-q"]);
    std::fs::create_dir(bench.path("mine")).unwrap();
    let exported = bench.ok(&["export", "a.bundle", "--masks", "mine/m.safetensors"]);
    assert!(exported.stderr.contains("mine/m.safetensors"), "{}", exported.stderr);
    // The masks lie beside the spec, not in the working folder.
    bench.file(
        "mine/explicit.yaml",
        "model: {name: planted, layers: 2, heads: 4, head_dim: 64}\ngeometry: {frames: 4, height: 16, width: 16}\n\
         steps: 4\npolicy: {kind: explicit, masks: m.safetensors}\n",
    );
    bench.ok(&["compile", "--spec", "mine/explicit.yaml", "-o", "b.bundle", "-q"]);
    bench.ok(&["export", "b.bundle", "--masks", "again.safetensors"]);
    assert_eq!(bench.bytes("mine/m.safetensors"), bench.bytes("again.safetensors"));
    bench.ok(&["verify", "b.bundle"]);
    let report = |name: &str| bench.ok(&["inspect", name, "--json"]).json("bundle")["report"].clone();
    assert_eq!(report("b.bundle")["basis"], "none");
    assert_eq!(report("b.bundle")["overall"]["density"], report("a.bundle")["overall"]["density"]);
    // With traces the same masks are judged by them.
    bench.ok(&["compile", "traces", "--spec", "mine/explicit.yaml", "-o", "c.bundle", "-q"]);
    assert_eq!(report("c.bundle")["overall"]["recall"], report("a.bundle")["overall"]["recall"]);
    // A bad byte in the last tensor.
    let mut masks = bench.bytes("mine/m.safetensors");
    let last = masks.len() - 5;
    masks[last] = 9;
    std::fs::write(bench.path("mine/m.safetensors"), masks).unwrap();
    let ended = bench.run(&["compile", "--spec", "mine/explicit.yaml", "-o", "d.bundle"]).expect(BAD_INPUT);
    assert!(ended.stderr.contains("`s3.l1` holds 9 at [3, 7, 7]"), "{}", ended.stderr);
    assert!(!bench.path("d.bundle").exists());
}

//! `calibc trace merge`: the same bytes whatever the order, every refusal with its exit code, and whole or nothing when killed.

#[path = "cli/support.rs"]
#[allow(dead_code, reason = "shared with other test binaries")]
mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use calibc_trace::planted::Planted;
use calibc_trace::random::SplitMix64;

use support::*;

/// Planted traces whose prompts have names of their own: `<name>-p000`, ...
fn plant(bench: &Bench, name: &str, planted: &Planted) {
    planted.write(&bench.path(name)).unwrap();
    let manifest = bench.path(name).join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let mut renamed = text.clone();
    for entry in fs::read_dir(bench.path(name)).unwrap() {
        let entry = entry.unwrap();
        let id = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            fs::rename(entry.path(), bench.path(name).join(format!("{name}-{id}"))).unwrap();
            renamed = renamed.replace(&format!("\"{id}"), &format!("\"{name}-{id}"));
        }
    }
    assert_ne!(text, renamed);
    fs::write(manifest, renamed).unwrap();
}

/// Every file below a folder and its bytes, in the order of names.
fn content(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            found.extend(content(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            found.push((name, fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn merges_in_any_order_are_one_trace() {
    let bench = Bench::bare();
    for name in ["monday", "tuesday", "friday"] {
        plant(&bench, name, &Planted::default());
    }
    let ended = bench.ok(&["trace", "merge", "all", "monday", "tuesday", "friday"]);
    assert!(ended.stdout.is_empty() && ended.stderr.contains("all: 12 prompts"), "{}", ended.stderr);
    bench.ok(&["trace", "merge", "again", "friday", "monday", "tuesday", "-q"]);
    bench.ok(&["trace", "merge", "nested/steps", "friday", "monday", "-q"]);
    bench.ok(&["trace", "merge", "steps", "nested/steps", "tuesday", "-q"]);
    let all = content(&bench.path("all"));
    assert!(all == content(&bench.path("again")) && all == content(&bench.path("steps")));
    bench.ok(&["trace", "check", "all"]);
    let info = bench.ok(&["trace", "info", "all", "--json"]).json("trace-info");
    let one = bench.ok(&["trace", "info", "monday", "--json"]).json("trace-info");
    for split in ["calibration_prompts", "holdout_prompts"] {
        assert_eq!(info["coverage"][split].as_u64(), one["coverage"][split].as_u64().map(|n| 3 * n));
    }
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let bench = Bench::bare();
    plant(&bench, "a", &Planted::default());
    plant(&bench, "b", &Planted { num_steps: Planted::default().num_steps + 1, ..Planted::default() });
    let names = bench.names();
    let said = |args: &[&str], code: i32, words: &str| {
        let ended = bench.run(args).expect(code);
        assert!(ended.stderr.contains(words) && ended.stdout.is_empty(), "{}", ended.stderr);
        assert_eq!(bench.names(), names, "{args:?} left something");
    };
    said(&["trace", "merge", "out", "a", "b"], BAD_INPUT, "differ in sampler steps");
    said(&["trace", "merge", "out", "a", "nowhere"], IO, "nowhere");
    said(&["trace", "merge", "a", "a"], BAD_INPUT, "exists already");
    said(&["trace", "merge", "out"], USAGE, "<IN>");
    said(&["trace", "merge", "out", "a", "--parts"], USAGE, "--parts");
    let shard =
        content(&bench.path("a")).into_iter().map(|(name, _)| name).find(|name| name != "manifest.json").unwrap();
    fs::remove_file(bench.path("a").join(&shard)).unwrap();
    said(&["trace", "merge", "out", "a"], BAD_INPUT, &shard);
}

#[test]
fn a_killed_merge_leaves_a_whole_trace_or_none() {
    let bench = Bench::bare();
    let planted = Planted { covered: vec![0, 1, 2, 3], num_steps: 4, calibration: 40, ..Planted::default() };
    plant(&bench, "a", &planted);
    plant(&bench, "b", &planted);
    let args = ["trace", "merge", "out", "a", "b", "-q"];
    let start = Instant::now();
    bench.ok(&args);
    let whole = start.elapsed();
    let want = content(&bench.path("out"));
    let mut random = SplitMix64::new(7);
    let (mut none, mut all) = (0, 0);
    // Ever later, until most merges end before they are killed.
    for i in 0..60 {
        if all >= 3 {
            break;
        }
        fs::remove_dir_all(bench.path("out")).unwrap_or_default();
        let mut child = bench.command(&args).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole.mul_f64((f64::from(i) + random.unit()) / 16.0));
        child.kill().unwrap();
        child.wait().unwrap();
        if bench.path("out").exists() {
            all += 1;
            assert!(content(&bench.path("out")) == want, "kill {i}");
        } else {
            none += 1;
        }
    }
    assert!(none > 0 && all > 0, "{none} killed before, {all} after");
    // The next merge takes away what the dead ones left.
    fs::remove_dir_all(bench.path("out")).unwrap_or_default();
    bench.ok(&args);
    assert_eq!(bench.names(), ["a", "b", "out"]);
    assert!(content(&bench.path("out")) == want);
}

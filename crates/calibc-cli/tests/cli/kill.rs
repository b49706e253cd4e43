//! `kill -9` at random moments of `compile`: the old bundle or the new one, and no litter.

use std::time::{Duration, Instant};

use crate::support::*;

#[test]
fn a_killed_compile_leaves_the_old_bundle_or_the_new_one() {
    let Some(bench) = Bench::new() else { return };
    // Two specs, so that old and new differ.
    bench.file("a.yaml", "policy: {kind: calibatt, rho: 0.4}\n");
    bench.file("b.yaml", "policy: {kind: calibatt, rho: 0.9}\n");
    for name in ["a", "b"] {
        bench.ok(&["compile", "traces", "-o", &format!("{name}.want"), "--spec", &format!("{name}.yaml"), "-q"]);
    }
    let want = ["a.want", "b.want"].map(|name| bench.bytes(name));
    assert_ne!(want[0], want[1]);
    std::fs::create_dir(bench.path("out")).unwrap();
    let compile = |spec: &str| bench.command(&["compile", "traces", "-o", "out/plan.bundle", "--spec", spec, "-q"]);
    let start = Instant::now();
    ended(compile("a.yaml").output().unwrap()).expect(OK);
    let whole = start.elapsed();
    let mut random: u64 = 0x5eed;
    let mut killed = 0;
    for i in 0..20 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Over the whole run, and every third time around its end, where the file is written.
        let share = (random >> 33) as f64 / f64::from(1u32 << 31);
        let moment = if i % 3 == 0 { 0.85 + 0.2 * share } else { share };
        let mut child = compile(if i % 2 == 0 { "b.yaml" } else { "a.yaml" }).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(whole.as_secs_f64() * moment));
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        let found = bench.bytes("out/plan.bundle");
        assert!(want.contains(&found), "kill {i}: {} bytes of neither bundle", found.len());
        let names: Vec<_> = std::fs::read_dir(bench.path("out"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names, ["plan.bundle"], "kill {i}");
    }
    assert!(killed > 0, "no compile was still running when it was killed");
    ended(compile("b.yaml").output().unwrap()).expect(OK);
    assert_eq!(bench.bytes("out/plan.bundle"), want[1]);
}

//! A writer killed at any moment leaves the old file or the new one, and nothing else.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const TARGET: &str = "CALIBC_BUNDLE_TEST_TARGET";

fn content(n: u8) -> Vec<u8> {
    vec![n; 200_000 + usize::from(n)]
}

/// Writes one content after the other until it is killed; runs only as a child of the test below.
#[test]
fn child() {
    let Some(target) = std::env::var_os(TARGET) else { return };
    for n in (0..=255).cycle() {
        calibc_bundle::write(Path::new(&target), &content(n)).unwrap();
    }
}

#[test]
fn a_kill_leaves_the_old_file_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("plan.bundle");
    let mut rng = support::Rng(u64::from(std::process::id()));
    for _ in 0..30 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact"])
            .env(TARGET, &target)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let patience = Instant::now();
        while !target.exists() && patience.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(u64::from(rng.below(40_000))));
        child.kill().unwrap();
        child.wait().unwrap();
        let bytes = std::fs::read(&target).unwrap();
        assert_eq!(bytes, content(bytes[0]), "half a file");
        // A kill between link and rename leaves one sibling, which the next write removes.
        assert!(std::fs::read_dir(folder.path()).unwrap().count() <= 2);
        calibc_bundle::write(&target, b"x").unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        std::fs::remove_file(&target).unwrap();
    }
}

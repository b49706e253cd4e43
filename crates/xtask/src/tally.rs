//! Counting tests from what the test runners print.

use std::ops::AddAssign;

/// Numbers of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Counts what `cargo test` printed. A test that lacks something on this machine (a GPU) says `skipped: ..` on stderr and then
/// counts as passed for the runner; here it does not.
pub(crate) fn cargo_test(stdout: &str, stderr: &str) -> Tally {
    let mut tally = Tally::default();
    for line in stdout.lines().filter(|line| line.starts_with("test result:")) {
        tally.passed += before(line, "passed");
        tally.failed += before(line, "failed");
        tally.skipped += before(line, "ignored");
    }
    let skipped = stderr.lines().filter(|line| line.starts_with("skipped: ")).count() as u64;
    tally.skipped += skipped;
    tally.passed = tally.passed.saturating_sub(skipped);
    tally
}

/// Names of the tests that failed in what `cargo test` printed.
pub(crate) fn failed_tests(stdout: &str) -> Vec<&str> {
    stdout.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED")).collect()
}

/// Counts what Python's unittest printed: `Ran 7 tests in 0.1s`, then `OK (skipped=2)` or `FAILED (failures=1, errors=1)`.
pub(crate) fn unittest(stderr: &str) -> Tally {
    let mut tally = Tally::default();
    let mut ran = 0;
    for line in stderr.lines() {
        if let Some(rest) = line.strip_prefix("Ran ") {
            ran = rest.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        } else if line.starts_with("OK") || line.starts_with("FAILED") {
            tally.failed += after(line, "failures=") + after(line, "errors=") + after(line, "unexpected successes=");
            tally.skipped += after(line, "skipped=");
        }
    }
    tally.passed = u64::saturating_sub(ran, tally.failed + tally.skipped);
    tally
}

/// The number in front of a word.
fn before(line: &str, word: &str) -> u64 {
    let Some((head, _)) = line.split_once(&format!(" {word}")) else { return 0 };
    head.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// The number behind `key=`.
fn after(line: &str, key: &str) -> u64 {
    let Some((_, tail)) = line.split_once(key) else { return 0 };
    tail.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_results_add_up_and_visible_skips_are_not_passes() {
        let stdout = "running 3 tests\ntest a ... ok\ntest b::c ... FAILED\ntest d ... ignored\n\n\
                      test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.05s\n\
                      test result: ok. 17 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.05s\n";
        let stderr = "   Running unittests\nskipped: gpu::x: no GPU\nnot skipped: \n";
        assert_eq!(cargo_test(stdout, stderr), Tally { passed: 17, failed: 1, skipped: 2 });
        assert_eq!(failed_tests(stdout), ["b::c"]);
        assert_eq!(cargo_test("", "error: could not compile"), Tally::default());
    }

    #[test]
    fn unittest_results_are_read() {
        let ok = "...s\n-----\nRan 7 tests in 0.104s\n\nOK (skipped=1)\n";
        assert_eq!(unittest(ok), Tally { passed: 6, failed: 0, skipped: 1 });
        let bad = "Ran 12 tests in 1.0s\n\nFAILED (failures=1, errors=2, skipped=3)\n";
        assert_eq!(unittest(bad), Tally { passed: 6, failed: 3, skipped: 3 });
        assert_eq!(unittest("Ran 2 tests in 0.0s\n\nOK\n"), Tally { passed: 2, failed: 0, skipped: 0 });
    }

    #[test]
    fn the_last_line_reads_as_agreed() {
        assert_eq!(Tally { passed: 12, failed: 0, skipped: 3 }.to_string(), "12 passed, 0 failed, 3 skipped");
    }
}

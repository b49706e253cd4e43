//! A workbench per test: a folder with planted traces and a cache, and the binary to run in it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use calibc_trace::planted::Planted;
use serde_json::Value;

/// The exit codes.
pub(crate) const OK: i32 = 0;
pub(crate) const NEGATIVE: i32 = 1;
pub(crate) const USAGE: i32 = 2;
pub(crate) const BAD_INPUT: i32 = 3;
pub(crate) const ENVIRONMENT: i32 = 4;
pub(crate) const IO: i32 = 5;

/// A folder of its own for one test.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    nvrtc: Option<PathBuf>,
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Panics with both streams unless the exit code is `code`.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// The stdout as JSON of the given kind.
    #[track_caller]
    pub(crate) fn json(&self, kind: &str) -> Value {
        let value: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout));
        assert_eq!(value["schema_version"], 1);
        assert_eq!(value["kind"], kind);
        value
    }
}

impl Bench {
    /// Without NVRTC: every command but those that make machine code.
    pub(crate) fn bare() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), nvrtc: None }
    }

    /// With NVRTC and planted traces at `traces`; `None`, told on stderr, where there is no NVRTC.
    pub(crate) fn new() -> Option<Self> {
        let nvrtc = calibc_nvrtc::testing::nvrtc()?;
        let bench = Self { dir: tempfile::tempdir().unwrap(), nvrtc: Some(nvrtc.path().to_owned()) };
        Planted::default().write(&bench.path("traces")).unwrap();
        Some(bench)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn file(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Names in the folder, the cache left out.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "cache")
            .collect();
        names.sort();
        names
    }

    /// The command, to run in the folder. The compile cache is one for all tests, next to the binary: kernels are compiled
    /// once, and many processes use it at the same time.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_calibc"));
        command.args(args).current_dir(self.dir.path());
        for name in ["CALIBC_LOG", "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH"] {
            command.env_remove(name);
        }
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("calibc-cache");
        command.env("CALIBC_CACHE_DIR", cache);
        // A place that is named is the only one looked at: without NVRTC means without.
        command.env("CALIBC_NVRTC", self.nvrtc.as_deref().unwrap_or(Path::new("/nowhere")));
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        ended(self.command(args).output().unwrap())
    }

    /// Runs and expects success.
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> Ended {
        self.run(args).expect(OK)
    }
}

pub(crate) fn ended(output: Output) -> Ended {
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A line that the harness does not swallow and `cargo xtask test` counts.
pub(crate) fn skip(test: &str, reason: &str) {
    let line = format!("{}{test}: {reason}\n", calibc_nvrtc::testing::SKIP_PREFIX);
    let _ = std::io::stderr().write_all(line.as_bytes());
}

//! For the tests of this workspace: libnvrtc, or a visible skip.

use std::{env, fs, io::Write, path::PathBuf};

use crate::{Nvrtc, NvrtcError};

/// How a skipped test starts its line on stderr; `cargo xtask test` counts these.
pub const SKIP_PREFIX: &str = "skipped: ";

/// libnvrtc for a test: where the environment says, else the Python environment which `cargo xtask provision` made under the
/// target folder, else anywhere. `None`, and a line on stderr, where there is none.
///
/// # Panics
/// Where there is none and `CALIBC_REQUIRE_NVRTC` is `1`.
pub fn nvrtc() -> Option<Nvrtc> {
    match find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            let required = env::var_os("CALIBC_REQUIRE_NVRTC").is_some_and(|value| value == "1");
            assert!(!required, "CALIBC_REQUIRE_NVRTC=1, but {error}");
            let name = std::thread::current().name().unwrap_or("a test").to_owned();
            let line = format!("{SKIP_PREFIX}{name}: no libnvrtc; run `cargo xtask provision`\n");
            // Not eprintln!, which the test harness would swallow; one write, so that lines of other threads stay apart.
            let _ = std::io::stderr().write_all(line.as_bytes());
            None
        }
    }
}

/// Every libnvrtc that generated kernels must compile with: that of [`nvrtc`], and other versions, which `CALIBC_TEST_NVRTC` names
/// as `PATH` names folders, else those that `cargo xtask provision` put under the target folder. Empty, and a line on stderr, where
/// there is none.
///
/// # Panics
/// Where one that is named does not load, or there is none and `CALIBC_REQUIRE_NVRTC` is `1`.
pub fn every_nvrtc() -> Vec<Nvrtc> {
    let Some(first) = nvrtc() else { return Vec::new() };
    let mut found = vec![first];
    let named = env::var_os("CALIBC_TEST_NVRTC").filter(|value| !value.is_empty());
    for folder in named.map_or_else(provisioned, |paths| env::split_paths(&paths).collect()) {
        let nvrtc = Nvrtc::find(Some(&folder)).unwrap_or_else(|error| panic!("CALIBC_TEST_NVRTC: {error}"));
        if found.iter().all(|known| known.path() != nvrtc.path()) {
            found.push(nvrtc);
        }
    }
    found
}

/// Folders above the executable, the target folder among them, joined with `name`.
fn beside_the_executable(name: &str) -> Vec<PathBuf> {
    let executable = env::current_exe().ok();
    executable
        .iter()
        .flat_map(|exe| exe.ancestors())
        .map(|folder| folder.join(name))
        .filter(|path| path.is_dir())
        .collect()
}

/// The folder, under the target folder, of NVRTCs beside that of the Python environment.
fn provisioned() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for folder in beside_the_executable("nvrtc") {
        let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
        // Wheels of CUDA 13, of CUDA 12.
        let folders =
            entries.flat_map(|entry| ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|lib| entry.path().join(lib)));
        found.extend(folders.filter(|path| path.is_dir()));
    }
    found.sort();
    found
}

fn find() -> Result<Nvrtc, NvrtcError> {
    if env::var_os("CALIBC_NVRTC").is_none_or(|value| value.is_empty()) {
        for environment in beside_the_executable("python") {
            if let Ok(nvrtc) = Nvrtc::find(Some(&environment)) {
                return Ok(nvrtc);
            }
        }
    }
    Nvrtc::find(None)
}

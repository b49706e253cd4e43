//! For the tests of this workspace: libnvrtc, or a visible skip.

use std::{env, io::Write, path::Path};

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

fn find() -> Result<Nvrtc, NvrtcError> {
    if env::var_os("CALIBC_NVRTC").is_none_or(|value| value.is_empty()) {
        let executable = env::current_exe().ok();
        let environments = executable.iter().flat_map(|exe| exe.ancestors()).map(|folder| folder.join("python"));
        for environment in environments.filter(|folder| Path::is_dir(folder)) {
            if let Ok(nvrtc) = Nvrtc::find(Some(&environment)) {
                return Ok(nvrtc);
            }
        }
    }
    Nvrtc::find(None)
}

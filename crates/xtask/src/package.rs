//! The Python package: its wheel, and a virtual environment that has nothing else.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{
    process::spelled,
    provision::{Environment, install, pip_install, venv_python},
    workspace::Workspace,
};

/// The command that builds the wheel into [`wheels`]. It uses the profile and the target folder of the tests: what they
/// compiled is not compiled again.
pub(crate) fn build(workspace: &Workspace, environment: &Environment) -> Result<Command> {
    let wheels = wheels(workspace);
    if wheels.exists() {
        fs::remove_dir_all(&wheels).with_context(|| format!("cannot remove {}", wheels.display()))?;
    }
    let mut pip = Command::new(&environment.python);
    pip.args(["-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]);
    pip.arg("--wheel-dir").arg(&wheels).arg(&workspace.root);
    pip.env("CARGO_TARGET_DIR", &workspace.target).env("MATURIN_PEP517_ARGS", "--profile dev");
    // maturin is a program beside the interpreter.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(environment.scripts()).chain(std::env::split_paths(&path));
    pip.env("PATH", std::env::join_paths(paths).context("PATH cannot be added to")?);
    Ok(pip)
}

/// The wheel that [`build`] made.
pub(crate) fn wheel(workspace: &Workspace) -> Result<PathBuf> {
    let folder = wheels(workspace);
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "whl"));
    ensure!(found.len() == 1, "{} wheels in {}, not one", found.len(), folder.display());
    Ok(found.remove(0))
}

/// Puts the wheel into the environment of the tests, in place of an older one.
pub(crate) fn install_here(workspace: &Workspace, environment: &Environment) -> Result<()> {
    install(environment.pip_install().args(["--no-deps", "--force-reinstall"]).arg(wheel(workspace)?))
}

/// A new virtual environment with the wheel and its extra `cu13`, as a user makes one on a machine without CUDA; returns its
/// folder.
pub(crate) fn fresh(workspace: &Workspace, environment: &Environment) -> Result<PathBuf> {
    let folder = workspace.target.join("python-fresh");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let mut venv = Command::new(&environment.python);
    venv.args(["-m", "venv"]).arg(&folder);
    let status = venv.status().with_context(|| format!("cannot run `{}`", spelled(&venv)))?;
    ensure!(status.success(), "`{}` failed ({status})", spelled(&venv));
    let mut wheel = wheel(workspace)?.into_os_string();
    wheel.push("[cu13]");
    install(pip_install(&venv_python(&folder)).arg(wheel))?;
    Ok(folder)
}

fn wheels(workspace: &Workspace) -> PathBuf {
    workspace.target.join("python-wheels")
}

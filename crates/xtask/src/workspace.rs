//! Where things are, and how cargo is called.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// This checkout.
pub(crate) struct Workspace {
    /// Its root, with `Cargo.toml` in it.
    pub(crate) root: PathBuf,
    /// The target folder this very program was built into.
    pub(crate) target: PathBuf,
}

impl Workspace {
    pub(crate) fn find() -> Result<Self> {
        // cargo sets the variable when it runs a package; the constant serves a binary that is started by hand.
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).ancestors().nth(2).map(Path::to_owned).unwrap_or_default();
        ensure!(root.join("Cargo.lock").is_file(), "{} is not the workspace; run `cargo xtask` in it", root.display());
        let executable = env::current_exe().context("cannot tell where the target folder is")?;
        let target = executable.ancestors().nth(2).context("cannot tell where the target folder is")?.to_owned();
        Ok(Self { root, target })
    }

    /// cargo, in the root, without the variables that `cargo run` set for this process: they would make cargo believe that
    /// build scripts which watch them are out of date.
    pub(crate) fn cargo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            let of_package =
                ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"].iter().any(|start| text.starts_with(start));
            if of_package || text == "CARGO_CRATE_NAME" || text == "CARGO_PRIMARY_PACKAGE" {
                command.env_remove(name);
            }
        }
        command.args(args).current_dir(&self.root);
        command
    }

    /// A path as it is shown: relative to the root where it lies below.
    pub(crate) fn show<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}

//! `cargo xtask demo`.

use anyhow::Result;

use crate::{provision::provision, workspace::Workspace};

/// Stub.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    provision(workspace)?;
    Ok(true)
}

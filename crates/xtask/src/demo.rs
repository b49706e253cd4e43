//! `cargo xtask demo`: from real calibration traces to a bundle that executes, with the commands a user would type.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    process::spelled,
    provision::{Environment, provision},
    workspace::Workspace,
};

const TRACES: &str = "examples/traces";
/// 45 % of the attention work, spent where the traces say that it matters.
const SPEC: &str = "plans/moving-shapes-budget.yaml";
/// What `calibc compile` makes machine code for without `--arch`.
const DEFAULT_ARCHS: &str = "sm_80,sm_90a";

struct Demo<'a> {
    workspace: &'a Workspace,
    environment: Environment,
    calibc: PathBuf,
}

/// Runs the demo and prints where the bundle is and what it saves. Stops at the first command that fails.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let environment = provision(workspace)?;
    let demo = Demo { workspace, environment, calibc: workspace.target.join("release/calibc") };
    demo.show(&mut workspace.cargo(&["build", "--release", "--package", "calibc-cli", "--bin", "calibc"]))?;

    let folder = workspace.target.join("demo");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let bundle = folder.join("plan.bundle");
    let gpu = demo.gpu()?;

    demo.show(demo.calibc().args(["trace", "check", TRACES]))?;
    let mut compile = demo.calibc();
    compile.args(["compile", TRACES, "--spec", SPEC, "--output"]).arg(demo.relative(&bundle));
    if let Some((major, minor)) = gpu
        && !covered((major, minor))
    {
        compile.args(["--arch", &format!("{DEFAULT_ARCHS},sm_{major}{minor}")]);
    }
    demo.show(&mut compile)?;
    demo.show(demo.calibc().arg("inspect").arg(demo.relative(&bundle)))?;
    demo.show(demo.calibc().arg("verify").arg(demo.relative(&bundle)).arg("--numerics"))?;
    if gpu.is_some() {
        demo.show(demo.calibc().arg("verify").arg(demo.relative(&bundle)).args(["--numerics", "--device", "cuda"]))?;
    }

    let facts = demo.json(demo.calibc().arg("inspect").arg(demo.relative(&bundle)).arg("--json"))?;
    let density =
        facts.pointer("/density").and_then(Value::as_f64).context("`calibc inspect --json` has no density")?;
    let bytes = fs::metadata(&bundle).with_context(|| format!("no {}", bundle.display()))?.len();
    println!("\nThe bundle is {} ({:.1} MB).", workspace.show(&bundle), bytes as f64 / 1e6);
    let (done, saved) = (100.0 * density, 100.0 * (1.0 - density));
    println!("It does {done:.1} % of the dense model's attention work: {saved:.1} % is saved.");
    if gpu.is_none() {
        println!("It ran on the CPU reference; on a machine with an NVIDIA GPU this demo also runs it there.");
    }
    Ok(true)
}

impl Demo<'_> {
    fn calibc(&self) -> Command {
        let mut command = Command::new(&self.calibc);
        command.current_dir(&self.workspace.root);
        command
    }

    fn relative<'p>(&self, path: &'p Path) -> &'p Path {
        path.strip_prefix(&self.workspace.root).unwrap_or(path)
    }

    /// Runs a command in front of the user.
    fn show(&self, command: &mut Command) -> Result<()> {
        let spelling = spelled(command);
        println!("\n$ {spelling}");
        self.environment.apply(command);
        let status = command.status().with_context(|| format!("cannot run `{spelling}`"))?;
        ensure!(status.success(), "`{spelling}` failed ({status})");
        Ok(())
    }

    /// Runs a command for its JSON. Its exit status is not asked: `doctor` reports what is missing by it.
    fn json(&self, command: &mut Command) -> Result<Value> {
        self.environment.apply(command);
        let output = command.stderr(Stdio::inherit()).output();
        let output = output.with_context(|| format!("cannot run `{}`", spelled(command)))?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("`{}` printed no JSON", spelled(command)))
    }

    /// Compute capability of the first GPU that the driver shows.
    fn gpu(&self) -> Result<Option<(u64, u64)>> {
        let doctor = self.json(self.calibc().args(["doctor", "--json"]))?;
        let part = |at| doctor.pointer("/driver/gpus/0/compute_capability")?.get(at)?.as_u64();
        Ok(part(0_usize).zip(part(1)))
    }
}

/// Whether the default architectures serve a GPU of this compute capability.
fn covered((major, minor): (u64, u64)) -> bool {
    major == 8 || (major, minor) == (9, 0)
}

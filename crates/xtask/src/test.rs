//! `cargo xtask test`: every check of the project, each even when an earlier one failed.

use std::{
    env, fs,
    io::IsTerminal,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    package,
    process::{Outcome, spelled, stream},
    provision::{Environment, provision, provision_other_nvrtcs, provision_package, venv_python},
    tally::{self, Tally},
    workspace::Workspace,
};

const PYTHON_TESTS: &str = "tests/python";

/// One finished step.
struct Step {
    name: &'static str,
    ok: bool,
    time: Duration,
    /// What to say about it beside that.
    note: String,
}

struct Session<'a> {
    workspace: &'a Workspace,
    environment: Environment,
    steps: Vec<Step>,
    tally: Tally,
}

/// Runs everything; `false` when something failed. The last line says how many tests passed, failed and were skipped; a step
/// that is no test counts as one when it fails.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let environment = provision_other_nvrtcs(workspace, provision_package(workspace)?)?;
    let mut session = Session::start(workspace, environment);
    session.check("format", &mut workspace.cargo(&["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--keep-going", "--", "-D", "warnings"];
    session.check("clippy", &mut workspace.cargo(&clippy))?;
    session.cargo_test("tests", &["test", "--workspace", "--no-fail-fast"])?;
    session.python()?;
    let mut doc = workspace.cargo(&["doc", "--workspace", "--no-deps", "--keep-going"]);
    session.check("docs", doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    Ok(session.finish())
}

/// `cargo xtask check-kernels`: only the tests that compile generated CUDA.
pub(crate) fn check_kernels(workspace: &Workspace) -> Result<bool> {
    let mut session = Session::start(workspace, provision_other_nvrtcs(workspace, provision(workspace)?)?);
    let tests = ["test", "--package", "calibc-tests", "--test", "kernels", "--test", "capture_kernels"];
    session.cargo_test("kernels", &tests)?;
    Ok(session.finish())
}

/// `cargo xtask package`: the Python package and its tests only.
pub(crate) fn package(workspace: &Workspace) -> Result<bool> {
    let mut session = Session::start(workspace, provision_package(workspace)?);
    session.python()?;
    Ok(session.finish())
}

impl<'a> Session<'a> {
    fn start(workspace: &'a Workspace, environment: Environment) -> Self {
        Self { workspace, environment, steps: Vec::new(), tally: Tally::default() }
    }

    fn run(&self, name: &str, command: &mut Command) -> Result<Outcome> {
        eprintln!("\n== {name}: {}", spelled(command));
        self.environment.apply(command);
        if std::io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none() {
            command.env("CARGO_TERM_COLOR", "always");
        }
        stream(command)
    }

    fn record(&mut self, name: &'static str, outcome: &Outcome, mut tally: Tally, note: String) {
        let ok = outcome.status.success() && tally.failed == 0;
        if !ok && tally.failed == 0 {
            // It did not build, crashed, or is no test.
            tally.failed = 1;
        }
        self.tally += tally;
        let note = if ok { note } else { format!("{} {note}", outcome.status).trim_end().to_owned() };
        self.steps.push(Step { name, ok, time: outcome.time, note });
    }

    /// A step that passes or fails as a whole.
    fn check(&mut self, name: &'static str, command: &mut Command) -> Result<()> {
        let outcome = self.run(name, command)?;
        self.record(name, &outcome, Tally::default(), String::new());
        Ok(())
    }

    /// A step of Rust tests.
    fn cargo_test(&mut self, name: &'static str, args: &[&str]) -> Result<()> {
        let outcome = self.run(name, &mut self.workspace.cargo(args))?;
        let tally = tally::cargo_test(&outcome.stdout, &outcome.stderr);
        let failed: String =
            tally::failed_tests(&outcome.stdout).iter().map(|test| format!("\n      {test}")).collect();
        self.record(name, &outcome, tally, format!("{tally}{failed}"));
        Ok(())
    }

    /// Builds the Python package, tries it in an environment of its own, and runs the Python tests on it.
    fn python(&mut self) -> Result<()> {
        let outcome = self.run("the wheel", &mut package::build(self.workspace, &self.environment)?)?;
        let built = outcome.status.success();
        self.record("wheel", &outcome, Tally::default(), String::new());
        if built {
            package::install_here(self.workspace, &self.environment)?;
            self.fresh_environment()?;
        }
        // Without a wheel the tests fail one by one, each with the reason.
        self.python_tests()
    }

    /// `pip install calibc[cu13]`, `import calibc` and `calibc doctor` where there is nothing else.
    fn fresh_environment(&mut self) -> Result<()> {
        if !self.environment.is_virtual() {
            eprintln!("skipped: fresh environment: this Python makes no virtual environments");
            self.tally.skipped += 1;
            return Ok(());
        }
        let start = Instant::now();
        let folder = package::fresh(self.workspace, &self.environment)?;
        let install = start.elapsed();
        let mut import = Command::new(venv_python(&folder));
        import.args(["-c", "import calibc; print('calibc', calibc.__version__)"]);
        let mut doctor = Command::new(folder.join("bin/calibc"));
        doctor.arg("doctor");
        for (name, command) in [("import", &mut import), ("doctor", &mut doctor)] {
            eprintln!("\n== {name} in a fresh environment: {}", spelled(command));
            // What a user's shell has without any environment active: NVRTC must be found by itself.
            for variable in ["CALIBC_NVRTC", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME"] {
                command.env_remove(variable);
            }
            let outcome = stream(command.current_dir(&self.workspace.target))?;
            let mut tally = Tally { passed: 1, ..Tally::default() };
            let found = outcome.stdout.contains(&*folder.to_string_lossy());
            if !outcome.status.success() || (name == "doctor" && !found) {
                tally = Tally { failed: 1, ..Tally::default() };
            }
            let note = format!("fresh environment, installed in {:.1} s", install.as_secs_f64());
            self.record(name, &outcome, tally, note);
        }
        Ok(())
    }

    /// The Python tests, with the `calibc` binary at hand in `CALIBC_BIN`.
    fn python_tests(&mut self) -> Result<()> {
        if !has_python_tests(&self.workspace.root.join(PYTHON_TESTS)) {
            return Ok(());
        }
        let build = ["build", "--package", "calibc-cli", "--bin", "calibc"];
        let outcome = self.run("calibc for the Python tests", &mut self.workspace.cargo(&build))?;
        if !outcome.status.success() {
            self.record("python", &outcome, Tally::default(), "calibc does not build".into());
            return Ok(());
        }
        let mut python = Command::new(&self.environment.python);
        python.args(["-m", "unittest", "discover", "--start-directory", PYTHON_TESTS]);
        python.current_dir(&self.workspace.root).env("CALIBC_BIN", self.workspace.target.join("debug/calibc"));
        python.env("PYTHONDONTWRITEBYTECODE", "1");
        let outcome = self.run("python", &mut python)?;
        let tally = tally::unittest(&outcome.stderr);
        self.record("python", &outcome, tally, tally.to_string());
        Ok(())
    }

    /// Prints what happened; the last line is the tally.
    fn finish(self) -> bool {
        println!();
        for Step { name, ok, time, note } in &self.steps {
            println!("{} {name:8} {:7.1} s  {note}", if *ok { "ok  " } else { "FAIL" }, time.as_secs_f64());
        }
        println!("{}", self.tally);
        self.steps.iter().all(|step| step.ok)
    }
}

fn has_python_tests(folder: &Path) -> bool {
    fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("test_") && name.ends_with(".py")
    })
}

//! The Python environment under the target folder: NVRTC and NumPy, and for the tests of the Python package what its users have:
//! PyTorch and diffusers, some gigabytes. Beside it other NVRTCs, which kernels are compiled with, too.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{process::spelled, workspace::Workspace};

/// What every command needs.
const REQUIREMENTS: [&str; 2] = ["nvidia-cuda-nvrtc>=13,<14", "numpy>=1.24"];
/// What building and testing the Python package needs beside that. Versions move on when somebody moves them.
const PACKAGE_REQUIREMENTS: [&str; 5] =
    ["maturin>=1.9.4,<2", "torch==2.15.*", "diffusers==0.42.*", "accelerate==1.15.*", "transformers==5.23.*"];
/// Other NVRTCs, which generated kernels must compile with too, and where in its folder each has its library: that of PyTorch's builds
/// for CUDA 13.0, from a time when ptxas said other things of asynchronous products, and the oldest that makes Hopper kernels
/// (`calibc_driver::kernels::check_nvrtc`).
const OTHER_NVRTCS: [(&str, &str); 2] = [
    ("nvidia-cuda-nvrtc==13.0.88", "nvidia/cu13/lib/libnvrtc.so.13"),
    ("nvidia-cuda-nvrtc-cu12==12.6.68", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
];
/// Raise when the layout of the environment changes.
const LAYOUT: u32 = 1;
/// The oldest Python 3 with wheels of all this.
const OLDEST_PYTHON: (u32, u32) = (3, 10);
/// Pauses before the second and third attempt to install; networks have hiccups.
const PAUSES: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(20)];

/// An environment that is ready.
pub(crate) struct Environment {
    /// The interpreter.
    pub(crate) python: PathBuf,
    /// Where NumPy lies, when the interpreter does not know by itself.
    packages: Option<PathBuf>,
    /// The folder of libnvrtc, or what `CALIBC_NVRTC` said.
    pub(crate) nvrtc: PathBuf,
    /// The folders of other versions, where they were asked for.
    other_nvrtcs: Vec<PathBuf>,
    cache: PathBuf,
    folder: PathBuf,
}

impl Environment {
    /// Tells a child process about the environment, and that nothing may be missing in it.
    pub(crate) fn apply(&self, command: &mut Command) {
        command
            .env("CALIBC_NVRTC", &self.nvrtc)
            .env("CALIBC_PYTHON", &self.python)
            .env("CALIBC_REQUIRE_NVRTC", "1")
            .env("CALIBC_CACHE_DIR", &self.cache)
            .env("INSTA_UPDATE", "no");
        if !self.other_nvrtcs.is_empty() {
            // A path with a colon in it cannot be joined; the tests find them under the target folder then, too.
            if let Ok(paths) = env::join_paths(&self.other_nvrtcs) {
                command.env("CALIBC_TEST_NVRTC", paths);
            }
        }
        if let Some(packages) = &self.packages {
            let old = env::var_os("PYTHONPATH").unwrap_or_default();
            let paths = std::iter::once(packages.clone()).chain(env::split_paths(&old));
            // Only a path with a colon in it cannot be joined, and then the old value is kept.
            command.env("PYTHONPATH", env::join_paths(paths).unwrap_or(old));
        }
    }
}

impl Environment {
    /// pip, installing into the environment.
    pub(crate) fn pip_install(&self) -> Command {
        let mut pip = pip_install(&self.python);
        if let Some(packages) = &self.packages {
            pip.arg("--upgrade").arg("--target").arg(packages);
        }
        pip
    }

    /// Whether this is a virtual environment, and others can be made from its interpreter.
    pub(crate) fn is_virtual(&self) -> bool {
        self.packages.is_none()
    }

    /// A program that a package brought: `maturin`.
    pub(crate) fn scripts(&self) -> PathBuf {
        self.packages.as_ref().map_or_else(|| self.folder.join("bin"), |packages| packages.join("bin"))
    }
}

/// `pip install`, told to ignore settings that make sense for somebody's own installs and break these.
pub(crate) fn pip_install(python: &Path) -> Command {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]);
    pip.args(["--retries", "5", "--timeout", "60"]);
    pip.env("PIP_USER", "0").env("PIP_REQUIRE_VIRTUALENV", "0").env_remove("PIP_TARGET").env_remove("PIP_PREFIX");
    pip
}

/// `cargo xtask provision`.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let environment = provision_package(workspace)?;
    println!("CALIBC_PYTHON={}", environment.python.display());
    println!("CALIBC_NVRTC={}", environment.nvrtc.display());
    let others = env::join_paths(&provision_other_nvrtcs(workspace, environment)?.other_nvrtcs)?;
    println!("CALIBC_TEST_NVRTC={}", others.display());
    Ok(true)
}

/// Makes the environment, or finds it made. Several at once wait for each other.
pub(crate) fn provision(workspace: &Workspace) -> Result<Environment> {
    let folder = workspace.target.join("python");
    let _lock = lock(workspace)?;
    let base = find_python()?;
    ensure!(
        !base.program.starts_with(&folder),
        "{} is part of what this command makes, and may remove; deactivate that environment, or name another Python with PYTHON=..",
        base.program.display()
    );
    let stamp_path = folder.join("calibc.stamp");
    let stamp = format!("layout {LAYOUT}\n{}\npython {}\n", REQUIREMENTS.join("\n"), base.description);
    if fs::read_to_string(&stamp_path).is_ok_and(|found| found == stamp)
        && let Ok(environment) = open(workspace, &folder, &base)
    {
        return Ok(environment);
    }

    eprintln!("setting up {} ({})", workspace.show(&folder), REQUIREMENTS.join(", "));
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let python = make_venv(&base, &folder)?;
    let mut pip = pip_install(python.as_ref().unwrap_or(&base.program));
    if python.is_none() {
        pip.arg("--target").arg(site_of_target(&folder));
    }
    install(pip.arg("--only-binary=:all:").args(REQUIREMENTS))?;

    let environment = open(workspace, &folder, &base)?;
    let mut check = Command::new(&environment.python);
    check.args(["-c", "import numpy"]);
    environment.apply(&mut check);
    let status = check.status().with_context(|| format!("cannot run `{}`", spelled(&check)))?;
    ensure!(status.success(), "NumPy was installed into {} but does not load", folder.display());
    fs::write(&stamp_path, stamp).with_context(|| format!("cannot write {}", stamp_path.display()))?;
    Ok(environment)
}

/// The environment with what the Python package is built and tested with.
pub(crate) fn provision_package(workspace: &Workspace) -> Result<Environment> {
    let environment = provision(workspace)?;
    let lock = lock(workspace)?;
    let stamp_path = environment.folder.join("calibc-package.stamp");
    let stamp = PACKAGE_REQUIREMENTS.join("\n");
    if fs::read_to_string(&stamp_path).is_ok_and(|found| found == stamp) {
        return Ok(environment);
    }
    let folder = workspace.show(&environment.folder);
    eprintln!("adding to {folder} ({}); about 6 GB, some minutes", PACKAGE_REQUIREMENTS.join(", "));
    // Named again so that they stay within their bounds.
    install(environment.pip_install().arg("--only-binary=:all:").args(PACKAGE_REQUIREMENTS).args(REQUIREMENTS))?;
    fs::write(&stamp_path, stamp).with_context(|| format!("cannot write {}", stamp_path.display()))?;
    drop(lock);
    Ok(environment)
}

/// The environment with the other NVRTCs, each in a folder of its own.
pub(crate) fn provision_other_nvrtcs(workspace: &Workspace, environment: Environment) -> Result<Environment> {
    let _lock = lock(workspace)?;
    let all = workspace.target.join("nvrtc");
    let stamp_path = all.join("calibc.stamp");
    let stamp = OTHER_NVRTCS.map(|(package, _)| package).join("\n");
    let libraries = OTHER_NVRTCS.map(|(package, library)| all.join(package).join(library));
    if !(fs::read_to_string(&stamp_path).is_ok_and(|found| found == stamp)
        && libraries.iter().all(|path| path.is_file()))
    {
        eprintln!("setting up {} ({})", workspace.show(&all), OTHER_NVRTCS.map(|(package, _)| package).join(", "));
        // Other versions go with their folder: tests would find them.
        if all.exists() {
            fs::remove_dir_all(&all).with_context(|| format!("cannot remove {}", all.display()))?;
        }
        for ((package, _), library) in OTHER_NVRTCS.iter().zip(&libraries) {
            let mut pip = pip_install(&environment.python);
            install(pip.args(["--no-deps", "--only-binary=:all:", "--target"]).arg(all.join(package)).arg(package))?;
            ensure!(library.is_file(), "{package} has no {}", library.display());
        }
        fs::write(&stamp_path, stamp).with_context(|| format!("cannot write {}", stamp_path.display()))?;
    }
    let folders = libraries.iter().filter_map(|path| path.parent()).map(Path::to_path_buf).collect();
    Ok(Environment { other_nvrtcs: folders, ..environment })
}

/// Held by whoever changes the environment.
fn lock(workspace: &Workspace) -> Result<File> {
    let path = workspace.target.join("python.lock");
    let lock = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(lock)
}

/// A Python 3 of this machine.
struct Base {
    program: PathBuf,
    /// Version and path: another Python means another environment.
    description: String,
}

fn find_python() -> Result<Base> {
    let named = env::var_os("PYTHON").filter(|value| !value.is_empty());
    let names = named.map_or_else(|| vec!["python3".into(), "python".into()], |name| vec![name]);
    let mut tried = Vec::new();
    for name in &names {
        match ask_python(name) {
            Ok(base) => return Ok(base),
            Err(why) => tried.push(format!("{}: {why:#}", name.display())),
        }
    }
    let (major, minor) = OLDEST_PYTHON;
    bail!("need Python {major}.{minor} or newer; install it, or name one with PYTHON=.. (tried {})", tried.join("; "))
}

fn ask_python(name: &OsString) -> Result<Base> {
    let script = "import sys; print(*sys.version_info[:3]); print(sys.executable)";
    let output = Command::new(name).args(["-c", script]).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (version, program) = text.trim().split_once('\n').context("it does not tell its version")?;
    let numbers: Vec<u32> = version.split(' ').filter_map(|n| n.parse().ok()).collect();
    let [major, minor, patch] = numbers.as_slice() else { bail!("it does not tell its version") };
    ensure!((*major, *minor) >= OLDEST_PYTHON, "it is {major}.{minor}.{patch}");
    Ok(Base { program: program.trim().into(), description: format!("{major}.{minor}.{patch} {}", program.trim()) })
}

/// Makes a virtual environment and returns its interpreter. `None` where this Python cannot make one (Debian ships the needed
/// module apart): then pip installs into a plain folder.
fn make_venv(base: &Base, folder: &Path) -> Result<Option<PathBuf>> {
    let output = Command::new(&base.program)
        .args(["-m", "venv"])
        .arg(folder)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", base.program.display()))?;
    let python = venv_python(folder);
    if output.status.success() && python.is_file() {
        return Ok(Some(python));
    }
    eprintln!("no virtual environment ({}); installing into a plain folder", last_line(&output.stdout, &output.stderr));
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let has_pip = Command::new(&base.program).args(["-m", "pip", "--version"]).output();
    ensure!(
        has_pip.is_ok_and(|output| output.status.success()),
        "{} can neither make virtual environments nor run pip; install python3-venv or python3-pip",
        base.program.display()
    );
    Ok(None)
}

pub(crate) fn install(pip: &mut Command) -> Result<()> {
    let mut pauses = PAUSES.into_iter();
    loop {
        let status = pip.stdin(Stdio::null()).status().with_context(|| format!("cannot run `{}`", spelled(pip)))?;
        if status.success() {
            return Ok(());
        }
        let Some(pause) = pauses.next() else {
            bail!("`{}` failed ({status}); is the Python package index reachable?", spelled(pip));
        };
        eprintln!("pip failed ({status}); trying again in {} s", pause.as_secs());
        thread::sleep(pause);
    }
}

/// The environment in `folder`, if it is whole.
fn open(workspace: &Workspace, folder: &Path, base: &Base) -> Result<Environment> {
    let plain = site_of_target(folder);
    let (python, site, packages) = if plain.is_dir() {
        (base.program.clone(), plain.clone(), Some(plain))
    } else {
        let python = venv_python(folder);
        let script = "import sysconfig; print(sysconfig.get_path('purelib'))";
        let output = Command::new(&python).args(["-c", script]).stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("cannot run {}", python.display()))?;
        ensure!(output.status.success(), "{} is broken; remove {}", python.display(), folder.display());
        (python, PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()), None)
    };
    ensure!(site.join("numpy").is_dir(), "no NumPy in {}; remove {}", site.display(), folder.display());
    let fetched = site.join("nvidia/cu13/lib");
    ensure!(
        fetched.join("libnvrtc.so.13").is_file(),
        "no libnvrtc.so.13 in {}; remove {}",
        fetched.display(),
        folder.display()
    );
    let named = env::var_os("CALIBC_NVRTC").filter(|value| !value.is_empty());
    // Absolute, because cargo runs every test in its own package's folder.
    let named = named.map(|path| std::path::absolute(&path).unwrap_or_else(|_| path.into()));
    let nvrtc = named.unwrap_or(fetched);
    let cache = workspace.target.join("calibc-cache");
    Ok(Environment { python, packages, nvrtc, other_nvrtcs: Vec::new(), cache, folder: folder.to_owned() })
}

pub(crate) fn venv_python(folder: &Path) -> PathBuf {
    folder.join("bin/python")
}

/// Where pip installs to when there is no virtual environment.
fn site_of_target(folder: &Path) -> PathBuf {
    folder.join("site")
}

fn last_line(stdout: &[u8], stderr: &[u8]) -> String {
    let text = [stdout, stderr].map(String::from_utf8_lossy).join("\n");
    text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("no reason given").to_owned()
}

//! A loaded libnvrtc, and one compile with it.

use std::{
    env,
    ffi::{CString, OsStr},
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{
    error::{Failure, GateFailure, NvrtcError, Tried, WhyNot},
    ffi::{Api, Code, OpenError, open_forever},
    find::{self, FILE_NAMES, Place, Surroundings},
    report::{self, Resources},
};

/// Major versions of NVRTC that calibc's kernels are made for. Older ones know no `sm_90a`; newer ones have not been seen.
pub const SUPPORTED_MAJORS: std::ops::RangeInclusive<u32> = 12..=13;

/// A loaded libnvrtc. Compiles may run on several threads at once.
pub struct Nvrtc {
    api: Api,
    path: PathBuf,
    version: (u32, u32),
    archs: Vec<u32>,
    file_bytes: u64,
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nvrtc").field("path", &self.path).field("version", &self.version).finish_non_exhaustive()
    }
}

/// One kernel to compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Self-contained CUDA text.
    pub source: &'a str,
    /// Name of its `extern "C"` entry function.
    pub symbol: &'a str,
    /// Architecture of the machine code: `sm_80`, `sm_90a`.
    pub arch: &'a str,
}

/// Machine code that passed the build gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// An ELF object for exactly the requested architecture.
    pub cubin: Vec<u8>,
    /// What the kernel takes.
    pub resources: Resources,
    /// Lines of the log that warn.
    pub warnings: Vec<String>,
    /// The program log, without the lines that differ from run to run.
    pub log: String,
}

impl Compiled {
    /// Whether the build gate lets this through.
    pub(crate) fn passes(&self, symbol: &str) -> bool {
        gate(&self.cubin, &report::read(&self.log, symbol), symbol).is_ok()
    }
}

impl Request<'_> {
    /// The options every compile gets, in order. Part of the cache key.
    pub(crate) fn options(&self) -> Vec<String> {
        // `-v` puts registers and spills into the program log. No `--device-stack-protector` and no `-rdc`: the first serialises
        // wgmma, the second drops setmaxnreg.
        vec![format!("--gpu-architecture={}", self.arch), "-std=c++17".into(), "--ptxas-options=-v".into()]
    }

    /// The architecture's number (90 of `sm_90a`). `compute_90` and the like are refused, as they give no machine code;
    /// so are suffixes that the number never has: `a` came with 90 and `f` with 100.
    fn arch_number(&self) -> Option<u32> {
        let name = self.arch.strip_prefix("sm_")?;
        let (digits, least) = match name.strip_suffix(['a', 'f']) {
            Some(digits) => (digits, if name.ends_with('a') { 90 } else { 100 }),
            None => (name, 0),
        };
        let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
        (number >= least).then_some(number)
    }

    /// BLAKE3 of the source, which names the file it is saved to when a compile fails.
    fn source_digest(&self) -> String {
        blake3::hash(self.source.as_bytes()).to_hex().to_string()
    }
}

impl Nvrtc {
    /// Finds and loads libnvrtc. `explicit` (a file or a folder; the flag `--nvrtc`) wins, then `CALIBC_NVRTC`; a place named
    /// by the user is the only one looked at. Else the first usable library of: the running Python
    /// interpreter's packages ([`crate::set_python_packages`]), `VIRTUAL_ENV`, `CONDA_PREFIX`, the Python
    /// environment the executable lies in, the user's and the `PATH`'s Python packages, `CUDA_HOME`, `CUDA_PATH`,
    /// `/usr/local/cuda`, the system loader.
    ///
    /// # Errors
    /// [`NvrtcError::NotFound`] or [`NvrtcError::NotThere`], with every place tried and why it did not serve.
    pub fn find(explicit: Option<&Path>) -> Result<Self, NvrtcError> {
        let search = find::search(explicit, &Surroundings::current());
        let mut tried = Vec::new();
        for (origin, place) in search.places {
            let bare = matches!(place, Place::Loader(_));
            let files = match files_at(&place) {
                Ok(files) => files,
                Err((place, why)) => {
                    tried.push(Tried { origin, place, why });
                    continue;
                }
            };
            for file in files {
                match Self::load(file.as_os_str(), bare) {
                    Ok(nvrtc) => {
                        tracing::debug!(path = %nvrtc.path.display(), version = ?nvrtc.version, origin, "found libnvrtc");
                        return Ok(nvrtc);
                    }
                    Err(why) => tried.push(Tried { origin, place: file, why }),
                }
            }
        }
        Err(match search.named_by {
            Some(named_by) => NvrtcError::NotThere { named_by, tried },
            None => NvrtcError::NotFound { tried },
        })
    }

    /// Loads one library, or says why it does not serve.
    fn load(name: &OsStr, bare: bool) -> Result<Self, WhyNot> {
        let api = Api::open(name).map_err(|error| match error {
            // The loader's message starts with the path, which the caller prints as well.
            OpenError::Load(error) => {
                let text = source_text(&error);
                WhyNot::NotLoadable(text.strip_prefix(&format!("{}: ", name.display())).unwrap_or(&text).to_owned())
            }
            OpenError::Symbol(symbol) => WhyNot::MissingFunction(symbol),
        })?;
        let broken = |function, code| WhyNot::Broken { function, message: api.describe(code) };
        let version = api.version().map_err(|code| broken("nvrtcVersion", code))?;
        if version.0 < *SUPPORTED_MAJORS.start() {
            return Err(WhyNot::TooOld(version));
        } else if version.0 > *SUPPORTED_MAJORS.end() {
            return Err(WhyNot::TooNew(version));
        }
        let archs = api.archs().map_err(|code| broken("nvrtcGetSupportedArchs", code))?;
        let path = if bare { find::mapped_file(api.address()) } else { None };
        let path = path.unwrap_or_else(|| PathBuf::from(name));
        if let Some(builtins) = find::builtins_beside(&path, version)
            && let Err(error) = open_forever(builtins.as_os_str())
        {
            tracing::warn!(path = %builtins.display(), error = source_text(&error), "cannot load NVRTC's builtins");
        }
        let file_bytes = fs::metadata(&path).map_or(0, |meta| meta.len());
        Ok(Self { api, path, version, archs, file_bytes })
    }

    /// Major and minor version, as the library tells it.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Numbers of the architectures it can make code for (90 for `sm_90` and `sm_90a`), ascending.
    pub fn supported_archs(&self) -> &[u32] {
        &self.archs
    }

    /// Whether this NVRTC knows the architecture of `request`.
    pub fn supports(&self, request: &Request<'_>) -> bool {
        request.arch_number().is_some_and(|number| self.archs.contains(&number))
    }

    /// Size of the library's file: tells apart releases that share a version number.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Compiles one kernel and puts it through the build gate. A rejected source is saved to the system's folder for
    /// temporary files, under its digest.
    ///
    /// # Errors
    /// [`NvrtcError::UnsupportedArch`] before anything is compiled; [`NvrtcError::Compile`] when NVRTC rejects the source;
    /// [`NvrtcError::Gate`] for spilled registers, serialised tensor-core code, or no machine code.
    pub fn compile(&self, request: &Request<'_>) -> Result<Compiled, NvrtcError> {
        self.compile_saving(request, &env::temp_dir().join("calibc-rejected"))
    }

    /// [`Nvrtc::compile`] with the folder for rejected sources.
    pub(crate) fn compile_saving(&self, request: &Request<'_>, rejected: &Path) -> Result<Compiled, NvrtcError> {
        if !self.supports(request) {
            return Err(self.unsupported(request));
        }
        let options = request.options();
        let source = c_string("the source", request.source)?;
        let name = c_string("the symbol", &format!("{}.cu", request.symbol))?;
        let c_options = options.iter().map(|o| c_string("an option", o)).collect::<Result<Vec<_>, _>>()?;

        let build = |options: &[CString]| {
            let mut program =
                self.api.program(&source, &name).map_err(|code| self.failed_call("nvrtcCreateProgram", code, ""))?;
            let outcome = program.compile(options);
            let log = program.log().map_err(|code| self.failed_call("nvrtcGetProgramLog", code, ""))?;
            Ok((program, outcome, report::reproducible(&log)))
        };
        let (mut program, mut outcome, mut log) = build(&c_options)?;
        if outcome.is_ok() && report::read(&log, request.symbol).resources.is_none() {
            // Beside a driver, NVRTC may answer from a cache of the driver's, which keeps code but no report. Releases that do not
            // know the option have no such cache.
            let fresh = c_options.iter().cloned().chain([c"--no-cache".to_owned()]).collect::<Vec<_>>();
            let again = build(&fresh)?;
            if again.1.is_ok() {
                (program, outcome, log) = again;
            }
        }
        let failure = |log: &str| {
            Box::new(Failure {
                symbol: request.symbol.to_owned(),
                arch: request.arch.to_owned(),
                version: self.version,
                options: options.clone(),
                log: log.to_owned(),
                source_path: save_source(rejected, request),
            })
        };
        match outcome {
            Ok(()) => {}
            // How NVRTC refuses an architecture depends on whether its driver or its front end notices.
            Err(Code::INVALID_OPTION) if log.contains("--gpu-architecture") => return Err(self.unsupported(request)),
            Err(Code::COMPILATION) if log.contains("--nv_arch flag") => return Err(self.unsupported(request)),
            Err(Code::COMPILATION) => return Err(NvrtcError::Compile(failure(&log))),
            Err(code) => return Err(self.failed_call("nvrtcCompileProgram", code, &log)),
        }

        let cubin = program.cubin().map_err(|code| self.failed_call("nvrtcGetCUBIN", code, &log))?;
        let read = report::read(&log, request.symbol);
        match gate(&cubin, &read, request.symbol) {
            Ok(resources) => Ok(Compiled { cubin, resources, warnings: read.warnings, log }),
            Err(reason) => Err(NvrtcError::Gate { reason, failure: failure(&log) }),
        }
    }

    fn unsupported(&self, request: &Request<'_>) -> NvrtcError {
        NvrtcError::UnsupportedArch {
            arch: request.arch.to_owned(),
            version: self.version,
            path: self.path.clone(),
            supported: self.archs.iter().map(|number| format!("sm_{number}")).collect(),
        }
    }

    fn failed_call(&self, function: &'static str, code: Code, log: &str) -> NvrtcError {
        let mut message = self.api.describe(code);
        if !log.trim().is_empty() {
            message = format!("{message}: {}", log.trim());
        }
        let hint = if code == Code::BUILTIN_OPERATION_FAILURE {
            "; libnvrtc-builtins.so of the same version must lie beside libnvrtc: reinstall nvidia-cuda-nvrtc"
        } else {
            ""
        };
        NvrtcError::Call { function, path: self.path.clone(), message, hint }
    }
}

/// What to hand to the dynamic loader for a place: absolute paths, which it does not search for, or a bare name. The error is
/// the place and why there is nothing in it.
fn files_at(place: &Place) -> Result<Vec<PathBuf>, (PathBuf, WhyNot)> {
    let absolute = |file: &Path| std::path::absolute(file).unwrap_or_else(|_| Path::new(".").join(file));
    match place {
        Place::Loader(name) => Ok(vec![PathBuf::from(name)]),
        Place::File(file) if file.is_file() => Ok(vec![absolute(file)]),
        Place::File(file) => Err((file.clone(), WhyNot::NoSuchFile)),
        Place::Folder(folder) => {
            let files = FILE_NAMES.map(|name| folder.join(name));
            let files: Vec<PathBuf> = files.iter().filter(|file| file.is_file()).map(|file| absolute(file)).collect();
            if !files.is_empty() {
                return Ok(files);
            }
            Err((folder.clone(), if folder.is_dir() { WhyNot::NoLibrary } else { WhyNot::NoSuchFolder }))
        }
    }
}

/// The build gate: machine code, for the entry asked for, with nothing spilled and nothing serialised.
/// Where ptxas reported nothing at all, the cubin itself tells whether anything can have been spilled.
fn gate(cubin: &[u8], report: &report::Report, symbol: &str) -> Result<Resources, GateFailure> {
    if !cubin.starts_with(b"\x7fELF") {
        return Err(GateFailure::NoCubin { bytes: cubin.len() });
    }
    if !report.diagnostics.is_empty() {
        return Err(GateFailure::Diagnostics { codes: report.diagnostics.clone() });
    }
    let unreported = || if report.entries.is_empty() { crate::cubin::resources(cubin, symbol) } else { None };
    let Some(resources) = report.resources.or_else(unreported) else {
        return Err(GateFailure::NoEntry { found: report.entries.clone() });
    };
    if resources.spill_stores > 0 || resources.spill_loads > 0 {
        return Err(GateFailure::Spills { stores: resources.spill_stores, loads: resources.spill_loads });
    }
    Ok(resources)
}

/// Writes the source of a failed compile to `folder` under its digest. `None`, and a warning in the log, where that fails.
fn save_source(folder: &Path, request: &Request<'_>) -> Option<PathBuf> {
    let path = folder.join(format!("{}.cu", request.source_digest()));
    // Through a rename: never follows a link that somebody else put under the predictable name.
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut file = tempfile::Builder::new().prefix(crate::cache::TEMP_PREFIX).tempfile_in(folder)?;
        file.write_all(request.source.as_bytes())?;
        file.persist(&path)?;
        Ok(())
    };
    match write() {
        Ok(()) => Some(path),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot save the source of a failed compile");
            None
        }
    }
}

/// The loader's own words; libloading's top message only says that dlopen failed.
fn source_text(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn c_string(what: &str, text: &str) -> Result<CString, NvrtcError> {
    CString::new(text).map_err(|_| NvrtcError::BadRequest { what: format!("{what} holds a NUL byte") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arch_number(arch: &str) -> Option<u32> {
        Request { source: "", symbol: "", arch }.arch_number()
    }

    #[test]
    fn only_real_architectures_have_a_number() {
        let real = [("sm_80", 80), ("sm_90", 90), ("sm_90a", 90), ("sm_100f", 100), ("sm_120a", 120)];
        assert!(real.iter().all(|(arch, number)| arch_number(arch) == Some(*number)));
        let unreal = ["compute_90a", "sm_", "sm_a", "sm_+90", "sm_80a", "sm_90f", "sm_90aa", "90", "sm_99999999999"];
        assert!(unreal.iter().all(|arch| arch_number(arch).is_none()));
    }

    #[test]
    fn the_gate_lets_through_machine_code_with_a_clean_report_only() {
        let clean = "ptxas info    : Compiling entry function 'k' for 'sm_80'\nptxas info    : Function properties for k\n\
                     ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                     ptxas info    : Used 10 registers, 256 bytes smem\n";
        let check = |cubin: &[u8], log: &str, symbol| gate(cubin, &report::read(log, symbol), symbol);
        let resources = check(b"\x7fELF..", clean, "k").expect("clean");
        assert_eq!((resources.registers, resources.shared_bytes), (10, 256));
        assert_eq!(check(b"", clean, "k"), Err(GateFailure::NoCubin { bytes: 0 }));
        assert_eq!(check(b"// PTX", clean, "k"), Err(GateFailure::NoCubin { bytes: 6 }));
        assert_eq!(check(b"\x7fELF", clean, "j"), Err(GateFailure::NoEntry { found: vec!["k".into()] }));
        assert_eq!(check(b"\x7fELF", "", "k"), Err(GateFailure::NoEntry { found: vec![] }));
        let loads = clean.replace("0 bytes spill loads", "4 bytes spill loads");
        assert_eq!(check(b"\x7fELF", &loads, "k"), Err(GateFailure::Spills { stores: 0, loads: 4 }));
        let serialised = format!("ptxas info    : (C7510) Potential Performance Loss\n{clean}");
        let codes = vec!["C7510".to_owned()];
        assert_eq!(check(b"\x7fELF", &serialised, "k"), Err(GateFailure::Diagnostics { codes }));
        // Kept code meets the gate again.
        let kept = |log: &str| Compiled { cubin: b"\x7fELF".into(), resources, warnings: Vec::new(), log: log.into() };
        assert!(kept(clean).passes("k") && !kept(&serialised).passes("k"));
    }
}

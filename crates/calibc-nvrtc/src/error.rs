//! What can go wrong, sorted by who must act.

use std::{fmt, io, path::PathBuf};

use thiserror::Error;

use crate::nvrtc::SUPPORTED_MAJORS;

/// Errors of finding libnvrtc, compiling with it, and the cache.
#[derive(Debug, Error)]
pub enum NvrtcError {
    /// No usable libnvrtc anywhere.
    #[error(
        "found no usable libnvrtc (the CUDA run-time compiler); install it with `pip install nvidia-cuda-nvrtc` in the active \
         Python environment, or name the library or its folder with --nvrtc or CALIBC_NVRTC; tried:{}",
        Listing(.tried)
    )]
    NotFound {
        /// Every place looked at, in order, and why it did not serve.
        tried: Vec<Tried>,
    },
    /// The place named by the user has no library that can be opened.
    #[error(
        "no usable libnvrtc at the place named by {named_by}; name a libnvrtc.so.* file, its folder, or a Python environment \
         with nvidia-cuda-nvrtc installed; tried:{}",
        Listing(.tried)
    )]
    NotThere {
        /// `--nvrtc` or `CALIBC_NVRTC`.
        named_by: &'static str,
        /// Every file looked at, and why it did not serve.
        tried: Vec<Tried>,
    },
    /// The library cannot make code for this architecture.
    #[error(
        "NVRTC {}.{} ({path}) cannot compile for `{arch}`; it supports {supported}; choose another --arch or another NVRTC",
        .version.0, .version.1, path = .path.display(), supported = .supported.join(", ")
    )]
    UnsupportedArch {
        /// The architecture asked for.
        arch: String,
        /// NVRTC's version.
        version: (u32, u32),
        /// The library.
        path: PathBuf,
        /// What it says it supports (`sm_80`, ..).
        supported: Vec<String>,
    },
    /// The request cannot be handed to a C interface.
    #[error("the kernel request is malformed: {what}")]
    BadRequest {
        /// What is wrong with it.
        what: String,
    },
    /// NVRTC rejected the source.
    #[error("NVRTC did not compile {0}")]
    Compile(Box<Failure>),
    /// NVRTC accepted the source, but the machine code is not fit for use.
    #[error("{reason} in {failure}")]
    Gate {
        /// What the build gate found.
        reason: GateFailure,
        /// What was compiled, and what NVRTC said.
        failure: Box<Failure>,
    },
    /// A call into NVRTC failed for a reason that is not the source's.
    #[error("{function} failed in {path}: {message}{hint}", path = .path.display())]
    Call {
        /// The C function.
        function: &'static str,
        /// The library.
        path: PathBuf,
        /// NVRTC's own words for the result code, and its log if it left one.
        message: String,
        /// What to do, where that is known; starts with `; `.
        hint: &'static str,
    },
    /// Nothing says where the cache should be.
    #[error("no place for the compile cache; set CALIBC_CACHE_DIR, XDG_CACHE_HOME or HOME to a folder's absolute path")]
    NoCacheDir,
    /// The cache cannot be opened, listed or cleared.
    #[error("compile cache {path}: {source}; choose another folder with CALIBC_CACHE_DIR", path = .path.display())]
    Cache {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// One place where libnvrtc was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Who named the place: `VIRTUAL_ENV`, `CUDA_HOME`, the system loader.
    pub origin: &'static str,
    /// The file, the folder, or a bare library name.
    pub place: PathBuf,
    /// Why it did not serve.
    pub why: WhyNot,
}

/// Why a place where libnvrtc was looked for did not serve.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhyNot {
    /// There is no such file.
    NoSuchFile,
    /// There is no such folder.
    NoSuchFolder,
    /// A folder without a library of a supported version.
    NoLibrary,
    /// The dynamic loader refuses the file, in these words.
    NotLoadable(String),
    /// A library, but without this function.
    MissingFunction(&'static str),
    /// An NVRTC older than [`crate::SUPPORTED_MAJORS`].
    TooOld((u32, u32)),
    /// An NVRTC newer than [`crate::SUPPORTED_MAJORS`].
    TooNew((u32, u32)),
    /// The first calls into it fail.
    Broken {
        /// The C function.
        function: &'static str,
        /// NVRTC's own words for the result code.
        message: String,
    },
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (oldest, newest) = (SUPPORTED_MAJORS.start(), SUPPORTED_MAJORS.end());
        match self {
            Self::NoSuchFile => f.write_str("no such file"),
            Self::NoSuchFolder => f.write_str("no such folder"),
            Self::NoLibrary => write!(f, "holds no libnvrtc.so.{newest} or libnvrtc.so.{oldest}"),
            Self::NotLoadable(why) => f.write_str(why),
            Self::MissingFunction(name) => write!(f, "not an NVRTC of CUDA {oldest} to {newest}: it has no {name}"),
            Self::TooOld((major, minor)) => {
                write!(f, "NVRTC {major}.{minor} is too old; calibc needs {oldest}.0 or newer")
            }
            Self::TooNew((major, minor)) => {
                write!(f, "NVRTC {major}.{minor} is too new; calibc knows versions up to {newest}")
            }
            Self::Broken { function, message } => write!(f, "{function} failed: {message}"),
        }
    }
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.place.display(), self.origin, self.why)
    }
}

struct Listing<'a>(&'a [Tried]);

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|t| write!(f, "\n  {t}"))
    }
}

/// A compile that gave no usable kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kernel.
    pub symbol: String,
    /// The architecture.
    pub arch: String,
    /// NVRTC's version.
    pub version: (u32, u32),
    /// The options as they were given.
    pub options: Vec<String>,
    /// NVRTC's program log.
    pub log: String,
    /// Where the source was saved, named by its digest; `None` where that failed too.
    pub source_path: Option<PathBuf>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { symbol, arch, version, options, log, source_path } = self;
        write!(f, "`{symbol}` for {arch} (NVRTC {}.{}, options {}", version.0, version.1, options.join(" "))?;
        match source_path {
            Some(path) => write!(f, "; source saved to {})", path.display())?,
            None => write!(f, "; the source could not be saved)")?,
        }
        let log = log.trim_end();
        if log.is_empty() { write!(f, "; the log is empty") } else { write!(f, "; log:\n{log}") }
    }
}

/// Why a kernel that compiled was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GateFailure {
    /// Registers went to local memory. Bytes per thread, summed over every function of the program.
    Spills {
        /// Bytes stored.
        stores: u32,
        /// Bytes loaded.
        loads: u32,
    },
    /// ptxas reported that it gave up on asynchronous tensor-core code or on register reallocation (`C7500` to `C7599`).
    Diagnostics {
        /// The codes, each once, ascending.
        codes: Vec<String>,
    },
    /// No machine code came out, or not an ELF object.
    NoCubin {
        /// How many bytes came out.
        bytes: usize,
    },
    /// ptxas did not report on an entry function of the requested name.
    NoEntry {
        /// The entry functions it did report on.
        found: Vec<String>,
    },
}

impl fmt::Display for GateFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spills { stores, loads } => {
                write!(f, "registers spill ({stores} bytes stored, {loads} bytes loaded per thread)")
            }
            Self::Diagnostics { codes } => write!(f, "ptxas reports {}", codes.join(", ")),
            Self::NoCubin { bytes } => write!(f, "no machine code came out ({bytes} bytes)"),
            Self::NoEntry { found } if found.is_empty() => write!(f, "no entry function"),
            Self::NoEntry { found } => write!(f, "no entry function of that name (only {})", found.join(", ")),
        }
    }
}

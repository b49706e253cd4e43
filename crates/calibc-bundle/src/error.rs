//! Everything that can be wrong with a bundle, by who must act.

use std::{fmt, io, path::PathBuf};

use calibc_ir::{Arch, Variant};
use thiserror::Error;

/// Why a bundle cannot be written, read or used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The file system refused.
    #[error("cannot {action} `{}`: {source}; {cure}", path.display())]
    Io {
        /// What was tried: `read`, `write`, ...
        action: &'static str,
        /// The file, as it was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do about it.
        cure: &'static str,
    },
    /// The file does not start with the magic.
    #[error("not a calibc bundle: the first bytes are not its magic; give a file that `calibc compile` wrote")]
    NotABundle,
    /// A sound header of a format this build does not read.
    #[error(
        "bundle format {found} is not readable here (this build reads format {readable}); \
         recompile the bundle, or use the calibc release that wrote it"
    )]
    VersionNotReadable {
        /// Format version of the file.
        found: u32,
        /// The one version this build reads.
        readable: u32,
    },
    /// Truncated, altered, or put together by something that broke the rules of the format.
    #[error("bundle is corrupt at {what}: {why}; fetch it again, or recompile it")]
    Corrupt {
        /// `header`, `manifest`, `manifest field ...`, `payload ...`, `padding ...` or `plan`.
        what: String,
        /// What was expected and found there.
        why: String,
    },
    /// The kernels were generated for another launch contract than [`calibc_ir::abi`] of this build.
    #[error("kernels have launch layout `{found}` but this runtime launches `{expected}`; recompile the bundle")]
    AbiMismatch {
        /// [`calibc_ir::abi::describe`] as stored.
        found: String,
        /// The same of this build.
        expected: String,
    },
    /// No kernel of the variant runs on this GPU.
    #[error(
        "no kernel for compute capability {}.{}: the bundle has {}; recompile with `--arch` for this GPU",
        cc.0, cc.1, List(available)
    )]
    NotForThisGpu {
        /// Compute capability of the GPU, (major, minor).
        cc: (u32, u32),
        /// Architectures the variant was compiled for.
        available: Vec<Arch>,
    },
    /// No kernel of the variant for any GPU.
    #[error("no kernel `{variant}`: the bundle has {}; recompile with a target that asks for it", List(available))]
    NoSuchVariant {
        /// The variant asked for.
        variant: Variant,
        /// Variants the bundle has kernels of.
        available: Vec<Variant>,
    },
    /// The bundle was compiled for a model of other dimensions.
    #[error("bundle is for {bundle} {what} but the model has {found}; compile one from traces of this model")]
    NotForThisModel {
        /// The dimension: `layers`, `heads`, `head_dim` or `steps`.
        what: &'static str,
        /// What the bundle was compiled for.
        bundle: u32,
        /// What the caller has.
        found: u32,
    },
    /// The bundle was compiled for another resolution or length.
    #[error("bundle is for {bundle} {what} but there are {found}; compile one for this resolution and length")]
    NotForThisShape {
        /// The dimension: `query tokens` or `key tokens`.
        what: &'static str,
        /// What the bundle was compiled for.
        bundle: u32,
        /// What the caller has.
        found: u32,
    },
    /// What was handed to [`crate::encode`] would not open again: a mistake of the caller.
    #[error("cannot make a bundle: {what}: {why}")]
    Unwritable {
        /// The part of the contents.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

impl BundleError {
    pub(crate) fn corrupt(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into(), why: why.into() }
    }

    pub(crate) fn unwritable(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unwritable { what: what.into(), why: why.into() }
    }
}

struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0 else { return f.write_str("none") };
        write!(f, "{first}")?;
        rest.iter().try_for_each(|item| write!(f, ", {item}"))
    }
}

//! Why a session ended without a bundle.

use std::path::PathBuf;

use calibc_bundle::BundleError;
use calibc_codegen::CodegenError;
use calibc_nvrtc::NvrtcError;
use calibc_opt::{OptError, PASSES};
use calibc_trace::TraceError;
use thiserror::Error;

use crate::kernels::OLDEST_NVRTC_FOR_HOPPER;
use crate::masks::MaskFileError;
use crate::resolve::{Difference, MAX_SITES};
use crate::spec::SpecError;

/// Who must act on an error. The command line makes an exit code of it, Python an exception class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// The user asked for something that cannot be.
    Usage,
    /// Traces, spec, masks or bundle are wrong.
    BadInput,
    /// This machine lacks something.
    Environment,
    /// The file system refused.
    Io,
    /// A bug of calibc.
    Internal,
    /// The caller stopped the session.
    Cancelled,
}

/// Why a session ended without a bundle.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The spec is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The spec is for another model, grid or sampler than the traces.
    #[error("the spec is not for these traces; change the spec or take other traces:{}", lines(.differences))]
    SpecIsNotForTraces {
        /// Every field that differs.
        differences: Vec<Difference>,
    },
    /// Without traces a spec must say everything.
    #[error("without traces the spec must have `{field}`; add it, or give traces")]
    SpecIsIncomplete {
        /// The missing section.
        field: &'static str,
    },
    /// More sites than any plan has.
    #[error(
        "{steps} steps x {layers} layers x {heads} heads are more sites than a plan can hold ({MAX_SITES}); check `steps` and \
         `model`"
    )]
    TooManySites {
        /// Steps of the sampler.
        steps: usize,
        /// Layers.
        layers: u32,
        /// Heads.
        heads: u32,
    },
    /// The policy calibrates, but there is nothing to calibrate with.
    #[error(
        "the policy chooses masks from traces; give a folder of traces, or masks of your own with `kind: explicit`"
    )]
    PolicyNeedsTraces,
    /// `--dump-after` names no pass.
    #[error("there is no pass `{name}`; the passes are {}, or `all`", PASSES.join(", "))]
    UnknownPass {
        /// What was given.
        name: String,
    },
    /// The traces are wrong.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// No plan.
    #[error(transparent)]
    Opt(OptError),
    /// The mask file is wrong.
    #[error(transparent)]
    Masks(#[from] MaskFileError),
    /// No source for a kernel.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// No machine code for a kernel.
    #[error(transparent)]
    Nvrtc(#[from] NvrtcError),
    /// The NVRTC is too old for Hopper kernels.
    #[error(
        "Hopper kernels need NVRTC {}.{} (Update 2) or newer, and {} is {}.{}; install a newer one (`pip install -U nvidia-cuda-nvrtc-cu12`), or make \
         portable kernels (`--portable`)",
        OLDEST_NVRTC_FOR_HOPPER.0, OLDEST_NVRTC_FOR_HOPPER.1, path.display(), found.0, found.1
    )]
    OldNvrtc {
        /// Its version.
        found: (u32, u32),
        /// Where it lies.
        path: PathBuf,
    },
    /// No bundle from the parts.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The bundle just made does not open: a bug of calibc.
    #[error("internal error: the bundle just made does not open again: {0}")]
    SelfCheck(#[source] BundleError),
    /// The observer asked to stop.
    #[error("cancelled; nothing was written")]
    Cancelled,
}

impl DriverError {
    /// Who must act.
    pub fn family(&self) -> Family {
        match self {
            Self::Spec(SpecError::Read { .. }) => Family::Io,
            Self::Spec(SpecError::Unwritable { .. }) => Family::Internal,
            Self::Spec(_) => Family::BadInput,
            Self::SpecIsNotForTraces { .. } | Self::SpecIsIncomplete { .. } | Self::TooManySites { .. } => {
                Family::BadInput
            }
            Self::PolicyNeedsTraces | Self::UnknownPass { .. } => Family::Usage,
            Self::Trace(error) => of_trace(error),
            Self::Opt(OptError::Calibration { source, .. }) => source.downcast_ref().map_or(Family::BadInput, of_trace),
            Self::Opt(OptError::VerifyAfterPass { .. }) => Family::Internal,
            Self::Opt(OptError::Cancelled) | Self::Cancelled => Family::Cancelled,
            Self::Opt(_) => Family::BadInput,
            Self::Masks(MaskFileError::Io { .. }) => Family::Io,
            Self::Masks(_) => Family::BadInput,
            Self::Codegen(_) | Self::SelfCheck(_) => Family::Internal,
            Self::Nvrtc(NvrtcError::Cache { .. }) => Family::Io,
            Self::Nvrtc(NvrtcError::Gate { .. } | NvrtcError::Compile(_) | NvrtcError::BadRequest { .. }) => {
                Family::Internal
            }
            Self::Nvrtc(_) | Self::OldNvrtc { .. } => Family::Environment,
            Self::Bundle(BundleError::Io { .. }) => Family::Io,
            Self::Bundle(BundleError::NotForThisGpu { .. } | BundleError::NoSuchVariant { .. }) => Family::Environment,
            Self::Bundle(BundleError::Unwritable { .. }) => Family::Internal,
            Self::Bundle(_) => Family::BadInput,
        }
    }
}

fn of_trace(error: &TraceError) -> Family {
    if error.is_io() { Family::Io } else { Family::BadInput }
}

fn lines(differences: &[Difference]) -> String {
    differences.iter().map(|d| format!("\n  {d}")).collect()
}

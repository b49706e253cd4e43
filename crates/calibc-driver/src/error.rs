//! Why a session ended without a bundle.

use calibc_bundle::BundleError;
use calibc_codegen::CodegenError;
use calibc_nvrtc::NvrtcError;
use thiserror::Error;

use crate::masks::MaskFileError;
use crate::resolve::Difference;
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
    /// The policy calibrates, but there is nothing to calibrate with.
    #[error(
        "the policy chooses masks from traces; give a folder of traces, or masks of your own with `kind: explicit`"
    )]
    PolicyNeedsTraces,
    /// The mask file is wrong.
    #[error(transparent)]
    Masks(#[from] MaskFileError),
    /// No source for a kernel.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// No machine code for a kernel.
    #[error(transparent)]
    Nvrtc(#[from] NvrtcError),
    /// No bundle from the parts.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The observer asked to stop.
    #[error("cancelled; nothing was written")]
    Cancelled,
}

fn lines(differences: &[Difference]) -> String {
    differences.iter().map(|d| format!("\n  {d}")).collect()
}

//! Exit codes, and which error means which.

use std::fmt;
use std::path::Path;

use calibc_bundle::{Bundle, BundleError};
use calibc_driver::masks::MaskFileError;
use calibc_driver::{DriverError, Family};
use calibc_nvrtc::NvrtcError;
use calibc_runtime::RuntimeError;
use calibc_trace::TraceError;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// A negative result: what was asked is answered with no.
    Negative = 1,
    /// Wrong usage.
    Usage = 2,
    /// Bad input.
    BadInput = 3,
    /// The environment lacks something.
    Environment = 4,
    /// The file system refused.
    Io = 5,
    /// A bug of calibc.
    Internal = 70,
}

/// An error and its exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What happened.
    pub error: anyhow::Error,
}

impl Failure {
    pub(crate) fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }

    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, anyhow::anyhow!("{message}"))
    }

    pub(crate) fn bad_input(message: impl fmt::Display) -> Self {
        Self::new(Exit::BadInput, anyhow::anyhow!("{message}"))
    }

    /// The file system refused to `action` `path`.
    pub(crate) fn io(action: &str, path: &Path, error: std::io::Error) -> Self {
        let message = format!("cannot {action} {}: {error}", path.display());
        Self::new(Exit::Io, anyhow::anyhow!(message))
    }
}

/// Opens the bundle at `path`; errors name it.
pub(crate) fn open_bundle(path: &Path) -> Result<Bundle, Failure> {
    Bundle::open(path).map_err(|error| match error {
        error @ BundleError::Io { .. } => error.into(),
        error => {
            let Failure { exit, error } = error.into();
            Failure { exit, error: anyhow::anyhow!("{}: {error}", path.display()) }
        }
    })
}

impl fmt::Display for Failure {
    /// The error and its causes, each once: some messages carry their cause already.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.error.to_string();
        f.write_str(&said)?;
        for cause in self.error.chain().skip(1) {
            let cause = cause.to_string();
            if !said.contains(&cause) {
                write!(f, ": {cause}")?;
                said = cause;
            }
        }
        Ok(())
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        let exit = match error.family() {
            Family::Usage => Exit::Usage,
            Family::BadInput => Exit::BadInput,
            Family::Environment => Exit::Environment,
            Family::Io => Exit::Io,
            // Nothing on the command line cancels a session but a dump that failed, which is told instead.
            Family::Internal | Family::Cancelled => Exit::Internal,
        };
        Self::new(exit, error)
    }
}

/// Errors that the driver wraps get the exit code they have there.
macro_rules! through_the_driver {
    ($($error:ty),*) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                DriverError::from(error).into()
            }
        })*
    };
}

through_the_driver!(TraceError, NvrtcError, BundleError, MaskFileError);

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        let exit = match error {
            RuntimeError::Bundle(error) => return error.into(),
            RuntimeError::NoDriver
            | RuntimeError::NoDevice { .. }
            | RuntimeError::SharedMemory { .. }
            | RuntimeError::Driver { .. } => Exit::Environment,
            RuntimeError::Unscheduled
            | RuntimeError::Plan { .. }
            | RuntimeError::Invalid { .. }
            | RuntimeError::BufferRange { .. } => Exit::Internal,
            // Everything else is a tensor, step or layer that is not the plan's.
            _ => Exit::BadInput,
        };
        Self::new(exit, error)
    }
}

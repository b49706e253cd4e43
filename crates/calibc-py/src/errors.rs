//! Rust errors as the exception classes of `calibc.errors`.

use calibc_cli::{Exit, Failure};
use calibc_driver::DriverError;
use calibc_runtime::{BundleError, RuntimeError};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// An exception of the class `calibc.errors.<class>`.
fn exception(py: Python<'_>, class: &str, message: String) -> PyErr {
    let found = py.import("calibc.errors").and_then(|errors| errors.getattr(class));
    match found.and_then(|class| Ok(class.cast_into::<PyType>()?)) {
        Ok(class) => PyErr::from_type(class, message),
        Err(error) => error,
    }
}

/// The exception for an error of any layer; its class mirrors the exit code of the command line.
pub(crate) fn raise(py: Python<'_>, error: impl Into<Failure>) -> PyErr {
    let failure = error.into();
    let bundle = failure.error.downcast_ref::<BundleError>();
    let bundle = bundle.or_else(|| match failure.error.downcast_ref() {
        Some(RuntimeError::Bundle(error)) => Some(error),
        _ => None,
    });
    let bundle = bundle.or_else(|| match failure.error.downcast_ref() {
        Some(DriverError::Bundle(error)) => Some(error),
        _ => None,
    });
    let not_this_gpu = matches!(bundle, Some(BundleError::NotForThisGpu { .. } | BundleError::NoSuchVariant { .. }));
    let class = match failure.exit {
        Exit::Environment if not_this_gpu => "NotForThisGpu",
        Exit::Environment => "Environment",
        Exit::Usage => "Usage",
        Exit::BadInput => "BadInput",
        Exit::Io => "FileSystem",
        Exit::Ok | Exit::Negative | Exit::Internal => "Internal",
    };
    exception(py, class, failure.to_string())
}

/// Wrong use of a function: a value that no argument can have.
pub(crate) fn usage(py: Python<'_>, message: String) -> PyErr {
    exception(py, "Usage", message)
}

/// What cannot be, and was.
pub(crate) fn internal(py: Python<'_>, message: &str) -> PyErr {
    exception(py, "Internal", format!("internal error: {message}"))
}

/// Input that is not what the plan needs.
pub(crate) fn bad_input(py: Python<'_>, message: String) -> PyErr {
    exception(py, "BadInput", message)
}

/// The exception for the end of a session: Ctrl-C where that is what stopped it.
pub(crate) fn of_session(py: Python<'_>, error: DriverError, interrupt: Option<PyErr>) -> PyErr {
    match (error, interrupt) {
        (DriverError::Cancelled, Some(interrupt)) => interrupt,
        (DriverError::Cancelled, None) => PyKeyboardInterrupt::new_err(()),
        (error, _) => raise(py, error),
    }
}

//! The Python module `calibc._native`: the compiler, the runtime and the command line, for the package in `python/calibc`.
//!
//! ```text
//! python/calibc --addresses, shapes, strides--> attention --Loaded (a bundle, its engines)--> one launch, or the CPU reference
//!               --mask bytes--> plan_from_mask --driver--> Bundle, kept by content
//!               --argv--> main --cli--> exit code
//! ```
//!
//! Tensors come as addresses with shapes and strides and are borrowed for the call; torch is never linked. The interpreter is
//! let go while anything long runs. Every error is a class of `calibc.errors`, one per family of exit codes.

#![expect(unsafe_code, reason = "tensors are passed by address")]

mod bundle;
mod call;
mod capture;
mod errors;
mod loaded;
mod masks;
mod session;
mod trace;

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::prelude::*;

/// The compiler and the runtime of calibc.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::bundle::Bundle;
    #[pymodule_export]
    use super::call::{attention, enter, load, reference_attention, table_bytes};
    #[pymodule_export]
    use super::capture::{
        CaptureKernel, anchor_source, block_statistics_cpu, capture_seed, encode_log2_u8, sampled_rows,
    };
    #[pymodule_export]
    use super::main;
    #[pymodule_export]
    use super::masks::{clear_plan_cache, plan_cache_info, plan_from_mask};
    #[pymodule_export]
    use super::session::compile;
    #[pymodule_export]
    use super::trace::{Shard, TraceHead, TraceWriter, set_sensitivity};

    /// The version of the compiler, which is the package's.
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name Python gives a version")]
    const __version__: &str = calibc_driver::VERSION;
}

/// Runs the command line `argv`, the program's name first, and returns its exit code. Signals keep the handlers they have.
#[pyfunction]
fn main(py: Python<'_>, argv: Vec<OsString>) -> PyResult<i32> {
    find_wheels(py)?;
    Ok(py.detach(|| calibc_cli::run(argv)))
}

/// Tells the search for NVRTC where this interpreter has its packages: `sys.path` as it is now.
fn find_wheels(py: Python<'_>) -> PyResult<()> {
    let path = py.import("sys")?.getattr("path")?;
    let folders = path.try_iter()?.filter_map(|entry| entry.ok()?.extract::<PathBuf>().ok());
    // An empty entry is the working folder, which is not where packages are installed.
    calibc_nvrtc::set_python_packages(folders.filter(|folder| folder.is_absolute()).collect());
    Ok(())
}

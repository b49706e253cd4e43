//! Compile sessions that Ctrl-C stops.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use calibc_driver::{CacheChoice, DriverError, Event, Observer, Options};
use calibc_ir::Arch;
use pyo3::prelude::*;

use crate::errors::{internal, of_session, raise, usage};

/// How often Python gets to see whether a signal came.
const PATIENCE: Duration = Duration::from_millis(50);

/// Hears nothing.
pub(crate) struct Quiet;

impl Observer for Quiet {}

/// Hands events on, and stops the session when told to.
struct Stoppable<'a, O> {
    inner: &'a O,
    stop: &'a AtomicBool,
}

impl<O: Observer> Observer for Stoppable<'_, O> {
    fn event(&self, event: &Event<'_>) {
        self.inner.event(event);
    }

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Runs `work` on a thread of its own while this one lets Python handle signals; an exception from one of them stops the work
/// and is returned beside its result. On other threads than the main one Python handles no signals, and nothing stops it.
pub(crate) fn interruptible<T: Send, O: Observer + Send>(
    py: Python<'_>,
    observer: O,
    work: impl FnOnce(&dyn Observer) -> Result<T, DriverError> + Send,
) -> (Result<T, DriverError>, Option<PyErr>) {
    let stop = AtomicBool::new(false);
    let (stop, observer) = (&stop, &observer);
    py.detach(|| {
        thread::scope(|scope| {
            let (sender, receiver) = channel();
            let worker = scope.spawn(move || {
                let result = work(&Stoppable { inner: observer, stop });
                // The receiver waits for this.
                let _ = sender.send(());
                result
            });
            let mut interrupt = None;
            while let Err(RecvTimeoutError::Timeout) = receiver.recv_timeout(PATIENCE) {
                if interrupt.is_none()
                    && let Err(error) = Python::attach(|py| py.check_signals())
                {
                    interrupt = Some(error);
                    stop.store(true, Ordering::Relaxed);
                }
            }
            match worker.join() {
                Ok(result) => (result, interrupt),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    })
}

/// The result of a session. A signal that came too late to stop it is raised all the same: it must not be lost.
pub(crate) fn finished<T>(py: Python<'_>, result: Result<T, DriverError>, interrupt: Option<PyErr>) -> PyResult<T> {
    match (result, interrupt) {
        (Ok(_), Some(interrupt)) => Err(interrupt),
        (result, interrupt) => result.map_err(|error| of_session(py, error, interrupt)),
    }
}

/// Compiles traces into a bundle at `out`, as `calibc compile` does.
#[pyfunction]
#[pyo3(signature = (traces, out, *, spec, archs, portable, nvrtc, cache_dir, progress))]
#[expect(clippy::too_many_arguments, reason = "the options of the command")]
pub(crate) fn compile(
    py: Python<'_>,
    traces: Option<PathBuf>,
    out: PathBuf,
    spec: Option<PathBuf>,
    archs: Vec<String>,
    portable: bool,
    nvrtc: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
    progress: bool,
) -> PyResult<()> {
    crate::find_wheels(py)?;
    if traces.is_none() && spec.is_none() {
        return Err(usage(py, "give a folder of traces, or a spec with masks of your own".to_owned()));
    }
    let archs = archs.iter().map(|name| name.parse::<Arch>()).collect::<Result<_, _>>();
    let archs = archs.map_err(|error| usage(py, error.to_string()))?;
    let cache = cache_dir.map_or(CacheChoice::Default, CacheChoice::Dir);
    calibc_cli::check_output(&out, calibc_driver::Emit::Bundle).map_err(|failure| raise(py, failure))?;
    let options = Options { traces, spec, archs, portable, nvrtc, cache, ..Options::default() };
    let bars = calibc_cli::Bars::new(progress);
    let (result, interrupt) = interruptible(py, bars, move |observer| calibc_driver::compile(&options, observer));
    let output = finished(py, result, interrupt)?;
    let Some(packed) = output.packed else {
        return Err(internal(py, "a compile to the end made no bundle"));
    };
    py.detach(|| calibc_bundle::write(&out, &packed.bytes)).map_err(|error| raise(py, error))
}

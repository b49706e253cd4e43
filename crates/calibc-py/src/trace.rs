//! Traces as captures write them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use calibc_ir::{LayerId, Layout as TokenOrder, Model, StepId};
use calibc_trace::session::{self, Session};
use calibc_trace::writer::{EncodedTensors, Extras, LayerTensors, OpenShard, TraceSpec};
use calibc_trace::{Encoding, Manifest, Prompt, Sensitivity, Split, TraceError, merge, space};
use pyo3::prelude::*;

use crate::capture::geometry;
use crate::errors::{bad_input, raise, usage};

type Shared = Arc<Mutex<Option<Session>>>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic left is checked by the writer as everything else.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f` on an open session, without the interpreter.
fn with<T: Send>(
    py: Python<'_>,
    session: &Shared,
    f: impl Send + FnOnce(&mut Session) -> Result<T, TraceError>,
) -> PyResult<T> {
    let done = py.detach(|| locked(session).as_mut().map(f));
    match done {
        None => Err(usage(py, "the trace writer is closed".to_owned())),
        Some(Err(error)) => Err(raise(py, error)),
        Some(Ok(value)) => Ok(value),
    }
}

/// A trace that is captured into.
#[pyclass(frozen, module = "calibc._native")]
pub(crate) struct TraceWriter {
    session: Shared,
    path: PathBuf,
    spec: TraceSpec,
}

#[pymethods]
impl TraceWriter {
    /// Starts a trace, or continues the one that is there. What a killed capture left half-written is discarded.
    #[staticmethod]
    #[pyo3(signature = (path, *, model, layers, heads, head_dim, frames, height, width, text_tokens=0, text_position="none", tile=None,
                        sigmas, branches, encoding="log2-u8", anchor_counts=Vec::new(), part=None))]
    #[expect(clippy::too_many_arguments, reason = "everything a manifest says")]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        model: String,
        layers: u32,
        heads: u32,
        head_dim: u32,
        frames: u32,
        height: u32,
        width: u32,
        text_tokens: u32,
        text_position: &str,
        tile: Option<[u32; 3]>,
        sigmas: Vec<f64>,
        branches: Vec<String>,
        encoding: &str,
        anchor_counts: Vec<u16>,
        part: Option<String>,
    ) -> PyResult<Self> {
        let Some(encoding) = Encoding::ALL.into_iter().find(|known| known.name() == encoding) else {
            return Err(bad_input(py, format!("`{encoding}` is not an encoding of energies; use log2-u8, f16 or f32")));
        };
        let geometry = geometry(py, [frames, height, width], text_tokens, text_position, tile)?;
        let model = Model { name: model, layers, heads, head_dim };
        let spec = TraceSpec { model, geometry, sigmas, branches, encoding, anchor_counts };
        let session =
            py.detach(|| Session::open(&path, spec.clone(), part.as_deref())).map_err(|error| raise(py, error))?;
        Ok(Self { session: Arc::new(Mutex::new(Some(session))), path, spec })
    }

    /// Ids of the prompts that are captured already.
    #[getter]
    fn prompts(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        with(py, &self.session, |session| Ok(session.prompts().to_vec()))
    }

    /// Bytes that `prompts` prompts take.
    #[pyo3(signature = (prompts, steps, branches=1, *, deviation=true, anchor_similarity=true, anchor_error=true))]
    #[expect(clippy::too_many_arguments, reason = "what decides a size")]
    fn estimate(
        &self,
        py: Python<'_>,
        prompts: u64,
        steps: u64,
        branches: u64,
        deviation: bool,
        anchor_similarity: bool,
        anchor_error: bool,
    ) -> PyResult<u64> {
        let shard = self.spec.shard_bytes(Extras { deviation, anchor_similarity, anchor_error });
        let shard = shard.map_err(|error| raise(py, error))?;
        Ok(shard.saturating_mul(prompts).saturating_mul(steps).saturating_mul(branches))
    }

    /// Bytes that the file system has left.
    fn free_space(&self, py: Python<'_>) -> PyResult<u64> {
        space::free(&self.path).map_err(|error| raise(py, error))
    }

    /// Raises where the file system has less than `bytes` left.
    fn check_space(&self, py: Python<'_>, bytes: u64) -> PyResult<()> {
        space::check(&self.path, bytes).map_err(|error| raise(py, error))
    }

    #[pyo3(signature = (id, *, seed=None, split="calibration", label=""))]
    fn begin_prompt(&self, py: Python<'_>, id: String, seed: Option<u64>, split: &str, label: &str) -> PyResult<()> {
        let Some(split) = [Split::Calibration, Split::Holdout].into_iter().find(|known| known.name() == split) else {
            return Err(bad_input(py, format!("split `{split}` is not one of calibration, holdout")));
        };
        let prompt = Prompt { id, seed, split, label: label.to_owned() };
        with(py, &self.session, |session| session.begin_prompt(prompt))
    }

    /// Starts the shard of the current prompt at a step of a branch.
    #[pyo3(signature = (step, branch, *, deviation=true, anchor_similarity=false, anchor_error=false))]
    fn begin_shard(
        &self,
        py: Python<'_>,
        step: u32,
        branch: String,
        deviation: bool,
        anchor_similarity: bool,
        anchor_error: bool,
    ) -> PyResult<Shard> {
        let extras = Extras { deviation, anchor_similarity, anchor_error };
        let shard = with(py, &self.session, |session| session.begin_shard(StepId(step), &branch, extras))?;
        let layout = Layout::of(&self.spec);
        Ok(Shard { session: self.session.clone(), shard: Mutex::new(Some(shard)), layout, extras })
    }

    /// Commits the current prompt.
    fn end_prompt(&self, py: Python<'_>) -> PyResult<()> {
        with(py, &self.session, Session::end_prompt)
    }

    /// Removes what was written of the current prompt.
    fn discard_prompt(&self, py: Python<'_>) -> PyResult<()> {
        with(py, &self.session, Session::discard_prompt)
    }

    /// Releases the folder; what was not committed is removed by whoever opens it next.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(locked(&self.session).take()));
    }

    /// Makes one trace of `path` and the parts that several processes wrote there; the number of its prompts.
    #[staticmethod]
    fn merge_parts(py: Python<'_>, path: PathBuf) -> PyResult<usize> {
        prompts(py, py.detach(|| merge::merge_parts(&path)))
    }

    /// Makes `out`, a new folder, the trace of everything in `inputs`; the number of its prompts.
    #[staticmethod]
    fn merge(py: Python<'_>, out: PathBuf, inputs: Vec<PathBuf>) -> PyResult<usize> {
        prompts(py, py.detach(|| merge::merge(&out, &inputs)))
    }
}

fn prompts(py: Python<'_>, merged: Result<Manifest, TraceError>) -> PyResult<usize> {
    merged.map(|manifest| manifest.prompts.len()).map_err(|error| raise(py, error))
}

/// What a trace is of.
#[pyclass(frozen, get_all, module = "calibc._native")]
pub(crate) struct TraceHead {
    model: String,
    layers: u32,
    heads: u32,
    head_dim: u32,
    frames: u32,
    height: u32,
    width: u32,
    text_tokens: u32,
    /// none, before or after.
    text_position: String,
    /// Whether tokens are in raster order.
    raster: bool,
    /// Noise level of each step.
    sigmas: Vec<f64>,
    /// The branch that plans are made from.
    branch: String,
}

#[pymethods]
impl TraceHead {
    /// Reads it from the manifest of a trace.
    #[staticmethod]
    fn read(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let manifest = py.detach(|| Manifest::read(&path)).map_err(|error| raise(py, error))?;
        let branch = manifest.branches[manifest.plan_branch()].clone();
        let Manifest { model, geometry, sigmas, .. } = manifest;
        Ok(Self {
            model: model.name,
            layers: model.layers,
            heads: model.heads,
            head_dim: model.head_dim,
            frames: geometry.frames,
            height: geometry.height,
            width: geometry.width,
            text_tokens: geometry.text_tokens,
            text_position: geometry.text_position.to_string(),
            raster: geometry.layout == TokenOrder::Raster,
            sigmas,
            branch,
        })
    }
}

/// Gives the trace in `path` its sensitivities, `step` [steps] and `head` [steps, layers, heads], in place of older ones.
#[pyfunction]
pub(crate) fn set_sensitivity(py: Python<'_>, path: PathBuf, step: Vec<f32>, head: Vec<f32>) -> PyResult<()> {
    let sensitivity = Sensitivity { step, head };
    py.detach(|| session::set_sensitivity(&path, &sensitivity)).map_err(|error| raise(py, error))
}

/// How many values a layer has, and how they come.
#[derive(Clone, Copy)]
struct Layout {
    encoding: Encoding,
    blocks: usize,
    anchors: usize,
}

impl Layout {
    fn of(spec: &TraceSpec) -> Self {
        let [heads, rows, columns] =
            [spec.model.heads, spec.geometry.num_q_blocks(), spec.geometry.num_q_blocks()].map(|n| n as usize);
        Self { encoding: spec.encoding, blocks: heads * rows * columns, anchors: heads * spec.anchor_counts.len() }
    }
}

/// The tensors of one prompt at one step of a branch.
#[pyclass(frozen, module = "calibc._native")]
pub(crate) struct Shard {
    session: Shared,
    shard: Mutex<Option<OpenShard>>,
    layout: Layout,
    extras: Extras,
}

#[pymethods]
impl Shard {
    /// Writes one layer from host memory. Energies and deviations are codes for `log2-u8`, else f32.
    #[pyo3(signature = (layer, energy, deviation=0, anchor_similarity=0, anchor_error=0))]
    fn layer(
        &self,
        py: Python<'_>,
        layer: u32,
        energy: u64,
        deviation: u64,
        anchor_similarity: u64,
        anchor_error: u64,
    ) -> PyResult<()> {
        let Layout { encoding, blocks, anchors } = self.layout;
        let given = [
            ("energy", energy, true, encoding != Encoding::Log2U8),
            ("deviation", deviation, self.extras.deviation, encoding != Encoding::Log2U8),
            ("anchor_similarity", anchor_similarity, self.extras.anchor_similarity, true),
            ("anchor_error", anchor_error, self.extras.anchor_error, true),
        ];
        for (name, address, wanted, floats) in given {
            if wanted != (address != 0) {
                let said = if wanted { "has" } else { "does not have" };
                return Err(usage(py, format!("this shard {said} {name}; begin it accordingly")));
            }
            if floats && !address.is_multiple_of(4) {
                return Err(usage(py, format!("{name} must be the address of f32 values")));
            }
        }
        let done = py.detach(|| {
            let mut shard = locked(&self.shard);
            let shard = shard.as_mut()?;
            let id = LayerId(layer);
            // SAFETY: `calibc.capturing` passes contiguous tensors of these sizes, which it holds through the call.
            let (anchor_similarity, anchor_error) =
                unsafe { (slice::<f32>(anchor_similarity, anchors), slice::<f32>(anchor_error, anchors)) };
            Some(if encoding == Encoding::Log2U8 {
                // SAFETY: as above.
                let (energy, deviation) = unsafe { (slice(energy, blocks), slice(deviation, blocks)) };
                shard.layer_encoded(id, EncodedTensors { energy, deviation, anchor_similarity, anchor_error })
            } else {
                // SAFETY: as above.
                let (energy, deviation) = unsafe { (slice(energy, blocks), slice(deviation, blocks)) };
                shard.layer(id, LayerTensors { energy, deviation, anchor_similarity, anchor_error })
            })
        });
        match done {
            None => Err(usage(py, "the shard is finished".to_owned())),
            Some(done) => done.map_err(|error| raise(py, error)),
        }
    }

    /// Puts the shard in its place.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        let Some(shard) = locked(&self.shard).take() else {
            return Err(usage(py, "the shard is finished".to_owned()));
        };
        with(py, &self.session, |session| session.finish_shard(shard))
    }
}

/// `count` values at `address`; none where the address is 0.
///
/// # Safety
/// An address that is not 0 is that of as many values, aligned for their type, which nothing writes while the result lives.
unsafe fn slice<'a, T>(address: u64, count: usize) -> &'a [T] {
    if address == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(address as usize as *const T, count) }
}

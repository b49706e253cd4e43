//! `calibc._native.Bundle`: a bundle, opened and checked.

use std::path::PathBuf;
use std::sync::Arc;

use calibc_ir::{AttnOp, LayerId, Plan, StepId};
use calibc_runtime::Bundle as Opened;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::{bad_input, raise};
use crate::loaded::Loaded;

/// A compiled plan. Opening one checks every byte of it; its kernels are machine code, so open bundles only from where you would
/// run a program from.
#[pyclass(frozen, module = "calibc._native")]
pub(crate) struct Bundle {
    pub(crate) loaded: Arc<Loaded>,
}

impl Bundle {
    pub(crate) fn of(bundle: Opened) -> Self {
        Self { loaded: Loaded::new(bundle) }
    }

    fn plan(&self) -> &Plan {
        self.loaded.bundle.plan()
    }

    /// The ops of one layer at one step, which may come from anywhere.
    fn layer_ops(&self, py: Python<'_>, step: u32, layer: u32) -> PyResult<&[AttnOp]> {
        let plan = self.plan();
        for (what, got, all) in [("step", step, plan.num_steps()), ("layer", layer, plan.model.layers)] {
            if got >= all {
                return Err(bad_input(py, format!("{what} {got} is out of range: the plan has {all} {what}s")));
            }
        }
        Ok(plan.layer_ops(StepId(step), LayerId(layer)))
    }
}

#[pymethods]
impl Bundle {
    /// Opens the bundle at `path`.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        match py.detach(|| Opened::open(&path)) {
            Ok(bundle) => Ok(Self::of(bundle)),
            Err(error @ calibc_runtime::BundleError::Io { .. }) => Err(raise(py, error)),
            Err(error) => {
                let mut failure = calibc_cli::Failure::from(error);
                failure.error = failure.error.context(format!("cannot open the bundle {}", path.display()));
                Err(raise(py, failure))
            }
        }
    }

    /// Opens a bundle that is in memory.
    #[staticmethod]
    fn parse(py: Python<'_>, data: &Bound<'_, PyBytes>) -> PyResult<Self> {
        let bytes = data.as_bytes();
        py.detach(|| Opened::parse(bytes)).map(Self::of).map_err(|error| raise(py, error))
    }

    /// Number that names this bundle to `attention`; valid while the object lives.
    #[getter]
    fn handle(&self) -> i64 {
        self.loaded.handle
    }

    #[getter]
    fn model_name(&self) -> &str {
        &self.plan().model.name
    }

    #[getter]
    fn steps(&self) -> u32 {
        self.plan().num_steps()
    }

    #[getter]
    fn layers(&self) -> u32 {
        self.plan().model.layers
    }

    #[getter]
    fn heads(&self) -> u32 {
        self.plan().model.heads
    }

    #[getter]
    fn head_dim(&self) -> u32 {
        self.plan().model.head_dim
    }

    #[getter]
    fn q_tokens(&self) -> u32 {
        self.plan().geometry.q_tokens()
    }

    #[getter]
    fn kv_tokens(&self) -> u32 {
        self.plan().geometry.kv_tokens()
    }

    #[getter]
    fn frames(&self) -> u32 {
        self.plan().geometry.frames
    }

    #[getter]
    fn height(&self) -> u32 {
        self.plan().geometry.height
    }

    #[getter]
    fn width(&self) -> u32 {
        self.plan().geometry.width
    }

    #[getter]
    fn text_tokens(&self) -> u32 {
        self.plan().geometry.text_tokens
    }

    #[getter]
    fn text_position(&self) -> String {
        self.plan().geometry.text_position.to_string()
    }

    #[getter]
    fn layout(&self) -> String {
        self.plan().geometry.layout.to_string()
    }

    #[getter]
    fn sigmas(&self) -> Vec<f64> {
        self.plan().sigmas.clone()
    }

    /// Hexadecimal digest that commits to every byte of the bundle.
    #[getter]
    fn digest(&self) -> String {
        self.loaded.bundle.digest()
    }

    /// The effective spec, YAML.
    #[getter]
    fn spec(&self) -> &str {
        self.loaded.bundle.spec()
    }

    /// The compile report, JSON.
    #[getter]
    fn report_json(&self) -> String {
        self.loaded.bundle.report().to_string()
    }

    /// Symbol and architecture of every kernel.
    #[getter]
    fn kernels(&self) -> Vec<(String, String)> {
        self.loaded.bundle.kernels().iter().map(|kernel| (kernel.symbol.clone(), kernel.arch.to_string())).collect()
    }

    /// Whether every variant of the plan has a kernel for GPUs of compute capability `(major, minor)`.
    fn has_kernels(&self, compute_capability: (u32, u32)) -> bool {
        let bundle = &self.loaded.bundle;
        bundle.plan().variants.iter().all(|variant| bundle.kernel_for(compute_capability, variant).is_ok())
    }

    /// Share of the dense work that one layer does at one step.
    fn density(&self, py: Python<'_>, step: u32, layer: u32) -> PyResult<f64> {
        let ops = self.layer_ops(py, step, layer)?;
        Ok(ops.iter().map(|&op| self.plan().density(op)).sum::<f64>() / ops.len() as f64)
    }

    /// How many heads of one layer at one step are dense, block-sparse and computed at anchor rows.
    fn op_counts(&self, py: Python<'_>, step: u32, layer: u32) -> PyResult<(usize, usize, usize)> {
        let ops = self.layer_ops(py, step, layer)?;
        let count = |kind: fn(&AttnOp) -> bool| ops.iter().filter(|op| kind(op)).count();
        Ok((
            count(|op| matches!(op, AttnOp::Dense)),
            count(|op| matches!(op, AttnOp::BlockSparse { .. })),
            count(|op| matches!(op, AttnOp::AnchorRows { .. })),
        ))
    }

    /// The kept blocks of one head: bytes 0 and 1, `[q_blocks, kv_blocks]`; all ones for dense and anchor heads.
    fn mask<'py>(&self, py: Python<'py>, step: u32, layer: u32, head: usize) -> PyResult<Bound<'py, PyBytes>> {
        let ops = self.layer_ops(py, step, layer)?;
        let Some(&op) = ops.get(head) else {
            return Err(bad_input(py, format!("head {head} is out of range: the plan has {} heads", ops.len())));
        };
        let geometry = &self.plan().geometry;
        let (rows, cols) = (geometry.num_q_blocks(), geometry.num_kv_blocks());
        let bytes: Vec<u8> = match op {
            AttnOp::Dense | AttnOp::AnchorRows { .. } => vec![1; rows as usize * cols as usize],
            AttnOp::BlockSparse { mask } => {
                let mask = &self.plan().masks[mask];
                (0..rows).flat_map(|r| (0..cols).map(move |c| u8::from(mask.get(r, c)))).collect()
            }
        };
        Ok(PyBytes::new(py, &bytes))
    }

    fn __repr__(&self) -> String {
        let (model, geometry) = (&self.plan().model, &self.plan().geometry);
        let (name, steps, layers, heads) = (&model.name, self.plan().num_steps(), model.layers, model.heads);
        format!("<calibc bundle {name}: {geometry}, {steps} steps x {layers} layers x {heads} heads>")
    }
}

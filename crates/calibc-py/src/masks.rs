//! Plans from masks in memory, kept by content.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use calibc_driver::spec::DTypeSpec;
use calibc_driver::{CacheChoice, DriverError, Emit, LayerMasks, Options, VERSION};
use calibc_ir::{Arch, BLOCK, BlockMask};
use calibc_runtime::cuda::Device;
use pyo3::prelude::*;

use crate::bundle::Bundle;
use crate::errors::{bad_input, internal, raise, usage};
use crate::session::{Quiet, finished, interruptible};

/// Most plans kept. Each holds its masks, and on a GPU its tables: some megabytes for the largest models.
const KEPT: usize = 32;

/// Plans by the digest of everything that decides them, the latest last.
struct Kept {
    plans: VecDeque<(blake3::Hash, Py<Bundle>)>,
    hits: u64,
    misses: u64,
}

static PLANS: Mutex<Kept> = Mutex::new(Kept { plans: VecDeque::new(), hits: 0, misses: 0 });

/// What machine code is made for.
fn arch_of(py: Python<'_>, arch: Option<&str>, device: Option<u32>) -> PyResult<Option<Arch>> {
    if let Some(name) = arch {
        return name.parse().map(Some).map_err(|error: calibc_ir::ArchError| usage(py, error.to_string()));
    }
    let Some(device) = device else { return Ok(None) };
    let info = py.detach(|| Device::open(device)?.info()).map_err(|error| raise(py, error))?;
    let (major, minor) = info.compute_capability;
    let known = ["sm_120", "sm_100", "sm_90a", "sm_89", "sm_86", "sm_80"];
    let mut known = known.iter().filter_map(|name| name.parse::<Arch>().ok());
    match known.find(|arch| arch.runs_on((major, minor))) {
        Some(arch) => Ok(Some(arch)),
        None => Err(raise(
            py,
            calibc_cli::Failure {
                exit: calibc_cli::Exit::Environment,
                error: anyhow::anyhow!(
                    "{} has compute capability {major}.{minor}; kernels need 8.0 or newer",
                    info.name
                ),
            },
        )),
    }
}

/// A plan of one layer from `mask`: the address of `heads * q_blocks * kv_blocks` bytes, 0 or 1. Machine code is made for
/// `arch`, else for GPU `device`, else none: then only the CPU reference runs the plan. A plan of the same content is not
/// made twice.
#[pyfunction]
#[pyo3(signature = (mask, shape, q_len, kv_len, head_dim, dtype, *, lse, arch, device, portable))]
#[expect(clippy::too_many_arguments, reason = "what decides a plan")]
pub(crate) fn plan_from_mask(
    py: Python<'_>,
    mask: u64,
    shape: [usize; 3],
    q_len: u32,
    kv_len: u32,
    head_dim: u32,
    dtype: &str,
    lse: bool,
    arch: Option<&str>,
    device: Option<u32>,
    portable: bool,
) -> PyResult<Py<Bundle>> {
    crate::find_wheels(py)?;
    let dtype = match dtype {
        "bf16" => DTypeSpec::Bf16,
        "fp16" => DTypeSpec::Fp16,
        other => return Err(usage(py, format!("`{other}` is not an element type; use bf16 or fp16"))),
    };
    let arch = arch_of(py, arch, device)?;
    let [heads, rows, cols] = shape;
    let want = [q_len, kv_len].map(|n| n.div_ceil(BLOCK) as usize);
    if [rows, cols] != want || heads == 0 || want.contains(&0) {
        let [rows, cols] = want;
        return Err(bad_input(
            py,
            format!(
                "the mask has shape {shape:?}; {q_len} queries and {kv_len} keys need [heads, {rows}, {cols}], blocks of {BLOCK} \
                 tokens"
            ),
        ));
    }
    let len = heads * rows * cols;
    // SAFETY: `calibc.masks` passes a contiguous tensor of bytes of this shape, which it holds through the call.
    let bytes = unsafe { std::slice::from_raw_parts(mask as usize as *const u8, len) };
    let key = py.detach(|| {
        let mut hasher = blake3::Hasher::new();
        // Every field, so that a new one is not forgotten; each ends where the next begins.
        let fields = format!("{VERSION} {shape:?} {q_len} {kv_len} {head_dim} {dtype:?} {lse} {arch:?} {portable}\n");
        hasher.update(fields.as_bytes()).update_rayon(bytes).finalize()
    });
    if let Some(plan) = find(py, &key) {
        return Ok(plan);
    }
    let masks = LayerMasks {
        name: "mask".to_owned(),
        q_tokens: q_len,
        kv_tokens: kv_len,
        head_dim,
        heads: py.detach(|| bytes.chunks_exact(rows * cols).map(|head| pack(head, rows, cols)).collect()),
        dtypes: vec![dtype],
        lse,
    };
    let options = Options {
        archs: arch.into_iter().collect(),
        portable,
        cache: CacheChoice::Default,
        emit: Emit::Bundle,
        ..Options::default()
    };
    let (result, interrupt) =
        interruptible(py, Quiet, move |observer| calibc_driver::compile_masks(masks, &options, observer));
    if let Err(error) = &result
        && let Some(error) = in_own_words(py, error)
    {
        return Err(error);
    }
    let output = finished(py, result, interrupt)?;
    let packed = output.packed.ok_or_else(|| internal(py, "a compile to the end made no bundle"))?;
    let plan = Py::new(py, Bundle::of(packed.bundle))?;
    Ok(keep(py, key, plan))
}

/// An empty row in the caller's words: `s0.l0.h3` means nothing to someone with a single layer.
fn in_own_words(py: Python<'_>, error: &DriverError) -> Option<PyErr> {
    let DriverError::Opt(calibc_opt::OptError::EmptyRow { site, row, .. }) = error else { return None };
    let head = site.head.index();
    Some(bad_input(py, format!("mask[{head}, {row}] keeps no block; every query block must keep at least one")))
}

fn pack(head: &[u8], rows: usize, cols: usize) -> BlockMask {
    let mut mask = BlockMask::empty(rows as u32, cols as u32);
    for (r, row) in head.chunks_exact(cols).enumerate() {
        row.iter().enumerate().filter(|&(_, &kept)| kept != 0).for_each(|(c, _)| mask.set(r as u32, c as u32));
    }
    mask
}

fn find(py: Python<'_>, key: &blake3::Hash) -> Option<Py<Bundle>> {
    let mut kept = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(at) = kept.plans.iter().position(|(digest, _)| digest == key) else {
        kept.misses += 1;
        return None;
    };
    kept.hits += 1;
    let entry = kept.plans.remove(at)?;
    let plan = entry.1.clone_ref(py);
    kept.plans.push_back(entry);
    Some(plan)
}

/// Keeps a plan; where another thread was faster, its plan is the one.
fn keep(py: Python<'_>, key: blake3::Hash, plan: Py<Bundle>) -> Py<Bundle> {
    let dropped;
    let plan = {
        let mut kept = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, first)) = kept.plans.iter().find(|(digest, _)| *digest == key) {
            return first.clone_ref(py);
        }
        kept.plans.push_back((key, plan.clone_ref(py)));
        dropped = if kept.plans.len() > KEPT { kept.plans.pop_front() } else { None };
        plan
    };
    // After the lock: letting go of an engine waits for its GPU.
    drop(dropped);
    plan
}

/// Plans kept: (hits, misses, size).
#[pyfunction]
pub(crate) fn plan_cache_info() -> (u64, u64, usize) {
    let kept = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
    (kept.hits, kept.misses, kept.plans.len())
}

/// Lets go of every kept plan. Those that something else holds live on.
#[pyfunction]
pub(crate) fn clear_plan_cache() {
    let plans = std::mem::take(&mut PLANS.lock().unwrap_or_else(PoisonError::into_inner).plans);
    drop(plans);
}

//! Block statistics of a dense attention: the capture kernel, and the CPU's way.

use std::path::PathBuf;

use calibc_cli::{Exit, Failure};
use calibc_codegen::{CaptureVariant, Statistic, generate_capture};
use calibc_driver::DriverError;
use calibc_driver::kernels::check_nvrtc;
use calibc_ir::capture::ROWS_PER_BLOCK;
use calibc_ir::{AnchorTable, Arch, BLOCK, DType, Family, Geometry, Layout, MAX_TOKENS, TextPosition};
use calibc_nvrtc::{Cache, Nvrtc, Request};
use calibc_runtime::cuda::{CaptureKernel as Loaded, Device};
use calibc_runtime::reference::capture::block_statistics;
use calibc_runtime::{CaptureCall, CaptureCode, DeviceLse, DeviceTensor, HostData, HostTensor, Operand, RuntimeError};
use calibc_trace::Encoding;
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::{bad_input, raise, usage};

/// A tensor as Python describes it: address, element type, and logical shape and strides `[batch, head, token, head_dim]`, in elements.
#[derive(FromPyObject)]
pub(crate) struct View(u64, String, [usize; 4], [i64; 4]);

/// A log-sum-exp: address, shape and strides `[batch, head, token]`.
#[derive(FromPyObject)]
pub(crate) struct LseView(u64, [usize; 3], [i64; 3]);

fn dtype_of(py: Python<'_>, name: &str) -> PyResult<DType> {
    name.parse().map_err(|error: calibc_ir::DTypeError| bad_input(py, error.to_string()))
}

impl View {
    fn on_device(&self, py: Python<'_>, device: u32) -> PyResult<DeviceTensor> {
        let &Self(ptr, ref dtype, shape, strides) = self;
        Ok(DeviceTensor { ptr, dtype: dtype_of(py, dtype)?, device, shape, strides })
    }

    /// The tensor in host memory.
    ///
    /// # Safety
    /// Address, element type, shape and strides describe memory that nothing writes while the result lives.
    unsafe fn on_host(&self, py: Python<'_>, operand: Operand) -> PyResult<HostTensor<'_>> {
        let &Self(ptr, ref dtype, shape, strides) = self;
        let reach = shape.iter().zip(strides).try_fold(1usize, |end, (&n, stride)| match n {
            0 | 1 => Some(end),
            _ => end.checked_add((n - 1).checked_mul(usize::try_from(stride).ok()?)?),
        });
        let overlong = || RuntimeError::Extent { operand, shape: shape.to_vec(), strides: strides.to_vec() };
        let len = if shape.contains(&0) { 0 } else { reach.ok_or_else(|| raise(py, overlong()))? };
        /// # Safety
        /// As of `on_host`, for `len` elements.
        unsafe fn slice<'a, T>(ptr: u64, len: usize) -> &'a [T] {
            if len == 0 {
                return &[];
            }
            // SAFETY: the caller's promise. Only an empty tensor has no address.
            unsafe { std::slice::from_raw_parts(ptr as usize as *const T, len) }
        }
        // SAFETY: the caller's promise, for the elements that the view reaches.
        let data: HostData<'_> = unsafe {
            match dtype.as_str() {
                "f32" => slice::<f32>(ptr, len).into(),
                name => match dtype_of(py, name)? {
                    DType::Bf16 => slice::<bf16>(ptr, len).into(),
                    DType::Fp16 => slice::<f16>(ptr, len).into(),
                },
            }
        };
        HostTensor::new(operand, data, shape, strides).map_err(|error| raise(py, error))
    }
}

/// Seed of one attention call; it decides which query rows stand for their blocks.
#[pyfunction]
pub(crate) fn capture_seed(prompt: &str, step: u32, branch: &str, layer: u32) -> u64 {
    calibc_ir::capture::seed(prompt, step, branch, layer)
}

fn check_rows(py: Python<'_>, rows_per_block: u32) -> PyResult<()> {
    if ROWS_PER_BLOCK.contains(&rows_per_block) {
        return Ok(());
    }
    Err(raise(py, RuntimeError::RowsPerBlock { rows: rows_per_block }))
}

/// The token positions that stand for each query block of one head.
#[pyfunction]
pub(crate) fn sampled_rows(
    py: Python<'_>,
    q_tokens: u32,
    rows_per_block: u32,
    seed: u64,
    head: u32,
) -> PyResult<Vec<Vec<u32>>> {
    check_rows(py, rows_per_block)?;
    if q_tokens > MAX_TOKENS {
        return Err(bad_input(py, format!("{q_tokens} tokens are more than the longest sequence, {MAX_TOKENS}")));
    }
    Ok(calibc_ir::capture::sampled_rows(q_tokens, rows_per_block, seed, head))
}

/// A token grid that Python names.
pub(crate) fn geometry(
    py: Python<'_>,
    [frames, height, width]: [u32; 3],
    text_tokens: u32,
    text_position: &str,
    tile: Option<[u32; 3]>,
) -> PyResult<Geometry> {
    let positions = [TextPosition::None, TextPosition::Before, TextPosition::After];
    let Some(text_position) = positions.into_iter().find(|position| position.to_string() == text_position) else {
        return Err(bad_input(py, format!("text position `{text_position}` is not one of none, before, after")));
    };
    let layout = tile.map_or(Layout::Raster, Layout::Tile);
    let geometry = Geometry { text_tokens, text_position, layout, ..Geometry::video(frames, height, width) };
    match geometry.validate() {
        Ok(()) => Ok(geometry),
        Err(error) => Err(bad_input(py, error.to_string())),
    }
}

/// For each position of the sequence the position whose output it receives under anchor rows.
#[pyfunction]
#[pyo3(signature = (frames, height, width, text_tokens, text_position, tile, anchors))]
#[expect(clippy::too_many_arguments, reason = "a token grid")]
pub(crate) fn anchor_source(
    py: Python<'_>,
    frames: u32,
    height: u32,
    width: u32,
    text_tokens: u32,
    text_position: &str,
    tile: Option<[u32; 3]>,
    anchors: u16,
) -> PyResult<Vec<u32>> {
    let geometry = geometry(py, [frames, height, width], text_tokens, text_position, tile)?;
    if anchors == 0 || u32::from(anchors) > height {
        return Err(bad_input(
            py,
            format!("{anchors} anchor rows are impossible for frames of {height} rows; use 1 to {height}"),
        ));
    }
    let table = AnchorTable::new(&geometry, anchors);
    let mut source = vec![0; geometry.q_tokens() as usize];
    for (i, &query) in table.queries.iter().enumerate() {
        for &to in &table.copies[table.copy_ptr[i] as usize..table.copy_ptr[i + 1] as usize] {
            source[to as usize] = query;
        }
    }
    Ok(source)
}

/// Encodes `count` f32 at `src` as `log2-u8` codes at `dst`, both in host memory.
#[pyfunction]
pub(crate) fn encode_log2_u8(py: Python<'_>, src: u64, dst: u64, count: usize) -> PyResult<()> {
    if count == 0 {
        return Ok(());
    }
    if src == 0 || dst == 0 || !src.is_multiple_of(4) {
        return Err(usage(py, "encode_log2_u8 needs the addresses of f32 values and of as many bytes".to_owned()));
    }
    py.detach(|| {
        // SAFETY: `calibc.statistics` passes contiguous tensors of `count` elements, which it holds through the call.
        let (from, to) = unsafe {
            let from = std::slice::from_raw_parts(src as usize as *const f32, count);
            (from, std::slice::from_raw_parts_mut(dst as usize as *mut u8, count))
        };
        let mut codes = Vec::with_capacity(count);
        Encoding::Log2U8.encode(from, &mut codes);
        to.copy_from_slice(&codes);
    });
    Ok(())
}

/// Block statistics on the CPU, in f64, as f32 `[heads, q_blocks, kv_blocks]` at the addresses `energy` and `deviation`. Output and
/// log-sum-exp of the dense attention are computed along.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, energy, deviation, rows_per_block=128, seed=0, scale=None))]
#[expect(clippy::too_many_arguments, reason = "three tensors, two results, three settings")]
pub(crate) fn block_statistics_cpu(
    py: Python<'_>,
    q: View,
    k: View,
    v: View,
    energy: u64,
    deviation: u64,
    rows_per_block: u32,
    seed: u64,
    scale: Option<f32>,
) -> PyResult<()> {
    if [energy, deviation].iter().any(|address| *address == 0 || !address.is_multiple_of(4)) {
        return Err(usage(py, "energy and deviation must be the addresses of f32 values".to_owned()));
    }
    // SAFETY: `calibc.statistics` describes tensors it holds through the call.
    let [q, k, v] = unsafe { [q.on_host(py, Operand::Q)?, k.on_host(py, Operand::K)?, v.on_host(py, Operand::V)?] };
    let done = py.detach(|| {
        let computed = block_statistics(&q, &k, &v, rows_per_block, seed, scale)?;
        for (address, values) in [(energy, computed.energy), (deviation, computed.deviation)] {
            // SAFETY: `calibc.statistics` allocates both for this shape, which is that of q and k.
            let to = unsafe { std::slice::from_raw_parts_mut(address as usize as *mut f32, values.len()) };
            to.iter_mut().zip(values).for_each(|(to, value)| *to = value as f32);
        }
        Ok(())
    });
    done.map_err(|error: RuntimeError| raise(py, error))
}

/// A capture kernel, compiled for a GPU and loaded there.
#[pyclass(frozen, module = "calibc._native")]
pub(crate) struct CaptureKernel {
    loaded: Loaded,
    device: u32,
    symbol: String,
    family: Family,
    statistic: Statistic,
}

/// What a kernel is compiled for: the GPU's own instructions where there is a kernel for them.
fn target(py: Python<'_>, device: u32, portable: bool) -> PyResult<(Arch, Family)> {
    let info = Device::open(device).and_then(|device| device.info()).map_err(|error| raise(py, error))?;
    let (major, minor) = info.compute_capability;
    if major < 8 {
        let error = anyhow::anyhow!("{} has compute capability {major}.{minor}; capture needs 8.0 or newer", info.name);
        return Err(raise(py, Failure { exit: Exit::Environment, error }));
    }
    let own = Arch { major, minor, specific: true };
    if !portable && Family::of(own) == Family::Hopper {
        return Ok((own, Family::Hopper));
    }
    Ok((Arch { specific: false, ..own }, Family::Portable))
}

#[pymethods]
impl CaptureKernel {
    #[new]
    #[pyo3(signature = (device, dtype, head_dim, *, encoding="log2-u8", portable=false, nvrtc=None, cache_dir=None))]
    #[expect(clippy::too_many_arguments, reason = "what decides a kernel")]
    fn new(
        py: Python<'_>,
        device: u32,
        dtype: &str,
        head_dim: u32,
        encoding: &str,
        portable: bool,
        nvrtc: Option<PathBuf>,
        cache_dir: Option<PathBuf>,
    ) -> PyResult<Self> {
        crate::find_wheels(py)?;
        let Some(statistic) = Statistic::ALL.into_iter().find(|s| s.to_string() == encoding) else {
            return Err(usage(py, format!("capture kernels do not write `{encoding}`; use log2-u8 or f32")));
        };
        let variant = CaptureVariant { dtype: dtype_of(py, dtype)?, head_dim, statistic };
        let (arch, family) = target(py, device, portable)?;
        let source = generate_capture(&variant, family).map_err(|error| bad_input(py, error.to_string()))?;
        let compiled = py.detach(|| -> Result<_, DriverError> {
            let nvrtc = Nvrtc::find(nvrtc.as_deref())?;
            check_nvrtc(family, nvrtc.version(), nvrtc.path())?;
            let cache = Cache::open(cache_dir.as_deref())?;
            let request = Request { source: &source.text, symbol: &source.symbol, arch: &arch.to_string() };
            Ok(cache.compile(&nvrtc, &request, calibc_driver::VERSION)?.0)
        });
        let compiled = compiled.map_err(|error| raise(py, error))?;
        let code = CaptureCode {
            cubin: &compiled.cubin,
            symbol: &source.symbol,
            family,
            dtype: variant.dtype,
            head_dim,
            statistic_bytes: statistic.bytes() as u32,
            threads: source.threads,
            shared_bytes: source.shared_bytes,
        };
        let loaded = py.detach(|| Loaded::load(device, &code)).map_err(|error| raise(py, error))?;
        Ok(Self { loaded, device, symbol: source.symbol, family, statistic })
    }

    #[getter]
    fn symbol(&self) -> &str {
        &self.symbol
    }

    #[getter]
    fn family(&self) -> String {
        self.family.to_string()
    }

    #[getter]
    fn encoding(&self) -> String {
        self.statistic.to_string()
    }

    /// Puts the statistics of one dense attention on `stream`: energies and deviations, `[heads, q_blocks, kv_blocks]` in the kernel's
    /// encoding, at device addresses. Nothing waits for the GPU.
    ///
    /// Every tensor must stay as described until the work is done: this is for `calibc.statistics`, which sees to it.
    #[pyo3(signature = (q, k, v, out, lse, *, energy, deviation, rows_per_block=16, seed=0, scale=None, stream=0))]
    #[expect(clippy::too_many_arguments, reason = "one launch: five tensors, two results, four settings")]
    fn block_statistics(
        &self,
        py: Python<'_>,
        q: View,
        k: View,
        v: View,
        out: View,
        lse: LseView,
        energy: u64,
        deviation: u64,
        rows_per_block: u32,
        seed: u64,
        scale: Option<f32>,
        stream: u64,
    ) -> PyResult<()> {
        let device = self.device;
        let [q, k, v, out] =
            [q.on_device(py, device)?, k.on_device(py, device)?, v.on_device(py, device)?, out.on_device(py, device)?];
        let LseView(ptr, shape, strides) = lse;
        let call = CaptureCall {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            lse: &DeviceLse { ptr, device, shape, strides },
            rows_per_block,
            seed,
            softmax_scale: scale,
            energy,
            deviation,
        };
        // SAFETY: `calibc.statistics` describes tensors it holds, allocates both results for this shape, and passes torch's current
        // stream of their GPU; torch's allocator keeps memory for that stream's work.
        let done = py.detach(|| unsafe { self.loaded.block_statistics(&call, stream) });
        done.map_err(|error| raise(py, error))
    }

    /// Tokens of a block.
    #[classattr]
    const BLOCK: u32 = BLOCK;
}

//! One layer on tensors that Python holds: a launch on a GPU, or the CPU reference.

use calibc_ir::{DType, LayerId, StepId};
use calibc_runtime::reference::{self, Options};
use calibc_runtime::{DeviceLse, DeviceTensor, HostData, HostTensor, Operand, Residency, RuntimeError, StepArg};
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::{bad_input, raise, usage};
use crate::loaded::Loaded;

/// A tensor as Python describes it: address, dtype code, device (-1 is the CPU), and logical shape and strides
/// `[batch, head, token, head_dim]`, in elements.
#[derive(FromPyObject)]
pub(crate) struct Described(u64, i32, i64, [usize; 4], [i64; 4]);

/// Element types by code; the same codes as in `python/calibc/ops.py`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Element {
    F32,
    Kernel(DType),
}

impl Described {
    fn element(&self, py: Python<'_>, operand: Operand) -> PyResult<Element> {
        match self.1 {
            0 => Ok(Element::F32),
            1 => Ok(Element::Kernel(DType::Bf16)),
            2 => Ok(Element::Kernel(DType::Fp16)),
            _ => Err(bad_input(py, format!("{operand} has an element type no kernel reads; use bfloat16 or float16"))),
        }
    }

    fn on_device(&self, py: Python<'_>, operand: Operand) -> PyResult<DeviceTensor> {
        let Element::Kernel(dtype) = self.element(py, operand)? else {
            let message =
                format!("{operand} is float32; kernels take bfloat16 or float16 (float32 runs on the CPU only)");
            return Err(bad_input(py, message));
        };
        let &Self(ptr, _, device, shape, strides) = self;
        let Ok(device) = u32::try_from(device) else {
            return Err(bad_input(py, format!("{operand} is in CPU memory but q is on a GPU; move it there")));
        };
        Ok(DeviceTensor { ptr, dtype, device, shape, strides })
    }

    /// Elements from the first to the last one a view reaches. `None` where that overflows or goes backwards.
    fn extent(&self) -> Option<usize> {
        let Self(_, _, _, shape, strides) = self;
        if shape.contains(&0) {
            return Some(0);
        }
        shape.iter().zip(strides).try_fold(1usize, |end, (&n, &stride)| match n {
            1 => Some(end),
            _ => end.checked_add((n - 1).checked_mul(usize::try_from(stride).ok()?)?),
        })
    }

    /// The tensor in host memory.
    ///
    /// # Safety
    /// Address, element type, shape and strides describe memory that nothing writes while the result lives.
    unsafe fn on_host(&self, py: Python<'_>, operand: Operand) -> PyResult<HostTensor<'_>> {
        let &Self(ptr, _, device, shape, strides) = self;
        if device != -1 {
            return Err(bad_input(py, format!("{operand} is on a GPU but q is in CPU memory; move one of them")));
        }
        let overlong = || RuntimeError::Extent { operand, shape: shape.to_vec(), strides: strides.to_vec() };
        let len = self.extent().ok_or_else(|| raise(py, overlong()))?;
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
            match self.element(py, operand)? {
                Element::F32 => slice::<f32>(ptr, len).into(),
                Element::Kernel(DType::Bf16) => slice::<bf16>(ptr, len).into(),
                Element::Kernel(DType::Fp16) => slice::<f16>(ptr, len).into(),
            }
        };
        HostTensor::new(operand, data, shape, strides).map_err(|error| raise(py, error))
    }
}

fn loaded(py: Python<'_>, handle: i64) -> PyResult<std::sync::Arc<Loaded>> {
    Loaded::of(handle).ok_or_else(|| {
        usage(py, format!("no bundle has the handle {handle}; keep the Bundle or Plan object while it is used"))
    })
}

/// Makes the engine of a bundle on GPU `device`, unless it is there: kernels and tables are loaded, which waits for the GPU.
/// `resident_steps`: of how many steps the GPU holds the tables at a time, all by default.
#[pyfunction]
pub(crate) fn load(py: Python<'_>, handle: i64, device: u32, resident_steps: Option<u32>) -> PyResult<()> {
    let loaded = loaded(py, handle)?;
    let residency = resident_steps.map_or(Residency::All, Residency::Window);
    py.detach(|| loaded.load(device, residency).map(drop)).map_err(|error| raise(py, error))
}

/// GPU memory and pinned host memory that a bundle's tables take on GPU `device`, in bytes; zeros where it was not loaded.
#[pyfunction]
pub(crate) fn table_bytes(py: Python<'_>, handle: i64, device: u32) -> PyResult<(usize, usize)> {
    let engine = loaded(py, handle)?.there(device);
    Ok(engine.map_or((0, 0), |engine| (engine.table_bytes(), engine.pinned_bytes())))
}

/// Announces that work put on `stream` of GPU `device` from now on runs at `step`; see `calibc.ops.enter`.
#[pyfunction]
pub(crate) fn enter(py: Python<'_>, handle: i64, device: u32, step: u32, stream: u64) -> PyResult<()> {
    let loaded = loaded(py, handle)?;
    let done = py.detach(|| {
        // SAFETY: `calibc.ops` passes torch's current stream of the GPU; that work elsewhere is done or ordered before is what it
        // asks of its callers.
        loaded.engine(device).and_then(|engine| unsafe { engine.enter(step, stream) })
    });
    done.map_err(|error| raise(py, error))
}

/// Puts one layer on `stream` of the GPU that holds q. The step is a number, or the device address of one (`step_ptr`, not 0).
/// `out` and `lse` (an address, f32 `[batch, head, token]`, or 0 for none) are written. Nothing waits for the GPU.
///
/// Every tensor must stay as described until the work is done: this is for `calibc.ops`, which sees to it.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one launch: where in the plan, five tensors, two settings")]
pub(crate) fn attention(
    py: Python<'_>,
    handle: i64,
    layer: u32,
    step: u32,
    step_ptr: u64,
    q: Described,
    k: Described,
    v: Described,
    out: Described,
    lse: u64,
    scale: Option<f32>,
    stream: u64,
) -> PyResult<()> {
    let loaded = loaded(py, handle)?;
    let q = q.on_device(py, Operand::Q)?;
    let (k, v, out) = (k.on_device(py, Operand::K)?, v.on_device(py, Operand::V)?, out.on_device(py, Operand::Out)?);
    let [batch, heads, tokens, _] = q.shape;
    let lse = (lse != 0).then(|| DeviceLse::contiguous(lse, q.device, [batch, heads, tokens]));
    let step = if step_ptr == 0 { StepArg::Host(step) } else { StepArg::Device(step_ptr) };
    let done = py.detach(|| {
        let engine = loaded.engine(q.device)?;
        // SAFETY: `calibc.ops` describes tensors it holds, allocates `out` and `lse` itself, and passes torch's current stream of
        // their GPU; torch's allocator keeps memory for that stream's work, and gives captured graphs memory of their own.
        unsafe { engine.attention(step, layer, &q, &k, &v, &out, lse.as_ref(), scale, stream) }
    });
    done.map_err(|error: RuntimeError| raise(py, error))
}

/// The same on the CPU, in f32; q, k, v and out are f32, bf16 or fp16.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "as `attention`")]
pub(crate) fn reference_attention(
    py: Python<'_>,
    handle: i64,
    layer: u32,
    step: u32,
    q: Described,
    k: Described,
    v: Described,
    out: Described,
    lse: u64,
    scale: Option<f32>,
) -> PyResult<()> {
    let loaded = loaded(py, handle)?;
    let want = q.element(py, Operand::Q)?;
    for (operand, tensor) in [(Operand::K, &k), (Operand::V, &v), (Operand::Out, &out)] {
        if tensor.element(py, operand)? != want {
            let message = format!("{operand} and q differ in element type; q, k and v must have one element type");
            return Err(bad_input(py, message));
        }
    }
    let to = Written::new(py, &out, q.3)?;
    // SAFETY: `calibc.ops` describes tensors it holds through the call.
    let [q, k, v] = unsafe { [q.on_host(py, Operand::Q)?, k.on_host(py, Operand::K)?, v.on_host(py, Operand::V)?] };
    let options = Options { softmax_scale: scale, round_to: None };
    let plan = loaded.bundle.plan();
    let done = py.detach(|| {
        let computed = reference::attention(plan, StepId(step), LayerId(layer), &q, &k, &v, &options)?;
        // SAFETY: `out` was checked against q's shape, which is that of the result, and is an output of its own.
        unsafe { to.write(&computed.out) };
        if lse != 0 {
            // SAFETY: `calibc.ops` allocates `lse` for as many values as q has heads and tokens.
            let values = unsafe { std::slice::from_raw_parts_mut(lse as usize as *mut f32, computed.lse.len()) };
            values.copy_from_slice(&computed.lse);
        }
        Ok(())
    });
    done.map_err(|error: RuntimeError| raise(py, error))
}

/// An output in host memory.
struct Written {
    ptr: usize,
    element: Element,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl Written {
    /// Checks that `out` has `shape`.
    fn new(py: Python<'_>, out: &Described, shape: [usize; 4]) -> PyResult<Self> {
        let &Described(ptr, _, device, got, strides) = out;
        if device != -1 || got != shape {
            return Err(bad_input(
                py,
                format!("out has shape {got:?}; it must be in CPU memory with q's shape {shape:?}"),
            ));
        }
        let overlong =
            || RuntimeError::Extent { operand: Operand::Out, shape: got.to_vec(), strides: strides.to_vec() };
        out.extent().ok_or_else(|| raise(py, overlong()))?;
        // A dimension of one element is never stepped along.
        let strides = std::array::from_fn(|i| if got[i] > 1 { strides[i] as usize } else { 0 });
        Ok(Self { ptr: ptr as usize, element: out.element(py, Operand::Out)?, shape, strides })
    }

    /// Writes `values`, contiguous in the shape.
    ///
    /// # Safety
    /// The memory described is writable, and nothing else touches it.
    unsafe fn write(&self, values: &[f32]) {
        let [_, heads, tokens, head_dim] = self.shape;
        for (i, row) in values.chunks_exact(head_dim.max(1)).enumerate() {
            let (b, h, s) = (i / (heads * tokens), i / tokens % heads, i % tokens);
            let at = b * self.strides[0] + h * self.strides[1] + s * self.strides[2];
            for (d, &value) in row.iter().enumerate() {
                let at = at + d * self.strides[3];
                // SAFETY: inside the extent that `new` computed, which the caller vouches for.
                unsafe {
                    match self.element {
                        Element::F32 => (self.ptr as *mut f32).add(at).write(value),
                        Element::Kernel(DType::Bf16) => (self.ptr as *mut bf16).add(at).write(bf16::from_f32(value)),
                        Element::Kernel(DType::Fp16) => (self.ptr as *mut f16).add(at).write(f16::from_f32(value)),
                    }
                }
            }
        }
    }
}

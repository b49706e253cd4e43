//! A capture kernel on one GPU.

use cudarc::driver::{result, sys};

use super::device::{Device, Module, failed};
use super::encode::tensor_map;
use crate::capture::{CaptureArgs, CaptureCall, CaptureCode, CaptureParams};
use crate::error::{Operand, RuntimeError};

/// A loaded capture kernel. Calls may come from any thread.
#[derive(Debug)]
pub struct CaptureKernel {
    device: Device,
    function: sys::CUfunction,
    // What the code is, without it.
    code: CaptureCode<'static>,
    // Keeps `function` valid.
    _module: Module,
}

// SAFETY: a CUfunction may be launched from any thread; the struct never changes after creation.
unsafe impl Send for CaptureKernel {}
// SAFETY: as above.
unsafe impl Sync for CaptureKernel {}

impl CaptureKernel {
    /// Loads a compiled kernel onto GPU `device`.
    ///
    /// A cubin is machine code that will run on the GPU with this program's rights.
    ///
    /// # Errors
    /// No such GPU, one whose blocks have too little shared memory, or a driver that refuses the code.
    pub fn load(device: u32, code: &CaptureCode<'_>) -> Result<Self, RuntimeError> {
        use sys::CUdevice_attribute_enum as DeviceAttribute;
        use sys::CUfunction_attribute_enum as Attribute;
        let device = Device::open(device)?;
        let &CaptureCode { cubin, symbol, shared_bytes, .. } = code;
        let module = Module::load(&device, cubin, symbol)?;
        let function = module.function(symbol)?;
        let have = device.attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        if shared_bytes > have {
            let (need, have) = (shared_bytes.into(), have.into());
            return Err(RuntimeError::SharedMemory { symbol: symbol.to_owned(), need, have });
        }
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let current = device.bind()?;
        // SAFETY: `function` belongs to `module`, which is loaded; the size is one the GPU gives.
        unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as i32) }
            .map_err(failed(&format!("give {symbol} {shared_bytes} bytes of shared memory")))?;
        drop(current);
        let code = CaptureCode { cubin: &[], symbol: "", ..*code };
        Ok(Self { device, function, code, _module: module })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the kernel is made for; code and symbol are not kept.
    pub fn code(&self) -> &CaptureCode<'static> {
        &self.code
    }

    /// Computes the block statistics of a dense attention in one launch on `stream` (a `CUstream`, borrowed; 0 is the default
    /// stream). Every element of both results is written. Asynchronous: nothing is allocated, nothing waits.
    ///
    /// # Errors
    /// Whatever does not fit, each with its own error, before anything is launched. A failure of work submitted earlier may also
    /// surface here, as [`RuntimeError::Driver`].
    ///
    /// # Safety
    /// Until the work on `stream` has completed:
    /// * each tensor's address, shape, strides and element type describe memory of this kernel's GPU that stays allocated, and
    ///   `energy` and `deviation` point to `heads * q_blocks * kv_blocks` statistics each, which overlap nothing else here;
    /// * nothing else writes the inputs or touches the results;
    /// * `stream` is a live stream of the GPU's primary context, or 0;
    /// * the kernel is not dropped.
    pub unsafe fn block_statistics(&self, call: &CaptureCall<'_>, stream: u64) -> Result<(), RuntimeError> {
        let CaptureArgs { mut params, grid: [x, y, z], maps } =
            CaptureArgs::new(&self.code, self.device.ordinal(), call)?;
        let _current = self.device.bind()?;
        let first: *mut CaptureParams = &raw mut params;
        let mut arguments = [first.cast(); 3];
        let mut count = 1;
        let mut encoded = [sys::CUtensorMap { opaque: [0; 16] }; 2];
        if self.code.family == calibc_ir::Family::Hopper {
            let operands = [(Operand::K, call.k), (Operand::V, call.v)];
            for ((to, spec), (operand, tensor)) in encoded.iter_mut().zip(&maps).zip(operands) {
                tensor_map(to, spec, operand, tensor)?;
                arguments[count] = (&raw mut *to).cast();
                count += 1;
            }
        }
        // SAFETY: the kernel takes the parameter struct by value, a Hopper kernel two tensor maps more, which the driver copies before
        // it returns; tensors were checked by `CaptureArgs::new`, and that they are what they claim is the caller's promise.
        unsafe {
            result::launch_kernel(
                self.function,
                (x, y, z),
                (self.code.threads, 1, 1),
                self.code.shared_bytes,
                stream as usize as sys::CUstream,
                &mut arguments[..count],
            )
        }
        .map_err(failed("launch the capture kernel"))
    }
}

impl Drop for CaptureKernel {
    fn drop(&mut self) {
        // Running kernels read the code.
        if let Err(error) = self.device.synchronize() {
            tracing::debug!(%error, "waiting for the GPU before unloading failed");
        }
    }
}

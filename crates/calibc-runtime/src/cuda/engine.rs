//! A bundle on one GPU.

use calibc_bundle::{Bundle, Kernel};
use calibc_ir::{BlockMask, Family, Variant, abi};
use cudarc::driver::{result, sys};

use super::device::{Device, DeviceInfo, Module, failed};
use super::encode::tensor_maps;
use super::tables::Tables;
use crate::error::RuntimeError;
use crate::launch::{Call, LaunchArgs, LaunchPlan, Params, StepArg};
use crate::tensor::{DeviceLse, DeviceTensor};

/// One kernel, ready to launch.
#[derive(Debug)]
struct Loaded {
    variant: Variant,
    family: Family,
    function: sys::CUfunction,
    threads: u32,
    shared_bytes: u32,
    // Keeps `function` valid.
    _module: Module,
}

// SAFETY: a CUfunction may be launched from any thread; the struct never changes after creation.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// The kernels and tables of a bundle on one GPU. All memory is allocated on creation; calls may come from any thread.
#[derive(Debug)]
pub struct Engine {
    device: Device,
    info: DeviceInfo,
    plan: LaunchPlan,
    kernels: Vec<Loaded>,
    tables: Tables,
}

impl Engine {
    /// Loads the kernels that fit GPU `device`, of each variant the best one ([`Bundle::kernel_for`]), and uploads the plan's tables.
    ///
    /// The bundle's cubins are machine code that will run on the GPU with this program's rights. A digest shows that a bundle is
    /// as it was written, not who wrote it: load bundles only from where you would load a program.
    ///
    /// # Errors
    /// No driver, no such GPU, no kernel for this GPU in the bundle, a GPU too small for the kernels or tables, or a driver that
    /// refuses the machine code.
    pub fn new(device: u32, bundle: &Bundle) -> Result<Self, RuntimeError> {
        let device = Device::open(device)?;
        let info = device.info()?;
        let plan = bundle.plan();
        let launch_plan = LaunchPlan::new(plan)?;
        let mask_row_bytes = 4 * BlockMask::words_for(plan.geometry.num_kv_blocks()) as u64;
        let kernels = (plan.variants.iter())
            .map(|variant| {
                let kernel = bundle.kernel_for(info.compute_capability, variant)?;
                let more = match kernel.family {
                    Family::Portable => mask_row_bytes,
                    Family::Hopper => 0,
                };
                load(&device, kernel, u64::from(kernel.shared_bytes) + more)
            })
            .collect::<Result<Vec<_>, RuntimeError>>()?;
        let tables = Tables::upload(&device, plan, bundle.anchor_table())?;
        tracing::debug!(
            gpu = info.name,
            kernels = kernels.len(),
            table_bytes = tables.bytes(),
            "bundle loaded onto the GPU"
        );
        Ok(Self { device, info, plan: launch_plan, kernels, tables })
    }

    /// The family of the kernel that serves `variant` on this GPU; `None` where the plan has no such variant.
    pub fn family(&self, variant: &Variant) -> Option<Family> {
        self.kernels.iter().find(|kernel| kernel.variant == *variant).map(|kernel| kernel.family)
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the GPU is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Device memory the plan's tables take, in bytes.
    pub fn table_bytes(&self) -> usize {
        self.tables.bytes()
    }

    /// Runs all heads of `layer` at `step` in one launch on `stream` (a `CUstream`, borrowed; 0 is the default stream).
    ///
    /// `q` and `out` are `[batch, heads, q_tokens, head_dim]`, `k` and `v` `[batch, heads, kv_tokens, head_dim]`, in any order in
    /// memory whose innermost dimension is contiguous; `lse`, if given, gets the natural-log sum of exponentials
    /// `[batch, heads, q_tokens]`. Every row of `out` and `lse` is written. Asynchronous: nothing is allocated, nothing waits, so
    /// the call can be captured into a graph; with [`StepArg::Device`] replays follow the step in memory.
    ///
    /// # Errors
    /// Whatever does not fit the plan, each with its own error, before anything is launched. A failure of work submitted earlier
    /// may also surface here, as [`RuntimeError::Driver`].
    ///
    /// # Safety
    /// Until the work on `stream` has completed, and for as long as a graph that captured it may be replayed:
    /// * each tensor's address, shape, strides and element type describe memory of this engine's GPU that stays allocated, and a
    ///   [`StepArg::Device`] address holds a readable `u32`;
    /// * nothing else writes q, k, v or the step, or touches `out` and `lse`, which overlap neither the inputs nor each other;
    /// * `stream` is a live stream of the GPU's primary context, or 0;
    /// * the engine is not dropped while a graph may still be replayed.
    #[expect(clippy::too_many_arguments, reason = "one launch: where in the plan, five tensors, two settings")]
    pub unsafe fn attention(
        &self,
        step: StepArg,
        layer: u32,
        q: &DeviceTensor,
        k: &DeviceTensor,
        v: &DeviceTensor,
        out: &DeviceTensor,
        lse: Option<&DeviceLse>,
        softmax_scale: Option<f32>,
        stream: u64,
    ) -> Result<(), RuntimeError> {
        let call = Call { step, layer, q, k, v, out, lse, softmax_scale };
        let mut args = LaunchArgs::new(&self.plan, self.device.ordinal(), &call)?;
        self.tables.fill(&mut args.params);
        let Variant { dtype, lse, .. } = args.variant;
        let kernel = self.kernels.iter().find(|kernel| kernel.variant == args.variant);
        let kernel = kernel.ok_or(RuntimeError::NoVariant { dtype, lse })?;
        let grid = args.grid(kernel.family, self.info.multiprocessors);
        let _current = self.device.bind()?;
        let stream = stream as usize as sys::CUstream;
        let mut maps = match kernel.family {
            Family::Portable => None,
            Family::Hopper => Some(tensor_maps(&call, &args)?),
        };
        let params = (&raw mut args.params).cast();
        let mut arguments = [params; 1 + abi::TENSOR_MAPS.len()];
        let mut count = 1;
        for map in maps.iter_mut().flatten() {
            arguments[count] = (&raw mut *map).cast();
            count += 1;
        }
        // SAFETY: a portable kernel takes one `Params` by value, a Hopper kernel three tensor maps more, whose layouts are those the
        // bundle was opened for (`abi::describe`) and which the driver copies before it returns; its tables are held by `self`, its
        // tensors were checked against the plan by `LaunchArgs::new`, and that they are what they claim is the caller's promise.
        unsafe {
            result::launch_kernel(
                kernel.function,
                grid.into(),
                (kernel.threads, 1, 1),
                kernel.shared_bytes,
                stream,
                &mut arguments[..count],
            )
        }
        .map_err(failed("launch the attention kernel"))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Running kernels read the tables and the code.
        if let Err(error) = self.device.synchronize() {
            tracing::debug!(%error, "waiting for the GPU before unloading failed");
        }
    }
}

/// Loads one kernel and lets it use the `need` bytes of dynamic shared memory it asks for.
fn load(device: &Device, kernel: &Kernel, need: u64) -> Result<Loaded, RuntimeError> {
    use sys::CUdevice_attribute_enum as DeviceAttribute;
    use sys::CUfunction_attribute_enum as Attribute;
    let symbol = &kernel.symbol;
    let module = Module::load(device, &kernel.cubin, symbol)?;
    let function = module.function(symbol)?;
    let _current = device.bind()?;
    // SAFETY: `function` belongs to `module`, which is loaded.
    let static_bytes =
        unsafe { result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) };
    let static_bytes = static_bytes.map_err(failed(&format!("read the attributes of {symbol}")))? as u64;
    let optin = device.attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    let have = u64::from(optin);
    if need + static_bytes > have {
        return Err(RuntimeError::SharedMemory { symbol: symbol.clone(), need: need + static_bytes, have });
    }
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: as above; `need` is at most what the GPU gives, a u32.
    unsafe { result::function::set_function_attribute(function, attribute, need as i32) }
        .map_err(failed(&format!("give {symbol} {need} bytes of shared memory")))?;
    Ok(Loaded {
        variant: kernel.variant,
        family: kernel.family,
        function,
        threads: kernel.threads,
        shared_bytes: need as u32,
        _module: module,
    })
}

const _: () = {
    const fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<Engine>();
    // Kernel parameters are limited to 4 KiB.
    assert!(size_of::<Params>() + 3 * size_of::<sys::CUtensorMap>() + 64 <= 4096);
};

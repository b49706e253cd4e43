//! A bundle on one GPU.

use calibc_bundle::{Bundle, Kernel};
use calibc_ir::verify::verify;
use calibc_ir::{AnchorTable, BlockMask, Family, Plan, Variant, abi};
use cudarc::driver::{result, sys};

use super::device::{Device, DeviceInfo, Module, failed};
use super::encode::tensor_maps;
use super::partials::Partials;
use super::stream::{capture_of, handle};
use super::tables::Tables;
use crate::error::RuntimeError;
use crate::launch::{Call, LaunchArgs, LaunchPlan, Params, StepArg};
use crate::residency::Residency;
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

/// The kernels and tables of a bundle on one GPU. Calls may come from any thread. Memory is allocated on creation, and again where a
/// second stream or a capture runs layers without masks, whose last tiles are computed in parts ([`calibc_ir::abi::SPLIT_TAIL`]).
#[derive(Debug)]
pub struct Engine {
    device: Device,
    info: DeviceInfo,
    plan: LaunchPlan,
    kernels: Vec<Loaded>,
    tables: Tables,
    /// Where a kernel of this GPU may compute tiles in parts.
    partials: Option<Partials>,
}

impl Engine {
    /// Loads the kernels that fit GPU `device`, of each variant the best one ([`Bundle::kernel_for`]), and uploads the tables of
    /// all steps of the bundle's plan.
    ///
    /// The bundle's cubins are machine code that will run on the GPU with this program's rights. A digest shows that a bundle is
    /// as it was written, not who wrote it: load bundles only from where you would load a program.
    ///
    /// # Errors
    /// No driver, no such GPU, no kernel for this GPU in the bundle, a GPU too small for the kernels or tables, or a driver that
    /// refuses the machine code.
    pub fn new(device: u32, bundle: &Bundle) -> Result<Self, RuntimeError> {
        Self::with_residency(device, bundle, Residency::All)
    }

    /// As [`Engine::new`], with the tables of a window of steps in GPU memory and those of all steps in pinned host memory.
    ///
    /// Launches at a step known on the host find it in the window or bring it there, and the step that came next last time (at
    /// first: the one after) is uploaded behind their back. Steps in device memory are the caller's to announce:
    /// [`Engine::enter`]. A window as long as the plan is [`Residency::All`].
    ///
    /// # Errors
    /// As for [`Engine::new`]; a window of less than two steps; a host that has too little memory to pin.
    pub fn with_residency(device: u32, bundle: &Bundle, residency: Residency) -> Result<Self, RuntimeError> {
        Self::build(device, bundle, bundle.plan(), &bundle.plan().variants, bundle.anchor_table(), residency)
    }

    /// As [`Engine::with_residency`], for another plan than the bundle's: kernels serve any plan of their head dimension. It takes those of
    /// the bundle's variants that have what `plan` needs; `plan.variants` is not looked at.
    ///
    /// # Errors
    /// As for [`Engine::with_residency`]; a plan that the verifier turns down or that was not scheduled; kernels that do not serve it.
    pub fn for_plan(device: u32, bundle: &Bundle, plan: &Plan, residency: Residency) -> Result<Self, RuntimeError> {
        let variants = serving(&bundle.plan().variants, plan)?;
        let anchors = plan.anchors().map(|anchors| AnchorTable::new(&plan.geometry, anchors));
        Self::build(device, bundle, plan, &variants, anchors.as_ref(), residency)
    }

    fn build(
        device: u32,
        bundle: &Bundle,
        plan: &Plan,
        variants: &[Variant],
        anchors: Option<&AnchorTable>,
        residency: Residency,
    ) -> Result<Self, RuntimeError> {
        let device = Device::open(device)?;
        let info = device.info()?;
        let launch_plan = LaunchPlan::new(plan, variants)?;
        let mask_row_bytes = 4 * BlockMask::words_for(plan.geometry.num_kv_blocks()) as u64;
        let kernels = (variants.iter())
            .map(|variant| {
                let kernel = bundle.kernel_for(info.compute_capability, variant)?;
                let more = match kernel.family {
                    Family::Portable => mask_row_bytes,
                    Family::Hopper => 0,
                };
                load(&device, kernel, u64::from(kernel.shared_bytes) + more)
            })
            .collect::<Result<Vec<_>, RuntimeError>>()?;
        let tables = Tables::upload(&device, plan, anchors, residency)?;
        let hopper = kernels.iter().any(|kernel| kernel.family == Family::Hopper);
        let partials = (hopper && launch_plan.splits())
            .then(|| Partials::new(&device, plan.model.head_dim, info.multiprocessors))
            .transpose()?;
        tracing::debug!(
            gpu = info.name,
            kernels = kernels.len(),
            device_bytes = tables.device_bytes(),
            host_bytes = tables.host_bytes(),
            "bundle loaded onto the GPU"
        );
        Ok(Self { device, info, plan: launch_plan, kernels, tables, partials })
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
        self.tables.device_bytes()
    }

    /// Device memory for tiles computed in parts, in bytes: up to 20 MB for each stream and each captured graph.
    pub fn partial_bytes(&self) -> usize {
        self.partials.as_ref().map_or(0, Partials::bytes)
    }

    /// Pinned host memory the plan's tables take, in bytes; none where all steps are resident.
    pub fn pinned_bytes(&self) -> usize {
        self.tables.host_bytes()
    }

    /// Announces that work submitted to `stream` from now on runs at `step`. Needed before launches with [`StepArg::Device`], graph
    /// replays among them, by an engine that holds a window of steps; with all steps resident it does nothing.
    ///
    /// `stream` waits, on the GPU, until the step is there, and the step that came next last time is uploaded ahead. Everything
    /// `stream` was given before counts as reading the window. A launch at a step that was never announced writes nothing, as one
    /// past the last step.
    ///
    /// # Errors
    /// A step that is not the plan's; a stream that is being captured into a graph; a failure of the driver.
    ///
    /// # Safety
    /// `stream` is a live stream of the GPU's primary context, or 0. Work that reads its step from device memory and was submitted
    /// to other streams, or replayed there, is complete or was made to run before what `stream` is given next.
    pub unsafe fn enter(&self, step: u32, stream: u64) -> Result<(), RuntimeError> {
        self.plan.check_step(step)?;
        let _current = self.device.bind()?;
        // SAFETY: the context is current, and the stream is the caller's promise.
        unsafe { self.tables.enter(step, handle(stream)) }
    }

    /// Starts to upload what `step` needs, in the place of any step but the one at work, for callers who know better than this
    /// engine what comes next. With all steps resident it does nothing.
    ///
    /// # Errors
    /// As for [`Engine::enter`].
    ///
    /// # Safety
    /// As for [`Engine::enter`].
    pub unsafe fn prefetch(&self, step: u32, stream: u64) -> Result<(), RuntimeError> {
        self.plan.check_step(step)?;
        let _current = self.device.bind()?;
        // SAFETY: the context is current, and the stream is the caller's promise.
        unsafe { self.tables.prefetch(step, handle(stream)) }
    }

    /// Runs all heads of `layer` at `step` in one launch on `stream` (a `CUstream`, borrowed; 0 is the default stream).
    ///
    /// `q` and `out` are `[batch, heads, q_tokens, head_dim]`, `k` and `v` `[batch, heads, kv_tokens, head_dim]`, in any order in
    /// memory whose innermost dimension is contiguous; `lse`, if given, gets the natural-log sum of exponentials
    /// `[batch, heads, q_tokens]`. Every row of `out` and `lse` is written. Asynchronous: nothing waits, and nothing is allocated (but
    /// see [`Engine`] for the first call on a further stream), so the call can be captured into a graph; with [`StepArg::Device`] replays follow the step in memory. (An engine with a window
    /// of steps refuses to have a step known on the host captured: replays would outlive its place in the window.)
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
    /// * the engine is not dropped while a graph may still be replayed;
    /// * where the engine holds a window of steps, a step in device memory is the one that was announced by [`Engine::enter`].
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
        let stream = handle(stream);
        let partials = self.partials.as_ref().filter(|_| args.splits && kernel.family == Family::Hopper);
        // A question to the driver that most launches need not ask.
        let ask = partials.is_some() || self.tables.is_window();
        // SAFETY: the context is current, and the stream is the caller's promise.
        let capture = if ask { unsafe { capture_of(stream) }? } else { None };
        if let Some(partials) = partials {
            // SAFETY: as above.
            (args.params.partials, args.params.arrivals) = unsafe { partials.of(stream, capture) }?;
        }
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
        let launch = || {
            // SAFETY: a portable kernel takes one `Params` by value, a Hopper kernel three tensor maps more, whose layouts are those
            // the bundle was opened for (`abi::describe`) and which the driver copies before it returns; its tables are held by
            // `self`, its tensors were checked against the plan by `LaunchArgs::new`, and that they are what they claim is the
            // caller's promise.
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
        };
        // SAFETY: the context is current, and the stream is the caller's promise.
        unsafe { self.tables.launch(step, stream, capture.is_some(), launch) }
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

/// Those of a bundle's variants that serve `plan`, which must be valid: all it needs, of each element type the leanest.
fn serving(variants: &[Variant], plan: &Plan) -> Result<Vec<Variant>, RuntimeError> {
    // The verifier wants variants to have exactly what the plan needs; here they may have more.
    let bare = Plan { variants: Vec::new(), ..plan.clone() };
    if let Err(mut errors) = verify(&bare) {
        return Err(RuntimeError::Invalid { error: errors.swap_remove(0) });
    }
    let (anchors, ragged, head_dim) = (plan.anchors().is_some(), plan.geometry.ragged(), plan.model.head_dim);
    let serves = |v: &&Variant| v.head_dim == head_dim && v.anchors >= anchors && v.ragged >= ragged;
    let serving: Vec<Variant> = variants.iter().filter(serves).copied().collect();
    if serving.is_empty() {
        let need = |on: bool, what: &str| if on { format!(", {what}") } else { String::new() };
        let what = format!("head_dim {head_dim}{}{}", need(anchors, "anchor rows"), need(ragged, "ragged sequences"));
        return Err(RuntimeError::Unserved { what: format!("it needs {what}"), available: variants.to_vec() });
    }
    Ok(serving)
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

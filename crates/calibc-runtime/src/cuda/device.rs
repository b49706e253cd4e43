//! A GPU through its primary context, and what is allocated there. Each handle is released when it is dropped.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::error::RuntimeError;

/// Wraps a driver error with what was being done.
pub(super) fn failed(action: &str) -> impl FnOnce(DriverError) -> RuntimeError {
    move |error| {
        let (name, message) = text(error);
        RuntimeError::Driver { action: action.to_owned(), name, message }
    }
}

/// The driver's name of an error, and its sentence.
pub(super) fn text(error: DriverError) -> (String, String) {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    (text(error.error_name()), text(error.error_string()))
}

/// Loads and initialises the driver. Must come before any other call into it: cudarc panics where the library is missing.
fn init() -> Result<(), RuntimeError> {
    // SAFETY: loading libcuda runs its initialisers; it is the system's own driver library.
    if !unsafe { sys::is_culib_present() } {
        return Err(RuntimeError::NoDriver);
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Err(RuntimeError::NoDevice { ordinal: 0, count: 0 }),
        other => other.map_err(failed("initialise the CUDA driver")),
    }
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The driver's name for it.
    pub name: String,
    /// Compute capability, (major, minor).
    pub compute_capability: (u32, u32),
    /// CUDA version of the driver, (major, minor).
    pub driver_version: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// L2 cache in bytes.
    pub l2_bytes: u64,
    /// Highest clock of the multiprocessors in MHz; 0 where the driver does not say.
    pub max_clock_mhz: u32,
}

#[derive(Debug)]
struct Primary {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: driver handles may be used from any thread; the struct never changes after creation.
unsafe impl Send for Primary {}
// SAFETY: as above.
unsafe impl Sync for Primary {}

impl Drop for Primary {
    fn drop(&mut self) {
        // SAFETY: `device` comes from cuDeviceGet, and `Device::open` retained its primary context once for this value.
        let released = unsafe { result::primary_ctx::release(self.device) };
        if let Err(error) = released {
            tracing::debug!(%error, "releasing the primary context failed");
        }
    }
}

/// The primary context of one GPU, retained. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Device {
    primary: Arc<Primary>,
}

/// While alive, the device's context is current on this thread; afterwards the one from before is again.
pub(super) struct Current {
    pushed: bool,
    /// The guard belongs to one thread.
    _not_send: PhantomData<*const ()>,
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: `Device::bind` pushed a context on this thread (`Current` is neither Send nor leaked), and guards nest.
            let result = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) }.result();
            if let Err(error) = result {
                tracing::debug!(%error, "restoring the current context failed");
            }
        }
    }
}

impl Device {
    /// GPUs the driver shows.
    ///
    /// # Errors
    /// [`RuntimeError::NoDriver`] where there is no driver; [`RuntimeError::Driver`] where it does not start.
    pub fn count() -> Result<u32, RuntimeError> {
        match init() {
            Err(RuntimeError::NoDevice { .. }) => return Ok(0),
            other => other?,
        }
        result::device::get_count().map(|n| n as u32).map_err(failed("count the GPUs"))
    }

    /// Retains the primary context of GPU `ordinal`.
    pub fn open(ordinal: u32) -> Result<Self, RuntimeError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(RuntimeError::NoDevice { ordinal, count });
        }
        let device = result::device::get(ordinal as i32).map_err(failed("open the GPU"))?;
        // SAFETY: `device` comes from cuDeviceGet.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(failed("create the GPU's primary context"))?;
        Ok(Self { primary: Arc::new(Primary { ordinal, device, context }) })
    }

    /// Which GPU this is.
    pub fn ordinal(&self) -> u32 {
        self.primary.ordinal
    }

    /// What this GPU is.
    pub fn info(&self) -> Result<DeviceInfo, RuntimeError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let mut driver = 0;
        // SAFETY: the argument is a valid place for an int.
        unsafe { sys::cuDriverGetVersion(&mut driver) }.result().map_err(failed("read the driver's version"))?;
        // SAFETY: `device` comes from cuDeviceGet.
        let memory = unsafe { result::device::total_mem(self.primary.device) };
        Ok(DeviceInfo {
            name: result::device::get_name(self.primary.device).map_err(failed("read the GPU's name"))?,
            compute_capability: (
                self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            driver_version: (driver as u32 / 1000, driver as u32 % 1000 / 10),
            multiprocessors: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            memory_bytes: memory.map_err(failed("read the GPU's memory size"))? as u64,
            l2_bytes: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
            max_clock_mhz: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? / 1000,
        })
    }

    /// Where it is on the PCI bus, such as `0000:3B:00.0`: what tools of the driver know it by.
    pub fn pci_bus_id(&self) -> Result<String, RuntimeError> {
        let mut text = [0; 32];
        // SAFETY: `device` comes from cuDeviceGet, and the driver ends what it writes within the length it is given.
        unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as i32, self.primary.device) }
            .result()
            .map_err(failed("read the GPU's place on the bus"))?;
        Ok(text.iter().take_while(|&&c| c != 0).map(|&c| c as u8 as char).collect())
    }

    /// An attribute that is never negative.
    pub(super) fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<u32, RuntimeError> {
        // SAFETY: `device` comes from cuDeviceGet.
        let value = unsafe { result::device::get_attribute(self.primary.device, attribute) };
        value.map(|n| n as u32).map_err(failed("read an attribute of the GPU"))
    }

    /// Makes the context current on this thread until the guard is dropped. Costs one look-up where it already is.
    pub(super) fn bind(&self) -> Result<Current, RuntimeError> {
        let context = self.primary.context;
        let current = result::ctx::get_current().map_err(failed("read the current context"))?;
        let pushed = current != Some(context);
        if pushed {
            // SAFETY: the context is retained for as long as `self.primary` lives.
            unsafe { sys::cuCtxPushCurrent_v2(context) }.result().map_err(failed("make the GPU's context current"))?;
        }
        Ok(Current { pushed, _not_send: PhantomData })
    }

    /// Waits for everything submitted to this GPU's context.
    pub fn synchronize(&self) -> Result<(), RuntimeError> {
        let _current = self.bind()?;
        result::ctx::synchronize().map_err(failed("wait for the GPU"))
    }

    /// Allocates `bytes` bytes of uninitialised memory.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer, RuntimeError> {
        let _current = self.bind()?;
        // The driver refuses an empty allocation.
        // SAFETY: a context is current; the address is owned by the buffer made of it.
        let ptr = unsafe { result::malloc_sync(bytes.max(1)) };
        let ptr = ptr.map_err(failed(&format!("allocate {bytes} bytes of GPU memory")))?;
        Ok(DeviceBuffer { device: self.clone(), ptr, bytes })
    }

    /// Allocates host memory that the GPU reads while the host goes on, all zeros.
    pub(super) fn pinned(&self, words: usize) -> Result<Pinned, RuntimeError> {
        let _current = self.bind()?;
        let bytes = 4 * words.max(1);
        // SAFETY: a context is current; the address is owned by the value made of it.
        let ptr = unsafe { result::malloc_host(bytes, 0) };
        let ptr = ptr.map_err(failed(&format!("allocate {bytes} bytes of pinned host memory")))?.cast::<u32>();
        // SAFETY: the allocation has that many bytes, aligned to a page.
        unsafe { ptr.write_bytes(0, words.max(1)) };
        Ok(Pinned { device: self.clone(), ptr, words })
    }

    /// Allocates a copy of `data`.
    pub fn upload<T: bytemuck::NoUninit>(&self, data: &[T]) -> Result<DeviceBuffer, RuntimeError> {
        let buffer = self.alloc(size_of_val(data))?;
        buffer.write(0, data)?;
        Ok(buffer)
    }
}

/// Device memory, freed on drop. Copies are synchronous.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: Device,
    ptr: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// Device address of the first byte; at least 256-byte aligned.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn span(&self, at: usize, len: usize) -> Result<u64, RuntimeError> {
        match at.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(self.ptr + at as u64),
            _ => Err(RuntimeError::BufferRange { at, len, size: self.bytes }),
        }
    }

    /// Copies `data` to byte offset `at`; done on return. Earlier work of other streams on the buffer must have finished.
    pub fn write<T: bytemuck::NoUninit>(&self, at: usize, data: &[T]) -> Result<(), RuntimeError> {
        let to = self.span(at, size_of_val(data))?;
        if data.is_empty() {
            return Ok(());
        }
        let _current = self.device.bind()?;
        // SAFETY: the range lies inside this allocation (`span`), and T has no padding (NoUninit).
        unsafe { result::memcpy_htod_sync(to, data) }.map_err(failed("copy to the GPU"))?;
        finish_default_stream()
    }

    /// Copies from byte offset `at` into `data`. Earlier work of other streams on the buffer must have finished.
    pub fn read<T: bytemuck::AnyBitPattern>(&self, at: usize, data: &mut [T]) -> Result<(), RuntimeError> {
        let from = self.span(at, size_of_val(data))?;
        if data.is_empty() {
            return Ok(());
        }
        let _current = self.device.bind()?;
        // SAFETY: the range lies inside this allocation (`span`), and T may have any bits (AnyBitPattern).
        unsafe { result::memcpy_dtoh_sync(data, from) }.map_err(failed("copy from the GPU"))
    }

    /// The whole buffer as elements; bytes that make no full element are left out.
    pub fn download<T: bytemuck::AnyBitPattern>(&self) -> Result<Vec<T>, RuntimeError> {
        let mut data = vec![T::zeroed(); self.bytes / size_of::<T>().max(1)];
        self.read(0, &mut data)?;
        Ok(data)
    }

    /// Sets every byte; done on return. Earlier work of other streams on the buffer must have finished.
    pub fn fill(&self, byte: u8) -> Result<(), RuntimeError> {
        let _current = self.device.bind()?;
        // SAFETY: the whole allocation, which this value owns.
        unsafe { result::memset_d8_sync(self.ptr, byte, self.bytes) }.map_err(failed("fill GPU memory"))?;
        finish_default_stream()
    }
}

/// Copies from pageable memory and fills return before the GPU has done them; streams that do not wait for the default one
/// would read too early.
fn finish_default_stream() -> Result<(), RuntimeError> {
    // SAFETY: the default stream always exists; the caller has made a context current.
    unsafe { result::stream::synchronize(std::ptr::null_mut()) }.map_err(failed("wait for a copy to the GPU"))
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let freed = self.device.bind().and_then(|_current| {
            // SAFETY: allocated by `Device::alloc`, owned by this value, freed once. The driver waits for work that uses it.
            unsafe { result::free_sync(self.ptr) }.map_err(failed("free GPU memory"))
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "a device buffer was not freed");
        }
    }
}

/// Pinned host memory, freed on drop. The owner keeps it until the copies from it are done.
#[derive(Debug)]
pub(super) struct Pinned {
    device: Device,
    ptr: *mut u32,
    words: usize,
}

// SAFETY: plain memory with one owner; it is written through `&mut self` alone.
unsafe impl Send for Pinned {}

impl Pinned {
    /// The words.
    pub(super) fn words(&self) -> &[u32] {
        // SAFETY: `Device::pinned` allocated and initialised that many words, which live until `self` is dropped.
        unsafe { std::slice::from_raw_parts(self.ptr, self.words) }
    }

    /// The words, to be written before any copy from them is submitted.
    pub(super) fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above, and `&mut self` is the only access of the host's.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.words) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let freed = self.device.bind().and_then(|_current| {
            // SAFETY: allocated by `Device::pinned`, owned by this value, freed once.
            unsafe { result::free_host(self.ptr.cast()) }.map_err(failed("free pinned host memory"))
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "pinned host memory was not freed");
        }
    }
}

/// A loaded cubin, unloaded on drop.
#[derive(Debug)]
pub(super) struct Module {
    device: Device,
    raw: sys::CUmodule,
}

// SAFETY: driver handles may be used from any thread; the struct never changes after creation.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads machine code. The caller vouches for where it comes from: it will run with the program's access to the GPU.
    pub(super) fn load(device: &Device, cubin: &[u8], symbol: &str) -> Result<Self, RuntimeError> {
        let _current = device.bind()?;
        // SAFETY: a cubin is an ELF file that carries its own size; the bundle's digest shows these are the bytes NVRTC made.
        let raw = unsafe { result::module::load_data(cubin.as_ptr().cast::<c_void>()) };
        let raw = raw.map_err(failed(&format!(
            "load the machine code of {symbol} (a driver older than the compiler that made it cannot)"
        )))?;
        Ok(Self { device: device.clone(), raw })
    }

    /// The entry point `symbol`; valid while this value lives.
    pub(super) fn function(&self, symbol: &str) -> Result<sys::CUfunction, RuntimeError> {
        let action = format!("find {symbol} in its machine code");
        // A name with a NUL is in no symbol table.
        let Ok(name) = std::ffi::CString::new(symbol) else {
            return Err(failed(&action)(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)));
        };
        let _current = self.device.bind()?;
        // SAFETY: the module is loaded until `self` is dropped.
        unsafe { result::module::get_function(self.raw, name) }.map_err(failed(&action))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let unloaded = self.device.bind().and_then(|_current| {
            // SAFETY: loaded by `load`, owned by this value, unloaded once, after its last launch (`Engine::drop` waits).
            unsafe { result::module::unload(self.raw) }.map_err(failed("unload a module"))
        });
        if let Err(error) = unloaded {
            tracing::debug!(%error, "a module was not unloaded");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_gets_a_typed_error() {
        match Device::open(4096) {
            Err(RuntimeError::NoDriver | RuntimeError::NoDevice { ordinal: 4096, .. }) => {}
            Err(RuntimeError::Driver { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

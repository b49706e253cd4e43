//! The GPU's clock and driver version, from the driver's management library where there is one. Nothing else needs that library, so
//! it is looked for at run time, and whatever it does not say is left out.
#![expect(unsafe_code, reason = "calls into NVML")]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

use libloading::Library;

/// `NVML_SUCCESS`.
const SUCCESS: c_int = 0;
/// `NVML_CLOCK_SM`.
const CLOCK_SM: c_uint = 1;
/// Names of the library.
const NAMES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

type DeviceHandle = *mut c_void;

/// NVML, and the GPU that is asked about.
pub(super) struct Nvml {
    library: Library,
    device: DeviceHandle,
}

impl Nvml {
    /// The library, and in it the GPU at a place on the PCI bus; `None` where either is missing.
    pub(super) fn open(pci_bus_id: &str) -> Option<Self> {
        let id = CString::new(pci_bus_id).ok()?;
        // SAFETY: loading NVML runs its initialisers; it is the driver's own library.
        let library = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok())?;
        // SAFETY: the type is the function's in nvml.h.
        let init = unsafe { library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlInit_v2\0") }.ok()?;
        // SAFETY: it takes nothing and may be called at any time.
        if unsafe { init() } != SUCCESS {
            return None;
        }
        // From here on `drop` shuts it down.
        let mut nvml = Self { library, device: std::ptr::null_mut() };
        type ByPlace = unsafe extern "C" fn(*const c_char, *mut DeviceHandle) -> c_int;
        // SAFETY: the type is the function's in nvml.h.
        let by_place = unsafe { nvml.library.get::<ByPlace>(b"nvmlDeviceGetHandleByPciBusId_v2\0") }.ok()?;
        let mut device = std::ptr::null_mut();
        // SAFETY: the library is initialised; a string that ends, and a place for a handle.
        if unsafe { by_place(id.as_ptr(), &mut device) } != SUCCESS {
            return None;
        }
        nvml.device = device;
        Some(nvml)
    }

    /// The clock of the multiprocessors now, in MHz.
    pub(super) fn clock_mhz(&self) -> Option<u32> {
        type ClockInfo = unsafe extern "C" fn(DeviceHandle, c_uint, *mut c_uint) -> c_int;
        // SAFETY: the type is the function's in nvml.h.
        let clock_info = unsafe { self.library.get::<ClockInfo>(b"nvmlDeviceGetClockInfo\0") }.ok()?;
        let mut mhz = 0;
        // SAFETY: the library is initialised, the handle is one of its devices, and there is a place for the answer.
        (unsafe { clock_info(self.device, CLOCK_SM, &mut mhz) } == SUCCESS).then_some(mhz)
    }

    /// The driver's version, such as `580.95.05`.
    pub(super) fn driver_version(&self) -> Option<String> {
        type Version = unsafe extern "C" fn(*mut c_char, c_uint) -> c_int;
        // SAFETY: the type is the function's in nvml.h.
        let version = unsafe { self.library.get::<Version>(b"nvmlSystemGetDriverVersion\0") }.ok()?;
        let mut text = [0 as c_char; 96];
        // SAFETY: the library is initialised; it ends what it writes within the length it is given.
        let done = unsafe { version(text.as_mut_ptr(), text.len() as c_uint) } == SUCCESS;
        // SAFETY: the array outlives the call, and its last element is 0 whatever was written.
        let text = done.then(|| unsafe { CStr::from_ptr(text.as_ptr()) })?;
        Some(text.to_string_lossy().into_owned())
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: the type is the function's in nvml.h.
        let shutdown = unsafe { self.library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlShutdown\0") };
        if let Ok(shutdown) = shutdown {
            // SAFETY: initialised once by `open`, shut down once.
            unsafe { shutdown() };
        }
    }
}

//! The C interface of libnvrtc, and the only unsafe code of this crate.
//!
//! [`Api`] is the set of functions calibc calls; [`Program`] owns one `nvrtcProgram` and destroys it on every path.

#![expect(unsafe_code, reason = "calls into a C library that is loaded at run time")]

use std::{
    ffi::{CStr, CString, OsStr, c_char, c_int, c_void},
    marker::PhantomData,
    ptr,
};

use libloading::Library;

/// Result code of every NVRTC function; 0 is success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code(c_int);

impl Code {
    /// `NVRTC_ERROR_INVALID_OPTION`.
    pub(crate) const INVALID_OPTION: Self = Self(5);
    /// `NVRTC_ERROR_COMPILATION`.
    pub(crate) const COMPILATION: Self = Self(6);
    /// `NVRTC_ERROR_BUILTIN_OPERATION_FAILURE`.
    pub(crate) const BUILTIN_OPERATION_FAILURE: Self = Self(7);

    fn check(self) -> Result<(), Self> {
        if self.0 == 0 { Ok(()) } else { Err(self) }
    }
}

type Handle = *mut c_void;
type StringFn = unsafe extern "C" fn(c_int) -> *const c_char;
type VersionFn = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type CountFn = unsafe extern "C" fn(*mut c_int) -> c_int;
type CreateFn = unsafe extern "C" fn(
    *mut Handle,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type DestroyFn = unsafe extern "C" fn(*mut Handle) -> c_int;
type CompileFn = unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int;
type SizeFn = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type BytesFn = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;

/// Why a file did not become an [`Api`].
pub(crate) enum OpenError {
    /// The dynamic loader refused it.
    Load(libloading::Error),
    /// It is a library, but lacks this function.
    Symbol(&'static str),
}

/// The functions of one libnvrtc: plain function pointers into a library that is never unloaded. `Send` and `Sync` follow,
/// and NVRTC documents that different threads may work on different programs at the same time.
pub(crate) struct Api {
    error_string: StringFn,
    version: VersionFn,
    num_archs: CountFn,
    archs: CountFn,
    create: CreateFn,
    destroy: DestroyFn,
    compile: CompileFn,
    log_size: SizeFn,
    log: BytesFn,
    cubin_size: SizeFn,
    cubin: BytesFn,
}

/// Opens a library and keeps it for the rest of the process.
pub(crate) fn open_forever(file: &OsStr) -> Result<&'static Library, libloading::Error> {
    // SAFETY: runs the initialisers of a file which the user named, or which lies where NVRTC is installed; NVRTC's own have
    // no preconditions. There is nothing more to check: loading a compiler means trusting it.
    let library = unsafe { Library::new(file) }?;
    // Leaked: function pointers stay valid without a lifetime, and NVRTC's thread-local state is never torn down under it.
    Ok(Box::leak(Box::new(library)))
}

impl Api {
    /// Loads the functions of `file`, a path or a bare library name.
    pub(crate) fn open(file: &OsStr) -> Result<Self, OpenError> {
        let library = open_forever(file).map_err(OpenError::Load)?;
        macro_rules! function {
            ($name:literal, $type:ty) => {{
                // SAFETY: `$type` is the signature of this function in nvrtc.h, unchanged from CUDA 11.2 to 13.5.
                let symbol = unsafe { library.get::<$type>($name) };
                *symbol.map_err(|_| OpenError::Symbol($name))?
            }};
        }
        Ok(Self {
            error_string: function!("nvrtcGetErrorString", StringFn),
            version: function!("nvrtcVersion", VersionFn),
            num_archs: function!("nvrtcGetNumSupportedArchs", CountFn),
            archs: function!("nvrtcGetSupportedArchs", CountFn),
            create: function!("nvrtcCreateProgram", CreateFn),
            destroy: function!("nvrtcDestroyProgram", DestroyFn),
            compile: function!("nvrtcCompileProgram", CompileFn),
            log_size: function!("nvrtcGetProgramLogSize", SizeFn),
            log: function!("nvrtcGetProgramLog", BytesFn),
            cubin_size: function!("nvrtcGetCUBINSize", SizeFn),
            cubin: function!("nvrtcGetCUBIN", BytesFn),
        })
    }

    /// Where the library's code lies in this process.
    pub(crate) fn address(&self) -> usize {
        self.version as usize
    }

    /// NVRTC's words for a result code.
    pub(crate) fn describe(&self, code: Code) -> String {
        // SAFETY: takes any integer and returns a pointer to a string constant of the library (loaded forever), or null.
        let text = unsafe { (self.error_string)(code.0) };
        if text.is_null() {
            return format!("result code {}", code.0);
        }
        // SAFETY: not null, hence the NUL-terminated constant that nvrtcGetErrorString returns.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Major and minor version.
    pub(crate) fn version(&self) -> Result<(u32, u32), Code> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes one int through each pointer; both point to live locals.
        Code(unsafe { (self.version)(&mut major, &mut minor) }).check()?;
        Ok((major.unsigned_abs(), minor.unsigned_abs()))
    }

    /// Numbers of the architectures it can make code for (90 for `sm_90`), ascending.
    pub(crate) fn archs(&self) -> Result<Vec<u32>, Code> {
        let mut count = 0;
        // SAFETY: writes one int through the pointer to a live local.
        Code(unsafe { (self.num_archs)(&mut count) }).check()?;
        let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
        if archs.is_empty() {
            return Ok(Vec::new());
        }
        // SAFETY: writes exactly as many ints as nvrtcGetNumSupportedArchs said, and the vector holds that many.
        Code(unsafe { (self.archs)(archs.as_mut_ptr()) }).check()?;
        Ok(archs.into_iter().map(c_int::unsigned_abs).collect())
    }

    /// A program of `source`, called `name` in messages.
    pub(crate) fn program<'a>(&'a self, source: &CStr, name: &CStr) -> Result<Program<'a>, Code> {
        let mut handle = ptr::null_mut();
        // SAFETY: both strings are NUL-terminated and outlive the call, which copies them; with 0 headers the two arrays are
        // not read; the handle is written to a live local.
        let code = unsafe { (self.create)(&mut handle, source.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null()) };
        Code(code).check()?;
        Ok(Program { api: self, handle, _one_thread: PhantomData })
    }
}

/// One `nvrtcProgram`, destroyed on drop. It stays on the thread that made it.
pub(crate) struct Program<'a> {
    api: &'a Api,
    handle: Handle,
    _one_thread: PhantomData<*const ()>,
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle came from nvrtcCreateProgram in `Api::program` and is destroyed only here.
        let code = Code(unsafe { (self.api.destroy)(&mut self.handle) });
        if code.check().is_err() {
            tracing::warn!(error = %self.api.describe(code), "nvrtcDestroyProgram failed");
        }
    }
}

impl Program<'_> {
    /// Compiles. The log is there afterwards on both outcomes.
    pub(crate) fn compile(&mut self, options: &[CString]) -> Result<(), Code> {
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).map_err(|_| Code::INVALID_OPTION)?;
        // SAFETY: the handle is alive (destroyed only on drop) and used by this thread alone; `pointers` holds `count`
        // NUL-terminated strings that outlive the call.
        Code(unsafe { (self.api.compile)(self.handle, count, pointers.as_ptr()) }).check()
    }

    /// What compiler and assembler had to say.
    pub(crate) fn log(&self) -> Result<String, Code> {
        let mut bytes = self.bytes(self.api.log_size, self.api.log)?;
        // The size counts the terminating NUL.
        bytes.truncate(bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len()));
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The machine code; empty where NVRTC made none.
    pub(crate) fn cubin(&self) -> Result<Vec<u8>, Code> {
        self.bytes(self.api.cubin_size, self.api.cubin)
    }

    fn bytes(&self, size: SizeFn, fill: BytesFn) -> Result<Vec<u8>, Code> {
        let mut len = 0_usize;
        // SAFETY: the handle is alive (destroyed only on drop); the size is written to a live local.
        Code(unsafe { size(self.handle, &mut len) }).check()?;
        let mut bytes = vec![0_u8; len];
        if len > 0 {
            // SAFETY: the handle is alive; `fill` writes the number of bytes that its `size` function just returned, and the
            // vector holds that many. Both callers pass the two functions of one pair.
            Code(unsafe { fill(self.handle, bytes.as_mut_ptr().cast()) }).check()?;
        }
        Ok(bytes)
    }
}

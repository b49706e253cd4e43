//! The one place that maps files into memory.
#![expect(unsafe_code, reason = "a file mapping is a borrow of memory that other processes can change")]

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps all of `file` for reading.
///
/// Limit: a file that another process truncates while it is mapped ends this one with SIGBUS, and one that is rewritten in
/// place shows the new bytes. Traces are written once, by rename, so neither happens unless somebody edits a trace in use;
/// the readers here copy out what they decide on and accept any byte there.
pub(crate) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is private to this crate and is only ever read as plain bytes, for which every bit pattern is
    // valid; `Mmap` unmaps on drop. Changes underneath are the documented limit above.
    unsafe { Mmap::map(file) }
}

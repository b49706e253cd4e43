//! The trace folder: finds the files a manifest names, and none outside.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

use crate::error::TraceError;
use crate::mapped;

/// A folder whose links have been resolved, so that what leads out of it can be told.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    given: PathBuf,
    root: PathBuf,
}

impl Folder {
    pub(crate) fn open(dir: &Path) -> Result<Self, TraceError> {
        let root = dir.canonicalize().map_err(TraceError::io("open", dir))?;
        if !root.is_dir() {
            return Err(TraceError::NotATrace { dir: dir.to_owned() });
        }
        Ok(Self { given: dir.to_owned(), root })
    }

    /// The folder as the caller named it.
    pub(crate) fn given(&self) -> &Path {
        &self.given
    }

    /// Where `file`, a plain relative path, really is.
    pub(crate) fn resolve(&self, file: &str) -> Result<PathBuf, TraceError> {
        let path = self.root.join(file);
        let real = path.canonicalize().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => TraceError::FileMissing { file: file.into() },
            _ => TraceError::io("find", path)(e),
        })?;
        if !real.starts_with(&self.root) {
            return Err(TraceError::LinkEscapes { file: file.into() });
        }
        // Asked before opening: opening a pipe would wait for a writer.
        let metadata = real.metadata().map_err(TraceError::io("read", &real))?;
        if metadata.is_file() { Ok(real) } else { Err(TraceError::NotAFile { file: file.into() }) }
    }

    /// Maps `file` and notes which state of it was seen.
    pub(crate) fn map(&self, file: &str) -> Result<(Mmap, Stamp), TraceError> {
        let path = self.resolve(file)?;
        let open = File::open(&path).map_err(TraceError::io("open", &path))?;
        let metadata = open.metadata().map_err(TraceError::io("read", &path))?;
        let map = mapped::map(&open).map_err(TraceError::io("map", &path))?;
        // The mapping's own length: what is behind it is what was asked for, whatever happens to the file meanwhile.
        let stamp = Stamp { bytes: map.len() as u64, modified: metadata.modified().ok() };
        Ok((map, stamp))
    }
}

/// The state of a file: enough to notice that it was replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) bytes: u64,
    modified: Option<SystemTime>,
}

/// Whether `path` is relative, made of plain names joined by `/`, and so cannot leave its folder except through a link.
pub(crate) fn is_plain_path(path: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', ':', '\0']);
    path.split('/').all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_paths_pass() {
        assert!(["a", "p000/s000.cond.safetensors", "a/..b/c.d"].iter().all(|p| is_plain_path(p)));
        let bad = ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", "./a", "a\\b", "C:/a", "a\0b", "a/.."];
        assert!(bad.iter().all(|p| !is_plain_path(p)));
    }
}

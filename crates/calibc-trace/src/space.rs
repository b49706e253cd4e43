//! How much room a file system has.

use std::io;
use std::path::Path;

use crate::error::TraceError;

/// Bytes that the file system which holds `path`, or will hold it, gives this user.
///
/// # Errors
/// If the file system cannot be asked.
pub fn free(path: &Path) -> Result<u64, TraceError> {
    let absolute = std::path::absolute(path).map_err(TraceError::io("find", path))?;
    // What is not there yet will be made in the nearest folder that is.
    let there = absolute.ancestors().find(|folder| folder.exists()).unwrap_or(&absolute);
    let stat =
        rustix::fs::statvfs(there).map_err(|e| TraceError::io("ask the file system of", there)(io::Error::from(e)))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Checks that `path` has room for `need` bytes.
///
/// # Errors
/// [`TraceError::NoSpace`] if it has not.
pub fn check(path: &Path, need: u64) -> Result<(), TraceError> {
    let have = free(path)?;
    if need <= have { Ok(()) } else { Err(TraceError::NoSpace { dir: path.to_owned(), need, have }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_has_its_parents_space() {
        let root = tempfile::tempdir().unwrap();
        assert!(free(&root.path().join("a/b")).unwrap() > 0);
        check(root.path(), 1).unwrap();
        let error = check(&root.path().join("new"), u64::MAX).unwrap_err();
        assert!(matches!(error, TraceError::NoSpace { need: u64::MAX, .. }) && error.is_io(), "{error}");
    }
}

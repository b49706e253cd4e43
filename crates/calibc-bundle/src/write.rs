//! Files that are there whole or not at all.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::BundleError;

/// Permissions before the umask takes its share.
const MODE: u32 = 0o666;

/// Writes `bytes` to `path`: afterwards, and whenever the process is killed, `path` is the old file or the whole new one.
///
/// The bytes go to a file without a name (`O_TMPFILE`), which vanishes with the process; once they are on the disk it gets its
/// name. Only to replace an existing file it must have another name for an instant, `.calibc-<hash>-<random>.tmp`; a kill in
/// that instant leaves it behind, and the next write to `path` removes it. On file systems without `O_TMPFILE` it has that name
/// from the start. A link is followed; the folder must exist.
///
/// # Errors
/// [`BundleError::Io`] with the path as given.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    write_through(path, bytes, unnamed_file).map_err(|source| {
        let cure = match source.kind() {
            io::ErrorKind::NotFound => "create the folder first",
            io::ErrorKind::IsADirectory => "name a file, not a folder",
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "choose a folder you may write to",
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room, or choose another disk",
            _ => "choose another place for the bundle",
        };
        BundleError::Io { action: "write", path: path.to_owned(), source, cure }
    })
}

/// Makes a file without a name in a folder; `None` where that is not possible.
type Unnamed = fn(&Path) -> io::Result<Option<File>>;

fn write_through(path: &Path, bytes: &[u8], unnamed: Unnamed) -> io::Result<()> {
    let target = resolve(path)?;
    let name = target.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::IsADirectory))?;
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let siblings = sibling_prefix(name);
    remove_stale(folder, &siblings);
    let placed = match unnamed(folder)? {
        Some(file) => {
            fill(&file, bytes)?;
            place(&file, &target, folder, &siblings)?
        }
        None => false,
    };
    if !placed {
        let (file, sibling) = named_file(folder, &siblings)?;
        fill(&file, bytes)?;
        sibling.persist(&target)?;
    }
    // So that the name survives a power cut as well. Not every file system can, and not every folder may be opened.
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::PermissionDenied) => Ok(()),
        done => done,
    }
}

/// Where the bytes go: through links, and never over something that is not a file.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let metadata = match path.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(path.to_owned()),
        metadata => metadata?,
    };
    let nowhere = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => io::Error::other("it is a link that leads nowhere"),
        _ => e,
    };
    let target = if metadata.is_symlink() { path.canonicalize().map_err(nowhere)? } else { path.to_owned() };
    let metadata = target.metadata()?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        return Err(io::Error::other("it exists and is not a regular file"));
    }
    Ok(target)
}

/// How the names of the siblings of `name` start. A hash, because `name` may be as long as names get.
fn sibling_prefix(name: &OsStr) -> String {
    format!(".calibc-{}-", &blake3::hash(name.as_encoded_bytes()).to_hex()[..16])
}

/// Removes siblings whose writer is gone: a live one holds a lock. Whatever fails here, the next write tries again.
fn remove_stale(folder: &Path, siblings: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(siblings.as_bytes()) || !entry.file_type().is_ok_and(|t| t.is_file()) {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = File::open(&path)
            && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            // A writer that renamed it meanwhile took the name away; then there is nothing to remove.
            let _ = fs::remove_file(path);
        }
    }
}

fn unnamed_file(folder: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::from_raw_mode(MODE)) {
        Ok(fd) => Ok(Some(fd.into())),
        // What kernels and file systems without it say.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn fill(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_all()
}

/// Names the unnamed `file`. `false` where the system cannot (no `/proc`), or the name that it needs was taken away.
fn place(file: &File, target: &Path, folder: &Path, siblings: &str) -> io::Result<bool> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = |to: &Path| rustix::fs::linkat(CWD, &unnamed, CWD, to, AtFlags::SYMLINK_FOLLOW);
    match link(target) {
        Ok(()) => return Ok(true),
        Err(Errno::EXIST) => {}
        Err(Errno::NOENT | Errno::XDEV | Errno::PERM) => return Ok(false),
        Err(e) => return Err(e.into()),
    }
    lock(file);
    // Nothing links over an existing name, so: link beside it, rename over it.
    let sibling = builder(siblings).make_in(folder, |candidate| Ok(link(candidate)?))?;
    sibling.into_temp_path().persist(target)?;
    Ok(true)
}

/// A file with a sibling's name, locked; the name goes with the second part.
fn named_file(folder: &Path, siblings: &str) -> io::Result<(File, tempfile::TempPath)> {
    loop {
        let open = |path: &Path| OpenOptions::new().write(true).create_new(true).mode(MODE).open(path);
        let (file, path) = builder(siblings).make_in(folder, open)?.into_parts();
        lock(&file);
        // Between its creation and its lock it looked stale; another writer may have removed it.
        if path.exists() {
            return Ok((file, path));
        }
    }
}

fn builder(siblings: &str) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(siblings).suffix(".tmp").rand_bytes(12).permissions(Permissions::from_mode(MODE));
    builder
}

/// Tells other writers that this one lives. Where locks do not work theirs fail as well, and nothing is removed.
fn lock(file: &File) {
    // Waits, at most for another writer that is about to remove the file.
    let _ = rustix::fs::flock(file, FlockOperation::LockExclusive);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn cannot(_: &Path) -> io::Result<Option<File>> {
        Ok(None)
    }

    #[test]
    fn writes_and_replaces_with_and_without_unnamed_files() {
        for unnamed in [unnamed_file as Unnamed, cannot] {
            let folder = tempfile::tempdir().unwrap();
            let target = folder.path().join("plan.bundle");
            for bytes in [&b"one"[..], b"another", b""] {
                write_through(&target, bytes, unnamed).unwrap();
                assert_eq!(fs::read(&target).unwrap(), bytes);
                assert_eq!(names(folder.path()), ["plan.bundle"]);
            }
            let plain = folder.path().join("plain");
            fs::write(&plain, b"").unwrap();
            let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
            assert_eq!(mode(&target), mode(&plain));
        }
    }

    #[test]
    fn stale_siblings_go_and_live_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a".repeat(255));
        let prefix = sibling_prefix(target.file_name().unwrap());
        let (live, live_path) = named_file(folder.path(), &prefix).unwrap();
        fs::write(folder.path().join(format!("{prefix}deadbeef.tmp")), b"half").unwrap();
        let other = format!("{}x.tmp", sibling_prefix(OsStr::new("b")));
        fs::write(folder.path().join(&other), b"of another target").unwrap();
        write(&target, b"whole").unwrap();
        write(&target, b"again").unwrap();
        let mut want = ["a".repeat(255), other, live_path.file_name().unwrap().to_str().unwrap().to_owned()];
        want.sort();
        assert_eq!(names(folder.path()), want);
        drop((live, live_path));
        assert_eq!(fs::read(&target).unwrap(), b"again");
    }

    #[test]
    fn writers_do_not_disturb_each_other() {
        for unnamed in [unnamed_file as Unnamed, cannot] {
            let folder = tempfile::tempdir().unwrap();
            let target = folder.path().join("plan.bundle");
            std::thread::scope(|scope| {
                for n in 0..4_u8 {
                    let target = &target;
                    scope.spawn(move || {
                        for _ in 0..40 {
                            write_through(target, &vec![n; 3000], unnamed).unwrap();
                            let found = fs::read(target).unwrap();
                            assert_eq!(found, vec![found[0]; 3000]);
                        }
                    });
                }
            });
            assert_eq!(names(folder.path()), ["plan.bundle"]);
        }
    }

    #[test]
    fn links_are_followed_and_nothing_else_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("dir/real"), b"old").unwrap();
        std::os::unix::fs::symlink("dir/real", at("link")).unwrap();
        write(&at("link"), b"new").unwrap();
        assert!(at("link").symlink_metadata().unwrap().is_symlink());
        assert_eq!(fs::read(at("dir/real")).unwrap(), b"new");

        let cure_of = |path: &Path| match write(path, b"x") {
            Err(BundleError::Io { action: "write", path: at, cure, .. }) if at == path => cure,
            other => panic!("{}: {other:?}", path.display()),
        };
        assert_eq!(cure_of(&at("dir")), "name a file, not a folder");
        assert_eq!(cure_of(Path::new("/")), "name a file, not a folder");
        assert_eq!(cure_of(&at("missing/x")), "create the folder first");
        assert_eq!(cure_of(Path::new("")), "name a file, not a folder");
        assert_eq!(cure_of(Path::new("/dev/null")), "choose another place for the bundle");
        assert_eq!(cure_of(&at("dir/real/x")), "choose another place for the bundle");
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        assert_eq!(cure_of(&at("dangling")), "choose another place for the bundle");
        assert_eq!(names(folder.path()), ["dangling", "dir", "link"]);
    }
}

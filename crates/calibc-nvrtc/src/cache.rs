//! Compiled kernels on disk, under a digest of everything that decides their bytes.
//!
//! An entry is one file, `<key>.kernel`, little-endian:
//!
//! ```text
//! 0      8  magic "calibck1"
//! 8      4  length of the header
//! 12     .  header: JSON with key, symbol, arch, versions, resources, warnings, log, cubin length
//!        .  cubin
//! end-32 32 BLAKE3 of everything before
//! ```
//!
//! The key is BLAKE3 over the length-prefixed source, symbol, architecture, options, NVRTC version, size of the NVRTC file
//! (releases share version numbers) and calibc version. Entries are written to a temporary file beside them and renamed, so
//! that any number of processes may share the folder: a reader sees a whole entry or none. An entry that does not check out
//! is compiled anew and replaced. Sources that failed the build lie in `rejected/`.

use std::{
    fs,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::NvrtcError,
    find::Surroundings,
    nvrtc::{Compiled, Nvrtc, Request},
    report::Resources,
};

/// How the names of temporary files start, here and in `rejected/`.
pub(crate) const TEMP_PREFIX: &str = ".calibc-tmp-";
/// A temporary file this old belongs to a process that is gone.
const STALE: Duration = Duration::from_secs(60 * 60);
const MAGIC: &[u8; 8] = b"calibck1";
const EXTENSION: &str = "kernel";
const REJECTED: &str = "rejected";
const DIGEST_BYTES: usize = 32;

/// The compile cache: a folder. Cheap to make; nothing is written before the first compile.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// One kernel in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The digest it is kept under, 64 hex digits.
    pub key: String,
    /// Size of the file.
    pub bytes: u64,
    /// Name of the kernel.
    pub symbol: String,
    /// Architecture of the machine code.
    pub arch: String,
    /// Version of the NVRTC that made it.
    pub nvrtc: (u32, u32),
    /// Version of the calibc that asked for it.
    pub calibc_version: String,
}

/// What [`Cache::clear`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleared {
    /// Number of files.
    pub files: u64,
    /// Their size together.
    pub bytes: u64,
}

/// Header of an entry. The wire form: a new field needs a new magic.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    key: String,
    symbol: String,
    arch: String,
    nvrtc: (u32, u32),
    calibc_version: String,
    resources: Resources,
    warnings: Vec<String>,
    log: String,
    cubin_bytes: u64,
}

impl Cache {
    /// The cache in `dir`; without one in `CALIBC_CACHE_DIR`, else `XDG_CACHE_HOME/calibc`, else `~/.cache/calibc`. The folder
    /// need not exist. Temporary files that a killed process left behind are removed.
    ///
    /// # Errors
    /// [`NvrtcError::NoCacheDir`] when none of these is known, [`NvrtcError::Cache`] when the path is not a folder.
    pub fn open(dir: Option<&Path>) -> Result<Self, NvrtcError> {
        let dir = match dir {
            Some(dir) => dir.to_owned(),
            None => default_dir(&Surroundings::current()).ok_or(NvrtcError::NoCacheDir)?,
        };
        let cache = Self { dir };
        match fs::metadata(&cache.dir) {
            Ok(meta) if !meta.is_dir() => return Err(cache.error(io::Error::from(ErrorKind::NotADirectory))),
            Ok(_) => cache.remove_stale(SystemTime::now()),
            Err(_) => {}
        }
        Ok(cache)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every sound entry, by key. Damaged ones are left out, with a warning in the log.
    ///
    /// # Errors
    /// [`NvrtcError::Cache`] when the folder exists but cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>, NvrtcError> {
        let mut entries = Vec::new();
        for (path, bytes) in self.files(&self.dir)? {
            let Some(key) = entry_key(&path) else { continue };
            match read_entry(&path, key) {
                Ok(Some((header, _))) => entries.push(Entry {
                    key: header.key,
                    bytes,
                    symbol: header.symbol,
                    arch: header.arch,
                    nvrtc: header.nvrtc,
                    calibc_version: header.calibc_version,
                }),
                Ok(None) => {}
                Err(why) => tracing::warn!(path = %path.display(), why, "damaged cache entry"),
            }
        }
        entries.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    /// Removes every entry, saved source and temporary file; files that calibc did not make stay.
    ///
    /// # Errors
    /// [`NvrtcError::Cache`] when something cannot be listed or removed.
    pub fn clear(&self) -> Result<Cleared, NvrtcError> {
        let rejected = self.dir.join(REJECTED);
        let mut files = self.files(&self.dir)?;
        files.retain(|(path, _)| entry_key(path).is_some() || is_temp(path));
        files.extend(self.files(&rejected)?.into_iter().filter(|(path, _)| is_saved_source(path) || is_temp(path)));
        let mut cleared = Cleared::default();
        for (path, bytes) in files {
            match fs::remove_file(&path) {
                Ok(()) => cleared = Cleared { files: cleared.files + 1, bytes: cleared.bytes + bytes },
                // Another process was faster.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(source) => return Err(NvrtcError::Cache { path, source }),
            }
        }
        // Fails where something that is not ours lies in it, and then it should stay.
        let _ = fs::remove_dir(rejected);
        Ok(cleared)
    }

    /// The kernel from the cache, else compiled and put there. The flag says whether it came from the cache. A cache that
    /// cannot be read or written costs a warning in the log and nothing else.
    ///
    /// # Errors
    /// Those of [`Nvrtc::compile`]; failures are never cached.
    pub fn compile(
        &self,
        nvrtc: &Nvrtc,
        request: &Request<'_>,
        calibc_version: &str,
    ) -> Result<(Compiled, bool), NvrtcError> {
        let key = key(request, nvrtc.version(), nvrtc.file_bytes(), calibc_version);
        // Another calibc of this version may have been less strict.
        if let Some(compiled) = self.load(&key).filter(|compiled| compiled.passes(request.symbol)) {
            tracing::debug!(key, symbol = request.symbol, arch = request.arch, "kernel from the cache");
            return Ok((compiled, true));
        }
        let compiled = nvrtc.compile_saving(request, &self.dir.join(REJECTED))?;
        let header = Header {
            key,
            symbol: request.symbol.to_owned(),
            arch: request.arch.to_owned(),
            nvrtc: nvrtc.version(),
            calibc_version: calibc_version.to_owned(),
            resources: compiled.resources,
            warnings: compiled.warnings.clone(),
            log: compiled.log.clone(),
            cubin_bytes: compiled.cubin.len() as u64,
        };
        if let Err(error) = self.store(&header, &compiled.cubin) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot write to the compile cache");
        }
        Ok((compiled, false))
    }

    /// The sound entry under `key`, if there is one.
    fn load(&self, key: &str) -> Option<Compiled> {
        let path = self.entry_path(key);
        match read_entry(&path, key) {
            Ok(Some((header, cubin))) => {
                Some(Compiled { cubin, resources: header.resources, warnings: header.warnings, log: header.log })
            }
            Ok(None) => None,
            Err(why) => {
                tracing::warn!(path = %path.display(), why, "damaged cache entry; compiling again");
                None
            }
        }
    }

    /// Writes an entry so that every reader, now or after a crash, sees all of it or none of it. Not synced: an entry that
    /// the disk lost is found out by its digest.
    fn store(&self, header: &Header, cubin: &[u8]) -> io::Result<()> {
        create_private(&self.dir)?;
        let mut file = tempfile::Builder::new().prefix(TEMP_PREFIX).tempfile_in(&self.dir)?;
        file.write_all(&encode(header, cubin)?)?;
        file.persist(self.entry_path(&header.key))?;
        Ok(())
    }

    fn entry_path(&self, key: &str) -> PathBuf {
        self.dir.join(key).with_extension(EXTENSION)
    }

    /// The plain files of a folder with their sizes; none where the folder does not exist.
    fn files(&self, dir: &Path) -> Result<Vec<(PathBuf, u64)>, NvrtcError> {
        let listing = match fs::read_dir(dir) {
            Ok(listing) => listing,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.error(error)),
        };
        let mut files = Vec::new();
        for entry in listing {
            let entry = entry.map_err(|error| self.error(error))?;
            // Gone since the folder was read, or not a file.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_file() {
                files.push((entry.path(), meta.len()));
            }
        }
        Ok(files)
    }

    fn remove_stale(&self, now: SystemTime) {
        for dir in [self.dir.clone(), self.dir.join(REJECTED)] {
            for (path, _) in self.files(&dir).unwrap_or_default() {
                let modified = fs::metadata(&path).and_then(|meta| meta.modified());
                let age = modified.ok().and_then(|time| now.duration_since(time).ok());
                if is_temp(&path)
                    && age.is_some_and(|age| age > STALE)
                    && let Err(error) = fs::remove_file(&path)
                {
                    tracing::debug!(path = %path.display(), %error, "cannot remove a stale temporary file");
                }
            }
        }
    }

    fn error(&self, source: io::Error) -> NvrtcError {
        NvrtcError::Cache { path: self.dir.clone(), source }
    }
}

fn default_dir(around: &Surroundings<'_>) -> Option<PathBuf> {
    // A relative XDG_CACHE_HOME is to be ignored, says its specification.
    let xdg = || around.path("XDG_CACHE_HOME").filter(|path| path.is_absolute()).map(|path| path.join("calibc"));
    let home = || around.path("HOME").map(|home| home.join(".cache/calibc"));
    around.path("CALIBC_CACHE_DIR").or_else(xdg).or_else(home)
}

/// Creates a folder for this user alone: what lies in it is run.
fn create_private(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

/// Digest of everything that decides the bytes of a cubin. Each part is preceded by its length, so that no two lists of parts
/// run together to the same bytes.
fn key(request: &Request<'_>, version: (u32, u32), nvrtc_bytes: u64, calibc_version: &str) -> String {
    let nvrtc = format!("{}.{} {nvrtc_bytes}", version.0, version.1);
    let options = request.options();
    let fixed = ["calibc kernel cache", calibc_version, &nvrtc, request.arch, request.symbol, request.source];
    let mut hasher = blake3::Hasher::new();
    for part in fixed.into_iter().chain(options.iter().map(String::as_str)) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

fn encode(header: &Header, cubin: &[u8]) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(header)?;
    let json_bytes = u32::try_from(json.len()).map_err(|_| io::Error::from(ErrorKind::FileTooLarge))?;
    let mut bytes = Vec::with_capacity(MAGIC.len() + 4 + json.len() + cubin.len() + DIGEST_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&json_bytes.to_le_bytes());
    bytes.extend_from_slice(&json);
    bytes.extend_from_slice(cubin);
    let digest = blake3::hash(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    Ok(bytes)
}

/// Takes an entry apart; the error says what is wrong with it.
fn decode(bytes: &[u8], key: &str) -> Result<(Header, Vec<u8>), &'static str> {
    let (body, digest) = bytes.split_last_chunk::<DIGEST_BYTES>().ok_or("shorter than a digest")?;
    if blake3::hash(body).as_bytes() != digest {
        return Err("its digest is wrong");
    }
    let rest = body.strip_prefix(MAGIC).ok_or("not an entry of this format")?;
    let (len, rest) = rest.split_first_chunk::<4>().ok_or("no header")?;
    let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| "header too long")?;
    let (json, cubin) = rest.split_at_checked(len).ok_or("header runs past the end")?;
    let header: Header = serde_json::from_slice(json).map_err(|_| "its header does not parse")?;
    if header.key != key {
        return Err("it was stored under another key");
    }
    if header.cubin_bytes != cubin.len() as u64 {
        return Err("its cubin has another length");
    }
    Ok((header, cubin.to_vec()))
}

/// Reads an entry: `None` where there is none, the error where it is damaged.
fn read_entry(path: &Path, key: &str) -> Result<Option<(Header, Vec<u8>)>, String> {
    match fs::read(path) {
        Ok(bytes) => decode(&bytes, key).map(Some).map_err(str::to_owned),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// The key in the name of an entry's file.
fn entry_key(path: &Path) -> Option<&str> {
    (path.extension()? == EXTENSION).then_some(path.file_stem()?.to_str()?).filter(|stem| is_digest(stem))
}

fn is_saved_source(path: &Path) -> bool {
    path.extension().is_some_and(|ext| ext == "cu")
        && path.file_stem().and_then(|stem| stem.to_str()).is_some_and(is_digest)
}

fn is_digest(text: &str) -> bool {
    text.len() == 2 * DIGEST_BYTES && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn is_temp(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(TEMP_PREFIX))
}

#[cfg(test)]
mod tests {
    use std::{env, ffi::OsString, process::Command, thread};

    use super::*;

    const CHILD_DIR: &str = "CALIBC_TEST_CACHE_CHILD";
    const REQUEST: Request<'_> = Request { source: "text", symbol: "k", arch: "sm_90a" };

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(Some(&dir.path().join("cache"))).expect("a folder that does not exist yet is fine");
        (dir, cache)
    }

    fn header(key: &str, cubin: &[u8]) -> Header {
        Header {
            key: key.to_owned(),
            symbol: "k".into(),
            arch: "sm_90a".into(),
            nvrtc: (13, 5),
            calibc_version: "0.1.0".into(),
            resources: Resources { registers: 7, ..Resources::default() },
            warnings: vec!["k.cu(1): warning #1: w".into()],
            log: "log\n".into(),
            cubin_bytes: cubin.len() as u64,
        }
    }

    fn some_key(byte: u8) -> String {
        blake3::hash(&[byte]).to_hex().to_string()
    }

    #[test]
    fn an_entry_comes_back_whole() {
        let (_dir, cache) = cache();
        let key = some_key(1);
        assert_eq!(cache.load(&key), None);
        cache.store(&header(&key, b"cubin"), b"cubin").expect("store");
        let got = cache.load(&key).expect("stored just now");
        assert_eq!((got.cubin.as_slice(), got.resources.registers), (&b"cubin"[..], 7));
        assert_eq!((got.warnings.len(), got.log.as_str()), (1, "log\n"));
        let entries = cache.entries().expect("entries");
        assert_eq!(entries.len(), 1);
        let size = fs::metadata(cache.entry_path(&key)).expect("stored").len();
        assert_eq!((&entries[0].key, entries[0].bytes), (&key, size));
        assert_eq!((entries[0].symbol.as_str(), entries[0].arch.as_str(), entries[0].nvrtc), ("k", "sm_90a", (13, 5)));
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_detected() {
        let (_dir, cache) = cache();
        let key = some_key(2);
        cache.store(&header(&key, b"some machine code"), b"some machine code").expect("store");
        let whole = fs::read(cache.entry_path(&key)).expect("stored");
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x40;
            assert!(decode(&bad, &key).is_err(), "flip at {at}");
            assert!(decode(&whole[..at], &key).is_err(), "cut at {at}");
        }
        assert!(decode(&whole, &some_key(3)).is_err(), "an entry renamed to another key");
        assert!(decode(&whole, &key).is_ok());
        fs::write(cache.entry_path(&key), &whole[1..]).expect("write");
        assert_eq!(cache.load(&key), None);
        assert_eq!(cache.entries().expect("entries"), []);
    }

    #[test]
    fn the_key_depends_on_every_part_and_on_where_parts_end() {
        let base = key(&REQUEST, (13, 5), 100, "0.1.0");
        let others = [
            key(&Request { source: "text ", ..REQUEST }, (13, 5), 100, "0.1.0"),
            key(&Request { symbol: "kt", source: "ext", ..REQUEST }, (13, 5), 100, "0.1.0"),
            key(&Request { arch: "sm_90", ..REQUEST }, (13, 5), 100, "0.1.0"),
            key(&REQUEST, (13, 4), 100, "0.1.0"),
            key(&REQUEST, (1, 35), 100, "0.1.0"),
            key(&REQUEST, (13, 5), 101, "0.1.0"),
            key(&REQUEST, (13, 5), 100, "0.1.1"),
        ];
        assert!(others.iter().all(|other| *other != base));
        assert_eq!(base, key(&REQUEST, (13, 5), 100, "0.1.0"));
        assert!(is_digest(&base));
    }

    #[test]
    fn clear_removes_what_calibc_made_and_nothing_else() {
        let (_dir, cache) = cache();
        assert_eq!(cache.clear().expect("nothing there"), Cleared::default());
        cache.store(&header(&some_key(4), b"c"), b"c").expect("store");
        let rejected = cache.dir().join(REJECTED);
        fs::create_dir(&rejected).expect("folder");
        let foreign = [cache.dir().join("notes.txt"), cache.dir().join("x.kernel"), rejected.join("mine.cu")];
        let ours = [rejected.join(format!("{}.cu", some_key(5))), cache.dir().join(format!("{TEMP_PREFIX}x"))];
        for path in foreign.iter().chain(&ours) {
            fs::write(path, "1234").expect("write");
        }
        let entry_bytes = cache.entries().expect("entries")[0].bytes;
        assert_eq!(cache.clear().expect("clear"), Cleared { files: 3, bytes: entry_bytes + 8 });
        assert!(foreign.iter().all(|path| path.is_file()));
        assert!(!ours.iter().any(|path| path.exists()));
        assert_eq!(cache.entries().expect("entries"), []);
    }

    #[test]
    fn stale_temporary_files_go_and_fresh_ones_stay() {
        let (_dir, cache) = cache();
        fs::create_dir_all(cache.dir().join(REJECTED)).expect("folders");
        let temps = [cache.dir(), &cache.dir().join(REJECTED)].map(|dir| dir.join(format!("{TEMP_PREFIX}abc")));
        for path in &temps {
            fs::write(path, "half an entry").expect("write");
        }
        Cache::open(Some(cache.dir())).expect("open");
        assert!(temps.iter().all(|path| path.is_file()), "a process may be writing these");
        cache.remove_stale(SystemTime::now() + STALE + Duration::from_secs(60));
        assert!(!temps.iter().any(|path| path.exists()));
    }

    #[test]
    fn the_default_folder_follows_the_environment() {
        let at = |vars: &[(&str, &str)]| {
            let var = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
            default_dir(&Surroundings { var: &var, executable: None, python_packages: Vec::new() })
        };
        assert_eq!(at(&[]), None);
        assert_eq!(at(&[("HOME", "/h")]), Some("/h/.cache/calibc".into()));
        assert_eq!(at(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Some("/x/calibc".into()));
        assert_eq!(at(&[("HOME", "/h"), ("XDG_CACHE_HOME", "relative")]), Some("/h/.cache/calibc".into()));
        assert_eq!(at(&[("CALIBC_CACHE_DIR", "/c"), ("XDG_CACHE_HOME", "/x")]), Some("/c".into()));
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_an_error() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        assert!(matches!(Cache::open(Some(file.path())), Err(NvrtcError::Cache { .. })));
    }

    /// What each thread of each process does: write one entry again and again, and never read anything but the whole of it.
    fn hammer(dir: &Path) {
        let cache = Cache::open(Some(dir)).expect("open");
        let (key, cubin) = (some_key(6), vec![0xa5_u8; 20_000]);
        for _ in 0..50 {
            cache.store(&header(&key, &cubin), &cubin).expect("store");
            let bytes = fs::read(cache.entry_path(&key)).expect("there since the first store");
            assert!(decode(&bytes, &key).is_ok(), "a torn entry");
        }
    }

    /// The body of the processes below; nothing when run by hand.
    #[test]
    fn hammering_child() {
        if let Some(dir) = env::var_os(CHILD_DIR) {
            hammer(Path::new(&dir));
        }
    }

    #[test]
    fn processes_and_threads_may_hammer_one_key() {
        let (_dir, cache) = cache();
        let test = env::current_exe().expect("the test has an executable");
        let spawn = || {
            let mut command = Command::new(&test);
            command.args(["--exact", "cache::tests::hammering_child"]).env(CHILD_DIR, cache.dir());
            command.stdout(std::process::Stdio::piped()).spawn().expect("the test can run itself")
        };
        let children: Vec<_> = (0..4).map(|_| spawn()).collect();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| hammer(cache.dir()));
            }
        });
        for child in children {
            let output = child.wait_with_output().expect("the child ends");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
        }
        let left: Vec<_> = fs::read_dir(cache.dir()).expect("folder").filter_map(Result::ok).collect();
        assert_eq!(left.len(), 1, "one entry and no litter: {left:?}");
    }
}

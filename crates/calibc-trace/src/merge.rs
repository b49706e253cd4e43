//! Puts traces together: parts of one capture, or captures of different days.
//!
//! The result does not depend on the order of the inputs: prompts are sorted by id, shards by prompt, step and branch. Shards are
//! hard-linked where the file system can, and otherwise copied, their digests checked on the way.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use calibc_ir::StepId;

use crate::error::TraceError;
use crate::folder::Folder;
use crate::manifest::{self, FileEntry, Manifest, Prompt, Shard};
use crate::session::{self, PARTS};
use crate::space;
use crate::writer;

/// A manifest of a trace that may consist of held-out prompts alone.
pub(crate) fn read(dir: &Path) -> Result<Manifest, TraceError> {
    let (manifest, problems) = Manifest::parse(&manifest::read_bytes(&Folder::open(dir)?)?);
    let unfit = |problem: &TraceError| !matches!(problem, TraceError::NoCalibrationPrompt);
    match (manifest, problems.into_iter().find(unfit)) {
        (Some(manifest), None) => Ok(manifest),
        (_, Some(problem)) => Err(problem),
        (None, None) => Err(TraceError::NotATrace { dir: dir.to_owned() }),
    }
}

/// Checks that two traces are of one model, grid and sampler, and store the same things.
pub(crate) fn agree((first, a): (&Path, &Manifest), (second, b): (&Path, &Manifest)) -> Result<(), TraceError> {
    // Every field that is not about single prompts: a new one does not compile until it is decided on.
    let fields = |m: &Manifest| -> [(&'static str, String); 6] {
        let Manifest {
            model,
            geometry,
            sigmas,
            branches,
            encoding,
            anchor_counts,
            prompts: _,
            shards: _,
            sensitivity: _,
        } = m;
        let kv = geometry.kv_tokens;
        [
            ("model", format!("{} ({} layers x {} heads x {})", model.name, model.layers, model.heads, model.head_dim)),
            ("geometry", format!("{geometry}, layout {:?}, keys {kv:?}", geometry.layout)),
            ("sampler steps", format!("{} with sigmas {sigmas:?}", sigmas.len())),
            ("branches", format!("{branches:?}")),
            ("energy encoding", encoding.to_string()),
            ("anchor counts", format!("{anchor_counts:?}")),
        ]
    };
    for ((field, left), (_, right)) in fields(a).into_iter().zip(fields(b)) {
        if left != right {
            let (first, second) = (first.to_owned(), second.to_owned());
            return Err(TraceError::Differs { first, second, field, left, right });
        }
    }
    Ok(())
}

/// A prompt of one of the inputs.
struct Source<'a> {
    folder: &'a Path,
    prompt: Prompt,
    /// By step and branch.
    shards: BTreeMap<(StepId, usize), FileEntry>,
}

/// One trace made of several, before any file is touched.
struct Plan<'a> {
    manifest: Manifest,
    /// By shard of the manifest: the folder it comes from, and its path there.
    files: Vec<(&'a Path, String)>,
    sensitivity: Option<(&'a Path, String)>,
}

fn plan<'a>(inputs: &'a [(PathBuf, Manifest)]) -> Result<Plan<'a>, TraceError> {
    let Some((first, head)) = inputs.first() else {
        return Err(TraceError::NothingToMerge { dir: PathBuf::new() });
    };
    let mut prompts: BTreeMap<String, Source<'a>> = BTreeMap::new();
    let mut sensitivity: Option<(&Path, &FileEntry)> = None;
    for (folder, manifest) in inputs {
        agree((first, head), (folder, manifest))?;
        for (index, prompt) in manifest.prompts.iter().enumerate() {
            let own = manifest.shards.iter().filter(|shard| shard.prompt == index);
            let shards = own.map(|shard| ((shard.step, shard.branch), shard.file.clone())).collect();
            let source = Source { folder, prompt: prompt.clone(), shards };
            match prompts.get(&prompt.id) {
                None => _ = prompts.insert(prompt.id.clone(), source),
                // The same trace twice, or a merge that is done again.
                Some(there) if same(there, &source) => {}
                Some(there) => {
                    let (first, second) = (there.folder.to_owned(), folder.clone());
                    return Err(TraceError::PromptConflict { prompt: prompt.id.clone(), first, second });
                }
            }
        }
        match (&manifest.sensitivity, sensitivity) {
            (None, _) => {}
            (Some(file), None) => sensitivity = Some((folder, file)),
            (Some(file), Some((_, there))) if file.digest == there.digest => {}
            (Some(file), Some((first, there))) => {
                let (first, second) = (first.to_owned(), folder.clone());
                let (left, right) = (there.digest.to_string(), file.digest.to_string());
                return Err(TraceError::Differs { first, second, field: "sensitivity", left, right });
            }
        }
    }
    if prompts.is_empty() {
        return Err(TraceError::NothingToMerge { dir: first.clone() });
    }
    let mut merged = Manifest { prompts: Vec::new(), shards: Vec::new(), sensitivity: None, ..head.clone() };
    let mut files = Vec::new();
    for (index, (id, source)) in prompts.into_iter().enumerate() {
        for ((step, branch), file) in source.shards {
            let path = format!("{id}/s{:03}.{}.safetensors", step.0, merged.branches[branch]);
            files.push((source.folder, file.path.clone()));
            merged.shards.push(Shard { file: FileEntry { path, ..file }, prompt: index, step, branch });
        }
        merged.prompts.push(source.prompt);
    }
    let sensitivity = sensitivity.map(|(folder, file)| {
        merged.sensitivity = Some(FileEntry { path: writer::SENSITIVITY.into(), ..file.clone() });
        (folder, file.path.clone())
    });
    Ok(Plan { manifest: merged, files, sensitivity })
}

fn same(a: &Source<'_>, b: &Source<'_>) -> bool {
    let digests =
        |source: &Source<'_>| -> Vec<_> { source.shards.iter().map(|(at, file)| (*at, file.digest)).collect() };
    a.prompt == b.prompt && digests(a) == digests(b)
}

impl Plan<'_> {
    /// Puts every file into `dir`, then the manifest. Files that are there already are those of an earlier attempt.
    fn carry_out(&self, dir: &Path) -> Result<(), TraceError> {
        let shards = self.manifest.shards.iter().map(|shard| &shard.file).zip(&self.files);
        let sensitivity = self.manifest.sensitivity.iter().zip(&self.sensitivity);
        let all: Vec<_> = shards.chain(sensitivity).collect();
        let mut left: u64 = all.iter().filter_map(|(file, _)| file.bytes).sum();
        let mut copying = false;
        for (file, (folder, source)) in all {
            let from = Folder::open(folder)?.resolve(source)?;
            let to = dir.join(&file.path);
            if *folder == dir && *source == file.path {
                left -= file.bytes.unwrap_or(0);
                continue;
            }
            let found = from.metadata().map_err(TraceError::io("read", &from))?.len();
            if let Some(expected) = file.bytes.filter(|&bytes| bytes != found) {
                return Err(TraceError::SizeMismatch { file: source.clone(), expected, found });
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).map_err(TraceError::io("create", parent))?;
            }
            if !link(&from, &to) {
                if !copying {
                    space::check(dir, left)?;
                    copying = true;
                }
                copy(&from, &to, source, file)?;
            }
            left -= file.bytes.unwrap_or(0);
        }
        writer::commit(dir, &self.manifest)
    }
}

impl Plan<'_> {
    /// Makes the whole trace in `staging`, where a dead merge may have left something.
    fn stage(&self, staging: &Path) -> Result<(), TraceError> {
        if staging.symlink_metadata().is_ok() {
            fs::remove_dir_all(staging).map_err(TraceError::io("remove", staging))?;
        }
        fs::create_dir(staging).map_err(TraceError::io("create", staging))?;
        self.carry_out(staging)
    }
}

/// Hard-links a file into its place, replacing what is there; whether that worked.
fn link(from: &Path, to: &Path) -> bool {
    match fs::hard_link(from, to) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(to).is_ok() && fs::hard_link(from, to).is_ok()
        }
        Err(_) => false,
    }
}

fn copy(from: &Path, to: &Path, name: &str, file: &FileEntry) -> Result<(), TraceError> {
    let folder = to.parent().unwrap_or(to);
    let mut temp = writer::temporary(folder)?;
    let mut source = File::open(from).map_err(TraceError::io("open", from))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = source.read(&mut buffer).map_err(TraceError::io("read", from))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        temp.write_all(&buffer[..count]).map_err(TraceError::io("write", temp.path()))?;
    }
    let found = hasher.finalize();
    if found != file.digest {
        let (expected, found) = (file.digest.to_string(), found.to_string());
        return Err(TraceError::DigestMismatch { file: name.into(), expected, found });
    }
    writer::persist(temp, to)
}

/// Makes `out`, a new folder, the trace of everything in `inputs`. It appears whole, or not at all; what a merge that was killed
/// left beside it, under names with a dot, the next one to the same place takes away.
///
/// # Errors
/// If the inputs do not belong together or are no traces, `out` exists, or the file system refuses.
pub fn merge(out: &Path, inputs: &[PathBuf]) -> Result<Manifest, TraceError> {
    if inputs.is_empty() {
        return Err(TraceError::NothingToMerge { dir: out.to_owned() });
    }
    if is_taken(out) {
        return Err(TraceError::OutputExists { dir: out.to_owned() });
    }
    let read = inputs.iter().map(|dir| Ok((dir.clone(), read(dir)?))).collect::<Result<Vec<_>, TraceError>>()?;
    let plan = plan(&read)?;
    let absolute = std::path::absolute(out).map_err(TraceError::io("find", out))?;
    let parent = absolute.parent().unwrap_or(&absolute);
    fs::create_dir_all(parent).map_err(TraceError::io("create", parent))?;
    let name = absolute.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let staging = parent.join(format!(".{name}.calibc-merge"));
    let lock = parent.join(format!(".{name}.calibc-merge.lock"));
    let held = lock_beside(&lock)?.ok_or_else(|| TraceError::Locked { dir: out.to_owned() })?;
    if is_taken(out) {
        return Err(TraceError::OutputExists { dir: out.to_owned() });
    }
    let made =
        plan.stage(&staging).and_then(|()| fs::rename(&staging, &absolute).map_err(TraceError::io("create", out)));
    if made.is_err() {
        // The error that matters is the first.
        let _ = fs::remove_dir_all(&staging);
    }
    fs::remove_file(&lock).map_err(TraceError::io("remove", &lock))?;
    drop(held);
    made?;
    Ok(plan.manifest)
}

/// Whether something is at `out` already. An empty folder is as good as none: a rename replaces it.
fn is_taken(out: &Path) -> bool {
    match fs::read_dir(out) {
        Ok(mut list) => list.next().is_some(),
        Err(e) => e.kind() != io::ErrorKind::NotFound,
    }
}

/// Takes a lock whose file is removed by whoever holds it; `None` where another process does.
fn lock_beside(path: &Path) -> Result<Option<File>, TraceError> {
    loop {
        let file = File::options().create(true).append(true).open(path).map_err(TraceError::io("open", path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => return Err(TraceError::io("lock", path)(e)),
        }
        // The last holder may have removed the file between the two calls.
        let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        let own = file.metadata().map_err(TraceError::io("read", path))?;
        if path.metadata().is_ok_and(|there| same(&there, &own)) {
            return Ok(Some(file));
        }
    }
}

/// Makes one trace of `dir` and the parts below it, and removes the parts. After a kill it can be done again: the parts go last.
///
/// # Errors
/// If a part is being written, the parts do not belong together, or the file system refuses.
pub fn merge_parts(dir: &Path) -> Result<Manifest, TraceError> {
    let folder = dir.join(PARTS);
    let parts = if folder.is_dir() { session::entries(&folder)? } else { Vec::new() };
    let _main = session::lock(dir)?;
    let locks = parts.iter().map(|part| session::lock(part)).collect::<Result<Vec<_>, _>>()?;
    let mut read = Vec::new();
    for dir in std::iter::once(dir).chain(parts.iter().map(PathBuf::as_path)) {
        if let Some(manifest) = session::manifest_of(dir)? {
            read.push((dir.to_owned(), manifest));
        }
    }
    if read.is_empty() {
        return Err(TraceError::NothingToMerge { dir: dir.to_owned() });
    }
    let plan = plan(&read)?;
    session::sweep(dir, read.iter().find(|(folder, _)| folder == dir).map(|(_, manifest)| manifest))?;
    plan.carry_out(dir)?;
    for part in &parts {
        fs::remove_dir_all(part).map_err(TraceError::io("remove", part))?;
    }
    drop(locks);
    // Another process may have opened a part meanwhile.
    let _ = fs::remove_dir(&folder);
    Ok(plan.manifest)
}

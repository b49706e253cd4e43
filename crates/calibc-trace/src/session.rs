//! Captures into a folder, prompt by prompt: what is committed survives a kill, what is half-written is discarded.
//!
//! ```text
//! traces/manifest.json, traces/<prompt>/...                      a trace, as one process writes it
//! traces/.parts/<part>/manifest.json, .../<prompt>/...           parts: a trace each, written by processes side by side
//! traces/.parts/<part>/.calibc-lock, traces/.calibc-lock         held by who writes there; the system releases it when that dies
//! ```
//!
//! A prompt is listed in the manifest when all its shards are there, and the manifest is replaced in one step: at any moment the
//! folder is a whole trace, or none yet. Opening it again removes what a dead process left: unfinished files and the shards of
//! prompts that never were committed. [`crate::merge::merge_parts`] makes one trace of the parts.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use calibc_ir::StepId;

use crate::error::TraceError;
use crate::manifest::{self, MANIFEST, Manifest, Prompt};
use crate::merge::{self, agree};
use crate::sensitivity::Sensitivity;
use crate::writer::{Extras, OpenShard, TEMPORARY, TraceSpec, TraceWriter};

/// The folder of parts; a prompt cannot have this name.
pub(crate) const PARTS: &str = ".parts";
/// The file whose lock says that somebody writes.
pub(crate) const LOCK: &str = ".calibc-lock";

/// A folder being captured into.
#[derive(Debug)]
pub struct Session {
    writer: TraceWriter,
    /// The prompt being captured.
    current: Option<String>,
    /// Prompts of the whole trace that are committed, those of this part included.
    done: Vec<String>,
    _lock: File,
}

impl Session {
    /// Starts or continues the capture in `dir`; with `part`, one part of it, for a process of several. What is there must agree
    /// with `spec`.
    ///
    /// # Errors
    /// If another process writes there, a trace is there that differs, or the folder cannot be used.
    pub fn open(dir: &Path, spec: TraceSpec, part: Option<&str>) -> Result<Self, TraceError> {
        let wanted = spec.clone().manifest()?;
        let own = match part {
            None => dir.to_owned(),
            Some(name) if manifest::is_name(name) => dir.join(PARTS).join(name),
            Some(name) => return Err(TraceError::BadPart { name: name.into() }),
        };
        fs::create_dir_all(&own).map_err(TraceError::io("create", &own))?;
        let lock = lock(&own)?;
        let mut done = Vec::new();
        if part.is_some()
            && let Some(main) = manifest_of(dir)?
        {
            agree((dir, &main), (&own, &wanted))?;
            done.extend(main.prompts.into_iter().map(|prompt| prompt.id));
        }
        let writer = match manifest_of(&own)? {
            None => {
                sweep(&own, None)?;
                TraceWriter::create(&own, spec)?
            }
            Some(found) => {
                agree((&own, &found), (Path::new("this capture"), &wanted))?;
                sweep(&own, Some(&found))?;
                done.extend(found.prompts.iter().map(|prompt| prompt.id.clone()));
                TraceWriter::resume(&own, found)
            }
        };
        Ok(Self { writer, current: None, done, _lock: lock })
    }

    /// What is being written.
    pub fn manifest(&self) -> &Manifest {
        self.writer.manifest()
    }

    /// Ids of the prompts that are captured already, of the whole trace as it was when the session was opened and of this session.
    pub fn prompts(&self) -> &[String] {
        &self.done
    }

    /// Starts a prompt.
    ///
    /// # Errors
    /// If another is not ended, or its id is taken or cannot name a folder.
    pub fn begin_prompt(&mut self, prompt: Prompt) -> Result<(), TraceError> {
        if self.current.is_some() {
            return Err(TraceError::OutOfTurn { problem: "the last prompt is not ended yet; end or discard it first" });
        }
        if self.done.contains(&prompt.id) {
            return Err(TraceError::DuplicateName { field: "prompts", name: prompt.id });
        }
        let id = prompt.id.clone();
        self.writer.add_prompt(prompt)?;
        self.current = Some(id);
        Ok(())
    }

    /// Starts the shard of the current prompt at a step of a branch; several may be open.
    ///
    /// # Errors
    /// As [`TraceWriter::begin`], or if no prompt was begun.
    pub fn begin_shard(&self, step: StepId, branch: &str, extras: Extras) -> Result<OpenShard, TraceError> {
        self.writer.begin(self.current()?, step, branch, extras)
    }

    /// As [`TraceWriter::finish`], for a shard of the current prompt.
    ///
    /// # Errors
    /// As there, or if the shard's prompt is no longer the current one.
    pub fn finish_shard(&mut self, shard: OpenShard) -> Result<(), TraceError> {
        if shard.prompt_id() != self.current()? {
            return Err(TraceError::OutOfTurn {
                problem: "the shard's prompt was ended or discarded; begin the shard again",
            });
        }
        self.writer.finish(shard)
    }

    /// Commits the current prompt: from here on it survives.
    ///
    /// # Errors
    /// If its steps are not those of the other prompts, or writing fails; the prompt is still the current one then.
    pub fn end_prompt(&mut self) -> Result<(), TraceError> {
        let id = self.current()?.to_owned();
        self.writer.commit()?;
        self.done.push(id);
        self.current = None;
        Ok(())
    }

    /// Removes what was written of the current prompt.
    ///
    /// # Errors
    /// If no prompt was begun, or a file cannot be removed.
    pub fn discard_prompt(&mut self) -> Result<(), TraceError> {
        let id = self.current()?.to_owned();
        self.writer.discard_prompt(&id)?;
        self.current = None;
        Ok(())
    }

    fn current(&self) -> Result<&str, TraceError> {
        self.current.as_deref().ok_or(TraceError::OutOfTurn { problem: "no prompt was begun; begin one first" })
    }
}

/// Gives the trace in `dir` its sensitivities, in place of older ones. The folder is a whole trace at any moment: one killed half
/// way has the old ones, none, or the new ones.
///
/// # Errors
/// If there is no trace, another process writes there, values or their numbers are wrong (the trace is as it was then), or the
/// file system refuses.
pub fn set_sensitivity(dir: &Path, sensitivity: &Sensitivity) -> Result<(), TraceError> {
    // A folder that is no trace gets no lock either.
    let none = || TraceError::NotATrace { dir: dir.to_owned() };
    manifest_of(dir)?.ok_or_else(none)?;
    let _lock = lock(dir)?;
    let mut writer = TraceWriter::resume(dir, manifest_of(dir)?.ok_or_else(none)?);
    sensitivity.render(writer.manifest())?;
    if writer.manifest().sensitivity.is_some() {
        // The file is replaced before its digest can be: it must not be listed in between.
        writer.unlist_sensitivity();
        writer.commit()?;
    }
    writer.set_sensitivity(sensitivity)?;
    writer.commit()
}

/// The manifest in `dir`, if there is one.
pub(crate) fn manifest_of(dir: &Path) -> Result<Option<Manifest>, TraceError> {
    match dir.join(MANIFEST).symlink_metadata() {
        Ok(_) => merge::read(dir).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(TraceError::io("read", dir.join(MANIFEST))(e)),
    }
}

/// Takes the lock of `dir`; it is released when the file is dropped or the process ends.
pub(crate) fn lock(dir: &Path) -> Result<File, TraceError> {
    let path = dir.join(LOCK);
    let file = File::options().create(true).append(true).open(&path).map_err(TraceError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TraceError::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(e)) => Err(TraceError::io("lock", path)(e)),
    }
}

/// Removes what a dead process left in a folder whose lock is held: unfinished files, and shards that no manifest lists.
pub(crate) fn sweep(dir: &Path, manifest: Option<&Manifest>) -> Result<(), TraceError> {
    let listed = |prompt: &str, name: &str| {
        let path = format!("{prompt}/{name}");
        manifest.is_some_and(|m| m.shards.iter().any(|shard| shard.file.path == path))
    };
    for entry in entries(dir)? {
        let name = name_of(&entry);
        if is_unfinished(&name) {
            fs::remove_file(&entry).map_err(TraceError::io("remove", &entry))?;
        } else if manifest::is_name(&name) && entry.symlink_metadata().is_ok_and(|m| m.is_dir()) {
            for file in entries(&entry)? {
                let leaf = name_of(&file);
                if is_unfinished(&leaf) || (is_shard(&leaf) && !listed(&name, &leaf)) {
                    fs::remove_file(&file).map_err(TraceError::io("remove", &file))?;
                }
            }
            // A folder that holds anything else stays.
            let _ = fs::remove_dir(&entry);
        }
    }
    Ok(())
}

fn is_unfinished(name: &str) -> bool {
    name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1)
}

/// Whether a file has the name of a shard: `s<step>.<branch>.safetensors`.
fn is_shard(name: &str) -> bool {
    let step = name.strip_prefix('s').and_then(|rest| rest.split_once('.'));
    let digits = |step: &str| step.len() >= 3 && step.bytes().all(|byte| byte.is_ascii_digit());
    step.is_some_and(|(step, rest)| digits(step) && rest.ends_with(".safetensors"))
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What is in a folder, in the order of names.
pub(crate) fn entries(dir: &Path) -> Result<Vec<PathBuf>, TraceError> {
    let list = fs::read_dir(dir).map_err(TraceError::io("list", dir))?;
    let mut paths = (list.map(|entry| entry.map(|entry| entry.path())))
        .collect::<Result<Vec<_>, _>>()
        .map_err(TraceError::io("list", dir))?;
    paths.sort_unstable();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_our_own_are_swept() {
        assert!(is_shard("s003.cond.safetensors") && is_shard("s1234.a.b.safetensors"));
        assert!(
            !["s03.cond.safetensors", "x003.c.safetensors", "s003.safetensors.bak", "notes.txt", "s003"]
                .iter()
                .any(|n| is_shard(n))
        );
        assert!(is_unfinished(".calibc-Xy12.tmp") && !is_unfinished(".calibc-lock"));
    }
}

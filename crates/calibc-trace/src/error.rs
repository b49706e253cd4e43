//! Everything that can be wrong with a trace.

use std::io;
use std::path::PathBuf;

use calibc_ir::{GeometryError, Site, StepId};
use thiserror::Error;

/// What is wrong with a trace, where, and what to do about it. One variant per kind of problem.
///
/// `field` is a path into `manifest.json` (`shards[3].bytes`); `file` is a path inside the trace folder, as the manifest
/// spells it; `at` is a position inside a tensor.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TraceError {
    // --- The folder and its manifest.
    /// The folder holds no `manifest.json`.
    #[error("{} is not a trace: it has no manifest.json; give the folder that a capture wrote", dir.display())]
    NotATrace {
        /// The folder.
        dir: PathBuf,
    },
    /// The manifest is larger than any real one.
    #[error("manifest.json has {bytes} bytes, more than the {limit} a manifest may have; is it the right file?")]
    ManifestTooLarge {
        /// Its size.
        bytes: u64,
        /// The most accepted.
        limit: u64,
    },
    /// The manifest is not JSON.
    #[error("manifest.json is not valid JSON: {reason}; restore it or capture again")]
    Json {
        /// The parser's words, with line and column.
        reason: String,
    },
    /// Some other JSON file.
    #[error("manifest.json says format `{found}`, not `calibc-trace`; this is not a calibration trace")]
    WrongFormat {
        /// What it says.
        found: String,
    },
    /// A newer or unknown format version.
    #[error("manifest.json says trace version {found}, and this build reads version 1; use a matching calibc")]
    UnsupportedVersion {
        /// What it says.
        found: u64,
    },
    /// A field the format does not have.
    #[error("manifest.json: unknown field `{field}`; remove it or correct its spelling")]
    UnknownField {
        /// The field.
        field: String,
    },
    /// A field that occurs twice.
    #[error("manifest.json: field `{field}` is given more than once; keep one")]
    DuplicateField {
        /// The field.
        field: String,
    },
    /// A field that must be there.
    #[error("manifest.json: field `{field}` is missing; add it")]
    MissingField {
        /// The field.
        field: String,
    },
    /// A field of the wrong JSON type, or a number out of its range.
    #[error("manifest.json: field `{field}` must be {expected}, found {found}")]
    FieldType {
        /// The field.
        field: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A word that is not one of the words allowed.
    #[error("manifest.json: field `{field}` is `{found}`; use one of {allowed}")]
    UnknownWord {
        /// The field.
        field: String,
        /// What it says.
        found: String,
        /// The words allowed.
        allowed: &'static str,
    },
    /// A list or a count that must not be empty or zero.
    #[error("manifest.json: `{field}` is empty or 0; a trace needs at least one")]
    Empty {
        /// The field.
        field: &'static str,
    },
    /// A token grid that cannot be.
    #[error("manifest.json: geometry: {0}")]
    Geometry(#[from] GeometryError),
    /// Blocks other than 128 tokens.
    #[error("manifest.json: blocks are {q}x{kv} tokens, and format 1 means 128x128; capture again with 128")]
    UnsupportedBlocks {
        /// Tokens of a query block.
        q: u64,
        /// Tokens of a key block.
        kv: u64,
    },
    /// More sites than ids can count.
    #[error(
        "manifest.json: {steps} steps x {layers} layers x {heads} heads are more sites than a plan can hold; check the model"
    )]
    TooManySites {
        /// Steps of the sampler.
        steps: usize,
        /// Layers.
        layers: u32,
        /// Heads.
        heads: u32,
    },
    /// `steps` is not 0, 1, 2, ...
    #[error("manifest.json: steps[{position}] has index {found}; list every step of the sampler in order from 0")]
    StepOrder {
        /// Where in the list.
        position: usize,
        /// Its index.
        found: u64,
    },
    /// A noise level that is negative.
    #[error("manifest.json: steps[{position}] has sigma {sigma}; a noise level is a number of at least 0")]
    BadSigma {
        /// Where in the list.
        position: usize,
        /// The noise level.
        sigma: f64,
    },
    /// A prompt id or branch that cannot be a file name.
    #[error("manifest.json: {field} {name:?} cannot name a file; use letters, digits, `-`, `_` and inner dots")]
    BadName {
        /// The field.
        field: String,
        /// The name.
        name: String,
    },
    /// A prompt id, branch or anchor count that occurs twice.
    #[error("manifest.json: {field} `{name}` is listed more than once; remove one")]
    DuplicateName {
        /// The list.
        field: &'static str,
        /// The entry.
        name: String,
    },
    /// An anchor count of 0 or above the number of rows.
    #[error("manifest.json: anchor count {count} is impossible for frames of {height} rows; use 1 to {height}")]
    AnchorCount {
        /// The count.
        count: u64,
        /// Rows of a frame.
        height: u32,
    },
    /// Nothing to choose masks with.
    #[error("manifest.json: no prompt has split `calibration`, so nothing could choose a mask; capture at least one")]
    NoCalibrationPrompt,
    /// A shard of a prompt that is not listed.
    #[error("{file}: prompt `{prompt}` is not in the manifest's `prompts`; list it or remove the shard")]
    UnknownPrompt {
        /// The shard.
        file: String,
        /// The prompt.
        prompt: String,
    },
    /// A shard of a branch that is not listed.
    #[error("{file}: branch `{branch}` is not in the manifest's `branches`; list it or remove the shard")]
    UnknownBranch {
        /// The shard.
        file: String,
        /// The branch.
        branch: String,
    },
    /// A shard of a step the sampler does not have.
    #[error("{file}: step {step} is out of range, the sampler has {steps} steps; correct the shard's entry")]
    StepOutOfRange {
        /// The shard.
        file: String,
        /// The step.
        step: u64,
        /// Steps of the sampler.
        steps: usize,
    },
    /// Two shards for the same prompt, step and branch.
    #[error("{file}: prompt `{prompt}`, {step}, branch `{branch}` already has shard {first}; keep one of the two")]
    DuplicateShard {
        /// The later shard.
        file: String,
        /// The earlier shard.
        first: String,
        /// The prompt.
        prompt: String,
        /// The step.
        step: StepId,
        /// The branch.
        branch: String,
    },
    /// Two entries that name one file.
    #[error("{file}: listed more than once in the manifest; every shard needs its own file")]
    DuplicateFile {
        /// The file.
        file: String,
    },
    /// A path that is absolute, climbs out, or is not in plain form.
    #[error("path {path:?} in the manifest is not a plain relative path inside the trace; remove `..`, `/` and `\\`")]
    UnsafePath {
        /// The path.
        path: String,
    },
    /// A digest that is not one.
    #[error("{file}: blake3 digest `{found}` is not 64 hexadecimal digits; recompute it")]
    BadDigest {
        /// The file.
        file: String,
        /// What the manifest says.
        found: String,
    },
    /// A branch without any shard.
    #[error("manifest.json: branch `{branch}` has no shard at all; capture it or remove it from `branches`")]
    NoShards {
        /// The branch.
        branch: String,
    },
    /// A covered step that one of the prompts lacks.
    #[error(
        "prompt `{prompt}` has no shard for {step}, branch `{branch}`, which other prompts have; capture it or drop the step or the prompt"
    )]
    MissingShard {
        /// The prompt.
        prompt: String,
        /// The step.
        step: StepId,
        /// The branch.
        branch: String,
    },

    // --- Files.
    /// A listed file is not there.
    #[error("{file}: listed in the manifest but not in the folder; restore it or capture again")]
    FileMissing {
        /// The file.
        file: String,
    },
    /// A link that leads out of the folder.
    #[error("{file}: leads out of the trace folder through a link; put the file itself there")]
    LinkEscapes {
        /// The file.
        file: String,
    },
    /// A directory, pipe or device where a file should be.
    #[error("{file}: not a regular file; put the file itself there")]
    NotAFile {
        /// The file.
        file: String,
    },
    /// A file of another size than listed.
    #[error("{file}: has {found} bytes, the manifest says {expected}; it is truncated or was replaced, restore it")]
    SizeMismatch {
        /// The file.
        file: String,
        /// Bytes listed.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A file of other content than listed.
    #[error("{file}: blake3 is {found}, the manifest says {expected}; the file is damaged or was replaced, restore it")]
    DigestMismatch {
        /// The file.
        file: String,
        /// Digest listed.
        expected: String,
        /// Digest found.
        found: String,
    },
    /// A file that changed after it was checked.
    #[error("{file}: changed while it was being read; leave the trace alone until the command ends, then run it again")]
    Changed {
        /// The file.
        file: String,
    },
    /// A safetensors header beyond any real one.
    #[error(
        "{file}: announces a header of {bytes} bytes, more than the {limit} allowed; it is no shard, capture again"
    )]
    HeaderTooLarge {
        /// The file.
        file: String,
        /// Announced size.
        bytes: u64,
        /// The most accepted.
        limit: u64,
    },
    /// A file that ends inside its header.
    #[error("{file}: ends inside its safetensors header; it is truncated, capture again")]
    HeaderTruncated {
        /// The file.
        file: String,
    },
    /// A header that safetensors does not allow.
    #[error("{file}: not a valid safetensors file: {reason}; capture again")]
    BadHeader {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// Tensors that do not fill the file, or leave it.
    #[error("{file}: its tensors take {expected} bytes but it holds {found}; it is truncated, capture again")]
    DataLength {
        /// The file.
        file: String,
        /// Bytes the header describes.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },

    // --- Tensors.
    /// A tensor that must be there.
    #[error("{file}: tensor `{tensor}` is missing; capture again")]
    MissingTensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor the format does not have.
    #[error("{file}: tensor `{tensor}` is not part of the format; remove it or correct its name")]
    UnknownTensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor of the wrong element type.
    #[error("{file}: tensor `{tensor}` is {found}, must be {expected}; match the manifest's `energy_encoding`")]
    TensorType {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Required element type.
        expected: &'static str,
        /// Its element type.
        found: String,
    },
    /// A tensor of the wrong shape.
    #[error(
        "{file}: tensor `{tensor}` has shape {found:?}, must be {expected:?}; check model and geometry in the manifest"
    )]
    TensorShape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Required shape.
        expected: Vec<usize>,
        /// Its shape.
        found: Vec<usize>,
    },
    /// A value that is not a number.
    #[error("{file}: tensor `{tensor}` is NaN at {at}{others}; the model overflowed there, capture again")]
    NotANumber {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Where first.
        at: At,
        /// Elsewhere in the tensor.
        others: Others,
    },
    /// A negative energy, deviation or error.
    #[error("{file}: tensor `{tensor}` is negative at {at} ({value}){others}; capture again")]
    Negative {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Where first.
        at: At,
        /// The value.
        value: f64,
        /// Elsewhere in the tensor.
        others: Others,
    },
    /// An infinite value.
    #[error("{file}: tensor `{tensor}` is infinite at {at}{others}; the model overflowed there, capture again")]
    Infinite {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Where first.
        at: At,
        /// Elsewhere in the tensor.
        others: Others,
    },
    /// A value above 1 where the format stores at most 1.
    #[error("{file}: tensor `{tensor}` is {value} at {at}{others}, above 1; the format stores larger values as 1")]
    AboveOne {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Where first.
        at: At,
        /// The value.
        value: f64,
        /// Elsewhere in the tensor.
        others: Others,
    },
    /// A row of energies that is not a distribution.
    #[error(
        "{file}: tensor `{tensor}`: {at} sums to {sum:.6}{others}, must be 1 within {tolerance}; energies are softmax masses averaged over the block's rows"
    )]
    RowSum {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Where first.
        at: At,
        /// The sum.
        sum: f64,
        /// What the encoding may miss 1 by.
        tolerance: f64,
        /// Elsewhere in the tensor.
        others: Others,
    },

    // --- Questions a trace cannot answer.
    /// The step has no energies of its own.
    #[error("{step} is not covered by the trace; ask for the nearest covered step")]
    StepNotCovered {
        /// The step.
        step: StepId,
    },
    /// A layer, head or prompt the trace does not have.
    #[error("{what} {index} does not exist, the trace has {count}")]
    OutOfRange {
        /// What was asked for.
        what: &'static str,
        /// Which one.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A vote with no prompt left.
    #[error("no calibration prompt is left to vote at {site}; capture more prompts or a holdout split")]
    NoVotes {
        /// The site.
        site: Site,
    },

    // --- Writing.
    /// A trace is already there.
    #[error("{} already holds a trace; open it to add prompts, or choose another folder", dir.display())]
    AlreadyATrace {
        /// The folder.
        dir: PathBuf,
    },
    /// Another process writes there, or did not close what it wrote.
    #[error("{} is being written by another process; wait for it, or give every process a part of its own", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// A part whose name cannot name a folder.
    #[error("part {name:?} cannot name a folder; use letters, digits, `-`, `_` and inner dots")]
    BadPart {
        /// The name.
        name: String,
    },
    /// Traces of different captures.
    #[error("{} and {} differ in {field}: {left} and {right}; only captures of one model and sampler belong together", first.display(), second.display())]
    Differs {
        /// One trace.
        first: PathBuf,
        /// The other, or what is asked for.
        second: PathBuf,
        /// What differs.
        field: &'static str,
        /// Its value in the first.
        left: String,
        /// Its value in the second.
        right: String,
    },
    /// Two traces with different shards for one prompt.
    #[error("{} and {} both have a prompt `{prompt}`, with other shards; rename one of the two", first.display(), second.display())]
    PromptConflict {
        /// The prompt.
        prompt: String,
        /// One trace.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Nothing to merge.
    #[error("{} has no captured prompts; name at least one trace that has", dir.display())]
    NothingToMerge {
        /// Where they were looked for.
        dir: PathBuf,
    },
    /// A merge whose result would replace something.
    #[error("{} exists already; a merge makes a new folder", dir.display())]
    OutputExists {
        /// The folder.
        dir: PathBuf,
    },
    /// A call that does not fit the state of a capture.
    #[error("{problem}")]
    OutOfTurn {
        /// What is wrong, and what to do.
        problem: &'static str,
    },
    /// The file system is too full.
    #[error("{} needs {need} bytes and the file system has {have} left; capture fewer steps or prompts, or write elsewhere", dir.display())]
    NoSpace {
        /// Where.
        dir: PathBuf,
        /// Bytes needed.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// A tensor handed to the writer has the wrong number of elements.
    #[error("{file}: tensor `{tensor}` was given {found} values, must be {expected}")]
    ValueCount {
        /// The shard being written.
        file: String,
        /// The tensor.
        tensor: String,
        /// Elements of its shape.
        expected: usize,
        /// Elements given.
        found: usize,
    },

    // --- The machine.
    /// Reading or writing failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl TraceError {
    /// Whether the machine failed (a read, a write, a full disk, a folder in use), rather than the trace being wrong.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Locked { .. } | Self::NoSpace { .. })
    }

    /// Notes that another row of the same tensor has the same fault.
    pub(crate) fn count_another(&mut self) {
        if let Self::NotANumber { others, .. }
        | Self::Negative { others, .. }
        | Self::Infinite { others, .. }
        | Self::AboveOne { others, .. }
        | Self::RowSum { others, .. } = self
        {
            others.0 += 1;
        }
    }

    /// Wraps an I/O failure.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// A position inside a tensor. Prints as `head 2, row 17, column 4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Head.
    pub head: usize,
    /// Query block, if the tensor has one.
    pub row: Option<usize>,
    /// Key block, anchor count or layer, if it matters.
    pub column: Option<usize>,
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "head {}", self.head)?;
        if let Some(row) = self.row {
            write!(f, ", row {row}")?;
        }
        if let Some(column) = self.column {
            write!(f, ", column {column}")?;
        }
        Ok(())
    }
}

/// How many more rows of the tensor have the same fault. Prints as nothing, or as ` (and 7 more rows)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Others(pub usize);

impl std::fmt::Display for Others {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            1 => f.write_str(" (and 1 more row)"),
            n => write!(f, " (and {n} more rows)"),
        }
    }
}

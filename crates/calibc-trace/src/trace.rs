//! A checked trace, read site by site.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use calibc_ir::{BlockEnergy, HeadId, LayerId, Site, StepId, ThresholdMap};
use memmap2::Mmap;
use rayon::prelude::*;

use crate::encoding::Encoding;
use crate::error::TraceError;
use crate::folder::{Folder, Stamp};
use crate::manifest::{self, FileEntry, MANIFEST, Manifest, Split};
use crate::sensitivity::Sensitivity;
use crate::shard::{self, Kind, ShardIndex};
use crate::threshold;

/// Called with bytes (or sites) done and their total, from several threads at once.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Shards that are checked side by side have at most this many bytes together (or there is only one).
const BATCH: u64 = 64 << 20;
/// Bytes hashed between two calls of the progress function.
const CHUNK: usize = 4 << 20;

/// A trace whose every file has been checked.
///
/// Holds the manifest and the position of each tensor, but no energies and no mappings: each question maps the shards it
/// needs and unmaps them, so that memory does not grow with the trace.
#[derive(Debug)]
pub struct Trace {
    folder: Folder,
    manifest: Manifest,
    branch: usize,
    covered: Vec<StepId>,
    splits: [Vec<usize>; 2],
    /// By prompt, then covered step.
    shards: Vec<Place>,
    sensitivity: Option<Sensitivity>,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    index: ShardIndex,
    stamp: Stamp,
}

/// What was learnt about one shard.
struct Checked {
    place: Option<(ShardIndex, Stamp)>,
    problems: Vec<TraceError>,
}

/// Every problem of the trace in `dir`, in stable order: the manifest, then its shards in order, then the sensitivity file.
/// Empty if the trace is good.
pub fn check(dir: &Path, progress: Progress<'_>) -> Vec<TraceError> {
    inspect(dir, true, progress).err().unwrap_or_default()
}

impl Trace {
    /// Opens the trace in `dir` and checks all of it: manifest, digests, headers, shapes and values.
    ///
    /// # Errors
    /// The first of the problems that [`check`] would list.
    pub fn open(dir: &Path, progress: Progress<'_>) -> Result<Self, TraceError> {
        inspect(dir, false, progress).map_err(|problems| {
            let nothing = TraceError::Empty { field: MANIFEST };
            problems.into_iter().next().unwrap_or(nothing)
        })
    }

    /// What the trace contains.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The branch whose energies are read: `cond` where there is one, else the first.
    pub fn branch(&self) -> &str {
        &self.manifest.branches[self.branch]
    }

    /// Steps with energies of their own, ascending.
    pub fn covered_steps(&self) -> &[StepId] {
        &self.covered
    }

    /// The covered step whose energies `step` takes: the nearest, of two the earlier.
    pub fn nearest_covered(&self, step: StepId) -> StepId {
        let distance = |s: &&StepId| s.0.abs_diff(step.0);
        // min_by_key keeps the first of equals, and covered steps ascend. An open trace covers a step.
        self.covered.iter().min_by_key(distance).copied().unwrap_or(step)
    }

    /// Prompts in `split`.
    pub fn num_prompts(&self, split: Split) -> usize {
        self.splits[split as usize].len()
    }

    /// Step and head weights, if the trace has them.
    pub fn sensitivity(&self) -> Option<&Sensitivity> {
        self.sensitivity.as_ref()
    }

    /// Energies of one site for one prompt of `split` (counted within the split, in manifest order).
    ///
    /// # Errors
    /// If the trace has no such site or prompt, the step is not covered, or the file changed or failed to be read.
    pub fn energy(
        &self,
        split: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<BlockEnergy, TraceError> {
        let site = Site { step, layer, head };
        let bytes = self.site_bytes(self.prompt(split, prompt)?, site, Kind::Energy)?;
        let bytes = bytes.ok_or_else(|| self.no_energy(layer))?;
        Ok(self.decode(bytes.get()))
    }

    /// Deviations of one site for one prompt of `split` (DESIGN: `D2`), in the shape of [`Trace::energy`]; `None` if the
    /// capture did not measure them.
    ///
    /// # Errors
    /// As [`Trace::energy`].
    pub fn deviation(
        &self,
        split: Split,
        prompt: usize,
        step: StepId,
        layer: LayerId,
        head: HeadId,
    ) -> Result<Option<BlockEnergy>, TraceError> {
        let site = Site { step, layer, head };
        let bytes = self.site_bytes(self.prompt(split, prompt)?, site, Kind::Deviation)?;
        Ok(bytes.map(|bytes| self.decode(bytes.get())))
    }

    /// The threshold map of one site over the calibration prompts, without the one named by `leave_out`.
    ///
    /// # Errors
    /// As [`Trace::energy`], and if no prompt is left.
    pub fn threshold_map(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        rho: f64,
        leave_out: Option<usize>,
    ) -> Result<ThresholdMap, TraceError> {
        let site = Site { step, layer, head };
        let voters = self.splits[Split::Calibration as usize].iter().enumerate();
        let voters = voters.filter(|(i, _)| Some(*i) != leave_out).map(|(_, &prompt)| prompt);
        let bytes = voters
            .map(|prompt| self.site_bytes(prompt, site, Kind::Energy)?.ok_or_else(|| self.no_energy(layer)))
            .collect::<Result<Vec<_>, _>>()?;
        if bytes.is_empty() {
            return Err(TraceError::NoVotes { site });
        }
        Ok(if self.manifest.encoding == Encoding::Log2U8 {
            let codes: Vec<&[u8]> = bytes.iter().map(SiteBytes::get).collect();
            let (rows, cols) = (self.manifest.geometry.num_q_blocks(), self.manifest.geometry.num_kv_blocks());
            threshold::threshold_map_of_codes(&codes, rows, cols, rho)
        } else {
            let energies: Vec<_> = bytes.iter().map(|b| self.decode(b.get())).collect();
            threshold::threshold_map(&energies, rho)
        })
    }

    /// Mean similarity of the site's rows to their nearest of `anchors` anchor rows, over the calibration prompts; `None`
    /// unless every one of them measured it for that number of anchors.
    ///
    /// # Errors
    /// As [`Trace::energy`].
    pub fn anchor_similarity(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<f64>, TraceError> {
        self.anchor_mean(Kind::Similarity, Site { step, layer, head }, anchors)
    }

    /// Mean relative output error of the site with `anchors` anchor rows, over the calibration prompts; `None` unless every
    /// one of them measured it for that number of anchors.
    ///
    /// # Errors
    /// As [`Trace::energy`].
    pub fn anchor_error(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<f64>, TraceError> {
        self.anchor_mean(Kind::Error, Site { step, layer, head }, anchors)
    }

    /// Relative output error of the site with `anchors` anchor rows, for each calibration prompt; `None` unless every one of them
    /// measured it for that number of anchors.
    ///
    /// # Errors
    /// As [`Trace::energy`].
    pub fn anchor_errors(
        &self,
        step: StepId,
        layer: LayerId,
        head: HeadId,
        anchors: u16,
    ) -> Result<Option<Vec<f64>>, TraceError> {
        self.anchor_values(Kind::Error, Site { step, layer, head }, anchors)
    }

    fn anchor_mean(&self, kind: Kind, site: Site, anchors: u16) -> Result<Option<f64>, TraceError> {
        let values = self.anchor_values(kind, site, anchors)?;
        // In prompt order, from 0.0: another implementation can repeat it bit for bit.
        Ok(values.map(|values| values.iter().fold(0.0, |sum, value| sum + value) / values.len() as f64))
    }

    fn anchor_values(&self, kind: Kind, site: Site, anchors: u16) -> Result<Option<Vec<f64>>, TraceError> {
        let Some(column) = self.manifest.anchor_counts.iter().position(|&n| n == anchors) else { return Ok(None) };
        let prompts = &self.splits[Split::Calibration as usize];
        let mut values = Vec::with_capacity(prompts.len());
        for &prompt in prompts {
            let bytes = self.site_bytes(prompt, site, kind)?;
            let Some(value) = bytes.and_then(|bytes| Encoding::F32.decode(bytes.get()).nth(column)) else {
                return Ok(None);
            };
            values.push(value);
        }
        Ok(Some(values))
    }

    /// Whether every prompt has deviations in every layer, at every covered step.
    pub fn has_deviations(&self) -> bool {
        self.has(Kind::Deviation)
    }

    fn has(&self, kind: Kind) -> bool {
        self.shards.iter().all(|place| place.index.iter().all(|layer| layer.get(kind).is_some()))
    }

    /// Whether every shard read has each of the optional tensors in every layer.
    pub(crate) fn extras(&self) -> [(&'static str, bool); 3] {
        [
            ("block_deviation", self.has(Kind::Deviation)),
            ("anchor_similarity", self.has(Kind::Similarity)),
            ("anchor_error", self.has(Kind::Error)),
        ]
    }

    fn prompt(&self, split: Split, index: usize) -> Result<usize, TraceError> {
        let prompts = &self.splits[split as usize];
        let what = match split {
            Split::Calibration => "calibration prompt",
            Split::Holdout => "holdout prompt",
        };
        prompts.get(index).copied().ok_or(TraceError::OutOfRange { what, index, count: prompts.len() })
    }

    /// The stored bytes of one head's part of a tensor, `None` if the shard lacks the tensor.
    fn site_bytes(&self, prompt: usize, site: Site, kind: Kind) -> Result<Option<SiteBytes>, TraceError> {
        let Site { step, layer, head } = site;
        let (layers, heads) = (self.manifest.model.layers as usize, self.manifest.model.heads as usize);
        for (what, index, count) in [("layer", layer.index(), layers), ("head", head.index(), heads)] {
            if index >= count {
                return Err(TraceError::OutOfRange { what, index, count });
            }
        }
        let covered = self.covered.binary_search(&step).map_err(|_| TraceError::StepNotCovered { step })?;
        let place = &self.shards[prompt * self.covered.len() + covered];
        let Some(offset) = place.index[layer.index()].get(kind) else { return Ok(None) };
        let elements: usize = kind.shape(&self.manifest)[1..].iter().product();
        let size = elements * kind.encoding(&self.manifest).bytes();
        let start = offset as usize + head.index() * size;
        let file = &self.manifest.shards[place.shard].file.path;
        let (map, stamp) = self.folder.map(file)?;
        if stamp != place.stamp {
            return Err(TraceError::Changed { file: file.clone() });
        }
        Ok(Some(SiteBytes { map, start, size }))
    }

    fn decode(&self, bytes: &[u8]) -> BlockEnergy {
        let (rows, cols) = (self.manifest.geometry.num_q_blocks(), self.manifest.geometry.num_kv_blocks());
        BlockEnergy { rows, cols, values: self.manifest.encoding.decode(bytes).collect() }
    }

    /// Every shard of an open trace has every layer's energies; this names the layer should that ever be wrong.
    fn no_energy(&self, layer: LayerId) -> TraceError {
        TraceError::MissingTensor { file: self.branch().into(), tensor: Kind::Energy.name(layer.0) }
    }
}

/// A part of a mapped file.
struct SiteBytes {
    map: Mmap,
    start: usize,
    size: usize,
}

impl SiteBytes {
    /// The bytes. The stamp of the mapping equals that of the checked file, whose header placed them inside.
    fn get(&self) -> &[u8] {
        &self.map[self.start..][..self.size]
    }
}

/// Checks a trace; `all` goes on after the first problem.
fn inspect(dir: &Path, all: bool, progress: Progress<'_>) -> Result<Trace, Vec<TraceError>> {
    let folder = Folder::open(dir).map_err(|e| vec![e])?;
    let bytes = manifest::read_bytes(&folder).map_err(|e| vec![e])?;
    let (manifest, mut problems) = Manifest::parse(&bytes);
    let Some(manifest) = manifest else { return Err(problems) };
    if !all && !problems.is_empty() {
        return Err(problems);
    }
    let sizes = manifest.shards.iter().map(|s| s.file.bytes.unwrap_or(0));
    let total = sizes.clone().fold(0, u64::saturating_add);
    let done = AtomicU64::new(0);
    let advance = |bytes: u64| {
        let before = done.fetch_add(bytes, Ordering::Relaxed);
        progress(before.saturating_add(bytes).min(total), total);
    };

    let mut places = Vec::with_capacity(manifest.shards.len());
    let mut next = 0;
    while next < manifest.shards.len() {
        let mut end = next + 1;
        let mut size = manifest.shards[next].file.bytes.unwrap_or(0);
        while let Some(shard) = manifest.shards.get(end) {
            size = size.saturating_add(shard.file.bytes.unwrap_or(0));
            if size > BATCH {
                break;
            }
            end += 1;
        }
        let checked: Vec<_> = manifest.shards[next..end]
            .par_iter()
            .map(|shard| check_shard(&folder, &manifest, &shard.file, &advance))
            .collect();
        for (shard, checked) in (next..end).zip(checked) {
            problems.extend(checked.problems);
            places.extend(checked.place.map(|(index, stamp)| Place { shard, index, stamp }));
        }
        if !all && !problems.is_empty() {
            return Err(problems);
        }
        next = end;
    }
    let sensitivity = match &manifest.sensitivity {
        Some(entry) => read_sensitivity(&folder, &manifest, entry).map_err(|e| problems.extend(e)).ok(),
        None => None,
    };
    if !problems.is_empty() {
        return Err(problems);
    }

    let branch = manifest.plan_branch();
    places.retain(|place| manifest.shards[place.shard].branch == branch);
    places.sort_by_key(|place| {
        let shard = &manifest.shards[place.shard];
        (shard.prompt, shard.step)
    });
    tracing::debug!(shards = manifest.shards.len(), bytes = total, "trace checked");
    Ok(Trace {
        covered: manifest.covered_steps(branch),
        splits: [Split::Calibration, Split::Holdout].map(|split| manifest.prompts_of(split)),
        branch,
        folder,
        manifest,
        shards: places,
        sensitivity,
    })
}

/// Maps a listed file and checks its size and digest. With the mapping come the problems that do not hide the content.
fn open_listed(
    folder: &Folder,
    entry: &FileEntry,
    advance: &(impl Fn(u64) + Sync),
) -> Result<(Mmap, Stamp, Vec<TraceError>), TraceError> {
    let file = &entry.path;
    let (map, stamp) = folder.map(file)?;
    if let Some(expected) = entry.bytes
        && expected != stamp.bytes
    {
        return Err(TraceError::SizeMismatch { file: file.clone(), expected, found: stamp.bytes });
    }
    let mut hasher = blake3::Hasher::new();
    for chunk in map.chunks(CHUNK) {
        hasher.update_rayon(chunk);
        advance(chunk.len() as u64);
    }
    let found = hasher.finalize();
    let mut problems = Vec::new();
    if found != entry.digest {
        let (expected, found) = (entry.digest.to_string(), found.to_string());
        problems.push(TraceError::DigestMismatch { file: file.clone(), expected, found });
    }
    Ok((map, stamp, problems))
}

fn check_shard(folder: &Folder, manifest: &Manifest, entry: &FileEntry, advance: &(impl Fn(u64) + Sync)) -> Checked {
    let (map, stamp, mut problems) = match open_listed(folder, entry, advance) {
        Ok(opened) => opened,
        Err(e) => return Checked { place: None, problems: vec![e] },
    };
    match shard::index(&entry.path, &map, manifest) {
        Ok(index) => {
            problems.extend(shard::check_values(&entry.path, &map, &index, manifest));
            Checked { place: Some((index, stamp)), problems }
        }
        Err(more) => {
            problems.extend(more);
            Checked { place: None, problems }
        }
    }
}

fn read_sensitivity(folder: &Folder, manifest: &Manifest, entry: &FileEntry) -> Result<Sensitivity, Vec<TraceError>> {
    let (map, _, mut problems) = open_listed(folder, entry, &|_| ()).map_err(|e| vec![e])?;
    let parsed = Sensitivity::parse(&entry.path, &map, manifest).map_err(|more| problems.extend(more));
    match parsed {
        Ok(sensitivity) if problems.is_empty() => Ok(sensitivity),
        _ => Err(problems),
    }
}

//! Writes traces: shard by shard, layer by layer, each file under a temporary name first and the manifest last.
//!
//! A capture that dies leaves the trace as the last [`TraceWriter::commit`] described it. What the reader would refuse is
//! refused here, before it reaches a file. [`crate::session`] is what captures use: it adds a lock, resuming and parts.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use calibc_ir::{BLOCK, Geometry, LayerId, Layout, Model, StepId};
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::encoding::Encoding;
use crate::error::TraceError;
use crate::manifest::{self, FORMAT, FileEntry, MANIFEST, Manifest, Prompt, Shard, VERSION};
use crate::mapped;
use crate::sensitivity::Sensitivity;
use crate::shard::{self, Kind};

/// Name of the sensitivity file inside a trace.
pub(crate) const SENSITIVITY: &str = "sensitivity.safetensors";

/// What every shard of a trace has in common.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSpec {
    /// The attention stack.
    pub model: Model,
    /// The token grid (self-attention only).
    pub geometry: Geometry,
    /// Noise level of each step of the sampler.
    pub sigmas: Vec<f64>,
    /// Guidance branches that will be captured.
    pub branches: Vec<String>,
    /// How energies are stored.
    pub encoding: Encoding,
    /// Anchor counts measured.
    pub anchor_counts: Vec<u16>,
}

/// Which optional tensors a shard has, in every layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// `block_deviation`.
    pub deviation: bool,
    /// `anchor_similarity`.
    pub anchor_similarity: bool,
    /// `anchor_error`.
    pub anchor_error: bool,
}

/// The tensors of one layer, row-major. Those a shard's [`Extras`] do not name stay empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerTensors<'a> {
    /// `[heads, q_blocks, kv_blocks]`, each row a distribution.
    pub energy: &'a [f32],
    /// `[heads, q_blocks, kv_blocks]`, 0 to 1.
    pub deviation: &'a [f32],
    /// `[heads, anchor counts]`.
    pub anchor_similarity: &'a [f32],
    /// `[heads, anchor counts]`.
    pub anchor_error: &'a [f32],
}

/// The tensors of one layer as they are stored, energies and deviations in the trace's encoding (little-endian).
#[derive(Clone, Copy, Debug, Default)]
pub struct EncodedTensors<'a> {
    /// `[heads, q_blocks, kv_blocks]`, each row a distribution.
    pub energy: &'a [u8],
    /// `[heads, q_blocks, kv_blocks]`, 0 to 1.
    pub deviation: &'a [u8],
    /// `[heads, anchor counts]`.
    pub anchor_similarity: &'a [f32],
    /// `[heads, anchor counts]`.
    pub anchor_error: &'a [f32],
}

impl TraceSpec {
    /// Bytes of one shard: one prompt at one step of one branch.
    ///
    /// # Errors
    /// If the spec describes an impossible trace.
    pub fn shard_bytes(&self, extras: Extras) -> Result<u64, TraceError> {
        Ok(Placement::new(&self.clone().manifest()?, extras).bytes)
    }

    /// The manifest of a trace without prompts.
    pub(crate) fn manifest(self) -> Result<Manifest, TraceError> {
        let Self { model, geometry, sigmas, branches, encoding, anchor_counts } = self;
        let manifest = Manifest {
            model,
            // A key sequence of its own is nothing a manifest can say.
            geometry: Geometry { kv_tokens: None, ..geometry },
            sigmas,
            branches,
            encoding,
            anchor_counts,
            prompts: Vec::new(),
            shards: Vec::new(),
            sensitivity: None,
        };
        match manifest.head_problems().into_iter().next() {
            Some(problem) => Err(problem),
            None => Ok(manifest),
        }
    }
}

/// A trace being written.
#[derive(Debug)]
pub struct TraceWriter {
    dir: PathBuf,
    manifest: Manifest,
}

impl TraceWriter {
    /// Starts a new trace in `dir`, which is created if need be. Nothing is a trace before [`TraceWriter::commit`].
    ///
    /// # Errors
    /// If `dir` holds a trace already, or the spec describes an impossible one.
    pub fn create(dir: &Path, spec: TraceSpec) -> Result<Self, TraceError> {
        let manifest = spec.manifest()?;
        fs::create_dir_all(dir).map_err(TraceError::io("create", dir))?;
        if dir.join(MANIFEST).symlink_metadata().is_ok() {
            return Err(TraceError::AlreadyATrace { dir: dir.to_owned() });
        }
        Ok(Self { dir: dir.to_owned(), manifest })
    }

    /// Opens the trace in `dir` to add prompts to it. Its shards are not read again: check them when all is written.
    ///
    /// # Errors
    /// As [`Manifest::read`].
    pub fn open(dir: &Path) -> Result<Self, TraceError> {
        Ok(Self { dir: dir.to_owned(), manifest: Manifest::read(dir)? })
    }

    /// As [`TraceWriter::open`], with the manifest read already.
    pub(crate) fn resume(dir: &Path, manifest: Manifest) -> Self {
        Self { dir: dir.to_owned(), manifest }
    }

    /// The manifest as it would be written now.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Lists a prompt.
    ///
    /// # Errors
    /// If its id is taken or cannot name a folder.
    pub fn add_prompt(&mut self, prompt: Prompt) -> Result<(), TraceError> {
        if !manifest::is_name(&prompt.id) {
            return Err(TraceError::BadName { field: "prompt".into(), name: prompt.id });
        }
        if self.manifest.prompts.iter().any(|p| p.id == prompt.id) {
            return Err(TraceError::DuplicateName { field: "prompts", name: prompt.id });
        }
        self.manifest.prompts.push(prompt);
        Ok(())
    }

    /// Starts the shard of a listed prompt at a step of a branch. Several may be open at once; each counts once it is given back to
    /// [`TraceWriter::finish`].
    ///
    /// # Errors
    /// If prompt, step or branch are not the trace's, the shard exists, or its file cannot be created.
    pub fn begin(&self, prompt: &str, step: StepId, branch: &str, extras: Extras) -> Result<OpenShard, TraceError> {
        let file = format!("{prompt}/s{:03}.{branch}.safetensors", step.0);
        let prompts = &self.manifest.prompts;
        let Some(prompt_index) = prompts.iter().position(|p| p.id == prompt) else {
            return Err(TraceError::UnknownPrompt { file, prompt: prompt.into() });
        };
        let Some(branch_index) = self.manifest.branches.iter().position(|b| b == branch) else {
            return Err(TraceError::UnknownBranch { file, branch: branch.into() });
        };
        let steps = self.manifest.sigmas.len();
        if step.index() >= steps {
            return Err(TraceError::StepOutOfRange { file, step: step.0.into(), steps });
        }
        let shard = Shard {
            file: FileEntry { path: file, bytes: None, digest: blake3::Hash::from_bytes([0; 32]) },
            prompt: prompt_index,
            step,
            branch: branch_index,
        };
        self.not_there_yet(&shard)?;
        let placement = Placement::new(&self.manifest, extras);
        let folder = self.dir.join(prompt);
        fs::create_dir_all(&folder).map_err(TraceError::io("create", &folder))?;
        let mut temp = temporary(&folder)?;
        temp.write_all(&placement.header).map_err(TraceError::io("write", temp.path()))?;
        let written = vec![false; self.manifest.model.layers as usize];
        let shape = Arc::new(Manifest { prompts: Vec::new(), shards: Vec::new(), ..self.manifest.clone() });
        Ok(OpenShard { shape, prompt: prompt.to_owned(), shard, temp, placement, written, buffer: Vec::new() })
    }

    fn not_there_yet(&self, shard: &Shard) -> Result<(), TraceError> {
        let Shard { file, prompt, step, branch } = shard;
        let same = |s: &&Shard| (s.prompt, s.step, s.branch) == (*prompt, *step, *branch);
        let Some(first) = self.manifest.shards.iter().find(same) else { return Ok(()) };
        Err(TraceError::DuplicateShard {
            file: file.path.clone(),
            first: first.file.path.clone(),
            prompt: self.manifest.prompts[*prompt].id.clone(),
            step: *step,
            branch: self.manifest.branches[*branch].clone(),
        })
    }

    /// Puts a shard of this writer in its place and lists it; it counts once the trace is committed.
    ///
    /// # Errors
    /// If a layer was not written, the shard is there already, or the file cannot be moved.
    pub fn finish(&mut self, shard: OpenShard) -> Result<(), TraceError> {
        let OpenShard { prompt, mut shard, temp, placement, written, .. } = shard;
        // Discarding another prompt moves the rest up.
        let listed = self.manifest.prompts.iter().position(|p| p.id == prompt);
        let file = &shard.file.path;
        shard.prompt = listed.ok_or_else(|| TraceError::UnknownPrompt { file: file.clone(), prompt })?;
        if let Some(layer) = written.iter().position(|written| !written) {
            let tensor = Kind::Energy.name(layer as u32);
            return Err(TraceError::MissingTensor { file: shard.file.path, tensor });
        }
        self.not_there_yet(&shard)?;
        let map = mapped::map(temp.as_file()).map_err(TraceError::io("map", temp.path()))?;
        shard.file.bytes = Some(placement.bytes);
        shard.file.digest = blake3::Hasher::new().update_rayon(&map).finalize();
        drop(map);
        persist(temp, &self.dir.join(&shard.file.path))?;
        self.manifest.shards.push(shard);
        Ok(())
    }

    /// As [`TraceWriter::begin`], for one shard at a time.
    ///
    /// # Errors
    /// As there.
    pub fn shard(
        &mut self,
        prompt: &str,
        step: StepId,
        branch: &str,
        extras: Extras,
    ) -> Result<ShardWriter<'_>, TraceError> {
        let shard = self.begin(prompt, step, branch, extras)?;
        Ok(ShardWriter { trace: self, shard })
    }

    /// Strikes a prompt off the list, with its shards and their files. What was committed stays so until the next commit.
    ///
    /// # Errors
    /// If there is no such prompt, or a file cannot be removed.
    pub fn discard_prompt(&mut self, id: &str) -> Result<(), TraceError> {
        let Some(index) = self.manifest.prompts.iter().position(|p| p.id == id) else {
            return Err(TraceError::UnknownPrompt { file: MANIFEST.into(), prompt: id.into() });
        };
        for shard in self.manifest.shards.iter().filter(|s| s.prompt == index) {
            let path = self.dir.join(&shard.file.path);
            fs::remove_file(&path).map_err(TraceError::io("remove", path))?;
        }
        self.manifest.shards.retain(|s| s.prompt != index);
        self.manifest.shards.iter_mut().filter(|s| s.prompt > index).for_each(|s| s.prompt -= 1);
        self.manifest.prompts.remove(index);
        // A folder that holds anything else stays.
        let _ = fs::remove_dir(self.dir.join(id));
        Ok(())
    }

    /// Writes the sensitivity file.
    ///
    /// # Errors
    /// If lengths are wrong, a value is not finite or negative, or writing fails.
    pub fn set_sensitivity(&mut self, sensitivity: &Sensitivity) -> Result<(), TraceError> {
        let bytes = sensitivity.render(&self.manifest)?;
        let mut temp = temporary(&self.dir)?;
        temp.write_all(&bytes).map_err(TraceError::io("write", temp.path()))?;
        persist(temp, &self.dir.join(SENSITIVITY))?;
        self.manifest.sensitivity =
            Some(FileEntry { path: SENSITIVITY.into(), bytes: Some(bytes.len() as u64), digest: blake3::hash(&bytes) });
        Ok(())
    }

    /// Strikes the sensitivity file off the list; the file stays.
    pub(crate) fn unlist_sensitivity(&mut self) {
        self.manifest.sensitivity = None;
    }

    /// Writes the manifest: from here on the folder is a trace. More can be added and committed afterwards. A trace whose prompts
    /// are all held out so far may be committed too, though no reader takes it before one that is not has joined it.
    ///
    /// # Errors
    /// If the trace is not complete (every prompt needs every covered step), or writing fails.
    pub fn commit(&self) -> Result<(), TraceError> {
        commit(&self.dir, &self.manifest)
    }
}

/// Writes `manifest` into `dir`, in one step.
pub(crate) fn commit(dir: &Path, manifest: &Manifest) -> Result<(), TraceError> {
    let json = render(manifest)?;
    let unfit = |problem: &TraceError| !matches!(problem, TraceError::NoCalibrationPrompt);
    if let Some(problem) = Manifest::parse(&json).1.into_iter().find(unfit) {
        return Err(problem);
    }
    let mut temp = temporary(dir)?;
    let path = temp.path().to_owned();
    temp.write_all(&json).and_then(|()| temp.as_file().sync_all()).map_err(TraceError::io("write", path))?;
    persist(temp, &dir.join(MANIFEST))
}

fn render(m: &Manifest) -> Result<Vec<u8>, TraceError> {
    let Model { layers, heads, head_dim, .. } = m.model;
    let Geometry { frames, height, width, text_tokens, .. } = m.geometry;
    let document = wire::Document {
        format: FORMAT,
        version: VERSION,
        model: wire::Model { name: &m.model.name, layers, heads, head_dim },
        geometry: wire::Geometry {
            frames,
            height,
            width,
            text_tokens,
            text_position: m.geometry.text_position.to_string(),
        },
        layout: match m.geometry.layout {
            Layout::Raster => wire::Layout::Raster,
            Layout::Tile(sides) => wire::Layout::Tile(sides),
        },
        blocks: wire::Blocks { q: BLOCK, kv: BLOCK },
        steps: (0..).zip(&m.sigmas).map(|(index, &sigma)| wire::Step { index, sigma }).collect(),
        branches: &m.branches,
        energy_encoding: m.encoding.name(),
        anchor_counts: &m.anchor_counts,
        prompts: m
            .prompts
            .iter()
            .map(|p| wire::Prompt { id: &p.id, seed: p.seed, split: p.split.name(), label: &p.label })
            .collect(),
        shards: m
            .shards
            .iter()
            .map(|s| wire::Shard {
                path: &s.file.path,
                prompt: &m.prompts[s.prompt].id,
                step: s.step.0,
                branch: &m.branches[s.branch],
                bytes: s.file.bytes,
                blake3: s.file.digest.to_string(),
            })
            .collect(),
        sensitivity: m.sensitivity.as_ref().map(|file| wire::File {
            path: &file.path,
            bytes: file.bytes,
            blake3: file.digest.to_string(),
        }),
    };
    let mut json =
        serde_json::to_vec_pretty(&document).map_err(|e| TraceError::io("render", MANIFEST)(io::Error::other(e)))?;
    json.push(b'\n');
    Ok(json)
}

/// A shard being written; dropped unfinished, it leaves nothing behind.
#[derive(Debug)]
pub struct OpenShard {
    /// The manifest without prompts and shards.
    shape: Arc<Manifest>,
    prompt: String,
    shard: Shard,
    temp: NamedTempFile,
    placement: Placement,
    written: Vec<bool>,
    buffer: Vec<u8>,
}

impl OpenShard {
    /// Encodes and writes one layer; layers may come in any order. At most one layer is held encoded.
    ///
    /// # Errors
    /// If the layer does not exist, a tensor has the wrong number of values, or a value is one the reader would refuse.
    pub fn layer(&mut self, layer: LayerId, tensors: LayerTensors<'_>) -> Result<(), TraceError> {
        self.check_layer(layer)?;
        let shape = self.shape.clone();
        for kind in Kind::ALL {
            let values = match kind {
                Kind::Energy => tensors.energy,
                Kind::Deviation => tensors.deviation,
                Kind::Similarity => tensors.anchor_similarity,
                Kind::Error => tensors.anchor_error,
            };
            let Some(offset) = self.place(kind, layer, values.len())? else { continue };
            let (file, tensor) = (&self.shard.file.path, kind.name(layer.0));
            if let Some(problem) = shard::check_given(file, &tensor, kind, &shape, values).into_iter().next() {
                return Err(problem);
            }
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.clear();
            kind.encoding(&shape).encode(values, &mut buffer);
            let written = self.write(kind, layer, offset, &buffer);
            self.buffer = buffer;
            written?;
        }
        self.written[layer.index()] = true;
        Ok(())
    }

    /// Writes one layer whose energies and deviations are encoded already.
    ///
    /// # Errors
    /// As [`OpenShard::layer`].
    pub fn layer_encoded(&mut self, layer: LayerId, tensors: EncodedTensors<'_>) -> Result<(), TraceError> {
        self.check_layer(layer)?;
        let shape = self.shape.clone();
        let table = |values: &[f32]| {
            let mut bytes = Vec::with_capacity(values.len() * 4);
            Encoding::F32.encode(values, &mut bytes);
            bytes
        };
        let (similarity, error) = (table(tensors.anchor_similarity), table(tensors.anchor_error));
        for kind in Kind::ALL {
            let bytes = match kind {
                Kind::Energy => tensors.energy,
                Kind::Deviation => tensors.deviation,
                Kind::Similarity => &similarity,
                Kind::Error => &error,
            };
            // Half an element is one too many.
            let count = bytes.len().div_ceil(kind.encoding(&shape).bytes());
            let Some(offset) = self.place(kind, layer, count)? else { continue };
            self.write(kind, layer, offset, bytes)?;
        }
        self.written[layer.index()] = true;
        Ok(())
    }

    /// The prompt it is of.
    pub fn prompt_id(&self) -> &str {
        &self.prompt
    }

    fn check_layer(&self, layer: LayerId) -> Result<(), TraceError> {
        let count = self.written.len();
        if layer.index() < count {
            return Ok(());
        }
        Err(TraceError::OutOfRange { what: "layer", index: layer.index(), count })
    }

    /// Where the `found` values of a tensor go; `None` for one that the shard does not have, which must be empty.
    fn place(&self, kind: Kind, layer: LayerId, found: usize) -> Result<Option<u64>, TraceError> {
        let offset = self.placement.offset(kind, layer);
        let expected = if offset.is_some() { kind.shape(&self.shape).iter().product() } else { 0 };
        if found == expected {
            return Ok(offset);
        }
        let (file, tensor) = (self.shard.file.path.clone(), kind.name(layer.0));
        Err(TraceError::ValueCount { file, tensor, expected, found })
    }

    fn write(&mut self, kind: Kind, layer: LayerId, offset: u64, bytes: &[u8]) -> Result<(), TraceError> {
        let (file, tensor) = (&self.shard.file.path, kind.name(layer.0));
        if let Some(problem) = shard::check_encoded(file, &tensor, kind, &self.shape, bytes).into_iter().next() {
            return Err(problem);
        }
        let out = self.temp.as_file_mut();
        out.seek(SeekFrom::Start(offset))
            .and_then(|_| out.write_all(bytes))
            .map_err(TraceError::io("write", self.temp.path()))
    }
}

/// The one shard being written; dropped unfinished, it leaves nothing behind.
#[derive(Debug)]
pub struct ShardWriter<'a> {
    trace: &'a mut TraceWriter,
    shard: OpenShard,
}

impl ShardWriter<'_> {
    /// As [`OpenShard::layer`].
    ///
    /// # Errors
    /// As there.
    pub fn layer(&mut self, layer: LayerId, tensors: LayerTensors<'_>) -> Result<(), TraceError> {
        self.shard.layer(layer, tensors)
    }

    /// As [`TraceWriter::finish`].
    ///
    /// # Errors
    /// As there.
    pub fn finish(self) -> Result<(), TraceError> {
        self.trace.finish(self.shard)
    }
}

/// Where each tensor of a shard goes.
#[derive(Debug)]
pub(crate) struct Placement {
    /// Length prefix and JSON.
    header: Vec<u8>,
    /// By kind: offset of layer 0 in the file, and distance to the next layer.
    spans: [Option<(u64, u64)>; 4],
    /// Size of the file.
    pub(crate) bytes: u64,
}

impl Placement {
    pub(crate) fn new(manifest: &Manifest, extras: Extras) -> Self {
        let wanted = [
            (Kind::Similarity, extras.anchor_similarity),
            (Kind::Error, extras.anchor_error),
            (Kind::Energy, true),
            (Kind::Deviation, extras.deviation),
        ];
        let layers = manifest.model.layers;
        // 4-byte tensors first: each tensor is aligned for its type.
        let mut spans = [None; 4];
        let mut header = String::from("{");
        let mut at = 0u64;
        for (kind, _) in wanted.into_iter().filter(|&(_, wanted)| wanted) {
            let shape = kind.shape(manifest);
            let encoding = kind.encoding(manifest);
            let size = shape.iter().product::<usize>() as u64 * encoding.bytes() as u64;
            spans[kind as usize] = Some((at, size));
            for layer in 0..layers {
                let (name, dtype, end) = (kind.name(layer), encoding.dtype_name(), at + size);
                let comma = if header.len() > 1 { "," } else { "" };
                header += &format!(
                    "{comma}\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{at},{end}]}}"
                );
                at = end;
            }
        }
        header.push('}');
        // Padded as safetensors does, so that the data starts aligned.
        header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
        let data = 8 + header.len() as u64;
        let mut prefixed = (header.len() as u64).to_le_bytes().to_vec();
        prefixed.extend(header.into_bytes());
        let spans = spans.map(|span| span.map(|(start, size)| (data + start, size)));
        Self { header: prefixed, spans, bytes: data + at }
    }

    fn offset(&self, kind: Kind, layer: LayerId) -> Option<u64> {
        self.spans[kind as usize].map(|(start, size)| start + u64::from(layer.0) * size)
    }
}

/// How the names of unfinished files start and end.
pub(crate) const TEMPORARY: (&str, &str) = (".calibc-", ".tmp");

/// A temporary file beside its destination, readable by whom the process's umask allows.
pub(crate) fn temporary(folder: &Path) -> Result<NamedTempFile, TraceError> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1);
    #[cfg(unix)]
    let permissions = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions);
    builder.tempfile_in(folder).map_err(TraceError::io("create a file in", folder))
}

pub(crate) fn persist(temp: NamedTempFile, path: &Path) -> Result<(), TraceError> {
    temp.persist(path).map(|_: File| ()).map_err(|e| TraceError::io("write", path)(e.error))
}

/// The manifest as it is spelled, fields in the order of the format's description.
mod wire {
    use super::Serialize;

    #[derive(Serialize)]
    pub(super) struct Document<'a> {
        pub(super) format: &'a str,
        pub(super) version: u64,
        pub(super) model: Model<'a>,
        pub(super) geometry: Geometry,
        pub(super) layout: Layout,
        pub(super) blocks: Blocks,
        pub(super) steps: Vec<Step>,
        pub(super) branches: &'a [String],
        pub(super) energy_encoding: &'a str,
        pub(super) anchor_counts: &'a [u16],
        pub(super) prompts: Vec<Prompt<'a>>,
        pub(super) shards: Vec<Shard<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub(super) sensitivity: Option<File<'a>>,
    }

    #[derive(Serialize)]
    pub(super) struct Model<'a> {
        pub(super) name: &'a str,
        pub(super) layers: u32,
        pub(super) heads: u32,
        pub(super) head_dim: u32,
    }

    #[derive(Serialize)]
    pub(super) struct Geometry {
        pub(super) frames: u32,
        pub(super) height: u32,
        pub(super) width: u32,
        pub(super) text_tokens: u32,
        pub(super) text_position: String,
    }

    #[derive(Serialize)]
    #[serde(rename_all = "lowercase")]
    pub(super) enum Layout {
        Raster,
        Tile([u32; 3]),
    }

    #[derive(Serialize)]
    pub(super) struct Blocks {
        pub(super) q: u32,
        pub(super) kv: u32,
    }

    #[derive(Serialize)]
    pub(super) struct Step {
        pub(super) index: u32,
        pub(super) sigma: f64,
    }

    #[derive(Serialize)]
    pub(super) struct Prompt<'a> {
        pub(super) id: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub(super) seed: Option<u64>,
        pub(super) split: &'a str,
        pub(super) label: &'a str,
    }

    #[derive(Serialize)]
    pub(super) struct Shard<'a> {
        pub(super) path: &'a str,
        pub(super) prompt: &'a str,
        pub(super) step: u32,
        pub(super) branch: &'a str,
        pub(super) bytes: Option<u64>,
        pub(super) blake3: String,
    }

    #[derive(Serialize)]
    pub(super) struct File<'a> {
        pub(super) path: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub(super) bytes: Option<u64>,
        pub(super) blake3: String,
    }
}

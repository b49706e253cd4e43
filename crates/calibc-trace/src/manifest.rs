//! `manifest.json`: typed, strict, and complete in its complaints.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use calibc_ir::{BLOCK, Geometry, Layout, Model, StepId, TextPosition};

use crate::encoding::Encoding;
use crate::error::TraceError;
use crate::folder::{Folder, is_plain_path};
use crate::json::{Fields, Node, Reader};

/// Name of the manifest inside a trace.
pub const MANIFEST: &str = "manifest.json";
/// The format's name.
pub const FORMAT: &str = "calibc-trace";
/// The format version read and written.
pub const VERSION: u64 = 1;

/// A manifest of 100 prompts, 50 steps and two branches has 2 MB.
const MAX_MANIFEST: u64 = 32 << 20;

/// Which prompts may choose masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Split {
    /// Prompts that choose masks.
    Calibration,
    /// Prompts that only tell what the masks cost.
    Holdout,
}

impl Split {
    /// The manifest's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calibration => "calibration",
            Self::Holdout => "holdout",
        }
    }
}

/// One prompt (with its seed) of a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Unique id, also the name of its folder.
    pub id: String,
    /// Seed of the initial noise, if it was noted.
    pub seed: Option<u64>,
    /// Whether it may choose masks.
    pub split: Split,
    /// The prompt itself, or any words for it.
    pub label: String,
}

/// A file and its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Path inside the trace, `/` between parts.
    pub path: String,
    /// Size, if the manifest gives it.
    pub bytes: Option<u64>,
    /// BLAKE3 of its content.
    pub digest: blake3::Hash,
}

/// One shard: the tensors of one prompt at one step of one branch, all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The file.
    pub file: FileEntry,
    /// Index into [`Manifest::prompts`].
    pub prompt: usize,
    /// Denoising step.
    pub step: StepId,
    /// Index into [`Manifest::branches`].
    pub branch: usize,
}

/// What a trace contains.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// The attention stack.
    pub model: Model,
    /// The token grid.
    pub geometry: Geometry,
    /// Noise level of each step of the sampler; shards may cover a part of the steps.
    pub sigmas: Vec<f64>,
    /// Guidance branches captured.
    pub branches: Vec<String>,
    /// How energies are stored.
    pub encoding: Encoding,
    /// Anchor counts that `anchor_similarity` and `anchor_error` were measured for, in the order of their columns.
    pub anchor_counts: Vec<u16>,
    /// Prompts, in the order in which they vote.
    pub prompts: Vec<Prompt>,
    /// Shards, in the manifest's order.
    pub shards: Vec<Shard>,
    /// `sensitivity.safetensors`, if there is one.
    pub sensitivity: Option<FileEntry>,
}

impl Manifest {
    /// Reads and checks the manifest of the trace in `dir`, but no other file.
    ///
    /// # Errors
    /// The first problem found.
    pub fn read(dir: &Path) -> Result<Self, TraceError> {
        let (manifest, problems) = Self::parse(&read_bytes(&Folder::open(dir)?)?);
        match (manifest, problems.into_iter().next()) {
            (Some(manifest), None) => Ok(manifest),
            (_, Some(problem)) => Err(problem),
            (None, None) => Err(TraceError::Empty { field: MANIFEST }),
        }
    }

    /// Shape of an energy tensor: `[heads, q_blocks, kv_blocks]`.
    pub fn energy_shape(&self) -> [usize; 3] {
        [self.model.heads, self.geometry.num_q_blocks(), self.geometry.num_kv_blocks()].map(|n| n as usize)
    }

    /// Index of the branch that plans are made from: `cond` if it is listed, else the first.
    pub fn plan_branch(&self) -> usize {
        self.branches.iter().position(|b| b == "cond").unwrap_or(0)
    }

    /// Steps for which `branch` has shards, ascending.
    pub fn covered_steps(&self, branch: usize) -> Vec<StepId> {
        let mut steps: Vec<_> = self.shards.iter().filter(|s| s.branch == branch).map(|s| s.step).collect();
        steps.sort_unstable();
        steps.dedup();
        steps
    }

    /// Prompts of `split`, as indices into [`Manifest::prompts`].
    pub fn prompts_of(&self, split: Split) -> Vec<usize> {
        (0..self.prompts.len()).filter(|&p| self.prompts[p].split == split).collect()
    }

    /// Parses a manifest. The value is there whenever enough of it makes sense to look at the files it lists; shards whose
    /// entries make no sense are left out of it.
    pub(crate) fn parse(json: &[u8]) -> (Option<Self>, Vec<TraceError>) {
        let root = match serde_json::from_slice::<Node>(json) {
            Ok(root) => root,
            Err(e) => return (None, vec![TraceError::Json { reason: e.to_string() }]),
        };
        // Another format or version: its other fields are none of our business.
        if let Some(problem) = wrong_document(&root) {
            return (None, vec![problem]);
        }
        let mut reader = Reader::default();
        let manifest = reader.manifest(&root);
        (manifest, reader.problems)
    }

    /// What is wrong with everything but prompts, shards and their coverage.
    pub(crate) fn head_problems(&self) -> Vec<TraceError> {
        let mut problems = Vec::new();
        let Model { layers, heads, head_dim, .. } = self.model;
        for (field, n) in [("model.layers", layers), ("model.heads", heads), ("model.head_dim", head_dim)] {
            if n == 0 {
                problems.push(TraceError::Empty { field });
            }
        }
        if let Err(e) = self.geometry.validate() {
            problems.push(e.into());
        }
        if self.sigmas.is_empty() {
            problems.push(TraceError::Empty { field: "steps" });
        }
        for (position, &sigma) in self.sigmas.iter().enumerate() {
            if !(sigma >= 0.0 && sigma.is_finite()) {
                problems.push(TraceError::BadSigma { position, sigma });
            }
        }
        let steps = self.sigmas.len();
        // Three factors below 2^32 fit u128. The work items of a plan hold a head in 16 bits.
        let sites = steps as u128 * u128::from(layers) * u128::from(heads);
        if sites > u128::from(u32::MAX) || heads > u32::from(u16::MAX) {
            problems.push(TraceError::TooManySites { steps, layers, heads });
        }
        if self.branches.is_empty() {
            problems.push(TraceError::Empty { field: "branches" });
        }
        for (i, branch) in self.branches.iter().enumerate() {
            if !is_name(branch) {
                problems.push(TraceError::BadName { field: format!("branches[{i}]"), name: branch.clone() });
            }
        }
        problems.extend(duplicates("branches", self.branches.iter()));
        for &count in &self.anchor_counts {
            if count == 0 || u32::from(count) > self.geometry.height {
                problems.push(TraceError::AnchorCount { count: count.into(), height: self.geometry.height });
            }
        }
        problems.extend(duplicates("anchor_counts", self.anchor_counts.iter()));
        problems
    }

    /// What is wrong with the list of prompts.
    pub(crate) fn prompt_problems(&self) -> Vec<TraceError> {
        let mut problems = Vec::new();
        for (i, prompt) in self.prompts.iter().enumerate() {
            if !is_name(&prompt.id) {
                problems.push(TraceError::BadName { field: format!("prompts[{i}].id"), name: prompt.id.clone() });
            }
        }
        problems.extend(duplicates("prompts", self.prompts.iter().map(|p| &p.id)));
        if self.prompts_of(Split::Calibration).is_empty() {
            problems.push(TraceError::NoCalibrationPrompt);
        }
        problems
    }
}

/// The bytes of the manifest in `folder`.
pub(crate) fn read_bytes(folder: &Folder) -> Result<Vec<u8>, TraceError> {
    let path = match folder.resolve(MANIFEST) {
        Err(TraceError::FileMissing { .. }) => return Err(TraceError::NotATrace { dir: folder.given().to_owned() }),
        other => other?,
    };
    let file = File::open(&path).map_err(TraceError::io("open", &path))?;
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST + 1).read_to_end(&mut bytes).map_err(TraceError::io("read", &path))?;
    if bytes.len() as u64 > MAX_MANIFEST {
        let bytes = path.metadata().map_err(TraceError::io("read", &path))?.len();
        return Err(TraceError::ManifestTooLarge { bytes, limit: MAX_MANIFEST });
    }
    Ok(bytes)
}

/// Whether `name` can stand in a file name on every system.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.chars().all(plain) && !name.is_empty() && !name.starts_with('.') && !name.ends_with('.') && name.len() <= 128
}

fn duplicates<T: ToString>(field: &'static str, list: impl Iterator<Item = T>) -> Vec<TraceError> {
    let mut names: Vec<String> = list.map(|n| n.to_string()).collect();
    names.sort_unstable();
    let mut repeated: Vec<_> = names.windows(2).filter(|w| w[0] == w[1]).map(|w| w[0].clone()).collect();
    repeated.dedup();
    repeated.into_iter().map(|name| TraceError::DuplicateName { field, name }).collect()
}

/// The problem, if the document says it is of another format or version.
fn wrong_document(root: &Node) -> Option<TraceError> {
    let Node::Object(pairs) = root else { return None };
    let field = |name: &str| pairs.iter().find(|(n, _)| n == name).map(|(_, node)| node);
    match (field("format"), field("version")) {
        (Some(Node::Text(found)), _) if found != FORMAT => Some(TraceError::WrongFormat { found: found.clone() }),
        (_, Some(Node::Whole(found))) if *found != VERSION => Some(TraceError::UnsupportedVersion { found: *found }),
        _ => None,
    }
}

const TOP: [&str; 11] = [
    "format",
    "version",
    "model",
    "geometry",
    "layout",
    "blocks",
    "steps",
    "branches",
    "energy_encoding",
    "prompts",
    "shards",
];

impl Reader {
    fn manifest(&mut self, root: &Node) -> Option<Manifest> {
        let top = self.object(String::new(), root, &TOP, &["anchor_counts", "sensitivity"])?;
        self.text(&top, "format");
        self.whole(&top, "version");
        let model = self.model(&top);
        let geometry = self.geometry(&top);
        self.blocks(&top);
        let sigmas = self.sigmas(&top);
        let branches = self.branches(&top);
        let encoding = self.word(
            &top,
            "energy_encoding",
            "`log2-u8`, `f16`, `f32`",
            &Encoding::ALL.map(|encoding| (encoding.name(), encoding)),
        );
        let anchor_counts = self.anchor_counts(&top);
        let prompts = self.prompts(&top);
        let sensitivity = top.get("sensitivity").map(|node| {
            let fields = self.object("sensitivity".into(), node, &["path", "blake3"], &["bytes"])?;
            self.file(&fields)
        });
        let mut manifest = Manifest {
            model: model?,
            geometry: geometry?,
            sigmas: sigmas?,
            branches: branches?,
            encoding: encoding?,
            anchor_counts: anchor_counts?,
            prompts: prompts?,
            shards: Vec::new(),
            sensitivity: sensitivity.flatten(),
        };
        let (head, prompts) = (manifest.head_problems(), manifest.prompt_problems());
        // The files can be looked at as soon as it is clear which shape their tensors must have.
        let shapeless = |p: &TraceError| {
            matches!(p, TraceError::Geometry(_) | TraceError::Empty { .. } | TraceError::TooManySites { .. })
        };
        let usable = !head.iter().any(shapeless);
        self.problems.extend(head);
        self.problems.extend(prompts);
        self.shards(&top, &mut manifest);
        usable.then_some(manifest)
    }

    fn model(&mut self, top: &Fields<'_>) -> Option<Model> {
        let fields = self.object("model".into(), top.get("model")?, &["name", "layers", "heads", "head_dim"], &[])?;
        let name = self.text(&fields, "name");
        let [layers, heads, head_dim] = ["layers", "heads", "head_dim"].map(|n| self.whole32(&fields, n));
        Some(Model { name: name?.into(), layers: layers?, heads: heads?, head_dim: head_dim? })
    }

    fn geometry(&mut self, top: &Fields<'_>) -> Option<Geometry> {
        let layout = self.layout(top);
        let names = ["frames", "height", "width", "text_tokens", "text_position"];
        let fields = self.object("geometry".into(), top.get("geometry")?, &names, &[])?;
        let [frames, height, width, text_tokens] =
            ["frames", "height", "width", "text_tokens"].map(|n| self.whole32(&fields, n));
        let positions = [TextPosition::None, TextPosition::Before, TextPosition::After]
            .map(|position| (position.to_string(), position));
        let text_position = self.word(&fields, "text_position", "`none`, `before`, `after`", &positions);
        Some(Geometry {
            frames: frames?,
            height: height?,
            width: width?,
            text_tokens: text_tokens?,
            text_position: text_position?,
            layout: layout?,
            kv_tokens: None,
        })
    }

    fn layout(&mut self, top: &Fields<'_>) -> Option<Layout> {
        match top.get("layout")? {
            Node::Text(_) => self.word(top, "layout", "`raster`, {\"tile\": [..]}", &[("raster", Layout::Raster)]),
            node => {
                let fields = self.object("layout".into(), node, &["tile"], &[])?;
                let tile = self.list(&fields, "tile")?;
                let sides: Vec<_> = tile
                    .iter()
                    .filter_map(|n| self.whole_at(|| "layout.tile".into(), n, u32::MAX.into()))
                    .map(|n| n as u32)
                    .collect();
                if tile.len() != 3 {
                    self.problems.push(TraceError::FieldType {
                        field: "layout.tile".into(),
                        expected: "[frames, height, width]".into(),
                        found: format!("{} numbers", tile.len()),
                    });
                }
                sides.try_into().ok().map(Layout::Tile)
            }
        }
    }

    fn blocks(&mut self, top: &Fields<'_>) -> Option<()> {
        let fields = self.object("blocks".into(), top.get("blocks")?, &["q", "kv"], &[])?;
        let [q, kv] = ["q", "kv"].map(|n| self.whole(&fields, n));
        let (q, kv) = (q?, kv?);
        if [q, kv] != [u64::from(BLOCK); 2] {
            self.problems.push(TraceError::UnsupportedBlocks { q, kv });
        }
        Some(())
    }

    fn sigmas(&mut self, top: &Fields<'_>) -> Option<Vec<f64>> {
        let mut sigmas = Vec::new();
        let list = self.list(top, "steps")?;
        for (position, node) in list.iter().enumerate() {
            let Some(fields) = self.object(format!("steps[{position}]"), node, &["index", "sigma"], &[]) else {
                continue;
            };
            if let Some(found) = self.whole(&fields, "index")
                && found != position as u64
            {
                self.problems.push(TraceError::StepOrder { position, found });
            }
            sigmas.extend(self.number(&fields, "sigma"));
        }
        (sigmas.len() == list.len()).then_some(sigmas)
    }

    fn branches(&mut self, top: &Fields<'_>) -> Option<Vec<String>> {
        let mut branches = Vec::new();
        let list = self.list(top, "branches")?;
        for (i, node) in list.iter().enumerate() {
            match node {
                Node::Text(name) => branches.push(name.clone()),
                other => self.mistyped(format!("branches[{i}]"), "a string", other),
            }
        }
        (branches.len() == list.len()).then_some(branches)
    }

    fn anchor_counts(&mut self, top: &Fields<'_>) -> Option<Vec<u16>> {
        if top.get("anchor_counts").is_none() {
            return Some(Vec::new());
        }
        let list = self.list(top, "anchor_counts")?;
        let counts: Vec<_> = list
            .iter()
            .enumerate()
            .filter_map(|(i, n)| self.whole_at(|| format!("anchor_counts[{i}]"), n, u16::MAX.into()))
            .map(|n| n as u16)
            .collect();
        (counts.len() == list.len()).then_some(counts)
    }

    fn prompts(&mut self, top: &Fields<'_>) -> Option<Vec<Prompt>> {
        let mut prompts = Vec::new();
        let list = self.list(top, "prompts")?;
        let splits = [Split::Calibration, Split::Holdout].map(|split| (split.name(), split));
        for (i, node) in list.iter().enumerate() {
            let at = format!("prompts[{i}]");
            let Some(fields) = self.object(at, node, &["id", "split"], &["seed", "label"]) else {
                continue;
            };
            let id = self.text(&fields, "id");
            let seed = self.whole(&fields, "seed");
            let split = self.word(&fields, "split", "`calibration`, `holdout`", &splits);
            let label = self.text(&fields, "label").unwrap_or_default();
            if let (Some(id), Some(split)) = (id, split) {
                prompts.push(Prompt { id: id.into(), seed, split, label: label.into() });
            }
        }
        (prompts.len() == list.len()).then_some(prompts)
    }

    fn file(&mut self, fields: &Fields<'_>) -> Option<FileEntry> {
        let path = self.text(fields, "path");
        let bytes = self.whole(fields, "bytes");
        let digest = self.text(fields, "blake3");
        let path = path?.to_owned();
        if !is_plain_path(&path) {
            self.problems.push(TraceError::UnsafePath { path });
            return None;
        }
        let digest = digest?;
        match blake3::Hash::from_hex(digest) {
            Ok(digest) => Some(FileEntry { path, bytes, digest }),
            Err(_) => {
                self.problems.push(TraceError::BadDigest { file: path, found: digest.into() });
                None
            }
        }
    }

    fn shards(&mut self, top: &Fields<'_>, manifest: &mut Manifest) -> Option<()> {
        let prompts: HashMap<&str, usize> = manifest.prompts.iter().map(|p| p.id.as_str()).zip(0..).collect();
        // (prompt, step, branch) -> path of the first shard there; path -> listed. Looked up, never iterated.
        let mut places: HashMap<(usize, u32, usize), String> = HashMap::new();
        let mut files: HashSet<String> = HashSet::new();
        for (i, node) in self.list(top, "shards")?.iter().enumerate() {
            let names = ["path", "prompt", "step", "branch", "bytes", "blake3"];
            let Some(fields) = self.object(format!("shards[{i}]"), node, &names, &[]) else {
                continue;
            };
            let file = self.file(&fields);
            let path = match fields.get("path") {
                Some(Node::Text(path)) => path.clone(),
                _ => fields.path("path"),
            };
            let listed = fields.get("path").is_some() && !files.insert(path.clone());
            if listed {
                self.problems.push(TraceError::DuplicateFile { file: path.clone() });
            }
            let prompt = self.text(&fields, "prompt").and_then(|id| {
                let prompt = prompts.get(id).copied();
                if prompt.is_none() {
                    self.problems.push(TraceError::UnknownPrompt { file: path.clone(), prompt: id.into() });
                }
                prompt
            });
            let steps = manifest.sigmas.len();
            let step = self.whole(&fields, "step").and_then(|step| {
                let known = step < steps as u64;
                if !known {
                    self.problems.push(TraceError::StepOutOfRange { file: path.clone(), step, steps });
                }
                known.then_some(StepId(step as u32))
            });
            let branch = self.text(&fields, "branch").and_then(|name| {
                let branch = manifest.branches.iter().position(|b| b == name);
                if branch.is_none() {
                    self.problems.push(TraceError::UnknownBranch { file: path.clone(), branch: name.into() });
                }
                branch
            });
            let (Some(prompt), Some(step), Some(branch)) = (prompt, step, branch) else { continue };
            if let Some(first) = places.get(&(prompt, step.0, branch)) {
                self.problems.push(TraceError::DuplicateShard {
                    file: path,
                    first: first.clone(),
                    prompt: manifest.prompts[prompt].id.clone(),
                    step,
                    branch: manifest.branches[branch].clone(),
                });
                continue;
            }
            places.insert((prompt, step.0, branch), path);
            // What is in a file listed twice is looked at once.
            if let Some(file) = file
                && !listed
            {
                manifest.shards.push(Shard { file, prompt, step, branch });
            }
        }
        // Coverage counts every entry that says where it belongs, so that one bad entry is reported once.
        for (b, branch) in manifest.branches.iter().enumerate() {
            let covered: Vec<StepId> = (0..manifest.sigmas.len() as u32)
                .filter(|&s| (0..manifest.prompts.len()).any(|p| places.contains_key(&(p, s, b))))
                .map(StepId)
                .collect();
            if covered.is_empty() {
                self.problems.push(TraceError::NoShards { branch: branch.clone() });
            }
            for (p, prompt) in manifest.prompts.iter().enumerate() {
                for &step in covered.iter().filter(|s| !places.contains_key(&(p, s.0, b))) {
                    self.problems.push(TraceError::MissingShard {
                        prompt: prompt.id.clone(),
                        step,
                        branch: branch.clone(),
                    });
                }
            }
        }
        Some(())
    }

    /// One of a few words.
    fn word<T: Copy, W: AsRef<str>>(
        &mut self,
        fields: &Fields<'_>,
        name: &'static str,
        allowed: &'static str,
        words: &[(W, T)],
    ) -> Option<T> {
        let found = self.text(fields, name)?;
        let value = words.iter().find(|(word, _)| word.as_ref() == found).map(|&(_, value)| value);
        if value.is_none() {
            self.problems.push(TraceError::UnknownWord { field: fields.path(name), found: found.into(), allowed });
        }
        value
    }
}

//! A folder with sound input of every kind, and ways to spoil it.
//!
//! ```text
//! trace/      a planted trace                in/    spec.yaml, masks, bundle, qkv
//! out/        where results would go         tmp/   TMPDIR and HOME of the command
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use calibc_ir::{Geometry, Model};
use calibc_trace::planted::Planted;
use calibc_trace::{Encoding, MANIFEST};
use serde_json::{Map, Value, json};

use crate::parts::{Parts, sample};
use crate::support::{Bench, Ended, ended};

/// The shard that cases spoil.
pub(crate) const SHARD: &str = "p001/s001.cond.safetensors";
/// The tensor that cases spoil: [2 heads, 3, 3] blocks.
pub(crate) const ENERGY: &str = "layers.1.block_energy";

/// How long a command may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Files by name.
type Files = Vec<(PathBuf, Vec<u8>)>;

pub(crate) struct Folder {
    bench: Bench,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let bench = Bench::bare();
        for name in ["in", "out", "tmp"] {
            fs::create_dir(bench.path(name)).unwrap();
        }
        Self { bench }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.bench.path(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Runs `calibc` with these arguments, which stand between blanks.
    pub(crate) fn run(&self, args: &str) -> Ended {
        let mut command = self.bench.command(&args.split(' ').collect::<Vec<_>>());
        if let Some(nvrtc) = crate::nvrtc() {
            command.env("CALIBC_NVRTC", nvrtc);
        }
        command.env("TMPDIR", self.path("tmp")).env("HOME", self.path("tmp")).env("RUST_BACKTRACE", "0");
        // Into files, so that nobody has to read while it runs: malformed input must not keep anyone waiting.
        let [mut stdout, mut stderr] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
        let mut child = command.spawn().unwrap();
        let start = Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    panic!("`calibc {args}` hangs");
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let [stdout, stderr] = [&mut stdout, &mut stderr].map(|file| {
            let mut text = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut text).unwrap();
            text
        });
        ended(Output { status, stdout, stderr })
    }

    /// Every file and what it holds, every link and where it leads.
    pub(crate) fn everything(&self) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.path("")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let kind = path.symlink_metadata().unwrap().file_type();
                let what = if kind.is_symlink() {
                    format!("link to {}", fs::read_link(&path).unwrap().display())
                } else if kind.is_dir() {
                    folders.push(path.clone());
                    "folder".to_owned()
                } else if kind.is_file() {
                    blake3::hash(&fs::read(&path).unwrap()).to_hex().to_string()
                } else {
                    "something else".to_owned()
                };
                found.insert(path, what);
            }
        }
        found
    }

    /// A sound trace: 2 layers, 2 heads, 3 blocks, 2 prompts and 1 held out, 1 of 2 steps, every optional tensor.
    pub(crate) fn trace(&self) -> Trace {
        self.trace_of(Encoding::Log2U8)
    }

    pub(crate) fn trace_of(&self, encoding: Encoding) -> Trace {
        for (name, bytes) in planted(encoding) {
            let path = self.path("trace").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        Trace { dir: self.path("trace") }
    }

    /// A sound trace, and this spec.
    pub(crate) fn spec(&self, text: &str) {
        self.trace();
        self.write("in/spec.yaml", text.as_bytes());
    }

    /// Masks of the trace's sites as they are exported, spoilt.
    pub(crate) fn masks(&self, edit: impl FnOnce(&mut Tensors)) {
        let mut tensors = Tensors(BTreeMap::new());
        for (step, layer) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            // Two heads of 3 x 3 blocks: lower triangle, and everything.
            let mask = [1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
            tensors.put(&format!("s{step}.l{layer}"), "U8", &[2, 3, 3], &mask);
            tensors.put(&format!("s{step}.l{layer}.op"), "U8", &[2], &[1, 0]);
        }
        edit(&mut tensors);
        self.write("in/masks", &tensors.file());
    }

    /// A sound bundle with every kind of payload, spoilt beneath right digests. Its q, k and v are [1, 3, 670, head_dim].
    pub(crate) fn bundle(&self, edit: impl FnOnce(&mut Parts)) {
        let mut parts = Parts::of(bundle_bytes());
        edit(&mut parts);
        self.write("in/bundle", &parts.build());
    }

    /// The sound bundle's bytes, spoilt.
    pub(crate) fn bundle_file(&self, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = bundle_bytes().to_vec();
        edit(&mut bytes);
        self.write("in/bundle", &bytes);
    }

    /// Tensors that fit the bundle, spoilt.
    pub(crate) fn qkv(&self, edit: impl FnOnce(&mut Tensors)) {
        let plan = sample().plan;
        let shape = [1, plan.model.heads, plan.geometry.q_tokens(), plan.model.head_dim].map(u64::from);
        let zeros = vec![0; 2 * shape.iter().product::<u64>() as usize];
        let mut tensors = Tensors(BTreeMap::new());
        for name in ["q", "k", "v"] {
            tensors.put(name, "BF16", &shape, &zeros);
        }
        edit(&mut tensors);
        self.write("in/qkv", &tensors.file());
    }
}

fn bundle_bytes() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| sample().encode())
}

/// Files of the planted trace, by name.
fn planted(encoding: Encoding) -> &'static [(PathBuf, Vec<u8>)] {
    static FILES: [OnceLock<Files>; 3] = [const { OnceLock::new() }; 3];
    let slot = match encoding {
        Encoding::Log2U8 => 0,
        Encoding::F16 => 1,
        Encoding::F32 => 2,
    };
    FILES[slot].get_or_init(|| {
        let root = tempfile::tempdir().unwrap();
        let planted = Planted {
            model: Model { name: "specimen".into(), layers: 2, heads: 2, head_dim: 64 },
            geometry: Geometry::video(2, 8, 20),
            num_steps: 2,
            covered: vec![1],
            calibration: 2,
            holdout: 1,
            deviation: true,
            encoding,
            ..Planted::default()
        };
        planted.write(root.path()).unwrap();
        let mut files = Files::new();
        for folder in ["", "p000", "p001", "p002"] {
            for entry in fs::read_dir(root.path().join(folder)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    files.push((path.strip_prefix(root.path()).unwrap().to_owned(), fs::read(&path).unwrap()));
                }
            }
        }
        assert_eq!(files.len(), 4);
        files
    })
}

/// A trace to spoil.
pub(crate) struct Trace {
    dir: PathBuf,
}

impl Trace {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn manifest(&self, edit: impl FnOnce(&mut Value)) {
        let mut manifest: Value = serde_json::from_slice(&fs::read(self.path(MANIFEST)).unwrap()).unwrap();
        edit(&mut manifest);
        fs::write(self.path(MANIFEST), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    }

    /// Replaces the manifest's bytes.
    pub(crate) fn raw_manifest(&self, edit: impl FnOnce(&[u8]) -> Vec<u8>) {
        let bytes = edit(&fs::read(self.path(MANIFEST)).unwrap());
        fs::write(self.path(MANIFEST), bytes).unwrap();
    }

    /// Replaces the first `from` in the manifest.
    pub(crate) fn text(&self, from: &str, to: &str) {
        self.raw_manifest(|bytes| {
            let text = std::str::from_utf8(bytes).unwrap();
            assert!(text.contains(from), "{from}: {text}");
            text.replacen(from, to, 1).into_bytes()
        });
    }

    /// Rewrites the shard: the manifest still tells of the old one.
    pub(crate) fn damage(&self, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(SHARD)).unwrap();
        edit(&mut bytes);
        fs::write(self.path(SHARD), bytes).unwrap();
    }

    /// Rewrites the shard and lists its new size and digest: only its content is wrong.
    pub(crate) fn shard(&self, edit: impl FnOnce(&mut Vec<u8>)) {
        self.damage(edit);
        let bytes = fs::read(self.path(SHARD)).unwrap();
        self.manifest(|m| {
            let shards = m["shards"].as_array_mut().unwrap();
            let shard = shards.iter_mut().find(|s| s["path"] == SHARD).unwrap();
            shard["bytes"] = bytes.len().into();
            shard["blake3"] = blake3::hash(&bytes).to_string().into();
        });
    }

    /// Edits the header of the shard.
    pub(crate) fn header(&self, edit: impl FnOnce(&mut Value)) {
        self.shard(|bytes| {
            let (mut header, data) = split(bytes);
            edit(&mut header);
            *bytes = join(&serde_json::to_vec(&header).unwrap(), &data);
        });
    }

    /// Overwrites bytes of a tensor of the shard, from its byte `at`.
    pub(crate) fn tensor(&self, tensor: &str, at: usize, value: &[u8]) {
        self.shard(|bytes| {
            let (header, data) = split(bytes);
            let start = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
            let start = bytes.len() - data.len() + start + at;
            bytes[start..start + value.len()].copy_from_slice(value);
        });
    }

    /// Adds a sensitivity file with these bytes.
    pub(crate) fn sensitivity(&self, bytes: &[u8]) {
        fs::write(self.path("sensitivity.safetensors"), bytes).unwrap();
        let digest = blake3::hash(bytes).to_string();
        self.manifest(|m| m["sensitivity"] = json!({ "path": "sensitivity.safetensors", "blake3": digest }));
    }

    /// Moves a file of the trace out of it and leaves a link.
    pub(crate) fn link_out(&self, name: &str) {
        let outside = self.dir.with_file_name("outside");
        fs::rename(self.path(name), &outside).unwrap();
        link(&outside, &self.path(name));
    }
}

pub(crate) fn link(to: &Path, at: &Path) {
    std::os::unix::fs::symlink(to, at).unwrap();
}

pub(crate) fn pipe(at: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(at).status().unwrap().success());
}

pub(crate) fn split(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

pub(crate) fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A header whose tensors end 8 bytes short of 2^64: a reader that adds the header's length wraps around.
pub(crate) fn wrapping() -> Vec<u8> {
    let mut header = Map::new();
    let mut at = 0u64;
    for i in 0..9 {
        let size = (u64::MAX - 7 - at).min((1 << 61) - 1);
        header.insert(format!("t{i}"), json!({ "dtype": "U8", "shape": [size], "data_offsets": [at, at + size] }));
        at += size;
    }
    join(&serde_json::to_vec(&header).unwrap(), &[0; 64])
}

/// Content of a safetensors file: element type, shape and bytes by name.
pub(crate) struct Tensors(pub(crate) BTreeMap<String, (&'static str, Vec<u64>, Vec<u8>)>);

impl Tensors {
    pub(crate) fn put(&mut self, name: &str, dtype: &'static str, shape: &[u64], bytes: &[u8]) {
        self.0.insert(name.to_owned(), (dtype, shape.to_vec(), bytes.to_vec()));
    }

    pub(crate) fn get(&mut self, name: &str) -> &mut (&'static str, Vec<u64>, Vec<u8>) {
        self.0.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub(crate) fn file(&self) -> Vec<u8> {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in &self.0 {
            let start = data.len();
            data.extend_from_slice(bytes);
            header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] }));
        }
        join(&serde_json::to_vec(&header).unwrap(), &data)
    }
}

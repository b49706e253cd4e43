//! Traces with one thing wrong each: every kind of problem is its own error, and none is a panic.

use std::fs;
use std::path::PathBuf;

use calibc_ir::{Geometry, GeometryError, HeadId, LayerId, Model, StepId};
use calibc_trace::planted::Planted;
use calibc_trace::{Encoding, MANIFEST, Split, Trace, TraceError, check};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A good trace, and ways to spoil it.
struct Specimen {
    root: TempDir,
}

impl Specimen {
    fn new(planted: &Planted) -> Self {
        let root = tempfile::tempdir().unwrap();
        planted.write(&root.path().join("trace")).unwrap();
        let specimen = Self { root };
        assert!(specimen.problems().is_empty(), "the specimen starts out good");
        specimen
    }

    /// 3 blocks, 2 prompts + 1 held out, 1 of 2 steps, every optional tensor.
    fn of(encoding: Encoding) -> Self {
        Self::new(&Planted { encoding, ..small() })
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join("trace")
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    fn manifest(self, edit: impl FnOnce(&mut Value)) -> Self {
        let path = self.path(MANIFEST);
        let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut manifest);
        fs::write(path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
        self
    }

    fn text(self, from: &str, to: &str) -> Self {
        let text = fs::read_to_string(self.path(MANIFEST)).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(self.path(MANIFEST), text.replacen(from, to, 1)).unwrap();
        self
    }

    /// Rewrites a shard and lists its new size and digest: only its content is wrong.
    fn shard(self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = fs::read(self.path(file)).unwrap();
        edit(&mut bytes);
        fs::write(self.path(file), &bytes).unwrap();
        self.manifest(|m| {
            let shards = m["shards"].as_array_mut().unwrap();
            let shard = shards.iter_mut().find(|s| s["path"] == file).unwrap();
            shard["bytes"] = bytes.len().into();
            shard["blake3"] = blake3::hash(&bytes).to_string().into();
        })
    }

    fn header(self, file: &str, edit: impl FnOnce(&mut Value)) -> Self {
        self.shard(file, |bytes| {
            let (mut header, data) = split(bytes);
            edit(&mut header);
            *bytes = join(&serde_json::to_vec(&header).unwrap(), &data);
        })
    }

    /// Overwrites bytes of a tensor, from its byte `at`.
    fn tensor(self, file: &str, tensor: &str, at: usize, value: &[u8]) -> Self {
        self.shard(file, |bytes| {
            let (header, data) = split(bytes);
            let start = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
            let start = bytes.len() - data.len() + start + at;
            bytes[start..start + value.len()].copy_from_slice(value);
        })
    }

    fn problems(&self) -> Vec<TraceError> {
        check(&self.dir(), &|_, _| ())
    }

    /// The only problem; opening must fail with the same one.
    fn problem(&self) -> TraceError {
        let problems = self.problems();
        let opened = Trace::open(&self.dir(), &|_, _| ()).expect_err("opening fails");
        assert_eq!(problems.len(), 1, "{problems:#?}");
        let problem = problems.into_iter().next().unwrap();
        assert_eq!(problem.to_string(), opened.to_string());
        problem
    }
}

fn split(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

fn small() -> Planted {
    Planted {
        model: Model { name: "specimen".into(), layers: 2, heads: 2, head_dim: 64 },
        geometry: Geometry::video(2, 8, 20),
        num_steps: 2,
        covered: vec![1],
        calibration: 2,
        holdout: 1,
        deviation: true,
        ..Planted::default()
    }
}

const SHARD: &str = "p001/s001.cond.safetensors";
const ENERGY: &str = "layers.1.block_energy";

/// The problem matches the pattern, and what a person reads names `$word`.
macro_rules! expect {
    ($specimen:expr, $pattern:pat $(if $guard:expr)?, $word:expr) => {{
        let problem = $specimen.problem();
        assert!(matches!(&problem, $pattern $(if $guard)?), "{problem:#?}");
        let text = problem.to_string();
        assert!(text.contains($word), "{text:?} names {:?}", $word);
        assert!(!text.ends_with('.') && !text.contains('\n'), "{text:?}");
    }};
}

fn good() -> Specimen {
    Specimen::of(Encoding::Log2U8)
}

#[test]
fn folders_that_are_no_trace() {
    let empty = Specimen { root: tempfile::tempdir().unwrap() };
    assert!(matches!(empty.problem(), TraceError::Io { .. }));
    assert!(empty.problem().is_io());
    fs::create_dir(empty.dir()).unwrap();
    expect!(empty, TraceError::NotATrace { .. }, "manifest.json");
    let file = Specimen { root: tempfile::tempdir().unwrap() };
    fs::write(file.dir(), "x").unwrap();
    expect!(file, TraceError::NotATrace { .. }, "is not a trace");
}

#[test]
fn manifests_that_cannot_be_read() {
    let big = good();
    fs::File::options().write(true).open(big.path(MANIFEST)).unwrap().set_len(33 << 20).unwrap();
    expect!(big, TraceError::ManifestTooLarge { bytes, .. } if *bytes == 33 << 20, "34603008");
    let cut = good();
    let text = fs::read(cut.path(MANIFEST)).unwrap();
    fs::write(cut.path(MANIFEST), &text[..text.len() / 2]).unwrap();
    expect!(cut, TraceError::Json { .. }, "line");
    fs::write(cut.path(MANIFEST), b"\xff\xfe{}").unwrap();
    expect!(cut, TraceError::Json { .. }, "not valid JSON");
    fs::write(cut.path(MANIFEST), "[".repeat(1 << 20)).unwrap();
    expect!(cut, TraceError::Json { .. }, "recursion");
    fs::write(cut.path(MANIFEST), "[]").unwrap();
    expect!(cut, TraceError::FieldType { .. }, "the document");
}

#[test]
fn other_formats_and_versions() {
    expect!(good().manifest(|m| m["format"] = json!("gguf")), TraceError::WrongFormat { .. }, "gguf");
    // A later version may have any fields: its version is all there is to say about it.
    let later = good().manifest(|m| *m = json!({"format": "calibc-trace", "version": 2, "tensors": []}));
    expect!(later, TraceError::UnsupportedVersion { found: 2 }, "version 2");
}

#[test]
fn fields_that_are_unknown_repeated_missing_or_of_the_wrong_type() {
    expect!(good().manifest(|m| m["sigma"] = json!(1)), TraceError::UnknownField { .. }, "`sigma`");
    let deep = good().manifest(|m| m["prompts"][1]["spilt"] = json!("holdout"));
    expect!(deep, TraceError::UnknownField { .. }, "`prompts[1].spilt`");
    let twice = good().text("\"head_dim\": 64", "\"head_dim\": 64, \"head_dim\": 128");
    expect!(twice, TraceError::DuplicateField { .. }, "`model.head_dim`");
    let missing = good().manifest(|m| drop(m["shards"][2].as_object_mut().unwrap().remove("bytes")));
    expect!(missing, TraceError::MissingField { .. }, "`shards[2].bytes`");
    for wrong in [json!("8"), json!(-1), json!(1.5), json!(1u64 << 32), json!(null), json!([8])] {
        expect!(good().manifest(|m| m["model"]["layers"] = wrong), TraceError::FieldType { .. }, "`model.layers`");
    }
    let overflow = good().text("\"index\": 0", "\"index\": 99999999999999999999999");
    expect!(overflow, TraceError::FieldType { .. }, "`steps[0].index`");
    let tile = good().manifest(|m| m["layout"] = json!({"tile": [2, 8]}));
    expect!(tile, TraceError::FieldType { .. }, "`layout.tile`");
}

#[test]
fn words_numbers_and_lists_that_make_no_sense() {
    for (field, word) in [("energy_encoding", "log2-u4"), ("layout", "hilbert")] {
        expect!(good().manifest(|m| m[field] = json!(word)), TraceError::UnknownWord { .. }, word);
    }
    expect!(good().manifest(|m| m["prompts"][0]["split"] = json!("train")), TraceError::UnknownWord { .. }, "train");
    for field in ["layers", "heads", "head_dim"] {
        expect!(good().manifest(|m| m["model"][field] = json!(0)), TraceError::Empty { .. }, field);
    }
    let zero = good().manifest(|m| m["geometry"]["width"] = json!(0));
    expect!(zero, TraceError::Geometry(GeometryError::Zero { .. }), "width");
    let huge = good().manifest(|m| {
        for side in ["frames", "height", "width"] {
            m["geometry"][side] = json!(u32::MAX);
        }
    });
    expect!(huge, TraceError::Geometry(GeometryError::TooManyTokens { .. }), "4294967295");
    let text = good().manifest(|m| m["geometry"]["text_tokens"] = json!(7));
    expect!(text, TraceError::Geometry(GeometryError::Text { .. }), "text_tokens");
    let blocks = good().manifest(|m| m["blocks"]["kv"] = json!(64));
    expect!(blocks, TraceError::UnsupportedBlocks { q: 128, kv: 64 }, "128x64");
    let sites = good().manifest(|m| m["model"]["layers"] = json!(u32::MAX));
    expect!(sites, TraceError::TooManySites { .. }, "4294967295 layers");
    let order = good().manifest(|m| m["steps"][1]["index"] = json!(2));
    expect!(order, TraceError::StepOrder { position: 1, found: 2 }, "steps[1]");
    let sigma = good().manifest(|m| m["steps"][1]["sigma"] = json!(-0.5));
    expect!(sigma, TraceError::BadSigma { position: 1, .. }, "-0.5");
    let anchors = good().manifest(|m| m["anchor_counts"] = json!([9]));
    expect!(anchors, TraceError::AnchorCount { count: 9, height: 8 }, "8 rows");
}

#[test]
fn names_that_are_taken_or_lead_elsewhere() {
    let name = good().manifest(|m| m["branches"] = json!(["cond", "../uncond"]));
    assert!(matches!(name.problems()[0], TraceError::BadName { .. }));
    let twice = good().manifest(|m| m["anchor_counts"] = json!([5, 5]));
    assert!(matches!(twice.problems()[0], TraceError::DuplicateName { field: "anchor_counts", .. }));
    let prompts = good().manifest(|m| {
        let first = m["prompts"][0].clone();
        m["prompts"].as_array_mut().unwrap().push(first);
    });
    assert!(matches!(prompts.problems()[0], TraceError::DuplicateName { field: "prompts", .. }));
    let held_out = good().manifest(|m| {
        for p in 0..3 {
            m["prompts"][p]["split"] = json!("holdout");
        }
    });
    expect!(held_out, TraceError::NoCalibrationPrompt, "calibration");
}

#[test]
fn shards_that_belong_nowhere_or_twice_or_are_missing() {
    let edit = |shard: usize, field: &str, value: Value| good().manifest(|m| m["shards"][shard][field] = value);
    // The place such a shard leaves is missing too: both are said, in order.
    let pair = |specimen: Specimen| -> [TraceError; 2] { specimen.problems().try_into().unwrap() };
    assert!(matches!(
        pair(edit(1, "prompt", json!("p009"))),
        [TraceError::UnknownPrompt { .. }, TraceError::MissingShard { .. }]
    ));
    assert!(matches!(
        pair(edit(1, "branch", json!("uncond"))),
        [TraceError::UnknownBranch { .. }, TraceError::MissingShard { .. }]
    ));
    assert!(matches!(
        pair(edit(1, "step", json!(2))),
        [TraceError::StepOutOfRange { step: 2, .. }, TraceError::MissingShard { .. }]
    ));
    assert!(matches!(
        pair(edit(1, "prompt", json!("p000"))),
        [TraceError::DuplicateShard { .. }, TraceError::MissingShard { .. }]
    ));
    expect!(edit(1, "path", json!("p000/s001.cond.safetensors")), TraceError::DuplicateFile { .. }, "p000/s001");
    let gone = good().manifest(|m| drop(m["shards"].as_array_mut().unwrap().remove(2)));
    expect!(gone, TraceError::MissingShard { .. }, "prompt `p002` has no shard for s1");
    // One prompt covers a step that the others do not.
    let uneven = good().manifest(|m| {
        let mut extra = m["shards"][0].clone();
        extra["step"] = json!(0);
        extra["path"] = json!("p000/s000.cond.safetensors");
        m["shards"].as_array_mut().unwrap().push(extra);
    });
    fs::copy(uneven.path("p000/s001.cond.safetensors"), uneven.path("p000/s000.cond.safetensors")).unwrap();
    let missing = |p: &TraceError| matches!(p, TraceError::MissingShard { step: StepId(0), .. });
    assert!(uneven.problems().len() == 2 && uneven.problems().iter().all(missing));
    let none = good().manifest(|m| m["shards"] = json!([]));
    expect!(none, TraceError::NoShards { .. }, "`cond`");
    let branch = good().manifest(|m| m["branches"] = json!(["cond", "uncond"]));
    expect!(branch, TraceError::NoShards { .. }, "`uncond`");
}

#[test]
fn paths_out_of_the_folder() {
    for path in ["../p000.safetensors", "/etc/passwd", "p000/../../x", "", "p000\\x", "./x", "p000//x"] {
        let escape = good().manifest(|m| m["shards"][0]["path"] = json!(path));
        expect!(escape, TraceError::UnsafePath { .. }, "plain relative path");
    }
    let sensitivity = good().manifest(|m| m["sensitivity"] = json!({"path": "../s", "blake3": "0".repeat(64)}));
    expect!(sensitivity, TraceError::UnsafePath { .. }, "../s");
}

#[cfg(unix)]
#[test]
fn links_out_of_the_folder_and_things_that_are_not_files() {
    use std::os::unix::fs::symlink;
    for link in [SHARD, MANIFEST, "p001"] {
        let trace = good();
        let outside = trace.root.path().join("outside");
        fs::rename(trace.path(link), &outside).unwrap();
        symlink(&outside, trace.path(link)).unwrap();
        expect!(trace, TraceError::LinkEscapes { .. }, if link == MANIFEST { MANIFEST } else { SHARD });
    }
    // A link that stays inside is as good as the file.
    let inside = good();
    fs::rename(inside.path(SHARD), inside.path("elsewhere")).unwrap();
    symlink(inside.path("elsewhere"), inside.path(SHARD)).unwrap();
    assert!(inside.problems().is_empty());
    let folder = good();
    fs::remove_file(folder.path(SHARD)).unwrap();
    fs::create_dir(folder.path(SHARD)).unwrap();
    expect!(folder, TraceError::NotAFile { .. }, SHARD);
    // Opening a pipe would wait for ever.
    let pipe = good();
    fs::remove_file(pipe.path(SHARD)).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(pipe.path(SHARD)).status().unwrap().success());
    expect!(pipe, TraceError::NotAFile { .. }, SHARD);
    let looped = good();
    fs::remove_file(looped.path(SHARD)).unwrap();
    symlink(looped.path(SHARD), looped.path(SHARD)).unwrap();
    expect!(looped, TraceError::Io { .. }, "s001.cond");
}

#[test]
fn files_that_are_missing_or_damaged() {
    let gone = good();
    fs::remove_file(gone.path(SHARD)).unwrap();
    expect!(gone, TraceError::FileMissing { .. }, SHARD);
    let gone = good();
    fs::remove_dir_all(gone.path("p001")).unwrap();
    expect!(gone, TraceError::FileMissing { .. }, SHARD);
    for size in [0, 1, 7, 100] {
        let cut = good();
        fs::File::options().write(true).open(cut.path(SHARD)).unwrap().set_len(size).unwrap();
        expect!(cut, TraceError::SizeMismatch { found, .. } if *found == size, SHARD);
    }
    let flipped = good();
    let mut bytes = fs::read(flipped.path(SHARD)).unwrap();
    let last = bytes.len() - 1;
    // The lowest bit of a deviation: nothing else could tell.
    bytes[last] ^= 1;
    fs::write(flipped.path(SHARD), bytes).unwrap();
    expect!(flipped, TraceError::DigestMismatch { .. }, SHARD);
    let digest = good().manifest(|m| m["shards"][1]["blake3"] = json!("abc"));
    expect!(digest, TraceError::BadDigest { .. }, "abc");
    let bytes = good().manifest(|m| m["shards"][1]["bytes"] = json!(u64::MAX));
    expect!(bytes, TraceError::SizeMismatch { .. }, "18446744073709551615");
}

#[test]
fn headers_that_lie() {
    for length in [u64::MAX, 1 << 40, (4 << 20) + 1] {
        let huge = good().shard(SHARD, |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()));
        expect!(huge, TraceError::HeaderTooLarge { .. }, SHARD);
    }
    let past = good().shard(SHARD, |bytes| bytes[..8].copy_from_slice(&(4u64 << 20).to_le_bytes()));
    expect!(past, TraceError::HeaderTruncated { .. }, SHARD);
    expect!(good().shard(SHARD, |bytes| bytes.truncate(5)), TraceError::HeaderTruncated { .. }, SHARD);
    expect!(good().shard(SHARD, Vec::clear), TraceError::HeaderTruncated { .. }, SHARD);
    expect!(good().shard(SHARD, |bytes| bytes[8] = b'x'), TraceError::BadHeader { .. }, SHARD);
    let overlap = good().header(SHARD, |h| h[ENERGY]["data_offsets"][0] = json!(0));
    expect!(overlap, TraceError::BadHeader { .. }, "offset");
    let overflow = good().header(SHARD, |h| h[ENERGY]["shape"] = json!([1u64 << 63, 1u64 << 63, 4]));
    expect!(overflow, TraceError::BadHeader { .. }, "overflow");
    let dtype = good().header(SHARD, |h| h[ENERGY]["dtype"] = json!("Q4"));
    expect!(dtype, TraceError::BadHeader { .. }, "Q4");
    expect!(good().shard(SHARD, |bytes| bytes.truncate(bytes.len() - 1)), TraceError::DataLength { .. }, SHARD);
    expect!(good().shard(SHARD, |bytes| bytes.push(0)), TraceError::DataLength { .. }, SHARD);
    // Nine tensors of 2^61 - 1 bytes, the last of them ending at 2^64 - 8: adding the header's length would overflow.
    let wrapping = good().shard(SHARD, |bytes| {
        let mut header = serde_json::Map::new();
        let mut at = 0u64;
        for i in 0..9 {
            let size = (u64::MAX - 7 - at).min((1 << 61) - 1);
            header.insert(format!("t{i}"), json!({"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}));
            at += size;
        }
        *bytes = join(&serde_json::to_vec(&header).unwrap(), &[0; 64]);
    });
    expect!(wrapping, TraceError::DataLength { expected, .. } if *expected == u64::MAX - 7, SHARD);
}

#[test]
fn tensors_that_are_missing_unknown_or_of_the_wrong_kind() {
    let renamed = good().header(SHARD, |h| {
        let header = h.as_object_mut().unwrap();
        let tensor = header.remove(ENERGY).unwrap();
        header.insert("layers.01.block_energy".into(), tensor);
    });
    let [missing, unknown] = <[TraceError; 2]>::try_from(renamed.problems()).unwrap();
    assert!(matches!(missing, TraceError::MissingTensor { tensor, .. } if tensor == ENERGY));
    assert!(matches!(unknown, TraceError::UnknownTensor { tensor, .. } if tensor == "layers.01.block_energy"));
    let dtype = good().header(SHARD, |h| h[ENERGY]["dtype"] = json!("I8"));
    expect!(dtype, TraceError::TensorType { expected: "U8", .. }, "is I8, must be U8");
    let encoding = good().manifest(|m| m["energy_encoding"] = json!("f16"));
    let types = |p: &TraceError| matches!(p, TraceError::TensorType { .. });
    assert!(encoding.problems().len() == 12 && encoding.problems().iter().all(types));
    let shape = good().header(SHARD, |h| h[ENERGY]["shape"] = json!([3, 2, 3]));
    expect!(shape, TraceError::TensorShape { .. }, "[3, 2, 3], must be [2, 3, 3]");
    let anchors = good().manifest(|m| m["anchor_counts"] = json!([2, 5]));
    assert!(anchors.problems().iter().all(|p| matches!(p, TraceError::TensorShape { .. })));
}

#[test]
fn values_that_no_attention_has() {
    let singles =
        |tensor: &str, at: usize, v: f32| Specimen::of(Encoding::F32).tensor(SHARD, tensor, at * 4, &v.to_le_bytes());
    let halves = |at: usize, bits: u16| Specimen::of(Encoding::F16).tensor(SHARD, ENERGY, at * 2, &bits.to_le_bytes());
    // Element 13 of [2, 3, 3] is head 1, row 1, column 1.
    let place = "`layers.1.block_energy` is NaN at head 1, row 1, column 1";
    expect!(singles(ENERGY, 13, f32::NAN), TraceError::NotANumber { .. }, place);
    expect!(halves(13, 0x7e00), TraceError::NotANumber { .. }, place);
    expect!(singles(ENERGY, 0, f32::INFINITY), TraceError::Infinite { .. }, "head 0, row 0, column 0");
    expect!(halves(0, 0xfc00), TraceError::Infinite { .. }, "infinite");
    expect!(singles(ENERGY, 4, -1e-30), TraceError::Negative { .. }, "head 0, row 1, column 1");
    expect!(halves(4, 0x8001), TraceError::Negative { .. }, "negative");
    expect!(singles(ENERGY, 4, 0.9), TraceError::RowSum { tolerance: 0.001, .. }, "head 0, row 1 sums to");
    expect!(halves(4, 0x3c00), TraceError::RowSum { tolerance: 0.01, .. }, "head 0, row 1 sums to");
    let codes = good().tensor(SHARD, ENERGY, 15, &[255, 255, 255]);
    expect!(codes, TraceError::RowSum { tolerance: 0.06, .. }, "head 1, row 2 sums to 0.000000, must be 1");
    // Many rows with one fault are one problem.
    let all = good().tensor(SHARD, ENERGY, 0, &[255; 18]);
    expect!(all, TraceError::RowSum { .. }, "(and 5 more rows)");
    expect!(singles("layers.0.block_deviation", 2, 1.5), TraceError::AboveOne { .. }, "is 1.5 at head 0, row 0");
    expect!(singles("layers.0.block_deviation", 2, -0.5), TraceError::Negative { .. }, "block_deviation");
    expect!(singles("layers.0.anchor_similarity", 1, f32::NAN), TraceError::NotANumber { .. }, "head 1, column 0");
    expect!(singles("layers.0.anchor_error", 1, -1.0), TraceError::Negative { .. }, "anchor_error");
    // A negative zero is a zero, and a cosine may be negative.
    assert!(singles("layers.0.anchor_similarity", 1, -0.5).problems().is_empty());
    assert!(singles("layers.0.anchor_error", 1, -0.0).problems().is_empty());
}

#[test]
fn sensitivity_files_that_are_wrong() {
    let with = |header: Value, data: &[u8]| {
        let specimen = good();
        let bytes = join(&serde_json::to_vec(&header).unwrap(), data);
        fs::write(specimen.path("sensitivity.safetensors"), &bytes).unwrap();
        let entry = json!({"path": "sensitivity.safetensors", "blake3": blake3::hash(&bytes).to_string()});
        specimen.manifest(|m| m["sensitivity"] = entry)
    };
    let ones = [1f32; 10].map(f32::to_le_bytes).concat();
    let step = json!({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]});
    let head = json!({"dtype": "F32", "shape": [2, 2, 2], "data_offsets": [8, 40]});
    let fine = with(json!({"step": step, "head": head}), &ones);
    let trace = Trace::open(&fine.dir(), &|_, _| ()).unwrap();
    assert_eq!(trace.sensitivity().unwrap().head, [1.0; 8]);
    expect!(with(json!({"step": step}), &ones[..8]), TraceError::MissingTensor { .. }, "`head`");
    let nan = [[f32::NAN; 2].map(f32::to_le_bytes).concat(), ones[8..].to_vec()].concat();
    expect!(with(json!({"step": step, "head": head}), &nan), TraceError::NotANumber { .. }, "sensitivity.safetensors");
    fs::write(fine.path("sensitivity.safetensors"), b"").unwrap();
    assert!(matches!(fine.problems()[0], TraceError::DigestMismatch { .. }));
}

#[test]
fn check_lists_everything_in_order_and_open_stops_at_the_first() {
    let spoilt = good()
        .tensor("p000/s001.cond.safetensors", ENERGY, 0, &[255, 255, 255])
        .header("p002/s001.cond.safetensors", |h| h[ENERGY]["dtype"] = json!("I8"))
        .manifest(|m| {
            m["note"] = json!("hello");
            m["steps"][0]["sigma"] = json!(-1);
            m["shards"][1]["blake3"] = json!("0".repeat(64));
        });
    let problems = spoilt.problems();
    let first = problems[0].to_string();
    assert!(matches!(
        <[TraceError; 5]>::try_from(problems).unwrap(),
        [
            TraceError::UnknownField { .. },
            TraceError::BadSigma { .. },
            TraceError::RowSum { .. },
            TraceError::DigestMismatch { .. },
            TraceError::TensorType { .. },
        ]
    ));
    assert_eq!(Trace::open(&spoilt.dir(), &|_, _| ()).unwrap_err().to_string(), first);
}

#[test]
fn a_trace_that_changes_after_it_was_opened_is_noticed() {
    let specimen = good();
    let trace = Trace::open(&specimen.dir(), &|_, _| ()).unwrap();
    let read = || trace.energy(Split::Calibration, 1, StepId(1), LayerId(0), HeadId(0));
    read().unwrap();
    let file = fs::File::options().write(true).open(specimen.path(SHARD)).unwrap();
    file.set_len(10).unwrap();
    assert!(matches!(read(), Err(TraceError::Changed { .. })));
    fs::remove_file(specimen.path(SHARD)).unwrap();
    assert!(matches!(read(), Err(TraceError::FileMissing { .. })));
}

#[test]
fn no_flipped_byte_is_a_panic() {
    let tiny = || {
        Specimen::new(&Planted {
            model: Model { name: "t".into(), layers: 1, heads: 1, head_dim: 64 },
            geometry: Geometry::video(1, 8, 20),
            num_steps: 1,
            covered: vec![0],
            calibration: 1,
            holdout: 0,
            ..small()
        })
    };
    let specimen = tiny();
    let manifest = fs::read(specimen.path(MANIFEST)).unwrap();
    for at in 0..manifest.len() {
        let mut bytes = manifest.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(specimen.path(MANIFEST), bytes).unwrap();
        specimen.problems();
    }
    // The shard's header, with a digest that agrees.
    let file = "p000/s000.cond.safetensors";
    let shard = fs::read(tiny().path(file)).unwrap();
    let mut specimen = tiny();
    for at in 0..shard.len() {
        for flip in [1u8 << (at % 8), 0x80] {
            specimen = specimen.shard(file, |bytes| {
                bytes.clone_from(&shard);
                bytes[at] ^= flip;
            });
            specimen.problems();
        }
    }
}

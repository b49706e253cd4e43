//! Malformed traces. `kind` is the name of the [`TraceError`](calibc_trace::TraceError).

use std::fs;

use calibc_trace::Encoding::{F16, F32};
use calibc_trace::MANIFEST;
use serde_json::{Value, json};

use crate::folder::{ENERGY, Folder, SHARD, Trace, join, link, pipe, split, wrapping};
use crate::support::{BAD_INPUT as BAD, IO};
use crate::{Case, case};

/// Sets a field of the first shard's entry.
fn entry(folder: &Folder, field: &str, value: Value) {
    folder.trace().manifest(|m| m["shards"][0][field] = value);
}

fn geometry(folder: &Folder, fields: Value) {
    folder.trace().manifest(|m| {
        for (name, value) in fields.as_object().unwrap() {
            m["geometry"][name] = value.clone();
        }
    });
}

/// Overwrites element `at` of a tensor of an f32 trace.
fn single(folder: &Folder, tensor: &str, at: usize, value: f32) {
    folder.trace_of(F32).tensor(tensor, at * 4, &value.to_le_bytes());
}

fn half(folder: &Folder, at: usize, bits: u16) {
    folder.trace_of(F16).tensor(ENERGY, at * 2, &bits.to_le_bytes());
}

/// A trace with a sensitivity file of right shapes and the values of `edit`.
fn sensitivity(folder: &Folder, edit: impl FnOnce(&mut Vec<f32>)) -> Trace {
    let trace = folder.trace();
    let mut values = vec![1.0; 10];
    edit(&mut values);
    let header = json!({
        "step": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] },
        "head": { "dtype": "F32", "shape": [2, 2, 2], "data_offsets": [8, 40] },
    });
    let data: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
    trace.sensitivity(&join(&serde_json::to_vec(&header).unwrap(), &data));
    trace
}

pub(crate) const CASES: &[Case] = &[
    // The folder and its manifest.
    case("Io", IO, &["trace"], |_| {}),
    case("NotATrace", BAD, &["trace is not a trace", "manifest.json"], |f| fs::create_dir(f.path("trace")).unwrap()),
    case("NotATrace", BAD, &["trace is not a trace"], |f| f.write("trace", b"x")),
    case("Json", BAD, &["manifest.json", "line 1"], |f| f.trace().raw_manifest(|_| Vec::new())),
    case("Json", BAD, &["manifest.json", "line "], |f| f.trace().raw_manifest(|m| m[..m.len() / 2].to_vec())),
    case("Json", BAD, &["manifest.json"], |f| f.trace().raw_manifest(|m| [b"\xff\xfe", m].concat())),
    case("Json", BAD, &["recursion limit"], |f| f.trace().raw_manifest(|_| b"[".repeat(1 << 20))),
    case("Json", BAD, &["trailing characters"], |f| f.trace().raw_manifest(|m| [m, b"{}"].concat())),
    case("Json", BAD, &["line "], |f| f.trace().text("\"sigma\": 1.0", "\"sigma\": NaN")),
    case("Json", BAD, &["number out of range"], |f| f.trace().text("\"sigma\": 1.0", "\"sigma\": 1e999")),
    case("ManifestTooLarge", BAD, &["34603008 bytes"], |f| {
        let file = fs::File::options().write(true).open(f.trace().path(MANIFEST)).unwrap();
        file.set_len(33 << 20).unwrap();
    }),
    case("WrongFormat", BAD, &["`gguf`"], |f| f.trace().manifest(|m| m["format"] = json!("gguf"))),
    case("UnsupportedVersion", BAD, &["version 2"], |f| f.trace().manifest(|m| m["version"] = json!(2))),
    case("UnsupportedVersion", BAD, &["version 0"], |f| f.trace().manifest(|m| m["version"] = json!(0))),
    case("FieldType", BAD, &["the document"], |f| f.trace().raw_manifest(|_| b"[]".to_vec())),
    case("UnknownField", BAD, &["`sigma`"], |f| f.trace().manifest(|m| m["sigma"] = json!(1))),
    case("UnknownField", BAD, &["`shards[0].digest`"], |f| entry(f, "digest", json!("0"))),
    case("DuplicateField", BAD, &["`model.heads`"], |f| f.trace().text("\"heads\": 2", "\"heads\": 2, \"heads\": 2")),
    case("MissingField", BAD, &["`shards[2].bytes`"], |f| {
        f.trace().manifest(|m| drop(m["shards"][2].as_object_mut().unwrap().remove("bytes")));
    }),
    case("MissingField", BAD, &["`geometry`"], |f| {
        f.trace().manifest(|m| drop(m.as_object_mut().unwrap().remove("geometry")));
    }),
    case("FieldType", BAD, &["`model.layers`"], |f| f.trace().manifest(|m| m["model"]["layers"] = json!("8"))),
    case("FieldType", BAD, &["`model.layers`"], |f| f.trace().manifest(|m| m["model"]["layers"] = json!(-1))),
    case("FieldType", BAD, &["`model.heads`", "4294967296"], |f| {
        f.trace().manifest(|m| m["model"]["heads"] = json!(1u64 << 32));
    }),
    case("FieldType", BAD, &["`layout.tile`"], |f| f.trace().manifest(|m| m["layout"] = json!({ "tile": [2, 8] }))),
    case("FieldType", BAD, &["`steps[1].sigma`"], |f| f.trace().manifest(|m| m["steps"][1]["sigma"] = json!("NaN"))),
    case("UnknownWord", BAD, &["`log2-u4`"], |f| f.trace().manifest(|m| m["energy_encoding"] = json!("log2-u4"))),
    case("UnknownWord", BAD, &["`train`"], |f| f.trace().manifest(|m| m["prompts"][0]["split"] = json!("train"))),
    case("UnknownWord", BAD, &["`hilbert`"], |f| f.trace().manifest(|m| m["layout"] = json!("hilbert"))),
    case("Empty", BAD, &["`model.heads`"], |f| f.trace().manifest(|m| m["model"]["heads"] = json!(0))),
    case("Empty", BAD, &["`steps`"], |f| f.trace().manifest(|m| m["steps"] = json!([]))),
    case("Geometry", BAD, &["geometry: width is 0"], |f| geometry(f, json!({ "width": 0 }))),
    case("Geometry", BAD, &["geometry: ", "4294967295"], |f| {
        geometry(f, json!({ "frames": u32::MAX, "height": u32::MAX, "width": u32::MAX }));
    }),
    case("Geometry", BAD, &["geometry: text_tokens is 7"], |f| geometry(f, json!({ "text_tokens": 7 }))),
    case("UnsupportedBlocks", BAD, &["128x64"], |f| f.trace().manifest(|m| m["blocks"]["kv"] = json!(64))),
    case("TooManySites", BAD, &["4294967295 layers"], |f| {
        f.trace().manifest(|m| m["model"]["layers"] = json!(u32::MAX));
    }),
    case("StepOrder", BAD, &["steps[1]"], |f| f.trace().manifest(|m| m["steps"][1]["index"] = json!(2))),
    case("BadSigma", BAD, &["steps[1]", "-0.5"], |f| f.trace().manifest(|m| m["steps"][1]["sigma"] = json!(-0.5))),
    case("BadName", BAD, &["../uncond"], |f| f.trace().manifest(|m| m["branches"][0] = json!("../uncond"))),
    case("DuplicateName", BAD, &["prompts", "p000"], |f| {
        f.trace().manifest(|m| m["prompts"][1]["id"] = json!("p000"));
    }),
    case("AnchorCount", BAD, &["anchor count 9", "8 rows"], |f| {
        f.trace().manifest(|m| m["anchor_counts"] = json!([9]))
    }),
    case("NoCalibrationPrompt", BAD, &["calibration"], |f| {
        f.trace().manifest(|m| (0..3).for_each(|p| m["prompts"][p]["split"] = json!("holdout")));
    }),
    // Shards in the manifest.
    case("UnknownPrompt", BAD, &["p000/s001", "`p009`"], |f| entry(f, "prompt", json!("p009"))),
    case("UnknownBranch", BAD, &["p000/s001", "`uncond`"], |f| entry(f, "branch", json!("uncond"))),
    case("StepOutOfRange", BAD, &["p000/s001", "step 2"], |f| entry(f, "step", json!(2))),
    case("DuplicateShard", BAD, &[SHARD, "p000/s001"], |f| entry(f, "prompt", json!("p001"))),
    case("DuplicateFile", BAD, &[SHARD], |f| entry(f, "path", json!(SHARD))),
    case("NoShards", BAD, &["`cond`"], |f| f.trace().manifest(|m| m["shards"] = json!([]))),
    case("MissingShard", BAD, &["`p002`", "s1"], |f| {
        f.trace().manifest(|m| drop(m["shards"].as_array_mut().unwrap().remove(2)));
    }),
    case("UnsafePath", BAD, &["../p000.safetensors"], |f| entry(f, "path", json!("../p000.safetensors"))),
    case("UnsafePath", BAD, &["p000/../../x"], |f| entry(f, "path", json!("p000/../../x"))),
    case("UnsafePath", BAD, &["/etc/hostname"], |f| entry(f, "path", json!("/etc/hostname"))),
    case("UnsafePath", BAD, &["p000\\\\x"], |f| entry(f, "path", json!("p000\\x"))),
    case("UnsafePath", BAD, &["../s"], |f| {
        f.trace().manifest(|m| m["sensitivity"] = json!({ "path": "../s", "blake3": "0".repeat(64) }));
    }),
    case("BadDigest", BAD, &["p000/s001", "`abc`"], |f| entry(f, "blake3", json!("abc"))),
    // Files.
    case("FileMissing", BAD, &[SHARD], |f| fs::remove_file(f.trace().path(SHARD)).unwrap()),
    case("FileMissing", BAD, &[SHARD], |f| fs::remove_dir_all(f.trace().path("p001")).unwrap()),
    case("LinkEscapes", BAD, &[SHARD], |f| f.trace().link_out(SHARD)),
    case("LinkEscapes", BAD, &[SHARD], |f| f.trace().link_out("p001")),
    case("LinkEscapes", BAD, &[MANIFEST], |f| f.trace().link_out(MANIFEST)),
    case("Io", IO, &["s001.cond"], |f| {
        let shard = f.trace().path(SHARD);
        fs::remove_file(&shard).unwrap();
        link(&shard, &shard);
    }),
    case("NotAFile", BAD, &[SHARD], |f| {
        let shard = f.trace().path(SHARD);
        fs::remove_file(&shard).unwrap();
        fs::create_dir(shard).unwrap();
    }),
    case("NotAFile", BAD, &[SHARD], |f| {
        let shard = f.trace().path(SHARD);
        fs::remove_file(&shard).unwrap();
        pipe(&shard);
    }),
    case("NotAFile", BAD, &[MANIFEST], |f| {
        let manifest = f.trace().path(MANIFEST);
        fs::remove_file(&manifest).unwrap();
        fs::create_dir(manifest).unwrap();
    }),
    case("SizeMismatch", BAD, &[SHARD, "has 0 bytes"], |f| f.trace().damage(Vec::clear)),
    case("SizeMismatch", BAD, &[SHARD, "has 100 bytes"], |f| f.trace().damage(|b| b.truncate(100))),
    case("SizeMismatch", BAD, &[SHARD], |f| f.trace().damage(|b| b.push(0))),
    case("SizeMismatch", BAD, &["18446744073709551615"], |f| entry(f, "bytes", json!(u64::MAX))),
    case("DigestMismatch", BAD, &[SHARD], |f| f.trace().damage(|b| *b.last_mut().unwrap() ^= 1)),
    case("DigestMismatch", BAD, &["p000/s001"], |f| entry(f, "blake3", json!("0".repeat(64)))),
    // Headers.
    case("HeaderTooLarge", BAD, &[SHARD, "18446744073709551615"], |f| f.trace().shard(|b| b[..8].fill(255))),
    case("HeaderTooLarge", BAD, &[SHARD, "1099511627776"], |f| {
        f.trace().shard(|b| b[..8].copy_from_slice(&(1u64 << 40).to_le_bytes()));
    }),
    case("HeaderTruncated", BAD, &[SHARD], |f| {
        f.trace().shard(|b| b[..8].copy_from_slice(&(1u64 << 22).to_le_bytes()))
    }),
    case("HeaderTruncated", BAD, &[SHARD], |f| f.trace().shard(|b| b.truncate(5))),
    case("HeaderTruncated", BAD, &[SHARD], |f| f.trace().shard(Vec::clear)),
    case("BadHeader", BAD, &[SHARD], |f| f.trace().shard(|b| b[8] = b'x')),
    case("BadHeader", BAD, &[SHARD], |f| f.trace().header(|h| h[ENERGY]["data_offsets"][0] = json!(0))),
    case("BadHeader", BAD, &[SHARD], |f| f.trace().header(|h| h[ENERGY]["shape"] = json!([1u64 << 63, 1u64 << 63, 4]))),
    case("BadHeader", BAD, &[SHARD, "Q4"], |f| f.trace().header(|h| h[ENERGY]["dtype"] = json!("Q4"))),
    case("DataLength", BAD, &[SHARD], |f| f.trace().shard(|b| b.truncate(b.len() - 1))),
    case("DataLength", BAD, &[SHARD], |f| f.trace().shard(|b| b.push(0))),
    case("DataLength", BAD, &[SHARD, "18446744073709551608"], |f| f.trace().shard(|b| *b = wrapping())),
    // Tensors.
    case("MissingTensor", BAD, &[SHARD, ENERGY], |f| {
        f.trace().shard(|bytes| {
            // All but the last tensor of the file keeps its place.
            let (mut header, mut data) = split(bytes);
            let tensors = header.as_object_mut().unwrap();
            let span = tensors.remove(ENERGY).unwrap()["data_offsets"].clone();
            let [start, end] = [0, 1].map(|i| span[i].as_u64().unwrap());
            data.drain(start as usize..end as usize);
            for (_, info) in tensors.iter_mut().filter(|(name, _)| *name != "__metadata__") {
                for i in 0..2 {
                    let at = info["data_offsets"][i].as_u64().unwrap();
                    info["data_offsets"][i] = json!(if at >= end { at - (end - start) } else { at });
                }
            }
            *bytes = join(&serde_json::to_vec(&header).unwrap(), &data);
        });
    }),
    case("UnknownTensor", BAD, &[SHARD, "layers.2.block_energy"], |f| {
        f.trace().shard(|bytes| {
            let (mut header, mut data) = split(bytes);
            let at = data.len();
            data.push(0);
            header["layers.2.block_energy"] = json!({ "dtype": "U8", "shape": [1], "data_offsets": [at, at + 1] });
            *bytes = join(&serde_json::to_vec(&header).unwrap(), &data);
        });
    }),
    case("TensorType", BAD, &[SHARD, ENERGY, "I8", "U8"], |f| f.trace().header(|h| h[ENERGY]["dtype"] = json!("I8"))),
    case("TensorType", BAD, &["layers.0.block_", "F16"], |f| {
        f.trace().manifest(|m| m["energy_encoding"] = json!("f16"));
    }),
    case("TensorShape", BAD, &[SHARD, ENERGY, "[3, 2, 3]"], |f| {
        f.trace().header(|h| h[ENERGY]["shape"] = json!([3, 2, 3]));
    }),
    case("TensorShape", BAD, &["[2, 3, 3]", "[2, 5, 5]"], |f| geometry(f, json!({ "frames": 4 }))),
    case("TensorShape", BAD, &["anchor_similarity", "[2, 1]", "[1, 1]"], |f| {
        f.trace().manifest(|m| m["model"]["heads"] = json!(1))
    }),
    case("MissingTensor", BAD, &["layers.2.block_energy"], |f| f.trace().manifest(|m| m["model"]["layers"] = json!(3))),
    case("UnknownTensor", BAD, &["layers.1."], |f| f.trace().manifest(|m| m["model"]["layers"] = json!(1))),
    // Values. Element 13 of [2, 3, 3] is head 1, row 1, column 1.
    case("NotANumber", BAD, &[SHARD, ENERGY, "head 1, row 1, column 1"], |f| single(f, ENERGY, 13, f32::NAN)),
    case("NotANumber", BAD, &[SHARD, ENERGY, "head 1, row 1, column 1"], |f| half(f, 13, 0x7e00)),
    case("NotANumber", BAD, &["anchor_similarity", "head 1"], |f| single(f, "layers.0.anchor_similarity", 1, f32::NAN)),
    case("Infinite", BAD, &[ENERGY, "head 0, row 0, column 0"], |f| single(f, ENERGY, 0, f32::INFINITY)),
    case("Infinite", BAD, &[ENERGY, "head 0, row 0, column 0"], |f| half(f, 0, 0xfc00)),
    case("Negative", BAD, &[ENERGY, "head 0, row 1, column 1"], |f| single(f, ENERGY, 4, -1e-30)),
    case("Negative", BAD, &[ENERGY, "head 0, row 1, column 1"], |f| half(f, 4, 0x8001)),
    case("Negative", BAD, &["anchor_error", "head 1"], |f| single(f, "layers.0.anchor_error", 1, -1.0)),
    case("AboveOne", BAD, &["block_deviation", "1.5"], |f| single(f, "layers.0.block_deviation", 2, 1.5)),
    case("RowSum", BAD, &[ENERGY, "head 0, row 1", "0.001"], |f| single(f, ENERGY, 4, 0.9)),
    case("RowSum", BAD, &[ENERGY, "head 0, row 1", "0.01"], |f| half(f, 4, 0x3c00)),
    case("RowSum", BAD, &[ENERGY, "head 1, row 2", "0.000000"], |f| f.trace().tensor(ENERGY, 15, &[255; 3])),
    case("RowSum", BAD, &[ENERGY, "5 more rows"], |f| f.trace().tensor(ENERGY, 0, &[0; 18])),
    // The sensitivity file.
    case("NotANumber", BAD, &["sensitivity.safetensors", "`step`"], |f| {
        sensitivity(f, |v| v[1] = f32::NAN);
    }),
    case("Negative", BAD, &["sensitivity.safetensors", "`head`"], |f| {
        sensitivity(f, |v| v[9] = -1.0);
    }),
    case("DataLength", BAD, &["sensitivity.safetensors"], |f| {
        sensitivity(f, |v| v.truncate(9));
    }),
    case("DigestMismatch", BAD, &["sensitivity.safetensors"], |f| {
        fs::write(sensitivity(f, |_| {}).path("sensitivity.safetensors"), b"").unwrap();
    }),
    case("FileMissing", BAD, &["sensitivity.safetensors"], |f| {
        fs::remove_file(sensitivity(f, |_| {}).path("sensitivity.safetensors")).unwrap();
    }),
];

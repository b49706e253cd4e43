//! Malformed q, k and v for `calibc run`.

use serde_json::json;

use crate::folder::{Folder, Tensors, join, link, pipe, split, wrapping};
use crate::support::{BAD_INPUT as BAD, IO};
use crate::{Case, case};

/// Tensors spoilt, and a sound bundle.
fn qkv(folder: &Folder, edit: impl FnOnce(&mut Tensors)) {
    folder.bundle(|_| {});
    folder.qkv(edit);
}

fn raw(folder: &Folder, edit: impl FnOnce(&mut Vec<u8>)) {
    qkv(folder, |_| {});
    let mut bytes = std::fs::read(folder.path("in/qkv")).unwrap();
    edit(&mut bytes);
    folder.write("in/qkv", &bytes);
}

/// Gives tensor `name` another shape, and zeros to fill it.
fn shape(folder: &Folder, name: &str, at: usize, size: u64) {
    qkv(folder, |t| {
        let (_, shape, bytes) = t.get(name);
        shape[at] = size;
        *bytes = vec![0; 2 * shape.iter().product::<u64>() as usize];
    });
}

pub(crate) const CASES: &[Case] = &[
    case("missing file", IO, &["in/qkv"], |f| f.bundle(|_| {})),
    case("not a file", IO, &["in/qkv", "not a regular file"], |f| {
        f.bundle(|_| {});
        std::fs::create_dir(f.path("in/qkv")).unwrap();
    }),
    case("not a file", IO, &["in/qkv", "not a regular file"], |f| {
        f.bundle(|_| {});
        pipe(&f.path("in/qkv"));
    }),
    case("not a file", IO, &["in/qkv", "not a regular file"], |f| {
        f.bundle(|_| {});
        link("/dev/zero".as_ref(), &f.path("in/qkv"));
    }),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| raw(f, Vec::clear)),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| raw(f, |b| b.truncate(20))),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| raw(f, |b| b.truncate(b.len() - 1))),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| raw(f, |b| b.push(0))),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| raw(f, |b| b[..8].fill(255))),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| raw(f, |b| b[8] = b'x')),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| raw(f, |b| *b = wrapping())),
    case("unsound", BAD, &["in/qkv", "not a sound safetensors file"], |f| {
        raw(f, |b| {
            let (mut header, data) = split(b);
            header["q"]["shape"] = json!([1u64 << 63, 1u64 << 63, 2, 64]);
            *b = join(&serde_json::to_vec(&header).unwrap(), &data);
        });
    }),
    case("missing tensor", BAD, &["in/qkv", "no tensor `v`", "k, q"], |f| qkv(f, |t| drop(t.0.remove("v")))),
    case("missing tensor", BAD, &["in/qkv", "no tensor `q`, only nothing"], |f| qkv(f, |t| t.0.clear())),
    case("rank", BAD, &["in/qkv", "`k` has shape"], |f| {
        qkv(f, |t| {
            t.get("k").1.remove(0);
        });
    }),
    case("type", BAD, &["in/qkv", "`v` is I16"], |f| qkv(f, |t| t.get("v").0 = "I16")),
    case("heads", BAD, &["q", "2"], |f| shape(f, "q", 1, 2)),
    case("tokens", BAD, &["q", "671"], |f| shape(f, "q", 2, 671)),
    case("tokens", BAD, &["k", "1"], |f| shape(f, "k", 2, 1)),
    case("tokens", BAD, &["v", "0"], |f| shape(f, "v", 2, 0)),
    case("head_dim", BAD, &["q", "96"], |f| shape(f, "q", 3, 96)),
    case("batch", BAD, &["k", "2"], |f| shape(f, "k", 0, 2)),
    case("batch", BAD, &["k", "0"], |f| shape(f, "q", 0, 0)),
];

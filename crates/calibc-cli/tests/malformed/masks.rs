//! Malformed mask files of an explicit spec.

use serde_json::json;

use crate::folder::{Folder, Tensors, join, link, pipe, split, wrapping};
use crate::support::{BAD_INPUT as BAD, IO};
use crate::{Case, case};

/// A spec that needs no traces, and fits those of the folder.
pub(crate) const SPEC: &str = "\
model: {name: specimen, layers: 2, heads: 2, head_dim: 64}
geometry: {frames: 2, height: 8, width: 20}
steps: 2
policy: {kind: explicit, masks: masks}
target: {dtypes: [bf16], lse: false, archs: [sm_80]}
";

fn spec(folder: &Folder) {
    folder.trace();
    folder.write("in/spec.yaml", SPEC.as_bytes());
}

fn masks(folder: &Folder, edit: impl FnOnce(&mut Tensors)) {
    spec(folder);
    folder.masks(edit);
}

/// The bytes of a sound mask file, spoilt.
fn raw(folder: &Folder, edit: impl FnOnce(&mut Vec<u8>)) {
    masks(folder, |_| {});
    let mut bytes = std::fs::read(folder.path("in/masks")).unwrap();
    edit(&mut bytes);
    folder.write("in/masks", &bytes);
}

pub(crate) const CASES: &[Case] = &[
    // Files.
    case("missing file", IO, &["in/masks"], spec),
    case("not a file", IO, &["in/masks", "not a regular file"], |f| {
        spec(f);
        std::fs::create_dir(f.path("in/masks")).unwrap();
    }),
    case("not a file", IO, &["in/masks", "not a regular file"], |f| {
        spec(f);
        pipe(&f.path("in/masks"));
    }),
    case("not a file", IO, &["in/masks", "not a regular file"], |f| {
        spec(f);
        link("/dev/zero".as_ref(), &f.path("in/masks"));
    }),
    case("too short", BAD, &["in/masks", "0 bytes"], |f| raw(f, Vec::clear)),
    case("too short", BAD, &["in/masks", "7 bytes"], |f| raw(f, |b| b.truncate(7))),
    // Headers.
    case("header length", BAD, &["in/masks", "18446744073709551615"], |f| raw(f, |b| b[..8].fill(255))),
    case("header length", BAD, &["in/masks"], |f| raw(f, |b| b.truncate(40))),
    case("data length", BAD, &["in/masks"], |f| raw(f, |b| b.truncate(b.len() - 1))),
    case("data length", BAD, &["in/masks"], |f| raw(f, |b| b.push(1))),
    case("data length", BAD, &["in/masks", "18446744073709551608"], |f| raw(f, |b| *b = wrapping())),
    case("header json", BAD, &["in/masks", "line 1"], |f| raw(f, |b| b[8] = b'x')),
    case("header json", BAD, &["in/masks", "line 1"], |f| {
        raw(f, |b| *b = join(&[b"{\"a\":".to_vec(), b"[".repeat(100_000)].concat(), b""));
    }),
    case("header offsets", BAD, &["in/masks", "offset", "`s0.l1`"], |f| {
        raw(f, |b| {
            let (mut header, data) = split(b);
            header["s0.l1"]["data_offsets"] = json!([19, 37]);
            *b = join(&serde_json::to_vec(&header).unwrap(), &data);
        });
    }),
    case("header overflow", BAD, &["in/masks", "overflow"], |f| {
        raw(f, |b| {
            let (mut header, data) = split(b);
            header["s0.l1"]["shape"] = json!([1u64 << 63, 1u64 << 63, 4]);
            *b = join(&serde_json::to_vec(&header).unwrap(), &data);
        });
    }),
    case("header offsets", BAD, &["in/masks"], |f| masks(f, |t| t.get("s0.l0").1 = vec![2, 3, 4])),
    // Tensors.
    case("missing", BAD, &["in/masks", "`s1.l0`", "default: dense"], |f| masks(f, |t| drop(t.0.remove("s1.l0")))),
    case("missing", BAD, &["in/masks", "`s0.l0`"], |f| masks(f, |t| t.0.clear())),
    case("unexpected", BAD, &["`s2.l0`", "2 steps, 2 layers"], |f| {
        masks(f, |t| t.put("s2.l0", "U8", &[2, 3, 3], &[1; 18]));
    }),
    case("unexpected", BAD, &["`s0.l2`"], |f| masks(f, |t| t.put("s0.l2", "U8", &[2, 3, 3], &[1; 18]))),
    case("unexpected", BAD, &["`s0.l00`"], |f| masks(f, |t| t.put("s0.l00", "U8", &[2, 3, 3], &[1; 18]))),
    case("unexpected", BAD, &["`../s0.l0`"], |f| masks(f, |t| t.put("../s0.l0", "U8", &[2, 3, 3], &[1; 18]))),
    case("type", BAD, &["in/masks", "`s0.l1`", "BOOL"], |f| masks(f, |t| t.get("s0.l1").0 = "BOOL")),
    case("type", BAD, &["`s1.l1`", "I8"], |f| masks(f, |t| t.get("s1.l1").0 = "I8")),
    case("type", BAD, &["`s0.l0.op`", "F16"], |f| masks(f, |t| t.put("s0.l0.op", "F16", &[2], &[0; 4]))),
    case("shape", BAD, &["`s0.l0`", "[3, 3, 3]", "[2, 3, 3]"], |f| {
        masks(f, |t| t.put("s0.l0", "U8", &[3, 3, 3], &[1; 27]));
    }),
    case("shape", BAD, &["`s0.l0`", "[2, 4, 3]"], |f| masks(f, |t| t.put("s0.l0", "U8", &[2, 4, 3], &[1; 24]))),
    case("shape", BAD, &["`s0.l0`", "[18]"], |f| masks(f, |t| t.get("s0.l0").1 = vec![18])),
    case("shape", BAD, &["`s0.l0.op`", "[3]", "[2]"], |f| masks(f, |t| t.put("s0.l0.op", "U8", &[3], &[0; 3]))),
    // Values. Byte 11 of [2, 3, 3] is head 1, row 0, column 2.
    case("value", BAD, &["`s1.l0`", "holds 2 at [1, 0, 2]"], |f| masks(f, |t| t.get("s1.l0").2[11] = 2)),
    case("value", BAD, &["`s0.l0`", "holds 255 at [0, 0, 0]"], |f| masks(f, |t| t.get("s0.l0").2[0] = 255)),
    case("op value", BAD, &["`s1.l1.op`", "holds 3 at [1]"], |f| masks(f, |t| t.get("s1.l1.op").2[1] = 3)),
    case("empty row", BAD, &["`s0.l1`", "row 2 of head 0"], |f| masks(f, |t| t.get("s0.l1").2[6..9].fill(0))),
    case("empty row", BAD, &["`s1.l1`", "row 0 of head 1"], |f| {
        masks(f, |t| {
            t.get("s1.l1").2[9..12].fill(0);
            t.0.remove("s1.l1.op");
        });
    }),
    case("op against mask", BAD, &["`s0.l0.op`", "dense", "head 0"], |f| masks(f, |t| t.get("s0.l0.op").2[0] = 0)),
    case("op against mask", BAD, &["`s1.l0.op`", "anchor rows", "head 0"], |f| {
        masks(f, |t| t.get("s1.l0.op").2[0] = 2)
    }),
];

/// Of several faults the first in the order of sites is told, whatever thread met it first.
#[test]
fn the_first_fault_is_told() {
    let folder = Folder::new();
    masks(&folder, |t| {
        t.get("s1.l1").2[0] = 7;
        t.get("s0.l1").2[17] = 8;
        t.get("s1.l0").2[3..6].fill(0);
    });
    for _ in 0..5 {
        let ended = folder.run("compile --spec in/spec.yaml --emit plan -o out/it").expect(BAD);
        assert!(ended.stderr.contains("`s0.l1` holds 8 at [1, 2, 2]"), "{}", ended.stderr);
    }
}

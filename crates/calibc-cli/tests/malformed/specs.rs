//! Malformed specs, for a trace that is sound.

use crate::folder::{Folder, link, pipe};
use crate::support::{BAD_INPUT as BAD, IO, USAGE};
use crate::{Case, case};

/// The spec with `policy:` and this below it.
fn policy(folder: &Folder, text: &str) {
    folder.spec(&format!("policy:\n  kind: calibatt\n  {text}\n"));
}

/// A spec of these bytes.
fn raw(folder: &Folder, bytes: &[u8]) {
    folder.trace();
    folder.write("in/spec.yaml", bytes);
}

pub(crate) const CASES: &[Case] = &[
    // Files.
    case("missing file", IO, &["in/spec.yaml"], |f| drop(f.trace())),
    case("folder", IO, &["in/spec.yaml"], |f| {
        f.trace();
        std::fs::create_dir(f.path("in/spec.yaml")).unwrap();
    }),
    case("link in a circle", IO, &["in/spec.yaml"], |f| {
        f.trace();
        link(&f.path("in/spec.yaml"), &f.path("in/spec.yaml"));
    }),
    case("too large", BAD, &["in/spec.yaml", "1048576"], |f| raw(f, &b"# \n".repeat(400_000))),
    // A file without an end and without a size.
    case("too large", BAD, &["in/spec.yaml"], |f| {
        f.trace();
        link("/dev/zero".as_ref(), &f.path("in/spec.yaml"));
    }),
    case("not text", BAD, &["in/spec.yaml", "UTF-8"], |f| raw(f, b"\xff\xfen\0a\0m\0e\0")),
    case("not text", BAD, &["in/spec.yaml", "UTF-8"], |f| raw(f, b"name: \x80\n")),
    case("empty", BAD, &["in/spec.yaml:1:1", "empty"], |f| raw(f, b"")),
    case("empty", BAD, &["in/spec.yaml:1:1", "empty"], |f| raw(f, b"# nothing\n---\n")),
    // YAML.
    case("bracket", BAD, &["in/spec.yaml:1:7", "bracket"], |f| f.spec("name: [1, 2\n")),
    case("tab", BAD, &["in/spec.yaml:2:2", "tab"], |f| f.spec("model:\n\tlayers: 3\n")),
    case("control character", BAD, &["in/spec.yaml:1:"], |f| f.spec("name: \"a\0b\"\n")),
    case("two documents", BAD, &["in/spec.yaml:3:1"], |f| raw(f, b"name: a\n---\nname: b\n")),
    case("nesting", BAD, &["in/spec.yaml:1:"], |f| raw(f, &[b"sigmas: ".to_vec(), b"[".repeat(100_000)].concat())),
    case("nesting", BAD, &["in/spec.yaml:1:"], |f| raw(f, &[b"a: ".to_vec(), b"{a: ".repeat(100_000)].concat())),
    // Ten levels of ten: 10^10 numbers where somebody expands them.
    case("bomb", BAD, &["in/spec.yaml:"], |f| {
        let mut text = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n".to_owned();
        for level in 1..10 {
            let names = vec![format!("*a{}", level - 1); 10].join(", ");
            text += &format!("a{level}: &a{level} [{names}]\n");
        }
        f.spec(&format!("{text}sigmas: *a9\n"));
    }),
    case("circular anchor", BAD, &["in/spec.yaml:1:"], |f| f.spec("sigmas: &a [*a]\n")),
    case("unknown anchor", BAD, &["in/spec.yaml:1:"], |f| f.spec("sigmas: *a\n")),
    case("merge key", BAD, &["in/spec.yaml:2:", "merge"], |f| {
        f.spec("model: &a {layers: 2, heads: 2}\ngeometry: {<<: *a, height: 8, width: 20}\n");
    }),
    case("tag", BAD, &["in/spec.yaml:1:"], |f| f.spec("name: !!python/object:os.system x\n")),
    // Fields.
    case("unknown field", BAD, &["in/spec.yaml:1:1", "`geometri`", "did you mean `geometry`?"], |f| {
        f.spec("geometri: {frames: 2}\n");
    }),
    case("unknown field", BAD, &["in/spec.yaml:3:3", "`rh`", "did you mean `rho`?"], |f| policy(f, "rh: 0.5")),
    case("unknown field", BAD, &["in/spec.yaml:2:13", "`archss`"], |f| f.spec("# \nmodel: {    archss: 1}\n")),
    case("field twice", BAD, &["in/spec.yaml:2:1", "`name`"], |f| f.spec("name: a\nname: b\n")),
    case("field twice", BAD, &["in/spec.yaml:4:3", "`rho`"], |f| policy(f, "rho: 0.5\n  rho: 0.5")),
    case("field missing", BAD, &["in/spec.yaml:1:", "`width`"], |f| f.spec("geometry: {frames: 2, height: 8}\n")),
    case("field missing", BAD, &["in/spec.yaml:2:3", "`kind`"], |f| f.spec("policy:\n  rho: 0.5\n")),
    case("field missing", BAD, &["in/spec.yaml:", "`masks`"], |f| f.spec("policy: {kind: explicit}\n")),
    case("unknown word", BAD, &["in/spec.yaml:1:16", "`calibat`"], |f| f.spec("policy: {kind: calibat}\n")),
    case("unknown word", BAD, &["in/spec.yaml:3:", "`distiled`"], |f| policy(f, "schedule: distiled")),
    case("unknown architecture", BAD, &["in/spec.yaml:1:18", "`sm_75`", "sm_80"], |f| {
        f.spec("target: {archs: [sm_75]}\n");
    }),
    case("type", BAD, &["in/spec.yaml:1:", "`four`"], |f| f.spec("geometry: {frames: four, height: 8, width: 20}\n")),
    case("type", BAD, &["in/spec.yaml:1:", "`2.5`"], |f| f.spec("geometry: {frames: 2.5, height: 8, width: 20}\n")),
    case("type", BAD, &["in/spec.yaml:1:", "`-2`"], |f| f.spec("geometry: {frames: -2, height: 8, width: 20}\n")),
    case("type", BAD, &["in/spec.yaml:1:8", "4294967296"], |f| f.spec("steps: 4294967296\n")),
    case("type", BAD, &["in/spec.yaml:1:9", "`calibatt`"], |f| f.spec("policy: calibatt\n")),
    case("type", BAD, &["in/spec.yaml:1:9"], |f| f.spec("sigmas: 1.0\n")),
    // Values.
    case("range", BAD, &["in/spec.yaml:3:8", "0 is out of range"], |f| policy(f, "rho: 0")),
    case("range", BAD, &["in/spec.yaml:3:8", "1.5 is out of range"], |f| policy(f, "rho: 1.5")),
    case("range", BAD, &["in/spec.yaml:1:", "0 is out of range"], |f| {
        f.spec("geometry: {frames: 0, height: 8, width: 8}\n")
    }),
    case("not finite", BAD, &["in/spec.yaml:3:8", "`.nan`"], |f| policy(f, "rho: .nan")),
    case("not finite", BAD, &["in/spec.yaml:3:17", "`-.inf`"], |f| policy(f, "schedule: {k: -.inf}")),
    case("not finite", BAD, &["in/spec.yaml:3:17", "1e999"], |f| policy(f, "schedule: {c: 1e999}")),
    case("field missing", BAD, &["in/spec.yaml:2:3", "the field `density` is missing"], |f| {
        f.spec("policy:\n  kind: budget\n")
    }),
    case("range", BAD, &["in/spec.yaml:1:33", "2 is out of range", "up to 1"], |f| {
        f.spec("policy: {kind: budget, density: 2}\n");
    }),
    case("unknown field", BAD, &["in/spec.yaml:4:3: unknown field `densty`; did you mean `density`?"], |f| {
        f.spec("policy:\n  kind: budget\n  density: 0.5\n  densty: 0.4\n");
    }),
    case("contradiction", BAD, &["in/spec.yaml:1:", "0.6 is more than the density of 0.5"], |f| {
        f.spec("policy: {kind: budget, density: 0.5, step_floor: 0.6}\n");
    }),
    case("anchors of other traces", BAD, &["9 anchor rows", "a frame of this geometry has 8 rows"], |f| {
        f.spec("policy: {kind: budget, density: 0.5, anchors: 9}\n");
    }),
    case(
        "evidence",
        BAD,
        &["the traces have no sensitivities; measure them with `calibc.sensitivity`", "`missing: warn`"],
        |f| {
            f.spec("policy: {kind: budget, density: 0.5, importance: energy, missing: error}\n");
        },
    ),
    case("head_dim", BAD, &["in/spec.yaml:1:", "96", "64 and 128"], |f| {
        f.spec("model: {layers: 2, heads: 2, head_dim: 96}\n");
    }),
    case("tokens", BAD, &["in/spec.yaml:1:", "65536x65536x65536"], |f| {
        f.spec("geometry: {frames: 65536, height: 65536, width: 65536}\n");
    }),
    case("sigmas", BAD, &["in/spec.yaml:1:9", "-0.5"], |f| f.spec("sigmas: [1.0, -0.5]\n")),
    case("anchors", BAD, &["in/spec.yaml:4:", "9 anchor rows"], |f| {
        f.spec("geometry: {frames: 2, height: 8, width: 20}\npolicy:\n  kind: calibatt\n  repetition: {anchors: 9}\n");
    }),
    // Not these traces'.
    case("other traces", BAD, &["geometry.frames: spec 3, traces 2"], |f| {
        f.spec("geometry: {frames: 3, height: 8, width: 20}\n");
    }),
    case("other traces", BAD, &["geometry.layout: spec ", "geometry.text_tokens: spec 9, traces 0"], |f| {
        let text = "text_tokens: 9, text_position: after, layout: {tile: [1, 2, 2]}";
        f.spec(&format!("geometry: {{frames: 2, height: 8, width: 20, {text}}}\n"));
    }),
    case("other traces", BAD, &["model.name: spec wan, traces specimen", "model.heads: spec 3, traces 2"], |f| {
        f.spec("model: {name: wan, layers: 2, heads: 3, head_dim: 64}\n");
    }),
    case("other traces", BAD, &["steps: spec 50, traces 2"], |f| f.spec("steps: 50\n")),
    case("other traces", BAD, &["sigmas: spec 0.25, traces 0.5"], |f| f.spec("sigmas: [1.0, 0.25]\n")),
    case("separate keys", BAD, &["geometry.kv_tokens"], |f| {
        f.spec("geometry: {frames: 2, height: 8, width: 20, kv_tokens: 512}\n");
    }),
];

/// A spec may come through a pipe, as from `<(...)` of a shell.
#[test]
fn a_spec_may_come_through_a_pipe() {
    let folder = Folder::new();
    folder.trace();
    pipe(&folder.path("in/spec.yaml"));
    std::thread::scope(|scope| {
        let path = folder.path("in/spec.yaml");
        scope.spawn(move || std::fs::write(path, "policy: {kind: calibat}\n").unwrap());
        let ended = folder.run("compile trace --spec in/spec.yaml --emit plan -o out/it").expect(BAD);
        assert!(ended.stderr.contains("in/spec.yaml:1:16: unknown value `calibat`"), "{}", ended.stderr);
    });
}

#[test]
fn specs_without_traces_are_refused() {
    let folder = Folder::new();
    let refuse = |text: &str, exit: i32, says: &str| {
        folder.write("in/spec.yaml", text.as_bytes());
        let ended = folder.run("compile --spec in/spec.yaml --emit plan -o out/it").expect(exit);
        assert!(ended.stderr.starts_with("error: ") && ended.stderr.contains(says), "{}", ended.stderr);
        assert!(!folder.path("out/it").exists());
    };
    folder.masks(|_| {});
    let whole = crate::masks::SPEC;
    for section in ["model", "geometry", "steps"] {
        let text: String =
            whole.lines().filter(|line| !line.starts_with(section)).map(|line| format!("{line}\n")).collect();
        refuse(&text, BAD, &format!("must have `{section}`"));
    }
    // Sizes whose product no memory holds, or no integer.
    for (layers, heads, steps) in [(u32::MAX, u32::MAX, 10_000), (100_000, 60_000, 10_000), (u32::MAX, 1, 1)] {
        let model = format!("layers: {layers}, heads: {heads}");
        let text = whole.replace("layers: 2, heads: 2", &model).replace("steps: 2", &format!("steps: {steps}"));
        refuse(&text, BAD, &format!("{steps} steps x {layers} layers x {heads} heads are more sites"));
    }
    let text = whole.replace("heads: 2", "heads: 65536").replace("masks: masks", "masks: none, default: dense");
    folder.write("in/none", &crate::folder::join(b"{}", b""));
    refuse(&text, BAD, "65536 heads exceed 65535");
    let text = whole
        .replace("layers: 2", "layers: 1000")
        .replace("frames: 2, height: 8, width: 20", "frames: 1024, height: 64, width: 64");
    refuse(
        &text.replace("heads: 2", "heads: 1000").replace("masks: masks", "masks: none, default: dense"),
        BAD,
        "work items",
    );
    // The rest of a spec that calibrates would come from traces: that is about the command, not the file.
    refuse("steps: 4\n", USAGE, "give a folder of traces");
}

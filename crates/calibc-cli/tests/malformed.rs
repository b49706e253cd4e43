//! Input with one thing wrong, given to the real binary: each kind has its exit code and one message that names the place, and
//! nothing is left behind.

#[path = "../../calibc-bundle/tests/support/mod.rs"]
#[allow(unused_imports, reason = "shared with other test binaries")]
mod parts;
#[path = "cli/support.rs"]
#[allow(dead_code, reason = "shared with other test binaries")]
mod support;

#[path = "malformed/bundles.rs"]
mod bundles;
#[path = "malformed/folder.rs"]
mod folder;
#[path = "malformed/masks.rs"]
mod masks;
#[path = "malformed/specs.rs"]
mod specs;
#[path = "malformed/tensors.rs"]
mod tensors;
#[path = "malformed/traces.rs"]
mod traces;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use folder::Folder;
use support::{Ended, IO};

/// One malformed input.
struct Case {
    /// The kind of error. Messages of different kinds differ.
    kind: &'static str,
    /// Makes the files in the folder the command will run in.
    spoil: fn(&Folder),
    exit: i32,
    /// What the message names.
    says: &'static [&'static str],
}

const fn case(kind: &'static str, exit: i32, says: &'static [&'static str], spoil: fn(&Folder)) -> Case {
    Case { kind, spoil, exit, says }
}

/// Every table. There are far more than the forty cases that were asked for; a table that shrinks is a mistake.
const TABLES: [(&str, &[Case]); 5] = [
    ("traces", traces::CASES),
    ("specs", specs::CASES),
    ("masks", masks::CASES),
    ("bundles", bundles::CASES),
    ("tensors", tensors::CASES),
];

#[test]
fn the_tables_are_long_and_name_each_kind() {
    let mut kinds: Vec<_> =
        TABLES.iter().flat_map(|(table, cases)| cases.iter().map(move |c| (table, c.kind))).collect();
    assert!(kinds.len() >= 160, "{}", kinds.len());
    kinds.sort_unstable();
    kinds.dedup();
    assert!(kinds.len() >= 100, "{}", kinds.len());
    for (table, cases) in TABLES {
        assert!(cases.iter().all(|c| !c.says.is_empty()), "{table}");
    }
}

/// The folder that the compiler's library is in, where there is one.
fn nvrtc() -> Option<&'static Path> {
    static NVRTC: OnceLock<Option<calibc_nvrtc::Nvrtc>> = OnceLock::new();
    NVRTC.get_or_init(calibc_nvrtc::testing::nvrtc).as_ref().map(calibc_nvrtc::Nvrtc::path)
}

/// `compile` with these arguments: to a bundle, or without NVRTC to the plan.
fn compile(args: &str) -> String {
    match nvrtc() {
        Some(_) => format!("compile {args} -o out/it --arch sm_80"),
        None => format!("compile {args} -o out/it --emit plan"),
    }
}

/// Runs `commands` on every case of a table. Each must refuse with the case's exit code and message.
fn refuse(cases: &[Case], commands: &[String]) {
    let mut kind_of: BTreeMap<String, &str> = BTreeMap::new();
    for (i, case) in cases.iter().enumerate() {
        let folder = Folder::new();
        (case.spoil)(&folder);
        for command in commands {
            let context = format!("case {i} ({}), {command}", case.kind);
            let message = refuse_one(&folder, command, case, &context);
            // The same with the result of an earlier run in place: it stays as it is.
            if command.contains("out/it") {
                folder.write("out/it", b"what was there before");
                assert_eq!(refuse_one(&folder, command, case, &context), message, "{context}");
                std::fs::remove_file(folder.path("out/it")).unwrap();
            }
            let first = kind_of.entry(shape(&message)).or_insert(case.kind);
            assert_eq!(*first, case.kind, "{context}: two kinds, one message: {message}");
        }
    }
}

/// Runs one command, which must refuse; returns its message.
fn refuse_one(folder: &Folder, command: &str, case: &Case, context: &str) -> String {
    let before = folder.everything();
    let Ended { code, stdout, stderr } = folder.run(command);
    assert_eq!(code, Some(case.exit), "{context}: {stdout}{stderr}");
    assert_eq!(stdout, "", "{context}");
    assert_eq!(folder.everything(), before, "{context}: files were left or changed");
    let message = stderr.strip_prefix("error: ").unwrap_or_else(|| panic!("{context}: {stderr}"));
    assert!(!stderr.contains("panicked") && !stderr.contains("bug"), "{context}: {stderr}");
    assert_eq!(stderr.matches("error: ").count(), 1, "{context}: {stderr}");
    let message = message.strip_suffix('\n').unwrap_or_else(|| panic!("{context}: {stderr}"));
    // One line, or one and an indented list.
    assert!(message.lines().skip(1).all(|line| line.starts_with("  ")), "{context}: {message}");
    assert!(message.len() < 2000 && !message.ends_with('.'), "{context}: {message}");
    for words in case.says {
        assert!(message.contains(words), "{context}: `{words}` is not in: {message}");
    }
    message.to_owned()
}

/// A message without what changes from case to case of one kind: numbers, and names in quotes.
fn shape(message: &str) -> String {
    let mut shape = String::new();
    let mut quote = None;
    for c in message.chars() {
        match quote {
            Some(end) if c == end => quote = None,
            Some(_) => {}
            None if matches!(c, '`' | '"') => quote = Some(c),
            None if c.is_ascii_digit() => {
                if !shape.ends_with('#') {
                    shape.push('#');
                }
            }
            None => shape.push(c),
        }
    }
    shape
}

#[test]
fn traces_are_refused() {
    refuse(traces::CASES, &[compile("trace"), "trace info trace".into()]);
}

/// `trace check` says on stdout what is wrong, and with `--json` which kind of problem it is: the error's own name.
#[test]
fn trace_check_names_the_kind_of_problem() {
    for (i, case) in traces::CASES.iter().enumerate() {
        let folder = Folder::new();
        (case.spoil)(&folder);
        let before = folder.everything();
        let context = format!("case {i} ({})", case.kind);
        let text = folder.run("trace check trace");
        assert_eq!(text.code, Some(case.exit), "{context}: {}{}", text.stdout, text.stderr);
        let first = text.stdout.lines().next().unwrap_or_else(|| panic!("{context}: nothing is listed"));
        assert!(case.says.iter().all(|words| first.contains(words)), "{context}: {first}");
        assert!(text.stderr.lines().count() == 1 && text.stderr.contains(" problem"), "{context}: {}", text.stderr);
        let json = folder.run("trace check trace --json").expect(case.exit).json("trace-check");
        assert_eq!((&json["ok"], &json["problems"][0]["problem"]), (&false.into(), &case.kind.into()), "{context}");
        assert_eq!(json["problems"][0]["message"], first, "{context}");
        assert_eq!(json["problems"].as_array().unwrap().len(), text.stdout.lines().count(), "{context}");
        assert_eq!(folder.everything(), before, "{context}");
    }
}

#[test]
fn specs_are_refused() {
    refuse(specs::CASES, &[compile("trace --spec in/spec.yaml")]);
}

#[test]
fn mask_files_are_refused() {
    // With traces and without: the file is the user's in both.
    let with = "--spec in/spec.yaml";
    refuse(masks::CASES, &[compile(with), compile(&format!("trace {with}"))]);
}

#[test]
fn bundles_are_refused() {
    let commands = [
        "inspect in/bundle",
        "inspect in/bundle --json",
        "inspect in/bundle --plan",
        "verify in/bundle",
        "verify in/bundle --numerics",
        "export in/bundle --masks out/it",
        "run in/bundle --step 0 --layer 0 --input in/qkv -o out/it",
    ];
    refuse(bundles::CASES, &commands.map(str::to_owned));
}

#[test]
fn tensor_files_are_refused() {
    let run = "run in/bundle --step 0 --layer 0 --input in/qkv -o out/it";
    refuse(tensors::CASES, &[run.into(), format!("{run} --lse")]);
}

/// The checks above can fail: sound input passes every command they run.
#[test]
fn sound_input_is_accepted() {
    let folder = Folder::new();
    folder.trace();
    folder.spec("target: {dtypes: [bf16], lse: false, archs: [sm_80]}\n");
    folder.bundle(|_| {});
    folder.qkv(|_| {});
    folder.write("in/explicit.yaml", masks::SPEC.as_bytes());
    folder.masks(|_| {});
    let commands = [
        "trace check trace",
        "trace info trace",
        "inspect in/bundle --plan",
        "verify in/bundle --numerics",
        "export in/bundle --masks out/masks",
        "run in/bundle --step 0 --layer 0 --input in/qkv -o out/result --lse",
    ];
    for command in commands {
        folder.run(command).expect(support::OK);
    }
    for spec in ["spec", "explicit"] {
        folder.run(&compile(&format!("trace --spec in/{spec}.yaml"))).expect(support::OK);
    }
    folder.run(&compile("--spec in/explicit.yaml")).expect(support::OK);
    assert!(folder.path("out/it").exists());
    folder.run("inspect in/nothing").expect(IO);
}

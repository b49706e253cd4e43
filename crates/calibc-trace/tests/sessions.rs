//! Captures that are interrupted, killed and run side by side: at any moment the folder is the trace of what was committed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use calibc_ir::{Geometry, LayerId, Model, StepId};
use calibc_trace::random::SplitMix64;
use calibc_trace::session::{Session, set_sensitivity};
use calibc_trace::writer::{EncodedTensors, Extras, LayerTensors, OpenShard, TraceSpec};
use calibc_trace::{Encoding, Manifest, Prompt, Sensitivity, Split, Trace, TraceError, check, merge};
use proptest::prelude::*;

/// A process that is being started has our files open, and so our locks, until it becomes another program: nobody starts one
/// while a test has a session of its own.
static STARTING: RwLock<()> = RwLock::new(());

fn nobody_starts() -> RwLockReadGuard<'static, ()> {
    STARTING.read().unwrap_or_else(PoisonError::into_inner)
}

const LAYERS: u32 = 2;
const HEADS: usize = 2;
const BLOCKS: usize = 3;
const STEPS: [u32; 2] = [0, 2];

fn spec() -> TraceSpec {
    TraceSpec {
        model: Model { name: "m".into(), layers: LAYERS, heads: HEADS as u32, head_dim: 64 },
        geometry: Geometry::video(3, 10, 10),
        sigmas: vec![1.0, 0.5, 0.25],
        branches: vec!["cond".into()],
        encoding: Encoding::Log2U8,
        anchor_counts: vec![5],
    }
}

fn prompt(id: &str) -> Prompt {
    Prompt { id: id.into(), seed: Some(7), split: Split::Calibration, label: "words".into() }
}

/// Codes of rows that sum to about 1: a half and two quarters, turned by `turn`.
fn codes(turn: usize) -> Vec<u8> {
    (0..HEADS * BLOCKS * BLOCKS).map(|i| [8, 16, 16][(i + turn) % 3]).collect()
}

const EXTRAS: Extras = Extras { deviation: true, anchor_similarity: true, anchor_error: true };

fn write_layer(shard: &mut OpenShard, layer: u32, turn: usize) -> Result<(), TraceError> {
    let (energy, deviation) = (codes(turn), vec![90; HEADS * BLOCKS * BLOCKS]);
    let tensors = EncodedTensors {
        energy: &energy,
        deviation: &deviation,
        anchor_similarity: &[0.5; HEADS],
        anchor_error: &[0.1; HEADS],
    };
    shard.layer_encoded(LayerId(layer), tensors)
}

fn write_shard(session: &mut Session, step: u32, turn: usize) -> Result<(), TraceError> {
    let mut shard = session.begin_shard(StepId(step), "cond", EXTRAS)?;
    for layer in 0..LAYERS {
        write_layer(&mut shard, layer, turn)?;
    }
    session.finish_shard(shard)
}

fn write_prompt(session: &mut Session, id: &str, turn: usize) -> Result<(), TraceError> {
    session.begin_prompt(prompt(id))?;
    STEPS.iter().try_for_each(|&step| write_shard(session, step, turn))?;
    session.end_prompt()
}

fn ids(manifest: &Manifest) -> BTreeSet<String> {
    manifest.prompts.iter().map(|prompt| prompt.id.clone()).collect()
}

/// Every file below `dir` but locks, as paths relative to it.
fn files(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|inner| format!("{name}/{inner}")));
        } else if name != ".calibc-lock" {
            found.insert(name);
        }
    }
    found
}

/// The files of a trace of these prompts, and no others.
fn whole(prompts: &BTreeSet<String>) -> BTreeSet<String> {
    let shards = prompts.iter().flat_map(|id| STEPS.map(|step| format!("{id}/s{step:03}.cond.safetensors")));
    shards.chain(["manifest.json".to_owned()]).collect()
}

#[test]
fn encoded_layers_are_the_ones_the_writer_encodes() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    let mut session = Session::open(root.path(), spec(), None).unwrap();
    write_prompt(&mut session, "coded", 1).unwrap();
    session.begin_prompt(prompt("plain")).unwrap();
    let energy: Vec<f32> = codes(1).iter().map(|&code| (-f32::from(code) / 8.0).exp2()).collect();
    let deviation = vec![(-90.0f32 / 8.0).exp2(); energy.len()];
    for step in STEPS {
        let mut shard = session.begin_shard(StepId(step), "cond", EXTRAS).unwrap();
        for layer in 0..LAYERS {
            let tensors = LayerTensors {
                energy: &energy,
                deviation: &deviation,
                anchor_similarity: &[0.5; HEADS],
                anchor_error: &[0.1; HEADS],
            };
            shard.layer(LayerId(layer), tensors).unwrap();
        }
        session.finish_shard(shard).unwrap();
    }
    session.end_prompt().unwrap();
    let shards = &session.manifest().shards;
    assert_eq!(shards[0].file.digest, shards[2].file.digest);
    assert_eq!(spec().shard_bytes(EXTRAS).unwrap(), shards[0].file.bytes.unwrap());
    assert!(check(root.path(), &|_, _| {}).is_empty());
}

#[test]
fn sensitivities_join_a_trace_and_replace_older_ones() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    let weights =
        |first: f32| Sensitivity { step: vec![first, 2.0, 1.0], head: vec![0.5; 3 * LAYERS as usize * HEADS] };
    let found = || Trace::open(root.path(), &|_, _| {}).unwrap().sensitivity().cloned();
    assert!(matches!(set_sensitivity(root.path(), &weights(1.0)), Err(TraceError::NotATrace { .. })));
    assert_eq!(files(root.path()), BTreeSet::new());
    let mut session = Session::open(root.path(), spec(), None).unwrap();
    write_prompt(&mut session, "a", 0).unwrap();
    // Whoever captures would write the manifest without them.
    assert!(matches!(set_sensitivity(root.path(), &weights(1.0)), Err(TraceError::Locked { .. })));
    drop(session);
    for first in [1.0, 4.0] {
        set_sensitivity(root.path(), &weights(first)).unwrap();
        assert_eq!(found(), Some(weights(first)));
    }
    // Refused, nothing changes.
    let short = Sensitivity { step: vec![1.0; 2], ..weights(1.0) };
    assert!(matches!(set_sensitivity(root.path(), &short), Err(TraceError::ValueCount { .. })));
    for wrong in [f32::NAN, -1.0] {
        set_sensitivity(root.path(), &weights(wrong)).unwrap_err();
    }
    assert_eq!(found(), Some(weights(4.0)));
    // A process killed after it unlisted the old ones: a trace without, which takes new ones.
    let listed = fs::read_to_string(root.path().join("manifest.json")).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_str(&listed).unwrap();
    manifest.as_object_mut().unwrap().remove("sensitivity").unwrap();
    fs::write(root.path().join("manifest.json"), manifest.to_string()).unwrap();
    assert_eq!(found(), None);
    set_sensitivity(root.path(), &weights(3.0)).unwrap();
    assert_eq!(found(), Some(weights(3.0)));
    // Prompts that come later keep them.
    let mut session = Session::open(root.path(), spec(), None).unwrap();
    write_prompt(&mut session, "b", 1).unwrap();
    drop(session);
    assert_eq!(found(), Some(weights(3.0)));
}

#[test]
fn wrong_layers_are_refused_as_they_are_written() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    let mut session = Session::open(root.path(), spec(), None).unwrap();
    session.begin_prompt(prompt("a")).unwrap();
    let mut shard = session.begin_shard(StepId(0), "cond", Extras::default()).unwrap();
    let mut energy = codes(0);
    let mut give = |energy: &[u8], deviation: &[u8]| {
        let tensors = EncodedTensors { energy, deviation, ..EncodedTensors::default() };
        shard.layer_encoded(LayerId(0), tensors)
    };
    assert!(matches!(give(&energy[1..], &[]), Err(TraceError::ValueCount { .. })));
    assert!(matches!(give(&energy, &[0]), Err(TraceError::ValueCount { .. })));
    give(&energy, &[]).unwrap();
    energy[4] = 0;
    assert!(matches!(give(&energy, &[]), Err(TraceError::RowSum { .. })));
    // A kernel writes code 0, which is 1, for what is not a number.
    assert!(matches!(give(&vec![0; energy.len()], &[]), Err(TraceError::RowSum { .. })));
    assert!(matches!(session.finish_shard(shard), Err(TraceError::MissingTensor { .. })));
}

#[test]
fn one_writer_at_a_time_and_in_turn() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    let mut session = Session::open(root.path(), spec(), None).unwrap();
    assert!(matches!(Session::open(root.path(), spec(), None), Err(TraceError::Locked { .. })));
    assert!(matches!(session.end_prompt(), Err(TraceError::OutOfTurn { .. })));
    session.begin_prompt(prompt("a")).unwrap();
    assert!(matches!(session.begin_prompt(prompt("b")), Err(TraceError::OutOfTurn { .. })));
    let shard = session.begin_shard(StepId(0), "cond", EXTRAS).unwrap();
    session.discard_prompt().unwrap();
    session.begin_prompt(prompt("b")).unwrap();
    assert!(matches!(session.finish_shard(shard), Err(TraceError::OutOfTurn { .. })));
    session.discard_prompt().unwrap();
    write_prompt(&mut session, "c", 0).unwrap();
    assert!(matches!(session.begin_prompt(prompt("c")), Err(TraceError::DuplicateName { .. })));
    // Other steps than the prompts before: refused, and nothing of it stays.
    session.begin_prompt(prompt("d")).unwrap();
    write_shard(&mut session, 1, 0).unwrap();
    assert!(matches!(session.end_prompt(), Err(TraceError::MissingShard { .. })));
    session.discard_prompt().unwrap();
    drop(session);
    assert_eq!(files(root.path()), whole(&BTreeSet::from(["c".to_owned()])));
}

#[test]
fn a_capture_of_something_else_is_refused() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    write_prompt(&mut Session::open(root.path(), spec(), None).unwrap(), "a", 0).unwrap();
    let changes: [(&str, TraceSpec); 5] = [
        ("model", TraceSpec { model: Model { heads: 3, ..spec().model }, ..spec() }),
        ("geometry", TraceSpec { geometry: Geometry::video(3, 10, 11), ..spec() }),
        ("sampler steps", TraceSpec { sigmas: vec![1.0, 0.5, 0.24], ..spec() }),
        ("energy encoding", TraceSpec { encoding: Encoding::F16, ..spec() }),
        ("anchor counts", TraceSpec { anchor_counts: vec![], ..spec() }),
    ];
    for (want, other) in changes {
        for part in [None, Some("p")] {
            let error = Session::open(root.path(), other.clone(), part).unwrap_err();
            assert!(matches!(&error, TraceError::Differs { field, .. } if *field == want), "{want}: {error}");
        }
    }
    assert!(matches!(Session::open(root.path(), spec(), Some("../x")), Err(TraceError::BadPart { .. })));
    // What does not belong to a capture stays.
    fs::write(root.path().join("a/notes.txt"), "mine").unwrap();
    drop(Session::open(root.path(), spec(), None).unwrap());
    assert!(root.path().join("a/notes.txt").exists());
}

#[test]
fn held_out_prompts_may_come_first() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    let mut session = Session::open(root.path(), spec(), None).unwrap();
    session.begin_prompt(Prompt { split: Split::Holdout, ..prompt("h") }).unwrap();
    STEPS.iter().for_each(|&step| write_shard(&mut session, step, 0).unwrap());
    session.end_prompt().unwrap();
    drop(session);
    assert!(matches!(Trace::open(root.path(), &|_, _| {}), Err(TraceError::NoCalibrationPrompt)));
    let mut session = Session::open(root.path(), spec(), None).unwrap();
    assert_eq!(session.prompts(), ["h"]);
    write_prompt(&mut session, "c", 0).unwrap();
    Trace::open(root.path(), &|_, _| {}).unwrap();
}

#[test]
fn parts_become_one_trace_and_a_merge_can_be_repeated() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    let dir = root.path();
    write_prompt(&mut Session::open(dir, spec(), None).unwrap(), "p1", 0).unwrap();
    let mut sessions = ["r0", "r1"].map(|part| Session::open(dir, spec(), Some(part)).unwrap());
    assert_eq!(sessions[0].prompts(), ["p1"]);
    for (i, session) in sessions.iter_mut().enumerate() {
        write_prompt(session, &format!("q{i}"), i).unwrap();
    }
    assert!(matches!(merge::merge_parts(dir), Err(TraceError::Locked { .. })));
    // One part dies inside a prompt.
    sessions[1].begin_prompt(prompt("lost")).unwrap();
    write_shard(&mut sessions[1], 0, 0).unwrap();
    drop(sessions);
    let kept = dir.join(".kept");
    fs::create_dir(&kept).unwrap();
    copy_all(&dir.join(".parts"), &kept);
    let all: BTreeSet<String> = ["p1", "q0", "q1"].map(String::from).into();
    assert_eq!(ids(&merge::merge_parts(dir).unwrap()), all);
    let once = fs::read(dir.join("manifest.json")).unwrap();
    // Killed before the parts were removed: they are still there, and merged again.
    fs::rename(&kept, dir.join(".parts")).unwrap();
    assert_eq!(ids(&merge::merge_parts(dir).unwrap()), all);
    assert_eq!(fs::read(dir.join("manifest.json")).unwrap(), once);
    assert_eq!(files(dir), whole(&all));
    assert!(check(dir, &|_, _| {}).is_empty());
}

fn copy_all(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            fs::create_dir(&target).unwrap();
            copy_all(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

#[test]
fn merging_is_the_same_in_any_order_and_refuses_conflicts() {
    let _sessions = nobody_starts();
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    for (name, prompts) in [("a", ["x", "y"]), ("b", ["z", "w"])] {
        let mut session = Session::open(&at(name), spec(), None).unwrap();
        prompts.iter().for_each(|id| write_prompt(&mut session, id, 0).unwrap());
    }
    merge::merge(&at("ab"), &[at("a"), at("b")]).unwrap();
    // An empty folder is as good as none, and the same trace twice as good as once.
    fs::create_dir(at("ba")).unwrap();
    merge::merge(&at("ba"), &[at("b"), at("a"), at("b")]).unwrap();
    let all: BTreeSet<String> = ["w", "x", "y", "z"].map(String::from).into();
    for name in ["ab", "ba"] {
        assert_eq!(files(&at(name)), whole(&all));
        assert!(check(&at(name), &|_, _| {}).is_empty());
    }
    assert_eq!(fs::read(at("ab").join("manifest.json")).unwrap(), fs::read(at("ba").join("manifest.json")).unwrap());
    assert!(matches!(merge::merge(&at("ab"), &[at("a")]), Err(TraceError::OutputExists { .. })));
    assert!(matches!(
        merge::merge(&at("none"), &[at("nowhere")]),
        Err(TraceError::Io { .. } | TraceError::NotATrace { .. })
    ));

    let mut session = Session::open(&at("c"), spec(), None).unwrap();
    write_prompt(&mut session, "x", 1).unwrap();
    drop(session);
    let error = merge::merge(&at("none"), &[at("a"), at("c")]).unwrap_err();
    assert!(matches!(&error, TraceError::PromptConflict { prompt, .. } if prompt == "x"), "{error}");
    let mut session = Session::open(&at("d"), TraceSpec { sigmas: vec![1.0, 0.5, 0.2], ..spec() }, None).unwrap();
    write_prompt(&mut session, "v", 1).unwrap();
    drop(session);
    assert!(matches!(merge::merge(&at("none"), &[at("a"), at("d")]), Err(TraceError::Differs { .. })));
    // A shard that was cut short is found before anything is made.
    let shard = at("b").join("w/s000.cond.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::remove_file(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(merge::merge(&at("none"), &[at("b")]), Err(TraceError::SizeMismatch { .. })));
    let names: BTreeSet<String> =
        fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(names, ["a", "ab", "b", "ba", "c", "d"].map(String::from).into(), "no litter");
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Prompt,
    Discard,
    /// Ends the process in the middle of a prompt, after this many shards and layers.
    Die(usize, u32),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        3 => Just(Act::Prompt),
        1 => Just(Act::Discard),
        2 => (0..3usize, 0..=LAYERS).prop_map(|(shards, layers)| Act::Die(shards, layers)),
    ];
    prop::collection::vec(act, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// However a capture is interrupted, what was committed is there afterwards, whole, and nothing else is.
    #[test]
    fn interruptions_lose_only_the_prompt_they_meet(acts in acts(), part: bool) {
        let _sessions = nobody_starts();
        let root = tempfile::tempdir().unwrap();
        let (part, dir) = if part { (Some("r0"), root.path().join(".parts/r0")) } else { (None, root.path().to_owned()) };
        let mut session = Some(Session::open(root.path(), spec(), part).unwrap());
        let mut committed = BTreeSet::new();
        for (n, act) in acts.into_iter().enumerate() {
            let mut open = session.take().unwrap_or_else(|| Session::open(root.path(), spec(), part).unwrap());
            prop_assert_eq!(open.prompts().iter().cloned().collect::<BTreeSet<_>>(), committed.clone());
            let id = format!("p{n}");
            match act {
                Act::Prompt => {
                    write_prompt(&mut open, &id, n).unwrap();
                    committed.insert(id);
                    session = Some(open);
                }
                Act::Discard => {
                    open.begin_prompt(prompt(&id)).unwrap();
                    write_shard(&mut open, 0, n).unwrap();
                    open.discard_prompt().unwrap();
                    session = Some(open);
                }
                Act::Die(shards, layers) => {
                    open.begin_prompt(prompt(&id)).unwrap();
                    for &step in STEPS.iter().take(shards) {
                        write_shard(&mut open, step, n).unwrap();
                    }
                    let mut shard = open.begin_shard(StepId(1), "cond", EXTRAS).unwrap();
                    for layer in 0..layers {
                        write_layer(&mut shard, layer, n).unwrap();
                    }
                    // Its unfinished file stays, as a kill would leave it.
                    std::mem::forget(shard);
                    drop(open);
                    // The folder of a dead process is a whole trace already, or none yet.
                    let listed = Manifest::read(&dir).map(|manifest| ids(&manifest)).unwrap_or_default();
                    prop_assert_eq!(&listed, &committed);
                }
            }
        }
        drop(session);
        drop(Session::open(root.path(), spec(), part).unwrap());
        if committed.is_empty() {
            prop_assert_eq!(files(&dir), BTreeSet::new());
        } else {
            prop_assert_eq!(files(&dir), whole(&committed));
            let problems = check(&dir, &|_, _| {});
            prop_assert!(problems.is_empty(), "{problems:?}");
        }
    }
}

/// Set in a process that captures until it is killed: the folder, and its part.
const CHILD: &str = "CALIBC_TEST_CAPTURE_INTO";

/// The process that is killed: without the variable, nothing.
#[test]
fn capture_until_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let part = std::env::var("CALIBC_TEST_PART").unwrap();
    let mut session = Session::open(Path::new(&dir), spec(), Some(&part)).unwrap();
    for n in session.prompts().len().. {
        write_prompt(&mut session, &format!("{part}-{n}"), n).unwrap();
    }
}

#[test]
fn processes_killed_side_by_side_leave_one_trace() {
    let root = tempfile::tempdir().unwrap();
    let mut random = SplitMix64::new(5);
    let mut most = 0;
    for _ in 0..6 {
        let mut children = ["r0", "r1"].map(|part| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "capture_until_killed", "--test-threads=1"]).stdout(std::process::Stdio::null());
            let _start = STARTING.write().unwrap_or_else(PoisonError::into_inner);
            command.env(CHILD, root.path()).env("CALIBC_TEST_PART", part).spawn().unwrap()
        });
        std::thread::sleep(Duration::from_millis(60 + random.below(120)));
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let Ok(manifest) = merge::merge_parts(root.path()) else {
            // Both died before their first prompt.
            assert_eq!(most, 0);
            continue;
        };
        assert!(manifest.prompts.len() >= most, "a committed prompt was lost");
        most = manifest.prompts.len();
        assert_eq!(files(root.path()), whole(&ids(&manifest)));
    }
    assert!(most > 0, "nothing was captured");
    assert!(check(root.path(), &|_, _| {}).is_empty());
}

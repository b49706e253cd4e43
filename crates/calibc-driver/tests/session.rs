//! A session as a library: events, cancelling, and results that need no NVRTC.

use std::path::Path;
use std::sync::Mutex;

use calibc_driver::spec::FamilySpec;
use calibc_driver::{DriverError, Emit, Event, Family, Observer, Options, Silent, Stage, compile};
use calibc_trace::planted::Planted;

/// Writes down what it hears; asks to stop once `stop_at` was heard.
#[derive(Default)]
struct Diary {
    heard: Mutex<Vec<String>>,
    stop_at: Option<&'static str>,
}

impl Observer for Diary {
    fn event(&self, event: &Event<'_>) {
        let word = match event {
            Event::Progress { stage, .. } => format!("at {}", stage.name()),
            Event::Done { stage, .. } => format!("done {}", stage.name()),
            Event::Dump { index, pass, text } => format!("dump {index} {pass} {}", text.lines().count() > 8),
            _ => return,
        };
        let mut heard = self.heard.lock().unwrap();
        if heard.last() != Some(&word) {
            heard.push(word);
        }
    }

    fn cancelled(&self) -> bool {
        self.stop_at.is_some_and(|word| self.heard.lock().unwrap().iter().any(|heard| heard == word))
    }
}

fn traces() -> (tempfile::TempDir, Options) {
    let dir = tempfile::tempdir().unwrap();
    Planted::default().write(dir.path()).unwrap();
    let options = Options { traces: Some(dir.path().to_owned()), emit: Emit::Cuda, ..Options::default() };
    (dir, options)
}

#[test]
fn stages_are_told_in_order() {
    let (_dir, mut options) = traces();
    options.dump_after = vec!["share".to_owned()];
    let diary = Diary::default();
    let output = compile(&options, &diary).unwrap();
    let heard = diary.heard.into_inner().unwrap();
    let done: Vec<_> = heard.iter().filter_map(|word| word.strip_prefix("done ")).collect();
    assert_eq!(done, ["reading traces", "select", "protect", "repetition", "share", "variants", "schedule"]);
    assert!(heard.contains(&"at select".to_owned()) && heard.contains(&"dump 3 share true".to_owned()), "{heard:?}");
    let stages: Vec<_> = output.times.iter().map(|(stage, _)| *stage).collect();
    assert_eq!((stages[0], stages[1], stages.len()), (Stage::Open, Stage::Pass("select"), 7));
    // Four variants, for sm_80 and for sm_90a.
    assert_eq!((output.sources.len(), output.kernels.len()), (8, 0));
    assert!(output.packed.is_none() && output.plan().schedule.is_some());
    assert_eq!(output.traces.unwrap().holdout_prompts, 1);
}

#[test]
fn each_architecture_gets_the_kernels_of_its_family() {
    let (_dir, options) = traces();
    let symbols = |portable: bool, archs: &[&str]| {
        let archs = archs.iter().map(|arch| arch.parse().unwrap()).collect();
        let output = compile(&Options { portable, archs, ..options.clone() }, &Diary::default()).unwrap();
        let family = output.job.spec.target.family;
        let hopper = output.sources.iter().filter(|source| source.symbol.ends_with("_hopper")).count();
        (output.sources.len(), hopper, family == FamilySpec::Portable)
    };
    assert_eq!(symbols(false, &["sm_80", "sm_90", "sm_120"]), (4, 0, false));
    assert_eq!(symbols(false, &["sm_90a"]), (4, 4, false));
    assert_eq!(symbols(false, &["sm_80", "sm_90a"]), (8, 4, false));
    assert_eq!(symbols(true, &["sm_80", "sm_90a"]), (4, 0, true), "the effective spec says so");
}

#[test]
fn a_session_stops_when_asked_to() {
    let (_dir, options) = traces();
    for stop_at in ["at reading traces", "at select", "done repetition"] {
        let diary = Diary { stop_at: Some(stop_at), ..Diary::default() };
        let error = compile(&options, &diary).unwrap_err();
        assert!(matches!(error, DriverError::Cancelled), "{stop_at}: {error}");
        assert_eq!(error.family(), Family::Cancelled);
    }
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let (_dir, options) = traces();
    let plan = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| compile(&options, &Silent)).unwrap().plan().to_string()
    };
    assert_eq!(plan(1), plan(5));
}

#[test]
fn the_spec_of_the_example_traces_is_what_they_get_without_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let options = Options { traces: Some(root.join("examples/traces")), emit: Emit::Plan, ..Options::default() };
    let alone = compile(&options, &Silent).unwrap();
    let spec = Options { spec: Some(root.join("plans/moving-shapes.yaml")), ..options };
    let with = compile(&spec, &Silent).unwrap();
    assert_eq!(alone.plan(), with.plan());
    assert_eq!(alone.job.spec.policy, with.job.spec.policy);
}

//! Hooks and errors of the pipeline.

mod common;

use std::error::Error as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use calibc_ir::{AttnOp, BlockEnergy, BlockMask, Geometry, Model, Plan, Site, StepId};
use calibc_opt::{
    CalibAtt, Explicit, Hooks, NoCalibration, OptError, PASSES, Policy, Repetition, ShareLimits, SiteMask, Target,
    standard,
};
use common::Mock;

fn dense() -> Plan {
    let model = Model { name: "toy".into(), layers: 2, heads: 3, head_dim: 128 };
    Plan::dense(model, Geometry::video(1, 4, 128), vec![1.0, 0.5])
}

fn evidence() -> Mock {
    let energy = |i: usize| {
        let mut values = vec![0.1; 16];
        (0..4).for_each(|r| values[4 * r + (r + i) % 4] = 0.7);
        BlockEnergy { rows: 4, cols: 4, values }
    };
    let energies = |prompt: usize| dense().sites().enumerate().map(|(i, site)| (site, energy(i + prompt))).collect();
    Mock { covered: vec![StepId(0), StepId(1)], calibration: vec![energies(0), energies(0)], ..Mock::default() }
}

fn recipe() -> CalibAtt {
    CalibAtt { a: 0.7, c: 0.7, k: 1.0, rho: 0.5, repetition: None }
}

fn diagonal() -> BlockMask {
    BlockMask::from_fn(4, 4, |r, c| r == c)
}

#[test]
fn hooks_see_every_pass_and_every_part_of_the_work() {
    let mut seen = Vec::new();
    let counts = Mutex::new(Vec::new());
    let mut after = |report: &calibc_opt::PassReport, plan: &Plan| seen.push((report.pass, plan.schedule.is_some()));
    let progress = |name, done, total| counts.lock().unwrap().push((name, done, total));
    let hooks = Hooks { after_pass: Some(&mut after), progress: Some(&progress), ..Hooks::default() };
    standard(&Policy::CalibAtt(recipe()), &Target::default()).run(dense(), &evidence(), hooks).unwrap();
    assert_eq!(seen, PASSES.map(|pass| (pass, pass == "schedule")));
    let mut counts = counts.into_inner().unwrap();
    counts.sort_unstable();
    let select = (1..=12).map(|done| ("select", done, 12));
    let schedule = (1..=4).map(|done| ("schedule", done, 4));
    assert_eq!(counts, schedule.chain(select).collect::<Vec<_>>());
}

#[test]
fn a_set_flag_stops_the_work() {
    let cancel = AtomicBool::new(false);
    let progress = |name, done, _| {
        assert_eq!(name, "select");
        cancel.store(done > 2, Ordering::Relaxed);
    };
    let hooks = Hooks { progress: Some(&progress), cancel: Some(&cancel), ..Hooks::default() };
    let stopped = standard(&Policy::CalibAtt(recipe()), &Target::default()).run(dense(), &evidence(), hooks);
    assert!(matches!(stopped, Err(OptError::Cancelled)));
}

fn error(policy: Policy, target: Target, mock: &Mock) -> OptError {
    standard(&policy, &target).run(dense(), mock, Hooks::default()).unwrap_err()
}

fn explicit(choose: impl Fn(Site) -> SiteMask + Send + Sync + 'static) -> String {
    error(Policy::Explicit(Explicit::new(choose)), Target::default(), &Mock::default()).to_string()
}

#[test]
fn explicit_masks_that_do_not_fit_are_named() {
    let at = |site: Site, choice| move |s: Site| if s == site { choice } else { SiteMask::Dense };
    let site = Site::new(1, 0, 2);
    assert_eq!(
        explicit(move |s| at(site, SiteMask::Mask(BlockMask::full(4, 5)))(s)),
        "the mask of s1.l0.h2 has 4x5 blocks where the geometry has 4x4"
    );
    assert_eq!(
        explicit(move |s| at(site, SiteMask::Anchors(9))(s)),
        "9 anchor rows per frame; a frame of this geometry has 4 rows, so use 1 to 4"
    );
    assert_eq!(
        explicit(|s| SiteMask::Anchors(if s.head.0 == 1 { 2 } else { 3 })),
        "s0.l0.h1 uses 2 anchor rows and an earlier site 3; one number must serve the whole plan"
    );
    assert_eq!(
        explicit(|s| SiteMask::Mask(BlockMask::from_fn(4, 4, |r, c| r == c && (s.step.0 == 0 || r != 2)))),
        "the mask of s1.l0.h0 keeps no key block for query block 2; keep at least one"
    );
}

#[test]
fn evidence_that_is_absent_or_does_not_fit_is_named() {
    let calibatt = |mock: &Mock| error(Policy::CalibAtt(recipe()), Target::default(), mock);
    assert!(matches!(calibatt(&Mock::default()), OptError::NoEvidence));
    assert!(matches!(
        standard(&Policy::CalibAtt(recipe()), &Target::default()).run(dense(), &NoCalibration, Hooks::default()),
        Err(OptError::NoEvidence)
    ));
    let mut late = evidence();
    late.covered.push(StepId(2));
    assert_eq!(
        calibatt(&late).to_string(),
        "the calibration covers s2, but the plan has 2 steps; use the traces of this sampler"
    );
    let mut hole = evidence();
    hole.calibration[1].remove(&Site::new(1, 1, 1));
    hole.calibration[1].remove(&Site::new(1, 1, 2));
    let cause = calibatt(&hole);
    assert_eq!(cause.to_string(), "cannot read the calibration of s1.l1.h1");
    assert_eq!(cause.source().unwrap().to_string(), "no energies of s1.l1.h1");
    let mut small = evidence();
    for prompt in &mut small.calibration {
        prompt.insert(Site::new(0, 1, 0), BlockEnergy { rows: 2, cols: 4, values: vec![0.25; 8] });
    }
    assert_eq!(
        calibatt(&small).to_string(),
        "the calibration of s0.l1.h0 has 2x4 blocks where the plan has 4x4; use the traces of this geometry"
    );
}

#[test]
fn unusable_knobs_are_named() {
    let policy = Policy::CalibAtt(CalibAtt { repetition: Some(Repetition::PAPER), ..recipe() });
    assert!(matches!(error(policy, Target::default(), &evidence()), OptError::Anchors { anchors: 5, height: 4 }));
    let target = |target| error(Policy::CalibAtt(recipe()), target, &evidence()).to_string();
    assert_eq!(
        target(Target { dtypes: Vec::new(), ..Target::default() }),
        "the target has no element type; name bf16, fp16 or both"
    );
    assert_eq!(
        target(Target { share: ShareLimits { max_extra_density: -0.1 }, ..Target::default() }),
        "policy field max_extra_density is -0.1; it must be at least 0"
    );
}

#[test]
fn a_broken_plan_is_refused_before_the_first_pass() {
    let run = |plan, passes: &[&str]| {
        let policy = Policy::Explicit(Explicit::new(|_| SiteMask::Mask(diagonal())));
        standard(&policy, &Target::default()).only(passes).run(plan, &NoCalibration, Hooks::default())
    };
    let mut plan = dense();
    plan.model.head_dim = 96;
    let error = run(plan, &PASSES).unwrap_err();
    assert_eq!(error.to_string(), "the plan to optimise is not valid: head dimension 96 is not one of [64, 128]");
    let mut plan = dense();
    let empty = plan.masks.intern(BlockMask::empty(4, 4));
    plan.ops[0] = AttnOp::BlockSparse { mask: empty };
    assert!(matches!(run(plan.clone(), &["share"]), Err(OptError::VerifyInput { .. })));
    // select starts from a clean plan, whatever ops were there.
    assert_eq!(run(plan, &PASSES).unwrap().masks.len(), 1);
}

//! The report, with numbers worked out by hand.

mod common;

use std::collections::BTreeMap;

use calibc_ir::{AttnOp, BlockEnergy, Geometry, Model, Plan, Site, StepId};
use calibc_opt::{
    AnchorReport, Basis, CalibAtt, Explicit, Hooks, NoCalibration, OpCounts, PassReport, Policy, Recall, Repetition,
    Report, SiteMask, Target, WorstRow, recall_report, standard,
};
use common::Mock;

/// Two blocks, two layers of one head, three steps of which 0 and 2 are covered.
fn dense() -> Plan {
    let model = Model { name: "toy".into(), layers: 2, heads: 1, head_dim: 64 };
    Plan::dense(model, Geometry::video(1, 2, 128), vec![1.0, 0.5, 0.1])
}

fn energies(of: impl Fn(Site) -> [f64; 2]) -> BTreeMap<Site, BlockEnergy> {
    let sites = dense().sites().filter(|site| site.step.0 != 1);
    let energy = |[a, b]: [f64; 2]| BlockEnergy { rows: 2, cols: 2, values: vec![a, 1.0 - a, 1.0 - b, b] };
    sites.map(|site| (site, energy(of(site)))).collect()
}

fn mock() -> Mock {
    Mock { covered: vec![StepId(0), StepId(2)], calibration: vec![energies(|_| [1.0, 1.0])], ..Mock::default() }
}

fn compile(policy: &Policy, mock: &Mock) -> (Plan, Report) {
    let mut selection = None;
    let mut note = |report: &PassReport, _: &Plan| selection = selection.take().or(report.selection.clone());
    let hooks = Hooks { after_pass: Some(&mut note), ..Hooks::default() };
    let plan = standard(policy, &Target::default()).run(dense(), mock, hooks).unwrap();
    let report = recall_report(&plan, policy, selection.as_ref(), mock, &Hooks::default()).unwrap();
    (plan, report)
}

fn recipe() -> CalibAtt {
    CalibAtt { a: 0.9, c: 0.9, k: 0.0, rho: 0.5, repetition: None }
}

#[test]
fn holdout_prompts_judge_where_there_are_any() {
    let mut mock = mock();
    mock.holdout =
        vec![energies(|_| [0.75, 0.5]), energies(|site| [1.0, if site == Site::new(2, 1, 0) { 0.25 } else { 1.0 }])];
    let (_, report) = compile(&Policy::CalibAtt(recipe()), &mock);
    assert_eq!((report.basis, report.prompts, report.masks), (Basis::Holdout, 2, 1));
    assert_eq!(report.evaluated_steps, [StepId(0), StepId(2)]);
    let worst = WorstRow { recall: 0.25, site: Site::new(2, 1, 0), q_block: 1, prompt: 1 };
    let sum = 4.0 * (0.75 + 0.5) + 7.0 + 0.25;
    assert_eq!(report.overall.recall, Some(Recall { rows: 16, mean: sum / 16.0, p5: 0.25, worst: worst.clone() }));
    assert_eq!(report.overall.ops, OpCounts { block_sparse: 6, ..OpCounts::default() });
    assert_eq!(report.overall.density, 0.5);
    let first = WorstRow { recall: 0.5, site: Site::new(0, 0, 0), q_block: 1, prompt: 0 };
    assert_eq!(
        report.layers[0].recall,
        Some(Recall { rows: 8, mean: (2.0 * 1.25 + 4.0) / 8.0, p5: 0.5, worst: first })
    );
    assert_eq!(report.layers[1].recall.as_ref().unwrap().worst, worst);
    assert_eq!(report.steps[1].recall, None, "no energies at step 1");
    assert_eq!(report.steps[1].density, 0.5);
    assert_eq!(report.anchors, None);
}

#[test]
fn predicted_losses_are_put_to_the_test() {
    let mut mock = mock();
    mock.holdout = vec![energies(|_| [0.8, 0.8]); 2];
    let deviations = |dropped: f64| -> BTreeMap<Site, BlockEnergy> {
        let energy = BlockEnergy { rows: 2, cols: 2, values: vec![0.9, dropped, dropped, 0.9] };
        energies(|_| [1.0, 1.0]).into_keys().map(|site| (site, energy.clone())).collect()
    };
    mock.deviation = vec![deviations(0.01)];
    mock.holdout_deviation = vec![deviations(0.02), deviations(0.06)];
    mock.weights = Some((vec![2.0, 1.0, 0.5], vec![1.0; 6]));
    // Any policy: the diagonal, which the recipe keeps.
    let (_, report) = compile(&Policy::CalibAtt(recipe()), &mock);
    assert_eq!(report.weighed.as_ref().map(|w| w.steps.clone()), Some(vec![2.0, 1.0, 0.5]));
    let close = |a: Option<f64>, b: f64| a.is_some_and(|a| (a - b).abs() < 1e-12);
    // Two layers, two rows, one block dropped of each; step 1 takes the deviations of step 0 and is not judged. Rows keep all
    // of their energy, and 0.8 of it on the prompts that judge.
    let row = |dropped: f64, mass: f64| dropped * 0.9 / (dropped + 0.9) / (mass * mass);
    assert!(close(report.overall.loss, 2.0 * 2.0 * row(0.01, 1.0) * 3.5), "{:?}", report.overall);
    assert!(close(report.steps[1].loss, 2.0 * 2.0 * row(0.01, 1.0)) && report.steps[1].judged.is_none());
    let judged = report.overall.judged.unwrap();
    assert!(close(Some(judged.predicted), 2.0 * 2.0 * row(0.01, 1.0) * 2.5), "{judged:?}");
    let mean = (row(0.02, 0.8) + row(0.06, 0.8)) / 2.0;
    assert!(close(Some(judged.loss), 2.0 * 2.0 * mean * 2.5), "{judged:?}");
    let (_, without) = compile(&Policy::CalibAtt(recipe()), &Mock { deviation: Vec::new(), ..mock });
    assert_eq!((without.overall.loss, without.overall.judged, without.weighed), (None, None, None));
}

#[test]
fn without_holdout_each_prompt_is_judged_by_the_others() {
    let mut mock = mock();
    mock.calibration.push(energies(|_| [0.0, 1.0]));
    let (plan, report) = compile(&Policy::CalibAtt(recipe()), &mock);
    // Together: row 0 keeps both blocks, row 1 the second. Alone, each prompt drops what the other needs in row 0.
    assert_eq!(plan.masks.iter().map(|(_, mask)| mask.count()).collect::<Vec<_>>(), [3]);
    assert_eq!((report.basis, report.prompts), (Basis::LeaveOneOut, 2));
    let recall = report.overall.recall.unwrap();
    assert_eq!((recall.rows, recall.mean, recall.p5), (16, 0.5, 0.0));
}

#[test]
fn one_prompt_and_explicit_masks_are_judged_plainly() {
    let (_, report) = compile(&Policy::CalibAtt(recipe()), &mock());
    assert_eq!((report.basis, report.overall.recall.map(|r| r.mean)), (Basis::Calibration, Some(1.0)));
    let mut mock = mock();
    mock.calibration.push(energies(|_| [0.0, 1.0]));
    let antidiagonal =
        Policy::Explicit(Explicit::new(|_| SiteMask::Mask(calibc_ir::BlockMask::from_fn(2, 2, |r, c| r != c))));
    let (_, report) = compile(&antidiagonal, &mock);
    assert_eq!((report.basis, report.overall.recall.map(|r| r.mean)), (Basis::Calibration, Some(0.25)));
}

#[test]
fn anchor_sites_have_measures_of_their_own() {
    let mut mock = mock();
    let anchor_sites = [Site::new(0, 0, 0), Site::new(2, 0, 0)];
    mock.similarity = anchor_sites.into_iter().zip([0.9, 1.0]).collect();
    mock.error.insert(anchor_sites[1], 0.125);
    let recipe = CalibAtt { repetition: Some(Repetition { anchors: 1, gamma: 0.9 }), ..recipe() };
    let (plan, report) = compile(&Policy::CalibAtt(recipe), &mock);
    assert_eq!(plan.op(Site::new(1, 0, 0)), AttnOp::AnchorRows { anchors: 1 });
    let anchors =
        AnchorReport { anchors: 1, sites: 3, evaluated: 2, mean_similarity: Some(0.95), mean_error: Some(0.125) };
    assert_eq!(report.anchors, Some(anchors));
    assert_eq!(report.layers[0].recall, None);
    assert_eq!(report.layers[0].ops, OpCounts { anchor_rows: 3, ..OpCounts::default() });
    assert_eq!((report.layers[0].density, report.overall.recall.map(|r| r.rows)), (0.5, Some(4)));
}

#[test]
fn no_traces_leave_densities_only() {
    let policy = Policy::Explicit(Explicit::new(|_| SiteMask::Dense));
    let plan = standard(&policy, &Target::default()).run(dense(), &NoCalibration, Hooks::default()).unwrap();
    let report = recall_report(&plan, &policy, None, &NoCalibration, &Hooks::default()).unwrap();
    assert_eq!((report.basis, report.prompts, report.overall.recall), (Basis::None, 0, None));
    assert_eq!((report.overall.density, report.overall.ops.dense), (1.0, 6));
    assert_eq!(report.evaluated_steps, []);
}

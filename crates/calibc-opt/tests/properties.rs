//! What holds for any plan and any evidence.

mod common;

use std::collections::BTreeMap;

use calibc_ir::verify::verify;
use calibc_ir::{AttnOp, BlockEnergy, BlockMask, Geometry, Layout, Model, Plan, Site, StepId, TextPosition};
use calibc_opt::{
    CalibAtt, Calibration, Explicit, Hooks, NoCalibration, Policy, Repetition, ShareLimits, SiteMask, Split, Target,
    nearest_covered, recall_report, schedule, standard,
};
use common::{Mock, top_p, vote};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

fn geometry() -> impl Strategy<Value = Geometry> {
    let layout = prop_oneof![Just(Layout::Raster), Just(Layout::Tile([2, 4, 8]))];
    let text = prop_oneof![
        Just((0, TextPosition::None)),
        (1..200_u32).prop_map(|n| (n, TextPosition::Before)),
        (1..200_u32).prop_map(|n| (n, TextPosition::After))
    ];
    (1..4_u32, 2..8_u32, 20..60_u32, layout, text).prop_map(|(f, h, w, layout, (text_tokens, text_position))| {
        Geometry { layout, text_tokens, text_position, ..Geometry::video(f, h, w) }
    })
}

/// Rows of one unit of mass in 1/64ths: sums are exact, ties and one-hot rows are common.
fn energy(rows: u32, cols: u32, seed: &[u8]) -> BlockEnergy {
    let mut at = seed.iter().cycle().map(|&b| u32::from(b));
    let mut values = Vec::new();
    for r in 0..rows {
        let mut row = vec![0; cols as usize];
        let grain = at.next().unwrap_or(0) % 7 + 1;
        for i in 0..grain {
            row[((at.next().unwrap_or(0) + r * i) % cols) as usize] += 64 / grain;
        }
        row[(r % cols) as usize] += 64 % grain;
        values.extend(row.into_iter().map(|n: u32| f64::from(n) / 64.0));
    }
    BlockEnergy { rows, cols, values }
}

#[derive(Clone, Debug)]
struct Case {
    plan: Plan,
    mock: Mock,
    recipe: CalibAtt,
}

prop_compose! {
    fn case()(geometry in geometry(), steps in 1..5_u32, layers in 1..3_u32, heads in 1..4_u32, prompts in 1..5_usize)
        (covered in btree_set(0..steps, 1..=steps as usize), seeds in vec(vec(any::<u8>(), 40..60), prompts + 1),
         a in 0.0..0.9_f64, fall in 0.0..0.2_f64, k in 0.0..20.0_f64, rho in 0.01..=1.0_f64, gamma in prop::option::of(0.0..1.0_f64),
         geometry in Just(geometry), steps in Just(steps), layers in Just(layers), heads in Just(heads))
        -> Case
    {
        let model = Model { name: "random".into(), layers, heads, head_dim: 64 };
        let plan = Plan::dense(model, geometry, vec![1.0; steps as usize]);
        let covered: Vec<StepId> = covered.into_iter().map(StepId).collect();
        let energies = |seed: &Vec<u8>| -> BTreeMap<Site, BlockEnergy> {
            let sites = plan.sites().filter(|site| covered.contains(&site.step));
            sites.enumerate().map(|(i, site)| {
                let skew = i % seed.len();
                (site, energy(geometry.num_q_blocks(), geometry.num_kv_blocks(), &[&seed[skew..], &seed[..skew]].concat()))
            }).collect()
        };
        let similarity = plan.sites().enumerate().map(|(i, site)| (site, f64::from(seeds[0][i % seeds[0].len()]) / 255.0)).collect();
        let mock = Mock {
            calibration: seeds[1..].iter().map(energies).collect(),
            similarity, covered: covered.clone(), ..Mock::default()
        };
        let repetition = gamma.map(|gamma| Repetition { anchors: 2, gamma });
        Case { plan, mock, recipe: CalibAtt { a, c: a + fall, k, rho, repetition } }
    }
}

/// The op the recipe gives `site`, by per-prompt masks and votes.
fn by_hand(case: &Case, site: Site) -> Result<AttnOp, BlockMask> {
    let source = nearest_covered(case.plan.num_steps(), &case.mock.covered)[site.step.index()];
    let source = Site { step: source, ..site };
    if let Some(Repetition { anchors, gamma }) = case.recipe.repetition
        && case.mock.similarity[&source] >= gamma
    {
        return Ok(AttnOp::AnchorRows { anchors });
    }
    let epsilon = case.recipe.epsilon(site.step.0, case.plan.num_steps());
    let energies: Vec<_> = case.mock.calibration.iter().map(|prompt| &prompt[&source]).collect();
    let masks: Vec<_> = energies.iter().map(|energy| top_p(energy, epsilon)).collect();
    let voted = vote(&masks, case.recipe.rho);
    let text = case.plan.geometry.text_blocks();
    let cols = voted.cols();
    let mask = BlockMask::from_fn(voted.rows(), cols, |r, c| {
        let strongest = || {
            let mean = |c: u32| energies.iter().map(|e| e.row(r)[c as usize]).sum::<f64>();
            (0..cols).rev().max_by(|&a, &b| mean(a).total_cmp(&mean(b))).unwrap()
        };
        voted.get(r, c)
            || text.contains(&r)
            || text.contains(&c)
            || (text.is_empty() && voted.row_count(r) == 0 && c == strongest())
    });
    if mask.is_full() { Ok(AttnOp::Dense) } else { Err(mask) }
}

fn run_on(threads: usize, case: &Case) -> Plan {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let pipeline = standard(&Policy::CalibAtt(case.recipe), &Target::default());
    pool.install(|| pipeline.run(case.plan.clone(), &case.mock, Hooks::default())).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_pipeline_gives_every_site_what_the_recipe_says_on_any_number_of_threads(case in case()) {
        let plan = run_on(3, &case);
        prop_assert_eq!(verify(&plan), Ok(()));
        for site in plan.sites() {
            match (plan.op(site), by_hand(&case, site)) {
                (AttnOp::BlockSparse { mask }, Err(want)) => prop_assert_eq!(&plan.masks[mask], &want, "{}", site),
                (op, want) => prop_assert_eq!(Ok(op), want, "{}", site),
            }
        }
        prop_assert_eq!(run_on(1, &case), plan);
    }

    #[test]
    fn the_report_is_what_the_rows_say_on_any_number_of_threads(case in case()) {
        let plan = run_on(2, &case);
        let policy = Policy::CalibAtt(case.recipe);
        let report_on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| recall_report(&plan, &policy, None, &case.mock, &Hooks::default())).unwrap()
        };
        let report = report_on(3);
        prop_assert_eq!(&report_on(1), &report);
        // Every prompt left out in turn, masks chosen by the recipe over the others.
        let mut rows = Vec::new();
        let prompts = case.mock.calibration.len();
        for site in plan.sites().filter(|site| case.mock.covered.contains(&site.step)) {
            let AttnOp::BlockSparse { mask } = plan.op(site) else { continue };
            for left_out in 0..prompts {
                let mut others = Case { recipe: CalibAtt { repetition: None, ..case.recipe }, ..case.clone() };
                if prompts > 1 {
                    others.mock.calibration.remove(left_out);
                }
                let chosen = match by_hand(&others, site) {
                    _ if prompts == 1 => plan.masks[mask].clone(),
                    Ok(_) => BlockMask::full(plan.masks[mask].rows(), plan.masks[mask].cols()),
                    Err(chosen) => chosen,
                };
                let energy = case.mock.energy(Split::Calibration, left_out, site.step, site.layer, site.head).unwrap();
                rows.extend((0..energy.rows).map(|r| energy.recall(&chosen, r)));
            }
        }
        let Some(recall) = report.overall.recall else {
            prop_assert!(rows.is_empty());
            return Ok(());
        };
        prop_assert_eq!(recall.rows, rows.len() as u64);
        prop_assert!((recall.mean - rows.iter().sum::<f64>() / rows.len() as f64).abs() < 1e-12);
        rows.sort_by(f64::total_cmp);
        prop_assert_eq!(recall.worst.recall, rows[0]);
        let p5 = rows[rows.len().div_ceil(20) - 1];
        prop_assert!(recall.p5 <= p5 + 1e-12 && p5 < recall.p5 + 1.0001e-4, "{} for {}", recall.p5, p5);
        let by_step: u64 = report.steps.iter().filter_map(|step| step.recall.as_ref()).map(|recall| recall.rows).sum();
        let by_layer: u64 = report.layers.iter().filter_map(|layer| layer.recall.as_ref()).map(|recall| recall.rows).sum();
        prop_assert_eq!((by_step, by_layer), (recall.rows, recall.rows));
    }
}

prop_compose! {
    /// A plan of explicit masks, neighbours alike: what sharing is for.
    fn explicit()(geometry in geometry(), steps in 1..5_u32, layers in 1..3_u32, heads in 1..5_u32)
        (base in vec(any::<u32>(), 8), kinds in vec(0..12_u32, (steps * layers * heads) as usize), noise in any::<u64>(),
         geometry in Just(geometry), steps in Just(steps), layers in Just(layers), heads in Just(heads))
        -> (Plan, Explicit)
    {
        let model = Model { name: "random".into(), layers, heads, head_dim: 128 };
        let plan = Plan::dense(model, geometry, vec![1.0; steps as usize]);
        let (rows, cols) = (geometry.num_q_blocks(), geometry.num_kv_blocks());
        let index = plan.clone();
        let source = move |site: Site| {
            let i = index.site_index(site);
            match kinds[i] {
                0 => SiteMask::Dense,
                1 => SiteMask::Anchors(2),
                kind => SiteMask::Mask(BlockMask::from_fn(rows, cols, |r, c| {
                    let word = base[(kind % 8) as usize].rotate_left(r);
                    let flip = (u64::from(r * cols + c) ^ i as u64).wrapping_mul(noise | 1) >> 58 == 0;
                    c == r % cols || (word >> (c % 32) & 1 == 1) != flip
                })),
            }
        };
        (plan, Explicit::new(source))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn sharing_only_adds_blocks_and_no_more_than_allowed((plan, explicit) in explicit(), limit in 0.0..0.3_f64) {
        let policy = Policy::Explicit(explicit);
        let run = |max_extra_density| {
            let target = Target { share: ShareLimits { max_extra_density }, ..Target::default() };
            standard(&policy, &target).run(plan.clone(), &NoCalibration, Hooks::default()).unwrap()
        };
        let (plain, shared) = (run(0.0), run(limit));
        prop_assert!(shared.masks.len() <= plain.masks.len());
        for (i, (&before, &after)) in plain.ops.iter().zip(&shared.ops).enumerate() {
            let AttnOp::BlockSparse { mask: old } = before else {
                prop_assert_eq!(before, after, "op {}", i);
                continue;
            };
            let old = &plain.masks[old];
            if let AttnOp::BlockSparse { mask: new } = after {
                let mut union = shared.masks[new].clone();
                union.union_with(old);
                prop_assert_eq!(&union, &shared.masks[new], "op {} lost blocks", i);
            }
            prop_assert!(shared.density(after) - old.density() <= limit + 1e-12, "op {}", i);
        }
    }

    #[test]
    fn every_tile_is_scheduled_exactly_once((plan, explicit) in explicit(), l2_bytes in 1..1_u64 << 22, running_tiles in 1..40_u32) {
        let target = Target { l2_bytes, running_tiles, ..Target::default() };
        let plan = standard(&Policy::Explicit(explicit), &target).run(plan, &NoCalibration, Hooks::default()).unwrap();
        prop_assert_eq!(plan.schedule.as_ref(), Some(&schedule(&plan, &target)));
        let lists = plan.schedule.as_ref().unwrap();
        for (ops, &list) in plan.ops.chunks(plan.model.heads as usize).zip(&lists.list_of) {
            let mut got: Vec<_> = lists.list(list).iter().map(|item| (item.head().0, item.tile())).collect();
            got.sort_unstable();
            let want: Vec<_> = (0..).zip(ops).flat_map(|(head, op)| (0..plan.num_tiles(*op)).map(move |tile| (head, tile))).collect();
            prop_assert_eq!(got, want);
        }
    }
}

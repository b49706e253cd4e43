//! Golden tests: `golden/*.plan` hold a plan, what to run on it, and what comes out.
//!
//! A file starts with `#` lines: the passes (`# run share`), the knobs (`# max_extra_density 0.25`), and evidence
//! (`# energy p0 s0.l0.h0 = 50 30 20 / 20 30 50` in percent, `# deviation` likewise, `# similarity s0.l0.h0 0.9`,
//! `# step_weights 2 1`). Then comes the plan, a line of
//! dashes, the remarks of the passes as comments, and the plan they leave, or the error. `CALIBC_BLESS=1` writes what follows
//! the dashes anew.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use calibc_ir::{BlockEnergy, BlockMask, Geometry, Site, StepId, text};
use calibc_opt::{Budget, CalibAtt, Explicit, Hooks, Policy, Repetition, SiteMask, Target, standard};
use common::Mock;

const RULE: &str = "--------\n";

fn site(id: &str) -> Site {
    let mut parts = id.split('.').map(|part| part[1..].parse().unwrap());
    let mut next = || parts.next().unwrap();
    Site::new(next(), next(), next())
}

fn energies(rows: &str) -> BlockEnergy {
    let rows: Vec<Vec<f64>> = rows
        .split('/')
        .map(|row| row.split_whitespace().map(|e| e.parse::<f64>().unwrap() / 100.0).collect())
        .collect();
    BlockEnergy { rows: rows.len() as u32, cols: rows[0].len() as u32, values: rows.concat() }
}

/// Masks for every site: a band of `width` blocks each way, as wide as the step and head say.
fn band(geometry: Geometry, widths: BTreeMap<Site, i64>) -> Explicit {
    Explicit::new(move |site: Site| match widths.get(&site) {
        None => SiteMask::Dense,
        Some(&width) => {
            SiteMask::Mask(BlockMask::from_fn(geometry.num_q_blocks(), geometry.num_kv_blocks(), |r, c| {
                (i64::from(r) - i64::from(c)).abs() < width
            }))
        }
    })
}

fn output(input: &str) -> String {
    let knobs: Vec<&str> = input.lines().filter_map(|line| line.strip_prefix("# ")).collect();
    let plan: String = input.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    // Blank lines keep the parser's line numbers those of the file.
    let plan = text::parse(&("\n".repeat(input.lines().count() - plan.lines().count()) + &plan)).unwrap();
    let mut mock = Mock::default();
    let mut target = Target { lse: false, ..Target::default() };
    let mut recipe = CalibAtt { a: 0.8, c: 0.8, k: 0.0, rho: 0.5, repetition: None };
    let (mut run, mut widths, mut budget) = (Vec::new(), BTreeMap::new(), None);
    for knob in knobs {
        let (name, value) = knob.split_once(' ').unwrap();
        let number = || value.parse::<f64>().unwrap();
        match name {
            "run" => run = value.split_whitespace().collect(),
            "max_extra_density" => target.share.max_extra_density = number(),
            "l2_bytes" => target.l2_bytes = number() as u64,
            "running_tiles" => target.running_tiles = number() as u32,
            "a" => recipe.a = number(),
            "c" => recipe.c = number(),
            "k" => recipe.k = number(),
            "rho" => recipe.rho = number(),
            "repetition" => {
                let (anchors, gamma) = value.split_once(' ').unwrap();
                recipe.repetition =
                    Some(Repetition { anchors: anchors.parse().unwrap(), gamma: gamma.parse().unwrap() });
            }
            "band" => {
                let (id, width) = value.split_once(' ').unwrap();
                widths.insert(site(id), width.parse().unwrap());
            }
            "budget" => budget = Some(Budget { row_recall: 0.0, anchors: None, ..Budget::new(number()) }),
            "row_recall" => budget = budget.map(|b| Budget { row_recall: number(), ..b }),
            "step_floor" => budget = budget.map(|b| Budget { step_floor: number(), ..b }),
            "anchors" => budget = budget.map(|b| Budget { anchors: Some(number() as u16), ..b }),
            "anchor_error" => {
                let (id, value) = value.split_once(' ').unwrap();
                mock.errors.insert(site(id), vec![value.parse().unwrap()]);
            }
            "step_weights" => {
                let steps = value.split_whitespace().map(|w| w.parse().unwrap()).collect();
                mock.weights = Some((steps, vec![1.0; plan.ops.len()]));
            }
            "similarity" => {
                let (id, value) = value.split_once(' ').unwrap();
                mock.similarity.insert(site(id), value.parse().unwrap());
            }
            "energy" | "deviation" => {
                let (which, rows) = value.split_once(" = ").unwrap();
                let (prompt, id) = which.split_once(' ').unwrap();
                let (prompt, site) = (prompt[1..].parse::<usize>().unwrap(), site(id));
                let of_prompts = if name == "energy" { &mut mock.calibration } else { &mut mock.deviation };
                of_prompts.resize(of_prompts.len().max(prompt + 1), BTreeMap::new());
                of_prompts[prompt].insert(site, energies(rows));
                if !mock.covered.contains(&site.step) {
                    mock.covered.push(site.step);
                }
            }
            _ => panic!("unknown knob `{name}`"),
        }
    }
    mock.covered.sort_unstable_by_key(|&StepId(step)| step);
    let policy = match budget {
        Some(budget) => Policy::Budget(budget),
        None if widths.is_empty() => Policy::CalibAtt(recipe),
        None => Policy::Explicit(band(plan.geometry, widths)),
    };
    let pipeline = standard(&policy, &target).only(&run);
    assert_eq!(pipeline.names(), run, "passes in their order");
    let mut remarks = String::new();
    let mut note = |report: &calibc_opt::PassReport, _: &calibc_ir::Plan| {
        let said = if report.changed { report.remarks.join("; ") } else { "nothing to do".into() };
        writeln!(remarks, "; {}: {said}", report.pass).unwrap();
    };
    match pipeline.run(plan, &mock, Hooks { after_pass: Some(&mut note), ..Hooks::default() }) {
        Ok(plan) => remarks + &text::print(&plan, text::Options { schedule: true }).to_string(),
        Err(error) => format!("{remarks}error: {error}\n"),
    }
}

#[test]
fn passes_leave_the_plans_written_down() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "the golden files are there");
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let (input, expected) = text.split_once(RULE).unwrap_or((&text, ""));
        let found = output(input);
        if std::env::var_os("CALIBC_BLESS").is_some() {
            std::fs::write(&file, format!("{input}{RULE}{found}")).unwrap();
        } else if found != expected {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            wrong.push(format!("{name}:\n--- expected\n{expected}--- found\n{found}"));
        }
    }
    assert!(wrong.is_empty(), "{}\nCALIBC_BLESS=1 rewrites the files", wrong.join("\n"));
}

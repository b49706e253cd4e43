//! One suite of randomised problems, two backends: the CPU reference against naive masked attention everywhere, and CUDA against
//! the CPU reference where there is a GPU.
//!
//! Without a GPU the CUDA tests report a skip with its reason; `CALIBC_REQUIRE_GPU=1` makes that a failure. The test executable can
//! be carried to another machine: it generates all inputs, and needs an NVRTC there or kernels as `kernels` describes.
//! Every family of kernels that the GPU runs meets every problem. `CALIBC_TEST_PROBLEM=17` runs one problem,
//! `CALIBC_TEST_FAMILY=hopper` one family.

#[path = "../../crates/calibc-runtime/tests/support/counting.rs"]
mod counting;
mod device;
mod graph;
mod kernels;
mod problem;
mod window;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, ensure};
use calibc_bundle::Kernel;
use calibc_ir::{Arch, DType, Family, Geometry, HEAD_DIMS, Plan, Site, TextPosition, Variant};
use calibc_nvrtc::testing::SKIP_PREFIX;
use calibc_runtime::cuda::{Device, Stream};
use calibc_runtime::reference::{self, Options, Output, masked};
use calibc_runtime::{Engine, Residency, RuntimeError};
use rayon::prelude::*;

use device::{Loaded, Written, bundle};
use graph::Graph;
use problem::{COUNT, HeadKind, Inputs, Kept, Numbers, Problem};

/// Largest relative Frobenius error of outputs against f32.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 4e-3,
        DType::Fp16 => 1e-3,
    }
}

/// Largest absolute error of a log-sum-exp.
const LSE_TOLERANCE: f64 = 1e-3;

/// Prints past the test harness, which would swallow it.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// The first GPU; where there is none, the test is over.
fn gpu() -> Option<Device> {
    match device::first_gpu() {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var_os("CALIBC_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!required, "CALIBC_REQUIRE_GPU=1, but {error:#}");
            let name = std::thread::current().name().unwrap_or("a test").to_owned();
            let _ = std::io::stderr().write_all(format!("{SKIP_PREFIX}{name}: {error:#}\n").as_bytes());
            None
        }
    }
}

/// The families to test on `arch`.
fn families(arch: Arch) -> Vec<Family> {
    let only = std::env::var("CALIBC_TEST_FAMILY").ok().map(|name| name.parse::<Family>().expect("a family's name"));
    kernels::families(arch).into_iter().filter(|family| only.is_none_or(|only| only == *family)).collect()
}

fn problems() -> Vec<Problem> {
    let only = std::env::var("CALIBC_TEST_PROBLEM").ok().map(|n| n.parse::<u64>().expect("a problem's number"));
    (0..COUNT).filter(|n| only.is_none_or(|only| only == *n)).map(Problem::new).collect()
}

fn on_cpu(problem: &Problem, plan: &Plan, inputs: &Inputs) -> anyhow::Result<Output> {
    let options = Options { softmax_scale: problem.softmax_scale, round_to: None };
    let output = inputs.with(|[q, k, v]| reference::attention(plan, problem.step, problem.layer, q, k, v, &options))?;
    Ok(output)
}

/// Relative Frobenius error; the absolute one where `want` is all zeros.
fn relative(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (error, norm) =
        pairs.fold((0.0, 0.0), |(error, norm), (got, want)| (error + (got - want).powi(2), norm + want * want));
    if norm == 0.0 { f64::sqrt(error) } else { f64::sqrt(error / norm) }
}

/// Greatest difference; infinite where one side is -inf or NaN and the other is not.
fn greatest(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    pairs
        .map(|(got, want)| if got == want { 0.0 } else { (got - want).abs() })
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

/// How far the CPU reference is from naive attention, on sampled rows of every head.
struct Compared {
    error: f64,
    lse_error: f64,
    /// Rows that may see no key at all.
    without_keys: usize,
}

fn compare_reference(problem: &Problem) -> anyhow::Result<Compared> {
    let (plan, inputs) = (problem.plan(), problem.inputs());
    let got = on_cpu(problem, &plan, &inputs)?;
    let [batch, heads, tokens, d] = got.shape;
    let mut numbers = Numbers::new(problem.number);
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let mut rows: BTreeSet<u32> = (0..12).map(|_| numbers.below(tokens as u64) as u32).collect();
        rows.extend([0, tokens as u32 - 1]);
        let rows: Vec<u32> = rows.into_iter().collect();
        let site = Site::new(problem.step.0, problem.layer.0, h as u32);
        let want = inputs.with(|[q, k, v]| masked::rows(&plan, site, b, q, k, v, problem.softmax_scale, &rows))?;
        for (&row, want) in rows.iter().zip(&want) {
            let at = (b * heads + h) * tokens + row as usize;
            let got_row = &got.out[at * d..][..d];
            outs.extend(got_row.iter().zip(&want.out).map(|(&got, &want)| (f64::from(got), want)));
            lses.push((f64::from(got.lse[at]), want.lse));
        }
    }
    let without_keys = lses.iter().filter(|(_, want)| *want == f64::NEG_INFINITY).count();
    Ok(Compared { error: relative(outs.into_iter()), lse_error: greatest(lses.into_iter()), without_keys })
}

#[test]
fn the_reference_agrees_with_naive_attention() {
    let problems = problems();
    let mut without_keys = 0;
    for problem in &problems {
        let compared = compare_reference(problem).unwrap();
        assert!(compared.error < 5e-6, "{problem}: relative error {:.2e}", compared.error);
        // Scores in the hundreds have units in the last place of 3e-5.
        let far = problem.ramp.is_some() || problem.spread >= 30.0;
        let allowed = if far { 2e-4 } else { 5e-5 };
        assert!(compared.lse_error < allowed, "{problem}: log-sum-exp off by {:.2e}", compared.lse_error);
        without_keys += compared.without_keys;
    }
    assert!(without_keys > 0 || problems.len() < COUNT as usize, "the suite has rows that see no key");
}

/// Runs one problem twice on the GPU; output and log-sum-exp errors against `want`.
fn cuda_errors(
    device: &Device,
    problem: &Problem,
    plan: &Plan,
    kernel: &Kernel,
    inputs: &Inputs,
    want: &Output,
) -> anyhow::Result<(f64, f64)> {
    let loaded = Loaded::new(device, problem, plan, kernel, inputs)?;
    let got = loaded.run()?;
    let again = loaded.run()?;
    ensure!(got.bits == again.bits, "a second run gave other bits");
    let bits = |lse: &Option<Vec<f32>>| lse.as_ref().map(|lse| lse.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    ensure!(bits(&got.lse) == bits(&again.lse), "a second run gave other log-sum-exps");
    Ok(errors(&got, want))
}

fn errors(got: &Written, want: &Output) -> (f64, f64) {
    let pairs = |got: &[f32], want: &[f32]| {
        got.iter().map(|&x| f64::from(x)).zip(want.iter().map(|&x| f64::from(x))).collect::<Vec<_>>()
    };
    let lse = got.lse.as_ref().map_or(0.0, |lse| greatest(pairs(lse, &want.lse).into_iter()));
    (relative(pairs(&got.out, &want.out).into_iter()), lse)
}

#[test]
fn cuda_agrees_with_the_reference() {
    let Some(device) = gpu() else { return prepare() };
    let info = device.info().unwrap();
    let arch = kernels::arch_for(info.compute_capability).unwrap();
    print(&format!("\n{} ({arch}, driver CUDA {}.{})\n", info.name, info.driver_version.0, info.driver_version.1));
    let work: Vec<(Problem, Plan)> = problems().into_par_iter().map(|p| (p.clone(), p.plan())).collect();
    let kernels = kernels::kernels(&variants(&work), arch).unwrap();
    let families = families(arch);
    let (mut failures, mut worst) = (Vec::new(), [[(0.0, 0.0); DType::ALL.len()]; Family::ALL.len()]);
    for (problem, plan) in &work {
        let inputs = problem.inputs();
        let want = on_cpu(problem, plan, &inputs).unwrap();
        for &family in &families {
            let kernel = &kernels[&(family, problem.variant(plan))];
            let verdict = match cuda_errors(&device, problem, plan, kernel, &inputs, &want) {
                Err(error) => Err(format!("{error:#}")),
                Ok((error, lse)) => {
                    let worst = &mut worst[family as usize][problem.dtype as usize];
                    *worst = (f64::max(worst.0, error), f64::max(worst.1, lse));
                    let good = error <= tolerance(problem.dtype) && lse <= LSE_TOLERANCE;
                    let text = format!("error {error:.2e} lse {lse:.2e}");
                    if good { Ok(text) } else { Err(text) }
                }
            };
            let family = family.to_string();
            match verdict {
                Ok(text) => print(&format!("ok   {family:8} {text}  {problem}\n")),
                Err(text) => {
                    print(&format!("FAIL {family:8} {text}  {problem}\n"));
                    failures.push(format!("{family} #{}", problem.number));
                }
            }
        }
    }
    for family in families {
        for (dtype, (error, lse)) in DType::ALL.iter().zip(worst[family as usize]) {
            let allowed = tolerance(*dtype);
            print(&format!("worst {family} {dtype}: error {error:.2e} (allowed {allowed:.0e}), lse {lse:.2e}\n"));
        }
    }
    assert!(failures.is_empty(), "failed: {}", failures.join(", "));
}

fn variants(work: &[(Problem, Plan)]) -> Vec<Variant> {
    let variants: BTreeSet<Variant> = work.iter().map(|(problem, plan)| problem.variant(plan)).collect();
    variants.into_iter().collect()
}

/// Without a GPU: where a folder for kernels is named, fills it for another machine.
fn prepare() {
    if std::env::var_os("CALIBC_TEST_KERNELS").is_some() {
        let tails = HEAD_DIMS.map(|head_dim| every_tail_of(Problem::new(0), head_dim));
        let work: Vec<(Problem, Plan)> =
            problems().into_iter().chain([window::problem()]).chain(tails).map(|p| (p.clone(), p.plan())).collect();
        let arch = kernels::arch_for((9, 0)).unwrap();
        let kernels = kernels::kernels(&variants(&work), arch).unwrap();
        print(&format!("{} kernels for {arch} are ready\n", kernels.len()));
    }
}

/// The first problem that `wanted` accepts, loaded with a kernel of each family in turn.
fn with_problem(
    device: &Device,
    wanted: impl Fn(&Problem) -> bool,
    run: impl Fn(&Problem, &Plan, &Loaded<'_>) -> anyhow::Result<()>,
) {
    with_changed(device, wanted, |problem| problem, run);
}

/// As [`with_problem`], with the problem changed first.
fn with_changed(
    device: &Device,
    wanted: impl Fn(&Problem) -> bool,
    change: impl FnOnce(Problem) -> Problem,
    run: impl Fn(&Problem, &Plan, &Loaded<'_>) -> anyhow::Result<()>,
) {
    let problem = change((0..COUNT).map(Problem::new).find(wanted).expect("the suite has such a problem"));
    let (plan, inputs) = (problem.plan(), problem.inputs());
    let arch = kernels::arch_for(device.info().unwrap().compute_capability).unwrap();
    let variant = problem.variant(&plan);
    let kernels = kernels::kernels(&[variant], arch).unwrap();
    for family in families(arch) {
        let result = Loaded::new(device, &problem, &plan, &kernels[&(family, variant)], &inputs)
            .and_then(|loaded| run(&problem, &plan, &loaded));
        result.with_context(|| format!("{family} {problem}")).unwrap();
    }
}

#[test]
fn a_captured_graph_follows_the_step_in_memory() {
    let Some(device) = gpu() else { return };
    with_problem(
        &device,
        |p| p.lse && p.heads.len() > 2 && p.geometry.q_tokens() > 256,
        |problem, plan, loaded| {
            let graph = Graph::capture(loaded.stream(), || Ok(loaded.submit(true)?))?;
            for step in [0, 1, 0] {
                loaded.set_step(step)?;
                loaded.poison()?;
                graph.replay(loaded.stream())?;
                loaded.stream().synchronize()?;
                let got = loaded.collect()?;
                let at_step = Problem { step: calibc_ir::StepId(step), ..problem.clone() };
                let (error, lse) = errors(&got, &on_cpu(&at_step, plan, &problem.inputs())?);
                ensure!(
                    error <= tolerance(problem.dtype) && lse <= LSE_TOLERANCE,
                    "step {step}: {error:.2e} {lse:.2e}"
                );
            }
            Ok(())
        },
    );
}

#[test]
fn inputs_may_repeat_memory() {
    let Some(device) = gpu() else { return };
    let shared = |p: Problem| Problem { one_kv_head: true, ..p };
    for token_major in [false, true] {
        with_changed(
            &device,
            |p| p.heads.len() > 2 && p.token_major == token_major && p.geometry.kv_tokens() > 256,
            shared,
            |problem, plan, loaded| {
                let (error, lse) = errors(&loaded.run()?, &on_cpu(problem, plan, &problem.inputs())?);
                ensure!(error <= tolerance(problem.dtype) && lse <= LSE_TOLERANCE, "{error:.2e} {lse:.2e}");
                Ok(())
            },
        );
    }
}

/// A NaN among the keys reaches the rows that read it, and no kernel waits for sums to become numbers.
#[test]
fn a_nan_spoils_only_what_reads_it() {
    let Some(device) = gpu() else { return };
    with_problem(
        &device,
        |p| p.heads.len() > 2 && p.heads[0] == HeadKind::Dense && p.shapes()[1][2] > 300,
        |problem, _, loaded| {
            let clean = loaded.run()?;
            let mut inputs = problem.inputs();
            inputs.data[1][5 * problem.head_dim as usize] = 0x7fff;
            let spoiled = Loaded::on(loaded.engine().clone(), loaded.stream().clone(), problem, &inputs)?.run()?;
            let [_, _, tokens, d] = problem.shapes()[0];
            let head = tokens * d;
            ensure!(spoiled.bits[head..] == clean.bits[head..], "the NaN left its head");
            ensure!(spoiled.out[..head].iter().all(|x| x.is_nan()), "a row that reads the NaN is a number");
            Ok(())
        },
    );
}

#[test]
fn a_step_past_the_last_writes_nothing() {
    let Some(device) = gpu() else { return };
    with_problem(
        &device,
        |p| p.lse,
        |_, plan, loaded| {
            for step in [plan.num_steps(), u32::MAX] {
                loaded.set_step(step)?;
                loaded.poison()?;
                loaded.submit(true)?;
                loaded.stream().synchronize()?;
                ensure!(loaded.untouched()?, "step {step} wrote something");
            }
            Ok(())
        },
    );
}

#[test]
fn threads_share_one_engine() {
    let Some(device) = gpu() else { return };
    with_problem(
        &device,
        |p| !p.step_on_device && p.heads.len() > 2 && p.geometry.q_tokens() > 256,
        |_, _, loaded| {
            let first = loaded.run()?.bits;
            // All write the same values to the same place, so any interleaving must leave these.
            std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..4).map(|_| scope.spawn(|| (0..50).try_for_each(|_| loaded.submit(false)))).collect();
                threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
            })?;
            loaded.stream().synchronize()?;
            ensure!(loaded.collect()?.bits == first, "concurrent launches gave other bits");
            Ok(())
        },
    );
}

/// Tiles in parts: launches of two streams, and of a captured graph, that may run at the same time keep theirs apart.
#[test]
fn parts_of_tiles_stay_with_their_launch() {
    let Some(device) = gpu() else { return };
    with_problem(
        &device,
        |p| p.number >= problem::DRAWN && p.heads == [HeadKind::Dense; 3] && p.shapes()[1][2] > 9000,
        |problem, _, loaded| {
            let want = loaded.run()?.bits;
            // Other inputs: a part that went astray would show.
            let mut inputs = problem.inputs();
            inputs.data.iter_mut().for_each(|data| data.reverse());
            let stream = Arc::new(Stream::new(&device)?);
            let other = Loaded::on(loaded.engine().clone(), stream, problem, &inputs)?;
            let other_want = other.run()?.bits;
            ensure!(want != other_want, "the inputs differ");
            let graph = Graph::capture(other.stream(), || Ok(other.submit(true)?))?;
            for round in 0..20 {
                loaded.submit(round % 2 == 0)?;
                if round % 3 == 0 { graph.replay(other.stream())? } else { other.submit(false)? }
            }
            loaded.stream().synchronize()?;
            other.stream().synchronize()?;
            ensure!(loaded.collect()?.bits == want, "the first stream's bits changed");
            ensure!(other.collect()?.bits == other_want, "the second stream's bits changed");
            // The graph runs beside eager launches of the stream it was captured on.
            for _ in 0..20 {
                graph.replay(loaded.stream())?;
                other.submit(false)?;
            }
            loaded.stream().synchronize()?;
            other.stream().synchronize()?;
            ensure!(other.collect()?.bits == other_want, "a replay beside launches changed the bits");
            Ok(())
        },
    );
}

#[test]
fn a_launch_allocates_nothing() {
    let Some(device) = gpu() else { return };
    with_problem(
        &device,
        |p| p.lse && p.heads.len() > 2,
        |_, _, loaded| {
            loaded.submit(false)?;
            let (submitted, asked) = counting::allocations(|| (0..100).try_for_each(|i| loaded.submit(i % 2 == 1)));
            submitted?;
            ensure!(asked == 0, "100 launches allocated {asked} times");
            Ok(loaded.stream().synchronize()?)
        },
    );
}

/// Every length of the last block, of queries and of keys, on one geometry whose text is cut ever shorter.
#[test]
fn every_tail() {
    let Some(device) = gpu() else { return };
    for (missing, head_dim) in (0..128).flat_map(|missing| HEAD_DIMS.map(|head_dim| (missing, head_dim))) {
        let cut = (missing, 127 - missing);
        with_changed(
            &device,
            |_| true,
            |problem| Problem { cut, batch: 1, ..every_tail_of(problem, head_dim) },
            |problem, plan, loaded| {
                let (error, lse) = errors(&loaded.run()?, &on_cpu(problem, plan, &problem.inputs())?);
                ensure!(error <= tolerance(problem.dtype) && lse <= LSE_TOLERANCE, "{error:.2e} {lse:.2e}");
                Ok(())
            },
        );
    }
}

/// 200 video tokens, then 184 of text: cut by up to 128, the sequence ends anywhere in its last or last but one block.
fn every_tail_of(problem: Problem, head_dim: u32) -> Problem {
    let geometry = Geometry { text_tokens: 184, text_position: TextPosition::After, ..Geometry::video(1, 10, 20) };
    let heads = vec![HeadKind::Dense, HeadKind::Mask(Kept::OnePerRow), HeadKind::Mask(Kept::Percent(50))];
    Problem { geometry, heads, head_dim, lse: true, ..problem }
}

/// A bundle's kernels run another plan: other steps, layers, heads, masks and lengths.
#[test]
fn kernels_serve_other_plans() {
    let of = |wanted: &dyn Fn(&Problem) -> bool| (0..COUNT).map(Problem::new).find(|p| wanted(p)).unwrap();
    // One whose kernel can do everything, and a simpler one.
    let whole = of(&|p| p.geometry.ragged() && p.lse && p.heads.iter().any(|h| matches!(h, HeadKind::Anchors(_))));
    let other = of(&|p| {
        (p.dtype, p.head_dim, p.lse) == (whole.dtype, whole.head_dim, true)
            && p.heads.iter().all(|h| matches!(h, HeadKind::Mask(_)))
            && p.heads.len() > 1
            && p.geometry != whole.geometry
    });
    let other = Problem { steps: 5, ..other };
    let Some(device) = gpu() else { return };
    let arch = kernels::arch_for(device.info().unwrap().compute_capability).unwrap();
    let (plan, inputs, whole_plan) = (other.plan(), other.inputs(), whole.plan());
    let want = on_cpu(&other, &plan, &inputs).unwrap();
    let variant = whole.variant(&whole_plan);
    let kernels = kernels::kernels(&[variant], arch).unwrap();
    for family in families(arch) {
        let bundle = bundle(&whole, &whole_plan, &kernels[&(family, variant)]).unwrap();
        for residency in [Residency::All, Residency::Window(2)] {
            let engine = Arc::new(Engine::for_plan(0, &bundle, &plan, residency).unwrap());
            let stream = Arc::new(Stream::new(&device).unwrap());
            let got = Loaded::on(engine, stream, &other, &inputs).unwrap().run().unwrap();
            let (error, lse) = errors(&got, &want);
            assert!(error <= tolerance(other.dtype) && lse <= LSE_TOLERANCE, "{family} {other}: {error:.2e} {lse:.2e}");
        }
        let wide = Problem { head_dim: 192 - whole.head_dim, ..whole.clone() }.plan();
        let error = Engine::for_plan(0, &bundle, &wide, Residency::All).unwrap_err();
        assert!(matches!(error, RuntimeError::Unserved { .. }), "{error}");
    }
}

#[test]
fn a_bundle_for_other_gpus_is_refused() {
    let Some(device) = gpu() else { return };
    let (major, _) = device.info().unwrap().compute_capability;
    let other: Arch = if major == 12 { "sm_80" } else { "sm_120" }.parse().unwrap();
    let problem = Problem::new(0);
    let plan = problem.plan();
    let source = calibc_codegen::generate(&problem.variant(&plan), Family::Portable).unwrap();
    // Never loaded, so any bytes will do.
    let kernel = kernels::kernel(other, source, vec![1]);
    let error = Engine::new(0, &bundle(&problem, &plan, &kernel).unwrap()).unwrap_err();
    assert!(matches!(error, RuntimeError::Bundle(calibc_bundle::BundleError::NotForThisGpu { .. })), "{error}");
    let right = Kernel { arch: kernels::arch_for(device.info().unwrap().compute_capability).unwrap(), ..kernel };
    let error = Engine::new(0, &bundle(&problem, &plan, &right).unwrap()).unwrap_err();
    assert!(matches!(error, RuntimeError::Driver { .. }), "machine code that is none: {error}");
}

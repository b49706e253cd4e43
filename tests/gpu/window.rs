//! Engines that hold a window of steps, against engines that hold all.

use std::sync::Arc;

use anyhow::ensure;
use calibc_ir::{BLOCK, Geometry, StepId};
use calibc_runtime::cuda::{Device, Stream};
use calibc_runtime::{Engine, Residency, RuntimeError, StepArg};

use crate::counting::allocations;
use crate::device::{Loaded, bundle};
use crate::graph::Graph;
use crate::problem::{HeadKind, Inputs, Kept, Numbers, Problem};
use crate::{families, gpu, kernels};

const STEPS: u32 = 20;

/// A problem whose steps have different masks, and whose launches take long enough to overlap.
pub(crate) fn problem() -> Problem {
    Problem {
        geometry: Geometry::sequence(24 * BLOCK, 24 * BLOCK),
        heads: vec![HeadKind::Mask(Kept::Percent(50)), HeadKind::Mask(Kept::OnePerRow), HeadKind::Dense],
        cut: (0, 0),
        batch: 2,
        lse: true,
        steps: STEPS,
        step: StepId(3),
        softmax_scale: None,
        ..Problem::new(0)
    }
}

/// What tests of windows work with, for one family.
struct Setup<'a> {
    problem: &'a Problem,
    inputs: &'a Inputs,
    engine: Arc<Engine>,
    /// Device memory of the tables of all steps.
    all_bytes: usize,
    /// What an engine with all steps writes at each step.
    want: Vec<Vec<u16>>,
}

impl<'a> Setup<'a> {
    fn loaded(&self, stream: &Arc<Stream>) -> anyhow::Result<Loaded<'a>> {
        Loaded::on(self.engine.clone(), stream.clone(), self.problem, self.inputs)
    }

    fn check(&self, step: u32, loaded: &Loaded<'_>) -> anyhow::Result<()> {
        let got = loaded.collect()?.bits;
        ensure!(got == self.want[step as usize], "step {step} gave other bits than with all steps resident");
        Ok(())
    }
}

fn with_window(device: &Device, steps: u32, run: impl Fn(&Setup<'_>) -> anyhow::Result<()>) {
    let problem = problem();
    let (plan, inputs) = (problem.plan(), problem.inputs());
    let arch = kernels::arch_for(device.info().unwrap().compute_capability).unwrap();
    let variant = problem.variant(&plan);
    let kernels = kernels::kernels(&[variant], arch).unwrap();
    for family in families(arch) {
        let attempt = || {
            let kernel = &kernels[&(family, variant)];
            let all = Loaded::new(device, &problem, &plan, kernel, &inputs)?;
            let want = (0..STEPS).map(|step| {
                all.poison()?;
                all.submit_at(StepArg::Host(step))?;
                all.stream().synchronize()?;
                Ok(all.collect()?.bits)
            });
            let want = want.collect::<anyhow::Result<Vec<_>>>()?;
            let bundle = bundle(&problem, &plan, kernel)?;
            let engine = Engine::with_residency(device.ordinal(), &bundle, Residency::Window(steps))?;
            ensure!(engine.pinned_bytes() > 0, "a window is filled from pinned memory");
            let (engine, all_bytes) = (Arc::new(engine), all.engine().table_bytes());
            let setup = Setup { problem: &problem, inputs: &inputs, engine, all_bytes, want };
            run(&setup)
        };
        attempt().unwrap_or_else(|error| panic!("{family}, window of {steps}: {error:#}"));
    }
}

/// Launches at steps in order, out of order and again, without a wait in between, on one stream and on several.
#[test]
fn windows_give_what_all_steps_give() {
    let Some(device) = gpu() else { return };
    for (window, streams) in [(2, 1), (2, 3), (3, 2)] {
        with_window(&device, window, |setup| {
            let streams =
                (0..streams).map(|_| Ok(Arc::new(Stream::new(&device)?))).collect::<anyhow::Result<Vec<_>>>()?;
            let mut numbers = Numbers::new(u64::from(window));
            let in_order = (0..STEPS).chain(0..STEPS).collect();
            let at_random = (0..20).map(|_| numbers.below(u64::from(STEPS)) as u32).collect();
            let every_other = (0..12).map(|i| i * 2 % STEPS).collect();
            for order in [in_order, at_random, every_other] {
                let order: Vec<u32> = order;
                let launches = (0..order.len())
                    .map(|i| setup.loaded(&streams[i % streams.len()]))
                    .collect::<anyhow::Result<Vec<_>>>()?;
                launches.iter().try_for_each(Loaded::poison)?;
                for (&step, launch) in order.iter().zip(&launches) {
                    // As a sampler would: several layers at a step.
                    (0..3).try_for_each(|_| launch.submit_at(StepArg::Host(step)))?;
                }
                device.synchronize()?;
                order.iter().zip(&launches).try_for_each(|(&step, launch)| setup.check(step, launch))?;
            }
            Ok(())
        });
    }
}

#[test]
fn a_graph_follows_the_steps_that_are_entered() {
    let Some(device) = gpu() else { return };
    with_window(&device, 2, |setup| {
        let loaded = setup.loaded(&Arc::new(Stream::new(&device)?))?;
        let stream = loaded.stream();
        let graph = Graph::capture(stream, || Ok(loaded.submit(true)?))?;
        for step in (0..STEPS).chain([5, 1, 0, 6, 6]) {
            loaded.set_step(step)?;
            loaded.poison()?;
            enter(&setup.engine, step, stream)?;
            graph.replay(stream)?;
            graph.replay(stream)?;
            stream.synchronize()?;
            setup.check(step, &loaded)?;
        }
        // A launch outside of any graph follows too.
        loaded.poison()?;
        loaded.submit(true)?;
        stream.synchronize()?;
        setup.check(6, &loaded)
    });
}

fn enter(engine: &Engine, step: u32, stream: &Stream) -> Result<(), RuntimeError> {
    #[expect(unsafe_code, reason = "a raw stream")]
    // SAFETY: the stream lives through the call, and all launches are on it.
    unsafe {
        engine.enter(step, stream.raw())
    }
}

#[test]
fn what_a_window_cannot_do_is_refused() {
    let Some(device) = gpu() else { return };
    with_window(&device, 2, |setup| {
        let loaded = setup.loaded(&Arc::new(Stream::new(&device)?))?;
        let captured = Graph::capture(loaded.stream(), || Ok(loaded.submit(false)?));
        let error = captured.err().and_then(|error| error.downcast::<RuntimeError>().ok());
        ensure!(matches!(error, Some(RuntimeError::CapturedStep { step: 3 })), "{error:?}");
        let error = enter(&setup.engine, STEPS, loaded.stream()).unwrap_err();
        ensure!(matches!(error, RuntimeError::Step { step: STEPS, num_steps: STEPS }), "{error}");
        // A step that is nowhere writes nothing.
        loaded.set_step(5)?;
        loaded.poison()?;
        loaded.submit(true)?;
        loaded.stream().synchronize()?;
        ensure!(loaded.untouched()?, "a step outside of the window wrote something");
        Ok(())
    });
    let (problem, plan) = (problem(), problem().plan());
    let arch = kernels::arch_for(device.info().unwrap().compute_capability).unwrap();
    let variant = problem.variant(&plan);
    let kernels = kernels::kernels(&[variant], arch).unwrap();
    let bundle = bundle(&problem, &plan, kernels.values().next().unwrap()).unwrap();
    let error = Engine::with_residency(0, &bundle, Residency::Window(1)).unwrap_err();
    assert!(matches!(error, RuntimeError::Window { steps: 1 }), "{error}");
}

#[test]
fn windows_take_the_memory_of_their_steps_and_move_without_allocating() {
    let Some(device) = gpu() else { return };
    with_window(&device, 2, |setup| {
        let bytes = setup.engine.table_bytes();
        ensure!(2 * bytes < setup.all_bytes, "{bytes} bytes for 2 steps, {} for {STEPS}", setup.all_bytes);
        let loaded = setup.loaded(&Arc::new(Stream::new(&device)?))?;
        loaded.submit_at(StepArg::Host(0))?;
        let (submitted, asked) = allocations(|| {
            (0..3 * STEPS).try_for_each(|i| {
                (0..4).try_for_each(|_| loaded.submit_at(StepArg::Host(i % STEPS)))?;
                enter(&setup.engine, i % 5, loaded.stream())
            })
        });
        submitted?;
        ensure!(asked == 0, "launches and changes of steps allocated {asked} times");
        Ok(loaded.stream().synchronize()?)
    });
}

//! `calibc bench`: layers of a bundle on a GPU, timed beside dense attention of the same shape by the same kernels.

mod clock;
mod measure;
mod stats;
mod work;

use calibc_bundle::Bundle;
use calibc_ir::{DType, Geometry, LayerId, Plan, StepId, Variant};
use calibc_opt::Target;
use calibc_runtime::cuda::{Device, DeviceInfo, Engine, Stream};
use calibc_runtime::{Residency, RuntimeError};
use serde_json::{Value, json};

use crate::args::{BenchArgs, MemoryLayout};
use crate::console::Console;
use crate::describe::op_counts;
use crate::exit::{Exit, Failure, open_bundle};
use crate::progress::{Bars, Unit};

use clock::Nvml;
use measure::{Operands, Tensors, Timed, host_cost, rounds};
use stats::{Measured, number};
use work::{Work, at_quantiles, flops};

/// Layers that are timed unless told otherwise.
const SAMPLES: usize = 5;

/// A plan of `[steps, layers, heads]` dense sites on another geometry, scheduled, for the kernels of `like`.
fn dense_plan(like: &Plan, geometry: Geometry, [steps, layers, heads]: [u32; 3]) -> Plan {
    let mut model = like.model.clone();
    (model.layers, model.heads) = (layers, heads);
    let mut plan = Plan::dense(model, geometry, vec![1.0; steps as usize]);
    plan.schedule = Some(calibc_opt::schedule(&plan, &Target::default()));
    plan
}

/// The steps or layers asked for, or all; every one of them there is.
fn within(what: &str, asked: &[u32], count: u32) -> Result<Vec<u32>, Failure> {
    if let Some(&wrong) = asked.iter().find(|&&n| n >= count) {
        let message = format!("there is no {what} {wrong}: the bundle has {what}s 0 to {}", count - 1);
        return Err(Failure::usage(message));
    }
    Ok(if asked.is_empty() { (0..count).collect() } else { asked.to_vec() })
}

/// The layers to time.
fn choose(work: &Work<'_>, plan: &Plan, args: &BenchArgs) -> Result<Vec<(StepId, LayerId)>, Failure> {
    let steps = within("step", &args.steps, plan.num_steps())?;
    let layers = within("layer", &args.layers, plan.model.layers)?;
    let named = !args.steps.is_empty() && !args.layers.is_empty();
    let samples = match args.samples {
        Some(samples) => samples as usize,
        None if named => usize::MAX,
        None => SAMPLES,
    };
    Ok(at_quantiles(work, &steps, &layers, samples))
}

/// The variant that runs: of the element type asked for, else of the first.
fn variant(plan: &Plan, dtype: Option<DType>, lse: bool) -> Result<Variant, RuntimeError> {
    let fits = |v: &&Variant| dtype.is_none_or(|dtype| v.dtype == dtype) && v.lse == lse;
    let dtype = dtype.or(plan.variants.first().map(|v| v.dtype)).unwrap_or(DType::Bf16);
    plan.variants.iter().find(fits).copied().ok_or(RuntimeError::NoVariant { dtype, lse })
}

/// What was measured of one layer, or of the dense one.
struct Row {
    flops: f64,
    /// Share of the dense work.
    density: f64,
    ms: Measured,
}

impl Row {
    fn tflops(&self) -> f64 {
        self.flops / self.ms.median() / 1e9
    }

    fn json(&self) -> Value {
        json!({ "density": self.density, "flops": self.flops, "ms": self.ms.json(), "tflops": self.tflops() })
    }

    fn text(&self, name: &str, speedup: Option<f64>) -> String {
        let speedup = speedup.map_or(String::new(), |x| format!("{x:>10.2}"));
        format!("{name:<10}{:>8.3}{}{:>9.0}{speedup}\n", self.density, self.ms.columns(), self.tflops())
    }
}

/// Clocks in MHz; what could not be read is missing.
#[derive(Default)]
struct Clocks {
    before: Option<u32>,
    during: Vec<f64>,
    after: Option<u32>,
}

/// Everything that was measured.
struct Results<'a> {
    plan: &'a Plan,
    digest: String,
    args: &'a BenchArgs,
    variant: Variant,
    kernel: String,
    gpu: DeviceInfo,
    driver: Option<String>,
    clocks: Clocks,
    dense: Row,
    layers: Vec<((StepId, LayerId), Row, Measured)>,
    /// With all steps resident, and with a window of two.
    host: [Option<Measured>; 2],
}

pub(crate) fn bench(console: &Console, args: &BenchArgs) -> Result<Exit, Failure> {
    let bundle = open_bundle(&args.bundle)?;
    let plan = bundle.plan();
    let work = Work::new(plan);
    let chosen = choose(&work, plan, args)?;
    let variant = variant(plan, args.dtype, args.lse)?;
    let results = measure(console, args, &bundle, &work, &chosen, variant)?;
    if args.json {
        console.json("bench", results.json())?;
    } else {
        console.data(&results.text())?;
    }
    Ok(Exit::Ok)
}

fn measure<'a>(
    console: &Console,
    args: &'a BenchArgs,
    bundle: &'a Bundle,
    work: &Work<'_>,
    chosen: &[(StepId, LayerId)],
    variant: Variant,
) -> Result<Results<'a>, Failure> {
    let plan = bundle.plan();
    let engine = Engine::new(args.device, bundle)?;
    let device: &Device = engine.device();
    let dense = dense_plan(plan, plan.geometry, [1, 1, plan.model.heads]);
    let dense = Engine::for_plan(args.device, bundle, &dense, Residency::All)?;
    let kernel = engine.family(&variant).map(|family| family.symbol(&variant));
    let kernel = kernel.ok_or(RuntimeError::NoVariant { dtype: variant.dtype, lse: variant.lse })?;
    let nvml = device.pci_bus_id().ok().and_then(|id| Nvml::open(&id));
    let clock = || nvml.as_ref().and_then(Nvml::clock_mhz);
    let mut clocks = Clocks { before: clock(), ..Clocks::default() };

    let bars = Bars::of(console);
    bars.show("preparing", 0, 1, Unit::Count);
    let (batch, layout, seed) = (args.batch, args.layout, args.seed);
    let how = Tensors { batch, dtype: variant.dtype, layout, lse: args.lse, seed };
    let operands = Operands::new(device, plan, &how)?;
    bars.finish("preparing");
    let stream = Stream::new(device)?;
    let mut timed = vec![Timed { engine: &dense, step: StepId(0), layer: LayerId(0) }];
    timed.extend(chosen.iter().map(|&(step, layer)| Timed { engine: &engine, step, layer }));
    let total = u64::from(args.warmup + args.rounds);
    let times = rounds(
        &timed,
        &operands,
        &stream,
        [args.warmup, args.rounds],
        || clocks.during.extend(clock().map(f64::from)),
        |done| bars.show("rounds", u64::from(done), total, Unit::Count),
    )?;
    clocks.after = clock();
    drop(operands);
    bars.finish("rounds");
    bars.show("host cost", 0, 1, Unit::Count);
    let host = [
        host_cost(bundle, device, Residency::All, variant.dtype, args.lse)?,
        host_cost(bundle, device, Residency::Window(2), variant.dtype, args.lse)?,
    ];

    let ratio = |of: &[f64]| of.iter().zip(&times[0]).map(|(ms, dense)| dense / ms).collect();
    let row = |pairs: u64, ms: Vec<f64>| {
        let density = pairs as f64 / work.dense_pairs() as f64;
        Measured::new(ms).map(|ms| Row { flops: flops(pairs, plan.model.head_dim, batch), density, ms })
    };
    let layers = chosen.iter().zip(&times[1..]).filter_map(|(&(step, layer), ms)| {
        Some(((step, layer), row(work.pairs(step, layer), ms.clone())?, Measured::new(ratio(ms))?))
    });
    let layers = layers.collect();
    Ok(Results {
        plan,
        digest: bundle.digest(),
        args,
        variant,
        kernel,
        gpu: engine.info().clone(),
        driver: nvml.as_ref().and_then(Nvml::driver_version),
        clocks,
        dense: row(work.dense_pairs(), times[0].clone()).ok_or_else(|| Failure::usage("give at least one round"))?,
        layers,
        host,
    })
}

impl Results<'_> {
    /// Median milliseconds of the layers together, and of as many dense ones.
    fn together(&self) -> (f64, f64) {
        let ms = self.layers.iter().map(|(_, row, _)| row.ms.median()).sum();
        (ms, self.layers.len() as f64 * self.dense.ms.median())
    }

    fn tflops_together(&self) -> f64 {
        self.layers.iter().map(|(_, row, _)| row.flops).sum::<f64>() / self.together().0 / 1e9
    }

    fn layout(&self) -> &'static str {
        match self.args.layout {
            MemoryLayout::Bhsd => "bhsd",
            MemoryLayout::Bshd => "bshd",
        }
    }

    fn json(&self) -> Value {
        let &Self { plan, args, ref gpu, ref clocks, .. } = self;
        let (major, minor) = gpu.compute_capability;
        let (ms, dense_ms) = self.together();
        let during = Measured::new(clocks.during.clone());
        let layers: Vec<Value> = (self.layers.iter())
            .map(|((step, layer), row, speedup)| {
                let [dense, block_sparse, anchor_rows] = op_counts(plan.layer_ops(*step, *layer));
                let mut value = row.json();
                crate::describe::merge(
                    &mut value,
                    json!({
                        "step": step.0, "layer": layer.0, "speedup": speedup.median(),
                        "ops": { "dense": dense, "block_sparse": block_sparse, "anchor_rows": anchor_rows },
                    }),
                );
                value
            })
            .collect();
        let host = |measured: &Option<Measured>| {
            measured.as_ref().map(|m| {
                json!({ "calls": m.len(), "median_us": m.median(), "p99_us": m.percentile(99.0), "max_us": m.percentile(100.0) })
            })
        };
        json!({
            "gpu": {
                "name": gpu.name, "compute_capability": [major, minor], "multiprocessors": gpu.multiprocessors,
                "driver": self.driver, "cuda": [gpu.driver_version.0, gpu.driver_version.1],
                "clock_mhz": {
                    "max": (gpu.max_clock_mhz > 0).then_some(gpu.max_clock_mhz),
                    "before": clocks.before, "during": during.map(|m| m.json()), "after": clocks.after,
                },
            },
            "bundle": self.digest,
            "model": plan.model.name,
            "problem": {
                "batch": args.batch, "heads": plan.model.heads, "head_dim": plan.model.head_dim,
                "q_tokens": plan.geometry.q_tokens(), "kv_tokens": plan.geometry.kv_tokens(),
                "dtype": self.variant.dtype.to_string(), "layout": self.layout(), "lse": args.lse, "seed": args.seed,
            },
            "kernel": self.kernel,
            "warmup": args.warmup,
            "rounds": args.rounds,
            "dense": self.dense.json(),
            "layers": layers,
            "together": { "ms": ms, "dense_ms": dense_ms, "speedup": dense_ms / ms, "tflops": self.tflops_together() },
            "host": { "all_steps": host(&self.host[0]), "window": host(&self.host[1]) },
        })
    }

    fn text(&self) -> String {
        let &Self { plan, args, ref gpu, ref clocks, .. } = self;
        let (cuda, driver) = (gpu.driver_version, self.driver.as_ref().map_or(String::new(), |v| format!(" {v}")));
        let mut text = format!("{}, driver{driver} (CUDA {}.{})", gpu.name, cuda.0, cuda.1);
        let mhz = |value: Option<u32>| value.map_or("?".to_owned(), |mhz| mhz.to_string());
        if let Some(during) = Measured::new(clocks.during.clone()) {
            let [low, median] = [0.0, 50.0].map(|p| during.percentile(p));
            text += &format!(
                ", {median:.0} MHz (lowest {low:.0}; {} before, {} after; at most {})",
                mhz(clocks.before),
                mhz(clocks.after),
                gpu.max_clock_mhz
            );
        } else if gpu.max_clock_mhz > 0 {
            text += &format!(", at most {} MHz", gpu.max_clock_mhz);
        }
        let g = &plan.geometry;
        let tokens = match (g.q_tokens(), g.kv_tokens()) {
            (q, kv) if q == kv => format!("{q}"),
            (q, kv) => format!("{q} (keys {kv})"),
        };
        text += &format!(
            "\n{}: {} x {} heads x {tokens} tokens x {}, {}, {}\n{}, {} rounds after {}\n\n",
            plan.model.name,
            args.batch,
            plan.model.heads,
            plan.model.head_dim,
            self.variant.dtype,
            self.layout(),
            self.kernel,
            args.rounds,
            args.warmup,
        );
        text += &format!("{:<10}{:>8}{}{:>9}{:>10}\n", "ms", "density", Measured::names(), "TFLOP/s", "speed-up");
        for ((step, layer), row, speedup) in &self.layers {
            text += &row.text(&format!("{step}.{layer}"), Some(speedup.median()));
        }
        text += &self.dense.text("dense", None);
        let (ms, dense_ms) = self.together();
        text += &format!(
            "\ntogether  {} ms, {:.0} TFLOP/s of what is computed; {:.2} times as fast as dense ({} ms)\n",
            number(ms),
            self.tflops_together(),
            dense_ms / ms,
            number(dense_ms)
        );
        let host = |measured: &Option<Measured>| {
            measured
                .as_ref()
                .map_or("?".to_owned(), |m| format!("{:.2} us median, {:.2} us p99", m.median(), m.percentile(99.0)))
        };
        text += &format!(
            "host      {} per call; {} with a window of two steps\n",
            host(&self.host[0]),
            host(&self.host[1])
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use calibc_ir::{AttnOp, BlockMask, Model};
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    /// Two steps of one layer of two heads on 2 x 2 blocks: step 0 keeps the diagonal in one head, step 1 in both.
    fn plan() -> Plan {
        let model = Model { name: "tiny".into(), layers: 1, heads: 2, head_dim: 64 };
        let mut plan = Plan::dense(model, Geometry::sequence(256, 256), vec![1.0, 0.5]);
        let mask = plan.masks.intern(BlockMask::from_fn(2, 2, |r, c| r == c));
        [0, 2, 3].into_iter().for_each(|site| plan.ops[site] = AttnOp::BlockSparse { mask });
        plan.variants = [DType::Bf16, DType::Fp16]
            .map(|dtype| Variant { dtype, head_dim: 64, lse: false, anchors: false, ragged: false })
            .to_vec();
        plan
    }

    fn args(more: &[&str]) -> BenchArgs {
        match Cli::try_parse_from(["calibc", "bench", "x"].iter().chain(more)).unwrap().command {
            Command::Bench(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn results<'a>(plan: &'a Plan, args: &'a BenchArgs, work: &Work<'_>) -> Results<'a> {
        let row = |pairs: u64, ms: &[f64]| Row {
            flops: flops(pairs, 64, args.batch),
            density: pairs as f64 / work.dense_pairs() as f64,
            ms: Measured::new(ms.to_vec()).unwrap(),
        };
        let layer = |step: u32, ms: &[f64], speedup: f64| {
            let at = (StepId(step), LayerId(0));
            (at, row(work.pairs(at.0, at.1), ms), Measured::new(vec![speedup]).unwrap())
        };
        Results {
            plan,
            digest: "d1ce".into(),
            args,
            variant: plan.variants[0],
            kernel: "calibc_attn_bf16_hd64".into(),
            gpu: DeviceInfo {
                name: "A GPU".into(),
                compute_capability: (9, 0),
                driver_version: (12, 8),
                multiprocessors: 132,
                memory_bytes: 1 << 36,
                l2_bytes: 1 << 25,
                max_clock_mhz: 1980,
            },
            driver: Some("570.1".into()),
            clocks: Clocks { before: Some(345), during: vec![1755.0, 1830.0, 1800.0], after: None },
            dense: row(work.dense_pairs(), &[4.0, 4.0, 4.2]),
            layers: vec![layer(0, &[3.0, 3.1, 2.9], 1.33), layer(1, &[2.0, 2.2, 2.0], 2.0)],
            host: [Measured::new(vec![2.0, 3.0, 4.0]), None],
        }
    }

    #[test]
    fn results_read_well() {
        let (plan, args) = (plan(), args(&["--rounds", "3", "--batch", "2"]));
        let work = Work::new(&plan);
        let text = results(&plan, &args, &work).text();
        let want = "\
A GPU, driver 570.1 (CUDA 12.8), 1800 MHz (lowest 1755; 345 before, ? after; at most 1980)
tiny: 2 x 2 heads x 256 tokens x 64, bf16, bhsd
calibc_attn_bf16_hd64, 3 rounds after 3

ms         density      min      p10   median      p90      p99      max  TFLOP/s  speed-up
s0.l0        0.750    2.900    2.920    3.000    3.080    3.098    3.100        0      1.33
s1.l0        0.500    2.000    2.000    2.000    2.160    2.196    2.200        0      2.00
dense        1.000    4.000    4.000    4.000    4.160    4.196    4.200        0

together  5.000 ms, 0 TFLOP/s of what is computed; 1.60 times as fast as dense (8.000 ms)
host      3.00 us median, 3.98 us p99 per call; ? with a window of two steps
";
        assert_eq!(text, want);
    }

    #[test]
    fn json_has_every_number() {
        let (plan, args) = (plan(), args(&["--rounds", "3", "--layout", "bshd"]));
        let work = Work::new(&plan);
        let json = results(&plan, &args, &work).json();
        let number = |at: &str| json.pointer(at).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {at}: {json:#}"));
        assert_eq!(number("/layers/0/flops"), 4.0 * 64.0 * (128.0 * 128.0 * 6.0));
        assert_eq!(number("/dense/flops"), 4.0 * 64.0 * (256.0 * 256.0 * 2.0));
        assert_eq!(number("/layers/1/tflops"), number("/layers/1/flops") / 2.0 / 1e9);
        assert_eq!((number("/layers/1/density"), number("/layers/1/speedup")), (0.5, 2.0));
        for name in ["min", "p10", "median", "p90", "p99", "max"] {
            assert!(number(&format!("/layers/0/ms/{name}")) > 0.0 && number(&format!("/dense/ms/{name}")) > 0.0);
        }
        assert_eq!((number("/together/ms"), number("/together/speedup")), (5.0, 1.6));
        assert_eq!((number("/host/all_steps/median_us"), number("/host/all_steps/calls")), (3.0, 3.0));
        assert_eq!(json["host"]["window"], Value::Null);
        assert_eq!(number("/gpu/clock_mhz/during/median"), 1800.0);
        assert_eq!((&json["gpu"]["clock_mhz"]["after"], &json["gpu"]["driver"]), (&Value::Null, &json!("570.1")));
        assert_eq!(json["layers"][0]["ops"], json!({ "dense": 1, "block_sparse": 1, "anchor_rows": 0 }));
        assert_eq!((&json["problem"]["layout"], &json["problem"]["dtype"]), (&json!("bshd"), &json!("bf16")));
    }

    #[test]
    fn layers_that_are_not_there_are_wrong_usage() {
        let plan = plan();
        let work = Work::new(&plan);
        let chosen = |more: &[&str]| choose(&work, &plan, &args(more));
        assert_eq!(chosen(&[]).unwrap().len(), 2);
        assert_eq!(chosen(&["--samples", "1"]).unwrap(), [(StepId(1), LayerId(0))]);
        assert_eq!(chosen(&["--step", "0", "--layer", "0"]).unwrap(), [(StepId(0), LayerId(0))]);
        for (more, words) in
            [(["--step", "2"], "no step 2: the bundle has steps 0 to 1"), (["--layer", "1"], "layers 0 to 0")]
        {
            let failure = chosen(&more).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.to_string().contains(words), "{failure}");
        }
    }

    #[test]
    fn the_kernel_is_the_one_asked_for() {
        let plan = plan();
        assert_eq!(variant(&plan, None, false).unwrap().dtype, DType::Bf16);
        assert_eq!(variant(&plan, Some(DType::Fp16), false).unwrap().dtype, DType::Fp16);
        let error = variant(&plan, Some(DType::Fp16), true).unwrap_err();
        assert!(matches!(error, RuntimeError::NoVariant { dtype: DType::Fp16, lse: true }));
    }

    #[test]
    fn dense_plans_are_scheduled_and_valid() {
        let like = plan();
        for (geometry, counts) in [(like.geometry, [1, 1, 2]), (Geometry::sequence(128, 128), [4, 16, 1])] {
            let dense = dense_plan(&like, geometry, counts);
            assert_eq!(calibc_ir::verify::verify(&dense), Ok(()));
            assert_eq!([dense.num_steps(), dense.model.layers, dense.model.heads], counts);
            let tiles = counts.iter().product::<u32>() * dense.num_tiles(AttnOp::Dense);
            let schedule = dense.schedule.unwrap();
            let items: usize = schedule.list_of.iter().map(|&list| schedule.list(list).len()).sum();
            assert_eq!(items, tiles as usize);
        }
    }
}

//! `calibc compile`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use calibc_driver::{CacheChoice, Event, Observer, Options, Output, Stage};
use serde_json::{Value, json};

use crate::args::{CompileArgs, Emit, ToolchainArgs};
use crate::console::{Console, bytes, count, seconds};
use crate::describe;
use crate::exit::{Exit, Failure};
use crate::progress::Bars;

impl From<Emit> for calibc_driver::Emit {
    fn from(emit: Emit) -> Self {
        match emit {
            Emit::Plan => Self::Plan,
            Emit::Cuda => Self::Cuda,
            Emit::Cubin => Self::Cubin,
            Emit::Bundle => Self::Bundle,
        }
    }
}

fn cache_choice(args: &ToolchainArgs) -> CacheChoice {
    match (&args.cache_dir, args.no_cache) {
        (_, true) => CacheChoice::Off,
        (Some(dir), false) => CacheChoice::Dir(dir.clone()),
        (None, false) => CacheChoice::Default,
    }
}

/// Shows progress, and writes dumps where they are wanted. Passes run one after the other, so dumps come in order.
struct Listener<'a> {
    bars: Bars,
    dump_dir: Option<&'a Path>,
    /// The first dump that could not be written.
    failed: Mutex<Option<Failure>>,
}

impl Observer for Listener<'_> {
    fn event(&self, event: &Event<'_>) {
        if let Event::Dump { index, pass, text } = *event {
            match self.dump_dir {
                None => self.bars.line(text.trim_end()),
                Some(dir) => {
                    let path = dir.join(format!("{index:02}-{pass}.txt"));
                    if let Err(e) = fs::write(&path, text) {
                        let mut failed = self.failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                        failed.get_or_insert(Failure::io("write", &path, e));
                    }
                }
            }
        }
        self.bars.event(event);
    }

    fn cancelled(&self) -> bool {
        self.failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).is_some()
    }
}

/// Whether the result can be put where it is wanted, before the work is done. Leaves nothing behind.
///
/// # Errors
/// The file system's refusal.
pub fn check_output(path: &Path, emit: calibc_driver::Emit) -> Result<(), Failure> {
    use calibc_driver::Emit as Wanted;
    let is_folder = path.is_dir();
    let folder = match emit {
        Wanted::Cuda | Wanted::Cubin => {
            if path.exists() && !is_folder {
                let error = std::io::Error::from(std::io::ErrorKind::NotADirectory);
                return Err(Failure::io("write a folder of kernels to", path, error));
            }
            fs::create_dir_all(path).map_err(|e| Failure::io("create the folder", path, e))?;
            path
        }
        Wanted::Plan | Wanted::Bundle => {
            if is_folder {
                let error = std::io::Error::from(std::io::ErrorKind::IsADirectory);
                return Err(Failure::io("write to", path, error));
            }
            match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            }
        }
    };
    tempfile::tempfile_in(folder).map(drop).map_err(|e| Failure::io("write to the folder", folder, e))
}

pub(crate) fn compile(console: &Console, args: &CompileArgs) -> Result<Exit, Failure> {
    let start = Instant::now();
    match &args.output {
        Some(path) => check_output(path, args.emit.into())?,
        None if args.emit == Emit::Plan && args.json => {
            return Err(Failure::usage(
                "both the plan and --json would go to stdout; give the plan a place with -o OUT",
            ));
        }
        None if args.emit == Emit::Plan => {}
        None => return Err(Failure::usage("give the place of the result with -o OUT")),
    }
    if let Some(dir) = &args.dump_dir {
        fs::create_dir_all(dir).map_err(|e| Failure::io("create the folder", dir, e))?;
    }
    let options = Options {
        traces: args.traces.clone(),
        spec: args.spec.clone(),
        archs: args.archs.clone(),
        portable: args.portable,
        nvrtc: args.toolchain.nvrtc.clone(),
        cache: cache_choice(&args.toolchain),
        emit: args.emit.into(),
        dump_after: args.dump_after.clone(),
    };
    let listener = Listener { bars: Bars::of(console), dump_dir: args.dump_dir.as_deref(), failed: Mutex::default() };
    let compiled = calibc_driver::compile(&options, &listener);
    if let Some(failure) = listener.failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        return Err(failure);
    }
    drop(listener.bars);
    let output = compiled?;
    let written = write(console, args, &output)?;
    if args.json {
        console.json("compile", summary_json(args, &output, &written, start.elapsed()))?;
    } else if !console.quiet && args.output.is_some() {
        console.data(&summary(args, &output, &written, start.elapsed()))?;
    }
    Ok(Exit::Ok)
}

/// Puts the result where it belongs; returns the files.
fn write(console: &Console, args: &CompileArgs, output: &Output) -> Result<Vec<PathBuf>, Failure> {
    let files: Vec<(PathBuf, Vec<u8>)> = match (&args.output, args.emit) {
        (None, _) => {
            console.data(&output.plan().to_string())?;
            return Ok(Vec::new());
        }
        (Some(path), Emit::Plan) => vec![(path.clone(), output.plan().to_string().into_bytes())],
        (Some(folder), Emit::Cuda) => {
            let sources = output.sources.iter();
            sources.map(|s| (folder.join(format!("{}.cu", s.symbol)), s.text.clone().into_bytes())).collect()
        }
        (Some(folder), Emit::Cubin) => {
            let kernels = output.kernels.iter().map(|built| &built.kernel);
            kernels.map(|k| (folder.join(format!("{}.{}.cubin", k.symbol, k.arch)), k.cubin.clone())).collect()
        }
        (Some(path), Emit::Bundle) => match &output.packed {
            // Not cloned: it may be gigabytes.
            Some(packed) => {
                calibc_bundle::write(path, &packed.bytes)?;
                return Ok(vec![path.clone()]);
            }
            None => Vec::new(),
        },
    };
    for (path, content) in &files {
        calibc_bundle::write(path, content)?;
    }
    Ok(files.into_iter().map(|(path, _)| path).collect())
}

fn summary(args: &CompileArgs, output: &Output, written: &[PathBuf], total: Duration) -> String {
    let plan = output.plan();
    let mut text = describe::head(plan);
    if let Some(traces) = output.traces {
        text += &format!(
            "traces    {}, {} holdout, {} of {} steps covered\n",
            count(traces.calibration_prompts as u64, "calibration prompt"),
            traces.holdout_prompts,
            traces.covered_steps,
            plan.num_steps()
        );
    }
    text += &describe::sites(plan);
    if let Some(packed) = &output.packed {
        text += &describe::budget(packed.bundle.report());
        text += &describe::recall(packed.bundle.report());
    }
    if !output.kernels.is_empty() {
        let cached = output.kernels.iter().filter(|built| built.cached).count();
        let archs: Vec<String> = output.job.archs.iter().map(ToString::to_string).collect();
        text += &format!(
            "kernels   {} ({} from the cache): {} for {}\n",
            output.kernels.len(),
            cached,
            count(plan.variants.len() as u64, "variant"),
            archs.join(", ")
        );
    }
    match (&output.packed, args.emit, written) {
        (Some(packed), ..) => {
            text += &describe::sizes(&packed.bundle);
            let place = args.output.as_deref().unwrap_or(Path::new(""));
            text += &format!(
                "bundle    {} ({}), blake3 {}\n",
                place.display(),
                bytes(packed.bytes.len() as u64),
                packed.bundle.digest()
            );
        }
        (None, _, [file]) => text += &format!("written   {}\n", file.display()),
        (None, _, files) => {
            let place = args.output.as_deref().unwrap_or(Path::new(""));
            text += &format!("written   {} in {}\n", count(files.len() as u64, "file"), place.display());
        }
    }
    let mut times: Vec<(&'static str, Duration)> = Vec::new();
    for &(stage, time) in &output.times {
        // The passes together: each alone is for -v.
        let name = if matches!(stage, Stage::Pass(_)) { "passes" } else { stage.name() };
        match times.last_mut() {
            Some((last, sum)) if *last == name => *sum += time,
            _ => times.push((name, time)),
        }
    }
    let times: Vec<String> = times.iter().map(|(name, time)| format!("{name} {}", seconds(*time))).collect();
    text + &format!("time      {}: {}\n", seconds(total), times.join(", "))
}

fn summary_json(args: &CompileArgs, output: &Output, written: &[PathBuf], total: Duration) -> Value {
    let mut value = describe::plan_json(output.plan());
    let seconds: Vec<Value> = output
        .times
        .iter()
        .map(|(stage, time)| json!({ "stage": stage.name(), "seconds": time.as_secs_f64() }))
        .collect();
    let more = json!({
        "output": args.output,
        "files": written,
        "traces": output.traces.map(|t| json!({
            "calibration_prompts": t.calibration_prompts,
            "holdout_prompts": t.holdout_prompts,
            "covered_steps": t.covered_steps,
        })),
        "kernels": output.kernels.iter().map(|built| {
            let mut kernel = describe::kernel_json(&built.kernel);
            kernel["cached"] = built.cached.into();
            kernel
        }).collect::<Vec<_>>(),
        "bytes": output.packed.as_ref().map(|p| p.bytes.len()),
        "digest": output.packed.as_ref().map(|p| p.bundle.digest()),
        "report": output.packed.as_ref().map(|p| p.bundle.report()),
        "seconds": total.as_secs_f64(),
        "stages": seconds,
    });
    describe::merge(&mut value, more);
    value
}

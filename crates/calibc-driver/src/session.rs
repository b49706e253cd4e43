//! The session itself: stages in order, nothing kept between two of them.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use calibc_bundle::{Bundle, Contents};
use calibc_codegen::KernelSource;
use calibc_ir::{Arch, BlockMask, Geometry, Plan, Site};
use calibc_nvrtc::{Cache, Nvrtc};
use calibc_opt::{
    CalibAtt, Calibration, Explicit, Hooks, NoCalibration, OptError, PASSES, Policy, Repetition, Report, ShareLimits,
    SiteMask, Target, recall_report, standard,
};
use calibc_trace::{MANIFEST, Manifest, Trace, TraceError};

use crate::error::DriverError;
use crate::evidence::TraceEvidence;
use crate::kernels::{Built, KernelTarget, VERSION, build, sources};
use crate::masks::{HeadChoice, MaskFile, MaskFileError};
use crate::observe::{Event, Observer, Stage};
use crate::report::report_json;
use crate::resolve::{Job, TraceFacts, resolve};
use crate::spec::{
    ArchSpec, DTypeSpec, ExplicitKind, ExplicitSpec, FamilySpec, GeometrySpec, MissingSpec, ModelSpec, PolicySpec,
    RepetitionSpec, Spec, TargetSpec,
};

/// Where compiled kernels are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CacheChoice {
    /// The user's cache.
    #[default]
    Default,
    /// This folder.
    Dir(PathBuf),
    /// Nowhere.
    Off,
}

impl CacheChoice {
    /// Opens it.
    ///
    /// # Errors
    /// [`DriverError::Nvrtc`] where there is no place for it.
    pub fn open(&self) -> Result<Option<Cache>, DriverError> {
        Ok(match self {
            Self::Default => Some(Cache::open(None)?),
            Self::Dir(dir) => Some(Cache::open(Some(dir))?),
            Self::Off => None,
        })
    }
}

/// How far a session goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Emit {
    /// To the plan.
    Plan,
    /// To the kernels' sources.
    Cuda,
    /// To machine code.
    Cubin,
    /// To the bundle.
    #[default]
    Bundle,
}

/// What to compile.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Folder of traces. Explicit masks need none.
    pub traces: Option<PathBuf>,
    /// Spec file; without one, everything comes from the traces and the paper.
    pub spec: Option<PathBuf>,
    /// Architectures, instead of the spec's.
    pub archs: Vec<Arch>,
    /// Only kernels of the portable family, whatever the spec says.
    pub portable: bool,
    /// The libnvrtc to use.
    pub nvrtc: Option<PathBuf>,
    /// Where compiled kernels are kept.
    pub cache: CacheChoice,
    /// How far to go.
    pub emit: Emit,
    /// Passes whose plan is told to the observer ([`Event::Dump`]); `all` for every one.
    pub dump_after: Vec<String>,
}

/// What a session made.
#[derive(Debug)]
pub struct Output {
    /// The job: model, grid, steps and the effective spec.
    pub job: Job,
    /// The plan, while there is no bundle to hold it.
    plan: Option<Plan>,
    /// What the traces were, if there were any.
    pub traces: Option<TraceCount>,
    /// What the plan costs; from [`Emit::Bundle`] on.
    pub report: Option<Report>,
    /// Sources of the plan's variants, in each family that an architecture wants; from [`Emit::Cuda`] on.
    pub sources: Vec<KernelSource>,
    /// Kernels; from [`Emit::Cubin`] on.
    pub kernels: Vec<Built>,
    /// The bundle; from [`Emit::Bundle`] on.
    pub packed: Option<Packed>,
    /// How long each stage took, in order.
    pub times: Vec<(Stage, Duration)>,
}

impl Output {
    /// The plan.
    pub fn plan(&self) -> &Plan {
        match (&self.plan, &self.packed) {
            (Some(plan), _) => plan,
            (None, Some(packed)) => packed.bundle.plan(),
            (None, None) => unreachable!("the plan is let go only when the bundle that holds it is there"),
        }
    }
}

/// A bundle in memory.
#[derive(Debug)]
pub struct Packed {
    /// The file.
    pub bytes: Vec<u8>,
    /// The same, opened again.
    pub bundle: Bundle,
}

/// How much was calibrated with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceCount {
    /// Prompts that chose masks.
    pub calibration_prompts: usize,
    /// Prompts that judge them.
    pub holdout_prompts: usize,
    /// Steps with energies of their own.
    pub covered_steps: usize,
}

/// Measures stages and tells the observer.
struct Clock<'a> {
    observer: &'a dyn Observer,
    times: Vec<(Stage, Duration)>,
}

impl Clock<'_> {
    fn stage<T>(&mut self, stage: Stage, work: impl FnOnce() -> Result<T, DriverError>) -> Result<T, DriverError> {
        if self.observer.cancelled() {
            return Err(DriverError::Cancelled);
        }
        let start = Instant::now();
        let result = work()?;
        self.done(stage, start.elapsed());
        Ok(result)
    }

    fn done(&mut self, stage: Stage, time: Duration) {
        self.observer.event(&Event::Done { stage, time });
        self.times.push((stage, time));
    }
}

/// Compiles. Nothing is written but kernels into the cache: the caller decides where the bytes go.
///
/// The same traces, spec and tools give the same bytes, on any number of threads.
///
/// # Errors
/// See [`DriverError`]; [`DriverError::family`] says who must act.
pub fn compile(options: &Options, observer: &dyn Observer) -> Result<Output, DriverError> {
    for name in &options.dump_after {
        if name != "all" && !PASSES.contains(&name.as_str()) {
            return Err(DriverError::UnknownPass { name: name.clone() });
        }
    }
    // What is wrong with the request is said first, then what this machine lacks: both before an hour of reading.
    let mut spec = match &options.spec {
        Some(path) => Spec::read(path)?,
        None => Spec::default(),
    };
    if options.portable {
        spec.target.family = FamilySpec::Portable;
    }
    let manifest = options.traces.as_deref().map(Manifest::read).transpose()?;
    let facts = manifest.as_ref().map(|manifest| TraceFacts {
        model: &manifest.model,
        geometry: &manifest.geometry,
        sigmas: &manifest.sigmas,
    });
    let job = resolve(&spec, facts.as_ref(), &options.archs)?;
    run(options, job, manifest.as_ref(), None, observer)
}

/// Masks of one attention layer, in memory.
#[derive(Clone, Debug)]
pub struct LayerMasks {
    /// Name of the plan, for people.
    pub name: String,
    /// Query tokens.
    pub q_tokens: u32,
    /// Key tokens.
    pub kv_tokens: u32,
    /// Head dimension.
    pub head_dim: u32,
    /// One mask per head, `[q_blocks, kv_blocks]`. A mask that keeps every block makes a dense head.
    pub heads: Vec<BlockMask>,
    /// Element types to make kernels for.
    pub dtypes: Vec<DTypeSpec>,
    /// Whether kernels that also write the log-sum-exp are made.
    pub lse: bool,
}

/// Compiles the masks of one layer into a plan of one step and one layer: [`compile`] without any file. Traces and spec of
/// `options` are not looked at; without [`Options::archs`] there are no kernels, and only the CPU reference runs the result.
///
/// # Errors
/// See [`DriverError`]; masks of another shape than the lengths and rows that keep nothing are [`DriverError::Opt`].
pub fn compile_masks(masks: LayerMasks, options: &Options, observer: &dyn Observer) -> Result<Output, DriverError> {
    let LayerMasks { name, q_tokens, kv_tokens, head_dim, heads, dtypes, lse } = masks;
    let geometry = Geometry::sequence(q_tokens, kv_tokens);
    let explicit = ExplicitSpec {
        kind: ExplicitKind::Explicit,
        masks: PathBuf::from("memory"),
        default: MissingSpec::Error,
        anchors: Repetition::PAPER.anchors,
    };
    let archs = options.archs.iter().copied().map(ArchSpec).collect();
    let family = if options.portable { FamilySpec::Portable } else { FamilySpec::Auto };
    let spec = Spec {
        model: Some(ModelSpec { name: Some(name), layers: 1, heads: heads.len() as u32, head_dim }),
        geometry: Some(GeometrySpec::from_ir(&geometry)),
        steps: Some(1),
        policy: PolicySpec::Explicit(explicit),
        target: TargetSpec { dtypes, lse, archs, family, ..TargetSpec::default() },
        ..Spec::default()
    };
    let job = resolve(&spec, None, &[])?;
    // The plan has one step and one layer, so a site is its head.
    let policy = Policy::Explicit(Explicit::new(move |site: Site| SiteMask::Mask(heads[site.head.index()].clone())));
    run(options, job, None, Some(policy), observer)
}

/// Everything after the job is known. `policy` is the spec's unless it is given.
fn run(
    options: &Options,
    job: Job,
    manifest: Option<&Manifest>,
    policy: Option<Policy>,
    observer: &dyn Observer,
) -> Result<Output, DriverError> {
    let tools = if options.emit >= Emit::Cubin && !job.archs.is_empty() {
        Some((Nvrtc::find(options.nvrtc.as_deref())?, options.cache.open()?))
    } else {
        None
    };
    let traces = options.traces.as_ref().filter(|_| manifest.is_some());
    let mut clock = Clock { observer, times: Vec::new() };
    let trace = match traces {
        Some(dir) => Some(clock.stage(Stage::Open, || {
            Ok(Trace::open(dir, &|done, total| observer.event(&Event::Progress { stage: Stage::Open, done, total }))?)
        })?),
        None => None,
    };
    // Between the two readings the folder may have become another.
    if trace.as_ref().map(Trace::manifest) != manifest {
        return Err(TraceError::Changed { file: MANIFEST.to_owned() }.into());
    }
    let effective = job.spec.to_yaml()?;
    let (plan, report) = match &trace {
        Some(trace) => optimise(options, &job, policy, &TraceEvidence(trace), &mut clock)?,
        None => optimise(options, &job, policy, &NoCalibration, &mut clock)?,
    };
    let traces = trace.map(|trace| TraceCount {
        calibration_prompts: trace.num_prompts(calibc_trace::Split::Calibration),
        holdout_prompts: trace.num_prompts(calibc_trace::Split::Holdout),
        covered_steps: trace.covered_steps().len(),
    });
    let targets = KernelTarget::of(&job.archs, job.spec.target.family == FamilySpec::Portable);
    let sources = if options.emit >= Emit::Cuda { sources(&plan.variants, &targets)? } else { Vec::new() };
    let kernels = match &tools {
        Some((nvrtc, cache)) => {
            clock.stage(Stage::Kernels, || build(&sources, &targets, nvrtc, cache.as_ref(), observer))?
        }
        None => Vec::new(),
    };
    for built in &kernels {
        for warning in &built.warnings {
            let text = format!("{} for {}: {warning}", built.kernel.symbol, built.kernel.arch);
            observer.event(&Event::Warning { text: &text });
        }
    }
    let mut output = Output { job, plan: None, traces, report, sources, kernels, packed: None, times: Vec::new() };
    if let Some(report) = &output.report {
        let report = report_json(report);
        let kernels: Vec<_> = output.kernels.iter().map(|built| built.kernel.clone()).collect();
        let bytes = clock.stage(Stage::Encode, || {
            let contents =
                Contents { plan: &plan, kernels: &kernels, spec: &effective, report: &report, calibc_version: VERSION };
            Ok(calibc_bundle::encode(&contents)?)
        })?;
        // A file that does not open again must never leave this function. The plan goes first: it may be gigabytes.
        drop(plan);
        let bundle = clock.stage(Stage::Check, || Bundle::parse(&bytes).map_err(DriverError::SelfCheck))?;
        output.packed = Some(Packed { bytes, bundle });
    } else {
        output.plan = Some(plan);
    }
    output.times = clock.times;
    Ok(output)
}

/// The spec's policy. Explicit masks are read while it runs; what goes wrong then is left in the second part.
fn policy_of_spec(options: &Options, job: &Job) -> Result<(Policy, Failed), DriverError> {
    let failed = Failed::default();
    let policy = match &job.spec.policy {
        PolicySpec::CalibAtt(spec) => Policy::CalibAtt(CalibAtt {
            a: spec.schedule.a(job.geometry.q_tokens()),
            c: spec.schedule.c,
            k: spec.schedule.k,
            rho: spec.rho,
            repetition: match spec.repetition {
                RepetitionSpec::Off => None,
                RepetitionSpec::On(on) => Some(Repetition { anchors: on.anchors, gamma: on.gamma }),
            },
        }),
        PolicySpec::Budget(spec) => Policy::Budget(spec.to_policy()),
        PolicySpec::Explicit(spec) => {
            let folder = options.spec.as_deref().and_then(Path::parent).unwrap_or(Path::new(""));
            let shape = Plan::dense(job.model.clone(), job.geometry, job.sigmas.clone());
            let file = MaskFile::open(&folder.join(&spec.masks), &shape, spec.default == MissingSpec::Error)?;
            let (anchors, slot) = (spec.anchors, failed.clone());
            Policy::Explicit(Explicit::new(move |site: Site| match file.head(site) {
                Ok(Some(HeadChoice::Blocks(mask))) => SiteMask::Mask(mask),
                Ok(Some(HeadChoice::Anchors)) => SiteMask::Anchors(anchors),
                Ok(Some(HeadChoice::Dense) | None) => SiteMask::Dense,
                Err(error) => {
                    slot.put(site, error);
                    SiteMask::Dense
                }
            }))
        }
    };
    Ok((policy, failed))
}

/// The first error of a mask file, by site: threads meet errors in any order.
#[derive(Clone, Debug, Default)]
struct Failed(std::sync::Arc<Mutex<Option<(Site, MaskFileError)>>>);

impl Failed {
    fn put(&self, site: Site, error: MaskFileError) {
        let mut slot = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if slot.as_ref().is_none_or(|(first, _)| site < *first) {
            *slot = Some((site, error));
        }
    }

    fn take(&self) -> Result<(), DriverError> {
        match self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
            Some((_, error)) => Err(error.into()),
            None => Ok(()),
        }
    }
}

/// Runs the passes, and judges the plan where a bundle is wanted.
fn optimise<C: Calibration>(
    options: &Options,
    job: &Job,
    policy: Option<Policy>,
    evidence: &C,
    clock: &mut Clock<'_>,
) -> Result<(Plan, Option<Report>), DriverError> {
    let (policy, failed) = match policy {
        Some(policy) => (policy, Failed::default()),
        None => policy_of_spec(options, job)?,
    };
    let target = Target {
        dtypes: job.spec.target.dtypes.iter().map(|&d| d.into()).collect(),
        lse: job.spec.target.lse,
        share: ShareLimits { max_extra_density: job.spec.share.max_extra_density },
        l2_bytes: job.spec.target.l2_bytes,
        running_tiles: job.spec.target.running_tiles,
    };
    let observer = clock.observer;
    let cancel = AtomicBool::new(observer.cancelled());
    let progress = |name: &'static str, done: u64, total: u64| {
        if observer.cancelled() {
            cancel.store(true, Ordering::Relaxed);
        }
        let stage = if name == REPORT { Stage::Recall } else { Stage::Pass(name) };
        observer.event(&Event::Progress { stage, done, total });
    };
    let mut index = 0;
    let mut selection = None;
    let mut start = Instant::now();
    let mut after_pass = |report: &calibc_opt::PassReport, plan: &Plan| {
        for text in &report.remarks {
            observer.event(&Event::Remark { pass: report.pass, text });
        }
        if let Some(found) = &report.selection {
            for text in &found.warnings {
                observer.event(&Event::Warning { text });
            }
            selection = Some(found.clone());
        }
        if options.dump_after.iter().any(|name| name == "all" || name == report.pass) {
            let text = plan.to_string();
            observer.event(&Event::Dump { index, pass: report.pass, text: &text });
        }
        index += 1;
        clock.done(Stage::Pass(report.pass), start.elapsed());
        start = Instant::now();
    };
    let pipeline = standard(&policy, &target);
    let hooks = Hooks { after_pass: Some(&mut after_pass), progress: Some(&progress), cancel: Some(&cancel) };
    let dense = Plan::dense(job.model.clone(), job.geometry, job.sigmas.clone());
    let ran = pipeline.run(dense, evidence, hooks);
    // A mask that could not be read explains whatever the passes made of its absence.
    failed.take()?;
    let plan = ran.map_err(from_opt)?;
    if options.emit < Emit::Bundle {
        return Ok((plan, None));
    }
    let hooks = Hooks { after_pass: None, progress: Some(&progress), cancel: Some(&cancel) };
    let report = clock.stage(Stage::Recall, || {
        recall_report(&plan, &policy, selection.as_ref(), evidence, &hooks).map_err(from_opt)
    })?;
    Ok((plan, Some(report)))
}

/// The optimiser's name for the work of [`recall_report`].
const REPORT: &str = "report";

fn from_opt(error: OptError) -> DriverError {
    match error {
        OptError::Cancelled => DriverError::Cancelled,
        error => DriverError::Opt(error),
    }
}

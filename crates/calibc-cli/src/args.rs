//! The command line, as clap sees it.

use std::path::PathBuf;

use calibc_ir::{Arch, DType};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// Ahead-of-time compiler for calibrated sparse attention in video diffusion transformers.
#[derive(Debug, Parser)]
#[command(name = "calibc", version, propagate_version = true, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  a negative result: verify found a difference
   2  wrong usage
   3  bad input: traces, spec, masks, tensors or bundle
   4  the environment lacks something: NVRTC, driver, GPU
   5  the file system refused
  70  a bug of calibc";

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// Say more on stderr; twice for debugging.
    #[arg(short, long, action = clap::ArgAction::Count, global = true, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// Say nothing but errors and results.
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// When to draw progress bars on stderr.
    #[arg(long, value_enum, default_value_t = Progress::Auto, global = true, value_name = "WHEN")]
    pub(crate) progress: Progress,
}

/// When progress bars are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Progress {
    /// Where stderr is a terminal.
    Auto,
    /// Not at all.
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compile traces into a bundle.
    Compile(CompileArgs),
    /// Check or describe traces.
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Describe a bundle, or draw one of its masks.
    Inspect(InspectArgs),
    /// Write what a bundle holds in another form.
    Export(ExportArgs),
    /// Check a bundle: digests and plan, and with --numerics what it computes.
    Verify(VerifyArgs),
    /// Run one layer of a bundle on tensors of a safetensors file.
    Run(RunArgs),
    /// Time layers of a bundle on a GPU, beside dense attention of the same shape.
    Bench(BenchArgs),
    /// Show what this machine offers: NVRTC, driver, GPUs, cache.
    Doctor(DoctorArgs),
    /// The compiled kernels kept on disk.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Print the JSON Schema of spec files.
    Schema,
    /// Print a completion script.
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
}

/// What a compile leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Emit {
    /// The plan as text.
    Plan,
    /// A folder of CUDA sources.
    Cuda,
    /// A folder of machine code.
    Cubin,
    /// The bundle.
    Bundle,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Without --spec, geometry and steps come from the traces and the policy is the paper's recipe. \
                        An explicit spec (the user's own masks) needs no traces."
)]
pub(crate) struct CompileArgs {
    /// Folder of traces (trace format 1).
    #[arg(required_unless_present = "spec")]
    pub(crate) traces: Option<PathBuf>,
    /// Where the result goes: a file, or a folder for cuda and cubin. The plan goes to stdout without it.
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: Option<PathBuf>,
    /// Spec file (plans/*.yaml).
    #[arg(short, long, value_name = "FILE")]
    pub(crate) spec: Option<PathBuf>,
    /// What to write.
    #[arg(long, value_enum, default_value_t = Emit::Bundle, value_name = "WHAT")]
    pub(crate) emit: Emit,
    /// Make machine code for this GPU architecture; repeat for several. Default: the spec's, else sm_80 and sm_90a.
    #[arg(long = "arch", value_name = "ARCH", value_delimiter = ',')]
    pub(crate) archs: Vec<Arch>,
    /// Make portable kernels only, also for architectures that have faster ones of their own.
    #[arg(long)]
    pub(crate) portable: bool,
    /// Write the plan as text after this pass (select, protect, ...); `all` for every pass; repeat for several.
    #[arg(long, value_name = "PASS", value_delimiter = ',')]
    pub(crate) dump_after: Vec<String>,
    /// Folder of the dumps. Default: stderr.
    #[arg(long, value_name = "DIR", requires = "dump_after")]
    pub(crate) dump_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) toolchain: ToolchainArgs,
    /// Print the summary as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where kernels come from.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ToolchainArgs {
    /// The libnvrtc to use, or its folder. Default: CALIBC_NVRTC, the Python environment, CUDA_HOME, the system.
    #[arg(long, value_name = "PATH")]
    pub(crate) nvrtc: Option<PathBuf>,
    /// The compile cache. Default: CALIBC_CACHE_DIR, else XDG_CACHE_HOME/calibc, else ~/.cache/calibc.
    #[arg(long, value_name = "DIR", conflicts_with = "no_cache")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Neither read nor fill the compile cache.
    #[arg(long)]
    pub(crate) no_cache: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TraceCommand {
    /// List every problem of a folder of traces. Exit code 3 if there is one.
    Check(TraceArgs),
    /// Show geometry, coverage and density at epsilon 0.8, 0.9, 0.95 and 0.99, per layer and step.
    Info(TraceInfoArgs),
    /// Put traces of one model and sampler together, whatever their order, into a new folder.
    Merge(TraceMergeArgs),
}

#[derive(Args, Debug)]
pub(crate) struct TraceMergeArgs {
    /// Folder of the result. It appears whole, or not at all.
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// Folders of traces. Their shards are hard-linked where the file system can.
    #[arg(value_name = "IN", required_unless_present = "parts")]
    pub(crate) traces: Vec<PathBuf>,
    /// Instead, make one trace of the parts that several processes captured into OUT.
    #[arg(long, conflicts_with = "traces")]
    pub(crate) parts: bool,
}

#[derive(Args, Debug)]
pub(crate) struct TraceArgs {
    /// Folder of traces.
    pub(crate) traces: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct TraceInfoArgs {
    #[command(flatten)]
    pub(crate) trace: TraceArgs,
    /// Share of the prompts that must keep a block.
    #[arg(long, default_value_t = 0.5, value_parser = parse_rho)]
    pub(crate) rho: f64,
}

fn parse_rho(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rho) if rho > 0.0 && rho <= 1.0 => Ok(rho),
        _ => Err("give a number above 0 and up to 1".to_owned()),
    }
}

#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// The bundle.
    pub(crate) bundle: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the mask at this step (with --layer and --head).
    #[arg(long, value_name = "N", requires = "layer")]
    pub(crate) step: Option<u32>,
    /// The layer to draw.
    #[arg(long, value_name = "N", requires = "head")]
    pub(crate) layer: Option<u32>,
    /// The head to draw.
    #[arg(long, value_name = "N", requires = "step")]
    pub(crate) head: Option<u32>,
    /// Print the plan as text.
    #[arg(long, conflicts_with_all = ["json", "step"])]
    pub(crate) plan: bool,
    /// Print the effective spec.
    #[arg(long, conflicts_with_all = ["json", "step", "plan"])]
    pub(crate) spec: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ExportArgs {
    /// The bundle.
    pub(crate) bundle: PathBuf,
    /// Write the masks here: safetensors, U8 `s<step>.l<layer>` [heads, q_blocks, kv_blocks] and `s<step>.l<layer>.op` [heads].
    #[arg(long, value_name = "FILE")]
    pub(crate) masks: PathBuf,
}

/// What executes a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// The reference.
    Cpu,
    /// GPU 0.
    Cuda,
}

#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// The bundle.
    pub(crate) bundle: PathBuf,
    /// Execute sampled layers on random inputs and compare with an independent masked attention.
    #[arg(long)]
    pub(crate) numerics: bool,
    /// What executes the plan.
    #[arg(long, value_enum, default_value_t = Device::Cpu, requires = "numerics")]
    pub(crate) device: Device,
    /// How many layers to sample.
    #[arg(long, default_value_t = 3, requires = "numerics", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: u32,
    /// Seed of the samples and inputs.
    #[arg(long, default_value_t = 0, requires = "numerics")]
    pub(crate) seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The bundle.
    pub(crate) bundle: PathBuf,
    /// Denoising step.
    #[arg(long, value_name = "N")]
    pub(crate) step: u32,
    /// Layer.
    #[arg(long, value_name = "N")]
    pub(crate) layer: u32,
    /// Safetensors file with q, k and v: BF16, F16 or F32, [batch, heads, tokens, head_dim].
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Where `out`, and with --lse `lse` (F32 [batch, heads, tokens], natural log), go.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// The tensors are [batch, tokens, heads, head_dim]; so is the output.
    #[arg(long)]
    pub(crate) tokens_major: bool,
    /// What executes the layer. On cuda, q, k and v must be BF16 or F16.
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub(crate) device: Device,
    /// Also write the log-sum-exp.
    #[arg(long)]
    pub(crate) lse: bool,
    /// Softmax scale. Default: 1/sqrt(head_dim).
    #[arg(long, value_name = "X")]
    pub(crate) scale: Option<f32>,
}

/// Order of dimensions in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MemoryLayout {
    /// [batch, heads, tokens, head_dim].
    Bhsd,
    /// [batch, tokens, heads, head_dim].
    Bshd,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Each round times every chosen (step, layer) once and dense attention once, with the bundle's own kernels on \
                        random q, k and v. TFLOP/s count the query-key pairs that are computed, 4 x head_dim each."
)]
pub(crate) struct BenchArgs {
    /// The bundle.
    pub(crate) bundle: PathBuf,
    /// Take layers of this step; repeat for several. Default: of every step.
    #[arg(long = "step", value_name = "N", value_delimiter = ',')]
    pub(crate) steps: Vec<u32>,
    /// Take this layer; repeat for several. Default: every layer.
    #[arg(long = "layer", value_name = "N", value_delimiter = ',')]
    pub(crate) layers: Vec<u32>,
    /// Time so many of them, at even quantiles of density. Default: 5, or all where both --step and --layer are given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) samples: Option<u32>,
    /// Timed rounds.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rounds: u32,
    /// Rounds before the timed ones.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) warmup: u32,
    /// Batch size.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub(crate) batch: u32,
    /// Order of the tensors' dimensions in memory.
    #[arg(long, value_enum, default_value_t = MemoryLayout::Bhsd)]
    pub(crate) layout: MemoryLayout,
    /// Element type. Default: the first that the bundle has a kernel for.
    #[arg(long, value_name = "bf16|fp16")]
    pub(crate) dtype: Option<DType>,
    /// Have the log-sum-exp written too.
    #[arg(long)]
    pub(crate) lse: bool,
    /// Which GPU.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) device: u32,
    /// Seed of q, k and v.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) toolchain: ToolchainArgs,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct CacheArgs {
    /// The compile cache. Default: CALIBC_CACHE_DIR, else XDG_CACHE_HOME/calibc, else ~/.cache/calibc.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Print the folder.
    Dir(CacheArgs),
    /// List the kernels.
    Ls {
        #[command(flatten)]
        cache: CacheArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove every kernel.
    Clear(CacheArgs),
}

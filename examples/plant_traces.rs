//! Writes traces with planted structure, of any geometry and size, where no model is at hand to capture from:
//!
//! ```text
//! cargo run --release -p calibc-examples --bin plant_traces -- traces/ --grid 21 30 52 --layers 4 --heads 40 --steps 50 --covered 0 10 25
//! calibc compile traces/ -o plan.bundle
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result};
use calibc_ir::{Geometry, Model, TextPosition};
use calibc_trace::planted::Planted;
use clap::Parser;

#[derive(Parser)]
struct Args {
    /// Folder to write; must not hold a trace yet.
    out: PathBuf,
    /// Latent frames, rows and columns after patchify.
    #[arg(long, num_args = 3, default_values_t = [4, 16, 16])]
    grid: Vec<u32>,
    /// Text tokens after the video tokens.
    #[arg(long, default_value_t = 0)]
    text: u32,
    /// Attention layers.
    #[arg(long, default_value_t = 2)]
    layers: u32,
    /// Heads per layer.
    #[arg(long, default_value_t = 4)]
    heads: u32,
    /// Head dimension.
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
    /// Steps of the sampler.
    #[arg(long, default_value_t = 20)]
    steps: u32,
    /// Steps that get shards.
    #[arg(long, num_args = 1.., default_values_t = [0, 10])]
    covered: Vec<u32>,
    /// Prompts that choose masks.
    #[arg(long, default_value_t = 3)]
    calibration: u32,
    /// Prompts held out to measure recall on.
    #[arg(long, default_value_t = 1)]
    holdout: u32,
    /// Also what dropping a block changes, for the policy `budget`.
    #[arg(long)]
    deviation: bool,
    /// Also what errors of steps and heads cost, for the policy `budget`.
    #[arg(long)]
    sensitivity: bool,
    /// Seed of everything; the same seed gives the same bytes everywhere.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let [frames, height, width] = args.grid[..] else { unreachable!("clap takes exactly three") };
    let text_position = if args.text > 0 { TextPosition::After } else { TextPosition::None };
    let planted = Planted {
        model: Model { name: "planted".into(), layers: args.layers, heads: args.heads, head_dim: args.head_dim },
        geometry: Geometry { text_tokens: args.text, text_position, ..Geometry::video(frames, height, width) },
        num_steps: args.steps,
        covered: args.covered,
        calibration: args.calibration,
        holdout: args.holdout,
        deviation: args.deviation,
        sensitivity: args.sensitivity,
        seed: args.seed,
        ..Planted::default()
    };
    planted.write(&args.out).with_context(|| format!("planting into {}", args.out.display()))
}

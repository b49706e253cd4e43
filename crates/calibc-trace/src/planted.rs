//! Traces with planted structure, of any geometry and size: what tests and demos run on where no model is at hand.
//!
//! Each head of each layer attends in one way: to a window in time and space, to its own place in every frame (stripes), to
//! a few sinks, or to everything; some heads are repetitive on top (their rows attend alike). Noisy steps attend more
//! widely, and every prompt and step perturbs every block. All arithmetic is integers and `+ - * /` on `f64`, so that a
//! seed gives the same bytes on every platform.

use std::path::Path;

use calibc_ir::{BLOCK, Geometry, LayerId, Model, StepId, TextPosition};
use rayon::prelude::*;

use crate::encoding::Encoding;
use crate::error::TraceError;
use crate::manifest::{Prompt, Split};
use crate::random::{SplitMix64, unit};
use crate::sensitivity::Sensitivity;
use crate::writer::{Extras, LayerTensors, TraceSpec, TraceWriter};

/// What to plant.
#[derive(Clone, Debug, PartialEq)]
pub struct Planted {
    /// The attention stack.
    pub model: Model,
    /// The token grid.
    pub geometry: Geometry,
    /// Steps of the sampler.
    pub num_steps: u32,
    /// Steps that get shards.
    pub covered: Vec<u32>,
    /// Prompts that choose masks.
    pub calibration: u32,
    /// Prompts held out.
    pub holdout: u32,
    /// Guidance branches.
    pub branches: Vec<String>,
    /// How energies are stored.
    pub encoding: Encoding,
    /// Anchor counts with similarity and error; none: shards go without.
    pub anchor_counts: Vec<u16>,
    /// Share of heads that are repetitive, 0 to 1.
    pub repetitive: f64,
    /// Whether shards have block deviations.
    pub deviation: bool,
    /// Whether the trace has sensitivities.
    pub sensitivity: bool,
    /// Seed of everything.
    pub seed: u64,
}

impl Default for Planted {
    /// A small grid: 2 layers, 4 heads, 1,024 tokens, 4 steps of which 2 are covered, 3 + 1 prompts.
    fn default() -> Self {
        Self {
            model: Model { name: "planted".into(), layers: 2, heads: 4, head_dim: 64 },
            geometry: Geometry::video(4, 16, 16),
            num_steps: 4,
            covered: vec![0, 2],
            calibration: 3,
            holdout: 1,
            branches: vec!["cond".into()],
            encoding: Encoding::Log2U8,
            anchor_counts: vec![5],
            repetitive: 0.25,
            deviation: false,
            sensitivity: false,
            seed: 1,
        }
    }
}

/// How a head attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    Window,
    Stripes,
    Sinks,
    Diffuse,
}

/// Middle of a block on the latent grid; `None` for a block of text alone.
type Centre = Option<[f64; 3]>;

impl Planted {
    /// Writes the trace into `dir`.
    ///
    /// # Errors
    /// If `dir` holds a trace, the description is impossible (no calibration prompt, a step out of range, ...), or writing
    /// fails.
    pub fn write(&self, dir: &Path) -> Result<(), TraceError> {
        let steps = f64::from(self.num_steps.max(1));
        let mut writer = TraceWriter::create(
            dir,
            TraceSpec {
                model: self.model.clone(),
                geometry: self.geometry,
                sigmas: (0..self.num_steps).map(|t| 1.0 - f64::from(t) / steps).collect(),
                branches: self.branches.clone(),
                encoding: self.encoding,
                anchor_counts: self.anchor_counts.clone(),
            },
        )?;
        let prompts = self.calibration.saturating_add(self.holdout);
        for p in 0..prompts {
            let split = if p < self.calibration { Split::Calibration } else { Split::Holdout };
            let (id, label) = (format!("p{p:03}"), format!("planted prompt {p}"));
            writer.add_prompt(Prompt { id, seed: Some(self.seed.wrapping_add(p.into())), split, label })?;
        }
        let centres = centres(&self.geometry);
        let anchors = !self.anchor_counts.is_empty();
        let extras = Extras { deviation: self.deviation, anchor_similarity: anchors, anchor_error: anchors };
        for (p, b) in (0..prompts).flat_map(|p| (0..self.branches.len()).map(move |b| (p, b))) {
            for &step in &self.covered {
                let mut shard = writer.shard(&format!("p{p:03}"), StepId(step), &self.branches[b], extras)?;
                for layer in 0..self.model.layers {
                    let input = mix(&[self.seed, p.into(), b as u64, step.into(), layer.into()]);
                    let tensors = self.layer(&centres, step, layer, input);
                    shard.layer(
                        LayerId(layer),
                        LayerTensors {
                            energy: &tensors.energy,
                            deviation: &tensors.deviation,
                            anchor_similarity: &tensors.similarity,
                            anchor_error: &tensors.error,
                        },
                    )?;
                }
                shard.finish()?;
            }
        }
        if self.sensitivity {
            writer.set_sensitivity(&self.weights())?;
        }
        writer.commit()
    }

    /// Steps weigh less and less, heads from nothing to four times the mean.
    fn weights(&self) -> Sensitivity {
        let steps = f64::from(self.num_steps);
        let left = |t: u32| 1.0 - f64::from(t) / steps;
        let step = |t: u32| 0.25 + 4.0 * left(t) * left(t);
        let sites = u64::from(self.num_steps) * u64::from(self.model.layers) * u64::from(self.model.heads);
        let head = |site: u64| {
            let share = unit(mix(&[self.seed, 5, site]));
            if share < 0.05 { 0.0 } else { 4.0 * share * share * share }
        };
        Sensitivity {
            step: (0..self.num_steps).map(|t| step(t) as f32).collect(),
            head: (0..sites).map(|site| head(site) as f32).collect(),
        }
    }

    fn pattern(&self, layer: u32, head: u32) -> Pattern {
        match mix(&[self.seed, 1, layer.into(), head.into()]) % 4 {
            0 => Pattern::Window,
            1 => Pattern::Stripes,
            2 => Pattern::Sinks,
            _ => Pattern::Diffuse,
        }
    }

    /// Tensors of one layer for one input, which `input` stands for.
    fn layer(&self, centres: &[Centre], step: u32, layer: u32, input: u64) -> Tensors {
        let heads: Vec<_> =
            (0..self.model.heads).into_par_iter().map(|h| self.head(centres, step, layer, h, input)).collect();
        let mut all = Tensors::default();
        for head in heads {
            all.energy.extend(head.energy);
            all.deviation.extend(head.deviation);
            all.similarity.extend(head.similarity);
            all.error.extend(head.error);
        }
        all
    }

    fn head(&self, centres: &[Centre], step: u32, layer: u32, head: u32, input: u64) -> Tensors {
        let pattern = self.pattern(layer, head);
        let repetitive = unit(mix(&[self.seed, 2, layer.into(), head.into()])) < self.repetitive;
        // The noisiest step attends twice as widely as the last one.
        let wide = 2.0 - f64::from(step) / f64::from(self.num_steps.max(1));
        let mut noise = SplitMix64::new(mix(&[input, 3, head.into()]));
        let blocks = centres.len();
        let mut tensors = Tensors::default();
        let mut row = vec![0.0; blocks];
        for (r, &from) in centres.iter().enumerate() {
            for (c, (weight, &to)) in row.iter_mut().zip(centres).enumerate() {
                let sink = unit(mix(&[self.seed, 4, layer.into(), head.into(), c as u64])) < 1.5 / blocks as f64;
                let reach = reach(pattern, from, to, wide, r == c, c == 0 || sink);
                // Between half and one and a half: enough for prompts to disagree at the border of a mask.
                *weight = reach * (0.5 + noise.unit());
            }
            let sum: f64 = row.iter().sum();
            tensors.energy.extend(row.iter().map(|&w| (w / sum) as f32));
            if self.deviation {
                tensors.deviation.extend(row.iter().map(|&w| (w / sum * (0.5 + noise.unit())).min(1.0) as f32));
            }
        }
        for &count in &self.anchor_counts {
            let spread = if repetitive { 0.1 } else { 0.8 };
            let likeness = 1.0 - spread * (0.5 + 0.5 * noise.unit()) / (1.0 + f64::from(count) / 16.0);
            tensors.similarity.push(likeness as f32);
            tensors.error.push(((1.0 - likeness) * (0.8 + 0.4 * noise.unit())) as f32);
        }
        tensors
    }
}

/// Tensors of a layer or of one of its heads, row-major.
#[derive(Default)]
struct Tensors {
    energy: Vec<f32>,
    deviation: Vec<f32>,
    similarity: Vec<f32>,
    error: Vec<f32>,
}

/// How strongly a block attends to another, before noise.
fn reach(pattern: Pattern, from: Centre, to: Centre, wide: f64, same: bool, sink: bool) -> f64 {
    let floor = 1e-4;
    // Text attends to everything, and everything to text.
    let (Some(from), Some(to)) = (from, to) else { return 0.5 };
    let [t, y, x] = [0, 1, 2].map(|i| from[i] - to[i]);
    let bell = |d: f64, radius: f64| {
        let u = d / (radius * wide);
        let v = 1.0 / (1.0 + u * u);
        v * v * v
    };
    let near = bell(y, 4.0) * bell(x, 8.0);
    match pattern {
        Pattern::Window => floor + near * bell(t, 1.0),
        Pattern::Stripes => floor + near * near,
        Pattern::Sinks => floor + if sink { 4.0 } else { 0.0 } + if same { 1.0 } else { 0.0 },
        Pattern::Diffuse => 0.5 + bell(t, 8.0),
    }
}

/// Where each block lies: the mean place of its video tokens.
fn centres(geometry: &Geometry) -> Vec<Centre> {
    // An impossible grid is refused by the writer before anything is asked of it here.
    let mut sums = vec![([0.0f64; 3], 0.0f64); geometry.num_q_blocks() as usize];
    for f in 0..geometry.frames {
        for y in 0..geometry.height {
            for x in 0..geometry.width {
                let (place, count) = &mut sums[(geometry.position(f, y, x) / BLOCK) as usize];
                *count += 1.0;
                for (sum, at) in place.iter_mut().zip([f, y, x]) {
                    *sum += f64::from(at);
                }
            }
        }
    }
    let text = geometry.text_position != TextPosition::None;
    let centre = |(place, count): ([f64; 3], f64)| match count {
        0.0 if text => None,
        n => Some(place.map(|sum| sum / n)),
    };
    sums.into_iter().map(centre).collect()
}

/// One number for a list of numbers.
fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |state, &part| SplitMix64::new(state ^ part).next())
}

//! Executes a plan on the CPU in f32: what runs where there is no GPU, and what every kernel is tested against.
//!
//! A head is cut into the tiles the GPU schedule has: query blocks, or blocks of computed queries for anchor heads. Each tile
//! walks the key blocks its op keeps, in ascending order, so results do not depend on the number of threads.
//!
//! [`masked`] is a second, naive implementation that shares nothing with this one.

pub mod capture;
pub mod masked;
mod tile;

use calibc_ir::{AnchorTable, AttnOp, BLOCK, BlockMask, DType, LayerId, Plan, StepId};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::RuntimeError;
use crate::shape::{Lengths, Shape};
use crate::tensor::HostTensor;
use tile::Tile;

/// How [`attention`] computes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Factor on the scores; `1 / sqrt(head_dim)` if absent.
    pub softmax_scale: Option<f32>,
    /// Rounds the output to this element type (it stays stored as f32).
    pub round_to: Option<DType>,
}

/// What one layer computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Shape `[batch, head, token, head_dim]` of `out`.
    pub shape: [usize; 4],
    /// The attention output, contiguous.
    pub out: Vec<f32>,
    /// Log-sum-exp `[batch, head, token]`, natural logarithm; `-inf` for a query that saw no key (its output is 0).
    pub lse: Vec<f32>,
}

/// The work of one head.
enum Head<'a> {
    /// Query blocks, each over every key block or over those of its mask row.
    Blocks(Option<&'a BlockMask>),
    /// Computed queries, copied to where they stand for others.
    Anchors(&'a AnchorTable),
}

/// Output row and log-sum-exp of one query, and where they go.
struct Row {
    query: usize,
    lse: f32,
}

/// Executes one layer of `plan` at one step. Shapes are logical `[batch, head, token, head_dim]`; text after the video may be
/// shorter than the plan's.
pub fn attention(
    plan: &Plan,
    step: StepId,
    layer: LayerId,
    q: &HostTensor<'_>,
    k: &HostTensor<'_>,
    v: &HostTensor<'_>,
    options: &Options,
) -> Result<Output, RuntimeError> {
    check_site(plan, step, layer)?;
    let shape = Shape::of(plan);
    let Lengths { batch, q_len, kv_len } = shape.check(q.shape(), k.shape(), v.shape())?;
    let scale = scale(plan, options.softmax_scale)?;
    let ops = plan.layer_ops(step, layer);
    for (head, &op) in ops.iter().enumerate() {
        check_op(plan, op).ok_or(RuntimeError::Plan { step, layer, head })?;
    }
    let anchors = ops.iter().find_map(|op| match *op {
        AttnOp::AnchorRows { anchors } => Some(anchors),
        _ => None,
    });
    let table = anchors.map(|anchors| AnchorTable::new(&plan.geometry, anchors));
    let heads: Vec<Head<'_>> = (ops.iter().enumerate())
        .map(|(head, op)| {
            let work = match *op {
                AttnOp::Dense => Some(Head::Blocks(None)),
                AttnOp::BlockSparse { mask } => plan.masks.get(mask).map(|mask| Head::Blocks(Some(mask))),
                AttnOp::AnchorRows { anchors } => {
                    table.as_ref().filter(|table| table.anchors == anchors).map(Head::Anchors)
                }
            };
            work.ok_or(RuntimeError::Plan { step, layer, head })
        })
        .collect::<Result<_, _>>()?;

    let (tokens, head_dim) = (q_len as usize, shape.head_dim as usize);
    let mut out = vec![0.0; batch * heads.len() * tokens * head_dim];
    let mut lse = vec![0.0; batch * heads.len() * tokens];
    let outputs = out.par_chunks_mut(tokens * head_dim).zip(lse.par_chunks_mut(tokens)).enumerate();
    outputs.for_each(|(i, (out, lse))| {
        let at = (i / heads.len(), i % heads.len());
        let run = |tile: &mut Tile, queries: &mut dyn Iterator<Item = u32>, blocks: &mut dyn Iterator<Item = u32>| {
            tile.load_queries(q, at, queries, scale);
            blocks.for_each(|block| tile.attend(k, v, at, block, kv_len));
        };
        let every_block = || 0..plan.geometry.num_kv_blocks();
        let new_tile = || Tile::new(head_dim);
        match &heads[at.1] {
            Head::Blocks(mask) => {
                let rows = BLOCK as usize;
                let blocks = out.par_chunks_mut(rows * head_dim).zip(lse.par_chunks_mut(rows)).enumerate();
                blocks.for_each_init(new_tile, |tile, (block, (out, lse))| {
                    let block = block as u32;
                    let mut queries = block * BLOCK..((block + 1) * BLOCK).min(q_len);
                    match mask {
                        None => run(tile, &mut queries, &mut every_block()),
                        Some(mask) => run(tile, &mut queries, &mut mask.kept(block)),
                    }
                    for (i, (row, lse)) in out.chunks_exact_mut(head_dim).zip(lse).enumerate() {
                        *lse = tile.finish(i, row);
                    }
                });
            }
            Head::Anchors(table) => {
                // Computed queries ascend, and those past a shortened text are the last ones.
                let computed = table.queries.partition_point(|&query| query < q_len);
                let tiles: Vec<(Vec<f32>, Vec<Row>)> = table.queries[..computed]
                    .par_chunks(BLOCK as usize)
                    .enumerate()
                    .map_init(new_tile, |tile, (t, queries)| {
                        run(tile, &mut queries.iter().copied(), &mut every_block());
                        let mut values = vec![0.0; tile.queries() * head_dim];
                        let rows = (values.chunks_exact_mut(head_dim).enumerate())
                            .map(|(i, row)| Row { query: t * BLOCK as usize + i, lse: tile.finish(i, row) })
                            .collect();
                        (values, rows)
                    })
                    .collect();
                for (values, rows) in &tiles {
                    for (value, &Row { query, lse: row_lse }) in values.chunks_exact(head_dim).zip(rows) {
                        let copies = table.copy_ptr[query] as usize..table.copy_ptr[query + 1] as usize;
                        for &to in table.copies[copies].iter().filter(|&&to| to < q_len) {
                            out[to as usize * head_dim..][..head_dim].copy_from_slice(value);
                            lse[to as usize] = row_lse;
                        }
                    }
                }
            }
        }
    });
    match options.round_to {
        None => {}
        Some(DType::Bf16) => out.par_iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        Some(DType::Fp16) => out.par_iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
    }
    Ok(Output { shape: [batch, heads.len(), tokens, head_dim], out, lse })
}

fn check_site(plan: &Plan, step: StepId, layer: LayerId) -> Result<(), RuntimeError> {
    if step.0 >= plan.num_steps() {
        return Err(RuntimeError::Step { step: step.0, num_steps: plan.num_steps() });
    }
    if layer.0 >= plan.model.layers {
        return Err(RuntimeError::Layer { layer: layer.0, num_layers: plan.model.layers });
    }
    Ok(())
}

/// What execution relies on, of an op in a plan that may not have passed the verifier.
fn check_op(plan: &Plan, op: AttnOp) -> Option<()> {
    let geometry = &plan.geometry;
    let fits = match op {
        AttnOp::Dense => true,
        AttnOp::BlockSparse { mask } => {
            let mask = plan.masks.get(mask)?;
            (mask.rows(), mask.cols()) == (geometry.num_q_blocks(), geometry.num_kv_blocks())
        }
        AttnOp::AnchorRows { anchors } => (1..=geometry.height).contains(&u32::from(anchors)),
    };
    fits.then_some(())
}

fn scale(plan: &Plan, asked: Option<f32>) -> Result<f32, RuntimeError> {
    let scale = asked.unwrap_or_else(|| 1.0 / (plan.model.head_dim as f32).sqrt());
    if scale.is_finite() && scale > 0.0 { Ok(scale) } else { Err(RuntimeError::Scale { scale }) }
}

//! Masked attention from first principles, to hold every faster implementation against.
//!
//! For a query the set of keys it may see is spelled out token by token from the op, and attention over that set is computed in
//! f64 with the textbook formula. Which row an anchor head copies is found by listing the tokens in their order and searching
//! that list: neither [`calibc_ir::AnchorTable`] nor [`calibc_ir::Geometry::position`] is used. Only the queries asked for are computed,
//! so sampled checks stay cheap at any sequence length.

use calibc_ir::{AttnOp, BLOCK, Geometry, Layout, Plan, Site, TextPosition};
use rayon::prelude::*;

use super::{check_op, check_site, scale};
use crate::error::RuntimeError;
use crate::shape::{Lengths, Shape};
use crate::tensor::HostTensor;

/// Attention of one query.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its output, `head_dim` elements; zeros if it may see no key.
    pub out: Vec<f64>,
    /// Natural logarithm of the sum of exponentials; `-inf` if it may see no key.
    pub lse: f64,
}

/// The output rows at `positions` of one head of one batch entry, in the order of `positions`.
///
/// # Errors
/// Shapes, step, layer or scale that the plan does not allow, or a position that is not below the number of query tokens.
#[expect(clippy::too_many_arguments, reason = "one call names a site, three tensors and the rows")]
pub fn rows(
    plan: &Plan,
    site: Site,
    batch: usize,
    q: &HostTensor<'_>,
    k: &HostTensor<'_>,
    v: &HostTensor<'_>,
    softmax_scale: Option<f32>,
    positions: &[u32],
) -> Result<Vec<Row>, RuntimeError> {
    let Site { step, layer, head } = site;
    check_site(plan, step, layer)?;
    let Lengths { batch: batches, q_len, kv_len } = Shape::of(plan).check(q.shape(), k.shape(), v.shape())?;
    let scale = f64::from(scale(plan, softmax_scale)?);
    let invalid = RuntimeError::Plan { step, layer, head: head.index() };
    if head.0 >= plan.model.heads {
        return Err(invalid);
    }
    if batch >= batches {
        return Err(RuntimeError::Batch { batch });
    }
    if let Some(&position) = positions.iter().find(|&&position| position >= q_len) {
        return Err(RuntimeError::Position { position, q_len });
    }
    let op = plan.op(site);
    check_op(plan, op).ok_or(invalid)?;
    let tokens = match op {
        AttnOp::AnchorRows { .. } => tokens_in_order(&plan.geometry),
        _ => Vec::new(),
    };
    let head = head.index();
    Ok(positions
        .par_iter()
        .map(|&position| {
            let query = match op {
                AttnOp::AnchorRows { anchors } => stands_for(&plan.geometry, &tokens, u32::from(anchors), position),
                _ => position,
            };
            let allowed: Vec<u32> = (0..kv_len)
                .filter(|&key| match op {
                    AttnOp::BlockSparse { mask } => plan.masks[mask].get(position / BLOCK, key / BLOCK),
                    AttnOp::Dense | AttnOp::AnchorRows { .. } => true,
                })
                .collect();
            attend(q, k, v, (batch, head), query, &allowed, scale)
        })
        .collect())
}

/// Textbook softmax attention of one query over the allowed keys.
fn attend(
    q: &HostTensor<'_>,
    k: &HostTensor<'_>,
    v: &HostTensor<'_>,
    (batch, head): (usize, usize),
    query: u32,
    allowed: &[u32],
    scale: f64,
) -> Row {
    let head_dim = q.shape()[3];
    let (mut q_row, mut row) = (vec![0.0; head_dim], vec![0.0; head_dim]);
    q.read(batch, head, query as usize, &mut q_row);
    let scores: Vec<f64> = (allowed.iter())
        .map(|&key| {
            k.read(batch, head, key as usize, &mut row);
            let dot: f64 = q_row.iter().zip(&row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            dot * scale
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; head_dim];
    if allowed.is_empty() {
        return Row { out, lse: f64::NEG_INFINITY };
    }
    let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    for (&key, score) in allowed.iter().zip(&scores) {
        v.read(batch, head, key as usize, &mut row);
        let weight = (score - max).exp() / total;
        out.iter_mut().zip(&row).for_each(|(sum, &x)| *sum += weight * f64::from(x));
    }
    Row { out, lse: max + total.ln() }
}

/// A token of the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Text,
    Video { frame: u32, y: u32, x: u32 },
}

/// Every token in the order of the sequence: video tokens sorted by tile, then inside the tile; text before or after them.
fn tokens_in_order(geometry: &Geometry) -> Vec<Token> {
    let &Geometry { frames, height, width, text_tokens, text_position, layout, .. } = geometry;
    let mut video: Vec<[u32; 3]> =
        (0..frames).flat_map(|frame| (0..height).flat_map(move |y| (0..width).map(move |x| [frame, y, x]))).collect();
    if let Layout::Tile([t, h, w]) = layout {
        video.sort_by_key(|&[frame, y, x]| [frame / t, y / h, x / w, frame, y, x]);
    }
    let video = video.into_iter().map(|[frame, y, x]| Token::Video { frame, y, x });
    let text = std::iter::repeat_n(Token::Text, text_tokens as usize);
    match text_position {
        TextPosition::Before => text.chain(video).collect(),
        TextPosition::After | TextPosition::None => video.chain(text).collect(),
    }
}

/// The position whose query an anchor head computes for `position`: itself where its block holds text, else the same column of
/// the same frame's anchor row nearest to its row; ties go to the lower row.
fn stands_for(geometry: &Geometry, tokens: &[Token], anchors: u32, position: u32) -> u32 {
    let block = (position / BLOCK * BLOCK) as usize;
    let in_text_block = tokens.iter().skip(block).take(BLOCK as usize).any(|&token| token == Token::Text);
    let Token::Video { frame, y, x } = tokens[position as usize] else {
        return position;
    };
    if in_text_block {
        return position;
    }
    let rows =
        (0..anchors).map(|i| ((f64::from(i) + 0.5) * f64::from(geometry.height) / f64::from(anchors)).floor() as u32);
    let nearest = rows.min_by_key(|&row| (row.abs_diff(y), row)).unwrap_or(y);
    let same_column = |&token: &Token| token == Token::Video { frame, y: nearest, x };
    tokens.iter().position(same_column).map_or(position, |at| at as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_anchor_row_stands_in_but_not_for_text_blocks() {
        let geometry = Geometry {
            text_tokens: 10,
            text_position: TextPosition::After,
            layout: Layout::Tile([1, 2, 4]),
            ..Geometry::video(2, 12, 8)
        };
        let tokens = tokens_in_order(&geometry);
        assert_eq!(tokens.len(), 202);
        assert_eq!(tokens[4], Token::Video { frame: 0, y: 1, x: 0 });
        let at = |frame, y, x| tokens.iter().position(|&t| t == Token::Video { frame, y, x }).unwrap() as u32;
        // Anchor rows of 12 rows, 2 anchors: 3 and 9. Row 6 is equally far from both.
        for (y, anchor) in [(0, 3), (3, 3), (6, 3), (7, 9), (11, 9)] {
            assert_eq!(stands_for(&geometry, &tokens, 2, at(0, y, 5)), at(0, anchor, 5));
        }
        // Position 192.. is text: its whole block, 128..202, computes itself.
        assert_eq!(stands_for(&geometry, &tokens, 2, 130), 130);
        assert_eq!(stands_for(&geometry, &tokens, 2, 200), 200);
        let before = at(1, 0, 0);
        assert!(before < 128 && stands_for(&geometry, &tokens, 2, before) == at(1, 3, 0));
    }
}

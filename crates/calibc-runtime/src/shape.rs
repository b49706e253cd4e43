//! What the tensors of a call must look like, for both backends.

use calibc_ir::{Plan, TextPosition};

use crate::error::{Dim, Operand, RuntimeError};

/// What a plan says about the tensors of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) heads: u32,
    pub(crate) head_dim: u32,
    /// Fewest and most query tokens.
    pub(crate) q_len: [u32; 2],
    /// Fewest and most key tokens.
    pub(crate) kv_len: [u32; 2],
}

/// The sizes of one call that the plan does not fix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lengths {
    pub(crate) batch: usize,
    pub(crate) q_len: u32,
    pub(crate) kv_len: u32,
}

impl Shape {
    /// Text after the video may be cut short at run time: nothing before it moves.
    pub(crate) fn of(plan: &Plan) -> Self {
        let geometry = &plan.geometry;
        let shorter = geometry.text_position == TextPosition::After;
        let range = |full: u32| [if shorter { geometry.video_tokens() } else { full }, full];
        Self {
            heads: plan.model.heads,
            head_dim: plan.model.head_dim,
            q_len: range(geometry.q_tokens()),
            kv_len: range(geometry.kv_tokens()),
        }
    }

    /// Checks the logical shapes `[batch, head, token, head_dim]` of q, k and v.
    pub(crate) fn check(&self, q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Result<Lengths, RuntimeError> {
        let batch = q[0];
        for (operand, shape) in [(Operand::Q, q), (Operand::K, k), (Operand::V, v)] {
            same(operand, Dim::Batch, shape[0], batch)?;
            same(operand, Dim::Head, shape[1], self.heads as usize)?;
            same(operand, Dim::HeadDim, shape[3], self.head_dim as usize)?;
        }
        if batch == 0 {
            return Err(RuntimeError::Batch { batch });
        }
        let q_len = within(Operand::Q, q[2], self.q_len)?;
        let kv_len = within(Operand::K, k[2], self.kv_len)?;
        same(Operand::V, Dim::Token, v[2], k[2])?;
        Ok(Lengths { batch, q_len, kv_len })
    }
}

pub(crate) fn same(operand: Operand, dim: Dim, got: usize, want: usize) -> Result<(), RuntimeError> {
    if got == want { Ok(()) } else { Err(RuntimeError::Size { operand, dim, got, want }) }
}

fn within(operand: Operand, got: usize, [min, max]: [u32; 2]) -> Result<u32, RuntimeError> {
    match u32::try_from(got) {
        Ok(len) if (min..=max).contains(&len) => Ok(len),
        _ => Err(RuntimeError::Length { operand, got, min, max }),
    }
}

/// Offset of the element after the last one, in elements; `None` if it overflows or a used stride is negative.
pub(crate) fn extent(shape: &[usize], strides: &[i64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().zip(strides).try_fold(1u64, |end, (&n, &stride)| {
        let last = (n - 1) as u64;
        if last == 0 { Some(end) } else { end.checked_add(last.checked_mul(u64::try_from(stride).ok()?)?) }
    })
}

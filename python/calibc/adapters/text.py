"""The torch op `calibc::attention_text`: joint attention over as much text as a prompt has.

Lengths are a tensor, like site and step of `calibc.ops`: one compiled graph serves all prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibc import ops


@torch.library.custom_op("calibc::attention_text", mutates_args=())
def attention_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    site: Tensor,
    step: Tensor,
    lengths: Tensor,
    drop_queries: bool,
    scale: float | None = None,
) -> Tensor:
    """`calibc.ops.attention` of samples whose last tokens may be padding.

    Args:
        q: [B, H, S, D].
        k: As q.
        v: As q.
        site: As in `calibc.ops.attention`.
        step: As in `calibc.ops.attention`.
        lengths: int64 [B] in CPU memory: tokens of each sample that are real; none attends to the others.
        drop_queries: Whether padding gives no queries either: its outputs are 0.
        scale: As in `calibc.ops.attention`.

    Returns:
        [B, H, S, D], in the memory order of q.
    """
    ends = lengths.tolist()
    if len(set(ends)) == 1:
        return _cut(q, k, v, site, step, ends[0], drop_queries, scale)
    out = torch.empty_like(q)
    for i, end in enumerate(ends):
        row = slice(i, i + 1)
        out[row] = _cut(q[row], k[row], v[row], site, step, end, drop_queries, scale)
    return out


def _cut(
    q: Tensor, k: Tensor, v: Tensor, site: Tensor, step: Tensor, end: int, drop_queries: bool, scale: float | None
) -> Tensor:
    k, v = k[:, :, :end], v[:, :, :end]
    if not drop_queries or end == q.shape[2]:
        return ops.attention(q, k, v, site, step, scale)
    out = torch.empty_like(q)
    out[:, :, :end] = ops.attention(q[:, :, :end], k, v, site, step, scale)
    out[:, :, end:] = 0
    return out


@attention_text.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    site: Tensor,
    step: Tensor,
    lengths: Tensor,
    drop_queries: bool,
    scale: float | None = None,
) -> Tensor:
    return torch.empty_like(q)


__all__ = ["attention_text"]

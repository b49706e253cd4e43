"""Errors of one head's attention output: the directions they take, what a gradient says of each, and outputs made wrong by them.

A row block r of a head has the dense output O_r. Its errors are sums of small steps along directions:

    blocks   d_rc = P_rc V_c - m_rc O_r    what dropping the key block c changes to first order; |d_rc|^2 / |O_r|^2 is a trace's D2[r,c]
    noise    d_rk = rms(O_r) * signs       white noise; |d_rk|^2 / |O_r|^2 = 1

With g the gradient of a function of the velocity by the output, `responses` are the products <g_r, d_r*>: how the function answers
to a unit of each direction. For blocks they are sums over blocks of the gradient by the scores, P * (g V^T - <g, O>).

Only blocks that a plan may drop take part: those without text, as rows and as columns. All arithmetic is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calibc.masks import BLOCK
from calibc.statistics import Geometry

# Float32 values of probabilities held at a time; a handful of tensors of this size live at once.
_CHUNK = 1 << 26
# Independent directions of white noise per row block: a gradient answers to all of them at little cost.
_NOISES = 4


@dataclasses.dataclass(frozen=True)
class Span:
    """The blocks of a sequence that hold no text."""

    first: int
    last: int
    """Behind the last one."""

    @staticmethod
    def of(geometry: Geometry) -> Span:
        """Those of a token grid."""
        end = geometry.first_video + geometry.video_tokens
        text_follows = end < geometry.tokens
        return Span(-(-geometry.first_video // BLOCK), end // BLOCK if text_follows else -(-end // BLOCK))

    @property
    def count(self) -> int:
        """How many there are."""
        return self.last - self.first

    def tokens(self, length: int) -> slice:
        """Their tokens, of a sequence of so many."""
        return slice(self.first * BLOCK, min(self.last * BLOCK, length))


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Independent normal values: float32 in CPU memory, the same ones for all devices."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def signs(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Independent values of 1 and -1: float32."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8).float() * 2 - 1


def _by_block(x: Tensor, dim: int) -> Tensor:
    """Splits a dimension into blocks, the last one filled up with zeros."""
    missing = -x.shape[dim] % BLOCK
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim % x.dim()) + (0, missing))
    return x.unflatten(dim, (-1, BLOCK))


def _row_chunks(blocks: Tensor, queries: int, per_row: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row blocks, some at a time: which of them, their tokens [n * 128], and which of these exist."""
    step = max(1, _CHUNK // (BLOCK * per_row))
    offsets = torch.arange(BLOCK, device=blocks.device)
    for at in range(0, blocks.numel(), step):
        tokens = (blocks[at : at + step, None] * BLOCK + offsets).flatten()
        # Those behind the end are computed as the last one and counted nowhere.
        yield slice(at, at + step), tokens.clamp_max(queries - 1), tokens < queries


def block_responses(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float, rows: Tensor, span: Span
) -> tuple[Tensor, Tensor]:
    """Answers to the directions `blocks`, and the deviations that these are.

    Args:
        q: [H, S, D].
        k: [H, S_kv, D].
        v: As k.
        gradient: As q; by the attention's output.
        scale: Factor on the scores.
        rows: int64 [R], row blocks to look at.
        span: Columns to look at.

    Returns:
        Responses [H, R, columns], and D2 summed over these rows and columns, [H].
    """
    heads, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    columns = span.tokens(keys)
    response = q.new_zeros((heads, rows.numel(), span.count), dtype=torch.float32)
    deviation = q.new_zeros(heads, dtype=torch.float32)
    for head in range(heads):
        keys_t, values = k[head].float().mT, v[head].float()
        column_values = _by_block(values[columns], 0)
        for at, tokens, real in _row_chunks(rows, queries, keys):
            p = torch.softmax(q[head].index_select(0, tokens).float() @ keys_t * scale, -1)
            out = p @ values
            g = gradient[head].index_select(0, tokens).float() * real[:, None]
            kept = _by_block(p[:, columns], 1)
            # The gradient by the scores, of these columns.
            by_score = g @ values[columns].mT
            by_score -= (g * out).sum(-1, keepdim=True)
            by_score = _by_block(by_score.mul_(p[:, columns]), 1).sum(-1)
            blocks = by_score.shape[1]
            response[head, at, :blocks] = by_score.unflatten(0, (-1, BLOCK)).sum(1)
            # [columns, rows, D]
            apart = torch.bmm(kept.transpose(0, 1), column_values)
            apart -= kept.sum(-1).mT[..., None] * out
            squares = (apart.square().sum(-1) * real).unflatten(1, (-1, BLOCK)).sum(-1)
            norms = (out.square().sum(-1) * real).unflatten(0, (-1, BLOCK)).sum(-1)
            deviation[head] += (squares / norms.clamp_min(1e-30)).clamp_max(1).sum()
    return response, deviation


def _rms(out: Tensor, span: Span) -> Tensor:
    """Root mean square of the output per row block, for each of its rows: [..., rows of the span, 1]."""
    kept = out[..., span.tokens(out.shape[-2]), :].float()
    squares = kept.square().mean(-1, keepdim=True)
    means = _by_block(squares, -2).sum(-2, keepdim=True)
    ones = _by_block(torch.ones_like(squares), -2)
    means = means / ones.sum(-2, keepdim=True)
    return means.sqrt().expand_as(ones).flatten(-3, -2)[..., : kept.shape[-2], :]


def noise_responses(out: Tensor, gradient: Tensor, seed: int, span: Span) -> tuple[Tensor, Tensor]:
    """Answers to the directions `noise`.

    Args:
        out: [H, S, D], the attention's output.
        gradient: As out.
        seed: Decides the directions; they are the same for all heads.
        span: Rows to look at.

    Returns:
        Responses [H, rows, directions], and the sum of |d|^2 / |O|^2 over rows and directions, [H].
    """
    rows = span.tokens(out.shape[1])
    weighted = gradient[:, rows].float() * _rms(out, span)
    found = []
    for noise in range(_NOISES):
        along = (weighted * signs(tuple(weighted.shape[1:]), seed + noise, out.device)).sum(-1, keepdim=True)
        found.append(_by_block(along, 1).sum((-2, -1)))
    response = torch.stack(found, -1)
    live = _by_block(_rms(out, span), 1).amax((-2, -1)) > 0
    return response, live.sum(1).float() * _NOISES


def block_error(q: Tensor, k: Tensor, v: Tensor, scale: float, size: float, seed: int, span: Span) -> Tensor:
    """The error of one head whose scores are too high or too low by `size`, block by block: to first order that times the sum of the
    directions `blocks` with random signs.

    Args:
        q: [S, D].
        k: [S_kv, D].
        v: As k.
        scale: Factor on the scores.
        size: In natural logarithms of weight.
        seed: Decides the signs.
        span: Blocks that are wrong.

    Returns:
        [S, D] float32, what to add to the output.
    """
    queries, keys = q.shape[0], k.shape[0]
    columns = span.tokens(keys)
    keys_t, values = k.float().mT, v.float()
    bias = signs((span.count, span.count), seed, q.device) * size
    rows = torch.arange(span.first, span.last, device=q.device)
    error = q.new_zeros(q.shape, dtype=torch.float32)
    for at, tokens, real in _row_chunks(rows, queries, keys):
        scores = q.index_select(0, tokens).float() @ keys_t * scale
        right = torch.softmax(scores, -1) @ values
        wrong = bias[at].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        scores[:, columns] += wrong[:, : columns.stop - columns.start]
        apart = torch.softmax(scores, -1) @ values - right
        error[tokens[real]] = apart[real]
    return error


def noise_error(out: Tensor, size: float, seed: int, span: Span) -> Tensor:
    """White noise on one head's output [S, D], `size` times the root mean square of each row block: float32 [S, D]."""
    rows = span.tokens(out.shape[0])
    error = torch.zeros_like(out, dtype=torch.float32)
    error[rows] = _rms(out, span) * signs(tuple(error[rows].shape), seed, out.device) * size
    return error


def relative_error(out: Tensor, wrong: Tensor, span: Span) -> float:
    """Sum over the row blocks of the span of |wrong - out|^2 / |out|^2; both [S, D]."""
    rows = span.tokens(out.shape[0])
    right = out[rows].float()
    squares = (wrong[rows].float() - right).square().sum(-1, keepdim=True)
    squares, norms = (_by_block(x, 0).sum((-2, -1)) for x in (squares, right.square().sum(-1, keepdim=True)))
    return float((squares / norms.clamp_min(1e-30)).sum())


__all__ = [
    "Span",
    "block_error",
    "block_responses",
    "noise_error",
    "noise_responses",
    "normal",
    "relative_error",
    "signs",
]

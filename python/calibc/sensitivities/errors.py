"""Errors of one head's attention output: the directions they take, what a gradient says of each, and outputs made wrong by them.

A row block r of a head has the dense output O_r. Its errors are

    blocks   d_r = O'_r - O_r    for the output O' without some blocks: those of least D2, a given share of the head's; in units of the
                                 row loss, which `budget` predicts from D2 and energies of the trace
    noise    d_rk = rms(O_r) * signs       white noise; |d_rk|^2 / |O_r|^2 = 1

With g the gradient of a function of the velocity by the output, `responses` are the products <g_r, d_r>: how the function answers to
the errors. Blocks dropped in one row have errors in common, and those that stay gain weight; both are in d_r. Errors of different rows
are taken as independent.

Only blocks that a plan may drop take part: those without text, as rows and as columns, and not the strongest one of a row. All
arithmetic is float32.
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
# What a row keeps of its energy at least, as far as row losses go; as in calibc-opt's scoring.
_LEAST_KEPT = 1 / 64
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


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Blocks of some rows of every head that are left out."""

    rows: Tensor
    """int64 [R], row blocks."""
    blocks: Tensor
    """bool [H, R, columns of the span]."""
    loss: Tensor
    """The row losses, summed: float32 [H]."""


def row_loss(deviation: Tensor, energy: Tensor, dropped: Tensor) -> Tensor:
    """The squared relative error that rows of blocks are predicted to have, [...].

    With A the sum of D2 over the blocks of a row that are dropped, B over those that stay, and m the share of energy that stays:
    A B / (A + B) / m^2. See calibc-opt's scoring.

    Args:
        deviation: D2, [..., columns].
        energy: As deviation.
        dropped: As deviation, bool.
    """
    gone, stays = (deviation * dropped).sum(-1), (deviation * ~dropped).sum(-1)
    mass = (energy * ~dropped).sum(-1) / energy.sum(-1).clamp_min(1e-30)
    return gone * stays / (gone + stays).clamp_min(1e-30) / mass.clamp_min(_LEAST_KEPT).square()


def least(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor, span: Span, share: float) -> Dropped:
    """The blocks of least D2 of each head, but for the strongest of every row.

    Args:
        q: [H, S, D].
        k: [H, S_kv, D].
        v: As k.
        scale: Factor on the scores.
        rows: int64 [R], row blocks to look at.
        span: Columns that may be dropped.
        share: Of the blocks of these rows and columns.
    """
    heads, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    deviation = q.new_empty((heads, rows.numel(), -(-keys // BLOCK)), dtype=torch.float32)
    energy = torch.empty_like(deviation)
    for head in range(heads):
        keys_t, values = k[head].float().mT, v[head].float()
        column_values = _by_block(values, 0)
        for at, tokens, real in _row_chunks(rows, queries, keys):
            p = torch.softmax(q[head].index_select(0, tokens).float() @ keys_t * scale, -1)
            out = p @ values
            kept = _by_block(p, 1)
            mass = kept.sum(-1)
            # [columns, rows, D]
            apart = torch.bmm(kept.transpose(0, 1), column_values)
            apart -= mass.mT[..., None] * out
            squares = (apart.square().sum(-1).mT * real[:, None]).unflatten(0, (-1, BLOCK)).sum(1)
            norms = (out.square().sum(-1) * real).unflatten(0, (-1, BLOCK)).sum(-1)
            deviation[head, at] = (squares / norms.clamp_min(1e-30)[:, None]).clamp_max(1)
            energy[head, at] = (mass * real[:, None]).unflatten(0, (-1, BLOCK)).sum(1)
    columns = slice(span.first, span.last)
    strongest = energy[..., columns].argmax(-1, keepdim=True)
    ranked = deviation[..., columns].scatter(-1, strongest, torch.inf).flatten(1)
    # Of equal ones the first.
    order = ranked.argsort(dim=1, stable=True)[:, : int(share * ranked.shape[1])]
    blocks = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, order, True).view_as(deviation[..., columns])
    blocks.scatter_(-1, strongest, False)
    everywhere = torch.zeros_like(deviation, dtype=torch.bool)
    everywhere[..., columns] = blocks
    return Dropped(rows, blocks, row_loss(deviation, energy, everywhere).sum(1))


def _changes(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor, blocks: Tensor, span: Span
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Output changes of one head, [S, D], without `blocks` [R, columns]: rows, their tokens, which of these exist, changes."""
    columns = span.tokens(k.shape[0])
    keys_t, values = k.float().mT, v.float()
    for at, tokens, real in _row_chunks(rows, q.shape[0], k.shape[0]):
        scores = q.index_select(0, tokens).float() @ keys_t * scale
        right = torch.softmax(scores, -1) @ values
        out = blocks[at].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        scores[:, columns].masked_fill_(out[:, : columns.stop - columns.start], -torch.inf)
        yield at, tokens, real, torch.softmax(scores, -1) @ values - right


def block_responses(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float, dropped: Dropped, span: Span
) -> Tensor:
    """Answers to the errors `blocks`.

    Args:
        q: [H, S, D].
        k: [H, S_kv, D].
        v: As k.
        gradient: As q; by the attention's output.
        scale: Factor on the scores.
        dropped: What is left out.
        span: Its columns.

    Returns:
        [H, R, 1].
    """
    response = q.new_zeros((q.shape[0], dropped.rows.numel(), 1), dtype=torch.float32)
    for head in range(q.shape[0]):
        changes = _changes(q[head], k[head], v[head], scale, dropped.rows, dropped.blocks[head], span)
        for at, tokens, real, change in changes:
            along = (change * gradient[head].index_select(0, tokens).float()).sum(-1) * real
            response[head, at, 0] = along.unflatten(0, (-1, BLOCK)).sum(-1)
    return response


def _rms(out: Tensor, span: Span) -> Tensor:
    """Root mean square of the output per row block, for each of its rows: [..., rows of the span, 1]."""
    kept = out[..., span.tokens(out.shape[-2]), :].float()
    squares = kept.square().mean(-1, keepdim=True)
    means = _by_block(squares, -2).sum(-2, keepdim=True)
    ones = _by_block(torch.ones_like(squares), -2)
    means = means / ones.sum(-2, keepdim=True)
    return means.sqrt().expand_as(ones).flatten(-3, -2)[..., : kept.shape[-2], :]


def noise_responses(out: Tensor, gradient: Tensor, seed: int, span: Span) -> Tensor:
    """Answers to the directions `noise`.

    Args:
        out: [H, S, D], the attention's output.
        gradient: As out.
        seed: Decides the directions; they are the same for all heads.
        span: Rows to look at.

    Returns:
        [H, rows, directions].
    """
    rows = span.tokens(out.shape[1])
    weighted = gradient[:, rows].float() * _rms(out, span)
    found = []
    for noise in range(_NOISES):
        along = (weighted * signs(tuple(weighted.shape[1:]), seed + noise, out.device)).sum(-1, keepdim=True)
        found.append(_by_block(along, 1).sum((-2, -1)))
    return torch.stack(found, -1)


def block_error(q: Tensor, k: Tensor, v: Tensor, scale: float, dropped: Dropped, head: int, span: Span) -> Tensor:
    """The error of one head without blocks.

    Args:
        q: [S, D], of this head.
        k: [S_kv, D].
        v: As k.
        scale: Factor on the scores.
        dropped: What all heads leave out.
        head: Which one it is.
        span: Columns.

    Returns:
        [S, D] float32, what to add to the output.
    """
    error = q.new_zeros(q.shape, dtype=torch.float32)
    for _, tokens, real, change in _changes(q, k, v, scale, dropped.rows, dropped.blocks[head], span):
        error[tokens[real]] = change[real]
    return error


def noise_error(out: Tensor, size: float, seed: int, span: Span) -> Tensor:
    """White noise on one head's output [S, D], `size` times the root mean square of each row block: float32 [S, D]."""
    rows = span.tokens(out.shape[0])
    error = torch.zeros_like(out, dtype=torch.float32)
    error[rows] = _rms(out, span) * signs(tuple(error[rows].shape), seed, out.device) * size
    return error


__all__ = [
    "Span",
    "block_error",
    "block_responses",
    "noise_error",
    "noise_responses",
    "normal",
    "row_loss",
    "signs",
]

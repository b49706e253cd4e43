"""Block masks to compare calibrated plans with: pure functions of the geometry, or of what a trace measured.

Masks are bool [..., q_blocks, kv_blocks]. Each function keeps an exact number of blocks, so that policies are compared at the same
density: every pattern is an order of the blocks, nearest first, and as many are kept as the density allows. Wherever a block
would be left without any key, its own comes first.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Grid:
    """Tokens of a video in raster order."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens of a video."""
        return self.frames * self.height * self.width

    @property
    def blocks(self) -> int:
        """Blocks of 128 tokens; the last one may be shorter."""
        return -(-self.tokens // BLOCK)

    def centres(self) -> tuple[Tensor, Tensor]:
        """Mean frame and mean place within the frame (0 to height * width) of the tokens of each block, [blocks] each."""
        token = torch.arange(self.tokens)
        area = self.height * self.width
        return self._mean(token // area), self._mean(token % area)

    def rows(self) -> Tensor:
        """Mean row within the frame of the tokens of each block, [blocks]."""
        return self._mean(torch.arange(self.tokens) % (self.height * self.width) // self.width)

    def _mean(self, of_token: Tensor) -> Tensor:
        block = torch.arange(self.tokens) // BLOCK
        total = torch.zeros(self.blocks, dtype=torch.float64).index_add_(0, block, of_token.double())
        return total / torch.bincount(block, minlength=self.blocks)


def kept_count(density: float, blocks: int) -> int:
    """How many blocks of a head a density keeps; at least one per row."""
    return min(max(round(density * blocks * blocks), blocks), blocks * blocks)


def nearest(order: Tensor, count: int) -> Tensor:
    """The mask of the `count` lowest of each head, and of every row's own block; ties go to the lower index.

    Args:
        order: float [..., blocks, blocks].
        count: Blocks to keep of each head.
    """
    order = order.double().clone()
    order.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    flat = order.flatten(-2)
    ranked = flat.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, ranked, True).view(order.shape)


def random_order(sites: tuple[int, ...], blocks: int, seed: int) -> Tensor:
    """Blocks of each site in random order, [*sites, blocks, blocks]."""
    return torch.rand(*sites, blocks, blocks, generator=torch.Generator().manual_seed(seed))


def diagonal_order(grid: Grid) -> Tensor:
    """By distance along the sequence, [blocks, blocks]: a band around the diagonal."""
    at = torch.arange(grid.blocks, dtype=torch.float64)
    return (at[:, None] - at).abs()


def window_order(grid: Grid) -> Tensor:
    """By the larger of the distances in time and along the height, each relative to its extent, [blocks, blocks]: a 3-D window
    as of Sliding Tile Attention. A block is some rows of a frame, as wide as the picture: so is the window."""
    frame, _ = grid.centres()
    row = grid.rows()
    apart_t, apart_h = _apart(frame) / grid.frames, _apart(row) / grid.height
    # The sum breaks ties: rings of a square are filled from the middle of their sides.
    return torch.maximum(apart_t, apart_h) + 1e-6 * (apart_t + apart_h)


def radial_order(grid: Grid) -> Tensor:
    """As Radial Attention: the window within a frame halves with every doubling of the distance in time, and the first frame is
    kept by all, [blocks, blocks]."""
    frame, place = grid.centres()
    apart_t = _apart(frame)
    halvings = apart_t.clamp(min=1).log2().floor()
    order = _apart(place) * 2.0**halvings + 1e-6 * apart_t
    return torch.where(_sink(frame), -1.0, order)


def spatial_order(grid: Grid) -> Tensor:
    """By distance in time first, [blocks, blocks]: the spatial pattern of Sparse VideoGen, frames near each other."""
    frame, place = grid.centres()
    order = _apart(frame) * grid.tokens + _apart(place)
    return torch.where(_sink(frame), -1.0, order)


def temporal_order(grid: Grid) -> Tensor:
    """By distance within the frame first, [blocks, blocks]: the temporal pattern of Sparse VideoGen, one place in all frames."""
    frame, place = grid.centres()
    order = _apart(place) * grid.tokens + _apart(frame)
    return torch.where(_sink(frame), -1.0, order)


def two_patterns(grid: Grid, energy: Tensor, count: int) -> Tensor:
    """For each head the spatial or the temporal pattern, whichever keeps more of its energy.

    Args:
        grid: The geometry.
        energy: Mean softmax mass of blocks over calibration prompts, [..., blocks, blocks].
        count: Blocks to keep of each head.
    """
    spatial, temporal = nearest(spatial_order(grid), count), nearest(temporal_order(grid), count)
    kept_spatial, kept_temporal = ((energy * mask).sum((-2, -1)) for mask in (spatial, temporal))
    return torch.where((kept_temporal > kept_spatial)[..., None, None], temporal, spatial)


def strongest(loss: Tensor, energy: Tensor, density: float) -> Tensor:
    """The blocks of largest loss of a whole plan, and the block of most energy of every row: bool, as many as the density says.

    Args:
        loss: [..., blocks, blocks].
        energy: As loss.
        density: Share of all blocks.
    """
    best = torch.zeros_like(loss, dtype=torch.bool).scatter(-1, energy.argmax(-1, keepdim=True), True)
    ranked = loss.masked_fill(best, torch.inf).flatten()
    kept = max(round(density * ranked.numel()), int(best.sum()))
    order = ranked.argsort(descending=True, stable=True)[:kept]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(0, order, True).view(loss.shape)


def strongest_by_row(loss: Tensor, count: int) -> Tensor:
    """Of every row as many blocks, `count` rounded over the rows of each head, those of highest loss: [..., blocks, blocks]."""
    blocks = loss.shape[-1]
    # Rows that keep one more than others are spread evenly.
    wanted = torch.arange(1, loss.shape[-2] + 1, device=loss.device) * count // loss.shape[-2]
    wanted = wanted.diff(prepend=wanted.new_zeros(1)).clamp(1, blocks)
    rank = loss.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < wanted[:, None]


def _apart(x: Tensor) -> Tensor:
    return (x[:, None] - x).abs()


def _sink(frame: Tensor) -> Tensor:
    """Keys of the first frame, [blocks, blocks]."""
    return (frame < 0.5).expand(len(frame), -1)

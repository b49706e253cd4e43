"""What a trace stores of one attention layer, computed: block energies and deviations, anchor similarity and error.

On a GPU the dense attention runs on calibc's own kernel, which gives the log-sum-exp as well; one more kernel reads it and
writes the trace's codes, which go to the trace from a thread of their own while the model goes on. In CPU memory the
reference computes the same in float64, and the model's attention runs as it always did.
"""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from calibc import _native
from calibc.errors import BadInput, Usage
from calibc.masks import BLOCK, Plan, block_sparse_attention, plan_from_mask

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The code of an energy of 0, and of 1, in log2-u8.
_ZERO, _ONE = 255, 0
# Anchor similarity is estimated from so many rows of the grid per head, at so many columns; small problems take all.
_ROWS, _COLUMNS = 16, 4
_SMALL = 4096
# Float32 values of probabilities held at a time.
_CHUNK = 1 << 27
# Layers on their way from the GPU to the trace.
_IN_FLIGHT = 3


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The tokens of a trace, in raster order."""

    frames: int
    height: int
    width: int
    text_tokens: int
    text_position: str

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK)

    @property
    def first_video(self) -> int:
        """Position of the first video token."""
        return self.text_tokens if self.text_position == "before" else 0

    def __str__(self) -> str:
        text = f" + {self.text_tokens} text" if self.text_tokens else ""
        return f"{self.frames}x{self.height}x{self.width}{text} = {self.tokens} tokens"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The attention of one layer."""

    query: Tensor
    """[B, H, S, D]."""
    key: Tensor
    value: Tensor
    lengths: list[int] | None
    """Tokens of each sample that are real; `None` for all."""
    drop_queries: bool
    """Whether the others give no queries either, and outputs of 0."""
    scale: float | None

    def sample(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of one sample, [1, H, S', D], without what is not real."""
        end = self.query.shape[2] if self.lengths is None else self.lengths[row]
        queries = end if self.drop_queries else self.query.shape[2]
        at = slice(row, row + 1)
        return self.query[at, :, :queries], self.key[at, :, :end], self.value[at, :, :end]

    @property
    def softmax_scale(self) -> float:
        return self.query.shape[3] ** -0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the trace takes of one layer, contiguous in CPU memory."""

    energy: Tensor
    """[H, blocks, blocks], uint8 codes or float32."""
    deviation: Tensor | None
    """As energy."""
    similarity: Tensor | None
    """float32 [H, anchor counts]."""
    error: Tensor | None
    """As similarity."""

    def addresses(self) -> tuple[int, int, int, int]:
        tensors = (self.energy, self.deviation, self.similarity, self.error)
        energy, deviation, similarity, error = (0 if x is None else x.data_ptr() for x in tensors)
        return energy, deviation, similarity, error


Write = Callable[[int, Measured], None]


class Statistics(abc.ABC):
    """Measures layers and hands them on."""

    def __init__(
        self, geometry: Geometry, rows_per_block: int, anchors: tuple[int, ...], encoding: str, deviation: bool
    ) -> None:
        self._geometry = geometry
        self._rows_per_block = rows_per_block
        self._encoding = encoding
        self._deviation = deviation
        self._anchors = AnchorStatistics(geometry, anchors) if anchors else None

    @abc.abstractmethod
    def measure(self, problem: Problem, seeds: dict[int, int], write: Write) -> Tensor | None:
        """Measures the samples that have a seed and calls `write` for each, possibly later and on another thread. Returns the
        dense output [B, H, S, D] where it was computed on the way."""

    def after(self, do: Callable[[], None]) -> None:
        """Calls `do` when everything measured so far is written, possibly later and on another thread."""
        do()

    def flush(self) -> None:
        """Returns when everything is written and done; raises what went wrong there."""

    def drop(self) -> None:
        """Forgets what is not written; returns when nothing is being written."""

    def close(self) -> None:
        """Ends the thread, if there is one."""

    def _whole(self, codes: Tensor, *, energy: bool) -> Tensor:
        """Statistics of the real blocks on the trace's grid. Blocks without keys have no mass. A block without queries, all text
        padding, is given the mass of its own column: text is dense in every plan."""
        n = self._geometry.blocks
        heads, rows, cols = codes.shape
        if (rows, cols) == (n, n):
            return codes
        coded = codes.dtype == torch.uint8
        whole = torch.full((heads, n, n), _ZERO if coded else 0, dtype=codes.dtype)
        whole[:, :rows, :cols] = codes
        if energy:
            for block in range(rows, n):
                whole[:, block, block] = _ONE if coded else 1
        return whole


class OnCpu(Statistics):
    """In CPU memory."""

    def measure(self, problem: Problem, seeds: dict[int, int], write: Write) -> Tensor | None:
        for row, seed in seeds.items():
            q, k, v = problem.sample(row)
            if q.dtype not in _NAMES:
                raise BadInput(f"q is {q.dtype}; traces are made of float32, bfloat16 or float16 attention")
            blocks = (q.shape[1], -(-q.shape[2] // BLOCK), -(-k.shape[2] // BLOCK))
            energy, deviation = torch.empty(blocks), torch.empty(blocks)
            _native.block_statistics_cpu(
                *(_described(x) for x in (q, k, v)),
                energy=energy.data_ptr(),
                deviation=deviation.data_ptr(),
                rows_per_block=self._rows_per_block,
                seed=seed,
                scale=problem.scale,
            )
            similarity = error = None
            if self._anchors is not None:
                qf, kf, vf = (x[0].float() for x in (q, k, v))
                scores = qf @ kf.mT * problem.softmax_scale
                lse = scores.logsumexp(-1)
                out = scores.sub_(lse[..., None]).exp_() @ vf
                similarity = self._anchors.similarity(qf, kf, lse, problem.softmax_scale, seed)
                error = self._anchors.error(out)
            dropped = self._coded(self._whole(deviation, energy=False)) if self._deviation else None
            write(row, Measured(self._coded(self._whole(energy, energy=True)), dropped, similarity, error))
        return None

    def _coded(self, values: Tensor) -> Tensor:
        if self._encoding != "log2-u8":
            return values.contiguous()
        values = values.contiguous()
        codes = torch.empty(values.shape, dtype=torch.uint8)
        _native.encode_log2_u8(values.data_ptr(), codes.data_ptr(), values.numel())
        return codes


class OnGpu(Statistics):
    """On a GPU."""

    def __init__(
        self,
        device: torch.device,
        geometry: Geometry,
        rows_per_block: int,
        anchors: tuple[int, ...],
        encoding: str,
        deviation: bool,
    ) -> None:
        super().__init__(geometry, rows_per_block, anchors, encoding, deviation)
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._kernels: dict[tuple[torch.dtype, int], _native.CaptureKernel] = {}
        self._plans: dict[tuple[int, int, int, int, torch.dtype], Plan] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "calibc-trace")
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def measure(self, problem: Problem, seeds: dict[int, int], write: Write) -> Tensor | None:
        outs = []
        tokens = problem.query.shape[2]
        for row in range(problem.query.shape[0]):
            q, k, v = problem.sample(row)
            if q.dtype not in (torch.bfloat16, torch.float16):
                raise BadInput(f"q is {q.dtype} on a GPU; run the model in bfloat16 or float16 to capture it")
            out, lse = block_sparse_attention(q, k, v, self._dense(q, k), problem.scale, return_lse=True)
            if row in seeds:
                self._measure(problem, (q, k, v, out, lse), row, seeds[row], write)
            # Padding that gave no queries has outputs of 0.
            outs.append(torch.nn.functional.pad(out, (0, 0, 0, tokens - out.shape[2])))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _measure(self, problem: Problem, tensors: tuple[Tensor, ...], row: int, seed: int, write: Write) -> None:
        q, k, v, out, lse = tensors
        blocks = (q.shape[1], -(-q.shape[2] // BLOCK), -(-k.shape[2] // BLOCK))
        coded = torch.uint8 if self._encoding == "log2-u8" else torch.float32
        energy, deviation = (torch.empty(blocks, dtype=coded, device=self._device) for _ in range(2))
        self._kernel(q).block_statistics(
            _described(q),
            _described(k),
            _described(v),
            _described(out),
            (lse.data_ptr(), tuple(lse.shape), tuple(lse.stride())),
            energy=energy.data_ptr(),
            deviation=deviation.data_ptr(),
            rows_per_block=self._rows_per_block,
            seed=seed,
            scale=problem.scale,
            stream=torch.cuda.current_stream(self._device).cuda_stream,
        )
        measured: list[Tensor | None] = [energy, deviation if self._deviation else None, None, None]
        if self._anchors is not None:
            measured[2] = self._anchors.similarity(q[0], k[0], lse[0], problem.softmax_scale, seed)
            measured[3] = self._anchors.error(out[0])
        self._hand_over(measured, row, write)

    def _hand_over(self, measured: list[Tensor | None], row: int, write: Write) -> None:
        """Copies behind the model's back; the thread writes when the copy is there."""
        while len(self._pending) >= _IN_FLIGHT:
            self._pending.popleft().result()
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            host = [None if tensor is None else self._copied(tensor) for tensor in measured]
            there = torch.cuda.Event()
            there.record(self._copies)

        def finish() -> None:
            there.synchronize()
            energy, deviation, similarity, error = host
            assert energy is not None, "energies are always measured"
            energy = self._whole(energy, energy=True)
            deviation = None if deviation is None else self._whole(deviation, energy=False)
            write(row, Measured(energy, deviation, similarity, error))

        self._pending.append(self._thread.submit(finish))

    def _copied(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, once the stream of copies gets there."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copies)
        return host

    def after(self, do: Callable[[], None]) -> None:
        self._pending.append(self._thread.submit(do))

    def flush(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def drop(self) -> None:
        while self._pending:
            pending = self._pending.popleft()
            if not pending.cancel():
                concurrent.futures.wait([pending])

    def close(self) -> None:
        self.drop()
        self._thread.shutdown()

    def _kernel(self, q: Tensor) -> _native.CaptureKernel:
        key = (q.dtype, q.shape[3])
        if key not in self._kernels:
            encoding = "log2-u8" if self._encoding == "log2-u8" else "f32"
            self._kernels[key] = _native.CaptureKernel(
                self._device.index, _NAMES[q.dtype], q.shape[3], encoding=encoding
            )
        return self._kernels[key]

    def _dense(self, q: Tensor, k: Tensor) -> Plan:
        heads, q_len, head_dim, kv_len = q.shape[1], q.shape[2], q.shape[3], k.shape[2]
        key = (heads, q_len, kv_len, head_dim, q.dtype)
        if key not in self._plans:
            mask = torch.ones(heads, -(-q_len // BLOCK), -(-kv_len // BLOCK), dtype=torch.bool)
            self._plans[key] = plan_from_mask(mask, q_len, kv_len, head_dim, q.dtype, device=self._device)
        return self._plans[key]


class AnchorStatistics:
    """How far anchor rows of a frame stand for the other rows of it."""

    def __init__(self, geometry: Geometry, counts: tuple[int, ...]) -> None:
        self._geometry = geometry
        self._counts = counts
        self._moved: dict[tuple[torch.device, int], Tensor] = {}
        g = geometry
        # For each count, the position that each position is copied from.
        self._sources = [
            torch.tensor(
                _native.anchor_source(g.frames, g.height, g.width, g.text_tokens, g.text_position, None, count),
                dtype=torch.int64,
            )
            for count in counts
        ]

    def error(self, out: Tensor) -> Tensor:
        """|copied O - O| / |O| over all rows, from the dense output [H, S, D]: float32 [H, counts]. Copied as the runtime
        copies: rows of blocks that hold text stay."""
        sources = [self._on(out.device, i)[: out.shape[1]] for i in range(len(self._counts))]
        result = torch.empty(out.shape[0], len(sources), device=out.device)
        for head in range(out.shape[0]):
            rows = out[head].float()
            norm = rows.norm()
            for i, source in enumerate(sources):
                result[head, i] = (rows.index_select(0, source) - rows).norm() / norm.clamp_min(1e-30)
        return result

    def similarity(self, q: Tensor, k: Tensor, lse: Tensor, scale: float, seed: int) -> Tensor:
        """Mean cosine similarity of a row's attention to its nearest anchor row's: float32 [H, counts].

        A row of the grid is the W rows of probabilities of its tokens, taken as one vector. Large problems sample rows and
        columns, the same for all heads.

        Args:
            q: [H, S, D].
            k: [H, S_kv, D].
            lse: [H, S].
            scale: Factor on the scores.
            seed: Decides the sample.
        """
        heads = q.shape[0]
        result = torch.empty(heads, len(self._counts), device=q.device)
        for i in range(len(self._counts)):
            rows, anchors = self._sample(i, seed)
            if rows.numel() == 0:
                result[:, i] = 1
                continue
            result[:, i] = self._cosines(q, k, lse, scale, rows.to(q.device), anchors.to(q.device))
        return result

    def _cosines(self, q: Tensor, k: Tensor, lse: Tensor, scale: float, rows: Tensor, anchors: Tensor) -> Tensor:
        """Mean cosine per head between the rows [N, columns] of tokens and their anchors."""
        count, columns = rows.shape
        per_head = 2 * rows.numel() * k.shape[1]
        # Whole heads where they fit, else some rows of one head at a time.
        row_step = max(1, min(count, _CHUNK // (2 * columns * k.shape[1])))
        head_step = max(1, _CHUNK // per_head)
        means = []
        for h in range(0, q.shape[0], head_step):
            at = slice(h, h + head_step)
            keys = k[at].float().mT
            total = torch.zeros(keys.shape[0], device=q.device)
            for n in range(0, count, row_step):
                mine, theirs = (
                    (
                        q[at].index_select(1, tokens).float() @ keys * scale
                        - lse[at].index_select(1, tokens)[..., None].float()
                    )
                    .exp()
                    .unflatten(1, (-1, columns))
                    for tokens in (rows[n : n + row_step].flatten(), anchors[n : n + row_step].flatten())
                )
                dot = (mine * theirs).sum((2, 3))
                norms = mine.square().sum((2, 3)) * theirs.square().sum((2, 3))
                total = total + (dot / norms.sqrt().clamp_min(1e-30)).sum(1)
            means.append(total / count)
        return torch.cat(means)

    def _sample(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Token positions of sampled rows of the grid that are no anchors, and of their anchors: [N, columns] each."""
        g, count = self._geometry, self._counts[index]
        anchors = (2 * torch.arange(count) + 1) * g.height // (2 * count)
        # The nearest anchor; of two, the lower.
        nearest = anchors[(torch.arange(g.height)[:, None] - anchors).abs().argmin(1)]
        grid = torch.arange(g.first_video, g.first_video + g.video_tokens).view(g.frames, g.height, g.width)
        moved = nearest != torch.arange(g.height)
        own, theirs = grid[:, moved].flatten(0, 1), grid[:, nearest[moved]].flatten(0, 1)
        if g.video_tokens <= _SMALL or own.numel() == 0:
            return own, theirs
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        rows = _strata(own.shape[0], _ROWS, generator)
        columns = _strata(g.width, _COLUMNS, generator)
        return own[rows][:, columns], theirs[rows][:, columns]

    def _on(self, device: torch.device, index: int) -> Tensor:
        """A table of sources on a device, moved there once."""
        if (device, index) not in self._moved:
            self._moved[device, index] = self._sources[index].to(device)
        return self._moved[device, index]


def _strata(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """One index of each of `wanted` equal parts of a range; all indices where there are no more."""
    if count <= wanted:
        return torch.arange(count)
    draws = (torch.arange(wanted) + torch.rand(wanted, generator=generator)) * count / wanted
    return draws.long().clamp_max(count - 1)


def statistics_on(
    device: torch.device,
    geometry: Geometry,
    rows_per_block: int,
    anchors: tuple[int, ...],
    encoding: str,
    deviation: bool,
) -> Statistics:
    """What measures on a device."""
    if device.type == "cpu":
        return OnCpu(geometry, rows_per_block, anchors, encoding, deviation)
    if device.type == "cuda":
        return OnGpu(device, geometry, rows_per_block, anchors, encoding, deviation)
    raise Usage(f"traces are captured on CUDA devices and the CPU, not on {device.type}")


def _described(x: Tensor) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
    return x.data_ptr(), _NAMES[x.dtype], tuple(x.shape), tuple(x.stride())


__all__ = ["BLOCK", "AnchorStatistics", "Geometry", "Measured", "Problem", "Statistics", "statistics_on"]

"""Records what a model attends to while it generates: calibration traces.

    with calibc.capture(pipe, "traces/", calibc.CaptureConfig(prompts=16)) as cap:
        for name in cap.remaining(prompts):
            with cap.prompt(name, seed=0, label=prompts[name]):
                pipe(prompts[name], generator=torch.Generator().manual_seed(0))
    calibc.compile("traces/", out="plan.bundle")

Generation is as without it. At the captured steps every self-attention layer also gives, per head, the softmax mass of each
block and what dropping the block would change (`block_energy` and `block_deviation` of trace format 1), from all query rows of
a block or a sample of them, and how far anchor rows stand for their neighbours.

A trace grows: more prompts can come later, in other processes too. A prompt is in the trace once its last captured step is
done; what a killed process left of another is removed by the next. Under `torchrun` each process takes its share of the
prompts (`cap.assigned`) and writes a part, and the parts become one trace at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from calibc import _native
from calibc.adapters import Adapter, Call, Route, adapter_of, transformers_of
from calibc.adapters.schedule import (
    ContextHook,
    Position,
    Progress,
    TextLengths,
    Timesteps,
    attach,
    attached,
    detach,
    place,
    put_back,
)
from calibc.adapters.schedule import (
    capturing as recording_graph,
)
from calibc.apply import _HOOK as _SPARSE_HOOK
from calibc.errors import BadInput, Usage
from calibc.statistics import BLOCK, Geometry, Measured, Problem, Statistics, statistics_on

_HOOK = "calibc_capture"
# Schedules up to this many steps are captured whole; of longer ones, so many steps.
_WHOLE = 12
_SUBSET = 10


@dataclasses.dataclass(frozen=True)
class CaptureConfig:
    """What to capture."""

    rows_per_block: int = 16
    """Query rows that stand for a block of 128: 16, 32, 64, or 128 for all. Samples are stratified and unbiased."""
    deviation: bool = True
    """Whether to measure what dropping a block changes, which the best policies need."""
    anchors: tuple[int, ...] = (5,)
    """Anchor rows per frame to measure; none to leave anchors out."""
    branches: tuple[str, ...] = ("cond",)
    """Passes of guidance: `cond`, `uncond` or both."""
    steps: Sequence[int] | int | None = None
    """Steps by number, or how many, spread evenly. By default all of a short schedule, ten of a longer one: others take the
    energies of the nearest captured step."""
    sigmas: Sequence[float] | None = None
    """Noise level of every step, falling, where it cannot be told from pipeline or timesteps."""
    prompts: int = 1
    """Prompts that this capture expects to add, for the estimate of space."""
    encoding: str = "log2-u8"
    """How values are stored: `log2-u8` (one byte, 4.4 % relative error at most), `f16` or `f32`."""
    model: str | None = None
    """Name of the model in the trace; by default that of its class."""
    progress: bool = True
    """Whether to draw a progress bar where stderr is a terminal."""

    def __post_init__(self) -> None:
        if self.rows_per_block not in (16, 32, 64, 128):
            raise Usage(f"rows_per_block is {self.rows_per_block}; it must be 16, 32, 64 or 128")
        if not self.branches or not set(self.branches) <= {"cond", "uncond"}:
            raise Usage(f"branches are {self.branches}; there are `cond` and `uncond`")
        if self.prompts < 1:
            raise Usage("prompts must be at least 1")

    def chosen(self, steps: int) -> list[int]:
        """The steps to capture of a schedule of `steps` steps."""
        wanted = self.steps
        if wanted is None:
            wanted = steps if steps <= _WHOLE else _SUBSET
        if isinstance(wanted, int):
            if wanted < 1:
                raise Usage("at least one step must be captured")
            count = min(wanted, steps)
            return [0] if count == 1 else [round(i * (steps - 1) / (count - 1)) for i in range(count)]
        chosen = sorted(set(wanted))
        if not chosen or chosen[0] < 0 or chosen[-1] >= steps:
            raise Usage(f"steps {list(wanted)} are not all steps of a schedule of {steps}")
        return chosen


@dataclasses.dataclass
class _Prompt:
    id: str
    seed: int | None
    split: str
    label: str
    explicit: bool
    # In the trace already: nothing to capture.
    done: bool = False
    begun: bool = False
    generations: int = 0
    left: set[tuple[int, str]] = dataclasses.field(default_factory=set)


class _Layer(Route):
    """One attention layer under capture."""

    def __init__(self, owner: _Hook, index: int) -> None:
        self._owner = owner
        self._index = index

    @property
    def engaged(self) -> bool:
        return bool(self._owner.rows)

    @torch.compiler.disable
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        blocked: str | None = None,
    ) -> Tensor | None:
        owner = self._owner
        if not owner.rows:
            return None
        if mask is not None and owner.lengths is None:
            blocked = "a mask over attention"
        if blocked is not None:
            raise BadInput(f"traces cannot describe this attention: {blocked}")
        return owner.measure(self._index, query, key, value, scale)


class _Hook(ContextHook):
    """Follows one transformer through its generations."""

    def __init__(self, adapter: Adapter, capture: Capture) -> None:
        super().__init__()
        self._adapter = adapter
        self._capture = capture
        self._timesteps = Timesteps(adapter)
        self._texts = TextLengths()
        # This pass: samples to capture with their branches, their open shards, and real tokens of each sample.
        self.rows: dict[int, str] = {}
        self.lengths: list[int] | None = None
        self._shards: dict[str, Any] = {}
        self._step = 0
        self._seen = 0
        self.attentions: list[Any] = adapter.layers()
        self.originals: list[Any] = [attn.processor for attn in self.attentions]
        self.processors = [adapter.processor(original, _Layer(self, i)) for i, original in enumerate(self.originals)]

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._adapter.bind(args, kwargs)
        self.rows = {}
        if recording_graph(call.latents.device):
            raise Usage("a CUDA graph cannot be captured while a trace is; leave `calibc.capture` first")
        context = self.context()
        level = context.sigma if context.sigma is not None else self._timesteps.level(call.timestep)
        position = self._capture._progress.advance(level)
        if position.starts:
            self._capture._generation(self._adapter, call, self._timesteps)
        step = self._capture._wanted_step(level)
        if step is not None:
            self._open(call, step, self._branches(call, context.name, position))
        return args, kwargs

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        rows, self.rows = self.rows, {}
        if rows:
            if self._seen != len(self.attentions):
                raise BadInput(
                    f"{self._seen} of {len(self.attentions)} attention layers ran at step {self._step}; capture without "
                    "caches that skip layers"
                )
            for branch in rows.values():
                self._capture._finish(self._shards.pop(branch), self._step, branch)
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._capture._progress.reset()
        return super().reset_state(module)

    def _branches(self, call: Call, name: str | None, position: Position) -> dict[int, str]:
        """The branch of each sample of a pass."""
        if self._adapter.batched_guidance:
            orders = {1: ("cond",), 2: ("uncond", "cond")}
        else:
            known = name if name in ("cond", "uncond") else ("cond", "uncond")[min(position.turn, 1)]
            orders = {1: (known,)}
        if call.batch not in orders:
            raise BadInput(f"a pass has {call.batch} samples; capture one prompt and one video at a time")
        return dict(enumerate(orders[call.batch]))

    def _open(self, call: Call, step: int, branches: dict[int, str]) -> None:
        rows = {row: branch for row, branch in branches.items() if self._capture._wanted(step, branch)}
        if not rows:
            return
        self._capture._check_geometry(call)
        self.lengths = None
        if call.text_mask is not None:
            real = self._texts.read(call.text_mask)
            if real is None:
                raise BadInput("text padding stands before text, which no adapter expects")
            self.lengths = [call.video_tokens + n for n in real]
        self._step, self._seen = step, 0
        self._shards = {branch: self._capture._shard(step, branch) for branch in rows.values()}
        self.rows = rows

    def measure(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:
        """Statistics of one layer. Returns the dense output where it was computed on the way, else `None`."""
        self._seen += 1
        problem = Problem(query, key, value, self.lengths, self._adapter.drops_padding, scale)
        return self._capture._measure(
            layer, problem, {row: (branch, self._shards[branch]) for row, branch in self.rows.items()}, self._step
        )

    def install(self) -> None:
        place(self.attentions, self.processors)
        attach(self._adapter.module, self, _HOOK)

    def uninstall(self) -> None:
        put_back(self.attentions, self.processors, self.originals)
        detach(self._adapter.module, _HOOK)


class Capture:
    """A capture under way; `calibc.capture` makes it."""

    def __init__(self, target: object, path: str | os.PathLike[str], config: CaptureConfig) -> None:
        self._target = target
        self._path = pathlib.Path(path)
        self._config = config
        self._rank, self._world = _process()
        self._part = f"rank{self._rank:04d}" if self._world > 1 else None
        self._progress = Progress()
        self._hooks: list[_Hook] = []
        self._writer: Any = None
        self._geometry: Geometry | None = None
        self._statistics: Statistics | None = None
        self._sigmas: list[float] = []
        self._steps: list[int] = []
        self._prompt: _Prompt | None = None
        self._added: list[str] = []
        self._known: set[str] | None = None

    # What users call.

    @property
    def prompts(self) -> list[str]:
        """Prompts that this capture has added."""
        return list(self._added)

    def remaining(self, prompts: Iterable[str]) -> list[str]:
        """Those of the names that the trace does not have yet, in order: what is left after a kill."""
        known = self._in_trace()
        return [name for name in prompts if name not in known]

    def assigned(self, prompts: Sequence[str]) -> list[str]:
        """Those of the names that this process of `torchrun` takes; all of them where it is the only one."""
        return list(prompts[self._rank :: self._world])

    @contextlib.contextmanager
    def prompt(
        self, name: str, *, seed: int | None = None, split: str = "calibration", label: str = ""
    ) -> Iterator[None]:
        """Names the one generation inside. Without it prompts are told apart by themselves and numbered.

        Args:
            name: Names a folder: letters, digits, `-`, `_` and `.`. One that the trace has already is generated, not captured.
            seed: For the record.
            split: `calibration`, or `holdout` for prompts that the plan is judged by.
            label: For the record; the prompt's words, say.
        """
        if split not in ("calibration", "holdout"):
            raise Usage(f"`{split}` is no split; there are `calibration` and `holdout`")
        if self._prompt is not None and self._prompt.explicit:
            raise Usage(f"prompt {self._prompt.id} is not over")
        self._abandon("its generation did not end")
        self._progress.reset()
        done = name in self._in_trace()
        if done:
            _say(f"{name} is in the trace already; this generation is not captured")
        self._prompt = prompt = _Prompt(name, seed, split, label, explicit=True, done=done)
        try:
            yield
            if not prompt.done:
                missing = f"{len(prompt.left)} captured passes are missing" if prompt.begun else "nothing was generated"
                raise BadInput(
                    f"prompt {name} is not whole: {missing}; generate it with all steps and guidance as configured"
                )
        finally:
            self._abandon(None)
            self._progress.reset()

    def summary(self) -> str:
        """What was captured, in words."""
        if self._geometry is None:
            return "nothing captured"
        of = f"{len(self._steps)} of {len(self._sigmas)} steps"
        return f"{len(self._added)} prompts added to {self._path}: {self._geometry}, {of}, branches {', '.join(self._config.branches)}"

    def __enter__(self) -> Capture:
        modules = transformers_of(self._target)
        for name, module in modules.items():
            if attached(module, _SPARSE_HOOK) is not None:
                raise Usage(f"{name} runs on a plan; traces need dense attention, so remove it first")
            if attached(module, _HOOK) is not None:
                raise Usage(f"{name} is being captured already")
        self._hooks = [_Hook(adapter_of(module), self) for module in modules.values()]
        for hook in self._hooks:
            hook.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.uninstall()
        try:
            self._abandon("its generation did not end")
        finally:
            if self._statistics is not None:
                self._statistics.close()
            if self._writer is not None:
                self._writer.close()
        self._bar("")
        if error is None and self._part is not None:
            self._merge()

    # What hooks call.

    def _generation(self, adapter: Adapter, call: Call, timesteps: Timesteps) -> None:
        """A generation starts."""
        if self._writer is None:
            self._start(adapter, call, timesteps)
        prompt = self._prompt
        if prompt is not None and prompt.explicit:
            prompt.generations += 1
            if prompt.generations > 1 and not prompt.done:
                raise BadInput(f"two generations in prompt {prompt.id}; give each a prompt of its own")
            if prompt.generations > 1 or prompt.done:
                return
        else:
            self._abandon("the next generation started before its end")
            prompt = self._prompt = _Prompt(self._free_name(), None, "calibration", "", explicit=False)
        self._writer.begin_prompt(prompt.id, seed=prompt.seed, split=prompt.split, label=prompt.label)
        prompt.begun = True
        prompt.left = {(step, branch) for step in self._steps for branch in self._config.branches}

    def _start(self, adapter: Adapter, call: Call, timesteps: Timesteps) -> None:
        """Everything about the trace is known: opens it."""
        config = self._config
        if call.grid is None:
            raise BadInput(
                "the model is not told its grid of tokens, which a trace must have; pass num_frames, height and width"
            )
        self._sigmas = self._schedule(adapter, call, timesteps)
        self._steps = config.chosen(len(self._sigmas))
        text_position = adapter.text_position if call.text_tokens else "none"
        self._geometry = geometry = Geometry(*call.grid, call.text_tokens, text_position)
        for count in config.anchors:
            if not 1 <= count <= geometry.height:
                raise Usage(f"{count} anchor rows do not fit a frame of {geometry.height} rows; change `anchors`")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = _native.TraceWriter.open(
            str(self._path),
            model=config.model or adapter.model_class.removesuffix("Transformer3DModel"),
            layers=len(adapter.layers()),
            heads=adapter.heads,
            head_dim=adapter.head_dim,
            frames=geometry.frames,
            height=geometry.height,
            width=geometry.width,
            text_tokens=geometry.text_tokens,
            text_position=geometry.text_position,
            sigmas=self._sigmas,
            branches=list(config.branches),
            encoding=config.encoding,
            anchor_counts=list(config.anchors),
            part=self._part,
        )
        self._known = set(self._writer.prompts)
        self._announce()
        self._statistics = statistics_on(
            call.latents.device, geometry, config.rows_per_block, config.anchors, config.encoding, config.deviation
        )

    def _schedule(self, adapter: Adapter, call: Call, timesteps: Timesteps) -> list[float]:
        """Noise level of every step of the sampler."""
        levels: list[float] | None
        scheduler = getattr(self._target, "scheduler", None)
        if self._config.sigmas is not None:
            levels = [float(sigma) for sigma in self._config.sigmas]
        elif isinstance(listed := getattr(scheduler, "timesteps", None), Tensor):
            levels = [adapter.noise_level(float(t)) for t in listed.tolist()]
        else:
            levels = timesteps.schedule(call.timestep)
        if not levels:
            raise BadInput(
                "the schedule cannot be told from the timesteps; pass CaptureConfig(sigmas=[...]), one per step"
            )
        # Schedulers of second order visit some timesteps twice.
        distinct = [level for i, level in enumerate(levels) if i == 0 or level != levels[i - 1]]
        if any(a <= b for a, b in itertools.pairwise(distinct)):
            raise BadInput(f"noise levels must fall from step to step, but the schedule is {distinct}")
        return distinct

    def _announce(self) -> None:
        config, writer = self._config, self._writer
        extras = {
            "deviation": config.deviation,
            "anchor_similarity": bool(config.anchors),
            "anchor_error": bool(config.anchors),
        }
        branches = len(config.branches)
        one = writer.estimate(1, len(self._steps), branches, **extras)
        free = writer.free_space()
        _say(
            f"{self._geometry}; {len(self._steps)} of {len(self._sigmas)} steps, {branches} branch{'es' * (branches > 1)}: "
            f"about {_size(one)} per prompt, {_size(one * config.prompts)} for {config.prompts}, {_size(free)} free"
        )
        if len(self._steps) < len(self._sigmas):
            _say(
                f"captured steps: {', '.join(map(str, self._steps))}; the others will take the masks' energies of the nearest of these"
            )
        writer.check_space(one * config.prompts)

    def _check_geometry(self, call: Call) -> None:
        have = self._geometry
        assert have is not None, "a generation has started"
        if call.grid != (have.frames, have.height, have.width) or call.text_tokens != have.text_tokens:
            raise BadInput(
                f"this pass has the grid {call.grid} and {call.text_tokens} text tokens, the trace {have}; one trace has one size"
            )

    def _wanted_step(self, level: float) -> int | None:
        """The step of this noise level, if it is to be captured."""
        prompt = self._prompt
        if prompt is None or prompt.done or not prompt.begun:
            return None
        step = min(range(len(self._sigmas)), key=lambda i: abs(self._sigmas[i] - level))
        return step if step in self._steps else None

    def _wanted(self, step: int, branch: str) -> bool:
        return self._prompt is not None and (step, branch) in self._prompt.left

    def _shard(self, step: int, branch: str) -> Any:
        anchors = bool(self._config.anchors)
        return self._writer.begin_shard(
            step, branch, deviation=self._config.deviation, anchor_similarity=anchors, anchor_error=anchors
        )

    def _measure(self, layer: int, problem: Problem, rows: dict[int, tuple[str, Any]], step: int) -> Tensor | None:
        statistics, prompt = self._statistics, self._prompt
        assert statistics is not None and prompt is not None, "a shard is open"
        seeds = {row: _native.capture_seed(prompt.id, step, branch, layer) for row, (branch, _) in rows.items()}

        def write(row: int, measured: Measured) -> None:
            rows[row][1].layer(layer, *measured.addresses())

        return statistics.measure(problem, seeds, write)

    def _finish(self, shard: Any, step: int, branch: str) -> None:
        statistics, prompt = self._statistics, self._prompt
        assert statistics is not None and prompt is not None, "a shard is open"
        statistics.after(shard.finish)
        prompt.left.discard((step, branch))
        total = len(self._steps) * len(self._config.branches)
        self._bar(f"calibc: {prompt.id} {total - len(prompt.left)}/{total} passes, {len(self._added)} prompts before")
        if not prompt.left:
            statistics.flush()
            self._writer.end_prompt()
            prompt.done = True
            self._added.append(prompt.id)
            if self._known is not None:
                self._known.add(prompt.id)

    def _abandon(self, why: str | None) -> None:
        """Ends the prompt under way; if it is not whole, nothing of it stays."""
        prompt, self._prompt = self._prompt, None
        if prompt is None or prompt.done or not prompt.begun:
            return
        if self._statistics is not None:
            self._statistics.drop()
        for hook in self._hooks:
            hook.rows, hook._shards = {}, {}
        self._writer.discard_prompt()
        if why is not None:
            _say(f"{prompt.id} is left out: {why}")

    # Names and parts.

    def _in_trace(self) -> set[str]:
        if self._known is not None:
            return self._known
        manifests = [self._path / "manifest.json", *sorted(self._path.glob(".parts/*/manifest.json"))]
        found = set()
        for manifest in manifests:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found |= {prompt["id"] for prompt in json.loads(manifest.read_bytes())["prompts"]}
        return found

    def _free_name(self) -> str:
        """The next number that no prompt has."""
        known, prefix = self._in_trace(), "" if self._part is None else f"r{self._rank}-"
        number = 0
        while (name := f"{prefix}p{number:03}") in known:
            number += 1
        return name

    def _merge(self) -> None:
        """Parts of all processes become one trace, where the processes can wait for each other."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            if self._rank == 0:
                _say(f"run calibc.merge_parts({str(self._path)!r}) when all {self._world} processes have ended")
            return
        torch.distributed.barrier()
        if self._rank == 0:
            merge_parts(self._path)
        torch.distributed.barrier()

    def _bar(self, text: str) -> None:
        if self._config.progress and sys.stderr.isatty():
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


def capture(target: object, path: str | os.PathLike[str], config: CaptureConfig | None = None) -> Capture:
    """Captures traces of a transformer, or of a pipeline's transformers, while the returned context lasts.

    Args:
        target: A transformer of diffusers with an adapter, or a pipeline of one or two.
        path: Folder of the trace; a new one, or one of the same model and size to add to.
        config: What to capture.
    """
    return Capture(target, path, config or CaptureConfig())


def merge_parts(path: str | os.PathLike[str]) -> int:
    """Makes the parts that several processes wrote one trace; returns its prompts. To be called when all of them have ended; after
    a kill it can be repeated."""
    return _native.TraceWriter.merge_parts(str(path))


def _process() -> tuple[int, int]:
    """Rank and number of processes, as `torchrun` says."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise Usage(f"RANK and WORLD_SIZE must be numbers: {error}") from error
    if not 0 <= rank < world:
        raise Usage(f"RANK is {rank} and WORLD_SIZE {world}; ranks count from 0")
    return rank, world


def _say(text: str) -> None:
    print(f"calibc: {text}", file=sys.stderr, flush=True)


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


__all__ = ["BLOCK", "Capture", "CaptureConfig", "capture", "merge_parts"]

"""Where in a generation a forward pass stands: noise level, step, pass. Reads what pipelines say, without waiting for the GPU."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from calibc.adapters.base import Adapter

# Two passes of a step may differ this much in what they say of the noise (one from sigma, one from a rounded timestep).
_SAME = 1e-6


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pipeline says through `cache_context`, where it does."""

    name: str | None = None
    step_index: int | None = None
    num_steps: int | None = None
    sigma: float | None = None


class _NoState(BaseState):
    """Hooks that are told of contexts must keep a state of some kind."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class ContextHook(ModelHook):
    """A hook around a transformer's forward that is told of the pipeline's contexts."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        # diffusers hands contexts to attributes of this type.
        self.contexts = StateManager(_NoState)

    def context(self) -> Context:
        """The pipeline's context, empty where it sets none."""
        current = getattr(self.contexts, "_context", None)
        if current is None:
            # Before 0.38 or so a context was its name.
            return Context(name=getattr(self.contexts, "_current_context", None))
        return Context(current.name, current.step_index, current.num_inference_steps, current.sigma)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.contexts.reset()
        return module


def attach(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Puts a hook around the forward of `module`."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def attached(module: nn.Module, name: str) -> ModelHook | None:
    """The hook of that name, if there is one."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def detach(module: nn.Module, name: str) -> None:
    """Takes a hook away; without hooks a module is as it was."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        own = module.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
        del module._diffusers_hook


@dataclasses.dataclass
class Position:
    """A forward pass in its generation."""

    level: float
    """Noise level: 1 is noise, 0 is video."""
    step: int
    """Denoising step, counted from the start of the generation."""
    turn: int
    """Forward passes of this step before this one."""
    starts: bool
    """Whether a generation starts with this pass."""


class Progress:
    """Counts generations, steps and passes from noise levels. Experts of one pipeline share one."""

    def __init__(self) -> None:
        self._last: Position | None = None

    def advance(self, level: float) -> Position:
        """The position of a pass at this noise level: noise that rises again is a new generation."""
        last = self._last
        if last is None or level > last.level + _SAME:
            position = Position(level, 0, 0, True)
        elif level < last.level - _SAME:
            position = Position(level, last.step + 1, 0, False)
        else:
            position = Position(level, last.step, last.turn + 1, False)
        self._last = position
        return position

    def reset(self) -> None:
        """The generation is over."""
        self._last = None


class Timesteps:
    """Reads timesteps. Those on a GPU are slices of a scheduler's list: the list is read once, not each step."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._list: tuple[Tensor, int, list[float]] | None = None

    def level(self, timestep: Tensor | float) -> float:
        """The noise level of a forward pass."""
        if not isinstance(timestep, Tensor):
            return self._adapter.noise_level(float(timestep))
        # Timesteps per token: conditioning frames have none, the others share one.
        if (
            timestep.is_cuda
            and timestep.dim() <= 1
            and all(n == 1 or s == 0 for n, s in zip(timestep.shape, timestep.stride()))
        ):
            return self._adapter.noise_level(self._listed(timestep)[timestep.storage_offset()])
        return self._adapter.noise_level(float(timestep.max()))

    def schedule(self, timestep: Tensor | float) -> list[float] | None:
        """Noise levels of the whole schedule that a timestep is a slice of, in order; `None` where it is no such slice."""
        if not isinstance(timestep, Tensor) or timestep.dim() > 1:
            return None
        levels = [self._adapter.noise_level(t) for t in self._listed(timestep)]
        falling = all(a > b for a, b in itertools.pairwise(levels))
        return levels if falling and len(levels) > 1 else None

    def _listed(self, timestep: Tensor) -> list[float]:
        """Everything in the memory that `timestep` is a view of."""
        storage, version = timestep.untyped_storage(), _version(timestep)
        if self._list is not None:
            held, at, values = self._list
            if (
                held.untyped_storage().data_ptr() == storage.data_ptr()
                and held.dtype == timestep.dtype
                and at == version
            ):
                return values
        count = storage.nbytes() // timestep.element_size()
        whole = torch.as_strided(timestep.detach(), (count,), (1,), 0)
        values = whole.tolist()
        # Held, so that the address cannot become another list's.
        self._list = (whole, version, values)
        return values


class TextLengths:
    """Real text tokens of each sample, from masks. A mask is read once: pipelines pass the same tensor at every step."""

    _KEPT = 4

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Tensor], int, list[int] | None]] = []

    def read(self, mask: Tensor) -> list[int] | None:
        """Lengths by sample; `None` where padding does not come last."""
        version = _version(mask)
        for ref, at, known in self._known:
            if ref() is mask and at == version:
                return known
        real = mask.detach().flatten(1).ne(0).cpu()
        lengths = real.sum(dim=1)
        padded_last = bool((real == (torch.arange(real.shape[1]) < lengths[:, None])).all())
        result = lengths.tolist() if padded_last else None
        alive = [entry for entry in self._known if entry[0]() is not None]
        self._known = [*alive[-self._KEPT + 1 :], (weakref.ref(mask), version, result)]
        return result


def _version(tensor: Tensor) -> int:
    """Counts changes in place, where torch does."""
    return 0 if tensor.is_inference() else tensor._version


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph: nothing may be read from the GPU then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


__all__ = [
    "Context",
    "ContextHook",
    "Position",
    "Progress",
    "TextLengths",
    "Timesteps",
    "attach",
    "attached",
    "capturing",
    "detach",
]


def place(attentions: Sequence[Any], processors: Sequence[Any]) -> None:
    """Gives every attention its processor."""
    for attn, processor in zip(attentions, processors, strict=True):
        attn.processor = processor


def put_back(attentions: Sequence[Any], processors: Sequence[Any], originals: Sequence[Any]) -> None:
    """Undoes `place`; a processor that someone else has set since stays."""
    for attn, ours, original in zip(attentions, processors, originals, strict=True):
        if attn.processor is ours:
            attn.processor = original

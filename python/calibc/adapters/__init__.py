"""Adapters: what calibc must know of each model class of diffusers, one small module per model.

    forward arguments --Adapter.call--> Call (grid, text, timestep)        decides whether and how a plan covers the forward
    attention module  --Adapter.processor--> processor --Route.attend--> attention of a plan, or None: the attention set before

An adapter leaves projections, normalisation and rotary embedding to the model; only the last step, attention itself, is taken
over, layer by layer, through the model's own slot for attention processors.
"""

from __future__ import annotations

from torch import nn

from calibc.adapters.base import Adapter, Call, Route
from calibc.adapters.cogvideox import CogVideoX
from calibc.adapters.hunyuan_video import HunyuanVideo
from calibc.adapters.ltx import LTXVideo
from calibc.adapters.mochi import Mochi
from calibc.adapters.wan import Wan
from calibc.errors import Usage

ADAPTERS: tuple[type[Adapter], ...] = (Wan, HunyuanVideo, Mochi, LTXVideo, CogVideoX)

# Where pipelines keep their transformers; Wan 2.2 has two experts.
_COMPONENTS = ("transformer", "transformer_2")


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter of a transformer; subclasses have that of their class."""
    names = {cls.__name__ for cls in type(module).__mro__}
    for adapter in ADAPTERS:
        if adapter.model_class in names:
            return adapter(module)
    known = ", ".join(adapter.model_class for adapter in ADAPTERS)
    raise Usage(f"{type(module).__name__} has no adapter; there are adapters for {known}")


def transformers_of(target: object) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name, or a transformer alone as `transformer`.

    A module that `torch.compile` wrapped stands for the module inside.
    """
    if isinstance(target, nn.Module):
        return {"transformer": _unwrapped(target)}
    found = {name: getattr(target, name, None) for name in _COMPONENTS}
    modules = {name: _unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise Usage(
            f"{type(target).__name__} is neither a transformer nor a pipeline with one; pass pipe or pipe.transformer"
        )
    return modules


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


__all__ = ["ADAPTERS", "Adapter", "Call", "Route", "adapter_of", "transformers_of"]

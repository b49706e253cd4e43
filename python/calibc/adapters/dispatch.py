"""Taking over the attention of processors that go through `dispatch_attention_fn` of diffusers.

The model's own processor keeps running. Its code is run with one name bound otherwise, `dispatch_attention_fn`, and with a
stand-in for `self` whose `_attention_backend`, which processors hand to the dispatcher, says which layer this is. No global of
diffusers changes, other models are not touched, and all layers share one function: `torch.compile` makes one graph for them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from calibc.adapters.base import Route
from calibc.errors import Usage

_DISPATCHER = "dispatch_attention_fn"


class StandIn:
    """What the processor's code sees as `self`: the processor, but for the backend it names."""

    def __init__(self, original: Any, route: Route) -> None:
        self.original = original
        self.route = route

    @property
    def _attention_backend(self) -> StandIn:
        return self

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class Dispatched:
    """A processor whose attention goes to a route. Subclasses add `__call__`: models look at its signature."""

    def __init__(self, original: Any, route: Route) -> None:
        self.original = original
        self.stand_in = StandIn(original, route)
        self.run = _rebound(type(original).__call__)

    # What `set_attention_backend` and parallelism set later holds for the attention fallen back to.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config


@functools.cache
def _rebound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The code of `function` with its dispatcher bound to ours."""
    if (
        not isinstance(function, types.FunctionType)
        or function.__globals__.get(_DISPATCHER) is not dispatch_attention_fn
    ):
        raise Usage(
            f"the attention processor {function.__qualname__} does not go through diffusers' dispatch_attention_fn; "
            "set the model's default processor first"
        )
    scope = {**function.__globals__, _DISPATCHER: _attend}
    # With a name, torch.compile would look globals up in the module of that name instead of here.
    del scope["__name__"]
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: StandIn,
    parallel_config: Any = None,
) -> Tensor:
    """Stands where the processor calls the dispatcher; q, k and v are [B, S, H, D]."""
    route, blocked = backend.route, None
    if parallel_config is not None:
        blocked = "context parallelism"
    elif dropout_p != 0.0:
        blocked = "dropout"
    elif is_causal:
        blocked = "causal"
    out = route.attend(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask=attn_mask, scale=scale, blocked=blocked
    )
    if out is not None:
        return out.transpose(1, 2)
    set_before = getattr(backend.original, "_attention_backend", None)
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        attention_kwargs=attention_kwargs,
        backend=set_before if route.fallback is None else route.fallback,
        parallel_config=parallel_config,
    )

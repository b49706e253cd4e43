"""Follows generations pass by pass: records one, and repeats it with an error in the velocity of one step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calibc._native import TraceHead
from calibc.adapters import Adapter, Call, adapter_of
from calibc.adapters.hunyuan_video import HunyuanVideo
from calibc.adapters.schedule import ContextHook, Progress, Timesteps, attach, capturing, detach
from calibc.errors import BadInput, Usage
from calibc.sensitivities.errors import normal

_HOOK = "calibc_sensitivity"
# Noise on latents, relative, that makes rounding another one in all layers: some units of bfloat16's last place.
_DITHER = 2.0**-4


@dataclasses.dataclass
class Pass:
    """One forward pass of a generation."""

    component: str
    """Name of the transformer in its pipeline."""
    step: int
    level: float
    branches: tuple[str, ...]
    """The branch of each sample."""
    output: Any
    """What the model returned, with `velocity` taken out."""
    velocity: Tensor
    """[samples, ...], in CPU memory."""
    scale: float | None
    """Guidance scale at this time, where it is known."""
    autocast: tuple[str, torch.dtype] | None
    """Device type and type of the autocast that was on."""
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    """What the model was given; kept at steps that are measured."""

    def call(self, adapter: Adapter, dither: int | None = None) -> Tensor:
        """Runs the model on the same arguments again: its velocity, [samples, ...].

        Args:
            adapter: The model's.
            dither: Seed of noise on the latents, where they are to be others of the same kind.
        """
        assert self.arguments is not None, "the step is measured"
        args, kwargs = self.arguments
        if dither is not None:
            latents = adapter.bind(args, kwargs).latents
            noise = normal(latents.shape[1:], dither)
            size = latents.float().square().mean().sqrt() * _DITHER
            moved = (latents.float() + noise.to(latents.device) * size).to(latents.dtype)
            args, kwargs = pytree.tree_map(lambda x: moved if x is latents else x, (args, kwargs))
        kind = contextlib.nullcontext() if self.autocast is None else torch.autocast(*self.autocast)
        with kind:
            return _velocity(adapter.module(*args, **kwargs))


def guided(parts: Mapping[str, Tensor], scale: float | None) -> Tensor:
    """The guided sum u + scale * (c - u) of what belongs to the branches; of one branch alone, itself."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    assert scale is not None, "a recorded generation with two branches has a scale"
    return parts["uncond"] + scale * (parts["cond"] - parts["uncond"])


def by_branch(passes: list[Pass], velocities: list[Tensor]) -> dict[str, Tensor]:
    """The velocity of each branch of a step, [...] float32."""
    return {
        branch: velocity[row].float()
        for each, velocity in zip(passes, velocities, strict=True)
        for row, branch in enumerate(each.branches)
    }


class Follower:
    """Stands around the transformers of a pipeline while a user's function generates."""

    def __init__(
        self, target: object, modules: Mapping[str, nn.Module], trace: TraceHead, guidance_scale: float | None
    ) -> None:
        self.adapters = {name: adapter_of(module) for name, module in modules.items()}
        self.passes: list[Pass] = []
        self._target = target
        self._trace = trace
        self._scale = guidance_scale
        self._progress = Progress()
        self._first: Tensor | None = None
        self._measured: frozenset[int] = frozenset()
        # When a generation is repeated: the step whose velocity is wrong, by how much, and passes so far.
        self._wrong: tuple[int, Tensor] | None = None
        self._at = 0

    def record(self, run: Callable[[], object], measured: frozenset[int], tick: Callable[[], None]) -> Tensor:
        """Runs a generation as it is and keeps its passes; returns its latents, float32 in CPU memory."""
        self.passes, self._first, self._measured, self._wrong = [], None, measured, None
        latents = self._run(run, tick)
        steps = len(self._trace.sigmas)
        done = self.passes[-1].step + 1 if self.passes else 0
        if done != steps:
            raise BadInput(f"`run` generated in {done} steps, and the trace has {steps}; generate as it was captured")
        return latents

    def repeat(self, run: Callable[[], object], step: int, error: Tensor, tick: Callable[[], None]) -> Tensor:
        """The recorded generation once more, `error` [...] added to the velocity of a step in all branches; returns its latents. The
        model runs only at later steps: before, its velocities are known."""
        self._wrong = (step, error)
        latents = self._run(run, tick)
        if self._at != len(self.passes):
            raise _unrepeatable(f"it made {self._at} passes, and {len(self.passes)} the first time")
        return latents

    def wrong_velocities(self, step: int, error: Tensor) -> list[Tensor]:
        """What `repeat` makes of a step's velocities."""
        return [(each.velocity.float() + error).to(each.velocity.dtype) for each in self.passes if each.step == step]

    def _run(self, run: Callable[[], object], tick: Callable[[], None]) -> Tensor:
        self._at = 0
        self._tick = tick
        self._progress.reset()
        with self._attached():
            result = run()
        latents = getattr(result, "frames", result)
        if not isinstance(latents, Tensor):
            raise Usage(
                f"`run` returned {type(result).__name__}; it must return the final latents as a tensor, such as "
                'pipe(..., output_type="latent").frames'
            )
        return latents.detach().to("cpu", torch.float32)

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        hooks: list[_Hook] = []
        try:
            for name, adapter in self.adapters.items():
                hook = _Hook(self, name, adapter)
                attach(adapter.module, hook, _HOOK)
                hooks.append(hook)
            yield
        finally:
            for hook in hooks:
                detach(hook.adapter.module, _HOOK)

    def forward(self, hook: _Hook, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward pass, in place of `forward`."""
        call = hook.adapter.bind(args, kwargs)
        if capturing(call.latents.device):
            raise Usage("sensitivities cannot be measured while a CUDA graph is captured")
        context = hook.context()
        level = context.sigma if context.sigma is not None else hook.timesteps.level(call.timestep)
        self._tick()
        if self._wrong is None:
            return self._recorded(hook, call, level, context.name, forward, args, kwargs)
        return self._repeated(call, level, forward, args, kwargs)

    def _recorded(
        self,
        hook: _Hook,
        call: Call,
        level: float,
        name: str | None,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        position = self._progress.advance(level)
        if position.starts and self.passes:
            raise BadInput("`run` generated twice; give one generation at a time, and a sequence of functions for more")
        self._check(call, level, position.step)
        branches = _branches(hook.adapter, call, name, position.turn)
        before = [branch for each in self.passes if each.step == position.step for branch in each.branches]
        if set(before) & set(branches):
            raise BadInput(
                f"step {position.step} has more than one pass of the branch {branches[0]}; sensitivities are of samplers that "
                "evaluate the model once per step"
            )
        scale = self._scale if self._scale is not None else _scale_of(self._target, hook.name, hook.adapter)
        if len(before) + len(branches) > 1 and scale is None:
            raise Usage(
                "the sampler guides with two passes, and by how much cannot be told; pass SensitivityConfig(guidance_scale=...), "
                "the s of u + s * (c - u)"
            )
        kept = _copied((args, kwargs)) if position.step in self._measured else None
        if self._first is None:
            self._first = _copied(call.latents)
        output = forward(*args, **kwargs)
        velocity = _velocity(output)
        device = call.latents.device.type
        cast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        self.passes.append(
            Pass(
                hook.name,
                position.step,
                level,
                branches,
                _with_velocity(output, None),
                _copied(velocity).cpu(),
                scale,
                cast,
                kept,
            )
        )
        return output

    def _repeated(
        self, call: Call, level: float, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert self._wrong is not None, "a generation is repeated"
        at, self._at = self._at, self._at + 1
        step, error = self._wrong
        if at >= len(self.passes) or abs(self.passes[at].level - level) > 1e-6:
            raise _unrepeatable(f"pass {at} is at another noise level than the first time")
        if at == 0 and (self._first is None or not torch.equal(self._first, call.latents)):
            raise _unrepeatable("it starts from other latents each time")
        known = self.passes[at]
        if known.step > step:
            return forward(*args, **kwargs)
        velocity = known.velocity
        if known.step == step:
            velocity = (velocity.float() + error).to(velocity.dtype)
        # A copy: samplers may write into it.
        return _with_velocity(known.output, velocity.to(call.latents.device, copy=True))

    def _check(self, call: Call, level: float, step: int) -> None:
        """That the pass is one of the trace's."""
        trace = self._trace
        want = (trace.frames, trace.height, trace.width)
        if call.grid != want or call.text_tokens != trace.text_tokens:
            raise BadInput(
                f"`run` generates on the grid {call.grid} with {call.text_tokens} text tokens, and the trace has {want} with "
                f"{trace.text_tokens}; generate as it was captured"
            )
        sigmas = trace.sigmas
        nearest = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - level))
        if nearest != step:
            raise BadInput(
                f"step {step} of `run` has noise level {level:.4g}, which is nearest to step {nearest} of the trace's "
                f"{len(sigmas)}; generate with the trace's schedule"
            )


class _Hook(ContextHook):
    """Hands the forward of one transformer to the follower."""

    # diffusers sets it, and says None.
    fn_ref: Any

    def __init__(self, follower: Follower, name: str, adapter: Adapter) -> None:
        super().__init__()
        self.name = name
        self.adapter = adapter
        self.timesteps = Timesteps(adapter)
        self._follower = follower

    # Under torch.compile of the whole transformer this stays Python. diffusers calls it in place of the forward.
    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._follower.forward(self, self.fn_ref.original_forward, args, kwargs)


def _branches(adapter: Adapter, call: Call, name: str | None, turn: int) -> tuple[str, ...]:
    """The branch of each sample of a pass, as captures tell them."""
    if adapter.batched_guidance:
        orders = {1: ("cond",), 2: ("uncond", "cond")}
    else:
        orders = {1: (name if name in ("cond", "uncond") else ("cond", "uncond")[min(turn, 1)],)}
    if call.batch not in orders:
        raise BadInput(f"a pass has {call.batch} samples; generate one prompt and one video at a time")
    return orders[call.batch]


def _scale_of(target: object, name: str, adapter: Adapter) -> float | None:
    """The guidance scale that a pipeline keeps. That of HunyuanVideo is a number the model is told, and guides nothing."""
    if isinstance(target, nn.Module) or isinstance(adapter, HunyuanVideo):
        return None
    own = getattr(target, "_guidance_scale_2", None) if name == "transformer_2" else None
    scale = own if own is not None else getattr(target, "guidance_scale", None)
    return None if scale is None else float(scale)


def _velocity(output: Any) -> Tensor:
    velocity: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return velocity


def _with_velocity(output: Any, velocity: Tensor | None) -> Any:
    """The model's output with another velocity in it."""
    return (velocity, *output[1:]) if isinstance(output, tuple) else type(output)(sample=velocity)


def _copied(tree: Any) -> Any:
    """Copies of all tensors, which samplers may overwrite, and which gradients can be taken through."""
    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


def _unrepeatable(why: str) -> Usage:
    return Usage(
        f"`run` is not the same generation each time: {why}; give it a generator with a fixed seed, made inside it"
    )


__all__ = ["Follower", "Pass", "by_branch", "guided"]

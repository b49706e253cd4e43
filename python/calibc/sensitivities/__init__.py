"""How much errors of attention cost: the weights that the policy `budget` spends density by.

    sens = calibc.sensitivity(
        pipe,
        "traces/",
        run=lambda: pipe(prompt, output_type="latent", generator=torch.Generator().manual_seed(0)).frames,
    )
    calibc.compile("traces/", out="plan.bundle", spec="budget.yaml")

The loss of a plan is predicted as the sum over all rows of blocks, at the steps t, layers l and heads h, of w(t) * u(t,l,h) * the row's
own loss: the relative squared error of the head's output on these rows, which `budget` tells from the D2 and the energies of the
blocks that are dropped (`errors.row_loss`). Here the other two are measured, on a few generations:

    w(t)      mean squared error of the final latents per mean squared error of step t's guided velocity: such an error is added to the
              velocity of the step, in all branches alike, and the sampler goes on
    u(t,l,h)  mean squared error of the guided velocity per unit of row loss, summed over the rows of the head

w is of errors as plans make them: the change of the velocity when all heads drop their blocks of least D2, at another size. White noise
is no such error: later steps take it for noise and remove it, and steps in the middle of a schedule seem to forgive what they do not.

u by `gradient`: E <z, J d>^2 = |J d|^2 for z of independent normal values (Hutchinson's estimator of the squared norm of the Jacobian
J), where d runs over the changes of a head's output, row block by row block, when its blocks of least D2 are dropped; one backward pass
gives J' z for all heads. u by `exact`: these blocks are dropped, head by head, and velocities are compared; 2 x layers x heads passes
per step and draw, for small models and for checks.

With guidance a plan's masks serve both branches, and its errors are alike in both: they are added as guidance adds the branches,
u + s (c - u), before they are squared. "Velocity" is whatever the model predicts; what samplers do beyond this sum, such as rescaling
guidance, is in w.

Memory of `gradient`: the weights, the input of every block ([tokens, width] each, in the model's type), and one block's activations
with their gradients; parameters get none. Wan 14B at 75,600 tokens: 28 + 31 GB, and some 25 GB by estimate. Time: per measured step
and branch about five forward passes and the statistics for each projection, and three for w; per prompt, a generation as it is and half of
one for each measured step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from calibc import _native
from calibc._native import TraceHead
from calibc.adapters import transformers_of
from calibc.adapters.schedule import attached
from calibc.apply import _HOOK as _SPARSE_HOOK
from calibc.capturing import _HOOK as _CAPTURE_HOOK
from calibc.errors import BadInput, Usage
from calibc.sensitivities.errors import Span, normal
from calibc.sensitivities.heads import HeadErrors
from calibc.sensitivities.runs import Follower, Pass, by_branch, guided
from calibc.statistics import Geometry

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class SensitivityConfig:
    """How to measure."""

    method: Literal["gradient", "exact"] = "gradient"
    """u by gradients of random projections, or by making one head wrong at a time: 2 x layers x heads passes."""
    errors: Literal["blocks", "noise"] = "blocks"
    """What errors look like: what dropping blocks gives, or white noise on the output of a head, and on the velocity."""
    dropped: float = 0.5
    """Share of a head's blocks, those of least D2, that are dropped for `blocks`: about as many as plans will drop."""
    steps: Sequence[int] | int = 6
    """Steps to measure by number, or how many, spread evenly with both ends; others lie on straight lines between, in the logarithm."""
    guidance_scale: float | None = None
    """The s of u + s (c - u). By default what the pipeline says; needed where a bare transformer runs with guidance."""
    projections: int = 2
    """Random projections of the velocity (gradient), or draws of errors (exact), to average."""
    row_blocks: int = 64
    """Query blocks of each head that stand for all, for `blocks`; `exact` takes all of them for u."""
    velocity_noise: float = 0.2
    """Size of the error of a step's velocity for w, relative to its root mean square and times the square root of the number of steps.
    The latents change by a few percent then; in bfloat16 less drowns in the rounding of all later steps."""
    head_error: float = 0.25
    """Error of a head for `exact` with `noise`, relative to its output."""
    seed: int = 0
    """Decides everything random."""
    progress: bool = True
    """Whether to draw a progress bar where stderr is a terminal."""

    def __post_init__(self) -> None:
        if self.method not in ("gradient", "exact"):
            raise Usage(f"`{self.method}` is no method; there are `gradient` and `exact`")
        if self.errors not in ("blocks", "noise"):
            raise Usage(f"`{self.errors}` are no errors; there are `blocks` and `noise`")
        if not 0 < self.dropped < 1:
            raise Usage(f"dropped is {self.dropped}; it must be between 0 and 1")
        for name in ("projections", "row_blocks", "velocity_noise", "head_error"):
            if not getattr(self, name) > 0:
                raise Usage(f"{name} is {getattr(self, name)}; it must be above 0")

    def chosen(self, steps: int) -> list[int]:
        """The steps to measure of a schedule of `steps` steps."""
        if isinstance(self.steps, int):
            if self.steps < 1:
                raise Usage("at least one step must be measured")
            count = min(self.steps, steps)
            return [0] if count == 1 else [round(i * (steps - 1) / (count - 1)) for i in range(count)]
        chosen = sorted(set(self.steps))
        if not chosen or chosen[0] < 0 or chosen[-1] >= steps:
            raise Usage(f"steps {list(self.steps)} are not all steps of a schedule of {steps}")
        return chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """What was measured, at all steps."""

    step: Tensor
    """w(t): float32 [steps]."""
    head: Tensor
    """u(t,l,h): float32 [steps, layers, heads]."""
    measured: tuple[int, ...]
    """The steps that were measured; the others are interpolated."""

    def write(self, traces: _Path) -> None:
        """Puts them into a trace, in place of older ones: `sensitivity.safetensors`, listed in the manifest with its digest.

        Raises:
            BadInput: There is no trace, or one of another number of steps, layers or heads.
        """
        head = TraceHead.read(traces)
        want, have = (len(head.sigmas), head.layers, head.heads), tuple(self.head.shape)
        if want != have:
            raise BadInput(
                f"the sensitivities are of {have[0]} steps x {have[1]} layers x {have[2]} heads, and the trace {os.fspath(traces)} "
                f"of {want[0]} x {want[1]} x {want[2]}; measure them with the model and the schedule of the trace"
            )
        _native.set_sensitivity(traces, self.step.tolist(), self.head.flatten().tolist())


def sensitivity(
    target: object,
    traces: _Path,
    run: Callable[[], object] | Sequence[Callable[[], object]],
    config: SensitivityConfig | None = None,
) -> Sensitivity:
    """Measures how much errors of attention cost, at each step and head, and writes it beside the traces.

    Args:
        target: A pipeline of diffusers, or a transformer with an adapter.
        traces: A finished trace of the same model, size and schedule. It gets `sensitivity.safetensors`, or a new one, at the end. One
            process measures and writes.
        run: Generates once, start to end, and returns the final latents: a tensor, or an output whose `frames` is one. Every call must
            give the same latents. A sampler of your own serves as well as a pipeline: it calls the transformer once per step and branch,
            the conditional one first (or named by `transformer.cache_context`). A sequence of such functions, one per prompt, is
            averaged.
        config: How.

    Raises:
        Usage: `run` is not repeatable or returns something else, the guidance scale is not known, the target runs on a plan or is
            being captured.
        BadInput: The traces are of another model, size or schedule; or the attention is one that plans cannot have.
        CalibcError: As its subclasses say. Whatever happens, Ctrl-C included, the model is as it was, and so is the trace.
    """
    config = config or SensitivityConfig()
    runs = [run] if callable(run) else list(run)
    if not runs:
        raise Usage("there is nothing to run; pass a function that generates, or several")
    modules = transformers_of(target)
    for name, module in modules.items():
        for hook, doing in ((_SPARSE_HOOK, "runs on a plan"), (_CAPTURE_HOOK, "is being captured")):
            if attached(module, hook) is not None:
                raise Usage(f"{name} {doing}; sensitivities need the model as it is, so end that first")
    trace = TraceHead.read(traces)
    follower = Follower(target, modules, trace, config.guidance_scale)
    geometry = _checked(follower, trace)
    steps = config.chosen(len(trace.sigmas))
    by_step = torch.zeros(len(steps), dtype=torch.float64, device="cpu")
    by_head = torch.zeros(len(steps), trace.layers, trace.heads, dtype=torch.float64, device="cpu")
    for number, each in enumerate(runs):
        with _Bar(f"prompt {number + 1}/{len(runs)}", config.progress) as bar:
            bar.say("generating")
            latents = follower.record(each, frozenset(steps), bar.tick)
            for i, step in enumerate(steps):
                bar.say(f"step {step}: heads")
                passes = [p for p in follower.passes if p.step == step]
                of_heads, direction = _of_heads(follower, passes, geometry, trace.branch, config, number, bar.tick)
                by_head[i] += of_heads
                for p in passes:
                    # Embeddings and latents of many steps need not stay.
                    p.arguments = None
                bar.say(f"step {step}: going on with another velocity")
                by_step[i] += _of_step(
                    follower, each, latents, passes, direction, len(trace.sigmas), config, number, bar.tick
                )
    result = Sensitivity(
        _interpolated(by_step / len(runs), steps, len(trace.sigmas)),
        _interpolated(by_head / len(runs), steps, len(trace.sigmas)),
        tuple(steps),
    )
    result.write(traces)
    return result


def _checked(follower: Follower, trace: TraceHead) -> Geometry:
    """The tokens of a trace that the transformers fit."""
    if not trace.raster:
        raise BadInput("the trace has tokens in tiles, and models have them in raster order; capture the model itself")
    for name, adapter in follower.adapters.items():
        wanted = {
            "layers": (trace.layers, len(adapter.layers())),
            "heads": (trace.heads, adapter.heads),
            "head_dim": (trace.head_dim, adapter.head_dim),
            "text_position": (trace.text_position, adapter.text_position if trace.text_tokens else "none"),
        }
        wrong = [f"{field} {theirs} against {ours}" for field, (theirs, ours) in wanted.items() if theirs != ours]
        if wrong:
            raise BadInput(
                f"the trace is of another model than {name}, a {adapter.model_class}; trace against model: {', '.join(wrong)}"
            )
    geometry = Geometry(trace.frames, trace.height, trace.width, trace.text_tokens, trace.text_position)
    if Span.of(geometry).count < 1:
        raise BadInput(f"{geometry}: every block holds text, so no plan can drop one")
    return geometry


def _of_heads(
    follower: Follower,
    passes: list[Pass],
    geometry: Geometry,
    branch: str,
    config: SensitivityConfig,
    number: int,
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """u of one step, float64 [layers, heads], and an error of the velocity [...] such as plans make."""
    adapter = follower.adapters[passes[0].component]
    seed = f"{config.seed}/{number}"
    # Gradients need tensors that inference_mode does not make.
    measured = HeadErrors(adapter, geometry, branch, config.errors, config.dropped, config.row_blocks, seed)
    with torch.inference_mode(False), torch.no_grad(), measured as heads:
        if config.method == "gradient":
            found = heads.gradient(passes, config.projections, tick)
        else:
            found = heads.exact(passes, config.projections, config.head_error, tick)
        return found, heads.velocity_error(passes)


def _of_step(
    follower: Follower,
    run: Callable[[], object],
    latents: Tensor,
    passes: list[Pass],
    direction: Tensor,
    steps: int,
    config: SensitivityConfig,
    number: int,
    tick: Callable[[], None],
) -> float:
    """w of one step of so many, of errors along `direction`."""
    step = passes[0].step
    right = by_branch(passes, [each.velocity for each in passes])
    size = float(next(iter(right.values())).square().mean().sqrt()) * config.velocity_noise * steps**0.5
    error = direction * (size / float(direction.square().mean().sqrt()))
    wrong = by_branch(passes, follower.wrong_velocities(step, error))
    # As it is after rounding, which guidance blows up.
    apart = {branch: velocity - right[branch] for branch, velocity in wrong.items()}
    given = float(guided(apart, passes[-1].scale).double().square().mean())
    found = follower.repeat(run, step, error, tick)
    if found.shape != latents.shape:
        raise Usage(f"`run` returned latents {list(found.shape)} after {list(latents.shape)}")
    weight = float((found.double() - latents.double()).square().mean()) / given if given > 0 else float("nan")
    if not weight < float("inf"):
        raise BadInput(
            f"velocities at step {step} are 0 or not finite, so the trace's model was not run as it was captured"
        )
    return weight


def _interpolated(values: Tensor, steps: Sequence[int], count: int) -> Tensor:
    """[len(steps), ...] at some steps as [count, ...] at all, float32: straight lines in the logarithm, level beyond the ends."""
    logs = values.clamp_min(torch.finfo(torch.float32).tiny).log()
    result = torch.empty((count, *values.shape[1:]), dtype=torch.float64, device="cpu")
    for step in range(count):
        after = next((i for i, at in enumerate(steps) if at >= step), len(steps) - 1)
        before = after if steps[after] <= step else max(after - 1, 0)
        span = steps[after] - steps[before]
        share = (step - steps[before]) / span if span else 0.0
        result[step] = torch.lerp(logs[before], logs[after], share).exp()
    # Exactly what was measured, zeros included.
    result[list(steps)] = values
    return result.float()


class _Bar(contextlib.AbstractContextManager["_Bar"]):
    """Says on a terminal what is going on."""

    def __init__(self, what: str, wanted: bool) -> None:
        self._what = what
        self._wanted = wanted and sys.stderr.isatty()
        self._doing = ""
        self._count = 0

    def say(self, doing: str) -> None:
        """Something new begins."""
        self._doing, self._count = doing, 0
        self._draw(f"calibc: sensitivity, {self._what}, {doing}")

    def tick(self) -> None:
        """A part of it is done."""
        self._count += 1
        self._draw(f"calibc: sensitivity, {self._what}, {self._doing} ({self._count})")

    def __exit__(self, *_: object) -> None:
        self._draw("")

    def _draw(self, text: str) -> None:
        if self._wanted:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


__all__ = ["Sensitivity", "SensitivityConfig", "sensitivity"]

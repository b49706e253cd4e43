"""What errors of single heads do to the velocity of one step, which a recorded generation has."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from calibc import _native
from calibc.adapters import Adapter, Route
from calibc.adapters.schedule import TextLengths, place, put_back
from calibc.errors import BadInput
from calibc.sensitivities import errors
from calibc.sensitivities.errors import Span
from calibc.sensitivities.runs import Pass, by_branch, guided
from calibc.statistics import Geometry, Problem, _strata

Errors = Literal["blocks", "noise"]


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The attention of one sample in one layer."""

    layer: int
    row: int
    """The sample."""
    scale: float
    """Factor on the scores."""
    q: Tensor
    """[H, S, D]."""
    k: Tensor
    v: Tensor
    out: Tensor


# Called with an attention and the gradient [H, S, D] by its output.
_Sink = Callable[[_Attention, Tensor], None]
# Called with an attention: the output [H, S, D] to go on with.
_Edit = Callable[[_Attention], Tensor]


class _Tap(torch.autograd.Function):
    """Lets an attention's output through, and shows its gradient on the way back."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, root: Tensor, q: Tensor, k: Tensor, v: Tensor, show: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(out, q, k, v)
        ctx.show = show
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out, q, k, v = ctx.saved_tensors
        ctx.show(q, k, v, out, gradient)
        return gradient, None, None, None, None, None


class _Layer(Route):
    """One attention layer that is measured. The attention is torch's own, which has a gradient wherever it runs."""

    def __init__(self, owner: HeadErrors, index: int) -> None:
        self._owner = owner
        self._index = index

    @property
    def engaged(self) -> bool:
        return True

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
        if mask is not None and owner.lengths is None:
            blocked = "a mask over attention"
        if blocked is not None:
            raise BadInput(f"sensitivities cannot describe this attention: {blocked}")
        problem = Problem(query, key, value, owner.lengths, owner.adapter.drops_padding, scale)
        samples = [owner.sample(self._index, row, problem) for row in range(query.shape[0])]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class HeadErrors:
    """A transformer whose heads' errors are measured, while this context lasts.

    Parameters take no gradients in here and blocks are checkpointed: a backward pass holds the input of every block, and what one
    block needs. Afterwards everything is as it was.
    """

    def __init__(
        self, adapter: Adapter, geometry: Geometry, branch: str, kind: Errors, row_blocks: int, seed: str
    ) -> None:
        self.adapter = adapter
        self.lengths: list[int] | None = None
        self._span = Span.of(geometry)
        # Whose deviations the traces hold.
        self._branch = branch
        self._kind = kind
        self._row_blocks = row_blocks
        self._seed = seed
        self._texts = TextLengths()
        self._root: Tensor | None = None
        self._sink: _Sink | None = None
        self._edit: _Edit | None = None
        self._attentions: list[Any] = adapter.layers()
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> HeadErrors:
        originals = [attn.processor for attn in self._attentions]
        processors = [self.adapter.processor(original, _Layer(self, i)) for i, original in enumerate(originals)]
        with contextlib.ExitStack() as exits:
            # Blocks that were compiled run as Python: graphs know nothing of checkpoints and of who looks at a gradient.
            exits.enter_context(torch.compiler.set_stance("force_eager"))
            exits.enter_context(_frozen(self.adapter.module))
            exits.callback(put_back, self._attentions, processors, originals)
            place(self._attentions, processors)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    # What callers measure.

    def gradient(self, passes: list[Pass], projections: int, tick: Callable[[], None]) -> Tensor:
        """Mean squared error of a step's guided velocity per unit of relative squared error of each head: float64 [layers, heads].

        Hutchinson's estimator: for z of independent normal values, E <z, J d>^2 = |J d|^2, and <z, J d> = <J' z, d> for all heads
        and directions d comes of one backward pass. Branches share a plan's masks, so their errors add up before they are squared.
        """
        above, below = self._zeros(), self._zeros()
        for draw in range(projections):
            responses: dict[str, Tensor] = {}
            units: dict[str, Tensor] = {}
            for each in passes:
                self._answer(each, draw, responses, units)
                tick()
            above += guided(responses, passes[-1].scale).square().sum((2, 3))
            below += units.get(self._branch, next(iter(units.values())))
        return _ratio(above / passes[0].velocity[0].numel(), below)

    def exact(self, passes: list[Pass], draws: int, size: float, tick: Callable[[], None]) -> Tensor:
        """As `gradient`, measured: the velocity with one head after the other made wrong.

        In bfloat16 a head of many changes less than rounding does. So an error is tried twice, d and -d, on latents that differ by a
        little noise: <v1(d) - v1(0), v2(0) - v2(-d)> = |J d|^2, and rounding, which is another one in each, falls out.
        """
        right = [[self._guided(passes, None, draw, 0.0, side)[0] for side in range(2)] for draw in range(draws)]
        above, below = self._zeros(), self._zeros()
        for layer, head in itertools.product(range(len(self._attentions)), range(self.adapter.heads)):
            for draw in range(draws):
                plus, minus = (
                    self._guided(passes, (layer, head), draw, sign * size, side) for side, sign in enumerate((1, -1))
                )
                product = (plus[0] - right[draw][0]) * (right[draw][1] - minus[0])
                above[layer, head] += float(product.mean(dtype=torch.float64))
                below[layer, head] += (plus[1] + minus[1]) / 2
            tick()
        # What is left of rounding may be negative.
        return _ratio(above.clamp_min(0), below)

    # What the layers call.

    def sample(self, layer: int, row: int, problem: Problem) -> Tensor:
        """The attention of one sample, [1, H, S, D]."""
        q, k, v = problem.sample(row)
        scale, sink = problem.softmax_scale, self._sink
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        if sink is not None:

            def show(q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor) -> None:
                with torch.no_grad():
                    sink(_Attention(layer, row, scale, q[0], k[0], v[0], out[0]), gradient[0])

            out = _Tap.apply(out, self._root, q, k, v, show)
        elif self._edit is not None:
            out = self._edit(_Attention(layer, row, scale, q[0], k[0], v[0], out[0]))[None]
        missing = problem.query.shape[2] - out.shape[2]
        # Padding that gives no queries has outputs of 0.
        return F.pad(out, (0, 0, 0, missing)) if missing else out

    # How.

    def _answer(self, each: Pass, draw: int, responses: dict[str, Tensor], units: dict[str, Tensor]) -> None:
        """Answers [layers, H, rows, directions] of a pass to one random z, and their units [layers, H]; both by branch."""
        seed = self._draw("z", each.step, 0, draw)
        z = errors.normal(each.velocity.shape[1:], seed)
        found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

        def sink(attention: _Attention, gradient: Tensor) -> None:
            found[each.branches[attention.row], attention.layer] = self._responses(attention, gradient, each.step, draw)

        self._backward(each, z, sink)
        layers = range(len(self._attentions))
        missing = sum((branch, layer) not in found for branch in each.branches for layer in layers)
        if missing:
            raise BadInput(
                f"{missing} of {len(layers) * len(each.branches)} attention layers got no gradient at step {each.step}; measure "
                "without caches that skip layers"
            )
        for branch in each.branches:
            whole = zip(*(found[branch, layer] for layer in layers), strict=True)
            responses[branch], units[branch] = (torch.stack(parts).double().cpu() for parts in whole)

    def _guided(
        self, passes: list[Pass], site: tuple[int, int] | None, draw: int, size: float, side: int
    ) -> tuple[Tensor, float]:
        """A step's guided velocity with one head wrong, and how wrong it is.

        Args:
            passes: Those of the step.
            site: Layer and head; `None` for no error.
            draw: Which of the errors.
            size: Of the error.
            side: Which of two latents, which differ by a little noise.
        """
        units: dict[str, float] = {}

        def velocity(each: Pass) -> Tensor:
            def edit(attention: _Attention) -> Tensor:
                if site is None or attention.layer != site[0]:
                    return attention.out
                out, units[each.branches[attention.row]] = self._wrong(attention, site[1], size, each.step, draw)
                return out

            self._begin(each)
            self._edit = edit
            try:
                return each.call(self.adapter, dither=self._draw(f"dither{side}", each.step, 0, draw)).float()
            finally:
                self._edit = None

        velocities = by_branch(passes, [velocity(each) for each in passes])
        unit = units.get(self._branch, next(iter(units.values()))) if units else 0.0
        return guided(velocities, passes[-1].scale), unit

    def _begin(self, each: Pass) -> None:
        assert each.arguments is not None, "the step is measured"
        call = self.adapter.bind(*each.arguments)
        self.lengths = None
        if call.text_mask is not None:
            real = self._texts.read(call.text_mask)
            if real is None:
                raise BadInput("text padding stands before text, which no adapter expects")
            self.lengths = [call.video_tokens + n for n in real]

    def _backward(self, each: Pass, z: Tensor, sink: _Sink) -> None:
        self._begin(each)
        self._sink = sink
        try:
            with torch.enable_grad():
                self._root = torch.zeros((), requires_grad=True)
                velocity = each.call(self.adapter)
                torch.autograd.backward((velocity.float() * z.to(velocity.device)).sum())
        finally:
            self._sink = self._root = None

    def _responses(self, attention: _Attention, gradient: Tensor, step: int, draw: int) -> tuple[Tensor, Tensor]:
        """Answers [H, rows, directions] of one layer, and the units [H] that they are to."""
        a = attention
        if self._kind == "noise":
            return errors.noise_responses(a.out, gradient, self._draw("noise", step, a.layer, draw), self._span)
        generator = torch.Generator("cpu").manual_seed(self._draw("rows", step, a.layer, draw))
        with torch.device("cpu"):
            rows = self._span.first + _strata(self._span.count, self._row_blocks, generator)
        return errors.block_responses(a.q, a.k, a.v, gradient, a.scale, rows.to(a.q.device), self._span)

    def _wrong(self, attention: _Attention, head: int, size: float, step: int, draw: int) -> tuple[Tensor, float]:
        """The output [H, S, D] with one head wrong, and by how much."""
        a, seed = attention, self._draw(f"h{head}", step, attention.layer, draw)
        if self._kind == "noise":
            error = errors.noise_error(a.out[head], size, seed, self._span)
        else:
            error = errors.block_error(a.q[head], a.k[head], a.v[head], a.scale, size, seed, self._span)
        wrong = a.out.clone()
        wrong[head] = (a.out[head].float() + error).to(a.out.dtype)
        # As it is after rounding.
        return wrong, errors.relative_error(a.out[head], wrong[head], self._span)

    def _zeros(self) -> Tensor:
        """float64 [layers, heads] in CPU memory."""
        return torch.zeros(len(self._attentions), self.adapter.heads, dtype=torch.float64, device="cpu")

    def _draw(self, what: str, step: int, layer: int, draw: int) -> int:
        """A seed. Branches have the same: they share the masks, and so the errors."""
        return _native.capture_seed(f"{self._seed}/{what}/{draw}", step, "", layer) & (2**62 - 1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where a head can make no error, as one that sees a single block."""
    ratio = torch.where(below > 0, above / below.clamp_min(1e-300), 0.0)
    if not ratio.isfinite().all():
        raise BadInput("gradients or velocities are not finite; run the model in bfloat16 or float32")
    return ratio


@contextlib.contextmanager
def _frozen(module: Any) -> Iterator[None]:
    """No gradients for parameters, checkpoints for blocks."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (inner, {name: inner.__dict__[name] for name in names if name in inner.__dict__})
        for inner in module.modules()
        if hasattr(inner, names[0])
    ]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        module.enable_gradient_checkpointing()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for inner, had in before:
            for name in names:
                inner.__dict__.pop(name, None)
            inner.__dict__.update(had)


__all__ = ["Errors", "HeadErrors"]

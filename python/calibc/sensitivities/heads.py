"""What errors of single heads do to the velocity of one step, which a recorded generation has."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from calibc import _native
from calibc.adapters import Adapter, Route
from calibc.adapters.schedule import TextLengths, place, put_back
from calibc.errors import BadInput
from calibc.sensitivities import errors
from calibc.sensitivities.errors import Dropped, Span
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


def _right(attention: _Attention) -> Tensor:
    return attention.out


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
        self,
        adapter: Adapter,
        geometry: Geometry,
        branch: str,
        kind: Errors,
        dropped: float,
        row_blocks: int,
        seed: str,
    ) -> None:
        self.adapter = adapter
        self.lengths: list[int] | None = None
        self._span = Span.of(geometry)
        # Whose deviations the traces hold.
        self._branch = branch
        self._kind = kind
        self._share = dropped
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
            dropped = self._dropped(passes, draw, self._row_blocks)
            responses: dict[str, Tensor] = {}
            for each in passes:
                responses |= self._answer(each, draw, dropped)
                tick()
            answer = guided(responses, passes[-1].scale)
            above += answer.square().sum((2, 3))
            if self._kind == "noise":
                # One unit each.
                below += answer.shape[2] * answer.shape[3]
            else:
                below += torch.stack([layer.loss for layer in dropped]).double().cpu()
        return _ratio(above / passes[0].velocity[0].numel(), below)

    def exact(self, passes: list[Pass], draws: int, size: float, tick: Callable[[], None]) -> Tensor:
        """As `gradient`, measured: the velocity with one head after the other made wrong.

        In bfloat16 a head of many changes less than rounding does. So an error is tried twice, d and -d, on latents that differ by a
        little noise: <v1(d) - v1(0), v2(0) - v2(-d)> = |J d|^2, and rounding, which is another one in each, falls out.
        """
        right = [[self._guided(passes, draw, side, _right) for side in range(2)] for draw in range(draws)]
        dropped = self._dropped(passes, 0, self._span.count)
        above, below = self._zeros(), self._zeros()
        for layer, head in itertools.product(range(len(self._attentions)), range(self.adapter.heads)):
            for draw in range(draws):
                plus, minus = (
                    self._guided(passes, draw, side, self._wrong(layer, head, draw, sign, size, dropped))
                    for side, sign in enumerate((1, -1))
                )
                product = (plus - right[draw][0]) * (right[draw][1] - minus)
                above[layer, head] += float(product.mean(dtype=torch.float64))
                below[layer, head] += float(dropped[layer].loss[head]) if dropped else size**2 * self._span.count
            tick()
        # What is left of rounding may be negative.
        return _ratio(above.clamp_min(0), below)

    def velocity_error(self, passes: list[Pass]) -> Tensor:
        """How the guided velocity [...] changes when all heads are wrong at once, float32 in CPU memory; white noise where it does not,
        or where that is the kind of errors."""
        dropped = self._dropped(passes, 0, self._row_blocks)
        if dropped:

            def edit(attention: _Attention) -> Tensor:
                a, wrong = attention, []
                for head in range(a.out.shape[0]):
                    error = errors.block_error(
                        a.q[head], a.k[head], a.v[head], a.scale, dropped[a.layer], head, self._span
                    )
                    wrong.append((a.out[head].float() + error).to(a.out.dtype))
                return torch.stack(wrong)

            found = self._guided(passes, 0, None, edit) - self._guided(passes, 0, None, _right)
            if found.square().sum() > 0:
                return found.cpu()
        return errors.normal(passes[0].velocity.shape[1:], self._draw("velocity", passes[0].step, 0, 0))

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
            # Errors are float32, whatever the model runs in.
            with torch.autocast(out.device.type, enabled=False):
                out = self._edit(_Attention(layer, row, scale, q[0], k[0], v[0], out[0]))[None]
        missing = problem.query.shape[2] - out.shape[2]
        # Padding that gives no queries has outputs of 0.
        return F.pad(out, (0, 0, 0, missing)) if missing else out

    # How.

    def _dropped(self, passes: list[Pass], draw: int, row_blocks: int) -> list[Dropped]:
        """What each layer leaves out, which is the same in all branches; none for white noise."""
        found: dict[int, Dropped] = {}
        if self._kind == "noise":
            return []
        each = next((each for each in passes if self._branch in each.branches), passes[0])
        row = each.branches.index(self._branch) if self._branch in each.branches else 0

        def edit(attention: _Attention) -> Tensor:
            a = attention
            if a.row == row:
                generator = torch.Generator("cpu").manual_seed(self._draw("rows", each.step, a.layer, draw))
                with torch.device("cpu"):
                    rows = self._span.first + _strata(self._span.count, row_blocks, generator)
                found[a.layer] = errors.least(a.q, a.k, a.v, a.scale, rows.to(a.q.device), self._span, self._share)
            return a.out

        self._forward(each, edit, None)
        self._check_all(each, found.keys(), len(self._attentions))
        return [found[layer] for layer in range(len(self._attentions))]

    def _answer(self, each: Pass, draw: int, dropped: list[Dropped]) -> dict[str, Tensor]:
        """Answers [layers, H, rows, directions] of a pass to one random z, by branch."""
        z = errors.normal(each.velocity.shape[1:], self._draw("z", each.step, 0, draw))
        found: dict[tuple[str, int], Tensor] = {}

        def sink(attention: _Attention, gradient: Tensor) -> None:
            a = attention
            if self._kind == "noise":
                seed = self._draw("noise", each.step, a.layer, draw)
                response = errors.noise_responses(a.out, gradient, seed, self._span)
            else:
                response = errors.block_responses(a.q, a.k, a.v, gradient, a.scale, dropped[a.layer], self._span)
            found[each.branches[a.row], a.layer] = response

        self._backward(each, z, sink)
        layers = range(len(self._attentions))
        self._check_all(each, found.keys(), len(layers) * len(each.branches))
        return {b: torch.stack([found[b, layer] for layer in layers]).double().cpu() for b in each.branches}

    def _check_all(self, each: Pass, found: Collection[object], wanted: int) -> None:
        if len(found) != wanted:
            raise BadInput(
                f"{wanted - len(found)} of {wanted} attention layers did not take part at step {each.step}; measure without caches "
                "that skip layers"
            )

    def _wrong(self, layer: int, head: int, draw: int, sign: int, size: float, dropped: list[Dropped]) -> _Edit:
        """Makes one head wrong; `size` is that of white noise."""

        def edit(attention: _Attention) -> Tensor:
            a = attention
            if a.layer != layer:
                return a.out
            if dropped:
                error = errors.block_error(a.q[head], a.k[head], a.v[head], a.scale, dropped[layer], head, self._span)
            else:
                error = errors.noise_error(a.out[head], size, self._draw(f"h{head}", 0, layer, draw), self._span)
            wrong = a.out.clone()
            wrong[head] = (a.out[head].float() + sign * error).to(a.out.dtype)
            return wrong

        return edit

    def _guided(self, passes: list[Pass], draw: int, side: int | None, edit: _Edit) -> Tensor:
        """A step's guided velocity. The latents of all draws and of both sides differ by a little noise; without a side there is none."""
        seed = None if side is None else self._draw(f"dither{side}", passes[0].step, 0, draw)
        return guided(by_branch(passes, [self._forward(each, edit, seed) for each in passes]), passes[-1].scale)

    def _forward(self, each: Pass, edit: _Edit, dither: int | None) -> Tensor:
        self._begin(each)
        self._edit = edit
        try:
            return each.call(self.adapter, dither).float()
        finally:
            self._edit = None

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

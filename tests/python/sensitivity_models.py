"""Models whose sensitivities are known, and what they are by definition: for the tests of `calibc.sensitivity`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import unittest
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

try:
    import torch
    from diffusers import WanTransformer3DModel
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing

import torch.nn.functional as F
from calibc import CaptureConfig, SensitivityConfig, capture
from diffusers_models import BLOCK, Tiny, folder, wan
from torch import Tensor

SIGMAS = [1.0, 0.75, 0.4]
SCALE = 3.0
QUICK = SensitivityConfig(steps=[1], guidance_scale=SCALE, progress=False)


def quiet() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stderr(io.StringIO())


def sampler(model: Tiny, sigmas: Sequence[float] = SIGMAS, guided: bool = True, seed: int = 0) -> Callable[..., Tensor]:
    """An Euler sampler with guidance: in one batch where the inputs are one, else in two passes."""

    @torch.no_grad()
    def run(fails_at: int | None = None) -> Tensor:
        first = model.inputs(1.0, seed)["hidden_states"]
        batched = first.shape[0] == 2
        x = first[:1].float().clone()
        for step, (level, then) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
            if step == fails_at:
                raise ZeroDivisionError
            conditional = model.inputs(level, seed)
            passes = [conditional]
            if guided and not batched:
                passes.append(
                    {**conditional, "encoder_hidden_states": torch.zeros_like(conditional["encoder_hidden_states"])}
                )
            stack = x.to(first.dtype).expand(first.shape).clone()
            out = [model.module(**{**each, "hidden_states": stack}, return_dict=False)[0] for each in passes]
            if batched:
                velocity = out[0][:1] + SCALE * (out[0][1:] - out[0][:1])
            elif guided:
                velocity = out[1] + SCALE * (out[0] - out[1])
            else:
                velocity = out[0]
            # In place, as some samplers do.
            x += (then - level) * velocity
        return x

    return run


def traced(model: Tiny, path: pathlib.Path, sigmas: Sequence[float] = SIGMAS) -> pathlib.Path:
    """A trace of the model's first generation."""
    config = CaptureConfig(sigmas=sigmas, anchors=(), rows_per_block=16, progress=False)
    with quiet(), capture(model.module, path, config) as cap, cap.prompt("a"):
        sampler(model, sigmas)()
    return path


def manifest(path: pathlib.Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


@contextlib.contextmanager
def setup(make: Callable[[], Tiny] = wan, sigmas: Sequence[float] = SIGMAS) -> Iterator[tuple[Tiny, pathlib.Path]]:
    with folder() as path:
        model = make()
        yield model, traced(model, path / "t", sigmas)


class Linear(WanTransformer3DModel):
    """Wan's attention layers side by side, without what is not linear around them: the velocity is `gain` x + `strength` * (sum of the
    layers' outputs, projected). The text says the gain."""

    strength = 1.0

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rotary = self.rope(hidden_states)
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        out = self.proj_out(sum(block.attn1(tokens, None, None, rotary) for block in self.blocks))
        batch, channels, frames, height, width = hidden_states.shape
        video = out.view(batch, frames, height // 2, width // 2, 1, 2, 2, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        gain = encoder_hidden_states.mean()
        return (gain * hidden_states + self.strength * video.reshape(hidden_states.shape),)


GAIN = 0.3


def linear(strength: float = 1.0) -> Tiny:
    model = wan()
    module = Linear(**{k: v for k, v in model.module.config.items() if not k.startswith("_")})
    module.load_state_dict(model.module.state_dict())
    module.strength = strength

    def inputs(level: float, seed: int) -> dict[str, Any]:
        return {**model.inputs(level, seed), "encoder_hidden_states": torch.full((1, 16, 32), GAIN)}

    return dataclasses.replace(model, module=module.eval(), inputs=inputs)


@dataclasses.dataclass
class Head:
    """One attention head of the linear model at some latents."""

    p: Tensor
    v: Tensor
    m: Tensor
    """[values of a token's velocity, D]: what the output does to the velocity of its token."""

    @property
    def out(self) -> Tensor:
        return self.p @ self.v


def heads_of(model: Tiny, latents: Tensor) -> list[list[Head]]:
    module: Any = model.module
    found = []
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        calls.append((query[0].double(), key[0].double(), value[0].double()))
        return real(query, key, value, **kwargs)

    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", attention):
        module(latents, torch.tensor([500.0]), torch.zeros(1, 16, 32))
    for block, (q, k, v) in zip(module.blocks, calls, strict=True):
        d = model.head_dim
        p = (q @ k.mT / d**0.5).softmax(-1)
        through = module.proj_out.weight.double() @ block.attn1.to_out[0].weight.double()
        found.append([Head(p[h], v[h], through[:, h * d : (h + 1) * d].detach()) for h in range(model.heads)])
    return found


def slices(tokens: int) -> list[slice]:
    return [slice(at, min(at + BLOCK, tokens)) for at in range(0, tokens, BLOCK)]


def definitions(p: Tensor, v: Tensor, rows: list[slice], columns: list[slice]) -> tuple[Tensor, Tensor]:
    """D2 and energy [rows, columns] of one head by their definitions."""
    deviation, energy = (torch.empty(len(rows), len(columns), dtype=torch.float64) for _ in range(2))
    for (r, at), (c, among) in itertools.product(enumerate(rows), enumerate(columns)):
        part, mass, out = p[at, among] @ v[among], p[at, among].sum(-1, keepdim=True), p[at] @ v
        deviation[r, c] = (part - mass * out).square().sum() / out.square().sum()
        energy[r, c] = mass.sum()
    return deviation, energy


def least(deviation: Tensor, energy: Tensor, share: float) -> Tensor:
    """What is dropped of one head: bool [rows, columns]."""
    rows, columns = deviation.shape
    strongest = {(r, int(energy[r].argmax())) for r in range(rows)}
    others = [at for at in itertools.product(range(rows), range(columns)) if at not in strongest]
    drop = torch.zeros(rows, columns, dtype=torch.bool)
    for at in sorted(others, key=lambda at: float(deviation[at]))[: int(share * rows * columns)]:
        drop[at] = True
    return drop


def row_losses(deviation: Tensor, energy: Tensor, drop: Tensor) -> float:
    """What `budget` predicts for rows [rows, columns] without some blocks: the sum of their squared relative errors."""
    total = 0.0
    for row in range(len(deviation)):
        out = drop[row]
        dropped, kept = float(deviation[row, out].sum()), float(deviation[row, ~out].sum())
        mass = float(energy[row, ~out].sum() / energy[row].sum())
        total += dropped * kept / (dropped + kept) / mass**2
    return total


def without(p: Tensor, drop: Tensor, rows: list[slice], columns: list[slice]) -> Tensor:
    """Probabilities of one head without blocks."""
    kept = p.clone()
    for r, c in drop.nonzero().tolist():
        kept[rows[r], columns[c]] = 0
    return kept / kept.sum(-1, keepdim=True)


def closed_form(model: Tiny, head: Head, kind: str, values: int) -> float:
    """u of one head of the linear model, whose errors stay with their tokens."""
    blocks, out = slices(model.tokens), head.out
    if kind == "noise":
        norms = torch.stack([out[rows].square().sum() for rows in blocks])
        return float(norms.mean() / model.head_dim * head.m.square().sum()) / values
    deviation, energy = definitions(head.p, head.v, blocks, blocks)
    drop = least(deviation, energy, SensitivityConfig().dropped)
    change = without(head.p, drop, blocks, blocks) @ head.v - out
    return float((change @ head.m.T).square().sum()) / row_losses(deviation, energy, drop) / values

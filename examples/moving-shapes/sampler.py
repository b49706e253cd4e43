"""Euler sampling with guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import data
import model as models

STEPS = 20
SHIFT = 4.0
GUIDANCE = 3.0


def sigmas(steps: int = STEPS, shift: float = SHIFT) -> list[float]:
    """Noise levels of the steps, falling from 1, then 0."""
    plain = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in plain]


def noise(seeds: list[int], frames: int = models.FRAMES, size: int = models.SIZE) -> Tensor:
    """Where generations start, [B, 3, frames, size, size]: each video's from its own seed, on any device and in any batch."""
    shape = (3, frames, size, size)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    transformer: Any,
    ids: Tensor,
    start: Tensor,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    shift: float = SHIFT,
    batched: bool = False,
    stop: int | None = None,
) -> Tensor:
    """Videos, [B, 3, frames, size, size] in float32, about -1..1.

    Args:
        transformer: The model, on some device, in some type.
        ids: Prompts, [B, data.TOKENS].
        start: Noise, [B, 3, frames, size, size].
        steps: Euler steps from noise to video.
        guidance: Weight of the prompt; 1 leaves the pass without prompt out.
        shift: Of the noise levels towards noise.
        batched: Whether both passes of guidance are one forward of twice the samples, or two forwards, with prompt first.
        stop: Steps to take, where not all; the result is then what is left of the noise and the video so far.
    """
    device, dtype = next(transformer.parameters()).device, transformer.dtype
    levels = sigmas(steps, shift)
    # The timesteps of all steps in one tensor, as schedulers keep them: each is a view, which nothing has to wait for.
    timesteps = torch.tensor(levels[:-1], device=device) * 1000.0
    video = start.to(device, torch.float32)
    cond, batch = data.embed(ids.to(device)).to(dtype), len(ids)
    uncond = data.embed(data.empty_prompt(batch, device)).to(dtype)
    for i in range(steps if stop is None else stop):
        given = video.to(dtype)

        def ask(given: Tensor, words: Tensor, timestep: Tensor = timesteps[i]) -> Tensor:
            return transformer(given, timestep.expand(len(given)), words, return_dict=False)[0].float()

        if guidance == 1.0:
            change = ask(given, cond)
        elif batched:
            with_prompt, without = ask(given.repeat(2, 1, 1, 1, 1), torch.cat([cond, uncond])).chunk(2)
            change = without + guidance * (with_prompt - without)
        else:
            with_prompt = ask(given, cond)
            without = ask(given, uncond)
            change = without + guidance * (with_prompt - without)
        video = video + (levels[i + 1] - levels[i]) * change
    return video

"""How far a video is from the dense one, and whether a difference between two policies is more than noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(videos: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video in dB: [B, 3, frames, height, width] in 0..1, to [B].

    The error is the mean over all frames; identical videos have infinity.
    """
    error = (videos.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def ssim(videos: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each video, [B, 3, frames, height, width] in 0..1, to [B].

    As published (Wang et al. 2004): a Gaussian window of 11 x 11 with sigma 1.5, constants 0.01 and 0.03, population
    covariances, windows that lie within the picture; the mean over channels, frames and windows.
    """
    # Every channel of every frame is a picture of its own: [B, 3 * frames, 1, height, width].
    a, b = (x.double().flatten(1, 2).unsqueeze(2) for x in (videos, reference))
    return torch.stack([_similarity(x, y).mean() for x, y in zip(a, b, strict=True)])


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """Similarity of pictures [N, 1, height, width] at every window."""
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a * mean_a
    var_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    return light * (2 * covariance + _C2) / (var_a + var_b + _C2)


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over all windows within the pictures."""
    offset = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    weight = torch.exp(-(offset * offset) / (2 * _SIGMA * _SIGMA))
    weight = weight / weight.sum()
    return torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, weight.view(1, 1, 1, -1)), weight.view(1, 1, -1, 1))


def paired(values: Tensor, reference: Tensor, prompt: list[int]) -> tuple[float, float, int]:
    """Mean of values minus reference, its standard error, and in how many videos values are higher.

    Videos of one prompt are no independent observations: the standard error is that of the means by prompt.

    Args:
        values: One per video, [B].
        reference: Of the same videos, [B].
        prompt: The prompt of each video.
    """
    difference = values.double() - reference.double()
    groups = sorted(set(prompt))
    of = torch.tensor(prompt)
    means = torch.stack([difference[of == group].mean() for group in groups])
    error = float(means.std() / math.sqrt(len(groups))) if len(groups) > 1 else math.nan
    return float(difference.mean()), error, int((difference > 0).sum())

"""The model: diffusers' Wan transformer, small, on pixels. 16 frames of 64 x 64 pixels are 16 x 32 x 32 tokens."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data

FRAMES = 16
SIZE = 64
"""Height and width of a picture in pixels; a token is 2 x 2 of one frame."""
CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 128,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": data.TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 704,
    "num_layers": 6,
}
BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""Orders of torch's own attention kernels, by the first of them."""
WEIGHTS = pathlib.Path(__file__).parent / "weights"
"""What `train.py` made."""


def build(seed: int) -> Any:
    """A model to train: blocks begin near the identity, the output at zero."""
    torch.manual_seed(seed)
    # Any: diffusers says little of its classes to type checkers.
    model: Any = WanTransformer3DModel(**CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    nn.init.zeros_(model.patch_embedding.bias)
    embedder = model.condition_embedder
    for linear in (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2, embedder.time_proj):
        nn.init.normal_(linear.weight, std=0.02)
    for block in model.blocks:
        # Cross-attention has no gate of its own.
        nn.init.normal_(block.attn2.to_out[0].weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    return model


def load(folder: pathlib.Path = WEIGHTS, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The trained model; norms and time embedding stay in float32, as diffusers keeps them."""
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    return model.eval().requires_grad_(False)


def velocity(model: nn.Module, video: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
    """What the model thinks noise minus video is.

    Args:
        video: [B, 3, frames, size, size].
        sigma: Noise levels, [B]: 1 is noise, 0 is video.
        ids: Prompts, [B, data.TOKENS].
    """
    words = data.embed(ids).to(video.dtype)
    return model(video, sigma * 1000.0, words, return_dict=False)[0]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """In here torch's own attention takes the first kernel of `BACKENDS[name]` that can run."""
    with sdpa_kernel(BACKENDS[name], set_priority=True):
        yield

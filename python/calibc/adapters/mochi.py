"""Mochi: one sequence, the video first, then the real text tokens. Its processor does not use the dispatcher: ours stands in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calibc.adapters.base import Adapter, Call, Route


class Processor:
    """Joint attention of Mochi with a route; where the route declines, the processor that was set."""

    def __init__(self, original: Any, route: Route) -> None:
        self.original = original
        self.route = route

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.route.engaged:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        query, key, value = _projected(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), attn.norm_q, attn.norm_k)
        if image_rotary_emb is not None:
            query, key = _rotated(query, *image_rotary_emb), _rotated(key, *image_rotary_emb)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_parts = _projected(attn, encoder_hidden_states, added, attn.norm_added_q, attn.norm_added_k)
        # [B, S, H, D], the order that the output projection wants back.
        joint = [torch.cat(parts, dim=1).transpose(1, 2) for parts in zip((query, key, value), text_parts, strict=True)]
        # Which text is real, the route knows from the forward pass.
        out = self.route.attend(*joint)
        if out is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        hidden_states, encoder_hidden_states = out.transpose(1, 2).flatten(2, 3).split_with_sizes((video, text), dim=1)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if hasattr(attn, "to_add_out"):
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


def _projected(
    attn: nn.Module, x: Tensor, projections: tuple[nn.Module, ...], norm_q: nn.Module | None, norm_k: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, S, H, D] of one stream, normalised."""
    query, key, value = (project(x).unflatten(2, (attn.heads, -1)) for project in projections)
    query = query if norm_q is None else norm_q(query)
    key = key if norm_k is None else norm_k(key)
    return query, key, value


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, in float32. x is [B, S, H, D]; cos and sin are [S, H, D / 2]."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    real, imaginary = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack([real, imaginary], dim=-1).flatten(-2)


class Mochi(Adapter):
    """Mochi 1."""

    model_class = "MochiTransformer3DModel"
    text_position = "after"
    drops_padding = True
    batched_guidance = True
    dispatches = False

    def layers(self) -> list[nn.Module]:
        return [block.attn1 for block in self.module.transformer_blocks]

    def processor(self, original: Any, route: Route) -> Processor:
        return Processor(original, route)

    def noise_level(self, timestep: float) -> float:
        # Mochi counts up: timestep 0 is noise.
        return 1.0 - timestep / 1000.0

    def call(self, arguments: dict[str, Any]) -> Call:
        latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        batch, _, frames, height, width = latents.shape
        p = self.module.config.patch_size
        grid = (frames, height // p, width // p)
        mask = arguments["encoder_attention_mask"]
        return Call(grid, grid[0] * grid[1] * grid[2], text.shape[1], mask, batch, arguments["timestep"], latents)

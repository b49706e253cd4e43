"""CogVideoX: one sequence, the text first, always of full length. Its processor does not use the dispatcher: ours stands in."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from calibc.adapters.base import Adapter, Call, Route


class Processor:
    """Joint attention of CogVideoX with a route; where the route declines, the processor that was set."""

    def __init__(self, original: Any, route: Route) -> None:
        self.original = original
        self.route = route

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.route.engaged:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if getattr(attn, "fused_projections", False):
            projected = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            projected = (attn.to_q(joint), attn.to_k(joint), attn.to_v(joint))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], dim=2)
                for x in (query, key)
            )
        out = self.route.attend(query, key, value, mask=attention_mask)
        if out is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        joint = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2, 3)))
        return joint[:, text:], joint[:, :text]


class CogVideoX(Adapter):
    """CogVideoX and CogVideoX 1.5, T2V and I2V."""

    model_class = "CogVideoXTransformer3DModel"
    text_position = "before"
    batched_guidance = True
    dispatches = False

    def layers(self) -> list[nn.Module]:
        return [block.attn1 for block in self.module.transformer_blocks]

    def processor(self, original: Any, route: Route) -> Processor:
        return Processor(original, route)

    def call(self, arguments: dict[str, Any]) -> Call:
        latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        batch, frames, _, height, width = latents.shape
        p, p_t = self.module.config.patch_size, self.module.config.patch_size_t or 1
        grid = ((frames + p_t - 1) // p_t, height // p, width // p)
        tokens = grid[0] * grid[1] * grid[2]
        return Call(grid, tokens, text.shape[1], None, batch, arguments["timestep"], latents)

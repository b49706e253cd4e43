"""LTX-Video: text enters through cross-attention, which is left alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from calibc.adapters.base import Adapter, Call, Route
from calibc.adapters.dispatch import Dispatched


class Processor(Dispatched):
    """LTX's own processor with its attention taken over."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return self.run(self.stand_in, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class LTXVideo(Adapter):
    """LTX-Video 2B and 13B."""

    model_class = "LTXVideoTransformer3DModel"
    text_position = "none"
    batched_guidance = True

    def layers(self) -> list[nn.Module]:
        return [block.attn1 for block in self.module.transformer_blocks]

    def processor(self, original: Any, route: Route) -> Processor:
        return Processor(original, route)

    def call(self, arguments: dict[str, Any]) -> Call:
        latents = arguments["hidden_states"]
        batch, tokens, _ = latents.shape
        sides = [arguments.get(name) for name in ("num_frames", "height", "width")]
        # With coordinates of its own (conditioning frames, say) the sequence is no grid.
        free = arguments.get("video_coords") is not None or None in sides
        grid = None if free else (int(sides[0]), int(sides[1]), int(sides[2]))
        return Call(grid, tokens, 0, None, batch, arguments["timestep"], latents)

"""HunyuanVideo: one sequence, the video first, then text padded to a fixed length. Padding is masked as keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from calibc.adapters.base import Adapter, Call, Route
from calibc.adapters.dispatch import Dispatched


class Processor(Dispatched):
    """HunyuanVideo's own processor with its attention taken over."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.run(self.stand_in, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class HunyuanVideo(Adapter):
    """HunyuanVideo T2V and I2V. Layers: the dual-stream blocks, then the single-stream blocks."""

    model_class = "HunyuanVideoTransformer3DModel"
    text_position = "after"

    def layers(self) -> list[nn.Module]:
        return [block.attn for block in (*self.module.transformer_blocks, *self.module.single_transformer_blocks)]

    def processor(self, original: Any, route: Route) -> Processor:
        return Processor(original, route)

    def call(self, arguments: dict[str, Any]) -> Call:
        latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        batch, _, frames, height, width = latents.shape
        p, p_t = self.module.config.patch_size, self.module.config.patch_size_t
        grid = (frames // p_t, height // p, width // p)
        mask = arguments["encoder_attention_mask"]
        return Call(grid, grid[0] * grid[1] * grid[2], text.shape[1], mask, batch, arguments["timestep"], latents)

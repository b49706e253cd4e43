"""Wan 2.1 and 2.2: text and images enter through cross-attention, which is left alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from calibc.adapters.base import Adapter, Call, Route
from calibc.adapters.dispatch import Dispatched


class Processor(Dispatched):
    """Wan's own processor with its attention taken over."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return self.run(self.stand_in, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class Wan(Adapter):
    """T2V, I2V and TI2V of Wan 2.1 and 2.2."""

    model_class = "WanTransformer3DModel"
    text_position = "none"

    def layers(self) -> list[nn.Module]:
        return [block.attn1 for block in self.module.blocks]

    def processor(self, original: Any, route: Route) -> Processor:
        return Processor(original, route)

    def call(self, arguments: dict[str, Any]) -> Call:
        latents = arguments["hidden_states"]
        batch, _, *sides = latents.shape
        frames, height, width = (n // p for n, p in zip(sides, self.module.config.patch_size, strict=True))
        tokens = frames * height * width
        return Call((frames, height, width), tokens, 0, None, batch, arguments["timestep"], latents)

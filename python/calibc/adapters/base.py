"""The interface between a model class and what takes over its attention."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Call:
    """One forward pass, as far as a plan cares."""

    grid: tuple[int, int, int] | None
    """Frames, height and width of the video tokens; `None` where the model is not told."""
    video_tokens: int
    """Video tokens of a sample."""
    text_tokens: int
    """Text tokens in the joint sequence, padding included; 0 where text enters through cross-attention."""
    text_mask: Tensor | None
    """[B, text_tokens], nonzero where a text token is real; `None` where the model attends to padding as well."""
    batch: int
    """Samples."""
    timestep: Tensor | float
    """What the model is told of the noise."""
    latents: Tensor
    """The input, for its device and type."""

    @property
    def tokens(self) -> int:
        """Tokens of the joint sequence."""
        return self.video_tokens + self.text_tokens


class Route(abc.ABC):
    """Where the attention of one layer goes."""

    @abc.abstractmethod
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
        """Attention of one layer.

        Args:
            query: [B, H, S, D], any strides with D contiguous.
            key: As query.
            value: As query.
            mask: The mask of the model, if it has one that is not about text padding.
            scale: Factor on the scores; by default 1 / sqrt(D).
            blocked: Why no plan can cover this call, if the processor knows: dropout, causality.

        Returns:
            [B, H, S, D], or `None` where the attention that was set before must run.
        """

    fallback: str | None = None
    """The dispatcher's backend to fall back to; `None` is the one that was set."""

    @property
    @abc.abstractmethod
    def engaged(self) -> bool:
        """Whether `attend` may do anything in this forward pass."""


class Adapter(abc.ABC):
    """A transformer seen through its class."""

    model_class: ClassVar[str]
    """Name of the class in diffusers."""
    text_position: ClassVar[str]
    """Where text stands in the joint sequence: `none`, `before`, `after` the video."""
    drops_padding: ClassVar[bool] = False
    """Whether padding text gives no queries either, and outputs of 0."""
    batched_guidance: ClassVar[bool] = False
    """Whether pipelines run guidance as one batch [uncond, cond], not as two passes."""
    dispatches: ClassVar[bool] = True
    """Whether the class chooses its attention through the dispatcher of diffusers."""

    def __init__(self, module: nn.Module) -> None:
        # Any: its class says what it has, which the type of modules does not.
        self.module: Any = module
        self._signature = inspect.signature(type(module).forward)

    @abc.abstractmethod
    def layers(self) -> list[nn.Module]:
        """The self-attention modules, in the order that plans number layers."""

    @abc.abstractmethod
    def processor(self, original: Any, route: Route) -> Any:
        """A processor for a module that had `original`, whose attention goes to `route`."""

    @abc.abstractmethod
    def call(self, arguments: dict[str, Any]) -> Call:
        """What a forward pass is about, from its arguments by name."""

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """`call`, from the arguments as they were passed."""
        return self.call(self._signature.bind_partial(self.module, *args, **kwargs).arguments)

    def noise_level(self, timestep: float) -> float:
        """The noise of a timestep: 1 is noise, 0 is video. Flow-matching models count timesteps from 1000 down."""
        return timestep / 1000.0

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.module.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.module.config.attention_head_dim)

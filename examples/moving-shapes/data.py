"""Videos of moving shapes with prompts that say what is in them, drawn on any device from a seed.

A scene is a textured background that pans and one to three shapes that move, bounce off the edges and cover each other, each
with shading and a shadow. A prompt is 16 words: four about the scene, then four about each shape. Words enter the model as fixed
vectors: one coordinate for the word, one for what it is about (the scene, or which shape).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

NOTHING = "nothing"
FIELDS: dict[str, tuple[str, ...]] = {
    "count": ("one", "two", "three"),
    "ground": ("sand", "grey", "maroon", "teal", "forest", "navy", "plum", "cream"),
    "texture": ("checker", "stripes", "dots", "waves", "clouds"),
    "pan": ("still", "left", "right", "up", "down"),
    "shape": ("circle", "square", "triangle", "ring", "cross", "diamond"),
    "colour": ("red", "green", "blue", "yellow", "orange", "magenta", "cyan", "white"),
    "direction": ("still", "N", "NE", "E", "SE", "S", "SW", "W", "NW"),
    "speed": ("slow", "fast"),
}
"""What a prompt says, and the words it says it with."""
SCENE = ("count", "ground", "texture", "pan")
SHAPE = ("shape", "colour", "direction", "speed")
SHAPES = 3
"""Shapes of a scene at most."""
TOKENS = len(SCENE) + SHAPES * len(SHAPE)
"""Words of a prompt; those about shapes that are not there are `nothing`."""
TEXT_DIM = 64
"""Width of a word's vector: words, then subjects, then zeros."""

_OFFSET: dict[str, int] = {}
_next = 1
for _field, _words in FIELDS.items():
    _OFFSET[_field] = _next
    _next += len(_words)
_WORDS = _next
# One-hot rows this large give the first layer inputs of order one.
_LOUDNESS = 4.0

_GROUND = torch.tensor(
    [
        (0.80, 0.68, 0.46),
        (0.50, 0.50, 0.52),
        (0.45, 0.16, 0.18),
        (0.14, 0.46, 0.46),
        (0.14, 0.36, 0.18),
        (0.14, 0.18, 0.42),
        (0.42, 0.22, 0.44),
        (0.90, 0.86, 0.74),
    ]
)
_COLOUR = torch.tensor(
    [
        (0.90, 0.12, 0.12),
        (0.15, 0.75, 0.20),
        (0.15, 0.30, 0.95),
        (0.98, 0.88, 0.10),
        (0.98, 0.55, 0.08),
        (0.90, 0.15, 0.80),
        (0.10, 0.85, 0.90),
        (0.97, 0.97, 0.97),
    ]
)
_DIAGONAL = 0.5**0.5
# x to the right, y down.
_DIRECTION = torch.tensor(
    [
        (0.0, 0.0),
        (0.0, -1.0),
        (_DIAGONAL, -_DIAGONAL),
        (1.0, 0.0),
        (_DIAGONAL, _DIAGONAL),
        (0.0, 1.0),
        (-_DIAGONAL, _DIAGONAL),
        (-1.0, 0.0),
        (-_DIAGONAL, -_DIAGONAL),
    ]
)
_PAN = torch.tensor([(0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])
# Widths of the picture per frame.
_SPEED = torch.tensor([0.016, 0.045])
_PAN_SPEED = 0.02


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A batch of scenes. What a prompt does not say (where, how large) is drawn at random and left to the model's noise."""

    words: dict[str, Tensor]
    """Index of the word of each field: [B] for the scene, [B, SHAPES] for shapes."""
    start: Tensor
    """Where shapes are in the first frame, [B, SHAPES, 2] in 0..1."""
    radius: Tensor
    """[B, SHAPES], in widths of the picture."""
    phase: Tensor
    """Where the texture starts, [B, 2]."""
    period: Tensor
    """Size of the texture, [B]."""

    @property
    def batch(self) -> int:
        """How many scenes."""
        return self.start.shape[0]


def draw(batch: int, generator: torch.Generator) -> Scenes:
    """Random scenes, on the generator's device."""
    device = generator.device

    def pick(field: str, *shape: int) -> Tensor:
        return torch.randint(len(FIELDS[field]), shape, generator=generator, device=device)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    words = {field: pick(field, batch) for field in SCENE} | {field: pick(field, batch, SHAPES) for field in SHAPE}
    return Scenes(
        words,
        start=uniform(0.0, 1.0, batch, SHAPES, 2),
        radius=uniform(0.11, 0.19, batch, SHAPES),
        phase=uniform(0.0, 1.0, batch, 2),
        period=uniform(0.18, 0.26, batch),
    )


def token_ids(scenes: Scenes) -> Tensor:
    """The words of every prompt, [B, TOKENS]; 0 is `nothing`."""
    there = _there(scenes)
    ids = [scenes.words[field] + _OFFSET[field] for field in SCENE]
    for shape in range(SHAPES):
        ids += [(scenes.words[field][:, shape] + _OFFSET[field]) * there[:, shape] for field in SHAPE]
    return torch.stack(ids, dim=1)


def embed(ids: Tensor) -> Tensor:
    """Vectors of words, [B, TOKENS] to [B, TOKENS, TEXT_DIM]."""
    out = torch.zeros(*ids.shape, TEXT_DIM, device=ids.device)
    out.scatter_(2, ids[..., None], _LOUDNESS)
    subject = torch.tensor([0] * len(SCENE) + [1 + i for i in range(SHAPES) for _ in SHAPE], device=ids.device)
    out.scatter_(2, (_WORDS + subject).expand_as(ids)[..., None], _LOUDNESS)
    return out


def empty_prompt(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """The prompt that says nothing, [B, TOKENS]: what guidance leads away from."""
    return torch.zeros(batch, TOKENS, dtype=torch.int64, device=device)


def describe(ids: Tensor) -> str:
    """A prompt, [TOKENS], in words: `sand checker, pan right; fast white square NE`."""
    spelled = [NOTHING] + [word for words in FIELDS.values() for word in words]
    words = [spelled[i] for i in ids.tolist()]
    _, ground, texture, pan = words[: len(SCENE)]
    parts = [f"{ground} {texture}, pan {pan}"]
    for at in range(len(SCENE), TOKENS, len(SHAPE)):
        shape, colour, direction, speed = words[at : at + len(SHAPE)]
        if shape != NOTHING:
            parts.append(f"{colour} {shape} still" if direction == "still" else f"{speed} {colour} {shape} {direction}")
    return "; ".join(parts)


def prompts(count: int, seed: int) -> Tensor:
    """Random prompts, [count, TOKENS]."""
    return token_ids(draw(count, torch.Generator().manual_seed(seed)))


def render(scenes: Scenes, frames: int, size: int) -> Tensor:
    """Videos of the scenes, [B, 3, frames, size, size] in -1..1."""
    device = scenes.start.device
    ticks = torch.arange(frames, device=device, dtype=torch.float32)
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    # [2, size, size], x first.
    pixels = torch.stack([axis.expand(size, size), axis[:, None].expand(size, size)])
    picture = _ground(scenes, ticks, pixels)
    there = _there(scenes)
    sharp = float(size)
    for shape in range(SHAPES):
        centre, radius = _path(scenes, shape, ticks), scenes.radius[:, shape].view(-1, 1, 1, 1)
        local = pixels - centre[..., None, None]
        kind, visible = scenes.words["shape"][:, shape], there[:, shape].view(-1, 1, 1, 1).float()
        shadow = _distance(kind, local - 0.03, radius)
        picture = picture * (1 - 0.4 * visible * torch.sigmoid(-shadow * 60.0))[:, None]
        inside = _distance(kind, local, radius)
        light = (1.0 - 0.3 * (0.5 * local[:, :, 0] + 0.85 * local[:, :, 1]) / radius).clamp(0.5, 1.3)
        # A dark outline of 0.02 tells shapes from grounds of their colour.
        light = light * (0.45 + 0.55 * (-(inside + 0.02) * sharp + 0.5).clamp(0, 1))
        paint = _COLOUR.to(device)[scenes.words["colour"][:, shape]].view(-1, 3, 1, 1, 1) * light[:, None]
        cover = (visible * (-inside * sharp + 0.5).clamp(0, 1))[:, None]
        picture = picture + cover * (paint - picture)
    return picture.clamp(0, 1) * 2 - 1


def _there(scenes: Scenes) -> Tensor:
    """Which shapes there are, [B, SHAPES] bool."""
    return torch.arange(SHAPES, device=scenes.start.device) <= scenes.words["count"][:, None]


def _path(scenes: Scenes, shape: int, ticks: Tensor) -> Tensor:
    """Where a shape is in every frame, [B, frames, 2]: straight on, and back from the edges."""
    device = ticks.device
    velocity = (
        _DIRECTION.to(device)[scenes.words["direction"][:, shape]]
        * _SPEED.to(device)[scenes.words["speed"][:, shape], None]
    )
    radius = scenes.radius[:, shape].view(-1, 1, 1)
    span = 1 - 2 * radius
    way = scenes.start[:, shape, None] * span + velocity[:, None] * ticks[:, None]
    return radius + span - (way.remainder(2 * span) - span).abs()


def _ground(scenes: Scenes, ticks: Tensor, pixels: Tensor) -> Tensor:
    """Backgrounds, [B, 3, frames, size, size] in 0..1."""
    device = ticks.device
    pan = _PAN.to(device)[scenes.words["pan"]] * _PAN_SPEED
    moved = pixels - (pan[:, None] * ticks[:, None] + scenes.phase[:, None])[..., None, None]
    # In periods, times a whole turn.
    x, y = (moved * (2 * torch.pi / scenes.period.view(-1, 1, 1, 1, 1))).unbind(2)
    checker = torch.tanh(6 * torch.sin(x / 2) * torch.sin(y / 2))
    stripes = torch.tanh(3 * torch.sin((x + y) * _DIAGONAL))
    dots = torch.tanh(3 * (torch.cos(x) + torch.cos(y) - 0.8))
    waves = torch.sin(y + 1.2 * torch.sin(x / 2))
    clouds = (torch.sin(0.53 * x + 0.4 * y) + torch.sin(0.31 * y - 0.61 * x + 2) + torch.sin(0.9 * y + 0.2 * x)) / 2
    every = torch.stack([checker, stripes, dots, waves, clouds], dim=1)
    chosen = scenes.words["texture"].view(-1, 1, 1, 1, 1).expand(-1, 1, *every.shape[2:])
    tone = every.gather(1, chosen)
    base = _GROUND.to(device)[scenes.words["ground"]].view(-1, 3, 1, 1, 1)
    return (base * (1 + 0.3 * tone)).clamp(0, 1)


def _distance(kind: Tensor, local: Tensor, radius: Tensor) -> Tensor:
    """Distance to the edge of a shape, negative inside: local [B, frames, 2, size, size] to [B, frames, size, size]."""
    x, y = local.unbind(2)
    far = (x * x + y * y + 1e-12).sqrt()
    ax, ay = x.abs(), y.abs()
    every = torch.stack(
        [
            far - radius,
            torch.maximum(ax, ay) - 0.86 * radius,
            torch.maximum(0.866 * ax - 0.5 * y, y) - 0.55 * radius,
            (far - 0.72 * radius).abs() - 0.28 * radius,
            torch.minimum(
                torch.maximum(ax - radius, ay - 0.34 * radius), torch.maximum(ay - radius, ax - 0.34 * radius)
            ),
            (ax + ay) * _DIAGONAL - 0.76 * radius,
        ],
        dim=1,
    )
    chosen = kind.view(-1, 1, 1, 1, 1).expand(-1, 1, *every.shape[2:])
    return every.gather(1, chosen)[:, 0]

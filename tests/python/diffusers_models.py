"""Tiny random models of the diffusers classes that calibc has adapters for, and plans of their shape."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import calibc
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

BLOCK = 128

# Tiny tensors gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model and what it takes to call it."""

    name: str
    module: nn.Module
    grid: tuple[int, int, int]
    text_tokens: int
    text_position: str
    layers: int
    heads: int
    head_dim: int
    inputs: Callable[[float, int], dict[str, Any]]
    """Arguments at a noise level, from a seed."""

    def __call__(self, level: float, seed: int = 0) -> Tensor:
        with torch.no_grad():
            return self.module(**self.inputs(level, seed), return_dict=False)[0]

    @property
    def video_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK)

    def text_blocks(self) -> list[int]:
        """Blocks that hold text."""
        if self.text_position == "none":
            return []
        first = 0 if self.text_position == "before" else self.video_tokens
        return list(range(first // BLOCK, -(-(first + self.text_tokens) // BLOCK)))


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _prepared(module: nn.Module) -> nn.Module:
    """Sharper attention than fresh weights give, and no weights that are zero at the start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() == 1 and float(parameter.detach().std()) == 0:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def wan(layers: int = 2, frames: int = 3) -> Tiny:
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
    )

    def inputs(level: float, seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _noise(seed, 1, 4, frames, 32, 32),
            "timestep": torch.tensor([1000 * level]),
            "encoder_hidden_states": _noise(seed + 1, 1, 16, 32),
        }

    return Tiny("wan", _prepared(module), (frames, 16, 16), 0, "none", layers, 2, 64, inputs)


def hunyuan_video(real: int = 20) -> Tiny:
    torch.manual_seed(0)
    module = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=128,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(16, 56, 56),
    )

    def inputs(level: float, seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _noise(seed, 1, 4, 3, 32, 30),
            "timestep": torch.tensor([1000 * level]),
            "encoder_hidden_states": _noise(seed + 1, 1, 48, 16),
            "encoder_attention_mask": (torch.arange(48) < real)[None].long(),
            "pooled_projections": _noise(seed + 2, 1, 8),
            "guidance": torch.tensor([6000.0]),
        }

    return Tiny("hunyuan_video", _prepared(module), (3, 16, 15), 48, "after", 2, 2, 128, inputs)


def mochi(real: tuple[int, ...] = (9, 33)) -> Tiny:
    torch.manual_seed(0)
    module = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=2,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=48,
    )
    module.pos_frequencies.data.normal_(generator=torch.Generator().manual_seed(3))

    def inputs(level: float, seed: int) -> dict[str, Any]:
        batch = len(real)
        return {
            "hidden_states": _noise(seed, batch, 4, 3, 32, 30),
            "timestep": torch.tensor([1000 * (1 - level)]).expand(batch),
            "encoder_hidden_states": _noise(seed + 1, batch, 48, 16),
            "encoder_attention_mask": torch.stack([torch.arange(48) < n for n in real]),
        }

    return Tiny("mochi", _prepared(module), (3, 16, 15), 48, "after", 2, 2, 64, inputs)


def ltx(batch: int = 2) -> Tiny:
    torch.manual_seed(0)
    module = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=64,
        cross_attention_dim=128,
        num_layers=2,
        caption_channels=16,
    )

    def inputs(level: float, seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _noise(seed, batch, 500, 8),
            "encoder_hidden_states": _noise(seed + 1, batch, 16, 16),
            "timestep": torch.tensor([1000 * level]).expand(batch),
            "encoder_attention_mask": torch.ones(batch, 16),
            "num_frames": 5,
            "height": 10,
            "width": 10,
        }

    return Tiny("ltx", _prepared(module), (5, 10, 10), 0, "none", 2, 2, 64, inputs)


def cogvideox(batch: int = 2) -> Tiny:
    torch.manual_seed(0)
    module = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=32,
        sample_height=24,
        sample_frames=9,
        max_text_seq_length=20,
        use_rotary_positional_embeddings=True,
    )
    rotary = (_noise(7, 3 * 12 * 16, 64).cos(), _noise(7, 3 * 12 * 16, 64).sin())

    def inputs(level: float, seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _noise(seed, batch, 3, 4, 24, 32),
            "encoder_hidden_states": _noise(seed + 1, batch, 20, 16),
            "timestep": torch.tensor([round(1000 * level)]).expand(batch),
            "image_rotary_emb": rotary,
        }

    return Tiny("cogvideox", _prepared(module), (3, 12, 16), 20, "before", 2, 2, 64, inputs)


MODELS: dict[str, Callable[[], Tiny]] = {
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "mochi": mochi,
    "ltx": ltx,
    "cogvideox": cogvideox,
}


def random_masks(model: Tiny, steps: int, share: float) -> Tensor:
    """Masks [steps, layers, heads, blocks, blocks] that keep about `share`, every diagonal block, and text."""
    shape = (steps, model.layers, model.heads, model.blocks, model.blocks)
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < share
    masks |= torch.eye(model.blocks, dtype=torch.bool)
    for block in model.text_blocks():
        masks[..., block] = True
        masks[..., block, :] = True
    return masks


def on_gpu(model: Tiny) -> Tiny:
    """The model in bfloat16 on the GPU, its inputs with it."""
    model.module.to("cuda", torch.bfloat16)

    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(moved(y) for y in x)
        if not isinstance(x, Tensor):
            return x
        # Timesteps and guidance stay as precise as pipelines keep them.
        return x.to("cuda", torch.bfloat16 if x.is_floating_point() and x.dim() > 1 else x.dtype)

    def inputs(level: float, seed: int) -> dict[str, Any]:
        return {name: moved(value) for name, value in model.inputs(level, seed).items()}

    return dataclasses.replace(model, inputs=inputs)


def compile_masks(
    model: Tiny, masks: Tensor, sigmas: list[float], folder: pathlib.Path, name: str = "plan", arch: str = "sm_80"
) -> pathlib.Path:
    """A bundle of explicit masks."""
    tensors = {
        f"s{step}.l{layer}": masks[step, layer].to(torch.uint8).contiguous()
        for step in range(masks.shape[0])
        for layer in range(masks.shape[1])
    }
    safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    frames, height, width = model.grid
    text = f"  text_tokens: {model.text_tokens}\n  text_position: {model.text_position}\n" if model.text_tokens else ""
    (folder / f"{name}.yaml").write_text(
        f"name: {model.name}\nmodel:\n  layers: {model.layers}\n  heads: {model.heads}\n  head_dim: {model.head_dim}\n"
        f"geometry:\n  frames: {frames}\n  height: {height}\n  width: {width}\n{text}"
        f"sigmas: {sigmas}\npolicy:\n  kind: explicit\n  masks: {name}.safetensors\n"
        f"target:\n  dtypes: [bf16]\n  lse: false\n  archs: [{arch}]\n"
    )
    out = folder / f"{name}.bundle"
    calibc.compile(out=out, spec=folder / f"{name}.yaml", progress=False)
    return out


@contextlib.contextmanager
def masked(model: Tiny, masks: Tensor) -> Iterator[None]:
    """Brute force: in here torch's own attention keeps, in each layer, what `masks` [layers, heads, blocks, blocks] keep."""
    real = F.scaled_dot_product_attention
    calls = 0

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        # Self-attention on the video; Mochi calls it once per sample.
        if query.shape[2] < model.video_tokens or query.shape != key.shape:
            return real(query, key, value, *args, **kwargs)
        samples = 2 if model.name == "mochi" else 1
        layer, calls = calls // samples % model.layers, calls + 1
        keep = masks[layer].repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        keep = keep[None, :, : query.shape[2], : query.shape[2]].to(query.device)
        given = kwargs.pop("attn_mask", None)
        return real(query, key, value, *args, attn_mask=keep if given is None else keep & given, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield
    assert calls, "nothing was masked"


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as path:
        yield pathlib.Path(path)

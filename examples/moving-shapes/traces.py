"""Reads a trace for the lab: energies, deviations and anchor rows of a whole trace as tensors."""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors.torch import load_file
from torch import Tensor


class Evidence:
    """What a trace measured, in memory. Made for small models: a trace of a large one has gigabytes."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if manifest["energy_encoding"] not in ("log2-u8", "f32"):
            raise SystemExit(
                f"{folder}: the lab reads log2-u8 and f32, not {manifest['energy_encoding']}; capture again"
            )
        self._encoded = manifest["energy_encoding"] == "log2-u8"
        self.layers, self.heads = manifest["model"]["layers"], manifest["model"]["heads"]
        self.steps = len(manifest["steps"])
        self.covered = sorted({shard["step"] for shard in manifest["shards"]})
        """Steps that were captured."""
        self.anchor_counts: list[int] = manifest["anchor_counts"]
        self._prompts = {
            split: [p["id"] for p in manifest["prompts"] if p["split"] == split] for split in ("calibration", "holdout")
        }
        self._shards = {
            (shard["prompt"], shard["step"]): load_file(folder / shard["path"])
            for shard in manifest["shards"]
            if shard["branch"] == manifest["branches"][0]
        }

    def prompts(self, split: str) -> list[str]:
        """Names of the prompts of a split."""
        return self._prompts[split]

    def mean(self, what: str, split: str = "calibration") -> Tensor:
        """Mean of `block_energy` or `block_deviation` over the prompts of a split, float32 [covered, layers, heads, blocks, blocks]."""
        names = self._prompts[split]
        total = torch.stack([self._site(what, names[0], step) for step in self.covered])
        for name in names[1:]:
            total += torch.stack([self._site(what, name, step) for step in self.covered])
        return total / len(names)

    def anchors(self, what: str) -> Tensor:
        """`anchor_similarity`, or the square of `anchor_error`, mean over calibration prompts: [covered, layers, heads], of the
        first number of anchor rows."""
        names, square = self._prompts["calibration"], what == "anchor_error"
        values = [
            torch.stack([self._tensors(what, name, step)[..., 0] for step in self.covered]).float() for name in names
        ]
        return torch.stack([value.square() if square else value for value in values]).mean(dim=0)

    def sensitivity(self) -> dict[str, Tensor]:
        """`step` [steps] and `head` [steps, layers, heads], as they are now: they are measured after the capture."""
        return load_file(self.folder / "sensitivity.safetensors")

    def every_step(self, covered: Tensor) -> Tensor:
        """[covered, ...] to [steps, ...]: steps that were not captured take the nearest one's; of two as near, the earlier."""
        nearest = [
            min(range(len(self.covered)), key=lambda i: (abs(self.covered[i] - step), i)) for step in range(self.steps)
        ]
        return covered[nearest]

    def recall(self, masks: Tensor, split: str = "holdout") -> float:
        """Mean energy that masks [steps, layers, heads, blocks, blocks] keep of a row, over prompts, covered steps and rows."""
        energy = self.mean("block_energy", split)
        return float((energy * masks[self.covered]).sum(-1).div(energy.sum(-1)).mean())

    def _site(self, what: str, prompt: str, step: int) -> Tensor:
        values = self._tensors(what, prompt, step)
        if not self._encoded:
            return values.float()
        table = torch.exp2(-torch.arange(256) / 8.0)
        table[255] = 0.0
        return table[values.long()]

    def _tensors(self, what: str, prompt: str, step: int) -> Tensor:
        """[layers, heads, ...] of one prompt at one step."""
        shard = self._shards[prompt, step]
        return torch.stack([shard[f"layers.{layer}.{what}"] for layer in range(self.layers)])

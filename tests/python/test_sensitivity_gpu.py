"""`calibc.sensitivity` on a GPU: the numbers of the CPU, in the memory it promises."""

from __future__ import annotations

import dataclasses
import gc
import unittest
from typing import Any

try:
    import torch
    from diffusers import DiffusionPipeline  # noqa: F401
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing
if not torch.cuda.is_available():
    raise unittest.SkipTest("no GPU")

from calibc import SensitivityConfig, sensitivity
from diffusers_models import MODELS, Tiny, on_gpu, wan
from sensitivity_models import SCALE, sampler, setup
from torch import Tensor

CONFIG = SensitivityConfig(steps=[0, 2], projections=3, guidance_scale=SCALE, progress=False)


def moved(model: Tiny) -> Tiny:
    """The model on the GPU as it is, its inputs with it."""
    model.module.to("cuda")

    def move(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(move(y) for y in x)
        return x.to("cuda") if isinstance(x, Tensor) else x

    def inputs(level: float, seed: int) -> dict[str, Any]:
        return {name: move(value) for name, value in model.inputs(level, seed).items()}

    return dataclasses.replace(model, inputs=inputs)


def octaves(a: Tensor, b: Tensor) -> float:
    """The furthest ratio."""
    return float((a / b).log2().abs().max())


class Gpu(unittest.TestCase):
    def test_numbers_are_those_of_the_cpu(self) -> None:
        for name, make in MODELS.items():
            for method in ("gradient", "exact") if name == "wan" else ("gradient",):
                with self.subTest(name, method=method), setup(make) as (model, path):
                    config = dataclasses.replace(CONFIG, method=method)
                    want = sensitivity(model.module, path, sampler(model), config)
                    gpu = moved(model)
                    got = sensitivity(gpu.module, path, sampler(gpu), config)
                    # Projections, rows and noise are the same ones.
                    self.assertLess(octaves(got.head, want.head), 0.05)
                    self.assertLess(octaves(got.step, want.step), 0.02)
                    if method == "exact":
                        continue
                    low = on_gpu(model)
                    got = sensitivity(low.module, path, sampler(low), config)
                    # Random attention is nearly even: rounding decides which blocks are the least.
                    self.assertLess(octaves(got.head, want.head), 1)
                    self.assertLess(octaves(got.step, want.step), 0.3)

    def test_memory_is_that_of_one_block(self) -> None:
        """More layers add their inputs and weights, no activations."""
        peaks = []
        config = dataclasses.replace(CONFIG, steps=[0])
        for layers in (2, 6):
            with setup(lambda layers=layers: wan(layers)) as (model, path):
                gpu = moved(model)
                # Libraries take their workspaces the first time, and keep them.
                sensitivity(gpu.module, path, sampler(gpu), config)
                gc.collect()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                sensitivity(gpu.module, path, sampler(gpu), config)
                peaks.append(torch.cuda.max_memory_allocated() - before)
                self.assertLess(torch.cuda.memory_allocated() - before, 1 << 20)
        tokens, width = 768, 128
        # Inputs in float32, and the answers [heads, rows, blocks]; a layer's own activations are ten times that.
        self.assertLess(peaks[1] - peaks[0], 4 * 2 * (4 * tokens * width))


if __name__ == "__main__":
    unittest.main()

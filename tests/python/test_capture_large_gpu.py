"""Captures of a large model on a GPU: what the trace has of Wan 2.1 14B, against float32 brute force on some of its blocks."""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterator
from unittest import mock

try:
    import torch
    from diffusers import DiffusionPipeline  # noqa: F401
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing
if not torch.cuda.is_available():
    raise unittest.SkipTest("no GPU")
if torch.cuda.get_device_properties(0).total_memory < 70e9:
    raise unittest.SkipTest("the model needs a GPU with 80 GB")

import calibc
import calibc.statistics
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import wan_forward

BLOCK = 128
LAYERS, HEADS = (0, 19, 39), (0, 13, 39)
# A code is a step of 1/8 octave, and rounded to the nearest.
CODE = 1 / 16
# Below 2^-31.75 values are stored as 0.
LEAST = 2.0**-31


@contextlib.contextmanager
def watched() -> Iterator[dict[int, tuple[Tensor, ...]]]:
    """q, k and v [heads, S, D] of some layers and heads, by layer, as a capture sees them."""
    seen: dict[int, tuple[Tensor, ...]] = {}
    measure: Callable[..., Tensor] = calibc.statistics.OnGpu.measure
    calls = 0

    def spy(self: object, problem: calibc.statistics.Problem, *args: object) -> Tensor:
        nonlocal calls
        if calls in LAYERS:
            heads = list(HEADS)
            seen[calls] = tuple(x[0, heads].clone() for x in (problem.query, problem.key, problem.value))
        calls += 1
        return measure(self, problem, *args)

    with mock.patch.object(calibc.statistics.OnGpu, "measure", spy):
        yield seen


def brute_force(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Energies and deviations [kv_blocks] of one head's query block."""
    rows = q[block * BLOCK : (block + 1) * BLOCK].float()
    p = torch.softmax(rows @ k.float().T / q.shape[1] ** 0.5, -1)
    out = p @ v.float()
    norm = out.square().sum(-1).mean()
    energy, deviation = [], []
    for part, values in zip(p.split(BLOCK, 1), v.float().split(BLOCK), strict=True):
        mass = part.sum(-1, keepdim=True)
        energy.append(mass.mean())
        deviation.append((part @ values - mass * out).square().sum(-1).mean() / norm)
    return torch.stack(energy), torch.stack(deviation)


def octaves(a: Tensor, b: Tensor) -> Tensor:
    """How far values are from each other, where they are large enough to be stored."""
    there = (b > LEAST) & (a > 0)
    return (a[there] / b[there]).log2()


class Large(unittest.TestCase):
    def test_wan_14b(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        device = torch.device("cuda")
        model = wan_forward.load(wan_forward.MODEL, device)
        generator = torch.Generator(device).manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        text = noise(1, 512, 4096)
        for resolution in ("480p", "720p"):
            frames, height, width = wan_forward.LATENTS[resolution]
            lab = wan_forward.Lab(
                model,
                noise(1, 16, frames, height, width),
                text,
                (frames, height // 2, width // 2),
                *wan_forward.dense_kernel()[::-1],
                rounds=1,
            )
            measured: dict[int, dict[str, Tensor]] = {}
            for rows in (128, 16):
                config = calibc.CaptureConfig(rows, anchors=(), sigmas=wan_forward.SIGMAS[:1], progress=False)
                with (
                    tempfile.TemporaryDirectory() as name,
                    contextlib.redirect_stderr(io.StringIO()),
                    watched() as seen,
                    torch.no_grad(),
                ):
                    path = pathlib.Path(name) / "trace"
                    with calibc.capture(model, path, config) as cap, cap.prompt("a"):
                        lab.forward()
                    self.assertEqual(calibc._native.main(["calibc", "trace", "check", str(path), "-q"]), 0)
                    measured[rows] = self.stored(next(path.glob("a/*.safetensors")))
            self.compare(resolution, seen, measured)

    def stored(self, shard: pathlib.Path) -> dict[str, Tensor]:
        """Energies and deviations of the watched layers and heads: [layers, heads, q_blocks, kv_blocks]."""
        tensors = load_file(shard, device="cuda")
        table = torch.exp2(-torch.arange(256, device="cuda") / 8.0)
        table[255] = 0.0
        return {
            kind: torch.stack([table[tensors[f"layers.{layer}.{kind}"][list(HEADS)].long()] for layer in LAYERS])
            for kind in ("block_energy", "block_deviation")
        }

    def compare(
        self, resolution: str, seen: dict[int, tuple[Tensor, ...]], measured: dict[int, dict[str, Tensor]]
    ) -> None:
        blocks = measured[128]["block_energy"].shape[2]
        # The last one is ragged.
        some = [0, blocks // 3, blocks // 2, blocks - 2, blocks - 1]
        want: dict[str, list[Tensor]] = {"block_energy": [], "block_deviation": []}
        for layer in LAYERS:
            q, k, v = seen[layer]
            for head in range(len(HEADS)):
                for block in some:
                    energy, deviation = brute_force(q[head], k[head], v[head], block)
                    want["block_energy"].append(energy)
                    want["block_deviation"].append(deviation)
        for kind, most in (("block_energy", CODE + 0.01), ("block_deviation", CODE + 0.03)):
            brute = torch.stack(want[kind])
            of_all, of_sample = (measured[rows][kind][:, :, some].flatten(0, 2) for rows in (128, 16))
            off = octaves(of_all, brute)
            self.assertGreater(off.numel(), 0.5 * brute.numel())
            # What is stored as 0 is that small.
            self.assertLess(float(brute[of_all == 0].max()) if bool((of_all == 0).any()) else 0.0, 1.1 * LEAST)
            sampled = octaves(of_sample, brute)
            # The same 16 rows stand for all blocks of a row of them: rows are the independent samples.
            ratios = torch.where(of_all > LEAST, of_sample / of_all, float("nan")).nanmean(1)
            mean, error = float(ratios.mean()), float(ratios.std() / len(ratios) ** 0.5)
            print(
                f"{resolution} {kind}: {off.numel()} blocks, all rows off by at most {float(off.abs().max()):.4f} octaves "
                f"({float(off.abs().mean()):.4f} on the mean); 16 rows {float(sampled.abs().mean()):.3f} on the mean, "
                f"{float(sampled.square().mean().sqrt()):.3f} rms, {mean:.4f} +- {error:.4f} of all rows'"
            )
            self.assertLess(float(off.abs().max()), most)
            self.assertLess(abs(mean - 1), 4 * error)
            self.assertLess(error, 0.1)


if __name__ == "__main__":
    unittest.main()

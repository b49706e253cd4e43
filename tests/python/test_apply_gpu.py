"""Diffusers' own classes on a GPU: plans by the kernels, captures by the kernels, compiled and as CUDA graphs."""

from __future__ import annotations

import contextlib
import io
import unittest

try:
    import torch
    from diffusers import DiffusionPipeline  # noqa: F401
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing
if not torch.cuda.is_available():
    raise unittest.SkipTest("no GPU")

import calibc
import safetensors.torch
from diffusers_models import MODELS, Tiny, compile_masks, folder, masked, on_gpu, random_masks, wan
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

SIGMAS = [1.0, 0.75, 0.4]


def arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return {9: "sm_90a", 8: "sm_80"}.get(major, f"sm_{major}{minor}")


def plan(model: Tiny) -> tuple[calibc.Bundle, Tensor]:
    masks = random_masks(model, len(SIGMAS), 0.4)
    with folder() as path:
        return calibc.Bundle(compile_masks(model, masks, SIGMAS, path, arch=arch())), masks


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, over all values."""
    return float((a.float() - b.float()).norm() / b.float().norm())


class Apply(unittest.TestCase):
    def test_masks_are_those_of_layer_and_step(self) -> None:
        for name, make in MODELS.items():
            model = on_gpu(make())
            bundle, masks = plan(model)
            for resident in (2, None):
                config = calibc.SparseAttentionConfig(bundle, strict=True, resident_steps=resident)
                for step in (0, 1, 2, 0):
                    with self.subTest(name, step=step, resident=resident):
                        dense = model(SIGMAS[step])
                        with masked(model, masks[step]):
                            want = model(SIGMAS[step])
                        with calibc.apply_sparse_attention(model.module, config):
                            got = model(SIGMAS[step])
                        # Rounding to bfloat16 in another order.
                        self.assertLess(difference(got, want), 0.01)
                        self.assertLess(difference(got, want), 0.6 * difference(dense, want))

    def test_one_graph(self) -> None:
        model = on_gpu(wan(layers=10))
        bundle, _ = plan(model)
        with calibc.apply_sparse_attention(model.module, calibc.SparseAttentionConfig(bundle, strict=True)):
            want = [model(level) for level in SIGMAS]
            counter = CompileCounterWithBackend("inductor")
            model.module.compile_repeated_blocks(fullgraph=True, backend=counter)
            for _ in range(2):
                for level, expected in zip(SIGMAS, want, strict=True):
                    self.assertLess(difference(model(level), expected), 0.01)
            self.assertEqual(counter.frame_count, 1)

    def test_cuda_graph(self) -> None:
        """Captured once, replayed at every step, the same bits as eager."""
        model = on_gpu(wan())
        bundle, _ = plan(model)
        inputs = model.inputs(1.0, 0)
        with (
            calibc.apply_sparse_attention(model.module, calibc.SparseAttentionConfig(bundle)) as handle,
            torch.no_grad(),
        ):
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(2):
                    model.module(**inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model.module(**inputs, return_dict=False)[0]
            for step in (0, 1, 2, 1):
                handle.set_step(step)
                graph.replay()
                replayed = out.clone()
                with model.module.cache_context("cond", step_index=step, sigma=SIGMAS[step], num_inference_steps=3):
                    eager = model.module(**inputs, return_dict=False)[0]
                self.assertTrue(torch.equal(replayed, eager), step)

    def test_timesteps_are_read_once_per_schedule(self) -> None:
        model = on_gpu(wan())
        bundle, _ = plan(model)
        schedule = torch.tensor([1000.0, 750.0, 400.0], device="cuda")
        inputs = model.inputs(1.0, 0)
        with (
            calibc.apply_sparse_attention(model.module, calibc.SparseAttentionConfig(bundle, strict=True)),
            torch.no_grad(),
        ):
            model.module(**{**inputs, "timestep": schedule[0].expand(1)})
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for i in (1, 2, 0, 1):
                    model.module(**{**inputs, "timestep": schedule[i].expand(1)})
            finally:
                torch.cuda.set_sync_debug_mode("default")


class Capture(unittest.TestCase):
    def test_captures_are_those_of_the_cpu(self) -> None:
        config = calibc.CaptureConfig(rows_per_block=128, sigmas=SIGMAS, anchors=(4,), encoding="f32", progress=False)
        for name, make in MODELS.items():
            with self.subTest(name), folder() as path, contextlib.redirect_stderr(io.StringIO()):
                shards = {}
                for device, model in (("cpu", make()), ("cuda", on_gpu(make()))):
                    if device == "cpu":
                        model.module.to(torch.bfloat16).float()
                    with calibc.capture(model.module, path / device, config) as cap, cap.prompt("a"):
                        for level in SIGMAS:
                            model(level)
                    shards[device] = safetensors.torch.load_file(path / device / "a/s001.cond.safetensors")
                # Layer 0: the inputs of later ones differ by more than rounding of theirs.
                for kind, most in (
                    ("block_energy", 0.02),
                    ("block_deviation", 0.05),
                    ("anchor_similarity", 0.02),
                    ("anchor_error", 0.02),
                ):
                    a, b = (shards[device][f"layers.0.{kind}"] for device in ("cuda", "cpu"))
                    self.assertLess(difference(a, b), most, kind)

    def test_generation_is_as_without(self) -> None:
        with folder() as path, contextlib.redirect_stderr(io.StringIO()):
            model = on_gpu(wan())
            want = model(1.0)
            config = calibc.CaptureConfig(sigmas=SIGMAS, steps=[0, 2])
            with calibc.capture(model.module, path / "t", config) as cap, cap.prompt("a"):
                self.assertLess(difference(model(1.0), want), 0.01)
                dense = model(0.75)
                model(0.4)
            self.assertTrue(torch.equal(model(0.75), dense))
            self.assertEqual(calibc._native.main(["calibc", "trace", "check", str(path / "t"), "-q"]), 0)


if __name__ == "__main__":
    unittest.main()

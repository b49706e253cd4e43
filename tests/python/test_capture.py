"""Traces of diffusers' own classes: what they hold, how they come to be, and plans made from them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import unittest
import warnings
from typing import Any
from unittest import mock

try:
    import torch
    from diffusers import DiffusionPipeline  # noqa: F401
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing

import calibc
import safetensors.torch
import torch.nn.functional as F
from calibc import _native
from calibc.capturing import CaptureConfig, capture
from diffusers_models import BLOCK, MODELS, Tiny, folder, ltx, masked, mochi, wan
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIGMAS = [1.0, 0.75, 0.4]
CONFIG = CaptureConfig(rows_per_block=128, sigmas=SIGMAS, anchors=(4,), progress=False)
# log2-u8: half a step of an eighth of an octave.
ENCODING = 2 ** (1 / 16) - 1


def generation(model: Tiny, seed: int = 0) -> None:
    for level in SIGMAS:
        model(level, seed)


def quiet() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stderr(io.StringIO())


def manifest(path: pathlib.Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def decoded(codes: Tensor) -> Tensor:
    return torch.where(codes == 255, 0.0, torch.exp2(-codes.double() / 8))


@contextlib.contextmanager
def attentions(model: Tiny, sample: int):
    """Every self-attention's q, k, v [H, S, D] and mask of one sample, in order of calls."""
    real, seen = F.scaled_dot_product_attention, []

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape == key.shape and query.shape[2] >= model.video_tokens:
            seen.append((query, key, value, kwargs.get("attn_mask")))
        return real(query, key, value, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield seen
    if model.name == "mochi":
        seen[:] = seen[sample::2]
    else:
        seen[:] = [(q[sample : sample + 1], k[sample : sample + 1], v[sample : sample + 1], m) for q, k, v, m in seen]


def brute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [H, S, S], energies and deviations [H, blocks, blocks] by their definitions."""
    q, k, v = (x[0].double() for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[0], float("-inf"))
    p = scores.softmax(-1)
    out = p @ v
    blocks = [slice(at, at + BLOCK) for at in range(0, q.shape[1], BLOCK)]
    energy, deviation = (torch.empty(q.shape[0], len(blocks), len(blocks)) for _ in range(2))
    for r, rows in enumerate(blocks):
        norm = out[:, rows].square().sum(-1).mean(-1)
        for c, cols in enumerate(blocks):
            part, mass = p[:, rows, cols] @ v[:, cols], p[:, rows, cols].sum(-1, keepdim=True)
            energy[:, r, c] = mass[..., 0].mean(-1)
            deviation[:, r, c] = (part - mass * out[:, rows]).square().sum(-1).mean(-1) / norm
    return p, energy, deviation.clamp_max(1)


def anchors_of(p: Tensor, v: Tensor, model: Tiny, count: int) -> tuple[Tensor, Tensor]:
    """Anchor similarity and error [H] by their definitions."""
    frames, height, width = model.grid
    first = model.text_tokens if model.text_position == "before" else 0
    anchors = [int((i + 0.5) * height / count) for i in range(count)]
    out = p @ v[0].double()
    copied, cosines = out.clone(), []
    for f in range(frames):
        for y in range(height):
            a = min(anchors, key=lambda a: (abs(a - y), a))
            mine, theirs = (
                slice(first + (f * height + i) * width, first + (f * height + i + 1) * width) for i in (y, a)
            )
            copied[:, mine] = out[:, theirs]
            if a != y:
                # The pattern of a row of the grid: its tokens' probabilities as one vector.
                cosines.append(F.cosine_similarity(p[:, mine].flatten(1), p[:, theirs].flatten(1)))
    # Blocks that hold text are computed.
    for block in model.text_blocks():
        copied[:, block * BLOCK : (block + 1) * BLOCK] = out[:, block * BLOCK : (block + 1) * BLOCK]
    return torch.stack(cosines).mean(0), (copied - out).flatten(1).norm(dim=1) / out.flatten(1).norm(dim=1)


class EveryModel(unittest.TestCase):
    def test_statistics_are_those_of_brute_force(self) -> None:
        for name, make in MODELS.items():
            with self.subTest(name), folder() as path, quiet():
                model = make()
                dense = [model(level) for level in SIGMAS]
                with capture(model.module, path / "t", CONFIG) as cap, cap.prompt("a"):
                    got = [model(level) for level in SIGMAS]
                # Generation is as without.
                self.assertTrue(all(torch.equal(a, b) for a, b in zip(dense, got, strict=True)))
                # Guidance in one batch has the prompt second.
                sample = 1 if name in ("mochi", "ltx", "cogvideox") else 0
                with attentions(model, sample) as calls:
                    model(SIGMAS[1])
                shard = safetensors.torch.load_file(path / "t/a/s001.cond.safetensors")
                self.assertEqual(len(calls), model.layers)
                for layer, (q, k, v, mask) in enumerate(calls):
                    p, energy, deviation = brute(q, k, v, mask)
                    n = energy.shape[1]
                    for kind, want in (("energy", energy), ("deviation", deviation)):
                        codes = shard[f"layers.{layer}.block_{kind}"]
                        self.assertEqual(codes.shape, (model.heads, model.blocks, model.blocks))
                        have = decoded(codes)[:, :n, :n]
                        # Values below the smallest code are 0.
                        self.assertLess(float(((have - want).abs() - want * ENCODING).max()), 1e-6, (name, kind))
                    similarity, error = anchors_of(p, v, model, 4)
                    torch.testing.assert_close(
                        shard[f"layers.{layer}.anchor_similarity"][:, 0], similarity.float(), rtol=1e-4, atol=1e-5
                    )
                    torch.testing.assert_close(
                        shard[f"layers.{layer}.anchor_error"][:, 0], error.float(), rtol=1e-4, atol=1e-5
                    )
                self.assertEqual(_native.main(["calibc", "trace", "check", str(path / "t"), "-q"]), 0)

    def test_capture_compile_apply(self) -> None:
        for name, make in MODELS.items():
            with self.subTest(name), folder() as path, quiet():
                model = make()
                config = CaptureConfig(sigmas=SIGMAS, anchors=(), encoding="f32", rows_per_block=16)
                with capture(model.module, path / "t", config) as cap:
                    for seed, split in enumerate(("calibration", "calibration", "holdout")):
                        with cap.prompt(f"p{seed}", seed=seed, split=split):
                            generation(model, seed)
                self.assertIn("3 prompts added", cap.summary())
                # The paper's recipe at a level that drops blocks of nearly even attention for any prompt.
                (path / "spec.yaml").write_text(
                    "policy:\n  kind: calibatt\n  schedule: {a_base: 0.3, a_per_token: 0.0, c: 0.3, k: 1}\n"
                    "target:\n  dtypes: [bf16]\n  lse: false\n  archs: [sm_80]\n"
                )
                bundle = calibc.compile(path / "t", out=path / "b", spec=path / "spec.yaml", progress=False)
                self.assertEqual((bundle.frames, bundle.height, bundle.width), model.grid)
                self.assertEqual((bundle.text_tokens, bundle.text_position), (model.text_tokens, model.text_position))
                for step, level in enumerate(SIGMAS):
                    masks = torch.stack(
                        [
                            torch.stack(
                                [
                                    torch.frombuffer(bytearray(bundle.mask(step, layer, head)), dtype=torch.bool)
                                    for head in range(model.heads)
                                ]
                            ).view(model.heads, model.blocks, model.blocks)
                            for layer in range(model.layers)
                        ]
                    )
                    self.assertLess(float(masks.float().mean()), 1)
                    with masked(model, masks):
                        want = model(level)
                    with calibc.apply_sparse_attention(
                        model.module, calibc.SparseAttentionConfig(bundle, strict=True)
                    ) as handle:
                        torch.testing.assert_close(model(level), want, rtol=1e-4, atol=2e-5)
                    self.assertEqual(handle.stats().sparse_calls, model.layers)

    def test_nothing_is_left_behind(self) -> None:
        for name, make in MODELS.items():
            with self.subTest(name), folder() as path, quiet():
                model = make()
                processors = [m.processor for m in model.module.modules() if hasattr(m, "processor")]
                with capture(model.module, path / "t", CONFIG), contextlib.suppress(ZeroDivisionError):
                    model(1.0)
                    raise ZeroDivisionError
                after = [m.processor for m in model.module.modules() if hasattr(m, "processor")]
                self.assertTrue(all(a is b for a, b in zip(processors, after, strict=True)))
                self.assertFalse(hasattr(model.module, "_diffusers_hook"))
                # Half a prompt is no prompt.
                self.assertFalse((path / "t/manifest.json").exists())


class Sampling(unittest.TestCase):
    def test_samples_estimate_the_whole(self) -> None:
        with folder() as path, quiet():
            model = wan()
            for rows in (16, 128):
                config = CaptureConfig(rows_per_block=rows, sigmas=SIGMAS, anchors=(), encoding="f32")
                with capture(model.module, path / f"{rows}", config) as cap, cap.prompt("a"):
                    generation(model)
            few, all_ = (safetensors.torch.load_file(path / f"{rows}/a/s000.cond.safetensors") for rows in (16, 128))
            for kind in ("energy", "deviation"):
                a, b = few[f"layers.1.block_{kind}"], all_[f"layers.1.block_{kind}"]
                self.assertFalse(torch.equal(a, b))
                error = (a - b).abs()
                self.assertLess(float(error.mean() / b.mean()), 0.15)
                # Unbiased: errors cancel over blocks.
                self.assertLess(abs(float((a - b).mean() / b.mean())), 0.02)

    def test_steps(self) -> None:
        chosen = {
            (None, 12): list(range(12)),
            (None, 50): [0, 5, 11, 16, 22, 27, 33, 38, 44, 49],
            (3, 9): [0, 4, 8],
            (1, 9): [0],
            ((8, 2, 2), 9): [2, 8],
        }
        for (steps, count), want in chosen.items():
            self.assertEqual(CaptureConfig(steps=steps).chosen(count), want)
        for steps in (0, (9,), (-1,), ()):
            with self.assertRaises(calibc.Usage):
                CaptureConfig(steps=steps).chosen(9)


class Prompts(unittest.TestCase):
    def test_prompts_are_told_apart(self) -> None:
        """Without names a new one starts when the noise rises; later captures add to the trace."""
        with folder() as path:
            model = wan()
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                with capture(model.module, path / "t", CONFIG) as cap:
                    generation(model, 0)
                    generation(model, 1)
                self.assertEqual(cap.prompts, ["p000", "p001"])
                with capture(model.module, path / "t", CONFIG) as cap:
                    generation(model, 2)
                    # Not whole.
                    model(1.0, 3)
                self.assertEqual(cap.prompts, ["p002"])
            self.assertEqual([p["id"] for p in manifest(path / "t")["prompts"]], ["p000", "p001", "p002"])
            self.assertEqual(len(manifest(path / "t")["shards"]), 9)
            self.assertIn("per prompt", said.getvalue())
            self.assertIn("p003 is left out", said.getvalue())
            self.assertNotIn("\r", said.getvalue())
            self.assertEqual(_native.main(["calibc", "trace", "check", str(path / "t"), "-q"]), 0)

    def test_names(self) -> None:
        with folder() as path, quiet():
            model = wan()
            with capture(model.module, path / "t", CONFIG) as cap:
                with cap.prompt("b", seed=7, split="holdout", label="a boat"):
                    generation(model)
                self.assertEqual(cap.remaining(["a", "b", "c"]), ["a", "c"])
                with cap.prompt("b"):
                    generation(model)
                with cap.prompt("a"):
                    generation(model)
                with self.assertRaisesRegex(calibc.BadInput, "two generations"), cap.prompt("c"):
                    model(1.0)
                    model(0.4)
                    model(1.0)
                with self.assertRaisesRegex(calibc.BadInput, "2 captured passes are missing"), cap.prompt("c"):
                    model(1.0)
                with self.assertRaisesRegex(calibc.BadInput, "nothing was generated"), cap.prompt("c"):
                    pass
                with self.assertRaises(calibc.Usage), cap.prompt("c", split="test"):
                    pass
            prompts = manifest(path / "t")["prompts"]
            self.assertEqual([p["id"] for p in prompts], ["b", "a"])
            self.assertEqual(
                {k: prompts[0][k] for k in ("seed", "split", "label")},
                {"seed": 7, "split": "holdout", "label": "a boat"},
            )
            self.assertEqual(
                sorted(p.name for p in (path / "t").iterdir() if not p.name.startswith(".")),
                ["a", "b", "manifest.json"],
            )

    def test_branches(self) -> None:
        """Guidance in two passes, and in one batch."""
        with folder() as path, quiet():
            model = wan()
            both = CaptureConfig(sigmas=SIGMAS, branches=("cond", "uncond"), anchors=(), encoding="f32")
            with capture(model.module, path / "two", both) as cap, cap.prompt("a"):
                for level in SIGMAS:
                    model(level, 0)
                    model(level, 10)
            cond, uncond = (safetensors.torch.load_file(path / f"two/a/s000.{b}.safetensors") for b in both.branches)
            with capture(model.module, path / "one", both) as cap, cap.prompt("a"):
                for level in SIGMAS:
                    # The other order, said by the pipeline.
                    with model.module.cache_context("uncond"):
                        model(level, 10)
                    with model.module.cache_context("cond"):
                        model(level, 0)
            again = safetensors.torch.load_file(path / "one/a/s000.cond.safetensors")
            self.assertTrue(torch.equal(cond["layers.0.block_energy"], again["layers.0.block_energy"]))
            self.assertFalse(torch.equal(cond["layers.0.block_energy"], uncond["layers.0.block_energy"]))
            model = ltx()
            with capture(model.module, path / "batch", both) as cap, cap.prompt("a"):
                generation(model)
            self.assertEqual(len(manifest(path / "batch")["shards"]), 6)

    def test_prompts_with_other_lengths_of_text(self) -> None:
        with folder() as path, quiet():
            for name, real in (("a", (3, 5)), ("b", (48, 48)), ("c", (20, 1))):
                model = mochi(real)
                with capture(model.module, path / "t", CONFIG) as cap, cap.prompt(name):
                    generation(model)
            self.assertEqual(_native.main(["calibc", "trace", "check", str(path / "t"), "-q"]), 0)


class Refusals(unittest.TestCase):
    def test_what_a_trace_cannot_hold(self) -> None:
        with folder() as path, quiet():
            model = wan()
            with self.assertRaisesRegex(calibc.BadInput, "schedule cannot be told"), capture(model.module, path / "t"):
                model(1.0)
            rising = CaptureConfig(sigmas=[0.1, 0.5])
            with self.assertRaisesRegex(calibc.BadInput, "must fall"), capture(model.module, path / "t", rising):
                model(1.0)
            with (
                self.assertRaisesRegex(calibc.BadInput, "2 samples"),
                capture(model.module, path / "t", CONFIG),
                torch.no_grad(),
            ):
                model.module(torch.randn(2, 4, 3, 32, 32), torch.tensor([1000.0]), torch.randn(2, 16, 32))
            with capture(model.module, path / "t", CONFIG) as cap:
                with (
                    self.assertRaisesRegex(calibc.BadInput, "one trace has one size"),
                    cap.prompt("a"),
                    torch.no_grad(),
                ):
                    model(1.0)
                    model.module(torch.randn(1, 4, 2, 32, 32), torch.tensor([750.0]), torch.randn(1, 16, 32))
            with self.assertRaisesRegex(calibc.Usage, "17 anchor rows"):
                with capture(model.module, path / "t", CaptureConfig(sigmas=SIGMAS, anchors=(17,))):
                    model(1.0)
            for wrong in ({"rows_per_block": 17}, {"branches": ("both",)}, {"prompts": 0}):
                with self.assertRaises(calibc.Usage):
                    CaptureConfig(**wrong)

    def test_another_model_does_not_fit(self) -> None:
        with folder() as path, quiet():
            with capture((model := wan()).module, path / "t", CONFIG) as cap, cap.prompt("a"):
                generation(model)
            other = wan(layers=3)
            with self.assertRaisesRegex(calibc.BadInput, "layers"), capture(other.module, path / "t", CONFIG):
                other(1.0)

    def test_disk_too_small(self) -> None:
        with folder() as path, quiet():
            model = wan()
            huge = CaptureConfig(sigmas=SIGMAS, prompts=10**12)
            with self.assertRaises(calibc.CalibcError) as refusal, capture(model.module, path / "t", huge):
                model(1.0)
            self.assertRegex(str(refusal.exception), "file system has")

    def test_no_capture_of_a_plan(self) -> None:
        with folder() as path, quiet():
            from diffusers_models import compile_masks, random_masks

            model = wan()
            bundle = compile_masks(model, random_masks(model, 1, 0.5), [1.0], path)
            with (
                calibc.apply_sparse_attention(model.module, bundle),
                self.assertRaisesRegex(calibc.Usage, "runs on a plan"),
            ):
                capture(model.module, path / "t", CONFIG).__enter__()
            with capture(model.module, path / "t", CONFIG), self.assertRaisesRegex(calibc.Usage, "being captured"):
                capture(model.module, path / "u", CONFIG).__enter__()


# A process that captures prompts a, b, c, ...; argv: folder, prompts, and after how many passes it kills itself.
CHILD = """
import sys, os, signal
from test_capture import *
model, left = wan(), int(sys.argv[3])
with capture(model.module, sys.argv[1], CaptureConfig(sigmas=SIGMAS, rows_per_block=16, anchors=(4,))) as cap:
    for name in cap.remaining(cap.assigned(sys.argv[2].split(","))):
        with cap.prompt(name):
            for level in SIGMAS:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                model(level, ord(name[0]))
    print(",".join(cap.prompts))
"""


class Processes(unittest.TestCase):
    def start(self, path: pathlib.Path, prompts: str, kill_after: int = -1, **env: str) -> subprocess.Popen[str]:
        here = str(pathlib.Path(__file__).parent)
        paths = os.pathsep.join([here, *[p for p in sys.path if p]])
        argv = [sys.executable, "-c", CHILD, str(path), prompts, str(kill_after)]
        return subprocess.Popen(
            argv,
            env={**os.environ, "PYTHONPATH": paths, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_killed_half_way(self) -> None:
        with folder() as path:
            child = self.start(path / "t", "a,b,c", kill_after=4)
            _, said = child.communicate()
            self.assertEqual(child.returncode, -signal.SIGKILL, said)
            self.assertEqual([p["id"] for p in manifest(path / "t")["prompts"]], ["a"])
            child = self.start(path / "t", "a,b,c")
            out, said = child.communicate()
            self.assertEqual((child.returncode, out.strip()), (0, "b,c"), said)
            model = wan()
            with (
                quiet(),
                capture(
                    model.module, path / "whole", CaptureConfig(sigmas=SIGMAS, rows_per_block=16, anchors=(4,))
                ) as cap,
            ):
                for name in "abc":
                    with cap.prompt(name):
                        generation(model, ord(name))
            self.assertEqual(manifest(path / "t"), manifest(path / "whole"))
            self.assertEqual(_native.main(["calibc", "trace", "check", str(path / "t"), "-q"]), 0)

    def test_side_by_side(self) -> None:
        with folder() as path:
            ranks = [self.start(path / "t", "a,b,c", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
            outs = [rank.communicate() for rank in ranks]
            self.assertEqual([out.strip() for out, _ in outs], ["a,c", "b"], outs)
            self.assertIn("calibc.merge_parts", outs[0][1])
            self.assertEqual(calibc.merge_parts(path / "t"), 3)
            self.assertEqual(sorted(p["id"] for p in manifest(path / "t")["prompts"]), ["a", "b", "c"])
            self.assertEqual(_native.main(["calibc", "trace", "check", str(path / "t"), "-q"]), 0)
            # Another time.
            self.assertEqual(calibc.merge_parts(path / "t"), 3)


class Examples(unittest.TestCase):
    def run_example(self, name: str, *args: str) -> str:
        """Runs an example's command line in this process; returns what it prints."""
        path, said = ROOT / f"examples/{name}.py", io.StringIO()
        with mock.patch.object(sys, "argv", [str(path), *args]), contextlib.redirect_stdout(said), quiet():
            runpy.run_path(str(path), run_name="__main__")
        return said.getvalue()

    def test_examples(self) -> None:
        for name in ("wan", "hunyuan_video"):
            with self.subTest(name), folder() as path:
                (path / "prompts.txt").write_text("a boat\na cat\n\na kite in the wind\n")
                traces, bundle = ["--traces", str(path / "t")], ["--bundle", str(path / "b")]
                captured = self.run_example(name, "capture", "--tiny", *traces, "--prompts", str(path / "prompts.txt"))
                self.run_example(name, "compile", *traces, *bundle, "--target", "sm_80")
                generated = self.run_example(
                    name, "generate", "--tiny", "--strict", *bundle, "--out", str(path / "video.pt")
                )
                self.assertIn("3 prompts added", captured)
                # Wan guides in two passes, HunyuanVideo in one.
                self.assertIn("16 of 16 calls" if name == "wan" else "8 of 8 calls", generated)
                self.assertEqual(
                    [p["split"] for p in manifest(path / "t")["prompts"]], ["calibration"] * 2 + ["holdout"]
                )
                self.assertTrue(torch.load(path / "video.pt").isfinite().all())

    def test_wan_forward(self) -> None:
        with folder() as path, mock.patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]):
            said = self.run_example("wan_forward", "--tiny", "--rounds", "1", "--json", str(path / "forward.json"))
            self.assertIn("512 tokens, 2 layers", said)
            record = json.loads((path / "forward.json").read_text())["tiny"]
            densities = [row["density"] for row in record["forward"]["rows"]]
            # Few blocks, and the diagonal is kept.
            self.assertEqual(densities, sorted(densities, reverse=True))
            self.assertTrue(all(0.25 <= density < 0.7 for density in densities))
            self.assertEqual(set(record["capture_s"]), {"dense", "16 rows", "16 rows, anchors", "all rows"})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    unittest.main()

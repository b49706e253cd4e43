"""Pipelines of diffusers around tiny random models: what they say of steps, branches and text reaches traces and plans."""

from __future__ import annotations

import contextlib
import io
import json
import unittest
from collections.abc import Callable
from typing import Any

try:
    import torch
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        LTXPipeline,
        MochiPipeline,
        UniPCMultistepScheduler,
        WanPipeline,
    )
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing

import calibc
from calibc.adapters import ADAPTERS, adapter_of, transformers_of
from calibc.adapters.schedule import Progress, TextLengths, Timesteps
from diffusers_models import MODELS, cogvideox, folder, hunyuan_video, ltx, mochi, wan

# No text encoders, no decoders: embeddings go in, latents come out.
BARE = {"vae": None, "text_encoder": None, "tokenizer": None}
STEPS = 4


def words(tokens: int, width: int) -> dict[str, Any]:
    return {"prompt_embeds": torch.randn(1, tokens, width), "negative_prompt_embeds": torch.zeros(1, tokens, width)}


def masks(real: int, negative: int, tokens: int) -> dict[str, Any]:
    at = torch.arange(tokens)[None]
    return {"prompt_attention_mask": at < real, "negative_prompt_attention_mask": at < negative}


def wan_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    experts = {"transformer": wan().module, "transformer_2": wan().module, "boundary_ratio": 0.8}
    call = {**words(16, 32), "height": 256, "width": 256, "num_frames": 9, "guidance_scale": 4.0}
    return WanPipeline(**BARE, scheduler=scheduler, **experts), call


def hunyuan_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(
        **BARE, scheduler=scheduler, transformer=hunyuan_video().module, text_encoder_2=None, tokenizer_2=None
    )
    call = {
        "prompt_embeds": torch.randn(1, 48, 16),
        "pooled_prompt_embeds": torch.randn(1, 8),
        "prompt_attention_mask": (torch.arange(48) < 11)[None].long(),
    }
    return pipe, {**call, "height": 256, "width": 240, "num_frames": 9}


def mochi_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    call = {**words(48, 16), **masks(9, 3, 48), "height": 256, "width": 240, "num_frames": 13, "guidance_scale": 3.0}
    return MochiPipeline(**BARE, scheduler=scheduler, transformer=mochi().module), call


def ltx_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05)
    call = {**words(16, 16), **masks(16, 16, 16), "height": 320, "width": 320, "num_frames": 33, "guidance_scale": 3.0}
    return LTXPipeline(**BARE, scheduler=scheduler, transformer=ltx().module), call


def cogvideox_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = CogVideoXDDIMScheduler(timestep_spacing="trailing")
    call = {**words(20, 16), "height": 192, "width": 256, "num_frames": 9, "guidance_scale": 3.0}
    return CogVideoXPipeline(**BARE, scheduler=scheduler, transformer=cogvideox().module), call


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "wan": wan_pipeline,
    "hunyuan_video": hunyuan_pipeline,
    "mochi": mochi_pipeline,
    "ltx": ltx_pipeline,
    "cogvideox": cogvideox_pipeline,
}


class Pipelines(unittest.TestCase):
    def test_capture_and_apply(self) -> None:
        for name, make in PIPELINES.items():
            with self.subTest(name), folder() as path, contextlib.redirect_stderr(io.StringIO()):
                pipe, call = make()
                pipe.set_progress_bar_config(disable=True)

                def run(pipe: Any = pipe, call: dict[str, Any] = call) -> torch.Tensor:
                    generator = torch.Generator().manual_seed(0)
                    return pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent").frames

                dense = run()
                with calibc.capture(pipe, path / "t") as cap:
                    self.assertTrue(torch.equal(run(), dense))
                    run()
                self.assertEqual(cap.prompts, ["p000", "p001"])
                manifest = json.loads((path / "t/manifest.json").read_text())
                self.assertEqual(len(manifest["shards"]), 2 * STEPS)
                # Noise first, whichever way the model counts.
                sigmas = [step["sigma"] for step in manifest["steps"]]
                self.assertGreater(sigmas[0], 0.99)
                self.assertEqual(sigmas, sorted(sigmas, reverse=True))
                model = MODELS[name]()
                geometry = manifest["geometry"]
                self.assertEqual(tuple(geometry[side] for side in ("frames", "height", "width")), model.grid)
                self.assertEqual(
                    (geometry["text_tokens"], geometry["text_position"]), (model.text_tokens, model.text_position)
                )
                bundle = calibc.compile(path / "t", out=path / "b", target="sm_80", progress=False)
                config = calibc.SparseAttentionConfig(bundle, strict=True)
                steps = []
                with calibc.apply_sparse_attention(pipe, config) as handle:
                    for hook in handle._hooks:
                        hook.set_step = lambda step, hook=hook, do=hook.set_step: (steps.append(step), do(step))
                    self.assertTrue(run().isfinite().all())
                    stats = handle.stats()
                passes = 2 * STEPS if name == "wan" else STEPS
                self.assertEqual((stats.forwards, stats.sparse_calls, stats.fallbacks), (passes, 2 * passes, {}))
                self.assertEqual(sorted(set(steps)), list(range(STEPS)))
                self.assertEqual(steps, sorted(steps))
                if name == "wan":
                    # Both experts had their part.
                    self.assertTrue(all(layer.calls for layer in stats.layers))
                self.assertTrue(torch.equal(run(), dense))


class Reading(unittest.TestCase):
    def test_every_class_has_one_adapter(self) -> None:
        for make in MODELS.values():
            model = make()
            adapter = adapter_of(model.module)
            self.assertEqual(
                (len(adapter.layers()), adapter.heads, adapter.head_dim), (model.layers, model.heads, model.head_dim)
            )
            self.assertEqual(adapter.text_position, model.text_position)
            call = adapter.bind((), model.inputs(0.25, 0))
            self.assertEqual((call.grid, call.tokens), (model.grid, model.tokens))
            self.assertAlmostEqual(Timesteps(adapter).level(call.timestep), 0.25)
        self.assertEqual(len({adapter.model_class for adapter in ADAPTERS}), len(MODELS))

    def test_compiled_modules_stand_for_those_inside(self) -> None:
        module = wan().module
        self.assertEqual(transformers_of(torch.compile(module)), {"transformer": module})

    def test_timesteps_give_the_schedule_they_are_cut_from(self) -> None:
        timesteps = Timesteps(adapter_of(wan().module))
        schedule = torch.tensor([1000.0, 900.0, 400.0])
        levels = [1.0, 0.9, 0.4]
        for i in range(3):
            cut = schedule[i].expand(2)
            self.assertEqual((timesteps.level(cut), timesteps.schedule(cut)), (levels[i], levels))
        # Changed in place, and another list.
        schedule[2] = 300.0
        self.assertEqual(timesteps.schedule(schedule[0]), [1.0, 0.9, 0.3])
        self.assertEqual(timesteps.schedule(torch.tensor([800.0, 100.0])[1]), [0.8, 0.1])
        self.assertIsNone(timesteps.schedule(torch.tensor([800.0])))
        self.assertIsNone(timesteps.schedule(torch.tensor([1.0, 2.0])[0]))
        self.assertEqual(timesteps.level(250), 0.25)
        self.assertEqual(Timesteps(adapter_of(mochi().module)).schedule(torch.tensor([0.0, 100.0])[0]), [1.0, 0.9])

    def test_progress(self) -> None:
        progress = Progress()
        seen = [progress.advance(level) for level in (1.0, 1.0, 0.5, 0.5, 0.5, 0.2, 0.9)]
        self.assertEqual(
            [(p.step, p.turn, p.starts) for p in seen],
            [
                (0, 0, True),
                (0, 1, False),
                (1, 0, False),
                (1, 1, False),
                (1, 2, False),
                (2, 0, False),
                (0, 0, True),
            ],
        )
        progress.reset()
        self.assertTrue(progress.advance(0.9).starts)

    def test_text_lengths_are_read_once(self) -> None:
        texts = TextLengths()
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        self.assertEqual(texts.read(mask), [2, 1])
        with torch.inference_mode():
            self.assertIsNone(texts.read(torch.tensor([[0, 1, 1]])))
        known = len(texts._known)
        self.assertEqual(texts.read(mask), [2, 1])
        self.assertEqual(len(texts._known), known)
        mask[0, 2] = 1
        self.assertEqual(texts.read(mask), [3, 1])


if __name__ == "__main__":
    unittest.main()

"""A bundle inside diffusers' own classes: what it computes, when it declines, and that nothing is left behind."""

from __future__ import annotations

import unittest
import warnings
from unittest import mock

try:
    import diffusers
    import torch
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing

import calibc
from calibc.apply import (
    FallbackWarning,
    Handle,
    NotCovered,
    SparseAttentionConfig,
    apply_sparse_attention,
    remove_sparse_attention,
)
from diffusers.hooks.hooks import HookRegistry
from diffusers_models import MODELS, Tiny, compile_masks, folder, hunyuan_video, ltx, masked, mochi, random_masks, wan
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

SIGMAS = [1.0, 0.75, 0.4]
# Rounding of float32 through two layers.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def plan(model: Tiny, share: float = 0.4, sigmas: list[float] = SIGMAS) -> tuple[calibc.Bundle, Tensor]:
    """A bundle with random masks of `model`, and the masks."""
    masks = random_masks(model, len(sigmas), share)
    if share >= 1:
        masks[:] = True
    with folder() as path:
        return calibc.Bundle(compile_masks(model, masks, sigmas, path)), masks


def processors(module: nn.Module) -> list[object]:
    return [m.processor for m in module.modules() if hasattr(m, "processor")]


class EveryModel(unittest.TestCase):
    def test_all_blocks_kept_is_dense(self) -> None:
        for name, make in MODELS.items():
            with self.subTest(name):
                model = make()
                want = model(0.75)
                with apply_sparse_attention(model.module, plan(model, 1.0)[0]) as handle:
                    torch.testing.assert_close(model(0.75), want, **CLOSE)
                    stats = handle.stats()
                self.assertEqual((stats.calls, stats.sparse_calls, stats.density), (model.layers, model.layers, 1.0))

    def test_masks_are_those_of_layer_and_step(self) -> None:
        for name, make in MODELS.items():
            model = make()
            bundle, masks = plan(model)
            dense = model(0.75)
            with apply_sparse_attention(model.module, bundle) as handle:
                for step, level in enumerate(SIGMAS):
                    with self.subTest(name, step=step):
                        got = model(level, seed=step)
                        with masked(fresh := make(), masks[step]):
                            want = fresh(level, seed=step)
                        torch.testing.assert_close(got, want, **CLOSE)
                stats = handle.stats()
            self.assertEqual(stats.sparse_calls, 3 * model.layers, name)
            kept = masks.float().mean((0, 2, 3, 4))
            for layer, share in zip(stats.layers, kept.tolist(), strict=True):
                self.assertAlmostEqual(layer.density, share, places=5)
            self.assertGreater(float((got - dense).abs().max()), 1e-3)

    def test_removing_restores(self) -> None:
        for name, make in MODELS.items():
            with self.subTest(name):
                model = make()
                want, before, forward = model(0.75), processors(model.module), model.module.forward
                handle = apply_sparse_attention(model.module, plan(model)[0])
                self.assertFalse(torch.equal(model(0.75), want))
                self.assertEqual(
                    sum(a is not b for a, b in zip(before, processors(model.module), strict=True)), model.layers
                )
                handle.remove()
                handle.remove()
                self.assertTrue(all(a is b for a, b in zip(before, processors(model.module), strict=True)))
                self.assertEqual(model.module.forward, forward)
                self.assertFalse(hasattr(model.module, "_diffusers_hook"))
                self.assertTrue(torch.equal(model(0.75), want))
                # What was counted stays.
                self.assertEqual(handle.stats().sparse_calls, model.layers)

    def test_half_precision(self) -> None:
        for make in (wan, mochi):
            model = make()
            bundle, masks = plan(model)
            model.module.to(torch.bfloat16)

            def call(model: Tiny = model) -> Tensor:
                inputs = model.inputs(0.75, 0)
                half = {
                    k: v.to(torch.bfloat16) if torch.is_tensor(v) and v.dtype == torch.float32 else v
                    for k, v in inputs.items()
                }
                with torch.no_grad():
                    return model.module(**half, return_dict=False)[0]

            with masked(model, masks[1]):
                want = call()
            with apply_sparse_attention(model.module, bundle) as handle:
                torch.testing.assert_close(call(), want, rtol=0.05, atol=0.05)
                self.assertEqual(handle.stats().sparse_calls, model.layers)


class Steps(unittest.TestCase):
    def setUp(self) -> None:
        self.model = wan()
        self.bundle, self.masks = plan(self.model)

    def ran(self, handle: Handle) -> int:
        return int(handle._hooks[0].control.step)

    def test_nearest_noise_level(self) -> None:
        with apply_sparse_attention(self.model.module, self.bundle) as handle:
            for level, step in ((1.0, 0), (0.96, 0), (0.78, 1), (0.71, 1), (0.44, 2), (0.36, 2), (0.99, 0)):
                self.model(level)
                self.assertEqual(self.ran(handle), step, level)

    def test_unknown_noise_level_falls_back(self) -> None:
        want = self.model(0.6)
        with (
            apply_sparse_attention(self.model.module, self.bundle) as handle,
            self.assertWarnsRegex(FallbackWarning, "0.15 from"),
        ):
            self.assertTrue(torch.equal(self.model(0.6), want))
        self.assertEqual(handle.stats().fallbacks, {"unknown sigma": 2})
        wide = SparseAttentionConfig(self.bundle, sigma_tolerance=0.3)
        with apply_sparse_attention(self.model.module, wide) as handle:
            self.model(0.6)
            self.assertEqual(self.ran(handle), 1)

    def test_context_says_sigma_and_step(self) -> None:
        module = self.model.module
        with apply_sparse_attention(module, self.bundle) as handle:
            with module.cache_context("cond", step_index=2, sigma=0.4, num_inference_steps=3):
                # The timestep says otherwise; the context counts.
                self.model(1.0)
            self.assertEqual(self.ran(handle), 2)
            # A step number that its sigma contradicts does not.
            with module.cache_context("cond", step_index=2, sigma=1.0, num_inference_steps=3):
                self.model(1.0)
            self.assertEqual(self.ran(handle), 0)
            with module.cache_context("cond"):
                self.model(0.75)
            self.assertEqual(self.ran(handle), 1)

    def test_steps_by_number(self) -> None:
        module = self.model.module
        config = SparseAttentionConfig(self.bundle, match="step")
        with apply_sparse_attention(module, config) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            seen = []
            # Two passes a step, four steps; then the next generation.
            for level in (0.9, 0.9, 0.8, 0.8, 0.2, 0.2, 0.1, 0.1, 0.9, 0.8):
                self.model(level)
                seen.append(self.ran(handle))
            self.assertEqual(seen, [0, 0, 1, 1, 2, 2, 2, 2, 0, 1])
            self.assertEqual(handle.stats().fallbacks, {"unknown step": 4})
            # The end of a pipeline resets the count, also where the noise does not rise.
            HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks()
            self.model(0.05)
            self.assertEqual(self.ran(handle), 0)

    def test_timesteps_per_token(self) -> None:
        inputs = self.model.inputs(0.75, 0)
        inputs["timestep"] = torch.full((1, self.model.tokens), 750.0)
        inputs["timestep"][:, :256] = 0
        with apply_sparse_attention(self.model.module, self.bundle) as handle, torch.no_grad():
            self.model.module(**inputs)
            self.assertEqual((self.ran(handle), handle.stats().sparse_calls), (1, 2))

    def test_experts_share_a_generation(self) -> None:
        class Pipeline:
            transformer = self.model.module
            transformer_2 = wan().module

        config = SparseAttentionConfig(self.bundle, match="step")
        with apply_sparse_attention(Pipeline(), config) as handle:
            seen = []
            for expert, level in ((0, 0.9), (0, 0.8), (1, 0.3), (0, 0.9)):
                with torch.no_grad():
                    (Pipeline.transformer, Pipeline.transformer_2)[expert](**self.model.inputs(level, 0))
                seen.append(int(handle._hooks[expert].control.step))
            self.assertEqual(seen, [0, 1, 2, 0])
            self.assertEqual([s.calls for s in handle.stats().layers], [3, 3, 1, 1])
            self.assertTrue(handle.stats().layers[2].name.startswith("transformer_2.blocks.0"))
        remove_sparse_attention(Pipeline())


class Fallbacks(unittest.TestCase):
    """Each reason, by what a user would do to meet it."""

    def declined(
        self, model: Tiny, bundle: calibc.Bundle, reason: str, *, want: Tensor | None = None, **change: object
    ) -> None:
        inputs = {**model.inputs(0.75, 0), **change}
        with torch.no_grad():
            want = model.module(**inputs, return_dict=False)[0] if want is None else want
            with apply_sparse_attention(model.module, bundle) as handle:
                with self.assertWarns(FallbackWarning):
                    got = model.module(**inputs, return_dict=False)[0]
                with warnings.catch_warnings():
                    # Once is enough.
                    warnings.simplefilter("error", FallbackWarning)
                    model.module(**inputs)
            self.assertTrue(torch.equal(got, want), reason)
            self.assertEqual(handle.stats().fallbacks, {reason: 2 * model.layers})
            self.assertEqual(handle.stats().sparse_calls, 0)
            strict = SparseAttentionConfig(bundle, strict=True)
            with apply_sparse_attention(model.module, strict), self.assertRaisesRegex(NotCovered, reason):
                model.module(**inputs)

    def test_shape(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        self.declined(model, bundle, "shape", hidden_states=torch.randn(1, 4, 2, 32, 32))
        # As many tokens, another grid.
        self.declined(model, bundle, "shape", hidden_states=torch.randn(1, 4, 3, 64, 16))

    def test_text_length(self) -> None:
        model = MODELS["cogvideox"]()
        self.declined(model, plan(model)[0], "text length", encoder_hidden_states=torch.randn(2, 12, 16))
        model = hunyuan_video()
        longer = {"encoder_hidden_states": torch.randn(1, 50, 16), "encoder_attention_mask": torch.ones(1, 50).long()}
        self.declined(model, plan(model)[0], "text length", **longer)

    def test_masks(self) -> None:
        model = hunyuan_video()
        bundle, _ = plan(model)
        padded_first = (torch.arange(48) >= 20)[None].long()
        self.declined(model, bundle, "mask", encoder_attention_mask=padded_first)
        model = MODELS["cogvideox"]()
        bundle, _ = plan(model)
        mask = torch.zeros(2, model.tokens)
        self.declined(model, bundle, "mask", attention_kwargs={"attention_mask": mask})

    def test_dtype(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        model.module.double()
        twice = {k: v.double() for k, v in model.inputs(0.75, 0).items()}
        self.declined(model, bundle, "dtype", **twice)

    def test_device(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        model.module.to("meta")
        inputs = {k: v.to("meta") for k, v in model.inputs(0.75, 0).items()}
        # A timestep that can be read.
        inputs["timestep"] = torch.tensor([750.0])
        with apply_sparse_attention(model.module, SparseAttentionConfig(bundle, strict=True)):
            with self.assertRaisesRegex(NotCovered, "gpu: there are no kernels for meta devices"), torch.no_grad():
                model.module(**inputs)

    def test_gradients(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        inputs = model.inputs(0.75, 0)
        want = model.module(**inputs).sample
        with apply_sparse_attention(model.module, bundle) as handle, self.assertWarns(FallbackWarning):
            got = model.module(**inputs).sample
            got.sum().backward()
        self.assertTrue(torch.equal(got, want))
        self.assertEqual(handle.stats().fallbacks, {"gradient": 2})

    def test_what_processors_know(self) -> None:
        """Dropout, causality and context parallelism, which no adapted class of today asks for by itself."""
        model = wan()
        bundle, _ = plan(model)
        q = torch.randn(1, model.tokens, 2, 64)
        with apply_sparse_attention(model.module, bundle) as handle:
            hook = handle._hooks[0]
            hook.pre_forward(model.module, **model.inputs(0.75, 0))
            layer, stand_in = hook.layers[0], hook.processors[0].stand_in
            from calibc.adapters.dispatch import _attend

            for reason, change in (("dropout", {"dropout_p": 0.1}), ("causal", {"is_causal": True})):
                _attend(q, q, q, backend=stand_in, **change)
                self.assertEqual(layer.outcome, reason)
            with mock.patch("calibc.adapters.dispatch.dispatch_attention_fn") as before:
                _attend(q, q, q, backend=stand_in, parallel_config="two GPUs")
            self.assertEqual(layer.outcome, "context parallelism")
            self.assertEqual(before.call_args.kwargs["parallel_config"], "two GPUs")
            # A cross-attention shape, tensors elsewhere.
            _attend(q, q[:, :16], q[:, :16], backend=stand_in)
            self.assertEqual(layer.outcome, "shape")
            self.assertIsNone(layer.attend(*[torch.empty(1, 2, model.tokens, 64, device="meta")] * 3))
            self.assertEqual(layer.outcome, "device")

    def test_replaced_processor(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        with apply_sparse_attention(model.module, bundle) as handle, self.assertWarnsRegex(FallbackWarning, "replaced"):
            mine = diffusers.models.transformers.transformer_wan.WanAttnProcessor()
            model.module.blocks[1].attn1.processor = mine
            model(0.75)
            self.assertEqual(handle.stats().fallbacks, {"processor": 1})
            self.assertEqual([s.density for s in handle.stats().layers][1], 1.0)
        self.assertIs(model.module.blocks[1].attn1.processor, mine)

    def test_fallback_goes_where_it_went(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        backend = diffusers.models.attention_dispatch.AttentionBackendName
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            for config, want in ((None, backend._NATIVE_MATH), ("native", "native")):
                with apply_sparse_attention(model.module, SparseAttentionConfig(bundle, fallback=config)):
                    # Also a backend that is chosen later.
                    for block in model.module.blocks:
                        block.attn1.processor._attention_backend = backend._NATIVE_MATH
                    with mock.patch(
                        "calibc.adapters.dispatch.dispatch_attention_fn", side_effect=lambda q, k, v, **_: q
                    ) as spy:
                        model(0.6)
                self.assertEqual({call.kwargs["backend"] for call in spy.call_args_list}, {want})
        self.assertEqual(model.module.blocks[0].attn1.processor._attention_backend, backend._NATIVE_MATH)


class Text(unittest.TestCase):
    def test_other_prompts(self) -> None:
        """One plan for prompts of any length, those of a batch apart."""
        for make, lengths in ((hunyuan_video, (1, 20, 48)), (mochi, ((48, 48), (1, 30), (7, 7)))):
            bundle, masks = plan(make())
            for real in lengths:
                with self.subTest(make.__name__, real=real):
                    model = make(real)
                    with masked(model, masks[0]):
                        want = model(1.0)
                    with apply_sparse_attention(model.module, bundle) as handle:
                        torch.testing.assert_close(model(1.0), want, **CLOSE)
                    self.assertEqual(handle.stats().sparse_calls, 2)

    def test_shorter_padding(self) -> None:
        """A pipeline with a smaller max_sequence_length."""
        model = hunyuan_video()
        bundle, masks = plan(model)
        inputs = model.inputs(1.0, 0)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :30]
        inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"][:, :30]
        with torch.no_grad():
            with masked(model, masks[0]):
                want = model.module(**inputs).sample
            with apply_sparse_attention(model.module, bundle) as handle:
                torch.testing.assert_close(model.module(**inputs).sample, want, **CLOSE)
        self.assertEqual(handle.stats().sparse_calls, 2)

    def test_free_coordinates(self) -> None:
        """LTX without a grid: the number of tokens must do."""
        model = ltx()
        bundle, _ = plan(model)
        inputs = model.inputs(0.75, 0)
        coords = torch.rand(2, 3, 500)
        for name in ("num_frames", "height", "width"):
            del inputs[name]
        with apply_sparse_attention(model.module, bundle) as handle, torch.no_grad():
            model.module(**inputs, video_coords=coords)
        self.assertEqual(handle.stats().sparse_calls, 2)


class Compiled(unittest.TestCase):
    def tearDown(self) -> None:
        torch._dynamo.reset()

    def test_one_graph_for_all_layers_and_steps(self) -> None:
        # More layers than torch.compile tolerates recompilations.
        model = wan(layers=10, frames=2)
        bundle, masks = plan(model)
        module = model.module
        want = []
        for step, level in enumerate(SIGMAS):
            with masked(model, masks[step]):
                want.append(model(level))
        dense = model(0.75)
        counter = CompileCounterWithBackend("aot_eager")
        handle = apply_sparse_attention(module, bundle)
        module.compile_repeated_blocks(fullgraph=True, backend=counter)
        for _ in range(2):
            for level, expected in zip(SIGMAS, want, strict=True):
                torch.testing.assert_close(model(level), expected, **CLOSE)
        self.assertEqual(counter.frame_count, 1)
        self.assertEqual((handle.stats().calls, handle.stats().sparse_calls), (60, 60))
        # Falling back is another graph; coming back is not.
        with self.assertWarns(FallbackWarning):
            model(0.6)
        model(0.75)
        self.assertEqual(counter.frame_count, 2)
        self.assertEqual(handle.stats().fallbacks, {"unknown sigma": 10})
        handle.remove()
        torch.testing.assert_close(model(0.75), dense, **CLOSE)

    def test_one_graph_for_all_prompts(self) -> None:
        module = hunyuan_video().module
        bundle, masks = plan(hunyuan_video())
        handle = apply_sparse_attention(module, bundle)
        counter = CompileCounterWithBackend("aot_eager")
        for block in (*module.transformer_blocks, *module.single_transformer_blocks):
            block.compile(fullgraph=True, backend=counter)
        for real in (3, 20, 48, 11):
            with masked(model := hunyuan_video(real), masks[2]):
                want = model(0.4)
            with torch.no_grad():
                got = module(**model.inputs(0.4, 0)).sample
            torch.testing.assert_close(got, want, **CLOSE)
        # A dual-stream and a single-stream block.
        self.assertEqual(counter.frame_count, 2)
        self.assertEqual(handle.stats().sparse_calls, 8)

    def test_every_model_compiles_whole(self) -> None:
        for name in ("mochi", "ltx", "cogvideox"):
            with self.subTest(name):
                torch._dynamo.reset()
                model = MODELS[name]()
                bundle, masks = plan(model)
                with masked(model, masks[2]):
                    want = model(0.4)
                with apply_sparse_attention(model.module, bundle) as handle:
                    for block in model.module.transformer_blocks:
                        block.compile(fullgraph=True, backend="aot_eager")
                    torch.testing.assert_close(model(0.4), want, **CLOSE)
                    self.assertEqual(handle.stats().sparse_calls, 2)


class Misuse(unittest.TestCase):
    def test_other_models(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        with self.assertRaisesRegex(calibc.BadInput, "layers 2 against 3"):
            apply_sparse_attention(wan(layers=3).module, bundle)
        with self.assertRaisesRegex(calibc.BadInput, "head_dim 64 against 128, text_position none against after"):
            apply_sparse_attention(hunyuan_video().module, bundle)
        with self.assertRaisesRegex(calibc.Usage, "Linear has no adapter"):
            apply_sparse_attention(nn.Linear(1, 1), bundle)
        with self.assertRaisesRegex(calibc.Usage, "neither a transformer nor a pipeline"):
            apply_sparse_attention("wan", bundle)

    def test_nothing_changes_where_applying_fails(self) -> None:
        class Pipeline:
            transformer = wan().module
            transformer_2 = wan(layers=3).module

        before = processors(Pipeline.transformer)
        with self.assertRaises(calibc.BadInput):
            apply_sparse_attention(Pipeline(), plan(wan())[0])
        self.assertTrue(all(a is b for a, b in zip(before, processors(Pipeline.transformer), strict=True)))
        with self.assertRaisesRegex(calibc.Usage, "there are bundles for"):
            apply_sparse_attention(Pipeline(), SparseAttentionConfig({"transformer": plan(wan())[0]}))

    def test_twice(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        apply_sparse_attention(model.module, bundle)
        with self.assertRaisesRegex(calibc.Usage, "already"):
            apply_sparse_attention(model.module, bundle)
        remove_sparse_attention(model.module)
        apply_sparse_attention(model.module, bundle).remove()

    def test_window(self) -> None:
        model = wan()
        with self.assertRaisesRegex(calibc.Usage, "at least 2"):
            apply_sparse_attention(model.module, SparseAttentionConfig(plan(model)[0], resident_steps=1))

    def test_set_step(self) -> None:
        model = wan()
        with apply_sparse_attention(model.module, plan(model)[0]) as handle:
            handle.set_step(2)
            self.assertEqual(int(handle._hooks[0].control.step), 2)
            with self.assertRaisesRegex(calibc.BadInput, "step 3 is out of range"):
                handle.set_step(3)

    def test_backends(self) -> None:
        model = wan()
        bundle, _ = plan(model)
        with self.assertRaisesRegex(calibc.Usage, "`fast` is no attention backend"):
            apply_sparse_attention(model.module, SparseAttentionConfig(bundle, fallback="fast"))
        with self.assertRaisesRegex(calibc.Usage, "no choice of backends"):
            other = mochi()
            apply_sparse_attention(other.module, SparseAttentionConfig(plan(other)[0], fallback="flash"))

    def test_foreign_processor(self) -> None:
        model = wan()
        model.module.blocks[0].attn1.processor = diffusers.models.attention_processor.AttnProcessor2_0()
        with self.assertRaisesRegex(calibc.Usage, "AttnProcessor2_0.__call__ does not go through"):
            apply_sparse_attention(model.module, plan(model)[0])


if __name__ == "__main__":
    unittest.main()

"""`calibc.sensitivity`: what it measures against closed forms, that both its ways agree, and that it leaves no traces but in the trace."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
import runpy
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

try:
    import torch
    from diffusers import DiffusionPipeline  # noqa: F401
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing

import calibc
import safetensors.torch
from calibc import CaptureConfig, SensitivityConfig, _native, capture, sensitivity
from calibc.adapters import adapter_of
from calibc.sensitivities import _interpolated, errors
from calibc.sensitivities.errors import Span
from calibc.statistics import Geometry
from diffusers_models import BLOCK, MODELS, Tiny, compile_masks, folder, masked, random_masks, wan
from sensitivity_models import (
    GAIN,
    QUICK,
    SCALE,
    SIGMAS,
    closed_form,
    definitions,
    heads_of,
    least,
    linear,
    manifest,
    quiet,
    row_losses,
    sampler,
    setup,
    slices,
    traced,
    without,
)
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[2]


class ClosedForms(unittest.TestCase):
    def test_steps(self) -> None:
        """A linear velocity: an error at a step goes through the sampler's later steps as anything does."""
        model = linear(strength=0.0)
        conditional, unconditional = GAIN, 0.0
        gain = unconditional + SCALE * (conditional - unconditional)
        with folder() as path:
            result = sensitivity(
                model.module, traced(model, path / "t"), sampler(model), dataclasses.replace(QUICK, steps=3)
            )
        lengths = [then - level for level, then in zip(SIGMAS, [*SIGMAS[1:], 0.0], strict=True)]
        want = []
        for step, length in enumerate(lengths):
            left = torch.tensor([1 + gain * later for later in lengths[step + 1 :]]).prod()
            want.append(float((length * left) ** 2))
        torch.testing.assert_close(result.step, torch.tensor(want), rtol=1e-4, atol=0)
        # Heads that do nothing cost nothing.
        self.assertEqual(float(result.head.abs().max()), 0)
        self.assertEqual(result.measured, (0, 1, 2))

    def test_steps_weigh_errors_as_plans_make_them(self) -> None:
        """A sampler that forgives white noise, but not what dropped blocks do."""
        model = wan()

        def weights(kind: Any) -> Tensor:
            config = dataclasses.replace(QUICK, steps=[0], errors=kind, projections=1)
            return sensitivity(model.module, path, forgiving, config).step

        with setup(lambda: model) as (_, path):
            with torch.no_grad():
                right = model(1.0)
                keep = torch.zeros(model.layers, model.heads, model.blocks, model.blocks, dtype=torch.bool)
                keep[..., torch.arange(model.blocks), torch.arange(model.blocks)] = True
                with masked(model, keep):
                    direction = model(1.0) - right
            direction /= direction.norm()

            def forgiving() -> Tensor:
                latents = sampler(model, guided=False)()
                return (latents * direction).sum() * direction

            white, blocks = float(weights("noise")[0]), float(weights("blocks")[0])
        self.assertGreater(blocks, 30 * white)

    def test_heads(self) -> None:
        """A velocity that is linear in the heads' outputs, where branches are alike: guidance changes nothing."""
        model = linear()
        with folder() as path:
            traced(model, path / "t")
            latents = model.inputs(1.0, 0)["hidden_states"]
            want = {
                kind: torch.tensor(
                    [[closed_form(model, h, kind, latents.numel()) for h in row] for row in heads_of(model, latents)]
                )
                for kind in ("blocks", "noise")
            }
            self.assertGreater(float((want["blocks"] / want["noise"] - 1).abs().max()), 0.05)
            for (kind, values), method in itertools.product(want.items(), ("gradient", "exact")):
                with self.subTest(kind=kind, method=method):
                    config = SensitivityConfig(
                        method=method,
                        errors=kind,
                        steps=[0],
                        guidance_scale=SCALE,
                        projections=32 if method == "gradient" else 1,
                        head_error=0.02,
                        progress=False,
                    )
                    got = sensitivity(model.module, path / "t", sampler(model), config).head
                    # One measured step serves all.
                    self.assertTrue(torch.equal(got[0], got[2]))
                    # Six blocks x 32 projections: 10 % of standard error.
                    torch.testing.assert_close(got[0], values, rtol=0.3 if method == "gradient" else 0.06, atol=0)

    def test_guidance_adds_branches_before_squares(self) -> None:
        """Errors of both branches are one error: with gradients that are alike, s of one and 1 - s of the other are 1."""
        model = linear()
        with folder() as path:
            traced(model, path / "t")
            got = [
                sensitivity(
                    model.module,
                    path / "t",
                    sampler(model, guided=guided),
                    dataclasses.replace(QUICK, steps=[0], guidance_scale=scale),
                )
                for guided, scale in ((False, None), (True, 3.0), (True, 7.5))
            ]
        for other in got[1:]:
            torch.testing.assert_close(other.head, got[0].head, rtol=1e-3, atol=0)


class Directions(unittest.TestCase):
    """The arithmetic of `errors` against autograd and definitions, with text and ragged ends."""

    GEOMETRIES = (
        Geometry(3, 10, 12, 0, "none"),
        Geometry(3, 10, 12, 40, "after"),
        Geometry(3, 10, 12, 40, "before"),
    )

    def tensors(self, geometry: Geometry) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [torch.randn(2, geometry.tokens, 64, generator=generator) for _ in range(4)]

    def test_spans(self) -> None:
        self.assertEqual([Span.of(g) for g in self.GEOMETRIES], [Span(0, 3), Span(0, 2), Span(1, 4)])
        self.assertEqual(Span.of(Geometry(2, 8, 8, 5, "after")), Span(0, 1))
        self.assertEqual(Span(1, 4).tokens(400), slice(128, 400))

    def test_blocks(self) -> None:
        for geometry in self.GEOMETRIES:
            with self.subTest(str(geometry)):
                q, k, v, g = self.tensors(geometry)
                span, blocks = Span.of(geometry), slices(geometry.tokens)
                rows = torch.arange(span.first, span.last)[[0, -1]]
                at, columns = [blocks[r] for r in rows], blocks[span.first : span.last]
                dropped = errors.least(q, k, v, 0.2, rows, span, 0.4)
                response = errors.block_responses(q, k, v, g, 0.2, dropped, span)
                self.assertEqual(response.shape, (2, 2, 1))
                for head in range(2):
                    p = (q[head].double() @ k[head].double().T * 0.2).softmax(-1)
                    deviation, energy = definitions(p, v[head].double(), at, blocks)
                    inside = slice(span.first, span.last)
                    want = least(deviation[:, inside], energy[:, inside], 0.4)
                    self.assertTrue(torch.equal(dropped.blocks[head], want) and want.any())
                    everywhere = torch.zeros(deviation.shape, dtype=torch.bool)
                    everywhere[:, inside] = want
                    loss = row_losses(deviation, energy, everywhere)
                    self.assertAlmostEqual(float(dropped.loss[head]) / loss, 1, 4)
                    change = (without(p, want, at, columns) - p) @ v[head].double()
                    error = errors.block_error(q[head], k[head], v[head], 0.2, dropped, head, span)
                    torch.testing.assert_close(error, change.float(), rtol=1e-3, atol=1e-5)
                    for row, tokens in enumerate(at):
                        self.assertAlmostEqual(
                            float(response[head, row, 0]), float((change * g[head].double())[tokens].sum()), 3
                        )

    def test_the_strongest_block_of_a_row_stays(self) -> None:
        """Also where its deviation is least: all of a row's mass on one block."""
        q, k, v, _ = self.tensors(self.GEOMETRIES[0])
        k[:, :BLOCK] = 0.0
        k[:, :BLOCK, 0], q[:, :, 0] = 30.0, 30.0
        dropped = errors.least(q, k, v, 1.0, torch.arange(3), Span(0, 3), 0.99)
        self.assertEqual(dropped.blocks[0].tolist(), [[False, True, True]] * 3)

    def test_small_chunks_are_the_same(self) -> None:
        q, k, v, g = self.tensors(self.GEOMETRIES[0])
        span, rows = Span(0, 3), torch.arange(3)

        def everything() -> list[Tensor]:
            dropped = errors.least(q, k, v, 0.2, rows, span, 0.5)
            error = errors.block_error(q[1], k[1], v[1], 0.2, dropped, 1, span)
            response = errors.block_responses(q, k, v, g, 0.2, dropped, span)
            return [dropped.loss, dropped.blocks.float(), error, response]

        whole = everything()
        with mock.patch.object(errors, "_CHUNK", 1):
            for a, b in zip(whole, everything(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_noise(self) -> None:
        for geometry in self.GEOMETRIES:
            _, _, out, g = self.tensors(geometry)
            span, blocks = Span.of(geometry), slices(geometry.tokens)
            error = errors.noise_error(out[0], 0.1, 3, span)
            response = errors.noise_responses(out, g, 3, span)
            self.assertEqual(response.shape[:2], (2, span.count))
            for row, tokens in enumerate(blocks):
                inside = span.first <= row < span.last
                part = float(error[tokens].square().sum() / out[0, tokens].square().sum())
                self.assertAlmostEqual(part, 0.01 if inside else 0, 5)
                if inside:
                    along = float((g[0] * error)[tokens].sum())
                    self.assertAlmostEqual(float(response[0, row - span.first, 0]) * 0.1, along, 3)


def ranks(x: Tensor) -> Tensor:
    return x.flatten().argsort().argsort().double()


class EveryModel(unittest.TestCase):
    def test_gradient_is_exact(self) -> None:
        for name, make in MODELS.items():
            with self.subTest(name), folder() as path:
                model = make()
                # Heads of different weight.
                heads = itertools.product(adapter_of(model.module).layers(), range(model.heads))
                for i, (attn, head) in enumerate(heads):
                    with torch.no_grad():
                        attn.to_v.weight.view(model.heads, model.head_dim, -1)[head] *= 1.6**i
                traced(model, path / "t", [1.0])
                run = sampler(model, [1.0])
                for kind in ("blocks", "noise") if name == "wan" else ("blocks",):
                    few = dataclasses.replace(QUICK, steps=1, errors=kind, projections=10)
                    got = sensitivity(model.module, path / "t", run, few)
                    exact = dataclasses.replace(few, method="exact", projections=1)
                    want = sensitivity(model.module, path / "t", run, exact)
                    self.assertTrue(torch.equal(got.step, want.step))
                    self.assertEqual(got.head.shape, (1, model.layers, model.heads))
                    self.assertGreater(float(want.head.max() / want.head.min()), 2, name)
                    ratio = (got.head / want.head).log2()
                    # Random attention is nearly even: all rows lose the same, which the gradient takes as independent.
                    self.assertLess(float(ratio.abs().max()), 0.7 if kind == "noise" else 1.2, (name, kind))
                    a, b = ranks(got.head), ranks(want.head)
                    self.assertGreater(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), 0.75, (name, kind))
                self.assertEqual(_native.main(["calibc", "trace", "check", str(path / "t"), "-q"]), 0)

    def test_it_predicts_what_dropped_blocks_do(self) -> None:
        """u times the row losses that a trace tells, against the velocity of a model without these blocks."""
        with folder() as path:
            model = wan(frames=6)
            config = CaptureConfig(sigmas=[1.0], anchors=(), rows_per_block=128, encoding="f32", progress=False)
            run = sampler(model, [1.0], guided=False)
            with quiet(), capture(model.module, path / "t", config) as cap, cap.prompt("a"):
                run()
            u = sensitivity(model.module, path / "t", run, SensitivityConfig(projections=8, progress=False)).head[0]
            shard = safetensors.torch.load_file(path / "t/a/s000.cond.safetensors")
            right = model(1.0)
            shape = (model.layers, model.heads, model.blocks, model.blocks)
            for layer, head in itertools.product(range(model.layers), range(model.heads)):
                deviation, energy = (shard[f"layers.{layer}.block_{kind}"][head] for kind in ("deviation", "energy"))
                keep = torch.ones(shape, dtype=torch.bool)
                keep[layer, head] = ~(drop := least(deviation, energy, 0.5))
                with masked(model, keep):
                    wrong = model(1.0)
                found = float((wrong - right).double().square().mean())
                want = float(u[layer, head]) * row_losses(deviation, energy, drop)
                self.assertLess(abs(found / want - 1), 0.5, (layer, head))


class Results(unittest.TestCase):
    def test_file(self) -> None:
        with setup() as (model, path):
            before = manifest(path)
            with mock.patch("sys.stderr", new=io.StringIO()) as said:
                first = sensitivity(model.module, path, sampler(model), QUICK)
            self.assertEqual(said.getvalue(), "")
            after = manifest(path)
            entry = after.pop("sensitivity")
            self.assertEqual(after, before)
            self.assertEqual(entry["path"], "sensitivity.safetensors")
            tensors = safetensors.torch.load_file(path / "sensitivity.safetensors")
            self.assertTrue(torch.equal(tensors["step"], first.step) and torch.equal(tensors["head"], first.head))
            self.assertEqual((first.step.dtype, first.head.dtype), (torch.float32, torch.float32))
            # Another takes its place; the first can be put back.
            other = sensitivity(model.module, path, sampler(model), dataclasses.replace(QUICK, seed=1))
            self.assertFalse(torch.equal(first.head, other.head))
            self.assertNotEqual(manifest(path)["sensitivity"]["blake3"], entry["blake3"])
            first.write(path)
            self.assertEqual(manifest(path)["sensitivity"], entry)
            self.assertEqual(_native.main(["calibc", "trace", "check", str(path), "-q"]), 0)

    def test_same_seed_same_numbers(self) -> None:
        with setup() as (model, path):
            for method in ("gradient", "exact"):
                config = dataclasses.replace(QUICK, method=method, projections=1)
                a, b = (sensitivity(model.module, path, sampler(model), config) for _ in range(2))
                self.assertTrue(torch.equal(a.head, b.head) and torch.equal(a.step, b.step))

    def test_prompts_are_averaged(self) -> None:
        with setup() as (model, path):
            runs = [sampler(model, seed=seed) for seed in range(2)]
            # The second prompt has draws of its own.
            config = dataclasses.replace(QUICK, projections=4)
            both = sensitivity(model.module, path, runs, config)
            one = sensitivity(model.module, path, runs[:1], config)
            self.assertFalse(torch.equal(both.step, one.step))
            self.assertLess(float((both.head / one.head).log2().abs().max()), 1)

    def test_between_measured_steps(self) -> None:
        values = torch.tensor([[8.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
        got = _interpolated(values, [1, 3], 6)
        torch.testing.assert_close(got[:, 0], torch.tensor([8.0, 8.0, 4.0, 2.0, 2.0, 2.0]))
        self.assertEqual(got[1, 1], 0)
        self.assertTrue(got.isfinite().all())
        chosen = {(6, 50): [0, 10, 20, 29, 39, 49], (6, 4): [0, 1, 2, 3], (1, 9): [0], ((7, 2), 9): [2, 7]}
        for (steps, count), want in chosen.items():
            self.assertEqual(SensitivityConfig(steps=steps).chosen(count), want)

    def test_known_velocities_are_not_computed_again(self) -> None:
        with setup() as (model, path):
            calls = 0

            def count(*_: Any) -> None:
                nonlocal calls
                calls += 1

            run = sampler(model)
            with model.module.register_forward_pre_hook(count):
                sensitivity(model.module, path, run, dataclasses.replace(QUICK, steps=[0, 2], projections=1))
            # The hook sees what the sampler asks for: one generation, and one per step; and at each of two steps three passes for u and
            # five for the error that w is of.
            self.assertEqual(calls, 3 * 6 + 2 * 8)
            calls = 0
            with model.module.patch_embedding.register_forward_pre_hook(count):
                sensitivity(model.module, path, run, dataclasses.replace(QUICK, steps=[0, 2], projections=1))
            # Computed: one generation, what follows step 0, and the measured passes.
            self.assertEqual(calls, 6 + 4 + 2 * 8)

    def test_types_and_modes(self) -> None:
        """bfloat16 models, samplers under inference_mode, autocast."""
        with setup() as (model, path):
            config = dataclasses.replace(QUICK, projections=4)
            want = sensitivity(model.module, path, sampler(model), config)
            run = sampler(model)

            def under_inference_mode() -> Tensor:
                with torch.inference_mode():
                    return run.__wrapped__()

            with torch.inference_mode():
                same = sensitivity(model.module, path, under_inference_mode, config)
            self.assertTrue(torch.equal(same.head, want.head) and torch.equal(same.step, want.step))

            def autocast() -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return run()

            def half() -> Tensor:
                inputs = model.inputs
                low = dataclasses.replace(
                    model, inputs=lambda *a: {k: x if k == "timestep" else x.bfloat16() for k, x in inputs(*a).items()}
                )
                return sampler(low)()

            for kind, generate in (("autocast", autocast), ("bfloat16", half)):
                if kind == "bfloat16":
                    model.module.to(torch.bfloat16)
                got = sensitivity(model.module, path, generate, config)
                self.assertFalse(torch.equal(got.head, want.head), kind)
                self.assertLess(float((got.head / want.head).log2().abs().max()), 0.4, kind)
                self.assertLess(float((got.step / want.step).log2().abs().max()), 0.2, kind)

    def test_two_experts(self) -> None:
        """A pipeline whose later steps run another transformer, under a guidance of its own."""

        class Pipe:
            guidance_scale = 2.0
            _guidance_scale_2 = 5.0

            def __init__(self, *experts: Any) -> None:
                self.transformer, self.transformer_2 = experts

            def __call__(self, **arguments: Any) -> Any:
                early = float(arguments["timestep"]) > 800
                return (self.transformer if early else self.transformer_2)(**arguments)

        model = wan()
        other = wan()
        with torch.no_grad():
            other.module.proj_out.weight *= 2
        pipe: Any = Pipe(model.module, other.module)
        run = sampler(dataclasses.replace(model, module=pipe))
        with folder() as path, quiet():
            config = CaptureConfig(sigmas=SIGMAS, anchors=(), rows_per_block=16)
            with capture(pipe, path / "t", config) as cap, cap.prompt("a"):
                run()
            both = SensitivityConfig(steps=[0, 1], projections=1)
            said, first, second = (
                sensitivity(pipe, path / "t", run, dataclasses.replace(both, guidance_scale=scale))
                for scale in (None, 2.0, 5.0)
            )
            self.assertTrue(torch.equal(said.head[0], first.head[0]) and torch.equal(said.head[1], second.head[1]))
            self.assertFalse(torch.equal(first.head[0], second.head[0]) or torch.equal(first.head[1], second.head[1]))
            self.assertTrue(
                torch.equal(said.step[:1], first.step[:1]) and torch.equal(said.step[1:2], second.step[1:2])
            )
            # The same first pass, by the same model alone.
            alone = sensitivity(model.module, path / "t", sampler(model), dataclasses.replace(both, guidance_scale=2.0))
            self.assertTrue(torch.equal(alone.head[0], first.head[0]))

    def test_compiled_blocks(self) -> None:
        with setup() as (model, path):
            config = dataclasses.replace(QUICK, projections=1)
            want = sensitivity(model.module, path, sampler(model), config)
            module: Any = model.module
            module.compile_repeated_blocks(backend="eager", fullgraph=True)
            got = sensitivity(module, path, sampler(model), config)
            self.assertTrue(torch.equal(got.head, want.head) and torch.equal(got.step, want.step))

    def test_pipelines_say_their_guidance(self) -> None:
        example = runpy.run_path(str(ROOT / "examples/wan.py"))
        pipe = example["tiny_pipeline"]()
        words = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))

        def run() -> Any:
            return pipe(
                prompt_embeds=words,
                negative_prompt_embeds=torch.zeros(1, 16, 32),
                height=256,
                width=256,
                num_frames=9,
                num_inference_steps=3,
                guidance_scale=4.0,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )

        with folder() as path, quiet():
            with capture(pipe, path / "t", CaptureConfig(anchors=(), rows_per_block=16)) as cap, cap.prompt("a"):
                run()
            config = SensitivityConfig(steps=[0], projections=1)
            said, given, other = (
                sensitivity(pipe, path / "t", run, dataclasses.replace(config, guidance_scale=scale))
                for scale in (None, 4.0, 1.0)
            )
        self.assertTrue(torch.equal(said.head, given.head))
        self.assertFalse(torch.equal(said.head, other.head))


class Untouched(unittest.TestCase):
    def state(self, model: Tiny, path: pathlib.Path) -> list[Any]:
        """Everything that could be left behind."""
        module = model.module
        inner = list(module.modules())
        return [
            [m.__dict__.get("processor") for m in inner],
            [{k: v for k, v in m.__dict__.items() if "checkpointing" in k} for m in inner],
            [set(m.__dict__) for m in inner],
            [p.requires_grad for p in module.parameters()],
            [p.grad for p in module.parameters()],
            [p.clone() for p in module.parameters()],
            {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()},
        ]

    def same(self, a: list[Any], b: list[Any]) -> None:
        for x, y in zip(a, b, strict=True):
            tensors = isinstance(x, list) and any(isinstance(each, Tensor) for each in x)
            self.assertTrue(all(map(torch.equal, x, y)) if tensors else x == y)

    def test_after_success_and_failure(self) -> None:
        for name, make in MODELS.items():
            with self.subTest(name), setup(make, [1.0, 0.5]) as (model, path):
                for i, parameter in enumerate(model.module.parameters()):
                    parameter.requires_grad_(i % 3 != 0)
                if name == "wan":
                    model.module.enable_gradient_checkpointing(lambda block, *args: block(*args))
                (path / ".calibc-lock").touch()
                before = self.state(model, path)
                run = sampler(model, [1.0, 0.5])

                def interrupted(*_: Any, **__: Any) -> Any:
                    raise KeyboardInterrupt

                config = dataclasses.replace(QUICK, steps=[0], projections=1)
                for place, method in (("block_responses", "gradient"), ("block_error", "exact")):
                    with mock.patch.object(errors, place, interrupted), self.assertRaises(KeyboardInterrupt):
                        sensitivity(model.module, path, run, dataclasses.replace(config, method=method))
                    self.same(before, self.state(model, path))
                attempts = 0

                def fails_when_repeated(run: Callable[..., Tensor] = run) -> Tensor:
                    nonlocal attempts
                    attempts += 1
                    return run() if attempts == 1 else run(fails_at=1)

                with self.assertRaises(ZeroDivisionError):
                    sensitivity(model.module, path, fails_when_repeated, config)
                self.assertEqual(attempts, 2)
                self.same(before, self.state(model, path))
                if name != "wan":
                    continue
                sensitivity(model.module, path, run, config)
                self.same(before[:-1], self.state(model, path)[:-1])
                left = sorted(f.name for f in path.iterdir())
                self.assertEqual(left, [".calibc-lock", "a", "manifest.json", "sensitivity.safetensors"])


class Refusals(unittest.TestCase):
    def refused(
        self, error: type[Exception], words: str, target: object, path: pathlib.Path, run: Any, config: Any = QUICK
    ) -> None:
        with self.assertRaisesRegex(error, words):
            sensitivity(target, path, run, config)
        self.assertNotIn("sensitivity", manifest(path))
        self.assertFalse(hasattr(target, "_diffusers_hook"))

    def test_other_models_sizes_and_schedules(self) -> None:
        with setup() as (model, path):
            other = wan(layers=3)
            self.refused(calibc.BadInput, "layers 2 against 3", other.module, path, sampler(other))
            self.refused(
                calibc.BadInput, "in 2 steps, and the trace has 3", model.module, path, sampler(model, SIGMAS[:2])
            )
            self.refused(calibc.BadInput, "noise level 0.3", model.module, path, sampler(model, [1.0, 0.3]))
            longer = sampler(model, [1.0, 0.75, 0.4, 0.2])
            self.refused(calibc.BadInput, "noise level 0.2", model.module, path, longer)
            small = wan(frames=2)
            self.refused(
                calibc.BadInput,
                r"grid \(2, 16, 16\)",
                model.module,
                path,
                sampler(dataclasses.replace(small, module=model.module)),
            )
            ltx = MODELS["ltx"]()
            self.refused(calibc.BadInput, "noise level|grid", ltx.module, path, sampler(ltx))
            with self.assertRaisesRegex(calibc.BadInput, "not a trace"):
                sensitivity(model.module, path / "a", sampler(model), QUICK)
            result = calibc.Sensitivity(torch.ones(3), torch.ones(3, 3, 2), (0,))
            with self.assertRaisesRegex(calibc.BadInput, "3 layers x 2 heads, and the trace .* of 3 x 2 x 2"):
                result.write(path)
            with self.assertRaises(calibc.CalibcError):
                calibc.Sensitivity(torch.full((3,), torch.nan), torch.ones(3, 2, 2), (0,)).write(path)
            self.assertNotIn("sensitivity", manifest(path))

    def test_tiles_and_text_everywhere(self) -> None:
        with folder() as path:
            model = wan()
            for name, geometry, words in (
                ("tiles", {"frames": 3, "height": 16, "width": 16, "tile": (1, 8, 8)}, "raster order"),
                (
                    "text",
                    {"frames": 1, "height": 8, "width": 8, "text_tokens": 9, "text_position": "after"},
                    "text_position|every block",
                ),
            ):
                writer = _native.TraceWriter.open(
                    str(path / name),
                    model="m",
                    layers=2,
                    heads=2,
                    head_dim=64,
                    sigmas=SIGMAS,
                    branches=["cond"],
                    encoding="f32",
                    **geometry,
                )
                n = 6 if name == "tiles" else 1
                writer.begin_prompt("a")
                shard = writer.begin_shard(0, "cond", deviation=False)
                energy = torch.full((2, n, n), 1 / n)
                for layer in range(2):
                    shard.layer(layer, energy.data_ptr())
                shard.finish()
                writer.end_prompt()
                writer.close()
                self.refused(calibc.BadInput, words, model.module, path / name, sampler(model))

    def test_runs(self) -> None:
        with setup() as (model, path):
            run = sampler(model)
            unknown = dataclasses.replace(QUICK, guidance_scale=None)
            self.refused(calibc.Usage, "by how much cannot be told", model.module, path, run, unknown)
            self.refused(calibc.Usage, "returned NoneType", model.module, path, lambda: (run(), None)[1])
            seeds = iter(range(9))
            self.refused(calibc.Usage, "other latents", model.module, path, lambda: sampler(model, seed=next(seeds))())
            turns = iter([True, False])
            self.refused(
                calibc.Usage, "passes|noise level", model.module, path, lambda: sampler(model, guided=next(turns))()
            )
            self.refused(calibc.BadInput, "generated twice", model.module, path, lambda: (run(), run())[1])
            self.refused(calibc.BadInput, "0 steps", model.module, path, lambda: torch.zeros(1))
            self.refused(calibc.Usage, "nothing to run", model.module, path, [])

            def thrice() -> Tensor:
                model(1.0)
                model(1.0)
                return run()

            self.refused(calibc.BadInput, "more than one pass of the branch", model.module, path, thrice)

            def two_videos() -> Tensor:
                with torch.no_grad():
                    return model.module(torch.randn(2, 4, 3, 32, 32), torch.tensor([1000.0]), torch.randn(2, 16, 32))[0]

            self.refused(calibc.BadInput, "2 samples", model.module, path, two_videos)
            self.refused(calibc.Usage, "neither a transformer", object(), path, run)

    def test_plans_and_captures(self) -> None:
        with setup() as (model, path), quiet():
            bundle = compile_masks(model, random_masks(model, 1, 0.5), [1.0], path.parent)
            with (
                calibc.apply_sparse_attention(model.module, bundle),
                self.assertRaisesRegex(calibc.Usage, "runs on a plan"),
            ):
                sensitivity(model.module, path, sampler(model), QUICK)
            with capture(model.module, path.parent / "u"), self.assertRaisesRegex(calibc.Usage, "being captured"):
                sensitivity(model.module, path, sampler(model), QUICK)

    def test_values_that_are_not_finite(self) -> None:
        with setup() as (model, path):
            broken: Any = model.module
            with torch.no_grad():
                broken.proj_out.bias[0] = torch.inf
            self.refused(calibc.BadInput, "not finite", model.module, path, sampler(model))

    def test_configurations(self) -> None:
        wrong = (
            {"method": "guess"},
            {"errors": "any"},
            {"projections": 0},
            {"velocity_noise": -1.0},
            {"head_error": float("nan")},
            {"row_blocks": 0},
            {"dropped": 1.0},
        )
        for fields in wrong:
            with self.assertRaises(calibc.Usage):
                SensitivityConfig(**fields)
        for steps in (0, (9,), (-1,), ()):
            with self.assertRaises(calibc.Usage):
                SensitivityConfig(steps=steps).chosen(9)


if __name__ == "__main__":
    unittest.main()

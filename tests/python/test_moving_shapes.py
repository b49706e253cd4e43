"""The small video model of examples/moving-shapes and its lab: data, sampler, baselines, metrics, and calibc under the real weights."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pathlib
import sys
import tempfile
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

try:
    import torch
    from diffusers import WanTransformer3DModel
except ImportError as missing:
    raise unittest.SkipTest(f"no PyTorch or diffusers here: {missing}") from missing

import calibc
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "moving-shapes"
sys.path.insert(0, str(EXAMPLE))

import baselines  # noqa: E402
import data  # noqa: E402
import lab  # noqa: E402
import metrics  # noqa: E402
import model as models  # noqa: E402
import pictures  # noqa: E402
import policies  # noqa: E402
import sampler  # noqa: E402
import traces  # noqa: E402
import train  # noqa: E402

# As wide as the real videos, but of few frames: 2 x 32 x 32 tokens, 16 blocks.
FRAMES, SIZE = 2, models.SIZE
GRID = baselines.Grid(FRAMES, SIZE // 2, SIZE // 2)
LAYERS, HEADS = models.CONFIG["num_layers"], models.CONFIG["num_attention_heads"]


def setUpModule() -> None:
    # Threads of small tensors wait for each other more than they work, above all on a busy machine.
    global threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)


def tearDownModule() -> None:
    torch.set_num_threads(threads)


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as path:
        yield pathlib.Path(path)


def quiet() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stderr(io.StringIO())


@contextlib.contextmanager
def attention(function: Any) -> Iterator[None]:
    """In here self-attention on the video goes to `function(layer, query, key, value)`."""
    real, calls = F.scaled_dot_product_attention, 0

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        if query.shape != key.shape:
            return real(query, key, value, *args, **kwargs)
        layer, calls = calls % LAYERS, calls + 1
        return function(real, layer, query, key, value)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield
    assert calls, "there was no self-attention"


class Model(unittest.TestCase):
    """What needs the weights. Two steps of a short schedule stand for a generation."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.model = models.load(dtype=torch.float32)
        cls.ids = data.prompts(1, seed=7)
        cls.noise = sampler.noise([3], FRAMES, SIZE)

    def generate(self, guidance: float = sampler.GUIDANCE) -> Tensor:
        return sampler.sample(self.model, self.ids, self.noise, guidance=guidance, stop=2)

    def test_weights_are_the_configured_model_in_bfloat16(self) -> None:
        file = models.WEIGHTS / "diffusion_pytorch_model.safetensors"
        self.assertLessEqual(file.stat().st_size, 24_000_000)
        stored = load_file(file)
        self.assertEqual({tensor.dtype for tensor in stored.values()}, {torch.bfloat16})
        fresh = WanTransformer3DModel(**models.CONFIG).state_dict()
        self.assertEqual({k: v.shape for k, v in stored.items()}, {k: v.shape for k, v in fresh.items()})
        config = json.loads((models.WEIGHTS / "config.json").read_text())
        for name, value in models.CONFIG.items():
            self.assertEqual(config[name], list(value) if isinstance(value, tuple) else value, name)
        for name, tensor in self.model.state_dict().items():
            self.assertTrue(torch.equal(tensor, stored[name].float()), name)

    def test_weights_were_trained(self) -> None:
        # Much less than the variance of noise minus video, which a model that knows nothing leaves.
        generator = torch.Generator().manual_seed(5)
        scenes = data.draw(2, generator)
        video = data.render(scenes, FRAMES, SIZE)
        noise = torch.randn(video.shape, generator=generator)
        sigma = torch.tensor([0.5, 0.8])
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            guess = models.velocity(self.model, (1 - level) * video + level * noise, sigma, data.token_ids(scenes))
        self.assertLess(float((guess - (noise - video)).square().mean()), 0.15)

    def test_generation_on_a_bundle_is_that_of_masked_attention(self) -> None:
        order = baselines.random_order((sampler.STEPS, LAYERS, HEADS), GRID.blocks, seed=1)
        masks = baselines.nearest(order, GRID.blocks**2 // 3)
        masks[1, 2, 0] = True
        with folder() as path:
            tensors = {f"s{s}.l{l}": masks[s, l].to(torch.uint8) for s in range(sampler.STEPS) for l in range(LAYERS)}
            save_file(tensors, path / "masks.safetensors")
            spec = {
                "model": {"layers": LAYERS, "heads": HEADS, "head_dim": 128},
                "geometry": {"frames": GRID.frames, "height": GRID.height, "width": GRID.width},
                "steps": sampler.STEPS,
                "sigmas": sampler.sigmas()[:-1],
                "policy": {"kind": "explicit", "masks": "masks.safetensors"},
                "target": {"dtypes": ["bf16"], "lse": False, "archs": ["sm_80"]},
            }
            (path / "spec.yaml").write_text(json.dumps(spec))
            bundle = calibc.compile(out=path / "b.bundle", spec=path / "spec.yaml", progress=False)
        self.assertTrue(torch.equal(policies.masks_of(bundle, GRID.blocks), masks))
        self.assertAlmostEqual(policies.density_of(bundle), float(masks.float().mean()), places=6)
        with calibc.apply_sparse_attention(self.model, calibc.SparseAttentionConfig(bundle, strict=True)) as handle:
            got = self.generate()
        stats = handle.stats()
        self.assertEqual((stats.forwards, stats.sparse_calls), (4, 4 * LAYERS))
        self.assertAlmostEqual(stats.density, float(masks[:2].float().mean()), places=6)

        passes = 0

        def masked(real: Any, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            nonlocal passes
            # Each step is two passes of all layers.
            keep = masks[passes // (2 * LAYERS), layer].repeat_interleave(128, 1).repeat_interleave(128, 2)
            passes += 1
            return real(query, key, value, attn_mask=keep[None])

        with attention(masked):
            wanted = self.generate()
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
        # Not because masks do not matter.
        self.assertGreater(float((self.generate() - wanted).abs().max()), 1e-3)

    def test_capture_of_a_step_is_brute_force(self) -> None:
        config = calibc.CaptureConfig(
            rows_per_block=128, steps=[1], anchors=(4,), encoding="f32", sigmas=sampler.sigmas()[:-1], progress=False
        )
        with folder() as path, quiet():
            with calibc.capture(self.model, path / "t", config) as cap, cap.prompt("a"):
                captured = self.generate(guidance=1.0)
            shard = load_file(path / "t" / "a" / "s001.cond.safetensors")
            evidence = traces.Evidence(path / "t")
        calls: list[tuple[Tensor, Tensor, Tensor]] = []

        def seen(real: Any, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            calls.append((query[0], key[0], value[0]))
            return real(query, key, value)

        with attention(seen):
            plain = self.generate(guidance=1.0)
        # Other attention code than torch's computes captured steps.
        torch.testing.assert_close(captured, plain, rtol=0, atol=1e-4)
        for layer in range(LAYERS):
            q, k, v = (x.double() for x in calls[LAYERS + layer])
            weights = (q @ k.mT / 128**0.5).softmax(-1).view(HEADS, GRID.blocks, 128, GRID.blocks, 128)
            mass = weights.sum(-1)
            part = torch.einsum("hrick,hckd->hricd", weights, v.view(HEADS, GRID.blocks, 128, 128))
            out = part.sum(3, keepdim=True)
            change = (part - mass[..., None] * out).square().sum(-1).mean(2)
            deviation = (change / out.square().sum(-1).mean(2)).clamp_max(1)
            # The float32 of the model before it: q and k themselves differ by its rounding.
            torch.testing.assert_close(
                shard[f"layers.{layer}.block_energy"].double(), mass.mean(2), rtol=1e-3, atol=1e-6
            )
            torch.testing.assert_close(
                shard[f"layers.{layer}.block_deviation"].double(), deviation, rtol=1e-3, atol=1e-6
            )
        read = evidence.mean("block_energy")
        self.assertEqual(read.shape, (1, LAYERS, HEADS, GRID.blocks, GRID.blocks))
        self.assertTrue(torch.equal(read[0, 2], shard["layers.2.block_energy"]))
        self.assertEqual(evidence.every_step(read).shape[0], sampler.STEPS)


class Data(unittest.TestCase):
    def test_a_seed_is_a_video(self) -> None:
        def video(seed: int) -> Tensor:
            return data.render(data.draw(3, torch.Generator().manual_seed(seed)), 4, 32)

        self.assertTrue(torch.equal(video(1), video(1)))
        self.assertFalse(torch.equal(video(1), video(2)))
        self.assertEqual(video(1).shape, (3, 3, 4, 32, 32))
        self.assertTrue(-1 <= float(video(1).min()) and float(video(1).max()) <= 1)

    def test_prompts_say_what_is_there(self) -> None:
        scenes = data.draw(50, torch.Generator().manual_seed(0))
        ids = data.token_ids(scenes)
        for b in range(50):
            parts = data.describe(ids[b]).split("; ")
            count = int(scenes.words["count"][b]) + 1
            self.assertEqual(len(parts), 1 + count)
            self.assertEqual(int((ids[b] == 0).sum()), 4 * (data.SHAPES - count))
            for i, part in enumerate(parts[1:]):
                self.assertIn(data.FIELDS["colour"][scenes.words["colour"][b, i]], part)
                self.assertIn(data.FIELDS["shape"][scenes.words["shape"][b, i]], part)
        vectors = data.embed(ids)
        self.assertEqual(vectors.shape, (50, data.TOKENS, data.TEXT_DIM))
        # The same word about another shape is another vector; every vector has a word and a subject.
        self.assertEqual(int(vectors.count_nonzero()), 50 * data.TOKENS * 2)
        same = torch.zeros(1, data.TOKENS, dtype=torch.int64)
        self.assertEqual(len(data.embed(same)[0].unique(dim=0)), 1 + data.SHAPES)

    def test_shapes_bounce_and_stay_inside(self) -> None:
        scenes = data.draw(64, torch.Generator().manual_seed(1))
        for shape in range(data.SHAPES):
            path = data._path(scenes, shape, torch.arange(100.0))
            radius = scenes.radius[:, shape].view(-1, 1, 1)
            self.assertTrue(bool((path >= radius - 1e-5).all() and (path <= 1 - radius + 1e-5).all()))
            torch.testing.assert_close(path[:, 0], scenes.start[:, shape] * (1 - 2 * radius[:, 0]) + radius[:, 0])
            moved = scenes.words["direction"][:, shape] > 0
            far = (path.amax(1) - path.amin(1)).amax(-1)
            self.assertTrue(bool((far[moved] > 0.1).all() and (far[~moved] < 1e-6).all()))

    def test_backgrounds_pan(self) -> None:
        scenes = data.draw(1, torch.Generator().manual_seed(2))
        scenes.words["pan"][:] = data.FIELDS["pan"].index("right")
        ground = data._ground(scenes, torch.tensor([0.0, 1 / (data._PAN_SPEED * 32)]), self.pixels(32))
        # One pixel to the right.
        torch.testing.assert_close(ground[:, :, 1, :, 1:], ground[:, :, 0, :, :-1], rtol=0, atol=2e-3)

    @staticmethod
    def pixels(size: int) -> Tensor:
        axis = (torch.arange(size) + 0.5) / size
        return torch.stack([axis.expand(size, size), axis[:, None].expand(size, size)])


class Sampling(unittest.TestCase):
    class Toy(nn.Module):
        """A velocity that is linear in the video, and depends on prompt and timestep."""

        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))
            self.batches: list[int] = []

        def forward(self, video: Tensor, timestep: Tensor, words: Tensor, return_dict: bool) -> tuple[Tensor]:
            self.batches.append(len(video))
            prompt = (words[:, 0, 1:40] * torch.arange(39.0)).sum(-1).view(-1, 1, 1, 1, 1) / 40
            return (self.weight * video + prompt + (timestep / 1000).view(-1, 1, 1, 1, 1),)

    def test_noise_levels(self) -> None:
        levels = sampler.sigmas()
        self.assertEqual((len(levels), levels[0], levels[-1]), (21, 1.0, 0.0))
        self.assertAlmostEqual(levels[1], 3.8 / 3.85)
        self.assertAlmostEqual(levels[10], 0.8)
        self.assertAlmostEqual(levels[19], 0.2 / 1.15)

    def test_euler_with_guidance(self) -> None:
        toy, ids = self.Toy(), data.prompts(2, seed=1)
        start = sampler.noise([1, 2], 2, 8)
        got = sampler.sample(toy, ids, start, steps=5, shift=1.0, guidance=3.0)
        self.assertEqual(toy.batches, [2] * 10)
        video = start.clone()
        number = (data.embed(ids)[:, 0, 1:40] * torch.arange(39.0)).sum(-1).view(-1, 1, 1, 1, 1) / 40
        self.assertEqual(float(data.embed(data.empty_prompt(1))[:, 0, 1:40].sum()), 0.0)
        for i in range(5):
            sigma = 1 - i / 5
            video = video - 0.2 * (0.5 * video + sigma + 3.0 * number)
        torch.testing.assert_close(got, video, rtol=1e-5, atol=1e-5)

    def test_one_batch_is_two_passes(self) -> None:
        ids, start = data.prompts(2, seed=1), sampler.noise([1, 2], 2, 8)
        one, two = self.Toy(), self.Toy()
        batched = sampler.sample(one, ids, start, steps=3, batched=True)
        torch.testing.assert_close(batched, sampler.sample(two, ids, start, steps=3))
        self.assertEqual((one.batches, two.batches), ([4] * 3, [2] * 6))

    def test_videos_do_not_depend_on_their_batch(self) -> None:
        both, second = sampler.noise([1, 2], 2, 8), sampler.noise([2], 2, 8)
        self.assertTrue(torch.equal(both[1:], second))


class Baselines(unittest.TestCase):
    GRID = baselines.Grid(4, 16, 32)  # Four blocks a frame, each four rows.
    ORDERS = (
        baselines.diagonal_order,
        baselines.window_order,
        baselines.radial_order,
        baselines.spatial_order,
        baselines.temporal_order,
    )

    def test_density_is_exact_and_rows_keep_their_own_block(self) -> None:
        for order in self.ORDERS:
            for density in (0.1, 0.3, 0.45, 0.6, 1.0):
                count = baselines.kept_count(density, 16)
                mask = baselines.nearest(order(self.GRID), count)
                self.assertEqual(int(mask.sum()), count, order.__name__)
                self.assertTrue(bool(mask.diagonal().all()))
        self.assertEqual(baselines.kept_count(0.0, 16), 16)

    def test_denser_masks_contain_sparser_ones(self) -> None:
        for order in self.ORDERS:
            sparse, dense = (baselines.nearest(order(self.GRID), count) for count in (60, 130))
            self.assertTrue(bool((dense | ~sparse).all()))

    def test_diagonal_band(self) -> None:
        # 16 + 2 * (15 + 14): two blocks to either side.
        mask = baselines.nearest(baselines.diagonal_order(self.GRID), 74)
        at = torch.arange(16)
        self.assertTrue(torch.equal(mask, (at[:, None] - at).abs() <= 2))

    def test_window_is_a_box_in_time_and_height(self) -> None:
        at = torch.arange(16)
        frame, row = at // 4, at % 4
        inside = ((frame[:, None] - frame).abs() <= 1) & ((row[:, None] - row).abs() <= 1)
        mask = baselines.nearest(baselines.window_order(self.GRID), int(inside.sum()))
        self.assertTrue(torch.equal(mask, inside))

    def test_radial_windows_halve_with_the_distance_in_time(self) -> None:
        order = baselines.radial_order(baselines.Grid(9, 64, 32))  # 16 blocks a frame.
        widths = {}
        for apart in (1, 2, 3, 4, 7):
            row = order[8 * 16 + 8].view(9, 16)[8 - apart]
            # Rows of four tokens' height, 128 tokens a block.
            widths[apart] = int((row <= 128 * 4 + 1e-3).sum())
        self.assertEqual(widths, {1: 9, 2: 5, 3: 5, 4: 3, 7: 3})
        self.assertTrue(bool((order[:, :16] == -1).all()))

    def test_two_patterns_go_by_energy(self) -> None:
        count = baselines.kept_count(0.5, 16)
        spatial = baselines.nearest(baselines.spatial_order(self.GRID), count)
        temporal = baselines.nearest(baselines.temporal_order(self.GRID), count)
        self.assertFalse(torch.equal(spatial, temporal))
        frame = torch.arange(16) // 4
        self.assertTrue(bool(spatial[frame[:, None] == frame].all()))
        place = torch.arange(16) % 4
        self.assertTrue(bool(temporal[place[:, None] == place].all()))
        energy = torch.stack([spatial.float(), temporal.float()])
        self.assertTrue(torch.equal(baselines.two_patterns(self.GRID, energy, count), torch.stack([spatial, temporal])))

    def test_random_masks_differ_by_site(self) -> None:
        order = baselines.random_order((2, 3), 16, seed=1)
        self.assertTrue(torch.equal(order, baselines.random_order((2, 3), 16, seed=1)))
        masks = baselines.nearest(order, 100)
        self.assertTrue(bool((masks.sum((-2, -1)) == 100).all()))
        self.assertEqual(len(masks.flatten(0, 1).unique(dim=0)), 6)

    def test_strongest_by_row(self) -> None:
        loss = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
        mask = baselines.strongest_by_row(loss, 20)
        self.assertTrue(bool((mask.sum((-2, -1)) == 20).all()))
        self.assertEqual(sorted(set(mask.sum(-1).flatten().tolist())), [2, 3])
        kept, dropped = loss.masked_fill(~mask, 2).amin(-1), loss.masked_fill(mask, -1).amax(-1)
        self.assertTrue(bool((kept > dropped).all()))

    def test_strongest_of_a_plan(self) -> None:
        generator = torch.Generator().manual_seed(0)
        loss, energy = (torch.rand(2, 3, 8, 8, generator=generator) for _ in range(2))
        # A head that loses nothing keeps one block in every row.
        loss[0, 0] = 0.0
        mask = baselines.strongest(loss, energy, 0.5)
        self.assertEqual(int(mask.sum()), 192)
        self.assertTrue(bool(mask.gather(-1, energy.argmax(-1, keepdim=True)).all()))
        self.assertEqual(int(mask[0, 0].sum()), 8)
        self.assertEqual(int(baselines.strongest(loss, energy, 0.01).sum()), 48)

    def test_blocks_that_span_frames(self) -> None:
        grid = baselines.Grid(3, 10, 10)  # 300 tokens: blocks of 128, 128 and 44.
        frame, place = grid.centres()
        self.assertEqual(grid.blocks, 3)
        self.assertAlmostEqual(float(frame[0]), 28 / 128)
        self.assertAlmostEqual(float(place[2]), sum(range(56, 100)) / 44)


class Metrics(unittest.TestCase):
    @staticmethod
    def videos() -> tuple[Tensor, Tensor, Tensor]:
        y, x = torch.meshgrid(torch.arange(24.0).double(), torch.arange(32.0).double(), indexing="ij")
        a = 0.5 + 0.4 * torch.sin(x * 0.7) * torch.cos(y * 0.5)
        b = (a * 0.9 + 0.1 * ((x * 7 + y * 13) % 10) / 10).clamp(0, 1)
        return tuple(v.expand(1, 3, 2, 24, 32) for v in (a, b, 1 - a))

    def test_known_values(self) -> None:
        # scikit-image 0.26: gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.
        a, b, c = self.videos()
        for other, ssim, psnr in (
            (b, 0.9809317953206559, 29.090041772455386),
            (c, -0.9131300834267576, 8.138780212687841),
        ):
            self.assertAlmostEqual(float(metrics.ssim(other, a)), ssim, places=9)
            self.assertAlmostEqual(float(metrics.psnr(other, a)), psnr, places=9)

    def test_identical_and_constant_videos(self) -> None:
        a, _, _ = self.videos()
        self.assertAlmostEqual(float(metrics.ssim(a, a)), 1.0, places=12)
        self.assertEqual(float(metrics.psnr(a, a)), math.inf)
        dark, light = torch.full((1, 3, 2, 16, 16), 0.25), torch.full((1, 3, 2, 16, 16), 0.75)
        self.assertAlmostEqual(float(metrics.psnr(dark, light)), 10 * math.log10(4), places=5)
        self.assertAlmostEqual(float(metrics.ssim(dark, light)), (0.375 + 1e-4) / (0.625 + 1e-4), places=6)

    def test_videos_are_judged_one_by_one(self) -> None:
        a, b, c = self.videos()
        together = metrics.psnr(torch.cat([b, c]), torch.cat([a, a]))
        torch.testing.assert_close(together, torch.cat([metrics.psnr(b, a), metrics.psnr(c, a)]))
        together = metrics.ssim(torch.cat([b, c]), torch.cat([a, a]))
        torch.testing.assert_close(together, torch.cat([metrics.ssim(b, a), metrics.ssim(c, a)]))

    def test_standard_errors_are_over_prompts(self) -> None:
        values, reference = torch.tensor([3.0, 5.0, 8.0, 10.0]), torch.tensor([1.0, 1.0, 2.0, 12.0])
        # Differences 2, 4 and 6, -2: means 3 and 2.
        more, error, wins = metrics.paired(values, reference, [0, 0, 1, 1])
        self.assertAlmostEqual(more, 2.5)
        self.assertAlmostEqual(error, 0.5)
        self.assertEqual(wins, 3)

    def test_rank_correlation(self) -> None:
        self.assertAlmostEqual(lab.spearman(torch.tensor([1.0, 2, 3, 10]), torch.tensor([2.0, 3, 4, 5])), 1.0)
        self.assertAlmostEqual(lab.spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])), -1.0)


class Lab(unittest.TestCase):
    def test_the_lab_compares_policies(self) -> None:
        arguments = "--tiny --policies budget calibatt random --densities 0.6 --ingredients --ingredients-density 0.6"
        arguments += " --anchor-share 0.2 --oracle 1 --exact --workers 1 --arch sm_80"
        # One head in two layers, of random weights: what it generates does not matter here.
        small = mock.patch.dict(models.CONFIG, num_layers=2, num_attention_heads=1, ffn_dim=64)
        with folder() as path, small, quiet(), contextlib.redirect_stdout(io.StringIO()) as said:
            model = models.build(seed=0)
            nn.init.normal_(model.proj_out.weight, std=0.05)
            model.save_pretrained(path / "weights")
            files = ["--weights", path / "weights", "--work", path / "w"]
            files += ["--json", path / "lab.json", "--picture", path / "lab.png"]
            with mock.patch.object(sys, "argv", ["lab.py", *arguments.split(), *map(str, files)]):
                lab.main()
            record = json.loads((path / "lab.json").read_text())
            picture = (path / "lab.png").read_bytes()
        rows = {row["policy"]: row for row in record["rows"]}
        wanted = {"all blocks", "budget", "calibatt", "random", "oracle", "budget, exact u"}
        wanted |= set(policies.INGREDIENTS) | {f"anchors by {rule}" for rule in policies.ANCHOR_RULES}
        self.assertEqual(set(rows), wanted)
        self.assertGreater(rows["all blocks"]["psnr_mean"], 80)
        for name in ("budget", "random"):
            # Of four by four blocks.
            self.assertAlmostEqual(rows[name]["density"], 0.6, delta=0.04)
            self.assertTrue(10 < rows[name]["psnr_mean"] < 80, rows[name]["psnr_mean"])
            self.assertEqual(rows[name]["psnr_difference"][3], record["videos"])
        self.assertTrue(all(0 <= row["ssim_mean"] <= 1 for row in rows.values()))
        self.assertTrue(-1 <= record["rank_correlation_u"] <= 1)
        self.assertIn("PSNR - calibatt", said.getvalue())
        self.assertTrue(picture.startswith(b"\x89PNG") and len(picture) < 200_000)


class Training(unittest.TestCase):
    def test_a_checkpoint_goes_on_where_it_was(self) -> None:
        def trainer(**changes: Any) -> train.Trainer:
            plain = {
                "device": "cpu",
                "tiny": True,
                "seed": 1,
                "init": None,
                "resume": None,
                "compile": False,
                "first_stage": 0,
            }
            return train.Trainer(train.argparse.Namespace(**(plain | changes)))

        small = train.Stage(1, 16, 2, 2.0, 1.0, 1e-3)
        with folder() as path, mock.patch.dict(models.CONFIG, num_layers=1, num_attention_heads=1, ffn_dim=64):
            whole = trainer()
            losses = [float(whole.train_step(small, 1e-3)) for _ in range(4)]
            first = trainer()
            for _ in range(2):
                first.train_step(small, 1e-3)
            first.save_checkpoint(path / "c.pt")
            second = trainer(resume=path / "c.pt")
            again = [float(second.train_step(small, 1e-3)) for _ in range(2)]
            self.assertEqual(again, losses[2:])
            second.save_weights(path)
            saved = models.load(path, torch.float32).state_dict()
        for name, value in whole.average.state_dict().items():
            self.assertTrue(torch.equal(saved[name], value.to(torch.bfloat16).float()), name)

    def test_stages_share_the_time(self) -> None:
        trainer = mock.Mock(stages=train.STAGES)
        at = [train.Trainer.stage_at(trainer, share) for share in (0.0, 0.149, 0.151, 0.5, 1.0, 1.2)]
        self.assertEqual(at, [0, 0, 1, 2, 2, 2])
        self.assertEqual([round(stage.until, 6) for stage in train.later(train.STAGES, 1)], [round(0.3 / 0.85, 6), 1.0])
        self.assertEqual(train.later(train.STAGES, 0), train.STAGES)
        trainer.stage_at = lambda share: train.Trainer.stage_at(trainer, share)
        rates = [train.Trainer.rate_at(trainer, share) for share in (0.0, 0.3, 0.45, 0.725, 1.0)]
        for got, wanted in zip(rates, (1e-3, 8e-4, 6e-4, 6e-4 * 0.525, 3e-5), strict=True):
            self.assertAlmostEqual(got, wanted)


class Pictures(unittest.TestCase):
    def test_a_png_holds_the_pixels(self) -> None:
        import struct
        import zlib

        picture = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with folder() as path:
            pictures.save_png(picture, path / "a.png")
            content = (path / "a.png").read_bytes()
        self.assertEqual(content[:8], b"\x89PNG\r\n\x1a\n")
        chunks, at = {}, 8
        while at < len(content):
            (length,) = struct.unpack(">I", content[at : at + 4])
            body = content[at + 4 : at + 8 + length]
            self.assertEqual(struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0], zlib.crc32(body))
            chunks[body[:4]] = body[4:]
            at += 12 + length
        self.assertEqual(struct.unpack(">IIBBBBB", chunks[b"IHDR"]), (7, 5, 8, 2, 0, 0, 0))
        rows = torch.tensor(list(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(5, 22)
        self.assertTrue(bool((rows[:, 0] == 2).all()))
        pixels = rows[:, 1:].to(torch.int64).cumsum(0).remainder(256).view(5, 7, 3).permute(2, 0, 1)
        self.assertLessEqual(float((pixels / 127.5 - 1 - picture).abs().max()), 0.5 / 127.5 + 1e-6)

    def test_contact_sheet(self) -> None:
        videos = torch.zeros(2, 3, 16, 8, 8)
        videos[1, :, 15] = 0.5
        sheet = pictures.contact_sheet(videos, frames=4, scale=2, gap=2)
        self.assertEqual(sheet.shape, (3, 40, 80))
        self.assertTrue(bool((sheet[:, 22:38, 62:78] == 0.5).all() and (sheet[:, 2:18, 62:78] == 0).all()))


if __name__ == "__main__":
    unittest.main()

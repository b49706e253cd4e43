"""Block statistics and the trace writer of the native module, as the capture code calls them."""

import math
import os
import tempfile
import unittest
from pathlib import Path

import torch
from calibc import _native, errors

HEADS, TOKENS, HEAD_DIM, BLOCK = 2, 300, 64, 128
GRID = {"frames": 3, "height": 10, "width": 10}
BLOCKS = -(-TOKENS // BLOCK)


def view(x):
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return x.data_ptr(), names[x.dtype], tuple(x.shape), tuple(x.stride())


def statistics(q, k, v, **settings):
    """Energies and deviations [heads, q_blocks, kv_blocks] from the native module."""
    energy, deviation = torch.empty(HEADS, BLOCKS, BLOCKS), torch.empty(HEADS, BLOCKS, BLOCKS)
    _native.block_statistics_cpu(
        view(q), view(k), view(v), energy=energy.data_ptr(), deviation=deviation.data_ptr(), **settings
    )
    return energy, deviation


def by_definition(q, k, v, rows):
    """The same from the definition in float64; rows[h][r] are the query rows that stand for block r of head h."""
    p = torch.softmax(q[0].double() @ k[0].double().transpose(-1, -2) / math.sqrt(HEAD_DIM), -1)
    values = v[0].double()
    out = p @ values
    energy, deviation = torch.empty(HEADS, BLOCKS, BLOCKS), torch.empty(HEADS, BLOCKS, BLOCKS)
    for h in range(HEADS):
        for r in range(BLOCKS):
            square = out[h, r * BLOCK : (r + 1) * BLOCK].square().sum(-1).mean()
            for c in range(BLOCKS):
                keys = slice(c * BLOCK, (c + 1) * BLOCK)
                part = p[h, rows[h][r]][:, keys]
                mass = part.sum(-1, keepdim=True)
                apart = part @ values[h, keys] - mass * out[h, rows[h][r]]
                energy[h, r, c] = mass.mean()
                deviation[h, r, c] = (apart.square().sum(-1).mean() / square).clamp(max=1)
    return energy, deviation


def codes(values):
    encoded = torch.empty(values.shape, dtype=torch.uint8)
    _native.encode_log2_u8(values.data_ptr(), encoded.data_ptr(), values.numel())
    return encoded


class Statistics(unittest.TestCase):
    def tensors(self):
        generator = torch.Generator().manual_seed(3)
        packed = torch.randn(1, TOKENS, HEADS, 3 * HEAD_DIM, generator=generator)
        return [x.transpose(1, 2) for x in packed.split(HEAD_DIM, -1)]

    def test_statistics_are_those_of_the_definition(self):
        q, k, v = self.tensors()
        for per_block, seed in [(128, 0), (16, 1), (16, 2), (64, 3)]:
            rows = [_native.sampled_rows(TOKENS, per_block, seed, head) for head in range(HEADS)]
            got = statistics(q, k, v, rows_per_block=per_block, seed=seed)
            for mine, right in zip(got, by_definition(q, k, v, rows), strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-9)

    def test_samples_differ_by_seed_and_head(self):
        seeds = {
            _native.capture_seed(*name) for name in [("a", 0, "cond", 0), ("b", 0, "cond", 0), ("a", 1, "cond", 0)]
        }
        self.assertEqual(len(seeds), 3)
        samples = {str(_native.sampled_rows(TOKENS, 16, seed, head)) for seed in seeds for head in range(2)}
        self.assertEqual(len(samples), 6)
        self.assertEqual(_native.sampled_rows(TOKENS, 128, 5, 0)[2], list(range(256, 300)))

    def test_wrong_calls_are_refused(self):
        q, k, v = self.tensors()
        for settings in [{"rows_per_block": 24}, {"scale": -1.0}]:
            with self.assertRaises(errors.BadInput):
                statistics(q, k, v, **settings)
        with self.assertRaises(errors.BadInput):
            statistics(q, k[:, :, :-1], v)

    def test_codes_are_rounded_logarithms(self):
        values = torch.rand(4096, generator=torch.Generator().manual_seed(0)) ** 12
        self.assertTrue(torch.equal(codes(values).float(), (-8 * values.double().log2()).round().clamp(0, 255).float()))

    def test_anchor_rows_stand_for_their_neighbours(self):
        source = _native.anchor_source(3, 10, 10, 0, "none", None, 5)
        self.assertEqual(len(source), TOKENS)
        self.assertEqual(source[:30], [*range(10, 20), *range(10, 20), *range(10, 20)])
        with self.assertRaises(errors.BadInput):
            _native.anchor_source(3, 10, 10, 0, "none", None, 11)


class Writer(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "traces"
        self.energy = codes(torch.tensor([[0.5, 0.25, 0.25]] * BLOCKS).repeat(HEADS, 1, 1))
        self.deviation = codes(torch.full((HEADS, BLOCKS, BLOCKS), 0.1))
        self.similarity = torch.full((HEADS, 1), 0.5)

    def open(self, part=None, **changed):
        spec = {"model": "m", "layers": 2, "heads": HEADS, "head_dim": HEAD_DIM, **GRID}
        spec |= {"sigmas": [1.0, 0.5, 0.1], "branches": ["cond"], "anchor_counts": [5]}
        writer = _native.TraceWriter.open(self.path, part=part, **(spec | changed))
        self.addCleanup(writer.close)
        return writer

    def write(self, writer, step):
        shard = writer.begin_shard(step, "cond", anchor_similarity=True)
        for layer in range(2):
            shard.layer(layer, self.energy.data_ptr(), self.deviation.data_ptr(), self.similarity.data_ptr())
        shard.finish()

    def capture(self, writer, prompt, steps=(0, 2)):
        writer.begin_prompt(prompt, seed=3, label="words")
        for step in steps:
            self.write(writer, step)
        writer.end_prompt()

    def check(self, path):
        self.assertEqual(_native.main(["calibc", "trace", "check", str(path), "-q"]), 0)

    def test_a_trace_grows_and_survives(self):
        writer = self.open()
        self.capture(writer, "p0")
        with self.assertRaisesRegex(errors.FileSystem, "another process"):
            self.open()
        with self.assertRaisesRegex(errors.BadInput, "p0"):
            self.capture(writer, "p0")
        writer.begin_prompt("p1")
        self.write(writer, 0)
        writer.close()
        with self.assertRaises(errors.Usage):
            writer.end_prompt()
        # As if killed: the half-written prompt is gone, and can be captured again.
        writer = self.open()
        self.assertEqual(writer.prompts, ["p0"])
        self.assertFalse((self.path / "p1").exists())
        self.capture(writer, "p1")
        self.assertEqual(writer.prompts, ["p0", "p1"])
        with self.assertRaisesRegex(errors.BadInput, "s1"):
            self.capture(writer, "p2", steps=(1,))
        writer.discard_prompt()
        self.check(self.path)
        with self.assertRaisesRegex(errors.BadInput, "sampler steps"):
            writer.close()
            self.open(sigmas=[1.0])

    def test_layers_are_checked_as_they_are_written(self):
        writer = self.open()
        writer.begin_prompt("p0")
        shard = writer.begin_shard(0, "cond", deviation=False)
        wrong = self.energy.clone()
        wrong[0, 0] = 0
        with self.assertRaisesRegex(errors.BadInput, "sums to 3"):
            shard.layer(0, wrong.data_ptr())
        with self.assertRaisesRegex(errors.Usage, "deviation"):
            shard.layer(0, self.energy.data_ptr(), self.deviation.data_ptr())
        with self.assertRaisesRegex(errors.BadInput, "layer 2"):
            shard.layer(2, self.energy.data_ptr())
        with self.assertRaisesRegex(errors.BadInput, "layers.0"):
            shard.finish()
        with self.assertRaisesRegex(errors.Usage, "finished"):
            shard.finish()

    def test_floats_are_encoded(self):
        energy = torch.tensor([[0.5, 0.25, 0.25]] * BLOCKS).repeat(HEADS, 1, 1)
        for encoding in ["f16", "f32"]:
            self.path = self.path.with_name(encoding)
            writer = self.open(encoding=encoding, anchor_counts=[])
            writer.begin_prompt("p0")
            shard = writer.begin_shard(1, "cond", deviation=False)
            for layer in range(2):
                shard.layer(layer, energy.data_ptr())
            shard.finish()
            writer.end_prompt()
            self.check(self.path)

    def test_sizes_and_space(self):
        writer = self.open()
        self.capture(writer, "p0")
        shards = (self.path / "p0").iterdir()
        self.assertEqual(sum(shard.stat().st_size for shard in shards), writer.estimate(1, 2, anchor_error=False))
        self.assertGreater(writer.free_space(), 0)
        writer.check_space(1)
        with self.assertRaisesRegex(errors.FileSystem, "capture fewer"):
            writer.check_space(1 << 62)

    def test_parts_become_one_trace(self):
        parts = [self.open(part=f"rank{rank}") for rank in range(2)]
        for rank, part in enumerate(parts):
            self.capture(part, f"p{rank}")
        with self.assertRaisesRegex(errors.FileSystem, "another process"):
            _native.TraceWriter.merge_parts(self.path)
        for part in parts:
            part.close()
        self.assertEqual(_native.TraceWriter.merge_parts(self.path), 2)
        self.assertEqual(_native.TraceWriter.merge_parts(self.path), 2)
        names = {name for name in os.listdir(self.path) if name != ".calibc-lock"}
        self.assertEqual(names, {"manifest.json", "p0", "p1"})
        self.check(self.path)
        other = self.path.with_name("merged")
        self.assertEqual(_native.TraceWriter.merge(other, [self.path, self.path]), 2)
        self.check(other)


if __name__ == "__main__":
    unittest.main()

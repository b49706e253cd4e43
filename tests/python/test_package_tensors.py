"""The package on tensors in CPU memory: plans from masks, block-sparse attention, the torch ops."""

import gc
import itertools
import math
import os
import tempfile
import unittest
from pathlib import Path

import torch

import calibc
from calibc import _native, ops
from calibc.masks import BLOCK

TRACES = Path(__file__).resolve().parents[2] / "examples" / "traces"


def blocks(tokens):
    return -(-tokens // BLOCK)


def random_mask(heads, q_len, kv_len, density=0.4, seed=0):
    """bool [heads, q_blocks, kv_blocks]; every row keeps a block, head 0 keeps all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(heads, blocks(q_len), blocks(kv_len), generator=generator) < density
    keep = torch.randint(blocks(kv_len), (heads, blocks(q_len), 1), generator=generator)
    mask.scatter_(2, keep, True)
    mask[0] = True
    return mask


def tensors(batch, heads, q_len, kv_len, head_dim, dtype=torch.float32, layout="bhsd", seed=1):
    """Random q, k, v, logically [B, H, S, D], in one of three memory orders."""
    generator = torch.Generator().manual_seed(seed)

    def one(tokens):
        x = torch.randn(batch, heads, tokens, head_dim, generator=generator).to(dtype)
        if layout == "bhsd":
            return x
        if layout == "bshd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        # A slice of a packed projection: neither dense nor starting at the front.
        packed = torch.full((batch, tokens, heads, 3 * head_dim), math.nan, dtype=dtype)
        packed[..., head_dim : 2 * head_dim] = x.transpose(1, 2)
        return packed[..., head_dim : 2 * head_dim].transpose(1, 2)

    return one(q_len), one(kv_len), one(kv_len)


def masked_attention(q, k, v, mask, scale=None):
    """torch's own, in float64 with the mask spelled out per token; and the log-sum-exp."""
    q, k, v = q.double(), k.double(), v.double()
    tokens = mask.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, : q.shape[2], : k.shape[2]]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~tokens, -math.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


# Largest error of an element, for outputs of size about 1: rounding of the output's type.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Numerics(unittest.TestCase):
    def check(self, batch, heads, q_len, kv_len, head_dim, dtype, layout, scale=None):
        mask = random_mask(heads, q_len, kv_len)
        plan = calibc.plan_from_mask(mask, q_len, kv_len, head_dim)
        q, k, v = tensors(batch, heads, q_len, kv_len, head_dim, dtype, layout)
        out, lse = calibc.block_sparse_attention(q, k, v, plan, scale, return_lse=True)
        want, want_lse = masked_attention(q, k, v, mask, scale)
        self.assertEqual((out.dtype, out.shape), (dtype, q.shape))
        self.assertEqual((lse.dtype, lse.shape), (torch.float32, q.shape[:3]))
        self.assertLess((out - want).abs().max().item(), TOLERANCE[dtype])
        self.assertLess((lse - want_lse).abs().max().item(), 1e-5)
        alone = calibc.block_sparse_attention(q, k, v, plan, scale)
        self.assertTrue(torch.equal(alone, out))
        return q, out

    def test_types_and_memory_orders(self):
        for dtype, layout in itertools.product(TOLERANCE, ("bhsd", "bshd", "sliced")):
            with self.subTest(dtype=dtype, layout=layout):
                q, out = self.check(2, 3, 300, 300, 64, dtype, layout)
                # The memory order of q, without the gaps of a slice.
                self.assertEqual(out.stride(), torch.empty_like(q).stride())
                self.assertEqual(out.stride(1) < out.stride(2), layout != "bhsd")

    def test_lengths_ragged_and_different(self):
        for q_len, kv_len in [(128, 128), (1, 1), (127, 129), (256, 640), (640, 256), (385, 130), (1, 1000)]:
            with self.subTest(q_len=q_len, kv_len=kv_len):
                self.check(1, 2, q_len, kv_len, 128, torch.float32, "bshd")

    def test_a_scale_of_ones_own(self):
        self.check(1, 2, 200, 200, 64, torch.float32, "bhsd", scale=0.3)

    def test_batches_are_alike(self):
        mask = random_mask(2, 256, 256)
        plan = calibc.plan_from_mask(mask, 256, 256, 64)
        q, k, v = tensors(3, 2, 256, 256, 64)
        whole = calibc.block_sparse_attention(q, k, v, plan)
        for b in range(3):
            one = calibc.block_sparse_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], plan)
            self.assertTrue(torch.equal(one, whole[b : b + 1]))
        # One query for the whole batch: a stride of 0.
        alike = calibc.block_sparse_attention(q[:1].expand(3, -1, -1, -1), k, v, plan)
        self.assertTrue(torch.equal(alike[:1], whole[:1]))
        self.assertFalse(torch.equal(alike[1:], whole[1:]))

    def test_a_full_mask_is_dense_attention(self):
        plan = calibc.plan_from_mask(torch.ones(2, 3, 3, dtype=torch.bool), 300, 300, 64)
        self.assertEqual((plan.density, plan.bundle.op_counts(0, 0)), (1.0, (2, 0, 0)))
        q, k, v = tensors(1, 2, 300, 300, 64)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        self.assertLess((calibc.block_sparse_attention(q, k, v, plan) - dense).abs().max().item(), 3e-6)


class Plans(unittest.TestCase):
    def setUp(self):
        _native.clear_plan_cache()

    def test_a_plan_tells_its_mask(self):
        mask = random_mask(3, 700, 500)
        plan = calibc.plan_from_mask(mask, 700, 500, 128, torch.float16)
        self.assertTrue(torch.equal(plan.mask(), mask))
        self.assertAlmostEqual(plan.density, mask.double().mean().item(), places=12)
        self.assertEqual(plan.dtype, torch.float16)
        self.assertEqual(
            (plan.bundle.heads, plan.bundle.head_dim, plan.bundle.steps, plan.bundle.layers), (3, 128, 1, 1)
        )

    def test_the_same_content_is_compiled_once(self):
        hits, misses, _ = _native.plan_cache_info()
        mask = random_mask(2, 300, 300)
        first = calibc.plan_from_mask(mask, 300, 300, 64)
        # Other memory, other strides, the same content.
        again = calibc.plan_from_mask(mask.transpose(1, 2).contiguous().transpose(1, 2), 300, 300, 64)
        self.assertIs(first.bundle, again.bundle)
        self.assertEqual(_native.plan_cache_info(), (hits + 1, misses + 1, 1))
        other = mask.clone()
        other[1, 0] = ~other[1, 0]
        other[1, 0, 0] = True
        different = [
            calibc.plan_from_mask(other, 300, 300, 64),
            calibc.plan_from_mask(mask, 299, 300, 64),
            calibc.plan_from_mask(mask, 300, 299, 64),
            calibc.plan_from_mask(mask, 300, 300, 128),
            calibc.plan_from_mask(mask, 300, 300, 64, torch.float16),
            calibc.plan_from_mask(mask, 300, 300, 64, lse=False),
            calibc.plan_from_mask(mask, 300, 300, 64, portable=True),
        ]
        handles = {plan.bundle.handle for plan in [first, *different]}
        self.assertEqual(len(handles), 8)
        self.assertEqual(_native.plan_cache_info(), (hits + 1, misses + 8, 8))

    def test_what_names_a_plan_stays_in_cpu_memory(self):
        with torch.device("meta"):
            plan = calibc.plan_from_mask(torch.ones(1, 1, 1, dtype=torch.bool, device="cpu"), 100, 100, 64)
        self.assertTrue(plan.site.is_cpu and plan.step.is_cpu)
        q, k, v = tensors(1, 1, 100, 100, 64)
        self.assertEqual(calibc.block_sparse_attention(q, k, v, plan).shape, q.shape)

    def test_few_plans_are_kept(self):
        masks = [random_mask(1, 300, 300, seed=seed) for seed in range(1, 3)]
        held = calibc.plan_from_mask(masks[0], 300, 300, 64)
        for q_len in range(1, 61):
            calibc.plan_from_mask(torch.ones(1, 1, 1, dtype=torch.bool), q_len, 128, 64)
        self.assertEqual(_native.plan_cache_info()[2], 32)
        # Forgotten by the cache, but not by who holds it.
        q, k, v = tensors(1, 1, 300, 300, 64)
        out = calibc.block_sparse_attention(q, k, v, held)
        self.assertLess((out - masked_attention(q, k, v, masks[0])[0]).abs().max().item(), 3e-6)
        self.assertIsNot(calibc.plan_from_mask(masks[0], 300, 300, 64).bundle, held.bundle)

    def test_kernels_are_made_for_the_architecture_asked_for(self):
        mask = random_mask(1, 256, 256)
        without = calibc.plan_from_mask(mask, 256, 256, 64)
        if not torch.cuda.is_available():
            self.assertEqual(without.bundle.kernels, [])
        both = calibc.plan_from_mask(mask, 256, 256, 64, arch="sm_80")
        self.assertEqual({arch for _, arch in both.bundle.kernels}, {"sm_80"})
        symbols = [symbol for symbol, _ in both.bundle.kernels]
        self.assertEqual(sorted("_lse" in symbol for symbol in symbols), [False, True])
        self.assertTrue(all("bf16_hd64" in symbol for symbol in symbols))
        one = calibc.plan_from_mask(mask, 256, 256, 64, torch.float16, arch="sm_80", lse=False)
        self.assertEqual(["fp16" in symbol and "_lse" not in symbol for symbol, _ in one.bundle.kernels], [True])

    def test_what_makes_no_plan(self):
        mask = random_mask(2, 300, 300)
        empty = mask.clone()
        empty[1, 2] = False
        plan = calibc.plan_from_mask
        for call, error, words in [
            (lambda: plan(mask.int(), 300, 300, 64), calibc.BadInput, "a mask is bool"),
            (lambda: plan(mask[0], 300, 300, 64), calibc.BadInput, r"not torch.bool \[3, 3\]"),
            (lambda: plan(mask, 400, 300, 64), calibc.BadInput, r"400 queries and 300 keys need \[heads, 4, 3\]"),
            (lambda: plan(mask, 300, 0, 64), calibc.BadInput, "kv_len is 0"),
            (lambda: plan(mask, -300, 300, 64), calibc.BadInput, "q_len is -300"),
            (lambda: plan(mask, 300, 2**40, 64), calibc.BadInput, "kv_len is 1099511627776"),
            (lambda: plan(mask[:0], 300, 300, 64), calibc.BadInput, r"shape \[0, 3, 3\]"),
            (lambda: plan(empty, 300, 300, 64), calibc.BadInput, r"mask\[1, 2\] keeps no block"),
            (lambda: plan(mask, 300, 300, 96), calibc.BadInput, r"head dimension 96 is not one of \[64, 128\]"),
            (lambda: plan(mask, 300, 300, 64, torch.float32), calibc.Usage, "bfloat16 or float16, not torch.float32"),
            (lambda: plan(mask, 300, 300, 64, arch="sm_1"), calibc.Usage, "`sm_1` is not a supported architecture"),
        ]:
            with self.assertRaisesRegex(error, words):
                call()
        self.assertEqual(_native.plan_cache_info()[2], 0)

    @unittest.skipIf(torch.cuda.is_available(), "there is a GPU")
    def test_a_gpu_that_is_not_there(self):
        with self.assertRaises((calibc.Environment, RuntimeError)):
            calibc.plan_from_mask(random_mask(1, 128, 128), 128, 128, 64, device=0)

    def test_no_nvrtc_is_an_error_of_the_environment(self):
        nvrtc = os.environ.get("CALIBC_NVRTC")
        os.environ["CALIBC_NVRTC"] = "/nowhere"
        try:
            with self.assertRaisesRegex(calibc.Environment, "/nowhere"):
                calibc.plan_from_mask(random_mask(1, 128, 128), 128, 128, 64, arch="sm_80")
        finally:
            del os.environ["CALIBC_NVRTC"]
            if nvrtc is not None:
                os.environ["CALIBC_NVRTC"] = nvrtc


class Calls(unittest.TestCase):
    """Tensors that are not the plan's: every one is refused before anything is computed."""

    @classmethod
    def setUpClass(cls):
        cls.plan = calibc.plan_from_mask(random_mask(2, 300, 450), 300, 450, 64)
        cls.q, cls.k, cls.v = tensors(1, 2, 300, 450, 64)

    def refuse(self, words, error=calibc.BadInput, q=None, k=None, v=None, **options):
        q, k, v = (given if given is not None else own for given, own in [(q, self.q), (k, self.k), (v, self.v)])
        with self.assertRaisesRegex(error, words):
            calibc.block_sparse_attention(q, k, v, self.plan, **options)

    def test_shapes(self):
        self.refuse("q has head size 1, but this plan and the other tensors need 2", q=self.q[:, :1])
        self.refuse("k has head size 1", k=self.k[:, :1])
        self.refuse("q has 299 tokens, but this plan is for exactly 300", q=self.q[:, :, :299])
        self.refuse("k has 300 tokens, but this plan is for exactly 450", k=self.k[:, :, :300])
        self.refuse("v has token size 449", v=self.v[:, :, :449])
        self.refuse("v has head_dim size 32", v=self.v[..., :32])
        self.refuse("k has batch size 2", k=self.k.expand(2, -1, -1, -1))
        self.refuse("batch size 0", q=self.q[:0], k=self.k[:0], v=self.v[:0])
        self.refuse(r"must be \[batch, heads, tokens, head_dim\]", q=self.q[0])

    def test_types(self):
        self.refuse("k and q differ in element type", k=self.k.bfloat16())
        integers = [x.int() for x in (self.q, self.k, self.v)]
        self.refuse("q has an element type no kernel reads", q=integers[0], k=integers[1], v=integers[2])

    def test_scales(self):
        for scale in (0.0, -1.0, math.nan, math.inf):
            self.refuse("must be finite and above 0", scale=scale)

    def test_sites_and_steps(self):
        plan, inputs = self.plan, (self.q, self.k, self.v)
        for site, words in [
            (plan.site.int(), "site must be an int64 tensor"),
            (plan.site[:1], "site must be an int64 tensor"),
            (torch.tensor([-1, 0]), "no bundle has the handle -1"),
        ]:
            with self.assertRaisesRegex(calibc.Usage, words):
                ops.attention(*inputs, site, plan.step)
        for step, error, words in [
            (torch.tensor(0), calibc.Usage, "step must be one int32"),
            (torch.zeros(2, dtype=torch.int32), calibc.Usage, "step must be one int32"),
            (torch.tensor(-1, dtype=torch.int32), calibc.BadInput, "step -1 is negative"),
            (torch.tensor(1, dtype=torch.int32), calibc.BadInput, "step 1 is out of range"),
        ]:
            with self.assertRaisesRegex(error, words):
                ops.attention(*inputs, plan.site, step)
        with self.assertRaisesRegex(calibc.BadInput, "layer 1 is out of range"):
            ops.site(plan.bundle, 1)

    def test_a_bundle_that_was_let_go(self):
        _native.clear_plan_cache()
        plan = calibc.plan_from_mask(random_mask(1, 128, 128), 128, 128, 64)
        site, step = plan.site, plan.step
        _native.clear_plan_cache()
        del plan
        gc.collect()
        q, k, v = tensors(1, 1, 128, 128, 64)
        with self.assertRaisesRegex(calibc.Usage, "keep the Bundle or Plan object"):
            ops.attention(q, k, v, site, step)


class Toy(torch.nn.Module):
    """Layers of attention, each with its own plan."""

    def __init__(self, layers, heads, tokens, head_dim):
        super().__init__()
        masks = [random_mask(heads, tokens, tokens, seed=i) for i in range(layers)]
        self.plans = [calibc.plan_from_mask(mask, tokens, tokens, head_dim) for mask in masks]
        self.layers = torch.nn.ModuleList(Layer(plan, heads, head_dim) for plan in self.plans)

    def forward(self, x, step):
        for layer in self.layers:
            x = layer(x, step)
        return x


class Layer(torch.nn.Module):
    def __init__(self, plan, heads, head_dim):
        super().__init__()
        self.plan, self.shape = plan, (heads, head_dim)
        self.project = torch.nn.Linear(heads * head_dim, 3 * heads * head_dim)

    def forward(self, x, step):
        q, k, v = self.project(x).unflatten(-1, (3, *self.shape)).permute(2, 0, 3, 1, 4)
        return x + ops.attention(q, k, v, self.plan.site, step).transpose(1, 2).flatten(2)


class Torch(unittest.TestCase):
    def setUp(self):
        self.plan = calibc.plan_from_mask(random_mask(2, 200, 300), 200, 300, 64)

    def test_opcheck(self):
        kinds = zip(TOLERANCE, ("bhsd", "bshd", "sliced"), strict=True)
        both = torch.ops.calibc.attention.default, torch.ops.calibc.attention_lse.default
        for op, (dtype, layout) in itertools.product(both, kinds):
            with self.subTest(op=op, dtype=dtype, layout=layout):
                q, k, v = tensors(2, 2, 200, 300, 64, dtype, layout)
                torch.library.opcheck(op, (q, k, v, self.plan.site, self.plan.step), {"scale": 0.2})

    def test_there_is_no_backward(self):
        q, k, v = tensors(1, 2, 200, 300, 64)
        out = calibc.block_sparse_attention(q.requires_grad_(), k, v, self.plan)
        with self.assertRaisesRegex(NotImplementedError, "is for inference and has no backward"):
            out.sum().backward()
        self.assertFalse(calibc.block_sparse_attention(q.detach(), k, v, self.plan).requires_grad)

    def test_a_graph_that_cannot_run_is_not_made(self):
        q, k, v = tensors(1, 2, 200, 300, 64)
        compiled = torch.compile(calibc.block_sparse_attention, backend="eager", fullgraph=True)
        with self.assertRaisesRegex(Exception, "q, k and v differ in type"):
            compiled(q, k.bfloat16(), v, self.plan)

    def test_one_graph_serves_every_layer_and_step(self):
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
            toy = Toy(layers=12, heads=2, tokens=200, head_dim=64)
            x, step = torch.randn(1, 200, 128), torch.zeros((), dtype=torch.int32)
            with torch.no_grad():
                want = toy(x, step)
                for layer in toy.layers:
                    layer.compile(backend=counter, fullgraph=True)
                for _ in range(3):
                    self.assertTrue(torch.equal(toy(x, step), want))
            self.assertEqual(counter.frame_count, 1, backend)

    def test_plans_as_arguments_make_one_graph_too(self):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(calibc.block_sparse_attention, backend=counter, fullgraph=True)
        q, k, v = tensors(1, 2, 200, 300, 64)
        for seed in range(12):
            mask = random_mask(2, 200, 300, seed=seed)
            out = compiled(q, k, v, calibc.plan_from_mask(mask, 200, 300, 64))
            self.assertLess((out - masked_attention(q, k, v, mask)[0]).abs().max().item(), 3e-6)
        self.assertEqual(counter.frame_count, 1)


class Steps(unittest.TestCase):
    def test_the_step_chooses_the_masks(self):
        """A bundle of several steps: what is computed follows the tensor's value, at every layer."""
        with tempfile.TemporaryDirectory() as folder:
            bundle = calibc.compile(TRACES, Path(folder, "plan.bundle"), target="sm_80")
        q, k, v = tensors(1, bundle.heads, bundle.q_tokens, bundle.kv_tokens, bundle.head_dim)
        step = torch.zeros((), dtype=torch.int32)
        rows = slice(0, BLOCK)
        checked = 0
        for at, layer in [(0, 0), (bundle.steps - 1, bundle.layers - 1)]:
            step.fill_(at)
            out = ops.attention(q, k, v, ops.site(bundle, layer), step)
            _, sparse, _ = bundle.op_counts(at, layer)
            for head in range(bundle.heads):
                bits = torch.frombuffer(bytearray(bundle.mask(at, layer, head)), dtype=torch.bool)
                mask = bits.view(1, blocks(bundle.q_tokens), -1)
                if mask.all():
                    continue
                want, _ = masked_attention(
                    q[:, head : head + 1, rows], k[:, head : head + 1], v[:, head : head + 1], mask[:, :1]
                )
                self.assertLess((out[:, head : head + 1, rows] - want).abs().max().item(), 1e-5)
                checked += 1
        self.assertGreater(checked, 0)


if __name__ == "__main__":
    unittest.main()

"""What calibc changes about one forward of Wan 2.1 14B's transformer: time on plans and on captures. Random weights, nothing to download.

    pip install 'calibc[cu13]' torch diffusers fa3-fwd
    python examples/wan_forward.py --resolution 480p 720p --json forward.json        # a GPU with 80 GB, some minutes
    python examples/wan_forward.py --resolution 480p --parts graphs
    python examples/wan_forward.py --tiny                                            # a small model, on a CPU

* forward: attention dense (FlashAttention-3 where it is installed, else torch), on plans of some densities, and as the same dense
  kernel on so much of K and V: the ceiling of a density. Times are medians of interleaved rounds.
* capture: the same forward inside `calibc.capture`, beside a dense one.
* graphs: one compiled graph for all layers and steps; a CUDA graph that replays what eager calls compute.

Masks are those of `side_by_side.py --kind video`, the same in all layers; each density is a step of one plan.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import calibc
import torch
from safetensors.torch import save_file
from torch import Tensor

from peers import BLOCK, first
from side_by_side import make_mask, wait

DENSITIES = (0.5, 0.375, 0.25)
SIGMAS = (0.9, 0.6, 0.3)
"""Noise levels of the plan's steps."""
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160), "tiny": (2, 32, 32)}
"""Frames, height and width; a token is 2 x 2."""
MODEL = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
TINY = MODEL | {"num_attention_heads": 2, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}

CAPTURES = {"16 rows": (16, ()), "16 rows, anchors": (16, (5,)), "all rows": (128, ())}
"""Rows per block and numbers of anchor rows, by name."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass
class Lab:
    """The model at one resolution."""

    model: torch.nn.Module
    latents: Tensor
    text: Tensor
    grid: tuple[int, int, int]
    dense: Attend
    dense_name: str
    rounds: int

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    def forward(self, step: int = 0) -> Tensor:
        """The velocity at a step of the plan."""
        level = torch.full((1,), 1000 * SIGMAS[step], device=self.latents.device)
        context = {"step_index": step, "sigma": SIGMAS[step], "num_inference_steps": len(SIGMAS)}
        with self.model.cache_context("cond", **context):
            return self.model(self.latents, timestep=level, encoder_hidden_states=self.text, return_dict=False)[0]

    @contextlib.contextmanager
    def attention(self, attend: Attend) -> Iterator[None]:
        """Self-attention by `attend`, which takes [B, S, H, D]."""
        from diffusers.models.transformers import transformer_wan

        usual = transformer_wan.dispatch_attention_fn

        def dispatch(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
            if k.shape[1] != self.tokens:
                return usual(q, k, v, *args, **kwargs)
            return attend(q, k, v)

        with mock.patch.object(transformer_wan, "dispatch_attention_fn", dispatch):
            yield

    def seconds(self, step: int = 0) -> float:
        """Time of one forward, from idle to idle."""
        wait(self.latents.device)
        start = time.perf_counter()
        self.forward(step)
        wait(self.latents.device)
        return time.perf_counter() - start

    def shortened(self, density: float) -> Attend:
        """The dense kernel at the price of a density."""
        keys = max(BLOCK, round(self.tokens * density / BLOCK) * BLOCK)
        return lambda q, k, v: self.dense(q, k[:, :keys], v[:, :keys])


def load(config: dict[str, int], device: torch.device) -> torch.nn.Module:
    """The model with random weights, such that attention differs from token to token as a trained one's does: scores have a standard
    deviation of 2, and no layer drowns its input in what all tokens have in common."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**config, cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    # As pipelines load it: some modules stay in float32.
    precise = tuple(model._keep_in_fp32_modules)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
        if "norm_q" in name or "norm_k" in name:
            parameter.data += 2**0.5
        elif any(word in name for word in ("time_proj", "to_out", "ffn.net.2")):
            parameter.data *= 0.05
        if device.type == "cuda" and not any(word in name for word in precise):
            parameter.data = parameter.data.to(torch.bfloat16)
    # Its tables are buffers, and not in weights.
    model.rope = type(model.rope)(config["attention_head_dim"], (1, 2, 2), 1024).to(device)
    return model.eval().requires_grad_(False)


def dense_kernel() -> tuple[str, Attend]:
    """The fastest dense kernel that is installed."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:

        def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return "torch", torch_attention

    return "fa3", lambda q, k, v: first(flash_attn_func(q, k, v))


def plan(lab: Lab, heads: int, layers: int, folder: pathlib.Path) -> tuple[calibc.Bundle, list[float]]:
    """A bundle whose steps have the densities, and what they come to."""
    device = lab.latents.device
    masks = [make_mask(heads, lab.tokens, density, "video", device).to("cpu", torch.uint8) for density in DENSITIES]
    save_file(
        {f"s{step}.l{layer}": mask.clone() for step, mask in enumerate(masks) for layer in range(layers)},
        folder / "masks.safetensors",
    )
    frames, height, width = lab.grid
    spec = {
        "name": "wan-forward",
        "model": {"layers": layers, "heads": heads, "head_dim": MODEL["attention_head_dim"]},
        "geometry": {"frames": frames, "height": height, "width": width},
        "sigmas": SIGMAS,
        "policy": {"kind": "explicit", "masks": "masks.safetensors"},
        "target": {"dtypes": ["bf16"], "lse": False, "archs": [arch(device)]},
    }
    # JSON is YAML.
    (folder / "plan.yaml").write_text(json.dumps(spec))
    bundle = calibc.compile(out=folder / "plan.bundle", spec=folder / "plan.yaml", progress=False)
    return bundle, [float(mask.float().mean()) for mask in masks]


def arch(device: torch.device) -> str:
    """What kernels of a plan are for."""
    if device.type != "cuda":
        return "sm_80"
    major, minor = torch.cuda.get_device_capability(device)
    return {9: "sm_90a", 8: "sm_80"}.get(major, f"sm_{major}{minor}")


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians over the rounds of what the runs time; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = run()
            if number > 0:
                times[name].append(took)
    return {name: statistics.median(took) for name, took in times.items()}


def time_forward(lab: Lab, bundle: calibc.Bundle, densities: list[float]) -> dict[str, object]:
    """Forward passes: dense, at the price of each density, and on the plan."""

    def with_kernel(attend: Attend) -> float:
        with lab.attention(attend):
            return lab.seconds()

    def on_plan(step: int) -> float:
        # All masks on the GPU, as they are while a pipeline runs: each step's are uploaded during the one before.
        config = calibc.SparseAttentionConfig(bundle, strict=True, resident_steps=None)
        with calibc.apply_sparse_attention(lab.model, config):
            return lab.seconds(step)

    runs: dict[str, Callable[[], float]] = {"dense": lambda: with_kernel(lab.dense)}
    for step, density in enumerate(densities):
        runs[f"ceiling {step}"] = partial(with_kernel, lab.shortened(density))
        runs[f"plan {step}"] = partial(on_plan, step)
    took = interleaved(runs, lab.rounds)
    rows = []
    for step, density in enumerate(densities):
        ceiling, ours = took[f"ceiling {step}"], took[f"plan {step}"]
        rows.append({"density": round(density, 4), "ceiling_s": ceiling, "calibc_s": ours, "of_ceiling": ceiling / ours})
        print(
            f"  density {density:.3f}: calibc {ours:.3f} s, ceiling {ceiling:.3f} s, {ceiling / ours:.3f} of it; dense "
            f"({lab.dense_name}) {took['dense']:.3f} s",
            flush=True,
        )
    return {"dense_s": took["dense"], "rows": rows}


def time_capture(lab: Lab, folder: pathlib.Path) -> dict[str, float]:
    """A captured forward beside a dense one. The first step of a capture loads kernels; the second is timed."""

    def captured(name: str, rows: int, anchors: tuple[int, ...]) -> float:
        config = calibc.CaptureConfig(rows, anchors=anchors, sigmas=SIGMAS[:2], progress=False)
        with calibc.capture(lab.model, folder / name.replace(" ", "-"), config) as cap, cap.prompt("a"):
            lab.forward(0)
            return lab.seconds(1)

    def dense() -> float:
        with lab.attention(lab.dense):
            return lab.seconds()

    before = dense()
    took = {name: captured(name, *how) for name, how in CAPTURES.items()}
    took = {"dense": statistics.mean((before, dense()))} | took
    for name, of in took.items():
        print(f"  {name}: {of:.3f} s, {of / took['dense'] - 1:+.1%}", flush=True)
    return took


def check_graphs(lab: Lab, bundle: calibc.Bundle) -> dict[str, object]:
    """Replays of a CUDA graph against eager calls, bit by bit; graphs of torch.compile over layers, steps and prompts."""
    config = calibc.SparseAttentionConfig(bundle, strict=True, resident_steps=None)
    steps = range(len(SIGMAS))
    result: dict[str, object] = {}
    with calibc.apply_sparse_attention(lab.model, config) as handle:
        eager = [lab.forward(step) for step in steps]
        result["eager_s"] = lab.seconds(len(SIGMAS) - 1)
        if lab.latents.device.type == "cuda":
            level = torch.full((1,), 1000 * SIGMAS[0], device=lab.latents.device)
            inputs = {"timestep": level, "encoder_hidden_states": lab.text, "return_dict": False}
            # Wan embeds the noise level outside of attention: the graph reads it from here.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = lab.model(lab.latents, **inputs)[0]
            same = []
            for step in steps:
                level.fill_(1000 * SIGMAS[step])
                handle.set_step(step)
                graph.replay()
                same.append(torch.equal(out, eager[step]))
            result["replays_equal_eager"] = all(same)
            del graph, out
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        lab.model.compile_repeated_blocks(fullgraph=True)
        other = dataclasses.replace(lab, text=lab.text.flip(1))
        furthest = 0.0
        for step in steps:
            furthest = max(furthest, difference(lab.forward(step), eager[step]))
            other.forward(step)
        result["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        result["compiled_from_eager"] = furthest
        result["compiled_s"] = lab.seconds(len(SIGMAS) - 1)
        result["fallbacks"] = sum(handle.stats().fallbacks.values())
    print(f"  {result}", flush=True)
    return result


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, over all values."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", nargs="+", choices=["480p", "720p"], default=["480p", "720p"])
    parser.add_argument("--parts", nargs="+", choices=["forward", "capture", "graphs"], default=["forward", "capture"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--json", type=pathlib.Path, help="file for everything that was measured")
    parser.add_argument("--tiny", action="store_true", help="a small model, where there is no GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    config = dict(TINY if args.tiny else MODEL)
    config["num_layers"] = args.layers or config["num_layers"]
    model = load(config, device)
    dense_name, dense = dense_kernel()
    generator = torch.Generator(device).manual_seed(1)
    dtype = model.patch_embedding.weight.dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    record: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "layers": config["num_layers"],
        "dense": dense_name,
    }
    text = noise(1, 512, config["text_dim"])
    for resolution in ["tiny"] if args.tiny else args.resolution:
        frames, height, width = LATENTS[resolution]
        latents = noise(1, config["in_channels"], frames, height, width)
        grid = (frames, height // 2, width // 2)
        lab = Lab(model, latents, text, grid, dense, dense_name, args.rounds)
        print(f"{resolution}: {lab.tokens} tokens, {config['num_layers']} layers", flush=True)
        results: dict[str, object] = {}
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            folder = pathlib.Path(name)
            if "forward" in args.parts or "graphs" in args.parts:
                bundle, densities = plan(lab, config["num_attention_heads"], config["num_layers"], folder)
            if "forward" in args.parts:
                results["forward"] = time_forward(lab, bundle, densities)
            if "capture" in args.parts:
                results["capture_s"] = time_capture(lab, folder)
            # Last: the blocks stay compiled.
            if "graphs" in args.parts:
                results["graphs"] = check_graphs(lab, bundle)
        record[resolution] = results
        if args.json is not None:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compares sparse-attention policies on a trained video model: the quality that each leaves at equal density.

    python examples/moving-shapes/lab.py --work /tmp/lab --json lab.json --picture lab.png          # on a GPU, some minutes
    python examples/moving-shapes/lab.py --work /tmp/lab --tiny --policies calibatt random          # on a CPU

The way is that of any user: `calibc.capture` on calibration prompts, `calibc.sensitivity`, `calibc.compile` under a spec, and
`calibc.apply_sparse_attention` while other prompts are generated. Every video is compared with the dense video of its prompt and
seed. `--work` keeps traces and bundles; a capture that is there is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import calibc
import torch
from calibc import ops
from torch import Tensor

import baselines
import data
import metrics
import model as models
import pictures
import policies
import sampler
import traces

# Prompts of the traces: those that make plans, and those that judge them.
PROMPTS = (10, 2)
# Seeds of the prompts: those that are generated are others than those that plans are made from.
CALIBRATION_SEED, EVALUATION_SEED = 100, 200
# What the others of a density are compared with: the first of these that there is.
REFERENCES = ("calibatt", "anchors by cosine")


@dataclasses.dataclass
class Row:
    """A policy at a density."""

    policy: str
    wanted: float
    """The density that was asked for."""
    density: float
    """The density that ran."""
    attention_ms: float | None
    """Attention of one video: all steps and layers, both passes of guidance."""
    generation_s: float
    """All videos."""
    recall: float
    """Softmax mass that the masks keep on the holdout prompts."""
    psnr: list[float | None]
    """Against the dense video, by video; `None` where the policy made none."""
    ssim: list[float | None]
    elapsed_s: float = 0.0
    """From the start of the run to the end of this."""


class Phases:
    """How long each part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        settle()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Lab:
    """The model, the videos to generate, and what has been measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.began = time.perf_counter()
        self.phases = Phases()
        with self.phases("load"):
            self.transformer = models.load(args.weights, dtype).to(self.device)
        config = self.transformer.config
        _, height, width = config.patch_size
        self.grid = baselines.Grid(args.frames, args.size // height, args.size // width)
        prompts = -(-args.videos // args.seeds)
        ids = data.prompts(prompts, args.evaluation_seed)
        self.prompt_of = [v // args.seeds for v in range(args.videos)]
        self.ids = ids[self.prompt_of]
        self.seeds = [1000 + v for v in range(args.videos)]
        self.folder: pathlib.Path = args.work
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.kept: dict[tuple[str, float], Tensor] = {}
        self.sensitivity: Any = None

    # Calibration.

    def capture(self, folder: pathlib.Path, ids: Tensor, seeds: list[int], holdout: int, steps: Any = None) -> None:
        """A trace of prompts, the last `holdout` of which judge."""
        config = calibc.CaptureConfig(
            prompts=len(ids),
            rows_per_block=self.args.rows_per_block,
            anchors=(policies.ANCHORS,),
            steps=steps,
            model="moving-shapes",
            progress=False,
        )
        names = [f"p{i:03}" for i in range(len(ids))]
        with calibc.capture(self.transformer, folder, config) as cap:
            for name in cap.remaining(names):
                i = names.index(name)
                split = "holdout" if i >= len(ids) - holdout else "calibration"
                with cap.prompt(name, seed=seeds[i], split=split, label=data.describe(ids[i])):
                    self.one(ids[i], seeds[i])

    def one(self, ids: Tensor, seed: int) -> Tensor:
        """One video, the two passes of guidance one after the other, as capture wants them."""
        noise = sampler.noise([seed], self.args.frames, self.args.size)
        return sampler.sample(self.transformer, ids[None], noise, steps=self.args.steps)

    def measure_sensitivity(self, folder: pathlib.Path, method: Literal["gradient", "exact"]) -> Any:
        """w and u of the calibration prompts, written beside the traces."""
        ids, seeds = calibration(self.args)
        # Those that judge stay out of it.
        count = min(self.args.sensitivity_prompts, self.args.prompts[0])
        runs = [partial(self.one, ids[i], seeds[i]) for i in range(count)]
        config = calibc.SensitivityConfig(
            method=method,
            guidance_scale=sampler.GUIDANCE,
            steps=self.args.sensitivity_steps,
            # Prompts differ more than projections do.
            projections=1,
            progress=False,
        )
        return calibc.sensitivity(self.transformer, folder, run=runs, config=config)

    # Generation.

    def generate(self, which: list[int], stop: int | None = None) -> Tensor:
        """Videos by number, [B, 3, frames, size, size] in 0..1, on the device; `stop` after so many steps."""
        parts = []
        for at in range(0, len(which), self.args.batch):
            some = which[at : at + self.args.batch]
            noise = sampler.noise([self.seeds[v] for v in some], self.args.frames, self.args.size)
            with models.backend("cudnn"):
                parts.append(
                    sampler.sample(
                        self.transformer, self.ids[some], noise, steps=self.args.steps, batched=True, stop=stop
                    )
                )
        return (torch.cat(parts).clamp(-1, 1) + 1) / 2

    def run(self, bundle: calibc.Bundle, which: list[int], stop: int | None = None) -> tuple[Tensor, float, float]:
        """Videos on a bundle; the density that ran, and seconds."""
        with calibc.apply_sparse_attention(
            self.transformer, calibc.SparseAttentionConfig(bundle, strict=True)
        ) as handle:
            settle()
            start = time.perf_counter()
            videos = self.generate(which, stop)
            settle()
            seconds, density = time.perf_counter() - start, handle.stats().density
            assert density is not None, "something was generated"
            return videos, density, seconds

    def attention_ms(self, bundle: calibc.Bundle | None) -> float | None:
        """Attention of one video on the GPU: all steps and layers, twice; of torch's dense attention without a bundle."""
        if self.device.type != "cuda":
            return None
        batch = min(8, self.args.batch)
        config = self.transformer.config
        shape = (batch, self.grid.tokens, config.num_attention_heads, config.attention_head_dim)
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (
            torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        step = torch.zeros((), dtype=torch.int32, device=self.device)
        layers = range(config.num_layers)
        sites = [ops.site(bundle, layer) for layer in layers] if bundle is not None else []

        def once(at: int) -> None:
            step.fill_(at)
            for layer in layers:
                if bundle is None:
                    with models.backend("cudnn"):
                        torch.nn.functional.scaled_dot_product_attention(q, k, v)
                else:
                    ops.attention(q, k, v, sites[layer], step)

        if bundle is not None:
            ops.load(bundle, self.device)
        total = 0.0
        for at in range(self.args.steps):
            if bundle is not None:
                ops.enter(bundle, at, self.device)
            # The first one waits for the step's masks to be there.
            once(at)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            once(at)
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end)
        return total * 2 / batch

    def judge(self, name: str, wanted: float, bundle: calibc.Bundle, dense: Tensor) -> None:
        """Generates all videos on a bundle and compares them."""
        every = list(range(self.args.videos))
        with self.phases("generate"):
            videos, density, seconds = self.run(bundle, every)
        with self.phases("attention time"):
            attention = self.attention_ms(bundle)
        with self.phases("compare"):
            row = Row(
                name,
                wanted,
                density,
                attention,
                seconds,
                self.evidence.recall(policies.masks_of(bundle, self.grid.blocks)),
                *(f(videos, dense).tolist() for f in (metrics.psnr, metrics.ssim)),
            )
        self.kept[name, wanted] = videos.half().cpu()
        self.add(row)

    def add(self, row: Row) -> None:
        """Keeps a row, in the file too: a run that is killed leaves what it has."""
        row.elapsed_s = round(time.perf_counter() - self.began, 1)
        self.rows.append(row)
        made = f"density {row.density:.4f}, {mean(row.psnr):.2f} dB"
        print(f"{row.elapsed_s:.0f} s: {row.policy} at {row.wanted}: {made}", flush=True)
        if self.args.json is not None:
            self.args.json.write_text(json.dumps(self.record(), indent=1) + "\n")

    # The whole.

    def work(self) -> None:
        """Everything that the arguments ask for."""
        args, trace = self.args, self.folder / "traces"
        ids, seeds = calibration(args)
        if args.example_traces is not None:
            with self.phases("example traces"):
                # Prompts as unlike each other as they come: few must do.
                few = [0, -1, 3]
                self.capture(args.example_traces, ids[few], [seeds[i] for i in few], 1, steps=[3, 13])
        with self.phases("capture"):
            self.capture(trace, ids, seeds, args.prompts[1])
        with self.phases("read"):
            self.evidence = traces.Evidence(trace)
        target = {"dtypes": ["bf16"], "lse": False, "archs": args.arch}
        self.job = policies.Job(trace, self.evidence, self.grid, self.folder, target)
        chosen = {name: policies.POLICIES[name] for name in args.policies}
        ingredients = policies.INGREDIENTS if args.ingredients else {}
        early: list[tuple[str, float, calibc.Bundle]] = []
        if any(name.startswith("budget") for name in chosen) or ingredients or args.anchor_share or args.oracle:
            early = self.sensitivities(trace)
        every = list(range(args.videos))
        if args.oracle:
            self.capture_oracle()
        if args.compile:
            # From here on: what follows has one shape, and captures need no graphs.
            self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        with self.phases("warm up"):
            everything = self.all_blocks()
            self.generate(every[: args.batch], stop=1)
            self.run(everything, every[: args.batch], stop=1)
        with self.phases("generate"):
            start = time.perf_counter()
            dense = self.generate(every)
            settle()
            self.dense_s = time.perf_counter() - start
        with self.phases("attention time"):
            self.dense_ms = self.attention_ms(None)
        self.kept["dense", 1.0] = dense.half().cpu()
        print(f"dense: {args.videos} videos in {self.dense_s:.1f} s", flush=True)
        jobs: list[tuple[str, float, Callable[[], calibc.Bundle]]] = [("all blocks", 1.0, lambda: everything)]
        jobs += [(name, density, partial(lambda made: made, bundle)) for name, density, bundle in early]
        for density in args.densities:
            for name, make in chosen.items():
                jobs.append((name, density, partial(make, self.job, f"{name}-{density}", density)))
        jobs += self.anchor_jobs()
        for name, make in ingredients.items():
            density = args.ingredients_density
            jobs.append((name, density, partial(make, self.job, f"{name}-{density}", density)))
        # The CPU compiles the next plans while the GPU generates.
        with ThreadPoolExecutor(args.workers) as pool:
            bundles = [pool.submit(make) for _, _, make in jobs]
            for (name, density, _), bundle in zip(jobs, bundles, strict=True):
                if self.late(f"{name} at {density}"):
                    pool.shutdown(cancel_futures=True)
                    break
                with self.phases("wait for compile"):
                    made = bundle.result()
                self.judge(name, density, made, dense)
        if args.oracle and not self.late("the oracle"):
            self.oracle(dense)

    def late(self, what: str) -> bool:
        """Whether there is no time left for something."""
        late = self.args.time_limit is not None and time.perf_counter() - self.began > self.args.time_limit
        if late:
            print(f"out of time: {what} and what would follow is left out", flush=True)
        return late

    def all_blocks(self) -> calibc.Bundle:
        """A plan that drops nothing: what calibc's kernels and torch's differ by."""
        blocks = self.grid.blocks
        return self.job.explicit("all", torch.ones(1, dtype=torch.bool).expand(*self.job.sites, blocks, blocks))

    def sensitivities(self, trace: pathlib.Path) -> list[tuple[str, float, calibc.Bundle]]:
        """Measures them; bundles of `budget` made from the exact ones, where those are to be compared."""
        early = []
        if self.args.exact:
            with self.phases("sensitivity, exact"):
                exact = self.measure_sensitivity(trace, "exact")
            for density in self.args.densities:
                with self.phases("wait for compile"):
                    early.append(("budget, exact u", density, policies.budget(self.job, f"exact-{density}", density)))
        with self.phases("sensitivity"):
            self.sensitivity = self.measure_sensitivity(trace, "gradient")
            if self.args.example_traces is not None:
                self.sensitivity.write(self.args.example_traces)
        if self.args.exact:
            at = list(exact.measured)
            self.rank_correlation = spearman(
                torch.as_tensor(exact.head)[at].flatten(), torch.as_tensor(self.sensitivity.head)[at].flatten()
            )
            print(f"rank correlation of u, exact against gradient: {self.rank_correlation:.3f}", flush=True)
        return early

    def anchor_jobs(self) -> list[tuple[str, float, Callable[[], calibc.Bundle]]]:
        """Anchor rows at the same share of sites, by each rule, all other sites dense."""
        if not self.args.anchor_share:
            return []
        steps, layers, heads = self.job.sites
        count = round(self.args.anchor_share * steps * layers * heads)
        w, u = torch.as_tensor(self.sensitivity.step), torch.as_tensor(self.sensitivity.head)
        density = 1 - count / (steps * layers * heads) * (1 - policies.ANCHORS / self.grid.height)
        jobs: list[tuple[str, float, Callable[[], calibc.Bundle]]] = []
        for rule in policies.ANCHOR_RULES:
            chosen = policies.anchor_sites(self.job, rule, count, w, u)
            name = f"anchors by {rule}"
            jobs.append((name, round(density, 4), partial(policies.anchors_only, self.job, name, chosen)))
        return jobs

    def oracle_prompts(self) -> list[int]:
        """The prompts that get plans of their own."""
        return sorted(set(self.prompt_of))[: self.args.oracle]

    def capture_oracle(self) -> None:
        """Traces of single prompts, with the sensitivities of all."""
        for prompt in self.oracle_prompts():
            folder = self.folder / "oracle" / f"p{prompt:03}"
            video = self.prompt_of.index(prompt)
            with self.phases("oracle: capture"):
                self.capture(folder, self.ids[video : video + 1], [self.seeds[video]], 0)
                self.sensitivity.write(folder)

    def oracle(self, dense: Tensor) -> None:
        """`budget` from each prompt's own trace."""
        args = self.args
        for density in args.densities:
            psnr: list[float | None] = [None] * args.videos
            ssim: list[float | None] = [None] * args.videos
            densities, seconds = [], 0.0
            policy = policies.BUDGET | {"density": density}
            for prompt in self.oracle_prompts():
                with self.phases("oracle: compile"):
                    name, folder = f"oracle-{density}-{prompt}", self.folder / "oracle" / f"p{prompt:03}"
                    bundle = self.job.compile(name, policy, folder)
                which = [v for v, p in enumerate(self.prompt_of) if p == prompt]
                with self.phases("oracle: generate"):
                    videos, ran, took = self.run(bundle, which)
                densities.append(ran)
                seconds += took
                for v, a, b in zip(
                    which,
                    metrics.psnr(videos, dense[which]).tolist(),
                    metrics.ssim(videos, dense[which]).tolist(),
                    strict=True,
                ):
                    psnr[v], ssim[v] = a, b
            self.add(Row("oracle", density, statistics.mean(densities), None, seconds, math.nan, psnr, ssim))

    # Results.

    def table(self) -> str:
        """One line per policy and density."""
        lines: list[str] = []
        for wanted in sorted({row.wanted for row in self.rows}, reverse=True):
            rows = [row for row in self.rows if row.wanted == wanted]
            reference = self.reference(rows[0])
            against = "" if reference is None else f"   PSNR - {reference.policy}    SSIM - {reference.policy}"
            lines += ["", f"{'policy':22} density  attention  recall    PSNR    SSIM{against}"]
            for row in sorted(rows, key=lambda row: -mean(row.psnr)):
                attention = "-" if row.attention_ms is None else f"{row.attention_ms:.2f} ms"
                recall = "-" if math.isnan(row.recall) else f"{row.recall:.3f}"
                line = f"{row.policy:22} {row.density:7.4f} {attention:>10}  {recall:>6}"
                line += f"  {mean(row.psnr):6.2f}  {mean(row.ssim):6.4f}"
                if reference is not None and row is not reference:
                    more, error, wins, of = self.difference(row, reference, "psnr")
                    line += f"   {more:+.2f} +- {error:.2f} ({wins}/{of})"
                    more, error, wins, of = self.difference(row, reference, "ssim")
                    line += f"   {more:+.4f} +- {error:.4f} ({wins}/{of})"
                lines.append(line)
        dense = f"dense: {self.dense_s:.2f} s for {self.args.videos} videos"
        if self.dense_ms is not None:
            dense += f", attention {self.dense_ms:.2f} ms a video"
        return "\n".join([*lines, "", dense])

    def reference(self, row: Row) -> Row | None:
        """What a row is compared with, if there is something of its density."""
        same = {other.policy: other for other in self.rows if other.wanted == row.wanted}
        return next((same[name] for name in REFERENCES if name in same), None)

    def difference(self, row: Row, reference: Row, what: str) -> tuple[float, float, int, int]:
        """Mean paired difference over the videos that both have, its standard error, wins, and of how many."""
        pairs = [
            (a, b, prompt)
            for a, b, prompt in zip(getattr(row, what), getattr(reference, what), self.prompt_of, strict=True)
            if a is not None and b is not None
        ]
        a, b, prompt = zip(*pairs, strict=True)
        return (*metrics.paired(torch.tensor(a), torch.tensor(b), list(prompt)), len(pairs))

    def record(self) -> dict[str, Any]:
        """Everything, for a file."""
        rows = []
        for row in self.rows:
            line = dataclasses.asdict(row)
            line["psnr_mean"], line["ssim_mean"] = mean(row.psnr), mean(row.ssim)
            reference = self.reference(row)
            line["reference"] = None if reference is None else reference.policy
            for what in ("psnr", "ssim"):
                # Mean, standard error, videos that are better, videos.
                line[f"{what}_difference"] = reference and self.difference(row, reference, what)
            rows.append(line)
        return {
            "schema_version": 1,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "calibc": calibc.__version__,
            "videos": self.args.videos,
            "prompts": [data.describe(row) for row in self.ids],
            "seeds": self.seeds,
            "dense_generation_s": self.dense_s,
            "dense_attention_ms": self.dense_ms,
            "rank_correlation_u": getattr(self, "rank_correlation", None),
            "sensitivity_step": None if self.sensitivity is None else torch.as_tensor(self.sensitivity.step).tolist(),
            "phases_s": {name: round(seconds, 2) for name, seconds in self.phases.seconds.items()},
            "rows": tidy(rows),
        }

    def picture(self, path: pathlib.Path, policy: str) -> str:
        """Frames of one video, dense above the policy at its densities; what the rows are, in words."""
        rows = sorted((row for row in self.rows if row.policy == policy), key=lambda row: -row.density)[-2:]
        if not rows:
            raise SystemExit(f"there is no picture of {policy}: it is not among the policies that ran")
        # The video whose quality is the median at the lowest density: neither the best nor the worst.
        lowest = torch.tensor(rows[-1].psnr)
        order = lowest.argsort().tolist()
        video = order[len(order) // 2]
        shown = [self.kept["dense", 1.0][video], *(self.kept[policy, row.wanted][video] for row in rows)]
        for frames in range(8, 1, -1):
            pictures.save_png(pictures.contact_sheet(torch.stack(shown).float() * 2 - 1, frames), path)
            if path.stat().st_size < 200_000:
                break
        words = [f"`{data.describe(self.ids[video])}`, seed {self.seeds[video]}; from above: dense"]
        words += [
            f"{policy} at density {r.density:.2f}: {r.psnr[video]:.1f} dB, SSIM {r.ssim[video]:.3f}" for r in rows
        ]
        return "; ".join(words)


def calibration(args: argparse.Namespace) -> tuple[Tensor, list[int]]:
    """The prompts that traces are made of, and a seed for each."""
    count = sum(args.prompts)
    return data.prompts(count, CALIBRATION_SEED), [11 + i % 4 for i in range(count)]


def mean(values: list[float | None]) -> float:
    """Mean over the videos that there are."""
    return statistics.mean(value for value in values if value is not None)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def tidy(value: Any) -> Any:
    """JSON has no numbers that are none."""
    if isinstance(value, dict):
        return {key: tidy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settle() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for traces, specs and bundles")
    parser.add_argument("--weights", type=pathlib.Path, default=models.WEIGHTS, help="folder that train.py wrote")
    parser.add_argument("--policies", nargs="*", choices=list(policies.POLICIES), default=policies.MASKS_ALONE)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.6, 0.45, 0.3])
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2, help="videos of a prompt")
    parser.add_argument("--evaluation-seed", type=int, default=EVALUATION_SEED, help="draws the prompts of the videos")
    parser.add_argument("--batch", type=int, default=32, help="videos generated at once")
    parser.add_argument("--ingredients", action="store_true", help="also `budget` without some of its ingredients")
    parser.add_argument("--ingredients-density", type=float, default=0.45)
    parser.add_argument(
        "--anchor-share", type=float, default=0.0, help="share of sites for anchor rows by several rules"
    )
    parser.add_argument(
        "--oracle", type=int, default=0, metavar="PROMPTS", help="prompts to make plans from their own traces for"
    )
    parser.add_argument("--exact", action="store_true", help="also measure sensitivities head by head, and compare")
    parser.add_argument("--sensitivity-prompts", type=int, default=4)
    parser.add_argument("--sensitivity-steps", type=int, default=6)
    parser.add_argument("--rows-per-block", type=int, default=128)
    parser.add_argument("--steps", type=int, default=sampler.STEPS)
    parser.add_argument("--arch", nargs="+", default=["sm_90a"], help="GPU architectures to compile for")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks to generate")
    parser.add_argument("--workers", type=int, default=4, help="compiles at once")
    parser.add_argument("--json", type=pathlib.Path, help="file for everything that was measured")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG to write: dense beside sparse")
    parser.add_argument("--picture-policy", default="budget")
    parser.add_argument(
        "--example-traces", type=pathlib.Path, help="folder for a small trace: three prompts, two steps"
    )
    parser.add_argument("--time-limit", type=float, help="seconds after which no further policy is begun")
    parser.add_argument("--tiny", action="store_true", help="tiny videos, for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.frames, args.size = models.FRAMES, models.SIZE
    args.prompts = PROMPTS
    if args.tiny:
        args.frames, args.size, args.videos, args.steps, args.prompts = 2, 32, 2, 3, (2, 1)
    if args.videos < 1 or args.seeds < 1 or args.batch < 1:
        parser.error("--videos, --seeds and --batch must be at least 1")
    lab = Lab(args)
    lab.work()
    print(lab.table())
    if args.picture is not None:
        print(f"{args.picture}: {lab.picture(args.picture, args.picture_policy)}")
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in lab.phases.seconds.items())
    print(f"{phases}; {sum(lab.phases.seconds.values()):.1f} s in all")


if __name__ == "__main__":
    main()

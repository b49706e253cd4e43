"""Our block-sparse attention beside its peers: same masks, interleaved rounds, every row checked against float32.

    python examples/side_by_side.py --shape wan14b-480p wan14b-720p --density 0.5 0.25 0.1
    python examples/side_by_side.py --shape 24x119056x128 --kind video random --order hot --json rows.json
    python examples/side_by_side.py --device cpu --shape 2x300x64 --density 0.5        # the reference, to try the script

Needs `pip install .` and torch; peers take part where they are installed, and are listed as absent where they are not. Each
round runs every kernel once, in turn, so that a drifting clock moves all of them alike; times are medians over the rounds.
TFLOP/s count kept blocks only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from peers import BLOCK, OURS, PROVIDERS, Provider, Run

SHAPES = {  # heads, tokens, head_dim
    "wan14b-480p": (40, 32760, 128),
    "wan14b-720p": (40, 75600, 128),
    "wan1.3b-480p": (12, 32760, 128),
    "mochi-480p": (24, 44520, 128),
    "hunyuan-720p": (24, 119056, 128),
    "d64-32k": (40, 32760, 64),
}
DEFAULT_PROVIDERS = [
    provider.name for provider in PROVIDERS if provider.name not in ("calibc-portable", "fa3-fp8-dense")
]
FRAMES = 21
"""Latent frames of a video mask: its bands lie this many to a sequence."""


def make_mask(heads: int, tokens: int, density: float, kind: str, device: torch.device, seed: int = 0) -> Tensor:
    """A mask bool [heads, blocks, blocks] of about this density; the diagonal is always kept.

    `random`: blocks drawn evenly. `video`: what calibration finds in video models: a band along the diagonal, further bands one
    latent frame apart, a sink column, some noise; heads have 0.4 to 1.6 times the mean density.
    """
    blocks = -(-tokens // BLOCK)
    if density >= 1:
        return torch.ones(heads, blocks, blocks, dtype=torch.bool, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    noise = torch.rand(heads, blocks, blocks, device=device, generator=generator)
    at = torch.arange(blocks, device=device)
    if kind == "random":
        mask = noise < density
    else:
        distance = (at[:, None] - at[None, :]).abs().float()
        frame = max(blocks / FRAMES, 2.0)
        from_band = torch.remainder(distance + frame / 2, frame) - frame / 2
        score = -distance / blocks * 1.5 - from_band.abs() / frame * 2
        score = score + 0.35 * noise
        score[:, :, :2] += 3
        wanted = torch.linspace(0.4, 1.6, heads, device=device) * density
        mask = torch.stack(
            [keep_best(head, share) for head, share in zip(score, wanted.clamp(max=1).tolist(), strict=True)]
        )
    mask[:, at, at] = True
    return mask


def keep_best(score: Tensor, share: float) -> Tensor:
    """True for about `share` of the elements, the highest. The quantile is taken of a sample where there are many."""
    sample = score.flatten()[:: max(1, score.numel() // 1_000_000)]
    return score >= torch.quantile(sample, 1 - share)


def float32_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rows: list[int]) -> list[tuple[slice, Tensor]]:
    """Attention in float32 for some blocks of queries: (tokens, [H, tokens, D]) each."""
    heads, tokens, head_dim = q.shape[1:]
    result = []
    for row in rows:
        at = slice(row * BLOCK, min(tokens, (row + 1) * BLOCK))
        out = torch.empty(heads, at.stop - at.start, head_dim, device=q.device)
        for head in range(heads):
            scores = q[0, head, at].float() @ k[0, head].float().T / head_dim**0.5
            kept = mask[head, row].repeat_interleave(BLOCK)[: k.shape[2]]
            out[head] = torch.softmax(scores.masked_fill(~kept, float("-inf")), -1) @ v[0, head].float()
        result.append((at, out))
    return result


def error_against(out: Tensor, want: list[tuple[slice, Tensor]]) -> float:
    """Largest relative error, in the norm, of the blocks of queries."""
    return max(((out[0, :, at].float() - rows).norm() / rows.norm()).item() for at, rows in want)


@dataclasses.dataclass
class Entry:
    """A provider that runs on this problem."""

    provider: Provider
    run: Run
    error: float
    prepare_s: float
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


SPIN_CYCLES = 1_000_000
"""What the GPU is kept busy with while the host queues a call: about half a millisecond, more than any peer's host code takes."""


def measure(run: Run, device: torch.device) -> float:
    """Milliseconds that the GPU (or the CPU) spends on one call; host time of GPU kernels is hidden, and so not compared."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def mountain(entries: list[Entry], cost: dict[str, float]) -> list[Entry]:
    """The entries with the fastest per unit of work in the middle, slower ones outwards.

    A kernel that leaves the tensor cores idle cools the chip, and whoever comes next finds a higher clock. In this order the
    fast ones, ours among them, have fast neighbours on both sides.
    """
    ranked = sorted(entries, key=lambda entry: cost[entry.provider.name])
    return ranked[::-2] + ranked[len(ranked) % 2 :: 2] if len(ranked) > 1 else ranked


class ClockLog:
    """Samples the GPU's clock while it is open; without nvidia-smi it knows nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.process = device, None

    def __enter__(self) -> ClockLog:
        if self.device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(self.device).uuid)
            query = ["--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits", "-lms", "50"]
            try:
                self.process = subprocess.Popen(
                    ["nvidia-smi", "-i", f"GPU-{uuid.removeprefix('GPU-')}", *query],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            except OSError:
                pass
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()

    def summary(self) -> dict[str, float]:
        """Medians, and the range of the clock; empty where nothing was sampled."""
        if self.process is None:
            return {}
        text, _ = self.process.communicate(timeout=10)
        samples = []
        for line in text.splitlines():
            try:
                samples.append([float(word) for word in line.split(",")])
            except ValueError:
                continue
        if not samples:
            return {}
        clock, power, heat = (list(column) for column in zip(*samples, strict=True))
        middle = statistics.median
        return {
            "sm_mhz": middle(clock), "sm_mhz_min": min(clock), "sm_mhz_max": max(clock), "watts": middle(power), "celsius": middle(heat),
        }  # fmt: skip


def prepare(
    providers: list[Provider], inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor, failed: dict[str, str]
) -> list[Entry]:
    """Sets every provider up on one problem and checks what it computes. Those that fail are told and left out."""
    q, k, v = inputs
    blocks = mask.shape[1]
    rows = sorted({0, blocks // 2, blocks - 1})
    wants = {False: float32_rows(q, k, v, mask, rows), True: float32_rows(q, k, v, torch.ones_like(mask), rows)}
    entries = []
    for provider in providers:
        try:
            start = time.perf_counter()
            run = provider.prepare(q, k, v, mask)
            out = run()
            wait(q.device)
            seconds = time.perf_counter() - start
            error = error_against(out, wants[provider.dense])
            del out
            for _ in range(2):
                run()
            wait(q.device)
        except Exception as problem:  # A peer may fail in any way it likes; the others go on.
            if provider.name == OURS:
                raise
            words = (str(problem).strip() or "no message").splitlines()[0]
            failed[provider.name] = f"{type(problem).__name__}: {words[:200]}"
            continue
        entries.append(Entry(provider, run, error, seconds))
    return entries


def compare(entries: list[Entry], work: dict[str, float], rounds: int, order: str, device: torch.device) -> None:
    """Times every entry once per round. `work`: FLOPs of each."""
    if order == "hot":
        cost = {entry.provider.name: measure(entry.run, device) / work[entry.provider.name] for entry in entries}
        entries = mountain(entries, cost)
    for number in range(rounds):
        # Every other round the other way, so that neither of two neighbours always comes first.
        for entry in entries[:: -1 if order == "hot" and number % 2 else 1]:
            entry.times.append(measure(entry.run, device))


def table(
    entries: list[Entry], work: dict[str, float], shape: str, kind: str, density: float
) -> list[dict[str, object]]:
    """One row per entry, fastest first."""
    ours = next((entry.ms for entry in entries if entry.provider.name == OURS), None)
    dense = min((entry.ms for entry in entries if entry.provider.dense), default=None)
    rows = []
    for entry in sorted(entries, key=lambda entry: entry.ms):
        name = entry.provider.name
        rows.append(
            {
                "shape": shape,
                "kind": kind,
                "density": round(density, 4),
                "provider": name,
                "dense": entry.provider.dense,
                "ms": round(entry.ms, 4),
                "ms_min": round(min(entry.times), 4),
                "ms_max": round(max(entry.times), 4),
                "tflops": round(work[name] / entry.ms / 1e9, 1),
                "error": float(f"{entry.error:.2e}"),
                "ratio_to_ours": round(entry.ms / ours, 3) if ours else None,
                "speedup_over_dense": round(dense / entry.ms, 3) if dense else None,
                "prepare_s": round(entry.prepare_s, 3),
            }
        )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    print(f"\n{rows[0]['shape']}, {rows[0]['kind']}, density {rows[0]['density']}")
    print(f"  {'provider':18} {'ms':>9} {'min':>9} {'TFLOP/s':>8} {'error':>8} {'peer/ours':>9} {'vs dense':>8}")
    for row in rows:
        ratio, speedup = (
            "-" if value is None else f"{value:.3f}" for value in (row["ratio_to_ours"], row["speedup_over_dense"])
        )
        print(
            f"  {row['provider']:18} {row['ms']:9.3f} {row['ms_min']:9.3f} {row['tflops']:8.1f} {row['error']:8.1e} "
            f"{ratio:>9} {speedup:>8}"
        )


def shape_of(text: str) -> tuple[int, int, int]:
    """A name of `SHAPES`, or heads x tokens x head_dim."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        heads, tokens, head_dim = (int(part) for part in text.split("x"))
    except ValueError:
        names = ", ".join(SHAPES)
        raise argparse.ArgumentTypeError(f"`{text}` is neither one of {names} nor HEADSxTOKENSxHEAD_DIM") from None
    return heads, tokens, head_dim


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", default=["wan14b-480p"], help="names or HEADSxTOKENSxHEAD_DIM: " + ", ".join(SHAPES)
    )
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    parser.add_argument("--kind", nargs="+", choices=["video", "random"], default=["video"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--order", choices=["given", "hot"], default="given", help="hot: fast kernels have fast neighbours"
    )
    parser.add_argument("--only", default="", help="providers, with commas: " + ", ".join(p.name for p in PROVIDERS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", metavar="FILE", help="also write everything here; - for stdout, instead of the tables"
    )
    parsed = parser.parse_args(argv)
    known = {provider.name for provider in PROVIDERS}
    parsed.only = [name for name in parsed.only.split(",") if name] or DEFAULT_PROVIDERS
    if unknown := set(parsed.only) - known:
        parser.error(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if parsed.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        parsed.shape = {text: shape_of(text) for text in parsed.shape}
    except argparse.ArgumentTypeError as problem:
        parser.error(str(problem))
    return parsed


def machine(device: torch.device) -> dict[str, object]:
    import calibc

    told: dict[str, object] = {"device": "CPU", "torch": torch.__version__, "calibc": calibc.__version__}
    if device.type == "cuda":
        told |= {"device": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    return told


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    # The float32 reference must be that.
    torch.backends.cuda.matmul.allow_tf32 = False
    # On the CPU, float32: rounding of bf16 outputs would hide mistakes.
    dtype = getattr(torch, options.dtype) if device.type == "cuda" else torch.float32
    quiet = options.json == "-"
    asked = [provider for provider in PROVIDERS if provider.name in options.only]
    absent = {p.name: why for p in asked if (why := p.absent(device))}
    providers = [provider for provider in asked if provider.name not in absent]
    report: dict[str, object] = {"schema_version": 1, "kind": "side_by_side", **machine(device), "absent": absent}
    report |= {
        "rounds": options.rounds,
        "order": options.order,
        "dtype": str(dtype).removeprefix("torch."),
        "results": [],
    }
    if not quiet:
        print(
            f"{report['device']}, torch {report['torch']}, calibc {report['calibc']}, {report['dtype']}, {options.rounds} rounds"
        )
        for name, why in absent.items():
            print(f"absent: {name} ({why})")
    for shape, (heads, tokens, head_dim) in options.shape.items():
        generator = torch.Generator(device=device).manual_seed(1)
        options_of = {"device": device, "dtype": dtype, "generator": generator}
        inputs = tuple(torch.randn(1, heads, tokens, head_dim, **options_of) for _ in range(3))
        for kind in options.kind:
            for density in options.density:
                mask = make_mask(heads, tokens, density, kind, device)
                kept = mask.float().mean().item()
                all_work = 4.0 * tokens * tokens * heads * head_dim
                work = {provider.name: all_work * (1.0 if provider.dense else kept) for provider in providers}
                failed: dict[str, str] = {}
                entries = prepare(providers, inputs, mask, failed)
                with ClockLog(device) as log:
                    compare(entries, work, options.rounds, options.order, device)
                rows, clock = table(entries, work, shape, kind, kept), log.summary()
                report["results"].append({"rows": rows, "clock": clock, "failed": failed})
                if not quiet:
                    show(rows)
                    for name, why in failed.items():
                        print(f"  failed: {name}: {why}")
                    if clock:
                        print(
                            "  SM clock {sm_mhz:.0f} MHz ({sm_mhz_min:.0f} to {sm_mhz_max:.0f}), {watts:.0f} W, {celsius:.0f} C".format(
                                **clock
                            )
                        )
                del entries, mask
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if quiet:
        json.dump(report, sys.stdout, indent=1)
        print()
    elif options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

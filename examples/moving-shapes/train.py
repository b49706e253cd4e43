"""Trains the model of moving shapes: rectified flow, ten minutes on one large GPU.

    python examples/moving-shapes/train.py --out weights/ --time-limit 580 --compile
    python examples/moving-shapes/train.py --out /tmp/smoke --smoke --compile        # step times of every stage, in a minute
    python examples/moving-shapes/train.py --out /tmp/tiny --tiny --time-limit 60    # on a CPU

Three stages: few small frames, all frames small, all frames at full size. The time is shared out by fractions. Writes the
averaged weights (bfloat16, as diffusers reads them), `training.jsonl` and a contact sheet of samples; weights every minute, so
that a killed run leaves something. `--checkpoint` keeps the optimizer's state as well, for `--resume`.
"""

from __future__ import annotations

import time

_STARTED = time.monotonic()

import argparse  # noqa: E402
import copy  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import pathlib  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import pictures  # noqa: E402
import sampler  # noqa: E402

PROMPT_DROPOUT = 0.1
WARMUP = 200
EMA_DECAY = 0.999


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training."""

    frames: int
    size: int
    batch: int
    shift: float
    """Of the noise levels towards noise: larger videos keep more of their content at the same level."""
    until: float
    """Share of the training time at its end."""
    rate: float
    """Learning rate at its start; the last stage brings its own down to a twentieth."""


STAGES = (
    Stage(4, 32, 64, 2.0, 0.15, 1e-3),
    Stage(16, 32, 16, 3.0, 0.45, 8e-4),
    Stage(16, 64, 4, 4.0, 1.0, 6e-4),
)
TINY = (Stage(2, 16, 4, 2.0, 0.3, 1e-3), Stage(4, 16, 4, 3.0, 0.6, 1e-3), Stage(4, 32, 2, 4.0, 1.0, 1e-3))


def later(stages: tuple[Stage, ...], first: int) -> tuple[Stage, ...]:
    """The stages from the `first` on, with the whole time to themselves."""
    gone = stages[first - 1].until if first else 0.0
    return tuple(dataclasses.replace(stage, until=(stage.until - gone) / (1 - gone)) for stage in stages[first:])


class Trainer:
    """Model, average and optimizer, and what happened so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.stages = later(TINY if args.tiny else STAGES, args.first_stage)
        self.model = models.build(args.seed).to(self.device)
        if args.init is not None:
            self.model.load_state_dict(models.load(args.init, torch.float32).state_dict())
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        self.generator = torch.Generator(self.device)
        self.step = 0
        self.trained = 0.0
        """Seconds of training, over all runs."""
        if args.resume is not None:
            self._resume(torch.load(args.resume, map_location=self.device, weights_only=True))
        if args.compile:
            self.model.compile_repeated_blocks(dynamic=False)

    def train_step(self, stage: Stage, rate: float) -> Tensor:
        """One step; its loss, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / WARMUP)
        loss = self.loss(stage)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # Young averages forget faster: the first steps are no part of the result.
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def loss(self, stage: Stage) -> Tensor:
        """Mean squared error of the velocity on a fresh batch, which the number of the step determines."""
        generator, device, batch = self.generator, self.device, stage.batch
        generator.manual_seed(self.args.seed * 1_000_003 + self.step)
        with torch.no_grad():
            scenes = data.draw(batch, generator)
            video = data.render(scenes, stage.frames, stage.size)
            ids = data.token_ids(scenes)
            dropped = torch.rand(batch, 1, generator=generator, device=device) < PROMPT_DROPOUT
            ids = ids * ~dropped
            # Logit-normal, stratified over the batch: small batches see all levels.
            strata = torch.rand(batch, generator=generator, device=device) + torch.arange(batch, device=device)
            plain = torch.sigmoid(torch.special.ndtri((strata / batch).clamp(1e-4, 1 - 1e-4)))
            sigma = stage.shift * plain / (1 + (stage.shift - 1) * plain)
            noise = torch.randn(video.shape, generator=generator, device=device)
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * video + level * noise
        with torch.autocast(self.device.type, torch.bfloat16):
            guess = models.velocity(self.model, noisy, sigma, ids)
        return (guess.float() - (noise - video)).square().mean()

    def stage_at(self, share: float) -> int:
        """The stage of this share of the training time."""
        return next((i for i, stage in enumerate(self.stages) if share < stage.until), len(self.stages) - 1)

    def rate_at(self, share: float) -> float:
        """The learning rate of this share of the training time."""
        at = self.stage_at(share)
        stage = self.stages[at]
        if at + 1 < len(self.stages):
            return stage.rate
        begin = self.stages[at - 1].until if at else 0.0
        done = min(max((share - begin) / (1 - begin), 0.0), 1.0)
        return stage.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))

    def save_weights(self, folder: pathlib.Path) -> None:
        """The average in bfloat16."""
        self.average.save_config(folder)
        state = {name: value.to("cpu", torch.bfloat16) for name, value in self.average.state_dict().items()}
        part = folder / "weights.part"
        save_file(state, part, metadata={"format": "pt"})
        part.replace(folder / WEIGHTS_NAME)

    def save_checkpoint(self, path: pathlib.Path) -> None:
        """Everything that a later run goes on with."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "trained": self.trained,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.trained = state["step"], state["trained"]


def train(trainer: Trainer, args: argparse.Namespace) -> None:
    """Trains until the time is up."""
    # What remains must suffice for the samples and the interpreter.
    end = args.time_limit - args.reserve
    total = args.total or trainer.trained + end - elapsed()
    before, log = trainer.trained, (args.out / "training.jsonl").open("a")
    say(
        log,
        {"event": "start", "seed": args.seed, "stages": [dataclasses.asdict(s) for s in trainer.stages]}
        | {
            "config": models.CONFIG,
            "torch": torch.__version__,
            "device": device_name(trainer.device),
            "total_s": total,
        },
    )
    began = saved = window = time.monotonic()
    losses: list[Tensor] = []
    current = trainer.stage_at(before / total)
    while elapsed() < end and trainer.trained < total:
        share = trainer.trained / total
        at = trainer.stage_at(share)
        if at != current:
            say(log, {"event": "stage", "stage": at, "step": trainer.step, "trained_s": round(trainer.trained, 1)})
            trainer.save_weights(args.out)
            current = at
            losses, window = [], time.monotonic()
        losses.append(trainer.train_step(trainer.stages[at], trainer.rate_at(share)))
        if len(losses) == args.log_every:
            # The one wait for the GPU: its time is the time of these steps.
            loss = float(torch.stack(losses).mean())
            now = time.monotonic()
            line = {
                "step": trainer.step,
                "stage": at,
                "loss": round(loss, 5),
                "ms_per_step": round((now - window) / len(losses) * 1e3, 1),
            }
            say(log, line | {"rate": trainer.rate_at(share), "trained_s": round(before + now - began, 1)})
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {trainer.step}")
            losses, window = [], now
            if now - saved > 60:
                trainer.save_weights(args.out)
                if args.checkpoint is not None:
                    trainer.save_checkpoint(args.checkpoint)
                saved = window = time.monotonic()
        elif len(losses) % 5 == 0:
            # Steps are only queued; without this the clock would run ahead of the GPU.
            losses[-1].item()
        trainer.trained = before + time.monotonic() - began
    say(
        log,
        {
            "event": "end",
            "step": trainer.step,
            "trained_s": round(trainer.trained, 1),
            "elapsed_s": round(elapsed(), 1),
        },
    )
    trainer.save_weights(args.out)
    if args.checkpoint is not None:
        trainer.save_checkpoint(args.checkpoint)


def show(trainer: Trainer, args: argparse.Namespace) -> None:
    """A contact sheet of what was saved."""
    stage, count, start = trainer.stages[-1], args.samples, time.monotonic()
    with models.backend(args.sdpa):
        model = models.load(args.out, torch.bfloat16).to(trainer.device)
        ids = data.prompts(count, seed=1)
        noise = sampler.noise(list(range(count)), stage.frames, stage.size)
        videos = sampler.sample(model, ids, noise, steps=args.sample_steps, batched=True).cpu()
    pictures.save_png(pictures.contact_sheet(videos), args.out / "samples.png")
    (args.out / "samples.txt").write_text("".join(data.describe(row) + "\n" for row in ids))
    print(f"{count} samples in {time.monotonic() - start:.1f} s; {elapsed():.0f} s in all", flush=True)


def smoke(trainer: Trainer, args: argparse.Namespace) -> None:
    """Times a few steps of every stage, and samples once."""
    # Compiled steps take their time to compile: those with one backend only.
    for name in [args.sdpa] if args.compile else sorted(models.BACKENDS):
        for i, stage in enumerate(trainer.stages):
            with models.backend(name):
                first = timed(trainer, stage, 1)
                timed(trainer, stage, 2)
                ms = timed(trainer, stage, 6) / 6 * 1e3
            memory = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else 0.0
            print(f"{name} stage {i}: first step {first:.1f} s, then {ms:.1f} ms a step, {memory:.1f} GiB", flush=True)
    trainer.save_weights(args.out)


def timed(trainer: Trainer, stage: Stage, steps: int) -> float:
    """Seconds of some steps."""
    start = time.monotonic()
    for _ in range(steps):
        loss = trainer.train_step(stage, 1e-4)
    loss.item()
    return time.monotonic() - start


def say(log: Any, line: dict[str, Any]) -> None:
    """A line for the log and the reader."""
    text = json.dumps(line)
    log.write(text + "\n")
    log.flush()
    print(text, flush=True)


def elapsed() -> float:
    """Seconds since the script began."""
    return time.monotonic() - _STARTED


def device_name(device: torch.device) -> str:
    """What the log calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for weights, log and samples")
    parser.add_argument("--time-limit", type=float, default=580.0, help="seconds, from start to exit")
    parser.add_argument("--reserve", type=float, default=30.0, help="seconds of those for the samples at the end")
    parser.add_argument("--total", type=float, help="seconds of training over this run and those that resume it")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="file for the whole state, kept up to date")
    parser.add_argument("--resume", type=pathlib.Path, help="such a file")
    parser.add_argument("--init", type=pathlib.Path, help="folder of weights to begin with")
    parser.add_argument(
        "--first-stage", type=int, choices=range(len(STAGES)), default=0, help="leave earlier stages out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    parser.add_argument("--sdpa", choices=sorted(models.BACKENDS), default="cudnn")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--sample-steps", type=int, default=sampler.STEPS)
    parser.add_argument("--smoke", action="store_true", help="only time some steps of every stage")
    parser.add_argument("--tiny", action="store_true", help="tiny videos, for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(args)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters; set up in {elapsed():.1f} s", flush=True)
    if args.smoke:
        smoke(trainer, args)
    else:
        with models.backend(args.sdpa):
            train(trainer, args)
    show(trainer, args)


if __name__ == "__main__":
    main()

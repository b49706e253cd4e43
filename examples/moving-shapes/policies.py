"""The policies that the lab compares, each as a bundle of a wanted density.

`calibatt` and `budget` are calibc's own; their specs are written here. The others are masks of `baselines.py`, which go through
the policy `explicit`. All bundles are compiled with the traces at hand, so that all have the sampler's noise levels.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import calibc
import torch
from safetensors.torch import save_file
from torch import Tensor

import baselines
from traces import Evidence

ANCHORS = 5
# A bisection ends this near to the density that was asked for.
_CLOSE = 0.0015


@dataclasses.dataclass(frozen=True)
class Job:
    """What policies choose from."""

    traces: pathlib.Path
    evidence: Evidence
    grid: baselines.Grid
    folder: pathlib.Path
    """Where specs, masks and bundles go."""
    target: dict[str, Any]
    """`target` of the specs."""

    @property
    def sites(self) -> tuple[int, int, int]:
        """Steps, layers, heads."""
        return self.evidence.steps, self.evidence.layers, self.evidence.heads

    def compile(self, name: str, policy: dict[str, Any], trace: pathlib.Path | None = None) -> calibc.Bundle:
        """A bundle under a policy as a spec spells it, from these traces or another trace."""
        spec = self.folder / f"{name}.yaml"
        # JSON is YAML.
        spec.write_text(json.dumps({"name": name, "policy": policy, "target": self.target}, indent=1))
        return calibc.compile(trace or self.traces, out=self.folder / f"{name}.bundle", spec=spec, progress=False)

    def explicit(self, name: str, masks: Tensor, anchor_sites: Tensor | None = None) -> calibc.Bundle:
        """A bundle of masks, bool [steps, layers, heads, blocks, blocks]; anchor rows where [steps, layers, heads] says."""
        tensors = {}
        for step, layer in itertools.product(range(masks.shape[0]), range(masks.shape[1])):
            tensors[f"s{step}.l{layer}"] = masks[step, layer].to(torch.uint8).contiguous()
            if anchor_sites is not None:
                tensors[f"s{step}.l{layer}.op"] = anchor_sites[step, layer].to(torch.uint8) * 2
        file = f"{name}.safetensors"
        save_file(tensors, self.folder / file)
        return self.compile(name, {"kind": "explicit", "masks": file, "anchors": ANCHORS})


def density_of(bundle: calibc.Bundle) -> float:
    """Share of the dense attention work that a bundle does."""
    return statistics.mean(
        itertools.starmap(bundle.density, itertools.product(range(bundle.steps), range(bundle.layers)))
    )


def masks_of(bundle: calibc.Bundle, blocks: int) -> Tensor:
    """All masks of a bundle, bool [steps, layers, heads, blocks, blocks]; all ones for anchor heads."""
    sites = itertools.product(range(bundle.steps), range(bundle.layers), range(bundle.heads))
    every = b"".join(itertools.starmap(bundle.mask, sites))
    flat = torch.frombuffer(bytearray(every), dtype=torch.bool)
    return flat.view(bundle.steps, bundle.layers, bundle.heads, blocks, blocks)


BUDGET = {"kind": "budget", "anchors": "off", "missing": "error"}
"""`budget` as a spec spells it: masks alone, from all that a trace can hold."""


def budget(job: Job, name: str, density: float, **fields: Any) -> calibc.Bundle:
    """calibc's `budget`, masks alone unless `anchors` says otherwise."""
    return job.compile(name, BUDGET | {"density": density} | fields)


def calibatt(job: Job, name: str, density: float, repetition: Any = "off") -> calibc.Bundle:
    """The paper's recipe; its constant A is bisected until the plan has the density."""
    low, high = 0.0, 1.0
    best: tuple[float, calibc.Bundle] | None = None
    for _ in range(12):
        level = (low + high) / 2
        schedule = {"a_base": level, "a_per_token": 0.0, "c": max(level, 0.99), "k": 16.0}
        bundle = job.compile(name, {"kind": "calibatt", "schedule": schedule, "repetition": repetition})
        off = density_of(bundle) - density
        if best is None or abs(off) < best[0]:
            best = abs(off), bundle
        if abs(off) < _CLOSE:
            break
        low, high = (level, high) if off < 0 else (low, level)
    assert best is not None, "bisected at least once"
    return best[1]


def geometric(order: Callable[[baselines.Grid], Tensor]) -> Callable[[Job, str, float], calibc.Bundle]:
    """One mask for all sites."""

    def make(job: Job, name: str, density: float) -> calibc.Bundle:
        mask = baselines.nearest(order(job.grid), baselines.kept_count(density, job.grid.blocks))
        return job.explicit(name, mask.expand(*job.sites, *mask.shape))

    return make


def random(job: Job, name: str, density: float) -> calibc.Bundle:
    """Blocks at random, others at every site."""
    order = baselines.random_order(job.sites, job.grid.blocks, seed=0)
    return job.explicit(name, baselines.nearest(order, baselines.kept_count(density, job.grid.blocks)))


def two_patterns(job: Job, name: str, density: float) -> calibc.Bundle:
    """The spatial or the temporal pattern by head, chosen on the calibration prompts."""
    energy = job.evidence.every_step(job.evidence.mean("block_energy"))
    masks = baselines.two_patterns(job.grid, energy, baselines.kept_count(density, job.grid.blocks))
    return job.explicit(name, masks)


def deviation_rows(job: Job, name: str, density: float) -> calibc.Bundle:
    """As many blocks in every row, those of highest deviation: `budget` without its global threshold, and without weights."""
    deviation = job.evidence.every_step(job.evidence.mean("block_deviation"))
    count = baselines.kept_count(density, job.grid.blocks)
    return job.explicit(name, baselines.strongest_by_row(deviation, count))


def blocks_alone(job: Job, name: str, density: float) -> calibc.Bundle:
    """The blocks of highest w * u * deviation of the whole plan, and the strongest of every row: `budget` without regard to what is left
    of a row."""
    evidence = job.evidence
    measured = evidence.sensitivity()
    deviation = evidence.every_step(evidence.mean("block_deviation"))
    energy = evidence.every_step(evidence.mean("block_energy"))
    weight = measured["step"][:, None, None] * measured["head"]
    return job.explicit(name, baselines.strongest(weight[..., None, None] * deviation, energy, density))


PAPER_ANCHORS = {"anchors": ANCHORS, "gamma": 0.87}
_UNIFORM = {"step_weights": "uniform", "head_weights": "uniform"}
POLICIES: dict[str, Callable[[Job, str, float], calibc.Bundle]] = {
    "budget": budget,
    "calibatt": calibatt,
    "random": random,
    "diagonal": geometric(baselines.diagonal_order),
    "window": geometric(baselines.window_order),
    "radial": geometric(baselines.radial_order),
    "two-pattern": two_patterns,
    "budget-anchors": lambda job, name, density: budget(job, name, density, anchors=ANCHORS),
    "calibatt-anchors": lambda job, name, density: calibatt(job, name, density, PAPER_ANCHORS),
}
"""Policies by name."""
MASKS_ALONE = [name for name in POLICIES if not name.endswith("-anchors")]
"""Those without anchor rows."""
INGREDIENTS: dict[str, Callable[[Job, str, float], calibc.Bundle]] = {
    "rows of D2": deviation_rows,
    "w u D2, blocks alone": blocks_alone,
    "energy": lambda job, name, density: budget(job, name, density, importance="energy", **_UNIFORM),
    "D2": lambda job, name, density: budget(job, name, density, **_UNIFORM),
    "sqrt(u) D2": lambda job, name, density: budget(job, name, density, step_weights="uniform"),
    "w D2": lambda job, name, density: budget(job, name, density, head_weights="uniform"),
    "w u D2": lambda job, name, density: budget(job, name, density, head_weights="sensitivity"),
}
"""`budget`, which is w sqrt(u) D2, without some of its ingredients."""


def anchor_sites(job: Job, rule: str, count: int, step: Tensor, head: Tensor) -> Tensor:
    """The sites that a rule computes at anchor rows, bool [steps, layers, heads].

    Args:
        job: What there is.
        rule: `w u err^2`, least first; `cosine`, most similar first; or `random`.
        count: How many.
        step: w, [steps].
        head: u, [steps, layers, heads].
    """
    if rule == "w u err^2":
        error = job.evidence.every_step(job.evidence.anchors("anchor_error"))
        order = step[:, None, None] * head * error
    elif rule == "cosine":
        order = -job.evidence.every_step(job.evidence.anchors("anchor_similarity"))
    else:
        order = torch.rand(job.sites, generator=torch.Generator().manual_seed(0))
    chosen = order.flatten().argsort(stable=True)[:count]
    return torch.zeros(order.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(job.sites)


ANCHOR_RULES = ("w u err^2", "cosine", "random")
"""Rules of `anchor_sites`."""


def anchors_only(job: Job, name: str, chosen: Tensor) -> calibc.Bundle:
    """Anchor rows at some sites, all others dense."""
    blocks = job.grid.blocks
    return job.explicit(name, torch.ones(1, dtype=torch.bool).expand(*job.sites, blocks, blocks), chosen)

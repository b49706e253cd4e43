#!/usr/bin/env python3
"""calibc's policy `budget`, written from its definition with NumPy and the standard library alone.

As `recipe.py` is for the paper's recipe: what calibc's masks are compared with, bit for bit, and no code is shared with it. It is
literal rather than fast: all scores of all sites are in memory at once, and sorted.

    budget.py TRACES -o masks.safetensors --density 0.45     the masks, in the format of `calibc export --masks`
    recipe.py --compare A B                                  exit status 1 and a list if any tensor differs
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import recipe
from numpy.typing import NDArray
from recipe import ANCHOR_ROWS, BLOCK, BLOCK_SPARSE, DENSE

Site = tuple[int, int, int]
"""Step, layer and head."""

# Prices that are tried: float32 numbers whose lower 16 bits are 0, from 0 up, beyond any score.
GRID = 0x5000
PRICES = (np.arange(GRID + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
# What stands for the scores from a price to the next.
MIDDLES = np.concatenate([[0.0], (PRICES[1:-1] + PRICES[2:]) / 2.0])


@dataclass
class Policy:
    """The fields of the spec."""

    density: float
    row_recall: float = 0.1
    step_floor: float = 0.0
    anchors: int = 5
    importance: str = "deviation"
    over_prompts: str = "mean"
    step_weights: str = "sensitivity"
    head_weights: str = "tempered"


# --- Evidence.


def together(values: Sequence[NDArray[np.float64]], over: str) -> NDArray[np.float64]:
    """One array for those of all prompts, of the same shape."""
    total = np.zeros_like(values[0])
    for value in values:
        total = total + value if over == "mean" else np.maximum(total, value)
    return total / len(values) if over == "mean" else total


def weights(trace: recipe.Trace, policy: Policy) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """w [steps] and u [steps, layers, heads]."""
    measured = None
    if "sensitivity" in trace.manifest:
        measured = recipe.read_safetensors(trace.folder / trace.manifest["sensitivity"]["path"])
    w = np.ones(trace.steps)
    if policy.step_weights == "sensitivity" and measured:
        w = measured["step"].astype(np.float64)
    elif policy.step_weights != "uniform":
        w = np.array([math.exp(-2.3 * step / trace.steps) for step in range(trace.steps)])
    u = np.ones((trace.steps, trace.layers, trace.heads))
    if policy.head_weights != "uniform" and measured:
        u = measured["head"].astype(np.float64)
        u = np.sqrt(u) if policy.head_weights == "tempered" else u
    return w, u


def computed_queries(trace: recipe.Trace, anchors: int) -> int:
    """How many queries a head at `anchors` anchor rows per frame computes."""
    grid = [(f, y, x) for f in range(trace.frames) for y in range(trace.height) for x in range(trace.width)]
    tf, th, tw = trace.tile
    grid.sort(key=lambda at: (at[0] // tf, at[1] // th, at[2] // tw, at))
    start = trace.text if trace.text_first else 0
    position = {at: start + i for i, at in enumerate(grid)}
    rows = [(2 * i + 1) * trace.height // (2 * anchors) for i in range(anchors)]
    nearest = [min(rows, key=lambda row: abs(row - y)) for y in range(trace.height)]
    text = set(trace.text_blocks())
    in_text = {p for p in range(trace.tokens) if p // BLOCK in text}
    return len(in_text | {position[f, nearest[y], x] for (f, y, x), p in position.items() if p not in in_text})


def row_loss(dropped: float, kept: float, mass: float) -> float:
    """The squared relative error of a row that keeps the share `mass` of its energy: of the importances it drops and keeps."""
    mass = max(mass, 1.0 / 64.0)
    return dropped * kept / (dropped + kept) / (mass * mass) if dropped + kept > 0 else 0.0


def worth(
    energy: NDArray[np.float64], importance: NDArray[np.float64], forced: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """What dropping each block adds to the loss of its row, least important first, evened out: [q_blocks, kv_blocks].

    Along a row it is the slope of the lower convex hull of the losses over the number of blocks dropped.
    """
    found = np.zeros_like(energy)
    for row in range(len(energy)):
        free = np.flatnonzero(~forced[row])
        order = free[np.argsort(importance[row, free], kind="stable")]
        # Sums from the left, one after the other.
        (all_worth, mass) = (float(np.cumsum(values[row])[-1]) for values in (importance, energy))
        hull = [(0, 0.0)]
        dropped, gone = np.cumsum(importance[row, order]), np.cumsum(energy[row, order])
        for count, (lost, left) in enumerate(zip(dropped.tolist(), gone.tolist(), strict=True), 1):
            share = (mass - left) / mass if mass > 0 else 1.0
            loss = row_loss(lost, max(all_worth - lost, 0.0), share)
            while len(hull) > 1:
                (before, low), (last, high) = hull[-2:]
                if (high - low) * (count - last) < (loss - high) * (last - before):
                    break
                hull.pop()
            hull.append((count, loss))
        for (start, low), (end, high) in zip(hull, hull[1:], strict=False):
            found[row, order[start:end]] = max((high - low) / (end - start), 0.0)
    return found


class Evidence:
    """What a trace says of every site of its covered steps: what blocks are worth, and floors [q_blocks, kv_blocks], and errors of
    anchor rows."""

    def __init__(self, trace: recipe.Trace, policy: Policy) -> None:
        column = None
        if policy.anchors in trace.manifest.get("anchor_counts", []):
            column = trace.manifest["anchor_counts"].index(policy.anchors)
        text = trace.text_blocks()
        self.worth: dict[Site, NDArray[np.float64]] = {}
        self.forced: dict[Site, NDArray[np.bool_]] = {}
        self.error: dict[Site, float] = {}
        shards = {step: [trace.shard(step, prompt) for prompt in trace.prompts] for step in trace.covered}
        every = [shard for of_step in shards.values() for shard in of_step]
        # Deviations count where every prompt has them, the ones held out too.
        held = [trace.shard(*key) for key in trace.shards if key[1] not in trace.prompts]
        layers = range(trace.layers)
        known = all(f"layers.{layer}.block_deviation" in shard for shard in every + held for layer in layers)
        deviation = policy.importance == "deviation" and known
        for step in trace.covered:
            for layer in layers:
                read = lambda kind: [shard[f"layers.{layer}.{kind}"] for shard in shards[step]]
                errors = None
                if column is not None and all(f"layers.{layer}.anchor_error" in shard for shard in shards[step]):
                    errors = [error[:, column].astype(np.float64) for error in read("anchor_error")]
                energy, kinds = read("block_energy"), read("block_deviation" if deviation else "block_energy")
                for head in range(trace.heads):
                    site = step, layer, head
                    decoded = lambda tensors: [recipe.decode(tensor[head], trace.encoding) for tensor in tensors]
                    value = decoded(kinds) if deviation else [e * e for e in decoded(kinds)]
                    importance, mean = together(value, policy.over_prompts), together(decoded(energy), "mean")
                    # The strongest blocks that reach the floor; the strongest one in any case.
                    floor = max(policy.row_recall, sys.float_info.min)
                    forced = recipe.top_p(mean, floor)
                    forced[text, :] = True
                    forced[:, text] = True
                    self.forced[site] = forced
                    self.worth[site] = worth(mean, importance, forced)
                    if errors:
                        squares = [np.array([error[head] * error[head]]) for error in errors]
                        self.error[site] = float(together(squares, policy.over_prompts)[0])


# --- The selection.


def forms(
    scores: NDArray[np.float32], forced: NDArray[np.bool_], relative: float, error: float | None, anchored_blocks: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """By price, [GRID + 1]: the blocks that a site's mask keeps, and whether the site does better at anchor rows.

    scores, forced [q_blocks, kv_blocks]; `error` is the squared relative error at anchor rows, which do the work of `anchored_blocks`.
    """
    free = scores[~forced]
    counts = np.bincount(free.view(np.uint32) >> 16, minlength=GRID)[:GRID]
    kept = int(forced.sum()) + np.concatenate([np.cumsum(counts[::-1])[::-1], [0]])
    better = np.zeros(GRID + 1, bool)
    if error is not None:
        loss = np.concatenate([[0.0], np.cumsum(counts * MIDDLES)])
        anchored = relative * (forced.shape[0] * error)
        where = np.flatnonzero(anchored + PRICES * anchored_blocks < loss + PRICES * kept)
        where = where[where > 0]
        if where.size:
            better[where[0] : where[-1] + 1] = True
    return kept, better


def lowest_price(cost: NDArray[np.object_], budget: int) -> int:
    """The lowest price, as a place of the grid, whose cost is within the budget, else the highest."""
    within = [place for place in range(GRID + 1) if cost[place] <= budget]
    return within[0] if within else GRID


def select(trace: recipe.Trace, policy: Policy) -> dict[str, NDArray[np.uint8]]:
    """All masks [heads, q_blocks, kv_blocks] and ops [heads] of the plan, by name."""
    evidence = Evidence(trace, policy)
    w, u = weights(trace, policy)
    weight = w[:, None, None] * u
    # Losses of a row are at most 64 x 64 times its importances.
    relative = weight / (weight.max() * 4096.0)
    rows, columns = next(iter(evidence.forced.values())).shape
    blocks, heads = rows * columns, trace.layers * trace.heads
    # Work in units that are whole for blocks and for anchor rows.
    anchored_units = computed_queries(trace, policy.anchors) * blocks if policy.anchors else 0
    sites = [(t, l, h) for t in range(trace.steps) for l in range(trace.layers) for h in range(trace.heads)]
    source = {site: (trace.nearest_covered(site[0]), *site[1:]) for site in sites}

    scores: dict[Site, NDArray[np.float32]] = {}
    better: dict[Site, NDArray[np.bool_]] = {}
    cost = np.zeros((trace.steps, GRID + 1), object)
    for site in sites:
        forced = evidence.forced[source[site]]
        scores[site] = (relative[site] * evidence.worth[source[site]]).astype(np.float32)
        scores[site] = np.minimum(scores[site], np.uint32(0x3FFFFFFF).view(np.float32))
        error = evidence.error.get(source[site]) if policy.anchors else None
        kept, better[site] = forms(scores[site], forced, relative[site], error, anchored_units / trace.tokens)
        cost[site[0]] += np.where(better[site], anchored_units, kept.astype(object) * trace.tokens)

    # Prices: one for all steps, and one for each step that must be held up.
    dense = heads * blocks * trace.tokens
    budget = min(math.floor(policy.density * float(trace.steps * dense)), trace.steps * dense)
    floor = min(math.ceil(policy.step_floor * float(dense)), dense)
    held: set[int] = set()
    while True:
        free = [step for step in range(trace.steps) if step not in held]
        rest = max(budget - len(held) * floor, 0)
        price = lowest_price(sum((cost[step] for step in free), np.zeros(GRID + 1, object)), rest)
        below = [step for step in free if policy.step_floor > 0 and cost[step][price] < floor]
        if not below:
            break
        held.update(below)
    groups = [(free, price, rest, False)]
    groups += [([step], lowest_price(cost[step], floor), floor, True) for step in sorted(held)]

    tensors = {}
    for step in range(trace.steps):
        for layer in range(trace.layers):
            tensors[f"s{step}.l{layer}"] = np.ones((trace.heads, rows, columns), np.uint8)
            tensors[f"s{step}.l{layer}.op"] = np.full(trace.heads, DENSE, np.uint8)
    for steps, price, units, up in groups:
        inside = [site for site in sites if site[0] in steps]
        masked = [site for site in inside if not better[site][price]]
        forced = {site: evidence.forced[source[site]] for site in masked}
        # What anchor rows and floors leave buys the best of the other blocks, equals in the order of sites, rows and columns.
        left = units - (len(inside) - len(masked)) * anchored_units
        left -= trace.tokens * sum(int(mask.sum()) for mask in forced.values())
        wanted = max(-(-left // trace.tokens) if up else left // trace.tokens, 0)
        free_scores = np.concatenate([scores[site][~forced[site]] for site in masked] or [np.zeros(0)])
        keep = np.zeros(free_scores.size, bool)
        keep[np.argsort(-free_scores, kind="stable")[:wanted]] = True
        start = 0
        for site in inside:
            step, layer, head = site
            if site not in forced:
                tensors[f"s{step}.l{layer}.op"][head] = ANCHOR_ROWS
                continue
            mask = forced[site].copy()
            end = start + int((~mask).sum())
            mask[~mask] = keep[start:end]
            start = end
            if not mask.all():
                tensors[f"s{step}.l{layer}.op"][head] = BLOCK_SPARSE
                tensors[f"s{step}.l{layer}"][head] = mask
    return tensors


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Masks of the policy `budget`, by NumPy.")
    parser.add_argument("traces", help="a trace folder")
    parser.add_argument("-o", "--output", required=True, help="the masks, as a safetensors file")
    parser.add_argument("--density", type=float, required=True, help="share of the attention work")
    parser.add_argument("--row-recall", type=float, default=0.1, help="share of its energy that every row keeps")
    parser.add_argument("--step-floor", type=float, default=0.0, help="least density of any step")
    parser.add_argument("--anchors", type=int, default=5, help="anchor rows per frame; 0: never use them")
    parser.add_argument("--importance", choices=("deviation", "energy"), default="deviation")
    parser.add_argument("--over-prompts", choices=("mean", "max"), default="mean")
    parser.add_argument("--step-weights", choices=("sensitivity", "default", "uniform"), default="sensitivity")
    parser.add_argument("--head-weights", choices=("tempered", "sensitivity", "uniform"), default="tempered")
    args = parser.parse_args(argv)
    fields = {name: value for name, value in vars(args).items() if name not in ("traces", "output")}
    tensors = select(recipe.Trace(args.traces), Policy(**fields))
    recipe.write_safetensors(args.output, tensors)
    ops = np.concatenate([ops for name, ops in tensors.items() if name.endswith(".op")])
    dense, sparse, anchored = (int((ops == op).sum()) for op in (DENSE, BLOCK_SPARSE, ANCHOR_ROWS))
    print(f"{ops.size} sites: {dense} dense, {sparse} block-sparse, {anchored} anchor rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())

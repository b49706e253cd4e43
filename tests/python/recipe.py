#!/usr/bin/env python3
"""The recipe of CalibAtt (arXiv 2603.05503), written from its formulas with NumPy and the standard library alone.

Nothing here shares code with calibc, not even the readers of its files: it is what calibc's masks are compared with, bit
for bit. It is literal rather than fast: every epsilon sorts again, every prompt makes its own mask, and masks vote.

    recipe.py TRACES -o masks.safetensors     the masks, in the format of `calibc export --masks`
    recipe.py --compare A B                   exit status 1 and a list if any tensor differs
"""

import argparse
import json
import math
import re
import struct
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np

BLOCK = 128
DENSE, BLOCK_SPARSE, ANCHOR_ROWS = 0, 1, 2
DTYPES = {"U8": np.dtype("u1"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


# --- Files.


def read_safetensors(path):
    """Tensors of a file by name, as arrays over its mapping."""
    raw = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        start, end = (8 + length + offset for offset in info["data_offsets"])
        tensors[name] = raw[start:end].view(DTYPES[info["dtype"]]).reshape(info["shape"])
    return tensors


def write_safetensors(path, tensors):
    """Writes U8 tensors, in the order of their names."""
    header, at = {}, 0
    for name in sorted(tensors):
        end = at + tensors[name].size
        header[name] = {"dtype": "U8", "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name], np.uint8).tobytes())


def log2_u8_table():
    """E = 2^(-code/8), and 0 for code 255: eight correctly rounded roots, scaled exactly."""
    with localcontext() as context:
        context.prec = 60
        roots = [float(Decimal(2) ** (Decimal(-j) / 8)) for j in range(8)]
    return np.array([math.ldexp(roots[code % 8], -(code // 8)) for code in range(255)] + [0.0])


TABLE = log2_u8_table()


def decode(tensor, encoding):
    """Stored energies as float64."""
    return TABLE[tensor] if encoding == "log2-u8" else tensor.astype(np.float64)


class Trace:
    """A trace folder, read with no more checks than it takes."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = manifest = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        self.encoding = manifest["energy_encoding"]
        self.layers = manifest["model"]["layers"]
        self.heads = manifest["model"]["heads"]
        self.steps = len(manifest["steps"])
        # Only prompts of the calibration split choose masks.
        self.prompts = [p["id"] for p in manifest["prompts"] if p["split"] == "calibration"]
        branches = manifest["branches"]
        branch = "cond" if "cond" in branches else branches[0]
        self.shards = {(s["step"], s["prompt"]): s["path"] for s in manifest["shards"] if s["branch"] == branch}
        self.covered = sorted({step for step, _ in self.shards})
        geometry = manifest["geometry"]
        self.video = geometry["frames"] * geometry["height"] * geometry["width"]
        self.text = geometry["text_tokens"]
        self.text_first = geometry["text_position"] == "before"
        self.frames, self.height, self.width = geometry["frames"], geometry["height"], geometry["width"]
        layout = manifest["layout"]
        # Raster order is that of tiles of one token.
        self.tile = [1, 1, 1] if layout == "raster" else layout["tile"]

    @property
    def tokens(self):
        return self.video + self.text

    def text_blocks(self):
        """Blocks that hold a text token."""
        if self.text == 0:
            return []
        first = 0 if self.text_first else self.video
        return sorted({token // BLOCK for token in range(first, first + self.text)})

    def nearest_covered(self, step):
        """The step whose energies `step` takes; of two as near, the earlier."""
        return min(self.covered, key=lambda s: (abs(s - step), s))

    def shard(self, step, prompt):
        return read_safetensors(self.folder / self.shards[step, prompt])


# --- The recipe.


def epsilon(step, steps, a, c, k):
    """eps(t) = A + (C - A) exp(-k t / T)."""
    return a + (c - a) * math.exp(-k * step / steps)


def top_p(energy, eps):
    """The paper's mask of one prompt: in each row, strongest first (ties: lower index), the fewest blocks that reach eps.

    energy [q_blocks, kv_blocks] -> bool [q_blocks, kv_blocks].
    """
    order = np.argsort(-energy, axis=-1, kind="stable")
    ranked = np.take_along_axis(energy, order, axis=-1)
    # What the blocks before each one have gathered: a block is needed while that falls short of eps.
    before = np.zeros_like(ranked)
    before[:, 1:] = np.cumsum(ranked, axis=-1)[:, :-1]
    mask = np.empty(energy.shape, bool)
    np.put_along_axis(mask, order, before < eps, axis=-1)
    return mask


def site_mask(energies, eps, rho, text):
    """The mask of one site from the energies of all calibration prompts, [q_blocks, kv_blocks] each."""
    votes = np.zeros(energies[0].shape, np.int64)
    for energy in energies:
        votes += top_p(energy, eps)
    mask = votes / len(energies) >= rho
    mask[text, :] = True
    mask[:, text] = True
    total = np.zeros(energies[0].shape)
    for energy in energies:
        total = total + energy
    for row in np.flatnonzero(~mask.any(axis=-1)):
        # The prompts agree on no block: keep the one of highest mean energy (argmax takes the first of equals).
        mask[row, np.argmax(total[row])] = True
    return mask


def is_repetitive(shards, layer, head, column, gamma):
    """Mean similarity of rows to their nearest anchor row, over the prompts, against gamma."""
    name = f"layers.{layer}.anchor_similarity"
    if column is None or any(name not in shard for shard in shards):
        return False
    total = 0.0
    for shard in shards:
        total += float(shard[name][head, column])
    return total / len(shards) >= gamma


def recipe(trace, a, c, k, rho, gamma, anchors):
    """All masks and ops of a plan, as tensors by name."""
    counts = trace.manifest.get("anchor_counts", [])
    column = counts.index(anchors) if anchors in counts else None
    text = trace.text_blocks()
    tensors = {}
    for source in trace.covered:
        shards = [trace.shard(source, prompt) for prompt in trace.prompts]
        steps = [step for step in range(trace.steps) if trace.nearest_covered(step) == source]
        for layer in range(trace.layers):
            stored = [shard[f"layers.{layer}.block_energy"] for shard in shards]
            masks = {step: np.ones(stored[0].shape, np.uint8) for step in steps}
            ops = {step: np.full(trace.heads, DENSE, np.uint8) for step in steps}
            for head in range(trace.heads):
                if is_repetitive(shards, layer, head, column, gamma):
                    for step in steps:
                        ops[step][head] = ANCHOR_ROWS
                    continue
                energies = [decode(tensor[head], trace.encoding) for tensor in stored]
                for step in steps:
                    mask = site_mask(energies, epsilon(step, trace.steps, a, c, k), rho, text)
                    if not mask.all():
                        ops[step][head] = BLOCK_SPARSE
                        masks[step][head] = mask
            for step in steps:
                tensors[f"s{step}.l{layer}"] = masks[step]
                tensors[f"s{step}.l{layer}.op"] = ops[step]
    return tensors


# --- Comparing.


def differences(a, b):
    """One line for each tensor that two files do not share."""
    lines = []
    # s10 after s9: digits compare as numbers.
    natural = lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    for name in sorted(a.keys() | b.keys(), key=natural):
        if name not in a or name not in b:
            lines.append(f"{name}: only in the {'second' if name not in a else 'first'} file")
        elif a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            shapes = [f"{t.dtype} {list(t.shape)}" for t in (a[name], b[name])]
            lines.append(f"{name}: {shapes[0]} against {shapes[1]}")
        elif not np.array_equal(a[name], b[name]):
            where = np.argwhere(a[name] != b[name])
            first = where[0].tolist()
            lines.append(f"{name}: {len(where)} of {a[name].size} differ, first at {first}")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description="Masks of the CalibAtt recipe, by NumPy.")
    parser.add_argument("traces", nargs="?", help="a trace folder")
    parser.add_argument("-o", "--output", help="the masks, as a safetensors file")
    parser.add_argument("--a", type=float, help="where epsilon ends (default 0.796 + 1.41e-6 * tokens)")
    parser.add_argument("--c", type=float, default=0.99, help="where epsilon starts")
    parser.add_argument("--k", type=float, default=16.0, help="how fast it falls")
    parser.add_argument("--rho", type=float, default=0.5, help="share of prompts that must need a block")
    parser.add_argument("--gamma", type=float, default=0.87, help="similarity that makes a head repetitive")
    parser.add_argument("--anchors", type=int, default=5, help="anchor rows per frame; 0: never use them")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two files of masks instead")
    args = parser.parse_args(argv)

    if args.compare:
        lines = differences(*map(read_safetensors, args.compare))
        print("\n".join(lines) if lines else "no tensor differs")
        return 1 if lines else 0
    if not args.traces or not args.output:
        parser.error("give a trace folder and -o, or --compare A B")
    if not 0 < args.rho <= 1:
        parser.error("--rho is a share: above 0, at most 1")
    trace = Trace(args.traces)
    if args.anchors > trace.height:
        parser.error(f"--anchors {args.anchors}: a frame has {trace.height} rows")
    a = 0.796 + 1.41e-6 * trace.tokens if args.a is None else args.a
    tensors = recipe(trace, a, args.c, args.k, args.rho, args.gamma, args.anchors)
    write_safetensors(args.output, tensors)
    ops = np.concatenate([ops for name, ops in tensors.items() if name.endswith(".op")])
    dense, sparse, anchored = (int((ops == op).sum()) for op in (DENSE, BLOCK_SPARSE, ANCHOR_ROWS))
    print(f"{ops.size} sites: {dense} dense, {sparse} block-sparse, {anchored} anchor rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())

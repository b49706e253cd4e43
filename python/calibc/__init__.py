"""Calibrated sparse attention for video diffusion transformers, compiled ahead of time.

    import calibc

    calibc.compile("traces/", out="plan.bundle")             # what the command `calibc compile` does
    bundle = calibc.Bundle("plan.bundle")

    plan = calibc.plan_from_mask(mask, q_len=S, kv_len=S, head_dim=128, dtype=torch.bfloat16)
    out = calibc.block_sparse_attention(q, k, v, plan)       # q, k, v [B, H, S, D]

PyTorch is imported by what touches tensors, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calibc._native import __version__
from calibc.bundle import Bundle, compile
from calibc.errors import BadInput, CalibcError, Environment, FileSystem, Internal, NotForThisGpu, Usage

if TYPE_CHECKING:
    from calibc.masks import Plan, block_sparse_attention, plan_from_mask

# Names that need torch, by the module that has them.
_LAZY = {
    "Plan": "calibc.masks",
    "block_sparse_attention": "calibc.masks",
    "plan_from_mask": "calibc.masks",
}

__all__ = [
    "BadInput",
    "Bundle",
    "CalibcError",
    "Environment",
    "FileSystem",
    "Internal",
    "NotForThisGpu",
    "Plan",
    "Usage",
    "__version__",
    "block_sparse_attention",
    "compile",
    "plan_from_mask",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'calibc' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

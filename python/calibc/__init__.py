"""Calibrated sparse attention for video diffusion transformers, compiled ahead of time.

    import calibc

    with calibc.capture(pipe, "traces/"):                    # a diffusers pipeline, or its transformer
        pipe(prompt)
    calibc.sensitivity(pipe, "traces/", run=generate)        # what errors cost, for the policy `budget`
    calibc.compile("traces/", out="plan.bundle")             # what the command `calibc compile` does
    handle = calibc.apply_sparse_attention(pipe, calibc.SparseAttentionConfig("plan.bundle"))

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
    from calibc import ops
    from calibc.apply import (
        FallbackWarning,
        NotCovered,
        SparseAttentionConfig,
        apply_sparse_attention,
        remove_sparse_attention,
    )
    from calibc.capturing import Capture, CaptureConfig, capture, merge_parts
    from calibc.masks import Plan, block_sparse_attention, plan_from_mask
    from calibc.sensitivities import Sensitivity, SensitivityConfig, sensitivity

# Names that need torch, by the module that has them.
_LAZY = {
    "Capture": "calibc.capturing",
    "CaptureConfig": "calibc.capturing",
    "FallbackWarning": "calibc.apply",
    "NotCovered": "calibc.apply",
    "Plan": "calibc.masks",
    "Sensitivity": "calibc.sensitivities",
    "SensitivityConfig": "calibc.sensitivities",
    "SparseAttentionConfig": "calibc.apply",
    "apply_sparse_attention": "calibc.apply",
    "block_sparse_attention": "calibc.masks",
    "capture": "calibc.capturing",
    "merge_parts": "calibc.capturing",
    "plan_from_mask": "calibc.masks",
    "remove_sparse_attention": "calibc.apply",
    "sensitivity": "calibc.sensitivities",
}

__all__ = [
    "BadInput",
    "Bundle",
    "CalibcError",
    "Capture",
    "CaptureConfig",
    "Environment",
    "FallbackWarning",
    "FileSystem",
    "Internal",
    "NotCovered",
    "NotForThisGpu",
    "Plan",
    "Sensitivity",
    "SensitivityConfig",
    "SparseAttentionConfig",
    "Usage",
    "__version__",
    "apply_sparse_attention",
    "block_sparse_attention",
    "capture",
    "compile",
    "merge_parts",
    "ops",
    "plan_from_mask",
    "remove_sparse_attention",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("calibc.ops")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'calibc' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

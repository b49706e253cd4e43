"""Block-sparse attention with a mask of your own: no traces, no bundle file."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, overload

import torch
from torch import Tensor

from calibc import _native, ops
from calibc._native import Bundle
from calibc.errors import BadInput, Usage

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
BLOCK = 128
"""Tokens per block, for queries and for keys. The last block of a sequence may be shorter."""
MAX_TOKENS = 1 << 22
"""Longest sequence of a plan."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A mask, scheduled and compiled. Immutable; keep it alive while captured graphs use it."""

    bundle: Bundle
    """The plan as a bundle of one step and one layer."""
    dtype: torch.dtype
    """Element type of the kernels."""
    lse: bool
    """Whether there are kernels that also give the log-sum-exp."""
    site: Tensor = dataclasses.field(repr=False)
    """Names the plan to `calibc.ops`: int64 [2]."""
    step: Tensor = dataclasses.field(repr=False)
    """The plan's only step: int32 [], 0, in CPU memory."""

    @functools.cached_property
    def density(self) -> float:
        """Kept blocks / all blocks."""
        return self.bundle.density(0, 0)

    def mask(self) -> Tensor:
        """The mask, bool [H, q_blocks, kv_blocks], in CPU memory."""
        heads = [
            torch.frombuffer(bytearray(self.bundle.mask(0, 0, head)), dtype=torch.bool)
            for head in range(self.bundle.heads)
        ]
        rows = -(-self.bundle.q_tokens // BLOCK)
        return torch.stack(heads).view(self.bundle.heads, rows, -1)


def plan_from_mask(
    mask: Tensor,
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    lse: bool = True,
    arch: str | None = None,
    device: torch.device | str | int | None = None,
    portable: bool = False,
) -> Plan:
    """Compiles a block mask for `block_sparse_attention`.

    A plan is made once per content: the same mask and options give the same plan again, from memory. Kernels do not depend on
    the mask and come from the compile cache on disk; only the first one of its kind takes NVRTC, some seconds.

    Args:
        mask: bool [H, ceil(q_len / 128), ceil(kv_len / 128)], on any device: True where queries of a block attend to a block of
            keys. Every row must keep a block.
        q_len: Query tokens.
        kv_len: Key tokens; may differ from `q_len`.
        head_dim: 64 or 128.
        dtype: Element type of the kernels, `torch.bfloat16` or `torch.float16`.
        lse: Whether to make the kernel for `return_lse=True`, too.
        arch: GPU architecture to make kernels for, such as `"sm_90a"`. By default that of `device`.
        device: GPU to load the plan onto at once. By default the mask's, else the current one where there is a GPU. Other GPUs of
            the architecture get it on first use.
        portable: The portable kernels, also where the architecture has faster ones of its own.

    Raises:
        BadInput: The mask is not a mask, or has another shape than the lengths.
        Environment: There is no NVRTC, or the GPU is too old.
    """
    if dtype not in _NAMES:
        raise Usage(
            f"kernels take bfloat16 or float16, not {dtype} (the CPU reference takes float32 tensors with either plan)"
        )
    if mask.dtype != torch.bool or mask.dim() != 3:
        raise BadInput(f"a mask is bool [heads, q_blocks, kv_blocks], not {mask.dtype} {list(mask.shape)}")
    for name, tokens in (("q_len", q_len), ("kv_len", kv_len)):
        if not 0 < tokens <= MAX_TOKENS:
            raise BadInput(f"{name} is {tokens}; a sequence has 1 to {MAX_TOKENS} tokens")
    gpu = _gpu(mask, device)
    blocks = mask.detach().to("cpu").contiguous()
    bundle = _native.plan_from_mask(
        blocks.data_ptr(),
        blocks.shape,
        q_len,
        kv_len,
        head_dim,
        _NAMES[dtype],
        lse=lse,
        arch=arch,
        device=gpu,
        portable=portable,
    )
    if gpu is not None and bundle.has_kernels(torch.cuda.get_device_capability(gpu)):
        # Now rather than in the first call, which may be under capture.
        ops.load(bundle, gpu)
    return Plan(bundle, dtype, lse, ops.site(bundle, 0), torch.zeros((), dtype=torch.int32, device="cpu"))


def _gpu(mask: Tensor, device: torch.device | str | int | None) -> int | None:
    """Ordinal of the GPU a plan is for."""
    if device is not None:
        return ops._ordinal(device)
    if mask.is_cuda:
        return mask.get_device()
    return torch.cuda.current_device() if torch.cuda.is_available() else None


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None, return_lse: Literal[False] = False
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None, *, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each block of queries attends to the blocks of keys that the plan's mask keeps.

    Args:
        q: [B, H, q_len, D], any strides with D contiguous, of the plan's type. Tensors in CPU memory (float32 as well) go through
            the reference; on a GPU the work goes to torch's current stream and nothing waits for it.
        k: [B, H, kv_len, D], as q.
        v: [B, H, kv_len, D], as q.
        plan: From `plan_from_mask`.
        scale: Factor on the scores; by default 1 / sqrt(D).
        return_lse: Whether to return the log-sum-exp as well.

    Returns:
        [B, H, q_len, D] in the memory order of q; with `return_lse` also float32 [B, H, q_len], natural logarithm.

    Raises:
        BadInput: A tensor is not what the plan was made for; nothing has run then.
    """
    if return_lse:
        both: tuple[Tensor, Tensor] = ops.attention_lse(q, k, v, plan.site, plan.step, scale)
        return both
    out: Tensor = ops.attention(q, k, v, plan.site, plan.step, scale)
    return out


__all__ = ["BLOCK", "Plan", "block_sparse_attention", "plan_from_mask"]

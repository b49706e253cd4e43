"""The torch ops `calibc::attention` and `calibc::attention_lse`: one layer of a bundle on tensors.

A bundle and a layer are named by a small tensor, the *site*, and the denoising step by another, never by Python numbers:
`torch.compile` makes one graph for all layers and steps, and a CUDA graph follows the step in memory.

    site = calibc.ops.site(bundle, layer=7)                        # int64 [2], in CPU memory
    step = torch.zeros((), dtype=torch.int32, device=q.device)     # updated in place before each denoising step
    out = calibc.ops.attention(q, k, v, site, step)

q is [B, H, S_q, D], k and v are [B, H, S_kv, D], in any memory order whose innermost dimension is D: a transposed view of
[B, S, H, D] is as good as a contiguous tensor, and `out` has the memory order of q. On a GPU the work goes to torch's current
stream and nothing waits for it; tensors in CPU memory go through the reference, in float32.

The first call on a GPU loads the bundle onto it (see `load`), which no CUDA graph can capture: warm up first. The bundle must
stay alive for as long as a site of it is used, or a graph that captured one is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calibc import _native
from calibc._native import Bundle
from calibc.errors import BadInput, Usage

# Element types as the native half knows them.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def site(bundle: Bundle, layer: int) -> Tensor:
    """Names one layer of `bundle`: int64 [2], in CPU memory, where it must stay. Valid while the bundle lives."""
    if not 0 <= layer < bundle.layers:
        raise BadInput(f"layer {layer} is out of range: the plan has {bundle.layers} layers")
    return torch.tensor([bundle.handle, layer], dtype=torch.int64, device="cpu")


def load(bundle: Bundle, device: torch.device | str | int | None = None, resident_steps: int | None = None) -> None:
    """Puts the kernels and tables of `bundle` onto a GPU, by default the current one. The first call there does it as well.

    `resident_steps`: of how many steps, at least 2, the GPU holds the masks at a time; the next one's are uploaded from pinned
    host memory while one runs. By default the GPU holds all. Whoever asks for fewer must announce each step with `enter`. A
    bundle that is there already stays as it is.
    """
    _native.load(bundle.handle, _ordinal(device), resident_steps)


def enter(bundle: Bundle, step: int, device: torch.device | str | int | None = None) -> None:
    """Announces that work put on the current stream of a GPU from now on runs at `step`, before each denoising step and outside
    of any capture. Waits for nothing. Where the GPU holds the masks of all steps, there is nothing to do.

    Calls that read their step from GPU memory, and replays of graphs, must run at the step announced last. Work on other streams
    that still reads an earlier step must be ordered before what the current stream is given next.
    """
    at = _ordinal(device)
    _native.enter(bundle.handle, at, step, torch._C._cuda_getCurrentRawStream(at))


def _ordinal(device: torch.device | str | int | None) -> int:
    """Number of a GPU, by default the current one."""
    named = torch.device("cuda" if device is None else device)
    if named.type != "cuda":
        raise Usage(f"{named} is not a GPU")
    return torch.cuda.current_device() if named.index is None else named.index


def attention(q: Tensor, k: Tensor, v: Tensor, site: Tensor, step: Tensor, scale: float | None = None) -> Tensor:
    """Attention by the ops that the plan has for one layer at one step.

    Args:
        q: [B, H, S_q, D], bfloat16 or float16; in CPU memory float32 too.
        k: [B, H, S_kv, D], as q.
        v: [B, H, S_kv, D], as q.
        site: Which bundle and layer, from `site`.
        step: The denoising step: int32 [], on q's device, read when the GPU gets there; in CPU memory it is read at once.
        scale: Factor on the scores; by default 1 / sqrt(D).

    Returns:
        [B, H, S_q, D], in the memory order of q.
    """
    if _wants_gradients(q, k, v):
        return _Inference.apply(_ATTENTION, q, k, v, site, step, scale)
    return _ATTENTION(q, k, v, site, step, scale)


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, site: Tensor, step: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attention`, and the natural logarithm of each query's sum of exponentials: float32 [B, H, S_q]."""
    if _wants_gradients(q, k, v):
        return _Inference.apply(_ATTENTION_LSE, q, k, v, site, step, scale)
    return _ATTENTION_LSE(q, k, v, site, step, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, site: Tensor, step: Tensor, scale: float | None = None) -> Tensor:
    out = torch.empty_like(q)
    _run(q, k, v, out, None, site, step, scale)
    return out


def _attention_lse(
    q: Tensor, k: Tensor, v: Tensor, site: Tensor, step: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _run(q, k, v, out, lse, site, step, scale)
    return out, lse


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    site: Tensor,
    step: Tensor,
    scale: float | None,
) -> None:
    if not (site.is_cpu and site.dtype == torch.int64 and site.shape == (2,)):
        raise Usage(
            "site must be an int64 tensor [2] in CPU memory, from calibc.ops.site; do not move it with its module"
        )
    if step.dtype != torch.int32 or step.numel() != 1:
        raise Usage(f"step must be one int32, not {step.dtype} {list(step.shape)}")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise BadInput("q, k and v must be [batch, heads, tokens, head_dim]")
    handle, layer = site.tolist()
    tensors = _described(q), _described(k), _described(v), _described(out)
    to = 0 if lse is None else lse.data_ptr()
    if q.is_cuda:
        # A step in CPU memory is read now; one on a GPU only by the kernel.
        at, ptr = (0, step.data_ptr()) if step.is_cuda else (int(step), 0)
        if step.is_cuda and step.device != q.device:
            raise BadInput(f"step is on {step.device} but q on {q.device}; keep one step tensor per GPU")
        if at < 0:
            raise BadInput(f"step {at} is negative")
        stream = torch._C._cuda_getCurrentRawStream(q.get_device())
        _native.attention(handle, layer, at, ptr, *tensors, to, scale, stream)
    elif q.is_cpu:
        at = int(step)
        if at < 0:
            raise BadInput(f"step {at} is negative")
        _native.reference_attention(handle, layer, at, *tensors, to, scale)
    else:
        raise BadInput(f"q is on {q.device}; kernels run on CUDA devices, the reference on the CPU")


def _described(x: Tensor) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]]:
    return x.data_ptr(), _CODES.get(x.dtype, -1), x.get_device(), x.shape, x.stride()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What can be said without a plan, so that a traced graph fails where it is made."""
    torch._check(
        q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v must be [batch, heads, tokens, head_dim]"
    )
    torch._check(q.dtype == k.dtype == v.dtype, lambda: f"q, k and v differ in type: {q.dtype}, {k.dtype}, {v.dtype}")


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, site: Tensor, step: Tensor, scale: float | None = None) -> Tensor:
    _check(q, k, v)
    return torch.empty_like(q)


def _attention_lse_fake(
    q: Tensor, k: Tensor, v: Tensor, site: Tensor, step: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _wants_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


class _Inference(torch.autograd.Function):
    """A call without a backward, for tensors that want gradients."""

    @staticmethod
    def forward(ctx: object, op: Callable[..., Any], *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(
            "calibc attention is for inference and has no backward; call the model under torch.no_grad() or inference_mode(), "
            "or remove the sparse attention before training"
        )


# Defined by hand: what `torch.library.custom_op` puts around a function, and around its autograd, takes longer per call than all
# that the function does. Strides are part of the contract: `out` has those of q.
_LIBRARY = torch.library.Library("calibc", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_ARGS = "(Tensor q, Tensor k, Tensor v, Tensor site, Tensor step, float? scale=None)"
for _name, _results, _body, _fake in (
    ("attention", "Tensor", _attention, _attention_fake),
    ("attention_lse", "(Tensor, Tensor)", _attention_lse, _attention_lse_fake),
):
    _LIBRARY.define(f"{_name}{_ARGS} -> {_results}", tags=_TAGS)
    # For every device: which ones there are kernels for, the function says better than the dispatcher.
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"calibc::{_name}", _fake, lib=_LIBRARY)
_ATTENTION = torch.ops.calibc.attention.default
_ATTENTION_LSE = torch.ops.calibc.attention_lse.default

__all__ = ["attention", "attention_lse", "enter", "load", "site"]

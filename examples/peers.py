"""Attention kernels that `side_by_side.py` knows how to call: ours, dense ones, and block-sparse ones that take the same masks.

A provider turns q, k, v [1, H, S, D] and a mask bool [H, S/128, S/128] into a function that computes [1, H, S, D] each time it
is called. What a kernel wants prepared (its memory order, index lists, a plan) is prepared before, outside the measurement.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128

Run = Callable[[], Tensor]
Prepare = Callable[[Tensor, Tensor, Tensor, Tensor], Run]


@dataclasses.dataclass(frozen=True)
class Provider:
    """One kernel."""

    name: str
    prepare: Prepare
    needs: tuple[str, ...] = ()
    """Modules it comes with."""
    dense: bool = False
    """Whether it computes every block, whatever the mask."""
    on_cpu: bool = False

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run here, as far as can be told without trying."""
        if device.type == "cpu" and not self.on_cpu:
            return "needs a GPU"
        for module in self.needs:
            try:
                found = importlib.util.find_spec(module) is not None
            except ModuleNotFoundError:
                found = False
            if not found:
                return f"no module {module}"
        return None


def index_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kept columns of every row: how many, int32 [1, H, R], and which, ascending and first, int32 [1, H, R, C]."""
    count = mask.sum(-1).to(torch.int32)[None].contiguous()
    index = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)[None].contiguous()
    return count, index


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, D] copies of [B, H, S, D] tensors, as the FlashAttention family reads them."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output, of kernels that may return more."""
    return result[0] if isinstance(result, (tuple, list)) else result


def calibc(portable: bool) -> Prepare:
    def prepare(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
        import calibc

        lengths = {"q_len": q.shape[2], "kv_len": k.shape[2], "head_dim": q.shape[3]}
        dtype = q.dtype if q.is_cuda else torch.bfloat16
        plan = calibc.plan_from_mask(mask, **lengths, dtype=dtype, lse=False, portable=portable)
        return lambda: calibc.block_sparse_attention(q, k, v, plan)

    return prepare


def sdpa(backend: str | None) -> Prepare:
    def prepare(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attend = torch.nn.functional.scaled_dot_product_attention
        if backend is None:
            return lambda: attend(q, k, v)

        def run() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return attend(q, k, v)

        return run

    return prepare


def fa3(fp8: bool) -> Prepare:
    def prepare(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
        from fa3_fwd_interface import flash_attn_func

        inputs = tokens_first(q, k, v)
        if fp8:
            inputs = [x.to(torch.float8_e4m3fn) for x in inputs]
        return lambda: first(flash_attn_func(*inputs)).transpose(1, 2)

    return prepare


def fa4_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
    from flash_attn.cute.interface import _flash_attn_fwd

    inputs = tokens_first(q, k, v)
    return lambda: first(_flash_attn_fwd(*inputs)).transpose(1, 2)


def fa4_sparse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    inputs = tokens_first(q, k, v)
    count, index = index_lists(mask)
    # Every kept block is a full one; the lists of partly masked blocks are empty.
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=torch.zeros_like(index),
        full_block_cnt=count,
        full_block_idx=index,
        block_size=(BLOCK, BLOCK),
    )
    return lambda: first(_flash_attn_fwd(*inputs, block_sparse_tensors=blocks)).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    count, index = index_lists(mask)
    lengths = (q.shape[2], k.shape[2])
    none = (torch.zeros_like(count), torch.zeros_like(index))
    blocks = BlockMask.from_kv_blocks(*none, count, index, BLOCK_SIZE=BLOCK, seq_lengths=lengths)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=blocks)


def cudnn_sparse(block: int) -> Prepare:
    """cuDNN's block-sparse attention, whose blocks may be smaller than the mask's."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
        from cudnn.block_sparse_attention.api import block_sparse_attention_forward

        tokens, split = k.shape[2], BLOCK // block
        finer = mask.repeat_interleave(split, 1).repeat_interleave(split, 2)[..., : -(-tokens // block)]
        count, index = index_lists(finer)
        padding = finer.shape[1] * block - q.shape[2]
        padded = torch.nn.functional.pad(q, (0, 0, 0, padding)).contiguous()
        keys, values = k.contiguous(), v.contiguous()

        def run() -> Tensor:
            options = {"q2k_block_nums": count, "sparse_block_size": block, "kv_splits": 1}
            return block_sparse_attention_forward(padded, keys, values, index, **options)["o_tensor"][
                :, :, : q.shape[2]
            ]

        return run

    return prepare


def fastvideo(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices

    block, tokens = 64, q.shape[2]
    blocks = mask.shape[1] * BLOCK // block
    padding = blocks * block - tokens
    inputs = [torch.nn.functional.pad(x, (0, 0, 0, padding)).contiguous() for x in (q, k, v)]
    # Tokens of each block: the last ones of a sequence are short or empty.
    starts = torch.arange(blocks, device=q.device) * block
    sizes = (tokens - starts).clamp(0, block).to(torch.int32)
    finer = mask.repeat_interleave(2, 1).repeat_interleave(2, 2) & (sizes > 0)
    count, index = index_lists(finer)
    return lambda: first(block_sparse_attn_from_indices(*inputs, index, count, sizes))[:, :, :tokens]


def flashinfer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Run:
    import flashinfer as fi

    heads, tokens, head_dim = q.shape[1:]
    sizes = torch.full(mask.shape[:2], BLOCK, dtype=torch.int32, device=q.device)
    sizes[:, -1] = tokens - (mask.shape[1] - 1) * BLOCK
    workspace = torch.empty(1 << 30, dtype=torch.uint8, device=q.device)
    wrapper = fi.VariableBlockSparseAttentionWrapper(workspace, backend="fa3")
    shape = {"num_qo_heads": heads, "num_kv_heads": heads, "head_dim": head_dim, "q_data_type": q.dtype}
    wrapper.plan(block_mask_map=mask, block_row_sz=sizes, block_col_sz=sizes, **shape)
    inputs = [x[0].contiguous() for x in (q, k, v)]
    return lambda: first(wrapper.run(*inputs))[None]


OURS = "calibc"
PROVIDERS = (
    Provider(OURS, calibc(portable=False), needs=("calibc",), on_cpu=True),
    Provider("calibc-portable", calibc(portable=True), needs=("calibc",)),
    Provider("fa4-cute-sparse", fa4_sparse, needs=("flash_attn.cute",)),
    Provider("cudnn-sparse-64", cudnn_sparse(64), needs=("cudnn.block_sparse_attention",)),
    Provider("cudnn-sparse-128", cudnn_sparse(128), needs=("cudnn.block_sparse_attention",)),
    Provider("flex", flex, needs=("triton",)),
    Provider("fastvideo-64", fastvideo, needs=("fastvideo_kernel",)),
    Provider("flashinfer-fa3", flashinfer, needs=("flashinfer",)),
    Provider("fa3-dense", fa3(fp8=False), needs=("fa3_fwd_interface",), dense=True),
    Provider("fa3-fp8-dense", fa3(fp8=True), needs=("fa3_fwd_interface",), dense=True),
    Provider("fa4-cute-dense", fa4_dense, needs=("flash_attn.cute",), dense=True),
    Provider("cudnn-dense", sdpa("CUDNN_ATTENTION"), dense=True),
    Provider("fa2-dense", sdpa("FLASH_ATTENTION"), dense=True),
    Provider("sdpa-cpu", sdpa(None), dense=True, on_cpu=True),
)

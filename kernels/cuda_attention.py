"""Attention of the CUDA backend: over packed documents with gradients, and over cached pages."""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import autograd, reference
from kernels.cuda_layout import CudaLayout, Heads, PackedWork, heads_of, packed_work
from kernels.documents import Documents


def attention_paged(
    q_TNH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    layout: CudaLayout,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: reference.Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_paged`, row-invariant; needs a `CudaLayout`. Not differentiable.

    Pages are int64 on the device and aren't looked at here: they have to exist.
    """
    reference.check_attention(q_TNH, key_cache_PSKH, value_cache_PSKH)
    if not isinstance(layout, CudaLayout):
        raise ValueError(f"layout must come from this backend's paged_layout, got {type(layout).__name__}")
    layout.check(q_TNH, key_cache_PSKH)
    reference.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    if torch.is_grad_enabled() and q_TNH.requires_grad:
        raise ValueError("attention_paged has no gradients; use attention_varlen for training")
    index = reference.check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index)
    heads = heads_of(index, key_cache_PSKH.shape[2], q_TNH.device)
    work = layout.work(window or 0, heads.group)
    return torch.ops.onemesh_cuda.attention_paged(
        q_TNH.contiguous(),
        key_cache_PSKH,
        value_cache_PSKH,
        layout.chunks,
        layout.block_table_BM.contiguous(),
        layout.prefix_table_BM.contiguous(),
        heads.starts,
        heads.order,
        _slopes(alibi_slopes, q_TNH.device),
        work.whole,
        work.split,
        work.merges,
        work.partial_rows,
        work.max_split_queries,
        window or 0,
        scale,
        soft_cap or 0.0,
    )


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _slopes(alibi_slopes: reference.Slopes | None, device: torch.device) -> Tensor | None:
    return None if alibi_slopes is None else torch.as_tensor(alibi_slopes, dtype=torch.float32, device=device)


@dataclass(frozen=True, kw_only=True)
class _Pack:
    """Packed documents and what scores are made of, besides q, k and v."""

    work: PackedWork
    heads: Heads
    slopes_N: Tensor | None
    window: int
    """0: none."""
    scale: float
    soft_cap: float
    """0: none."""

    @classmethod
    def of(
        cls,
        documents: Documents,
        heads: Heads,
        device: torch.device,
        window: int | None,
        scale: float,
        soft_cap: float | None,
        alibi_slopes: reference.Slopes | None,
    ) -> "_Pack":
        return cls(
            work=packed_work(documents, window or 0, heads.group, device),
            heads=heads,
            slopes_N=_slopes(alibi_slopes, device),
            window=window or 0,
            scale=scale,
            soft_cap=soft_cap or 0.0,
        )

    def attend(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> tuple[Tensor, Tensor]:
        """(out [T, N, H], lse [T, N])."""
        return torch.ops.onemesh_cuda.attention_varlen(
            q_TNH,
            k_SKH,
            v_SKH,
            self.work.chunks,
            self.heads.starts,
            self.heads.order,
            self.slopes_N,
            self.work.whole,
            self.window,
            self.scale,
            self.soft_cap,
        )

    def gradients(
        self, saved: Sequence[Tensor], grad_TNH: Tensor, grad_lse_TN: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, k and v from those of out and lse; saved: q, k, v, out, lse."""
        return torch.ops.onemesh_cuda.attention_varlen_grad(
            *saved,
            grad_TNH,
            grad_lse_TN,
            self.work.query_tiles,
            self.work.key_tiles,
            self.heads.kv_heads,
            self.heads.starts,
            self.heads.order,
            self.slopes_N,
            self.window,
            self.scale,
            self.soft_cap,
        )


class _Attention(torch.autograd.Function):
    """`_Pack.attend`, differentiable through out and lse; saves q, k, v, out and lse."""

    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, pack: _Pack) -> tuple[Tensor, Tensor]:
        """(out [T, N, H] in q.dtype, lse [T, N] in float32)."""
        ctx.set_materialize_grads(False)
        out_TNH, lse_TN = pack.attend(q_TNH, k_SKH, v_SKH)
        ctx.save_for_backward(q_TNH, k_SKH, v_SKH, out_TNH, lse_TN)
        ctx.pack = pack
        return out_TNH, lse_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """`dS = P * (dP - rowsum(dO * O) + dlse)` (arXiv:2205.14135, appendix B.4, and d lse / dS = P)."""
        grad_out, grad_lse = (None if g is None else g.contiguous() for g in grads)
        if grad_out is None and grad_lse is None:
            return (None,) * 4
        grad_out = torch.zeros_like(ctx.saved_tensors[0]) if grad_out is None else grad_out
        return *ctx.pack.gradients(ctx.saved_tensors, grad_out, grad_lse), None


def attention_varlen(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    documents: Sequence[int] | Tensor | Documents,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: reference.Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_varlen` in O(T) memory, row-invariant but by flash-attn, which is taken where it can.

    That is where it is installed and no gradient is asked for (it has none of lse), in 16 bits, with heads shared
    evenly, without cap and slopes, of plain bounds. Heads up to 256.
    """
    reference.check_attention(q_TNH, k_SKH, v_SKH)
    reference.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    index = reference.check_kv_index(q_TNH.shape[1], k_SKH.shape[1], kv_index)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_TNH, k_SKH, v_SKH))
    is_causal = not isinstance(documents, Documents)
    documents = Documents.of(documents, q_TNH.shape[0], k_SKH.shape[0])
    is_even = autograd.even_group(index, k_SKH.shape[1]) is not None
    is_plain = is_causal and is_even and soft_cap is None and alibi_slopes is None
    if is_plain and not wants_grad and q_TNH.dtype in (torch.float16, torch.bfloat16) and _has_flash_attn():
        return _flash_attention(q_TNH, k_SKH, v_SKH, documents.query_bounds, window, scale)
    heads = heads_of(index, k_SKH.shape[1], q_TNH.device)
    pack = _Pack.of(documents, heads, q_TNH.device, window, scale, soft_cap, alibi_slopes)
    inputs = q_TNH.contiguous(), k_SKH.contiguous(), v_SKH.contiguous()
    return _Attention.apply(*inputs, pack) if wants_grad else pack.attend(*inputs)


def attention_varlen_backward(
    grad_out_TNH: Tensor | None,
    grad_lse_TN: Tensor | None,
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    documents: Sequence[int] | Tensor | Documents,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: reference.Slopes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.attention_varlen_backward` in O(T) memory."""
    reference.check_attention(q_TNH, k_SKH, v_SKH)
    reference.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    index = reference.check_kv_index(q_TNH.shape[1], k_SKH.shape[1], kv_index)
    found = Documents.of(documents, q_TNH.shape[0], k_SKH.shape[0])
    heads = heads_of(index, k_SKH.shape[1], q_TNH.device)
    pack = _Pack.of(found, heads, q_TNH.device, window, scale, soft_cap, alibi_slopes)
    grad_out = torch.zeros_like(q_TNH) if grad_out_TNH is None else grad_out_TNH.contiguous()
    saved = [x.contiguous() for x in (q_TNH, k_SKH, v_SKH, out_TNH, lse_TN)]
    return pack.gradients(saved, grad_out, None if grad_lse_TN is None else grad_lse_TN.contiguous())


def _flash_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, N, H], lse [T, N]) by flash-attn's varlen function."""
    longest = max((stop - start for start, stop in itertools.pairwise(bounds)), default=0)
    starts = torch.tensor(bounds, dtype=torch.int32, device=q_TNH.device)
    out_TNH, lse_NT, *_ = importlib.import_module("flash_attn").flash_attn_varlen_func(
        q_TNH,
        k_TKH,
        v_TKH,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        return_attn_probs=True,  # what makes it return lse
    )
    return out_TNH, lse_NT.transpose(0, 1)

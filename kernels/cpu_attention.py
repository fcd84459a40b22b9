"""Attention of the C++ backend: over packed documents with gradients, and over cached pages.

The two share their arithmetic (`kernels/cpu/attention.cpp`): a token has the same bits in training, in prefill and in
decoding, whatever it is packed or batched with. The backward is deterministic at any thread count.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import checks
from kernels.documents import Documents
from kernels.paged import PagedLayout


class _Attention(torch.autograd.Function):
    """`onemesh::attention_varlen`, differentiable through out and lse; saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, slopes_N: Tensor | None, rest: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        """(out [T, N, H] in q.dtype, lse [T, N] in float32)."""
        ctx.set_materialize_grads(False)
        out_TNH, lse_TN = torch.ops.onemesh.attention_varlen(q_TNH, k_SKH, v_SKH, *rest, slopes_N)
        ctx.save_for_backward(q_TNH, k_SKH, v_SKH, out_TNH, lse_TN)
        ctx.slopes_N, ctx.rest = slopes_N, rest
        return out_TNH, lse_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """`dS = P * (dP - rowsum(dO * O) + dlse)` (arXiv:2205.14135, appendix B.4, and d lse / dS = P)."""
        grad_out, grad_lse = (None if g is None else g.contiguous() for g in grads)
        if grad_out is None and grad_lse is None:
            return (None,) * 5
        found = torch.ops.onemesh.attention_varlen_backward(
            grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest, ctx.slopes_N
        )
        return *found, None, None


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
    alibi_slopes: checks.Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_varlen`, row-invariant, in O(T) memory, forward and backward; even head dims up to 256."""
    _check(q_TNH, k_SKH, v_SKH, 3)
    checks.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    heads = checks.check_kv_index(q_TNH.shape[1], k_SKH.shape[1], kv_index)
    table = Documents.of(documents, q_TNH.shape[0], k_SKH.shape[0]).table()
    rest = (table, list(heads), window or 0, scale, soft_cap or 0.0)
    inputs = q_TNH.contiguous(), k_SKH.contiguous(), v_SKH.contiguous(), _slopes(alibi_slopes)
    if not torch.is_grad_enabled():
        return torch.ops.onemesh.attention_varlen(*inputs[:3], *rest, inputs[3])
    return _Attention.apply(*inputs, rest)


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
    alibi_slopes: checks.Slopes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.attention_varlen_backward` in O(T) memory, deterministic."""
    _check(q_TNH, k_SKH, v_SKH, 3)
    checks.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    heads = checks.check_kv_index(q_TNH.shape[1], k_SKH.shape[1], kv_index)
    table = Documents.of(documents, q_TNH.shape[0], k_SKH.shape[0]).table()
    saved = (x.contiguous() for x in (q_TNH, k_SKH, v_SKH, out_TNH, lse_TN))
    grads = (None if x is None else x.contiguous() for x in (grad_out_TNH, grad_lse_TN))
    rest = (table, list(heads), window or 0, scale, soft_cap or 0.0, _slopes(alibi_slopes))
    return torch.ops.onemesh.attention_varlen_backward(*grads, *saved, *rest)


def attention_prefix(
    q_TNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    *,
    kv_index: Sequence[int] | None = None,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_prefix`, row-invariant, in O(T) memory, forward and backward."""
    everything = Documents(query_bounds=(0, q_TNH.shape[0]), key_bounds=(0, k_LKH.shape[0]), offsets=(k_LKH.shape[0],))
    return attention_varlen(q_TNH, k_LKH, v_LKH, everything, kv_index=kv_index, scale=scale, soft_cap=soft_cap)


class CpuLayout(PagedLayout):
    """The layout with the chunks' numbers in one tensor, made once for all layers of a step."""

    @functools.cached_property
    def chunks(self) -> Tensor:
        """int64 [B, 4]: `numbers`."""
        return torch.tensor(self.numbers, dtype=torch.int64).view(-1, 4)


def attention_paged(
    q_TNH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    layout: PagedLayout,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: checks.Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_paged`, row-invariant; needs a `CpuLayout`; even head dims up to 256."""
    _check(q_TNH, key_cache_PSKH, value_cache_PSKH, 4)
    if not isinstance(layout, CpuLayout):
        raise ValueError(f"layout must come from this backend's paged_layout, got {type(layout).__name__}")
    layout.check(q_TNH, key_cache_PSKH)
    checks.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    if torch.is_grad_enabled() and q_TNH.requires_grad:
        raise ValueError("attention_paged has no gradients; use attention_varlen for training")
    heads = checks.check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index)
    return torch.ops.onemesh.attention_paged(
        q_TNH.contiguous(),
        key_cache_PSKH,
        value_cache_PSKH,
        layout.chunks,
        layout.block_table_BM.contiguous(),
        layout.prefix_table_BM.contiguous(),
        list(heads),
        window or 0,
        scale,
        soft_cap or 0.0,
        _slopes(alibi_slopes),
    )


def _check(q_TNH: Tensor, keys: Tensor, values: Tensor, dims: int) -> None:
    checks.check_attention(q_TNH, keys, values)
    if keys.dim() != dims:
        raise ValueError(f"attention: keys {tuple(keys.shape)} must have {dims} dimensions")
    head_dim = q_TNH.shape[2]
    if head_dim % 2 or not 2 <= head_dim <= 256:
        raise ValueError(f"attention: q has head dim {head_dim}; the C++ kernels take even ones from 2 to 256")


def _slopes(slopes: checks.Slopes | None) -> Tensor | None:
    return None if slopes is None else torch.as_tensor(slopes, dtype=torch.float32).contiguous()

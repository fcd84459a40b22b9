"""Attention over a learned prefix in the CUDA backend, and its merge with that over the documents.

The prefix is one document more to `attention_varlen`, all of whose keys every query sees; the merge is
`kernels/cuda/attention_merge.cu`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.cuda_attention import attention_varlen
from kernels.documents import Documents

GRADIENT_QUERIES = 256
"""Queries whose share of the prefix's gradient is summed by itself."""


def attention_prefix(
    q_TNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    *,
    kv_index: Sequence[int] | None = None,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_prefix`, row-invariant, in O(T) memory, forward and backward.

    A prefix is short: a block per kv head and 64 entries (32 of wide heads) would go over all queries to find its
    gradient. So every `GRADIENT_QUERIES` queries are a document with a copy of the prefix; its gradients are rounded
    to the dtype, then those of the copies are added up, in order.
    """
    reference.check_attention(q_TNH, k_LKH, v_LKH)
    queries, entries = q_TNH.shape[0], k_LKH.shape[0]
    wants_grad = torch.is_grad_enabled() and (k_LKH.requires_grad or v_LKH.requires_grad)
    each = GRADIENT_QUERIES if wants_grad else max(queries, 1)
    copies = -(-queries // each)
    documents = Documents(
        query_bounds=(*range(0, queries, each), queries),
        key_bounds=tuple(range(0, copies * entries + 1, entries)) if entries else (0,) * (copies + 1),
        offsets=(entries,) * copies,
    )
    if copies != 1:
        k_LKH, v_LKH = (x.repeat(copies, 1, 1) for x in (k_LKH, v_LKH))
    return attention_varlen(q_TNH, k_LKH, v_LKH, documents, kv_index=kv_index, scale=scale, soft_cap=soft_cap)


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`reference.merge_attention`, two by two from the first on: of more than two, sums are rounded on the way."""
    merge = _Merge.apply if torch.is_grad_enabled() else torch.ops.onemesh_cuda.attention_merge
    tensors = [(out_TNH.contiguous(), lse_TN.contiguous()) for out_TNH, lse_TN in parts]
    return functools.reduce(lambda done, part: merge(*done, *part), tensors)


class _Merge(torch.autograd.Function):
    """The merge of two parts; saves the parts, which the attention behind each holds anyway."""

    @staticmethod
    def forward(
        ctx: Any, first_TNH: Tensor, first_lse_TN: Tensor, second_TNH: Tensor, second_lse_TN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out [T, N, H] in their dtype, lse [T, N] in float32)."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(first_TNH, first_lse_TN, second_TNH, second_lse_TN)
        return torch.ops.onemesh_cuda.attention_merge(first_TNH, first_lse_TN, second_TNH, second_lse_TN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """`dout_i = p_i dout`, `dlse_i = p_i (dlse + dout.out_i - sum_j p_j dout.out_j)`; p_i is exp(lse_i - lse)."""
        grad_out, grad_lse = (None if g is None else g.contiguous() for g in grads)
        if grad_out is None and grad_lse is None:
            return (None,) * 4
        grad_out = torch.zeros_like(ctx.saved_tensors[0]) if grad_out is None else grad_out
        return torch.ops.onemesh_cuda.attention_merge_grad(*ctx.saved_tensors, grad_out, grad_lse)

"""The merge of attention over disjoint key sets with a backward of its own: plain autograd keeps float32 copies of
every part, here the parts themselves are kept, which the attention behind each holds anyway.

With `p_i = exp(lse_i - lse)`, so that `out = sum_i p_i out_i`, the gradients are

    dout_i = p_i dout
    dlse_i = p_i (dlse + dout . out_i - sum_j p_j dout . out_j)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import reference


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`reference.merge_attention`, with the same bits; its gradients are computed in lse's dtype and rounded once."""
    if not torch.is_grad_enabled():
        return reference.merge_attention(parts)
    return _Merge.apply(*(x for part in parts for x in part))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out_TNH, lse_TN = reference.merge_attention(list(zip(parts[::2], parts[1::2], strict=True)))
        ctx.save_for_backward(*parts, lse_TN)
        return out_TNH, lse_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *parts, lse_TN = ctx.saved_tensors
        outs, lses = parts[::2], parts[1::2]
        seen = torch.where(lse_TN.isneginf(), 0.0, lse_TN)  # a query without any key: every weight is 0
        shares = [torch.exp(lse - seen) for lse in lses]
        grad_out, grad_lse = grads
        found: list[Tensor | None] = [None] * len(parts)
        total = torch.zeros_like(lse_TN) if grad_lse is None else grad_lse
        products: list[Tensor | float] = [0.0] * len(outs)
        if grad_out is not None:
            wide = grad_out.to(lse_TN.dtype)
            products = [(wide * out).sum(-1) for out in outs]
            total = total - sum(share * product for share, product in zip(shares, products, strict=True))
            found[::2] = [(share[..., None] * wide).to(out.dtype) for share, out in zip(shares, outs, strict=True)]
        found[1::2] = [share * (total + product) for share, product in zip(shares, products, strict=True)]
        return tuple(found)

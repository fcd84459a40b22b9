"""Vocabulary-parallel cross-entropy that never holds more than a few rows of logits.

The loss is a *sum* over target tokens; the caller divides by the count over all microbatches, data and context
ranks, so that the number doesn't depend on the layout (Megatron-LM's vocab-parallel loss, arXiv:1909.08053
sec. 3, in a chunked form that recomputes logits in the backward pass).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Ops
from parallel import comm
from parallel.comm import Group

CHUNK_BYTES = 64 << 20  # logits held at a time, forward and backward


def cross_entropy(
    hidden_BD: Tensor, weight_VD: Tensor, target_B: Tensor, *, first_row: int, tensor: Group, ops: Ops
) -> Tensor:
    """Sum over B of `-log softmax(hidden W^T)[target]`, a float32 (float64) scalar, replicated over tensor.

    hidden_BD: normed states in the compute dtype. weight_VD: this rank's rows of the output matrix, the first being
    row `first_row`. target_B: int64 global ids. Communicates 3 floats a row forward (max, sum, target logit), and
    the gradient of hidden backward (B * D, all-reduce).
    """
    return _CrossEntropy.apply(hidden_BD, weight_VD, target_B, first_row, tensor, ops)  # type: ignore[no-any-return]


def _chunks(num_rows: int, vocab: int, work: torch.dtype) -> list[slice]:
    rows = max(16, CHUNK_BYTES // (max(vocab, 1) * work.itemsize))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BD: Tensor,
        weight_VD: Tensor,
        target_B: Tensor,
        first_row: int,
        tensor: Group,
        ops: Ops,
    ) -> Tensor:
        work = torch.float64 if hidden_BD.dtype == torch.float64 else torch.float32
        weight = weight_VD.to(hidden_BD.dtype)
        top_B = torch.empty(len(target_B), dtype=work, device=hidden_BD.device)
        sum_B, picked_B = torch.empty_like(top_B), torch.empty_like(top_B)
        local_B = target_B - first_row
        mine_B = (local_B >= 0) & (local_B < weight.shape[0])
        safe_B = torch.where(mine_B, local_B, 0)
        for rows in _chunks(len(target_B), weight.shape[0], work):
            logits = ops.linear(hidden_BD[rows], weight, None).to(work)
            top_B[rows] = logits.amax(-1)
            sum_B[rows] = (logits - top_B[rows, None]).exp_().sum(-1)
            picked_B[rows] = logits.gather(1, safe_B[rows, None])[:, 0]
        top_all = comm.all_reduce(top_B.clone(), tensor, "max")
        parts = torch.stack((sum_B * (top_B - top_all).exp(), torch.where(mine_B, picked_B, 0.0)))
        sum_all, picked = comm.all_reduce(parts, tensor).unbind()
        lse_B = top_all + sum_all.log()
        ctx.save_for_backward(hidden_BD, weight_VD, local_B, mine_B, lse_B)
        ctx.tensor, ctx.ops = tensor, ops
        return (lse_B - picked).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden_BD, weight_VD, local_B, mine_B, lse_B = ctx.saved_tensors
        weight = weight_VD.to(hidden_BD.dtype)
        grad_hidden = torch.empty_like(hidden_BD)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(local_B), weight.shape[0], lse_B.dtype):
            logits = ctx.ops.linear(hidden_BD[rows], weight, None).to(lse_B.dtype)
            grad = (logits - lse_B[rows, None]).exp_()
            hit = mine_B[rows].nonzero()[:, 0]
            grad[hit, local_B[rows][hit]] -= 1
            grad = (grad * grads[0]).to(hidden_BD.dtype)
            grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden_BD[rows]).to(grad_weight.dtype)
        return comm.all_reduce(grad_hidden, ctx.tensor), grad_weight, None, None, None, None

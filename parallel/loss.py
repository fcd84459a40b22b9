"""Vocabulary-parallel cross-entropy that never holds more than a few rows of logits.

The loss is a *sum* over target tokens; the caller divides by the count over all microbatches, data and context
ranks, so that the number doesn't depend on the layout (Megatron-LM's vocab-parallel loss, arXiv:1909.08053
sec. 3). Gradients are formed in the forward pass, chunk by chunk while the logits are at hand, and scaled in the
backward pass: no logits are kept, and none computed twice (as in Liger Kernel, arXiv:2410.10989, sec. 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Ops
from kernels.master import Master
from kernels.ops import Packed, Weight
from parallel import comm, regions
from parallel.comm import Group
from parallel.sequence import Split

ROWS = 512
"""Rows of logits held at a time: the same on every rank, whatever its cut of the vocabulary."""


def capped(logits_BV: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)` (Gemma 2, arXiv:2408.00118, sec. 2) in their memory, or the logits as they are."""
    return logits_BV if cap is None else logits_BV.div_(cap).tanh_().mul_(cap)


def cross_entropy(
    hidden_BD: Tensor,
    weight_VD: Weight,
    target_B: Tensor,
    *,
    first_row: int,
    tensor: Group,
    ops: Ops,
    cap: float | None = None,
    split: Split | None = None,
) -> Tensor:
    """Sum over B of `-log softmax(capped(hidden W^T))[target]`, a float32 (float64) scalar, replicated over tensor.

    hidden_BD: normed states in the compute dtype. weight_VD: this rank's rows of the output matrix, the first being
    row `first_row`; a master, or packed. target_B: int64 global ids. cap: of `capped`. split: how the rows of hidden
    fall on the ranks, of which each then has its own [B_r, D]. Communicates 3 floats a row forward (max, sum, target
    logit), and the gradient of hidden backward (B * D, all-reduce; with a split gathered forward, reduce-scattered
    backward).
    """
    trained = weight_VD if isinstance(weight_VD, Tensor) else None
    hidden_BD = regions.enter(hidden_BD, tensor, split)
    return _CrossEntropy.apply(hidden_BD, trained, weight_VD, target_B, first_row, tensor, ops, cap)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BD: Tensor,
        trained_VD: Tensor | None,
        weight_VD: Weight,
        target_B: Tensor,
        first_row: int,
        tensor: Group,
        ops: Ops,
        cap: float | None,
    ) -> Tensor:
        dtype = hidden_BD.dtype
        work = torch.float64 if dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight, turned = weight_VD, None
        if isinstance(weight, Tensor):  # packed, and turned, once for all chunks
            weight = ops.pack_master(weight, dtype)
            turned = weight.transposed() if wants_hidden and isinstance(weight, Packed) else None
        grad_hidden = torch.empty(hidden_BD.shape, dtype=work, device=hidden_BD.device) if wants_hidden else None
        grad_weight = None
        if wants_weight and trained_VD is not None:
            grad_weight = _room(trained_VD, work).zero_()
        total = torch.zeros((), dtype=work, device=hidden_BD.device)
        for start in range(0, len(target_B), ROWS):
            rows = slice(start, start + ROWS)
            logits = capped(ops.linear(hidden_BD[rows], weight, wide=True), cap)
            local = target_B[rows] - first_row
            local = torch.where((local >= 0) & (local < weight.shape[0]), local, -1)
            picked = torch.where(local >= 0, logits.gather(1, local.clamp_min(0)[:, None])[:, 0], 0.0)
            lse, picked = _over_ranks(ops.log_sum_exp(logits), picked, tensor)
            total += (lse - picked).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = _logit_gradient(logits, lse, local, dtype, ops, cap)
            if grad_hidden is not None:
                wide = ops.input_gradient(grad, weight) if turned is None else ops.linear(grad, turned, wide=True)
                grad_hidden[rows] = wide
            if grad_weight is not None:
                ops.add_weight_gradient(grad_weight, grad, hidden_BD[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.trained = dtype, trained_VD
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grads[0]).to(ctx.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grads[0], ctx.trained)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _logit_gradient(
    logits_BV: Tensor, lse_B: Tensor, target_B: Tensor, dtype: torch.dtype, ops: Ops, cap: float | None
) -> Tensor:
    """Gradient [B, V] by what the head gave, in `dtype`; the logits, capped, are of no use afterwards."""
    if cap is None:
        return ops.loss_gradient(logits_BV, lse_B, target_B, dtype)
    slope = 1 - (logits_BV / cap).square_()  # d cap tanh(l / cap) / dl
    return ops.loss_gradient(logits_BV, lse_B, target_B, logits_BV.dtype).mul_(slope).to(dtype)


def _room(trained_VD: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(trained_VD, Master) and trained_VD.dtype == dtype:
        return trained_VD.take_room()
    return torch.empty(trained_VD.shape, dtype=dtype, device=trained_VD.device)


def _scaled(grad_VD: Tensor, scale: Tensor, trained_VD: Tensor) -> Tensor:
    """The gradient of the head, without another tensor of its size."""
    if isinstance(trained_VD, Master) and trained_VD.adds_gradients:
        assert trained_VD.grad is not None
        trained_VD.grad.addcmul_(grad_VD, scale)
        trained_VD.give_back(grad_VD)
        return trained_VD.added()
    return grad_VD.mul_(scale).to(trained_VD.dtype)


def _over_ranks(lse_B: Tensor, picked_B: Tensor, tensor: Group) -> tuple[Tensor, Tensor]:
    """The whole vocabulary's log-sum-exp, and the target's logit, from those of each rank's columns."""
    if tensor.size == 1:
        return lse_B, picked_B
    top_B = comm.all_reduce(lse_B.clone(), tensor, "max")
    sum_B, picked_B = comm.all_reduce(torch.stack(((lse_B - top_B).exp(), picked_B)), tensor).unbind()
    return top_B + sum_B.log(), picked_B

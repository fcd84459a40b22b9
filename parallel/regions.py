"""Autograd regions of tensor parallelism: a collective in one direction, its conjugate in the other.

    region      forward                backward               Megatron-LM (arXiv:1909.08053, fig. 3)
    enter       identity               all-reduce (sum)       f
    leave       all-reduce (sum)       identity               g

Between `enter` and `leave` each tensor rank works on its own cut of heads or ffn columns; outside, activations
are replicated and bitwise equal on all tensor ranks. `leave` adds in rank order: a token's bits depend neither on
its place in the batch nor on the others in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.replay import outside
from parallel import comm
from parallel.comm import Group


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return comm.all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return comm.sum_in_rank_order(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def enter(x: Tensor, group: Group) -> Tensor:
    """Replicated x [T, D] as input of this rank's cut; backward sums the ranks' gradients (T * D elements)."""
    return x if group.size == 1 else _Enter.apply(x, group)  # type: ignore[no-any-return]


def leave(x: Tensor, group: Group) -> Tensor:
    """The sum [T, D] of the ranks' partial x (T * D elements), replicated; backward passes the gradient on.

    Without gradients it may take x's place.
    """
    if group.size == 1:
        return x
    if torch.is_grad_enabled():
        return _Leave.apply(x, group)  # type: ignore[no-any-return]
    x = x.contiguous()
    return outside(lambda: comm.sum_in_rank_order(x, group), lambda: comm.direct_sum(x, group))

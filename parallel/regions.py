"""Autograd regions of tensor parallelism: a collective in one direction, its conjugate in the other.

    region                  forward              backward             in the papers
    enter                   identity             all-reduce (sum)     f       Megatron-LM, arXiv:1909.08053, fig. 3
    leave                   all-reduce (sum)     identity             g
    enter, tokens split     all-gather           reduce-scatter       g       Korthikanti et al., arXiv:2205.05198,
    leave, tokens split     reduce-scatter       all-gather           g-bar   fig. 5

Between `enter` and `leave` each tensor rank works on its own cut of heads or ffn columns, with all tokens. Outside,
activations are replicated and bitwise equal on all tensor ranks or, with a `Split` (sequence parallelism), each rank
has its share of the tokens. `leave` adds in rank order: a token's bits depend neither on its place in the batch nor on
the others in it. In shared memory a scattered sum is bitwise a part of the whole one, so that splitting changes no bit;
of three ranks or more, gloo adds in an order of its own when it scatters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.replay import outside
from parallel import comm
from parallel.comm import Group
from parallel.sequence import Split


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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return gather(x, group, split)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return scatter(grads[0], ctx.group, ctx.split), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return scatter(x, group, split)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather(grads[0], ctx.group, ctx.split), None, None


def enter(x: Tensor, group: Group, split: Split | None = None) -> Tensor:
    """x [T, D] as input of this rank's cut: itself, or gathered from the shares [T_r, D] of a split.

    Backward sums the ranks' gradients (T * D elements), with a split into shares.
    """
    if group.size == 1:
        return x
    return _Enter.apply(x, group) if split is None else _Gather.apply(x, group, split)  # type: ignore[no-any-return]


def leave(x: Tensor, group: Group, split: Split | None = None) -> Tensor:
    """The sum [T, D] of the ranks' partial x (T * D elements), replicated or, with a split, this rank's share of it.

    Backward passes the gradient on, with a split gathered from the shares. Without gradients it may take x's place.
    """
    if group.size == 1:
        return x
    if split is not None:
        return _Scatter.apply(x, group, split)  # type: ignore[no-any-return]
    if torch.is_grad_enabled():
        return _Leave.apply(x, group)  # type: ignore[no-any-return]
    x = x.contiguous()
    return outside(lambda: comm.sum_in_rank_order(x, group), lambda: comm.direct_sum(x, group))


def gather(x: Tensor, group: Group, split: Split | None) -> Tensor:
    """`enter` without gradients: x itself, or the ranks' shares of it end to end."""
    return x if split is None else comm.all_gather(x, group, split.sizes, 0)


def scatter(x: Tensor, group: Group, split: Split) -> Tensor:
    """This rank's share of the sum of the ranks' x."""
    return comm.reduce_scatter(x.contiguous(), group, split.sizes, 0)

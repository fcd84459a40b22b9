"""Linears of the CUDA backend with low-rank updates and gradients (`kernels/cuda/linear.cu`, `lora.cu`).

A master weight in float32 is rounded to the compute dtype at every call, forward and backward; its gradient is summed
in float32 and stays so. The updates of up to 64 adapters in a batch are two launches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import checks
from kernels.cuda_layout import MOST_ADAPTERS, low_rank_items
from kernels.master import Master
from kernels.ops import LowRank, Packed, Part, Weight


def linear(
    x_TK: Tensor,
    w_NK: Weight,
    bias_N: Tensor | None = None,
    updates: Sequence[LowRank] = (),
    *,
    wide: bool = False,
) -> Tensor:
    """`reference.linear`, row-invariant; with `wide` the sums in float32 are never rounded. Differentiable."""
    checks.check_linear(x_TK, w_NK, bias_N, updates)
    x_TK, weight = checks.contiguous_rows(x_TK), _plain(w_NK)
    if torch.is_grad_enabled():
        out_TN = _Linear.apply(x_TK, weight, bias_N, wide)
    else:
        out_TN = _linear(x_TK, weight, bias_N, wide)
    if not updates:
        return out_TN
    bounds = tuple((update.start, update.stop) for update in updates)
    factors = [_plain(factor) for update in updates for factor in (update.a_RK, update.b_NR)]
    x_TK = _inputs(x_TK, updates)
    if torch.is_grad_enabled():
        return _LowRank.apply(out_TN, x_TK, bounds, *factors)
    _add_low_rank(out_TN, x_TK, bounds, factors)
    return out_TN


def linears(x_TK: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """`reference.linears`, one by one."""
    return tuple(linear(x_TK, part.w_NK, part.bias_N, part.updates) for part in parts)


def input_gradient(grad_TN: Tensor, w_NK: Weight) -> Tensor:
    """`reference.input_gradient`: in float32."""
    return _input_gradient(grad_TN, _plain(w_NK), wide=True)


def add_weight_gradient(out_NK: Tensor, grad_TN: Tensor, x_TK: Tensor) -> None:
    """`reference.add_weight_gradient`; out in float32 and contiguous."""
    torch.ops.onemesh_cuda.linear_grad_weight(out_NK, grad_TN.contiguous(), x_TK.contiguous())


def _plain(w_NK: Weight) -> Tensor:
    if isinstance(w_NK, Packed):
        raise ValueError("linear: the weight is packed for another backend")
    return w_NK


def _linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None, wide: bool) -> Tensor:
    bias_N = None if bias_N is None else bias_N.contiguous()
    return torch.ops.onemesh_cuda.linear(x_TK, w_NK.to(x_TK.dtype).contiguous(), bias_N, wide)


def _input_gradient(grad_TN: Tensor, w_NK: Tensor, *, wide: bool = False) -> Tensor:
    weight = w_NK.to(grad_TN.dtype).contiguous()
    return torch.ops.onemesh_cuda.linear_grad_input(grad_TN.contiguous(), weight, wide)


def _weight_gradient(w_NK: Tensor, grad_TN: Tensor, x_TK: Tensor) -> Tensor:
    out_NK = torch.zeros(w_NK.shape, dtype=torch.float32, device=w_NK.device)
    add_weight_gradient(out_NK, grad_TN, x_TK)
    return out_NK.to(w_NK.dtype)


class _Linear(torch.autograd.Function):
    """`_linear`: saves x and the weight, a master as it is."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None, wide: bool) -> Tensor:
        """[T, N] in x.dtype, or float32."""
        ctx.save_for_backward(x_TK, w_NK)
        ctx.master = w_NK if isinstance(w_NK, Master) else None
        return _linear(x_TK, w_NK, bias_N, wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """`dx = dy w`, `dw = dy^T x`, `db = sum(dy)`, each only when asked for; dy is rounded to x.dtype.

        A master's dw may be put off.
        """
        x_TK, w_NK = ctx.saved_tensors
        wants_x, wants_w, wants_bias, _ = ctx.needs_input_grad
        dy, master, dw = grads[0].to(x_TK.dtype), ctx.master, None
        if wants_w and master is not None:
            dw = master.gradient(partial(_weight_gradient, master), dy, x_TK)
        elif wants_w:
            dw = _weight_gradient(w_NK, dy, x_TK)
        return (
            _input_gradient(dy, w_NK) if wants_x else None,
            dw,
            dy.sum(0) if wants_bias else None,
            None,
        )


def _inputs(x_TK: Tensor, updates: Sequence[LowRank]) -> Tensor:
    """x, on the rows of an update what its first factor multiplies."""
    if all(update.x_TK is None for update in updates):
        return x_TK
    parts, done = [], 0
    for update in updates:
        own = x_TK[update.start : update.stop] if update.x_TK is None else update.x_TK
        parts += [x_TK[done : update.start], own]
        done = update.stop
    return torch.cat([*parts, x_TK[done:]])


def _add_low_rank(
    out_TN: Tensor, x_TK: Tensor, bounds: tuple[tuple[int, int], ...], factors: Sequence[Tensor]
) -> Tensor:
    """Rows start .. stop - 1 of out get `(x a^T) b^T` of their factors (a, b), in place -> x a^T, [T, R].

    R is the largest rank; of a row the columns from its own update's rank on, and other rows, are undefined. The
    factors are read where they lie, those of another dtype or with gaps from a copy.
    """
    a, b = ([factor.to(x_TK.dtype).contiguous() for factor in factors[side::2]] for side in (0, 1))
    hidden_TR = x_TK.new_empty(len(x_TK), max(a_RK.shape[0] for a_RK in a))
    for first in range(0, len(bounds), MOST_ADAPTERS):
        some = slice(first, first + MOST_ADAPTERS)
        items = low_rank_items(bounds[some], x_TK.device)
        torch.ops.onemesh_cuda.lora(out_TN, hidden_TR, x_TK, a[some], b[some], items)
    return hidden_TR


class _LowRank(torch.autograd.Function):
    """`_add_low_rank` on the result of a linear: saves x, x a^T and the factors."""

    @staticmethod
    def forward(
        ctx: Any, out_TN: Tensor, x_TK: Tensor, bounds: tuple[tuple[int, int], ...], *factors: Tensor
    ) -> Tensor:
        """out itself."""
        ctx.mark_dirty(out_TN)
        hidden_TR = _add_low_rank(out_TN, x_TK, bounds, factors)
        ctx.save_for_backward(x_TK, hidden_TR, *factors)
        ctx.bounds = bounds
        return out_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With `h = x a^T` and `dh = dy b`: `dx = dh a`, `da = dh^T x`, `db = dy^T h`, on each update's rows."""
        x_TK, hidden_TR, *factors = ctx.saved_tensors
        wants_out, wants_x, _, *wants = ctx.needs_input_grad
        grad_x = torch.zeros_like(x_TK) if wants_x else None
        found: list[Tensor | None] = [None] * len(factors)
        for i, (start, stop) in enumerate(ctx.bounds):
            a_RK, b_NR = factors[2 * i : 2 * i + 2]
            dy = grads[0][start:stop].to(x_TK.dtype)
            dh = _input_gradient(dy, b_NR)
            if grad_x is not None:
                grad_x[start:stop] = _input_gradient(dh, a_RK)
            if wants[2 * i]:
                found[2 * i] = _weight_gradient(a_RK, dh, x_TK[start:stop])
            if wants[2 * i + 1]:
                found[2 * i + 1] = _weight_gradient(b_NR, dy, hidden_TR[start:stop, : b_NR.shape[1]])
        return grads[0] if wants_out else None, grad_x, None, *found

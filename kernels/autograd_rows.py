"""Forward/backward pairs of the ops over rows: what is saved between the passes, whichever backend computes them.

| function   | saved for the backward | recomputed                          |
|------------|------------------------|-------------------------------------|
| RmsNorm    | x, w                   | 1/rms, the normalised x             |
| AddRmsNorm | x + delta, w           | 1/rms, the normalised sum           |
| Rotary     | cos, sin               | -                                   |
| Gated      | gate, up               | sigmoid                             |
| Embedding  | ids                    | -                                   |

Each function takes the backend's forward and backward as its last arguments; those of torch are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import working_dtype

NormBackward = Callable[[Tensor, Tensor | None, Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]
"""(grad [T, D] of the normed, grad of the sum or None, x, w, eps, whether w's is wanted) -> (grad of x, of w)."""


def rms_norm_backward(
    grad_TD: Tensor, grad_sum_TD: Tensor | None, x_TD: Tensor, w_D: Tensor, eps: float, wants_w: bool
) -> tuple[Tensor, Tensor | None]:
    """`dx = (dn - n * mean(dn * n)) / rms` with `n = x / rms`, `dn = dy * w`; `dw = sum(dy * n)`.

    `grad_sum`, if any, is the gradient that reaches x past the norm, added before dx is rounded.
    """
    x = x_TD.to(working_dtype(x_TD.dtype))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    grad = grad_TD.to(scale.dtype)
    normed = x * scale
    grad_w = (grad * normed).sum(0).to(w_D.dtype) if wants_w else None
    grad = grad * w_D.to(scale.dtype)
    grad_x = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * scale
    if grad_sum_TD is not None:
        grad_x = grad_x + grad_sum_TD.to(scale.dtype)
    return grad_x.to(x_TD.dtype), grad_w


class RmsNorm(torch.autograd.Function):
    """`norm(x, w, eps)`, an op of `reference.rms_norm`, that keeps x alone and not float32 copies of it."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_D: Tensor, eps: float, norm: Callable[..., Tensor], backward: NormBackward
    ) -> Tensor:
        """[T, D] in x.dtype."""
        ctx.save_for_backward(x_TD, w_D)
        ctx.eps, ctx.backward_op = eps, backward
        return norm(x_TD, w_D, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and, only when asked for, w."""
        x_TD, w_D = ctx.saved_tensors
        return *ctx.backward_op(grads[0], None, x_TD, w_D, ctx.eps, ctx.needs_input_grad[1]), None, None, None


class AddRmsNorm(torch.autograd.Function):
    """`norm(x, delta, w, eps)`, an op of `reference.add_rms_norm`, that keeps the sum alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        delta_TD: Tensor,
        w_D: Tensor,
        eps: float,
        norm: Callable[..., tuple[Tensor, Tensor]],
        backward: NormBackward,
    ) -> tuple[Tensor, Tensor]:
        """(sum, normed), both [T, D] in x.dtype."""
        ctx.set_materialize_grads(False)
        sum_TD, normed_TD = norm(x_TD, delta_TD, w_D, eps)
        ctx.save_for_backward(sum_TD, w_D)
        ctx.eps, ctx.backward_op = eps, backward
        return sum_TD, normed_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """x and delta have one gradient, the same tensor for both."""
        grad_sum, grad_normed = grads
        if grad_normed is None:
            return grad_sum, grad_sum, None, None, None, None
        sum_TD, w_D = ctx.saved_tensors
        grad_x, grad_w = ctx.backward_op(grad_normed, grad_sum, sum_TD, w_D, ctx.eps, ctx.needs_input_grad[2])
        return grad_x, grad_x, grad_w, None, None, None


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, inverse: bool) -> Tensor:
    """`reference.rotary`, by the negative angle if `inverse`."""
    return reference.rotary(x_TNH, cos_TH, -sin_TH if inverse else sin_TH)


class Rotary(torch.autograd.Function):
    """`rotate(x, cos, sin, inverse)`, an op of `reference.rotary`: the backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, rotate: Callable[..., Tensor]) -> Tensor:
        """[T, N, H] in x.dtype; no gradient of the angles."""
        ctx.save_for_backward(cos_TH, sin_TH)
        ctx.rotate = rotate
        return rotate(x_TNH, cos_TH, sin_TH, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The rotation by -angle, its transpose (cos and sin repeat their halves)."""
        return ctx.rotate(grads[0], *ctx.saved_tensors, True), None, None, None


@dataclass(frozen=True)
class Gate:
    """`gate * sigmoid(u) * up` in the working dtype, rounded once, and its gradients.

    u = gate is SiLU; u = 2 sqrt(2 / pi) (gate + 0.044715 gate^3) is the tanh form of GELU, because
    0.5 (1 + tanh(z)) = sigmoid(2 z).

    The sigmoid is `1 / (1 + exp(-u))` and not torch's: the vector body and the scalar tail of `torch.sigmoid` and
    `F.silu` differ in the last bit, and which elements fall into the tail depends on T and on the thread count. exp
    and the arithmetic here give one result for either path.
    """

    name: str
    cubic: float
    factor: float

    def forward(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """[T, F] in gate.dtype."""
        work = working_dtype(gate_TF.dtype)
        gate = gate_TF.to(work)
        return (gate / (torch.exp(-self._u(gate)) + 1) * up_TF.to(work)).to(gate_TF.dtype)

    def backward(self, grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
        """`dgate = dy * up * (s + gate * s * (1 - s) * u')`, `dup = dy * gate * s`, `s = sigmoid(u)`."""
        work = working_dtype(gate_TF.dtype)
        grad, gate, up = grad_TF.to(work), gate_TF.to(work), up_TF.to(work)
        s = 1 / (torch.exp(-self._u(gate)) + 1)
        slope = gate * s * (1 - s)  # s first: it is 0 where u' overflows
        if self.cubic:
            slope = slope * (self.factor * (1 + 3 * self.cubic * gate.square()))
        return (grad * up * (s + slope)).to(gate_TF.dtype), (grad * gate * s).to(up_TF.dtype)

    def _u(self, gate: Tensor) -> Tensor:
        return gate * self.factor * (1 + self.cubic * gate.square()) if self.cubic else gate


def check_gate(name: str, gate_TF: Tensor, up_TF: Tensor) -> None:
    """ValueError unless gate and up have one shape."""
    if gate_TF.shape != up_TF.shape:
        raise ValueError(f"{name}: gate {tuple(gate_TF.shape)} and up {tuple(up_TF.shape)} must have one shape")


SILU = Gate("silu_gate", cubic=0.0, factor=1.0)
GELU = Gate("gelu_gate", cubic=0.044715, factor=2 * math.sqrt(2 / math.pi))


class Gated(torch.autograd.Function):
    """`forward(gate, up)`, an op of `reference.silu_gate` or `gelu_gate`, that keeps gate and up alone."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_TF: Tensor,
        up_TF: Tensor,
        forward: Callable[[Tensor, Tensor], Tensor],
        backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """[T, F] in gate.dtype."""
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.backward_op = backward
        return forward(gate_TF, up_TF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gate and up."""
        return *ctx.backward_op(grads[0], *ctx.saved_tensors), None, None


class Embedding(torch.autograd.Function):
    """`gather(ids, w)`, an op of `reference.embedding`; `backward(grad, ids, w)` is the gradient of w."""

    @staticmethod
    def forward(
        ctx: Any,
        ids_T: Tensor,
        w_VD: Tensor,
        gather: Callable[[Tensor, Tensor], Tensor],
        backward: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """[T, D] in w.dtype."""
        ctx.save_for_backward(ids_T)
        ctx.weight, ctx.backward_op = w_VD, backward  # of the weight, its values aren't used
        return gather(ids_T, w_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of w: rows of `grad` summed by id."""
        return None, ctx.backward_op(grads[0], *ctx.saved_tensors, ctx.weight), None, None

"""Norms, rotary embedding, gates and embedding of the C++ backend, forward and backward.

Ops of `kernels.reference` for float32 and bfloat16, row-invariant, compiled from `kernels/cpu/`. Inputs may be parts of
wider matrices: any stride of the first dim is read without a copy. `kernels.cpu_ops.load` loads the library.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import autograd_rows
from kernels.master import Master


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if not torch.is_grad_enabled():
        return torch.ops.onemesh.rms_norm(x_TD, w_D, eps)
    return autograd_rows.RmsNorm.apply(x_TD, w_D, eps, torch.ops.onemesh.rms_norm, _rms_norm_backward)


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` in one pass."""
    if not torch.is_grad_enabled():
        return torch.ops.onemesh.add_rms_norm(x_TD, delta_TD, w_D, eps)
    return autograd_rows.AddRmsNorm.apply(x_TD, delta_TD, w_D, eps, torch.ops.onemesh.add_rms_norm, _rms_norm_backward)


def _rms_norm_backward(
    grad_TD: Tensor, grad_sum_TD: Tensor | None, x_TD: Tensor, w_D: Tensor, eps: float, wants_w: bool
) -> tuple[Tensor, Tensor | None]:
    """As `autograd_rows.rms_norm_backward`; w's gradient is summed in blocks of rows, the same for any threads."""
    grad_x, grad_w = torch.ops.onemesh.rms_norm_backward(grad_TD, grad_sum_TD, x_TD, w_D, eps, wants_w)
    return grad_x, grad_w if wants_w else None


def rotary_angles(position_T: Tensor, frequency: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference.rotary_angles`; `dtype` is one of those with float32 as the working one."""
    return torch.ops.onemesh.rotary_angles(position_T, frequency, factor)


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """`reference.rotary`."""
    if not torch.is_grad_enabled():
        return torch.ops.onemesh.rotary(x_TNH, cos_TH, sin_TH)
    return autograd_rows.Rotary.apply(x_TNH, cos_TH, sin_TH, torch.ops.onemesh.rotary)


def rotary_write(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_TH: Tensor,
    sin_TH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """`reference.rotary_write` in one pass."""
    if torch.is_grad_enabled() and (q_TNH.requires_grad or k_TKH.requires_grad or v_TKH.requires_grad):
        raise ValueError("rotary_write has no gradients; use rotary and attention_varlen for training")
    return torch.ops.onemesh.rotary_write(
        q_TNH, k_TKH, v_TKH, cos_TH, sin_TH, key_cache_PSKH, value_cache_PSKH, slots_T
    )


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.silu_gate`."""
    ops = torch.ops.onemesh
    return _gate("silu_gate", gate_TF, up_TF, ops.silu_gate, ops.silu_gate_backward)


def gelu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.gelu_gate`."""
    ops = torch.ops.onemesh
    return _gate("gelu_gate", gate_TF, up_TF, ops.gelu_gate, ops.gelu_gate_backward)


def _gate(
    name: str,
    gate_TF: Tensor,
    up_TF: Tensor,
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    autograd_rows.check_gate(name, gate_TF, up_TF)
    if not torch.is_grad_enabled():
        return forward(gate_TF, up_TF)
    return autograd_rows.Gated.apply(gate_TF, up_TF, forward, backward)


def embedding(ids_T: Tensor, w_VD: Tensor) -> Tensor:
    """`reference.embedding`; in the gradient a row's tokens are summed in float32, in their order."""
    ops, ids_T = torch.ops.onemesh, ids_T.to(torch.int64)
    if not torch.is_grad_enabled():
        return ops.embedding(ids_T, w_VD)
    return autograd_rows.Embedding.apply(ids_T, w_VD, ops.embedding, _embedding_backward)


def _embedding_backward(grad_TD: Tensor, ids_T: Tensor, w_VD: Tensor | Master) -> Tensor:
    backward = torch.ops.onemesh.embedding_backward
    if not (isinstance(w_VD, Master) and w_VD.adds_gradients):
        return backward(grad_TD, ids_T, w_VD.shape[0])
    assert w_VD.grad is not None
    used, places = ids_T.unique(return_inverse=True)
    w_VD.grad.index_add_(0, used, backward(grad_TD, places, len(used)))
    return w_VD.added()

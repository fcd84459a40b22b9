"""Ops over rows of the CUDA backend: norms, rotary embedding, gates, the writing of pages (`kernels/cuda/rows.cu`), and
the embedding (`kernels/cuda/embedding.cu`)."""

import torch
from torch import Tensor

from kernels import autograd_rows
from kernels.reference import embedding_part

SILU, GELU_TANH = 0, 1
"""Codes of activations (`kernels/cuda/kernels.h`)."""


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rms_norm(x_TD, w_D, eps)
    return autograd_rows.RmsNorm.apply(x_TD, w_D, eps, _rms_norm, autograd_rows.rms_norm_backward)


def _rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    return torch.ops.onemesh_cuda.rms_norm(x_TD.contiguous(), w_D.contiguous(), eps)


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` in one pass, with a lean backward."""
    if not torch.is_grad_enabled():
        return _add_rms_norm(x_TD, delta_TD, w_D, eps)
    return autograd_rows.AddRmsNorm.apply(x_TD, delta_TD, w_D, eps, _add_rms_norm, autograd_rows.rms_norm_backward)


def _add_rms_norm(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.onemesh_cuda.add_rms_norm(x_TD.contiguous(), delta_TD.contiguous(), w_D.contiguous(), eps)
    return total, normed


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """`reference.rotary`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rotary(x_TNH, cos_TH, sin_TH, False)
    return autograd_rows.Rotary.apply(x_TNH, cos_TH, sin_TH, _rotary)


def _rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, inverse: bool) -> Tensor:
    sin_TH = -sin_TH if inverse else sin_TH
    return torch.ops.onemesh_cuda.rotary(x_TNH.contiguous(), cos_TH.contiguous(), sin_TH.contiguous())


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
    """`reference.rotary_write` in one pass; the caches have the dtype of k and v. Not differentiable."""
    rows = (x.contiguous() for x in (q_TNH, k_TKH, v_TKH, cos_TH, sin_TH))
    return torch.ops.onemesh_cuda.rotary_write(*rows, key_cache_PSKH, value_cache_PSKH, slots_T.contiguous())


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.silu_gate`, row-invariant, with a lean backward."""
    return _gate(autograd_rows.SILU, SILU, gate_TF, up_TF)


def gelu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.gelu_gate`, row-invariant, with a lean backward."""
    return _gate(autograd_rows.GELU, GELU_TANH, gate_TF, up_TF)


def _gate(gate: autograd_rows.Gate, activation: int, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    def forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return torch.ops.onemesh_cuda.gate(gate_TF.contiguous(), up_TF.contiguous(), activation)

    if not torch.is_grad_enabled():
        return forward(gate_TF, up_TF)
    return autograd_rows.Gated.apply(gate_TF, up_TF, forward, gate.backward)


def write_pages(
    key_cache_PSKH: Tensor, value_cache_PSKH: Tensor, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor
) -> None:
    """`reference.write_pages`; the caches have the dtype of k and v."""
    torch.ops.onemesh_cuda.write_pages(
        key_cache_PSKH, value_cache_PSKH, k_TKH.contiguous(), v_TKH.contiguous(), slots_T.contiguous()
    )


def embedding(ids_T: Tensor, w_VD: Tensor, part: int | None = None) -> Tensor:
    """`reference.embedding`, but an id that w doesn't have gives a row of NaN: ids aren't looked at on the host.

    In the gradient a row's tokens are summed in float32, in their order, whatever other ids there are.
    """
    if part is not None:
        return embedding_part(embedding, ids_T, w_VD, part)
    ids_T = ids_T.to(torch.int64)
    if not torch.is_grad_enabled():
        return _embedding(ids_T, w_VD)
    return autograd_rows.Embedding.apply(ids_T, w_VD, _embedding, _embedding_gradient)


def _embedding(ids_T: Tensor, w_VD: Tensor) -> Tensor:
    return torch.ops.onemesh_cuda.embedding(w_VD.contiguous(), ids_T.contiguous())


def _embedding_gradient(grad_TD: Tensor, ids_T: Tensor, w_VD: Tensor) -> Tensor:
    """[V, D] in w.dtype. The ids are sorted by torch; sorting stably keeps the order of a row's tokens."""
    out_VD = torch.zeros_like(w_VD, memory_format=torch.contiguous_format, requires_grad=False)
    sorted_ids, places = ids_T.sort(stable=True)
    torch.ops.onemesh_cuda.embedding_grad(out_VD, grad_TD.contiguous(), sorted_ids, places)
    return out_VD

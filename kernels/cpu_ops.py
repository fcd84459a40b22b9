"""The C++ backend: ops of `kernels.reference` for float32 and bfloat16 on CPUs, compiled once per instruction set.

`kernels/cpu/` has the sources, `kernels.cpu_attention` the attention. Where the library wasn't built (no compiler at
installation), `load` returns None and torch's kernels do all the work. Linears of packed weights aren't differentiable,
the rest is.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels import autograd, reference
from kernels.ops import Packed, Rows

LIBRARY = Path(__file__).with_name("_cpu.so")


def load() -> str | None:
    """Loads the library; returns the instruction set it chose (ONEMESH_CPU_ISA forces one), None if it isn't built.

    Raises:
        RuntimeError: it is built, but doesn't load: for another torch or processor; or the forced one isn't there.
    """
    if not LIBRARY.is_file():
        return None
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise RuntimeError(f"{LIBRARY} doesn't load ({error}); build it again: make clean install") from None
    return torch.ops.onemesh.isa()


PANEL = 48
"""Rows of a weight that stand together (`kernels/cpu/kernels.h`)."""
_STAGE_BYTES = 2 << 20  # larger ones leave holes in the heap between packed weights


def pack(shape: tuple[int, int], dtype: torch.dtype, rows: Rows) -> Packed:
    """The weight in the layout of `kernels/cpu/linear.cpp`, filled from about 2 MB of rows at a time."""
    n, k = shape
    data = torch.ops.onemesh.empty_packed(torch.empty(0, dtype=dtype), n, k)
    step = max(_STAGE_BYTES // max(k * dtype.itemsize * PANEL, 1), 1) * PANEL
    for first in range(0, n, step):
        torch.ops.onemesh.pack_rows(data, rows(first, min(first + step, n)).to(dtype).contiguous(), first)
    return Packed(data, shape)


def linear(
    x_TK: Tensor, w_NK: Tensor | Packed, bias_N: Tensor | None = None, *, plain: Callable[..., Tensor]
) -> Tensor:
    """`reference.linear`, row-invariant: of a packed weight here, without gradients, of another by `plain`."""
    if not isinstance(w_NK, Packed):
        return plain(x_TK, w_NK, bias_N)
    if x_TK.dim() != 2 or x_TK.shape[1] != w_NK.shape[1]:
        raise ValueError(f"linear: x {tuple(x_TK.shape)} and w {w_NK.shape} must be [T, K] and [N, K]")
    if x_TK.requires_grad and torch.is_grad_enabled():
        raise ValueError("linear: a packed weight has no gradients; don't pack weights for training")
    return torch.ops.onemesh.linear(x_TK.contiguous(), w_NK.data, bias_N, w_NK.shape[0])


def embedding(ids_T: Tensor, w_VD: Tensor | Packed) -> Tensor:
    """`reference.embedding`, of a packed weight too."""
    if not isinstance(w_VD, Packed):
        return reference.embedding(ids_T, w_VD)
    return torch.ops.onemesh.packed_rows(ids_T.contiguous(), w_VD.data, w_VD.shape[0], w_VD.shape[1])


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.silu_gate`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _silu_gate(gate_TF, up_TF)
    return autograd.SiluGate.apply(gate_TF, up_TF, _silu_gate)


def _silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    if gate_TF.shape != up_TF.shape:
        raise ValueError(f"silu_gate: gate {tuple(gate_TF.shape)} and up {tuple(up_TF.shape)} must have one shape")
    return torch.ops.onemesh.silu_gate(gate_TF.contiguous(), up_TF.contiguous())


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rms_norm(x_TD, w_D, eps)
    return autograd.RmsNorm.apply(x_TD, w_D, eps, _rms_norm)


def _rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    return torch.ops.onemesh.rms_norm(x_TD.contiguous(), w_D.contiguous(), eps)


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """`reference.rotary`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rotary(x_TNH, cos_TH, sin_TH)
    return autograd.Rotary.apply(x_TNH, cos_TH, sin_TH, _rotary)


def _rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    return torch.ops.onemesh.rotary(x_TNH.contiguous(), cos_TH.contiguous(), sin_TH.contiguous())

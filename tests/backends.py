"""The CPU backends that a test of kernels runs on."""

from __future__ import annotations

import pytest
import torch

from kernels import cpu_ops, dispatch, invariance
from kernels.ops import Ops, Packed

CPU = torch.device("cpu")
BACKENDS = ["torch", "compiled"]


def backend(name: str, dtype: torch.dtype) -> Ops:
    """torch's kernels, or the compiled ones; skips where those aren't built."""
    if name == "torch":
        return dispatch.torch_cpu(invariance.measure_row_rule(dtype))
    if cpu_ops.load() is None:
        pytest.skip(f"{cpu_ops.LIBRARY.name} isn't built: there was no C++ compiler at `make install`")
    return dispatch.select(CPU, dtype)


def packed(ops: Ops, w_NK: torch.Tensor) -> torch.Tensor | Packed:
    """The weight as `ops` keeps frozen ones."""
    return ops.pack((w_NK.shape[0], w_NK.shape[1]), w_NK.dtype, lambda first, last: w_NK[first:last])

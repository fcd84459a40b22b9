"""Draws tokens on the GPU that holds the logits (`kernels/cuda/draw.cu`); only the ids leave it."""

import torch
from torch import Tensor


def draw(
    logits_BV: Tensor,
    rows_C: Tensor,
    temperature_C: Tensor,
    top_k_C: Tensor,
    top_p_C: Tensor,
    min_p_C: Tensor,
    u_C: Tensor,
) -> Tensor:
    """`sampling.draw` -> int64 [C] on the device of the logits, contiguous float32; the other tensors lie on the host.

    The same tokens as on the host, where exp is rounded alike. At most 2^20 columns.

    Raises:
        ValueError: a row that the logits don't have.
    """
    if len(rows_C) and not 0 <= int(rows_C.min()) <= int(rows_C.max()) < len(logits_BV):
        raise ValueError(f"rows={rows_C.tolist()} must lie in 0..{len(logits_BV) - 1}, the rows of logits")
    numbers = (rows_C, temperature_C, top_k_C, top_p_C, min_p_C, u_C)
    return torch.ops.onemesh_cuda.draw(logits_BV, *(x.to(logits_BV.device) for x in numbers))

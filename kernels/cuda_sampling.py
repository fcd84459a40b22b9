"""Draws tokens and finds log-probabilities on the GPU that holds the logits (`kernels/cuda/sampling.cu`)."""

from collections.abc import Sequence

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
    _check("rows", rows_C, len(logits_BV), "rows")
    numbers = (rows_C, temperature_C, top_k_C, top_p_C, min_p_C, u_C)
    return torch.ops.onemesh_cuda.draw(logits_BV, *_moved(numbers, logits_BV.device))


def logprobs(logits_BV: Tensor, rows_C: Tensor, ids_C: Tensor, num_top_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sampling.logprobs`, results on the device of the logits, contiguous float32; the other tensors lie on the host.

    At most 2^20 columns.

    Raises:
        ValueError: a row, an id or a number of largest ones that the logits don't have.
    """
    _check("rows", rows_C, len(logits_BV), "rows")
    _check("ids", ids_C, logits_BV.shape[1], "columns")
    _check("num_top", num_top_C, logits_BV.shape[1] + 1, "columns and none")
    most = max(num_top_C.tolist(), default=0)
    numbers = _moved((rows_C, ids_C, num_top_C), logits_BV.device)
    return torch.ops.onemesh_cuda.logprobs(logits_BV, *numbers, most)


def _check(name: str, values_C: Tensor, end: int, what: str) -> None:
    if len(values_C) and not 0 <= int(values_C.min()) <= int(values_C.max()) < end:
        raise ValueError(f"{name}={values_C.tolist()} must lie in 0..{end - 1}, the {what} of logits")


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [x.to(device) for x in tensors]

"""Draws tokens and finds log-probabilities on the GPU that holds the logits (`kernels/cuda/sampling.cu`)."""

from collections.abc import Mapping

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
    numbers = {"rows": rows_C, "temperature": temperature_C, "top_k": top_k_C}
    numbers |= {"top_p": top_p_C, "min_p": min_p_C, "u": u_C}
    return torch.ops.onemesh_cuda.draw(logits_BV, *moved("draw", numbers, logits_BV.device))


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
    numbers = {"rows": rows_C, "ids": ids_C, "num_top": num_top_C}
    return torch.ops.onemesh_cuda.logprobs(logits_BV, *moved("logprobs", numbers, logits_BV.device), most)


def _check(name: str, values_C: Tensor, end: int, what: str) -> None:
    if len(values_C) and not 0 <= int(values_C.min()) <= int(values_C.max()) < end:
        raise ValueError(f"{name}={values_C.tolist()} must lie in 0..{end - 1}, the {what} of logits")


def moved(op: str, numbers: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
    """The same [C] numbers of 8 bytes, on the host, as contiguous ones on the device: rows of one buffer, copied once.

    For a GPU the buffer is pinned, so that the host doesn't wait; torch keeps it until the copy is done. The copy
    stands in the current stream, before the kernel.

    Raises:
        ValueError: a tensor that isn't [C] or has another width.
    """
    count = len(next(iter(numbers.values())))
    for name, x in numbers.items():
        if x.shape != (count,) or x.itemsize != 8:
            shape = tuple(x.shape)
            raise ValueError(f"{op}: {name} is {x.dtype} {shape}, must be int64 or float64 ({count},), one per row")
    packed = torch.empty(len(numbers), count, dtype=torch.int64, pin_memory=device.type == "cuda")
    for row, x in zip(packed, numbers.values(), strict=True):
        row.copy_(x.contiguous().view(torch.int64))
    packed = packed.to(device, non_blocking=True)
    return [row.view(x.dtype) for row, x in zip(packed, numbers.values(), strict=True)]

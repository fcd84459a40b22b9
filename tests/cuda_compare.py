"""How a case is computed by the ops of two backends and compared; used by the checks of `tests.cuda_backend`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from kernels.dispatch import CUDA, REFERENCE
from kernels.ops import Ops
from kernels.reference import working_dtype
from tests.cuda_host import assert_as_plain, draw

Tensors = dict[str, Tensor]
Case = Callable[[Ops, Tensors], Sequence[Tensor]]


def compare(
    case: Case, inputs: Tensors, dtype: torch.dtype, *, grad: bool = False, masters: Collection[str] = ()
) -> None:
    """The case's results by CUDA's ops against those of the reference in the same dtype and in float64.

    inputs: float32; they become `dtype`, masters float32. With `grad` the results are the gradients of a sum of the
    case's results with random weights, in every input.
    """

    def run(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
        work = working_dtype(dtype)
        values = {k: x.to(work if k in masters else dtype, copy=True).requires_grad_(grad) for k, x in inputs.items()}
        if not grad:
            with torch.no_grad():
                return list(case(ops, values))
        results = case(ops, values)
        seeds = [draw(50 + i, x.numel()).view(x.shape).bfloat16().to(x.dtype) for i, x in enumerate(results)]
        return list(torch.autograd.grad(results, list(values.values()), seeds))

    triples = zip(run(CUDA, dtype), run(REFERENCE, dtype), run(REFERENCE, torch.float64), strict=True)
    for got, plain, exact in triples:
        assert_as_plain(got, plain, exact)


def exactly(inputs: Tensors) -> Tensors:
    """The same, in values that all three dtypes hold."""
    return {name: x.half().bfloat16().float() for name, x in inputs.items()}

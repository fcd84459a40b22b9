"""The softmax of a row of logits in CUDA, as the loss and its gradient need it (`kernels/cuda/cross_entropy.cu`)."""

import torch
from torch import Tensor

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `kernels/cuda/kernels.h`


def log_sum_exp(logits_BV: Tensor) -> Tensor:
    """`reference.log_sum_exp`, row-invariant. Not differentiable."""
    return torch.ops.onemesh_cuda.log_sum_exp(logits_BV.contiguous())


def loss_gradient(logits_BV: Tensor, lse_B: Tensor, target_B: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.loss_gradient` of float32 logits, in any of the three dtypes."""
    if dtype not in _CODES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(map(str, _CODES))}")
    return torch.ops.onemesh_cuda.loss_gradient(
        logits_BV.contiguous(), lse_B.contiguous(), target_B.contiguous(), _CODES[dtype]
    )

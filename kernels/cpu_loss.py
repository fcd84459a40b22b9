"""The softmax of a row of logits in C++, as the loss and its gradient need it."""

import torch
from torch import Tensor


def log_sum_exp(logits_BV: Tensor) -> Tensor:
    """`reference.log_sum_exp` of float32 logits."""
    return torch.ops.onemesh.log_sum_exp(logits_BV.contiguous())


def loss_gradient(logits_BV: Tensor, lse_B: Tensor, target_B: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.loss_gradient` of float32 logits, in float32 or bfloat16, in their place: rows V logits apart."""
    logits_BV = logits_BV.contiguous()
    torch.ops.onemesh.loss_gradient(logits_BV, lse_B.contiguous(), target_B.contiguous(), dtype == torch.bfloat16)
    return logits_BV.view(dtype)[:, : logits_BV.shape[1]]

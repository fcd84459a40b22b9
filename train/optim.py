"""AdamW on this rank's blocks, the learning rate over time, and dynamic loss scaling for float16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import OptimConf
from parallel.sharding import Spec


def learning_rate(optim: OptimConf, step: int) -> float:
    """The rate of step `step` (from 1): warm-up to `lr` over warmup_steps, then constant, linear or cosine.

    Step s <= w uses lr * s / w. The decay runs from the end of the warm-up to decay_steps and ends at min_lr.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    assert optim.decay_steps is not None, "decay_steps of an unchecked config"
    length = max(1, optim.decay_steps - optim.warmup_steps)
    done = min(1.0, (step - optim.warmup_steps) / length)
    left = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.min_lr + (optim.lr - optim.min_lr) * left


def adamw(optim: OptimConf, placed: Sequence[tuple[Spec, Tensor]]) -> torch.optim.AdamW:
    """torch's fused AdamW (arXiv:1711.05101) in the parameters' dtype; norms and biases don't decay.

    placed: parameters, or contiguous parts of some with a `grad` of their own, by the placement of the parameter.
    """
    matrices = [p for spec, p in placed if _decays(spec)]
    vectors = [p for spec, p in placed if not _decays(spec)]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, optim.weight_decay), (vectors, 0.0))
        if members
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Tells whoever keeps something made of the weights: torch's fused update doesn't raise their versions."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


def _decays(spec: Spec) -> bool:
    return len(spec.shape) > 1 and not spec.name.endswith("bias")


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (arXiv:1710.03740, sec. 3.2): halved on overflow, doubled after a calm stretch.

    Only float16 needs it; a value with `dynamic=False` stays 1.
    """

    dynamic: bool
    scale: float = 1.0
    calm: int = 0
    """Steps since the last change."""

    GROW_AFTER = 1000

    @staticmethod
    def start(dtype: str) -> LossScale:
        """2^16 for float16, else 1."""
        return LossScale(True, 2.0**16) if dtype == "float16" else LossScale(False)

    def after(self, *, overflow: bool) -> LossScale:
        """The scale of the next step."""
        if not self.dynamic:
            return self
        if overflow:
            return replace(self, scale=max(1.0, self.scale / 2), calm=0)
        if self.calm + 1 >= self.GROW_AFTER:
            return replace(self, scale=self.scale * 2, calm=0)
        return replace(self, calm=self.calm + 1)

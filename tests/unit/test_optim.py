"""Learning rates by their formulas, weight decay's targets, and dynamic loss scaling."""

from __future__ import annotations

import math

import pytest
import torch

from conf.schema import OptimConf
from parallel.sharding import Spec, whole
from train.optim import LossScale, adamw, learning_rate


def test_warm_up_never_uses_zero_and_reaches_the_peak() -> None:
    optim = OptimConf(lr=1.0, warmup_steps=4)
    assert [learning_rate(optim, step) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_end_at_min_lr() -> None:
    linear = OptimConf(lr=1.0, schedule="linear", decay_steps=10, warmup_steps=2, min_lr=0.2)
    assert learning_rate(linear, 2) == 1.0
    assert learning_rate(linear, 6) == pytest.approx(0.6)
    assert [learning_rate(linear, step) for step in (10, 11, 99)] == [0.2, 0.2, 0.2]
    cosine = OptimConf(lr=1.0, schedule="cosine", decay_steps=10)
    for step in range(1, 11):
        assert learning_rate(cosine, step) == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 10)))


def test_only_matrices_decay() -> None:
    placed = []
    for name, shape in (("matrix", (3, 4)), ("vector", (4,))):
        placed.append(
            (Spec(name=name, shape=shape, index=whole(shape), owned=None), torch.nn.Parameter(torch.ones(shape)))
        )
    optimizer = adamw(OptimConf(lr=0.1, weight_decay=0.5), placed)
    for _, parameter in placed:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(placed[0][1], torch.full((3, 4), 1 - 0.1 * 0.5))
    assert torch.equal(placed[1][1], torch.ones(4))


def test_loss_scale_halves_on_overflow_and_grows_when_calm() -> None:
    scale = LossScale.start("float16")
    assert scale.scale == 65536
    assert scale.after(overflow=True).scale == 32768
    for _ in range(LossScale.GROW_AFTER - 1):
        scale = scale.after(overflow=False)
    assert scale.scale == 65536
    assert scale.after(overflow=False).scale == 131072
    assert LossScale.start("bfloat16").after(overflow=True).scale == 1

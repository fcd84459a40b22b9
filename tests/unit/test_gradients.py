"""Gradients of microbatches add up in float32, whatever they are computed in."""

from __future__ import annotations

import pytest
import torch

from conf.schema import TuneConf
from kernels import dispatch
from parallel.mesh import Mesh
from tests.models import RandomWeights
from tests.training import layout, perturb, rows_of
from train.model import build_model
from train.step import Trainer


@pytest.mark.parametrize("kind", ["full", "lora", "prefix"])
def test_bfloat16_microbatches_accumulate_in_float32(kind: str) -> None:
    run = layout(dtype="bfloat16", microbatches=14, batch_size=14, tune=TuneConf(kind=kind))
    ops = dispatch.select(torch.device("cpu"), torch.bfloat16)
    trainer = Trainer(run.config, build_model(run.config, RandomWeights(run.architecture), Mesh.single(), ops))
    perturb(trainer.placed)
    batches = trainer._batches(rows_of(1, 14, run.architecture.vocab_size))
    sums = [torch.zeros_like(parameter, dtype=torch.float64) for _, parameter in trainer.placed]
    for batch in batches:
        for total, grad in zip(sums, gradients(trainer, [batch]), strict=True):
            total += grad
    for (spec, _), total, found in zip(trainer.placed, sums, gradients(trainer, batches), strict=True):
        assert found.dtype == torch.float32
        assert (found - total).norm() <= 1e-6 * total.norm(), spec.name  # adding in bfloat16 is 1e-3 off


def gradients(trainer: Trainer, batches: list) -> list[torch.Tensor]:
    trainer.gradients.zero(len(batches))
    trainer._backward(1, batches, 1.0)
    return [parameter.grad.clone() for _, parameter in trainer.placed if parameter.grad is not None]

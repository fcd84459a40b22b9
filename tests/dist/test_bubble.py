"""The predicted bubble of every schedule is the measured one, on four ranks whose passes take a set time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.master import Master
from parallel.comm import Launch
from parallel.mesh import Mesh
from parallel.pipeline import run as runner
from parallel.pipeline.run import Border
from parallel.pipeline.schedules import make
from parallel.pipeline.timeline import Costs, bubble, idle_share
from parallel.pipeline.trace import Writer, read
from tests.ranks import on_ranks

COSTS = Costs(forward=0.05, input=0.05, weight=0.05)
"""Seconds of a chunk's passes: the runner takes about 0.2 ms between two of them."""
RANKS, MICROBATCHES = 4, 8


class _Sleeper(torch.autograd.Function):
    """Hands x on; every part of its passes takes the seconds of `COSTS`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Master) -> Tensor:
        time.sleep(COSTS.of("F", 0))
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        time.sleep(COSTS.of("I", 0))
        return grads[0], ctx.weight.gradient(_sleep_and_multiply, grads[0], ctx.saved_tensors[0])


def _sleep_and_multiply(grad_TN: Tensor, x_TK: Tensor) -> Tensor:
    time.sleep(COSTS.of("W", 0))
    return grad_TN.T @ x_TK


def _run(launch: Launch, schedule: str, folder: Path) -> None:
    pipeline = Mesh.build(launch, pipeline=RANKS).pipeline
    plan = make(schedule, RANKS, MICROBATCHES)
    weights = [Master(torch.zeros(4, 4)) for _ in range(plan.chunks)]
    last = RANKS * plan.chunks - 1

    def forward(chunk: int, m: int, hidden: Tensor | None) -> Tensor:
        x = _Sleeper.apply(torch.zeros(3, 4) if hidden is None else hidden, weights[chunk])
        place = chunk * RANKS + launch.rank if plan.placement == "loop" else (launch.rank, last - launch.rank)[chunk]
        return x.sum() if place == last else x

    border = Border([(3, 4)] * MICROBATCHES, torch.float32, torch.device("cpu"))
    writer = Writer(folder, launch.rank)
    runner.run(plan, pipeline, forward, border=border, weights=[[weight] for weight in weights], note=writer.note)
    writer.step(1, plan)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
def test_the_predicted_bubble_is_the_measured_one(schedule: str, tmp_path: Path) -> None:
    """Within a tenth; the best of three runs, for whatever else the machine does only adds to what is measured."""
    predicted = bubble(make(schedule, RANKS, MICROBATCHES), COSTS)
    found = []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        on_ranks(RANKS, _run, schedule, folder)
        trace = read(folder)
        found.append(idle_share(trace.rows))
        if found[-1] <= 1.1 * predicted:
            break
    assert min(found) == pytest.approx(predicted, rel=0.1), (predicted, found)

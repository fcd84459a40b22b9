"""Axes, schedules and ways to keep less, several at once: still what one process computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.schema import OptimConf
from tests.dist.test_training_parity import TUNES, alone, assert_same
from tests.training import layout, train

ZERO = OptimConf(kind="zero1", lr=1e-3, schedule="cosine", decay_steps=10)

LAYOUTS = {
    "ring2_sequence2": (layout(context=2, tensor=2, sequence=True), "full"),
    "gather2_sequence2_selective": (
        layout(context=2, context_method="all_gather", tensor=2, sequence=True, recompute="selective", optim=ZERO),
        "projected",
    ),
    "ulysses2_zbv2": (
        layout(context=2, context_method="ulysses", pipeline=2, schedule="zbv", virtual_stages=2, microbatches=3),
        "full",
    ),
    "ring2_interleaved2": (
        layout(context=2, pipeline=2, schedule="interleaved", virtual_stages=2, microbatches=3), "prefix",
    ),
    "sequence2_zero_bubble2": (
        layout(tensor=2, sequence=True, pipeline=2, schedule="zero_bubble", microbatches=3, recompute="full"), "full",
    ),
    "sequence2_zbv2": (
        layout(tensor=2, sequence=True, pipeline=2, schedule="zbv", virtual_stages=2, microbatches=3), "lora",
    ),
    "data2_interleaved2_zero1": (
        layout(data=2, pipeline=2, schedule="interleaved", virtual_stages=2, microbatches=2, optim=ZERO), "full",
    ),
    "sequence2_ring2_zero_bubble2": (
        layout(tensor=2, sequence=True, context=2, pipeline=2, schedule="zero_bubble", microbatches=2), "full",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient_are_those_of_one_process(name: str) -> None:
    run, tune = LAYOUTS[name]
    assert_same(train(replace(run, tune=TUNES[tune])), alone(tune, 1), 1e-10)

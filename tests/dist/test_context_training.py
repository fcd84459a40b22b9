"""Training under context parallelism is that of one process: loss, every gradient and ten steps, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ConfigError
from parallel.comm import Launch
from tests.dist.test_training_parity import PREFIX, TUNES, _evaluate, alone, assert_same
from tests.models import TINY, RandomWeights
from tests.ranks import on_ranks
from tests.training import Outcome, Run, layout, mesh_of, rows_of, train, train_rank
from kernels import dispatch
from train import batches, step
from train.batches import Microbatch
from train.model import build_model
from train.step import Trainer

LAYOUTS = {
    "ring2": layout(context=2),
    "ring3": layout(context=3, microbatches=2),
    "gather2": layout(context=2, context_method="all_gather"),
    "gather3": layout(context=3, context_method="all_gather", recompute="full"),
    "ulysses2": layout(context=2, context_method="ulysses"),
    "ulysses3": layout(context=3, context_method="ulysses", packing=False),
}
MIXED = {
    "ulysses2 x ring2": (layout(context=4, context_method="ulysses", ulysses=2), "prefix"),
    "tensor2 x ring2": (layout(tensor=2, context=2), "lora"),
    "tensor2 x ulysses2": (layout(tensor=2, context=2, context_method="ulysses"), "projected"),
    "pipeline2 x ring2": (layout(pipeline=2, context=2, microbatches=3, recompute="full"), "full"),
    "pipeline2 x gather2": (layout(pipeline=2, context=2, context_method="all_gather", microbatches=3), "prefix"),
    "data2 x gather2": (layout(data=2, context=2, context_method="all_gather"), "projected"),
    "data2 x ring2 x tensor2": (layout(data=2, context=2, tensor=2, microbatches=5), "prefix"),
}
WINDOWED = replace(TINY, sliding_window=6, window_layers=(True, False, True, True, False))


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient_are_those_of_one_process(name: str, tune: str) -> None:
    assert_same(train(replace(LAYOUTS[name], tune=TUNES[tune])), alone(tune, 1), 1e-10)


@pytest.mark.parametrize("name", MIXED)
def test_beside_other_axes(name: str) -> None:
    run, tune = MIXED[name]
    assert_same(train(replace(run, tune=TUNES[tune])), alone(tune, 1), 1e-10)


@pytest.mark.parametrize(("name", "tune"), [("ring3", "lora"), ("gather2", "full"), ("ulysses2", "full")])
def test_ten_steps_end_where_one_process_ends(name: str, tune: str) -> None:
    assert_same(train(replace(LAYOUTS[name], tune=TUNES[tune], steps=10)), alone(tune, 10), 1e-8)


@pytest.mark.parametrize("name", ["ring3", "gather2", "ulysses2"])
def test_sliding_windows(name: str) -> None:
    expected = train(layout(architecture=WINDOWED))
    assert_same(train(replace(LAYOUTS[name], architecture=WINDOWED)), expected, 1e-10)


def test_fewer_tokens_than_ranks() -> None:
    """A row of one token, which has no target, and a short one: some ranks hold nothing at all."""
    run = layout(context=4, batch_size=3, microbatches=3)
    assert_same(train(run), train(layout(batch_size=3)), 1e-10)


def test_low_precision_follows_one_process() -> None:
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2e-3)):
        single = train(layout(dtype=dtype, steps=2))
        for name in ("ring2", "gather2", "ulysses2"):
            assert train(replace(LAYOUTS[name], dtype=dtype, steps=2)).losses == pytest.approx(
                single.losses, rel=tolerance
            )


def test_validation_loss_is_that_of_one_process() -> None:
    expected = _evaluate(Launch(), Run(tune=PREFIX))
    for name in ("ring2", "ulysses3"):
        run = replace(LAYOUTS[name], tune=PREFIX)
        assert on_ranks(run.ranks, _evaluate, run) == [pytest.approx(expected, rel=1e-10)] * run.ranks


def results(launch: Launch, run: Run) -> Any:
    """What a step reports."""
    config = run.config
    ops = dispatch.select(torch.device("cpu"), torch.float64)
    trainer = Trainer(config, build_model(config, RandomWeights(run.architecture), mesh_of(launch, run), ops))
    return trainer.step(1, rows_of(1, run.batch_size, run.architecture.vocab_size))


def test_tokens_are_counted_once_and_the_balance_is_told() -> None:
    single = results(Launch(), layout())
    assert single.context_balance is None
    for result in on_ranks(4, results, layout(data=2, context=2)):
        assert result.tokens == single.tokens
        assert 1 <= result.context_balance < 1.1


def with_other_rows(launch: Launch, run: Run) -> Any:
    """The last rank has rows of another file."""
    config = run.config
    ops = dispatch.select(torch.device("cpu"), torch.float64)
    trainer = Trainer(config, build_model(config, RandomWeights(run.architecture), mesh_of(launch, run), ops))
    rows = rows_of(1, run.batch_size, run.architecture.vocab_size)
    if launch.rank == run.ranks - 1:
        rows[-1] = replace(rows[-1], ids=rows[-1].ids[:-1], targets=rows[-1].targets[:-1])
    with pytest.raises(ConfigError) as caught:
        trainer.step(1, rows)
    return str(caught.value)


@pytest.mark.parametrize("run", [layout(context=3), layout(data=2, context=2, microbatches=2), layout(tensor=2)])
def test_ranks_whose_data_disagree_are_told_before_the_step(run: Run) -> None:
    messages = on_ranks(run.ranks, with_other_rows, run)
    assert len(set(messages)) == 1
    place, last = run.data - 1, run.ranks - 1
    others = [rank for rank in range(run.ranks) if rank * run.data // run.ranks == place][:-1]
    have = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
    assert f"(data rank {place}: {have} microbatches of " in messages[0]
    assert f", but rank {last} has microbatches of " in messages[0]
    assert "give every host the same data.path" in messages[0]


def shifted(launch: Launch, run: Run) -> Any:
    """One rank's positions are one further than they are."""
    share = step.share

    def planted(batch: Microbatch, *rest: Any) -> Microbatch:
        right = share(batch, *rest)
        return replace(right, positions_T=right.positions_T + launch.rank)

    step.share = planted
    return train_rank(launch, run)


def without_last_target(launch: Launch, run: Run) -> Any:
    """Each rank forgets a target."""
    share = step.share

    def planted(batch: Microbatch, *rest: Any) -> Microbatch:
        right = share(batch, *rest)
        return replace(right, target_rows=right.target_rows[:-1], target_ids=right.target_ids[:-1])

    step.share = planted
    return train_rank(launch, run)


@pytest.mark.parametrize("planted", [shifted, without_last_target])
def test_planted_bugs_are_seen(planted: Any) -> None:
    with pytest.raises(AssertionError, match="differ by|<="):
        assert_same(train(LAYOUTS["ring2"], planted), alone("full", 1), 1e-10)

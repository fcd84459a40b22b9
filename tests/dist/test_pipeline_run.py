"""The runner executes any plan that `verify` accepts, with the bits of GPipe; a wrong plan is seen."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.master import Master
from parallel.comm import Launch
from parallel.mesh import Mesh
from parallel.pipeline import run as runner
from parallel.pipeline.plan import Action, Placement, Plan
from parallel.pipeline.run import Border
from parallel.pipeline.verify import verify
from tests.dist.test_training_parity import TUNES, alone, assert_equal, assert_same
from tests.random_plans import random_plan
from tests.ranks import on_ranks
from tests.training import Outcome, Run, layout, train, train_rank


def planned(plan: Plan, **fields: object) -> Run:
    """Three steps in float32 by this plan."""
    verify(plan)
    schedule = "zbv" if plan.placement == "vee" else "interleaved"
    return layout(
        pipeline=plan.stages, virtual_stages=plan.chunks, microbatches=plan.microbatches, schedule=schedule, plan=plan,
        steps=3, dtype="float32", **fields,
    )  # fmt: skip


def drawn(seed: int, stages: int, chunks: int, microbatches: int, placement: Placement = "loop") -> Run:
    return planned(random_plan(seed, stages, chunks, microbatches, placement))


def gpipe(run: Run) -> Outcome:
    """The same on as many ranks without virtual stages."""
    return train(replace(run, virtual_stages=1, schedule="gpipe", plan=None, stages=None))


@pytest.mark.parametrize(
    ("seed", "stages", "chunks", "placement", "tune", "recompute"),
    [
        (1, 2, 2, "loop", "full", "none"),
        (2, 2, 2, "vee", "full", "full"),
        (3, 2, 2, "vee", "prefix", "none"),
        (4, 3, 1, "loop", "lora", "none"),
    ],
)
def test_any_plan_has_the_bits_of_gpipe(
    seed: int, stages: int, chunks: int, placement: Placement, tune: str, recompute: str
) -> None:
    run = replace(drawn(seed, stages, chunks, 4, placement), tune=TUNES[tune], recompute=recompute)
    assert_equal(train(run), gpipe(run))


@pytest.mark.parametrize("tune", TUNES)
def test_chunks_on_one_rank_hand_over_without_messages(tune: str) -> None:
    run = replace(drawn(5, 1, 3, 2), dtype="float64", tune=TUNES[tune], steps=1)
    assert_same(train(run), alone(tune, 1), 1e-10)


def test_weight_gradients_in_another_order_are_seen() -> None:
    """What `verify` refuses changes bits: the tests above would find a schedule that did it."""
    right = (Action("F", 0), Action("F", 1), Action("F", 2), Action("I", 0), Action("I", 1), Action("I", 2))
    plan = Plan(1, 1, 3, ((*right, Action("W", 0), Action("W", 1), Action("W", 2)),))
    run = planned(plan)
    wrong = replace(plan, actions=((*right, Action("W", 2), Action("W", 1), Action("W", 0)),))
    expected = train(run)
    with pytest.raises(AssertionError, match=r"gradients of model|assert \("):
        assert_equal(train(replace(run, plan=wrong)), expected)


def test_an_input_gradient_leaves_the_weights_alone() -> None:
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    w, x = Master(torch.randn(6, 5)), torch.randn(4, 5)
    seen: list[tuple[str, Tensor | None]] = []
    plan = Plan(1, 1, 1, ((Action("F", 0), Action("I", 0), Action("W", 0)),))

    def note(action: Action, start: float, end: float) -> None:
        assert start <= end
        seen.append((action.kind, None if w.grad is None else w.grad.clone()))

    border = Border([(4, 5)], torch.float32, torch.device("cpu"))
    runner.run(
        plan, Mesh().pipeline, lambda *_: ops.linear(x, w).square().sum(), border=border, weights=[[w]], note=note
    )
    assert [kind for kind, _ in seen] == ["F", "I", "W"]
    assert [grad is None for _, grad in seen] == [True, True, False]
    assert w.left == 0
    again = w.detach().clone().requires_grad_()
    ops.linear(x, again).square().sum().backward()
    assert seen[-1][1] is not None
    assert again.grad is not None
    assert torch.equal(seen[-1][1], again.grad)


class _InTurn(runner._Mail):
    """As where messages of a rank wait for each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_turn = True


def _over_gloo(launch: Launch, run: Run, in_turn: bool) -> tuple[list[float], list[float]]:
    os.environ["ONEMESH_TRANSPORT"] = "gloo"
    if in_turn:
        runner._Mail = _InTurn  # in this process alone
    return train_rank(launch, run)[:2]


@pytest.mark.parametrize("in_turn", [False, True])
def test_messages_over_the_network(in_turn: bool) -> None:
    """There receives are under way before they are needed, or together with a send; and a send's buffer must last."""
    run = drawn(2, 2, 2, 4, "vee")
    expected = train(run)
    assert on_ranks(2, _over_gloo, run, in_turn) == [(expected.losses, expected.norms)] * 2

"""The schedules: the published orders, their bubbles and peaks in closed form, and that all of them run."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import ConfigError
from parallel.pipeline.plan import Action, Plan, PlanError
from parallel.pipeline.schedules import gpipe, interleaved, make, one_f_one_b, zbv, zero_bubble
from parallel.pipeline.timeline import Costs, bubble, in_flight_peak, timeline
from parallel.pipeline.verify import held_peak, verify
from tests.plans import made_plans, plan, row, runs

stages = st.integers(1, 8)
microbatches = st.integers(1, 20)
times = st.floats(0.1, 10.0)


def test_one_f_one_b_is_the_published_schedule() -> None:
    assert one_f_one_b(3, 4) == plan(
        ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"], 4
    )


def test_gpipe_runs_all_forwards_first() -> None:
    assert gpipe(2, 3) == plan(["F0 F1 F2 B0 B1 B2"] * 2, 3)


def test_interleaved_is_the_published_schedule() -> None:
    assert interleaved(2, 4, 2) == plan(
        [
            "F0 F1 F0/1 F1/1 F2 B0/1 F3 B1/1 F2/1 B0 F3/1 B1 B2/1 B3/1 B2 B3",
            "F0 F1 F0/1 B0/1 F1/1 B1/1 F2 B0 F3 B1 F2/1 B2/1 F3/1 B3/1 B2 B3",
        ],
        4,
        chunks=2,
    )
    # arXiv:2104.04473 fig. 4, 4 devices and 8 microbatches, counted from 0.
    first, last = interleaved(4, 8, 2).actions[0], interleaved(4, 8, 2).actions[3]
    assert first[:16] == row("F0 F1 F2 F3 F0/1 F1/1 F2/1 F3/1 F4 F5 F6 B0/1 F7 B1/1 F4/1 B2/1")
    assert last[:14] == row("F0 F1 F2 F3 F0/1 B0/1 F1/1 B1/1 F2/1 B2/1 F3/1 B3/1 F4 B0")


def test_interleaved_makes_groups_larger_where_stages_dont_divide_the_microbatches() -> None:
    assert interleaved(2, 3, 2) == plan(
        ["F0 F1 F2 F0/1 F1/1 F2/1 B0/1 B1/1 B2/1 B0 B1 B2", "F0 F1 F2 F0/1 B0/1 F1/1 B1/1 F2/1 B2/1 B0 B1 B2"],
        3,
        chunks=2,
    )


def test_zero_bubble_is_the_published_schedule() -> None:
    assert zero_bubble(2, 3) == plan(["F0 F1 I0 W0 F2 I1 W1 I2 W2", "F0 I0 F1 I1 W0 F2 I2 W1 W2"], 3)
    # arXiv:2401.10241 fig. 2, 4 devices and 8 microbatches, counted from 0.
    first, last = zero_bubble(4, 8).actions[0], zero_bubble(4, 8).actions[3]
    assert first[:12] == row("F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2")
    assert last == row("F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7")


def test_zbv_is_the_published_schedule() -> None:
    assert zbv(2, 3) == plan(
        [
            "F0 F1 F2 F0/1 I0/1 W0/1 F1/1 I1/1 W1/1 I0 W0 F2/1 I2/1 W2/1 I1 W1 I2 W2",
            "F0 F0/1 F1 F1/1 I0/1 W0/1 F2 I0 W0 F2/1 I1/1 W1/1 I1 I2/1 I2 W1 W2/1 W2",
        ],
        3,
        chunks=2,
        placement="vee",
    )


def test_fewer_microbatches_than_stages() -> None:
    assert one_f_one_b(4, 2) == plan(["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"], 2)
    assert zero_bubble(3, 1) == plan(["F0 I0 W0"] * 3, 1)
    assert zbv(2, 1) == plan(["F0 F0/1 I0/1 W0/1 I0 W0"] * 2, 1, chunks=2, placement="vee")
    assert interleaved(3, 1, 2) == plan(["F0 F0/1 B0/1 B0"] * 3, 1, chunks=2)


def refusal(plan: Plan) -> str:
    """What `verify` says against a plan; nothing if it accepts it."""
    try:
        verify(plan)
    except PlanError as error:
        return str(error)
    return ""


@settings(max_examples=200, deadline=None)
@given(made_plans(), st.randoms(use_true_random=False))
def test_every_schedule_verifies_runs_and_adds_gradients_in_one_order(made: tuple[str, Plan], random: Random) -> None:
    _, plan = made
    verify(plan)
    assert runs(plan, random)
    for actions in plan.actions:
        for kinds in ("F", "BI", "BW"):
            for chunk in range(plan.chunks):
                order = [a.microbatch for a in actions if a.kind in kinds and a.chunk == chunk]
                assert order == list(range(plan.microbatches))


@settings(deadline=None)
@given(made_plans(), times, times, times, st.floats(0.0, 2.0))
def test_timeline_respects_every_dependency(
    made: tuple[str, Plan], forward: float, of_input: float, of_weights: float, message: float
) -> None:
    _, plan = made
    rows = timeline(plan, Costs(forward, of_input, of_weights, message))
    at = {(r, span.action): span for r, spans in enumerate(rows) for span in spans}
    for r, spans in enumerate(rows):
        assert all(before.end <= after.start for before, after in pairwise(spans))
        for span in spans:
            action, source = span.action, plan.source(r, span.action)
            if source is not None:
                assert at[source].end + (message if source[0] != r else 0.0) <= span.start
            if action.kind != "F":
                own = Action("I" if action.kind == "W" else "F", action.microbatch, action.chunk)
                assert at[r, own].end <= span.start


@settings(deadline=None)
@given(made_plans())
def test_in_flight_peaks(made: tuple[str, Plan]) -> None:
    name, plan = made
    p, m, v = plan.stages, plan.microbatches, plan.chunks
    peaks = in_flight_peak(plan)
    if name == "gpipe":
        assert peaks == (m,) * p
    elif name == "1f1b":
        assert peaks == tuple(min(m, p - r) for r in range(p))
    elif name == "zero_bubble":
        assert peaks == (min(m, p),) * p
        assert in_flight_peak(plan, until="input") == tuple(min(m, p - r) for r in range(p))
    elif name == "zbv":
        assert max(peaks) == min(2 * m, 2 * p)
    else:
        group = -(-m // max(1, m // p))
        assert peaks == tuple(min(v * m, (v - 1) * group + 2 * (p - 1 - r) + 1) for r in range(p))


@settings(deadline=None)
@given(made_plans())
def test_messages_wait_for_each_other_only_between_neighbours_in_two_places(made: tuple[str, Plan]) -> None:
    name, plan = made
    most = 1 if name == "zbv" or (name == "interleaved" and plan.stages == 2) else 0
    assert max(held_peak(plan)) <= most


@settings(deadline=None)
@given(st.sampled_from(["gpipe", "1f1b"]), stages, microbatches, times, times)
def test_bubble_of_gpipe_and_1f1b(schedule: str, p: int, m: int, forward: float, backward: float) -> None:
    """arXiv:2104.04473 sec. 2.1: (p - 1) / (m + p - 1) of the whole, whatever the times."""
    costs = Costs(forward, input=backward / 3, weight=backward * 2 / 3)
    assert bubble(make(schedule, p, m), costs) == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@settings(deadline=None)
@given(stages, st.integers(0, 14), st.integers(2, 4), times, times)
def test_bubble_of_interleaved(p: int, more: int, v: int, forward: float, backward: float) -> None:
    """arXiv:2104.04473 sec. 2.2: 1/v of 1F1B's idle time; here for every m >= p."""
    m = p + more
    costs = Costs(forward, input=backward / 2, weight=backward / 2)
    assert bubble(interleaved(p, m, v), costs) == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)


@settings(deadline=None)
@given(stages, st.integers(0, 12), times, times, st.floats(0.0, 1.0))
def test_bubble_of_zero_bubble(p: int, more: int, forward: float, of_input: float, share: float) -> None:
    """arXiv:2401.10241 table 1: (p - 1) (F + I - W) idle, where W isn't longer than F or I."""
    m, of_weights = p + more, share * min(forward, of_input)
    idle = (p - 1) * (forward + of_input - of_weights)
    expected = idle / (m * (forward + of_input + of_weights) + idle)
    assert bubble(zero_bubble(p, m), Costs(forward, of_input, of_weights)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(stages, st.integers(0, 12))
def test_bubble_of_zbv(p: int, more: int) -> None:
    """At equal times a rank waits for its first forward and never again; p - 1 chunks' forwards on the last one."""
    m = 2 * p - 1 + more
    assert bubble(zbv(p, m)) == pytest.approx((p - 1) / (6 * m + p - 1), abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(made_plans(5, 6), st.data(), st.randoms(use_true_random=False))
def test_mutated_plans_are_refused_or_run(made: tuple[str, Plan], data: st.DataObject, random: Random) -> None:
    """Two actions swapped anywhere, one dropped, one moved, doubled, or of another kind, microbatch or chunk."""
    _, plan = made
    rank = data.draw(st.integers(0, plan.stages - 1))
    actions = list(plan.actions[rank])
    i, j = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    change = data.draw(st.sampled_from(["swap", "drop", "move", "double", "kind", "microbatch", "chunk"]))
    if change == "swap":
        actions[i], actions[j] = actions[j], actions[i]
    elif change == "drop":
        del actions[i]
    elif change == "move":
        actions.insert(j, actions.pop(i))
    elif change == "double":
        actions.insert(j, actions[i])
    elif change == "kind":
        actions[i] = replace(actions[i], kind=data.draw(st.sampled_from("FBIW")))
    else:
        actions[i] = replace(actions[i], **{change: data.draw(st.integers(-1, 7))})
    mutated = replace(plan, actions=(*plan.actions[:rank], tuple(actions), *plan.actions[rank + 1 :]))
    problem = refusal(mutated)
    if not problem:
        assert runs(mutated, random)
        assert change in ("swap", "move") or mutated == plan
    elif "deadlock" in problem:
        assert not runs(mutated, random)
    else:
        assert f"rank {rank} " in problem


@pytest.mark.parametrize(
    ("schedule", "counts", "message"),
    [
        ("zigzag", (2, 2), "schedule=zigzag is not known; use one of gpipe, 1f1b, interleaved, zero_bubble, zbv"),
        ("gpipe", (0, 2), "stages=0 is less than 1; use stages>=1"),
        ("1f1b", (2, 0), "microbatches=0 is less than 1; use microbatches>=1"),
        ("interleaved", (2, 2, 0), "chunks=0 is less than 1; use chunks>=1"),
        ("interleaved", (2, 2, 1), "chunks=1 is less than schedule=interleaved has; use chunks>=2 or schedule=1f1b"),
        ("1f1b", (2, 2, 2), "chunks=2 is more than schedule=1f1b has; use chunks=1 or schedule=interleaved"),
        ("zbv", (2, 2, 3), "chunks=3 is more than schedule=zbv has; use chunks=2 or schedule=interleaved"),
    ],
)
def test_make_refuses(schedule: str, counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(schedule, *counts)
    assert str(error.value) == message

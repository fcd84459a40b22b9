"""Pipeline plans: the textbook schedules, their proven properties, and what `verify` refuses."""

from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import ConfigError
from parallel.pipeline.plan import Action, Kind, Placement, Plan, PlanError
from parallel.pipeline.schedules import SCHEDULES, gpipe, make, one_f_one_b
from parallel.pipeline.timeline import Costs, bubble, in_flight_peak, timeline
from parallel.pipeline.verify import verify

schedules = st.sampled_from(sorted(SCHEDULES))
stages = st.integers(1, 9)
microbatches = st.integers(1, 24)


def row(text: str) -> tuple[Action, ...]:
    """Actions from their short form: "F0 B0", "F0/1" for chunk 1."""
    actions: list[Action] = []
    for word in text.split():
        number, _, chunk = word[1:].partition("/")
        actions.append(Action(cast(Kind, word[0]), int(number), int(chunk or 0)))
    return tuple(actions)


def plan(rows: list[str], microbatches: int, chunks: int = 1, placement: Placement = "loop") -> Plan:
    return Plan(len(rows), chunks, microbatches, tuple(row(text) for text in rows), placement)


def test_one_f_one_b_is_the_published_schedule() -> None:
    assert one_f_one_b(3, 4) == plan(
        ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"], 4
    )


def test_gpipe_runs_all_forwards_first() -> None:
    assert gpipe(2, 3) == plan(["F0 F1 F2 B0 B1 B2"] * 2, 3)


def test_fewer_microbatches_than_stages() -> None:
    assert one_f_one_b(4, 2) == plan(["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"], 2)


@given(schedules, stages, microbatches)
def test_every_schedule_verifies_and_adds_gradients_in_one_order(schedule: str, p: int, m: int) -> None:
    made = make(schedule, p, m)
    verify(made)
    for actions in made.actions:
        assert [a.microbatch for a in actions if a.kind == "B"] == list(range(m))
        assert [a.microbatch for a in actions if a.kind == "F"] == list(range(m))


@given(stages, microbatches)
def test_in_flight_peaks(p: int, m: int) -> None:
    assert in_flight_peak(gpipe(p, m)) == (m,) * p
    assert in_flight_peak(one_f_one_b(p, m)) == tuple(min(m, p - r) for r in range(p))


@given(schedules, stages, microbatches, st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_bubble_has_the_closed_form(schedule: str, p: int, m: int, forward: float, backward: float) -> None:
    costs = Costs(forward, input=backward / 2, weight=backward / 2)
    assert bubble(make(schedule, p, m), costs) == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@given(schedules, stages, microbatches)
def test_timeline_respects_every_dependency(schedule: str, p: int, m: int) -> None:
    rows = timeline(make(schedule, p, m))
    at = {(r, span.action): span for r, spans in enumerate(rows) for span in spans}
    for r, spans in enumerate(rows):
        assert all(before.end <= after.start for before, after in pairwise(spans))
        for i in range(m):
            forward, backward = at[r, Action("F", i)], at[r, Action("B", i)]
            assert forward.end <= backward.start
            if r + 1 < p:
                assert forward.end <= at[r + 1, Action("F", i)].start
                assert at[r + 1, Action("B", i)].end <= backward.start


def test_chunks_wrap_around_from_the_last_rank_to_the_first() -> None:
    interleaved = plan(["F0 F0/1 B0/1 B0"] * 2, 1, chunks=2)
    verify(interleaved)
    assert interleaved.target(1, Action("F", 0)) == (0, Action("F", 0, 1))
    assert interleaved.source(1, Action("B", 0)) == (0, Action("B", 0, 1))
    assert interleaved.target(1, Action("F", 0, 1)) is None
    assert interleaved.source(1, Action("B", 0, 1)) is None
    assert in_flight_peak(interleaved) == (2, 2)
    assert bubble(interleaved) == pytest.approx(0.5)


def test_a_vee_turns_on_the_last_rank_and_split_backwards_pass_gradients_on() -> None:
    vee = plan(["F0 F0/1 I0/1 I0 W0/1 W0", "F0 F0/1 B0/1 I0 W0"], 1, chunks=2, placement="vee")
    verify(vee)
    assert [vee.place(v) for v in range(4)] == [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert vee.target(1, Action("F", 0)) == (1, Action("F", 0, 1))
    assert vee.source(0, Action("F", 0, 1)) == (1, Action("F", 0, 1))
    assert vee.target(0, Action("I", 0, 1)) == (1, Action("B", 0, 1))
    assert vee.source(1, Action("B", 0, 1)) == (0, Action("I", 0, 1))
    assert vee.target(1, Action("B", 0, 1)) == (1, Action("I", 0))
    assert vee.source(0, Action("W", 0)) is None and vee.target(0, Action("W", 0)) is None
    assert in_flight_peak(vee) == (2, 2)
    assert bubble(vee) == pytest.approx(1 - 12 / 22)


@given(st.integers(1, 8), st.integers(1, 4), st.sampled_from(["loop", "vee"]))
def test_place_is_the_inverse_of_virtual_stage(p: int, chunks: int, placement: Placement) -> None:
    chunks = 2 if placement == "vee" else chunks
    made = Plan(p, chunks, 1, (), placement)
    for v in range(p * chunks):
        rank, chunk = made.place(v)
        assert made.virtual_stage(rank, Action("F", 0, chunk)) == v
    assert len({made.place(v) for v in range(p * chunks)}) == p * chunks


@pytest.mark.parametrize(
    ("rows", "m", "message"),
    [
        (["F0 I0"], 1, "rank 0 never runs W0"),
        (["F0 W0"], 1, "rank 0 never runs I0"),
        (["F0 B0 W0"], 1, "rank 0 runs B0 and also W0, a part of it"),
        (["F0 W0 I0"], 1, "rank 0 runs W0 before I0"),
        (["I0 F0 W0"], 1, "rank 0 runs I0 before F0"),
        (["F0 F1 I0 B1 W0"], 2, "rank 0 runs the weight gradients of chunk 0 in the order [1, 0], not 0..m-1"),
        (["F0 F1 I1 I0 W0 W1"], 2, "rank 0 runs the backwards of chunk 0 in the order [1, 0], not 0..m-1"),
        (["F0 F1 B0"], 2, "rank 0 never runs B1"),
        (["F0 F0 B0"], 1, "rank 0 runs F0 2 times"),
        (["F0 B0 F1"], 1, "rank 0 has F1, which a plan of 1 microbatches and 1 chunks does not know"),
        (["B0 F0"], 1, "rank 0 runs B0 before F0"),
        (["F0 F1 B1 B0"], 2, "rank 0 runs the backwards of chunk 0 in the order [1, 0], not 0..m-1"),
        (
            ["F0 F1 B0 B1", "F1 F0 B0 B1"],
            2,
            "message 0 from rank 0 to rank 1 is sent for F0, but rank 1 receives it for F1",
        ),
        # Rank 0 wants a gradient back before it sends the activation that rank 1 needs first.
        (
            ["F0 B0 F1 B1", "F0 F1 B0 B1"],
            2,
            "deadlock: rank 0 waits before B0 for B0 of rank 1; rank 1 waits before F1 for F1 of rank 0",
        ),
    ],
)
def test_verify_refuses(rows: list[str], m: int, message: str) -> None:
    with pytest.raises(PlanError) as error:
        verify(plan(rows, m))
    assert str(error.value) == message


def test_verify_refuses_a_missing_rank() -> None:
    with pytest.raises(PlanError, match="a plan for 2 stages has actions for 1 ranks"):
        verify(Plan(2, 1, 1, (row("F0 B0"),)))


def test_verify_refuses_a_vee_of_three_chunks() -> None:
    with pytest.raises(PlanError, match="a vee has 2 chunks per rank, not 3"):
        verify(plan(["F0 F0/1 F0/2 B0/2 B0/1 B0"], 1, chunks=3, placement="vee"))


@given(schedules, st.integers(2, 5), st.integers(2, 6), st.data())
def test_verify_notices_two_swapped_actions(schedule: str, p: int, m: int, data: st.DataObject) -> None:
    """A swap either breaks a rule and is refused, or leaves a plan that the rules really hold for."""
    made = make(schedule, p, m)
    rank = data.draw(st.integers(0, p - 1))
    i = data.draw(st.integers(0, 2 * m - 2))
    actions = list(made.actions[rank])
    first, second = actions[i], actions[i + 1]
    actions[i], actions[i + 1] = second, first
    swapped = Plan(p, 1, m, (*made.actions[:rank], tuple(actions), *made.actions[rank + 1 :]))
    if first.kind == second.kind or first.microbatch == second.microbatch:
        with pytest.raises(PlanError):
            verify(swapped)
    else:
        try:
            timeline(swapped)
        except PlanError:
            with pytest.raises(PlanError, match="deadlock"):
                verify(swapped)
        else:
            verify(swapped)


@pytest.mark.parametrize(
    ("schedule", "p", "m", "message"),
    [
        ("zigzag", 2, 2, "schedule=zigzag is not known; use one of gpipe, 1f1b"),
        ("gpipe", 0, 2, "stages=0 is less than 1; use stages>=1"),
        ("1f1b", 2, 0, "microbatches=0 is less than 1; use microbatches>=1"),
    ],
)
def test_make_refuses(schedule: str, p: int, m: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(schedule, p, m)

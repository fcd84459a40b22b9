"""Pipeline plans: who holds what, what waits for what, when it runs, and what `verify` refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.plan import Action, Placement, Plan, PlanError
from parallel.pipeline.timeline import Costs, bubble, in_flight, in_flight_peak, timeline
from parallel.pipeline.verify import held_peak, verify
from tests.plans import plan, row


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


@settings(deadline=None)
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


def test_a_message_may_be_used_after_the_next_one() -> None:
    overtaken = plan(["F0 F1 B0 B1", "F1 F0 B0 B1"], 2)
    verify(overtaken)
    assert overtaken.arrivals(1) == {0: row("F0 F1")}
    assert overtaken.arrivals(0) == {1: row("B0 B1")}
    assert held_peak(overtaken) == (0, 1)


def test_kept_until_the_weights_or_the_inputs_gradient() -> None:
    actions = row("F0 F1 I0 I1 W0 W1")
    assert in_flight(actions) == (1, 2, 2, 2, 1, 0)
    assert in_flight(actions, until="input") == (1, 2, 1, 0, 0, 0)
    assert in_flight(row("F0 F1 B0 B1")) == (1, 2, 1, 0)


def test_costs_are_a_virtual_stages_and_messages_take_time() -> None:
    uneven = plan(["F0 F0/1 B0/1 B0", "F0 F0/1 I0/1 I0 W0/1 W0"], 1, chunks=2)
    costs = Costs(forward=(1.0, 2.0, 3.0, 4.0), input=(5.0, 6.0, 7.0, 8.0), weight=0.5, message=0.25)
    times = [[(str(span.action), span.start, span.end) for span in spans] for spans in timeline(uneven, costs)]
    assert times == [
        [("F0", 0, 1), ("F0/1", 3.5, 6.5), ("B0/1", 19, 26.5), ("B0", 33, 38.5)],
        [
            *[("F0", 1.25, 3.25), ("F0/1", 6.75, 10.75), ("I0/1", 10.75, 18.75), ("I0", 26.75, 32.75)],
            *[("W0/1", 32.75, 33.25), ("W0", 33.25, 33.75)],
        ],
    ]
    assert bubble(uneven, costs) == pytest.approx(1 - (17 + 21) / (2 * 38.5))

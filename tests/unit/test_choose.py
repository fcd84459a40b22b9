"""The choice of a schedule: what is predicted, what fits, and who wins a tie."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import ConfigError
from parallel.pipeline.choose import ADAPTERS, FULL, MARGIN, choose, predictions
from parallel.pipeline.formulas import bubble_formula
from parallel.pipeline.plan import Plan
from parallel.pipeline.timeline import Costs, bubble


def winner(stages: int, microbatches: int, costs: Costs, most_in_flight: float | None = None) -> tuple[str, int]:
    best = choose(stages, microbatches, costs, most_in_flight)
    return best.schedule, best.chunks


def test_what_is_trained_decides() -> None:
    assert winner(4, 16, FULL) == ("zbv", 2)
    assert winner(4, 16, ADAPTERS) == ("interleaved", 4)
    # Within 1F1B's memory: of little use to split the backward of adapters, but the vee halves the bubble.
    assert winner(4, 16, FULL, 4.0) == ("zbv", 2)
    assert winner(4, 16, ADAPTERS, 4.0) == ("zbv", 2)
    assert choose(4, 16, FULL, 4.0, most_chunks=1).schedule == "zero_bubble"
    assert choose(4, 16, ADAPTERS, 4.0, most_chunks=1).schedule == "1f1b"


def test_nearly_equal_times_go_to_the_simpler_schedule() -> None:
    assert winner(1, 8, FULL) == ("1f1b", 1)
    assert winner(2, 200, FULL) == ("1f1b", 1)
    assert winner(4, 4, ADAPTERS) == ("interleaved", 4)
    slow = Costs(1.0, 1.0, 1.0, message=5.0)
    assert winner(4, 16, slow) == ("gpipe", 1)  # whose messages are on their way behind other microbatches


def test_layers_that_split_unevenly() -> None:
    """The head on the last of two ranks weighs as much as its layers: one chunk less is in nobody's way."""

    def costs(plan: Plan) -> Costs:
        last = plan.stages * plan.chunks - 1
        times = tuple(1.0 / plan.chunks + (1.0 if v == last else 0.0) for v in range(last + 1))
        return Costs(times, times, times)

    for prediction in predictions(2, 8, costs):
        assert prediction.bubble == pytest.approx(bubble(prediction.plan, costs(prediction.plan)))
    assert choose(2, 8, costs).time == min(p.time for p in predictions(2, 8, costs))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), *[st.floats(0.0, 3.0)] * 3, st.floats(1.0, 12.0))
def test_the_choice_fits_and_nothing_that_fits_is_much_faster(
    p: int, m: int, forward: float, of_input: float, of_weights: float, bound: float
) -> None:
    costs = Costs(0.1 + forward, of_input, of_weights)
    made = predictions(p, m, costs)
    fitting = [one for one in made if one.in_flight <= bound]
    if not fitting:
        with pytest.raises(ConfigError, match=f"use most_in_flight>={min(one.in_flight for one in made):g} or fewer"):
            choose(p, m, costs, bound)
        return
    best = choose(p, m, costs, bound)
    assert best in fitting and best == choose(p, m, costs, bound)
    assert min(one.time for one in fitting) >= best.time * (1.0 - MARGIN) - 1e-9
    work = m * (0.1 + forward + of_input + of_weights)
    assert best.bubble == pytest.approx(1.0 - work / best.time, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), *[st.floats(0.0, 3.0)] * 3, st.sampled_from([0.0, 0.5]))
def test_closed_forms_are_what_the_timeline_says(
    p: int, m: int, forward: float, of_input: float, of_weights: float, message: float
) -> None:
    for costs in (Costs(0.1 + forward, of_input, of_weights, message), FULL):
        for one in predictions(p, m, costs):
            part = costs.part(one.chunks)
            form = bubble_formula(one.schedule, one.plan, part)
            if form is not None:
                assert form[1] == pytest.approx(one.bubble, abs=1e-9)
            elif one.schedule in ("gpipe", "1f1b"):
                assert message


def test_costs_of_virtual_stages_have_no_parts() -> None:
    with pytest.raises(ValueError, match="have no parts"):
        Costs((1.0, 2.0)).part(2)

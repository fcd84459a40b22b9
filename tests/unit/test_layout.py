"""Layers per virtual stage: as light as any split, found by trying every one."""

from dataclasses import replace
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from conf.layout import balanced, balanced_stages
from parallel.pipeline.plan import Placement, Plan
from tests.conf_cases import SMOLLM2


def ranks(stages: int, chunks: int, placement: Placement) -> list[int]:
    made = Plan(stages, chunks, 1, (), placement)
    return [made.place(v)[0] for v in range(stages * chunks)]


def heaviest(counts: tuple[int, ...], layer: float, extras: list[int], holders: list[int]) -> tuple[float, float]:
    """The weight of the heaviest rank and of the heaviest virtual stage."""
    weights = [layer * count + extra for count, extra in zip(counts, extras, strict=True)]
    totals = [sum(w for w, holder in zip(weights, holders, strict=True) if holder == r) for r in set(holders)]
    return max(totals), max(weights)


@settings(max_examples=200)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
def test_no_split_is_lighter(stages: int, chunks: int, vee: bool, data: st.DataObject) -> None:
    if vee:
        chunks = 2
    if stages * chunks > 6:
        stages = 6 // chunks
    holders = ranks(stages, chunks, "vee" if vee else "loop")
    layers = data.draw(st.integers(len(holders), 12))
    layer = data.draw(st.integers(1, 5))
    extras = [data.draw(st.integers(0, 12)), *[0] * (len(holders) - 2), data.draw(st.integers(0, 12))][-len(holders) :]
    counts = balanced(layers, layer, extras, holders)
    cuts = combinations(range(1, layers), len(holders) - 1)
    splits = (tuple(b - a for a, b in pairwise((0, *cut, layers))) for cut in cuts)
    assert heaviest(counts, layer, extras, holders) == min(heaviest(s, layer, extras, holders) for s in splits)
    assert sum(counts) == layers and min(counts) >= 1


def test_measured_times_split_like_the_same_whole_numbers() -> None:
    holders = ranks(3, 2, "loop")
    for layers in range(6, 40):
        whole = balanced(layers, 3, [0, 0, 0, 0, 0, 7], holders)
        assert balanced(layers, 0.3, [0, 0, 0, 0, 0, 0.7], holders) == whole


def test_virtual_stages_of_a_real_model() -> None:
    assert balanced_stages(SMOLLM2, 2, 2) == (10, 10, 9, 1)  # the head weighs as much as eight layers
    assert balanced_stages(SMOLLM2, 2, 2, "vee") == (10, 10, 9, 1)
    even = replace(SMOLLM2, vocab_size=1)
    assert balanced_stages(even, 4, 2) == (4, 4, 4, 4, 4, 4, 3, 3)
    assert balanced_stages(even, 4, 2, "vee") == (4, 4, 4, 4, 3, 4, 4, 3)
    assert balanced_stages(replace(SMOLLM2, num_layers=6), 3, 2) == (1,) * 6

"""Layers per virtual stage: as light as any split, found by trying every one."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
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


def check(layers: int, layer: int, extras: list[int], holders: list[int]) -> None:
    counts = balanced(layers, layer, extras, holders)
    cuts = combinations(range(1, layers), len(holders) - 1)
    splits = (tuple(b - a for a, b in pairwise((0, *cut, layers))) for cut in cuts)
    assert heaviest(counts, layer, extras, holders) == min(heaviest(s, layer, extras, holders) for s in splits)
    assert sum(counts) == layers and min(counts) >= 1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 5), st.integers(1, 7), st.data())
def test_no_split_is_lighter(stages: int, chunks: int, vee: bool, more: int, layer: int, data: st.DataObject) -> None:
    chunks = 2 if vee else chunks
    holders = ranks(min(stages, 6 // chunks), chunks, "vee" if vee else "loop")
    extras = [data.draw(st.integers(0, 20)) for _ in holders]
    check(len(holders) + more, layer, extras, holders)


@pytest.mark.parametrize(
    ("stages", "layers", "extras"),
    [(4, 13, [4, 0, 0, 0, 0, 0, 0, 3]), (2, 9, [13, 0, 0, 1]), (2, 8, [13, 0, 0, 8])],
)
def test_a_layer_passes_the_lightest_rank_for_a_lighter_stage(stages: int, layers: int, extras: list[int]) -> None:
    """Both ends of a vee are on one rank; always filling the lightest rank would make a stage heavier than it must."""
    check(layers, 7, extras, ranks(stages, 2, "vee"))


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

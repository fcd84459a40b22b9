"""The sharding table: cuts cover every parameter exactly once, are balanced, and LoRA follows from them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.adapters.peft import LoraModule
from parallel.model.hf import parameter_shapes
from parallel.sharding import Spec, cut, lora_specs, partition, place
from tests.models import BIASED, TINY

SIZES = range(1, TINY.num_heads + 1)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_partition_covers_everything_and_is_balanced(units: int, size: int) -> None:
    offsets = partition(units, size)
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    assert offsets[0] == 0
    assert offsets[-1] == units
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_nine_heads_in_three_groups() -> None:
    assert [cut(TINY, 2, r).heads for r in range(2)] == [(0, 5), (5, 9)]
    assert [cut(TINY, 2, r).kv_heads for r in range(2)] == [(0, 2), (1, 3)]
    assert [cut(TINY, 3, r).heads for r in range(3)] == [(0, 3), (3, 6), (6, 9)]
    assert [cut(TINY, 4, r).heads for r in range(4)] == [(0, 3), (3, 5), (5, 7), (7, 9)]
    assert [cut(TINY, 4, r).kv_heads for r in range(4)] == [(0, 1), (1, 2), (1, 3), (2, 3)]
    assert [cut(TINY, 4, r).kv_heads_owned for r in range(4)] == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert cut(TINY, 4, 2).kv_index == (0, 1)
    assert [cut(TINY, size, 0).kv_overlap for size in (1, 2, 3, 4, 9)] == [False, True, False, True, True]


def test_query_heads_are_cut_only_where_no_rank_needs_more_kv_heads() -> None:
    """The cache of the fullest rank is never larger than with whole groups, and no rank has more query heads."""
    for groups, group, size in itertools.product(range(1, 9), range(1, 9), range(1, 9)):
        architecture = replace(TINY, num_heads=groups * group, num_kv_heads=groups)
        if size > groups:
            continue
        cuts = [cut(architecture, size, rank) for rank in range(size)]
        most = -(-groups // size)
        assert max(here.num_kv_heads for here in cuts) == most
        assert max(here.num_heads for here in cuts) <= most * group
        if groups % size == 0:
            assert not cuts[0].kv_overlap
    assert [cut(replace(TINY, num_heads=20, num_kv_heads=5), 3, r).heads for r in range(3)] == [
        (0, 8),
        (8, 16),
        (16, 20),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_every_head_reads_its_own_kv_head(size: int) -> None:
    group = TINY.num_heads // TINY.num_kv_heads
    heads = []
    for rank in range(size):
        here = cut(TINY, size, rank)
        for local, head in enumerate(range(*here.heads)):
            assert here.kv_heads[0] + here.kv_index[local] == head // group
            heads.append(head)
    assert heads == list(range(TINY.num_heads))


@pytest.mark.parametrize("size", SIZES)
def test_owned_blocks_cover_every_parameter_once(size: int) -> None:
    architecture = replace(BIASED, ffn_width=101)
    for name, shape in parameter_shapes(architecture).items():
        assert_owned_once([place(name, shape, architecture, cut(architecture, size, r)) for r in range(size)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("linear", ["q_proj", "k_proj", "o_proj"])
def test_lora_factors_follow_the_weight(size: int, linear: str) -> None:
    module = LoraModule(f"model.layers.0.self_attn.{linear}", 4, 1.0)
    name = f"{module.module}.weight"
    shape = parameter_shapes(TINY)[name]
    specs: list[tuple[Spec, Spec]] = []
    for rank in range(size):
        here = cut(TINY, size, rank)
        weight = place(name, shape, TINY, here)
        a, b = lora_specs(weight, 4, module.name_a, module.name_b, here)
        assert a.local_shape == (4, weight.local_shape[1])
        assert b.local_shape == (weight.local_shape[0], 4)
        if size > 1:
            replicated, cut_one = (b, a) if linear == "o_proj" else (a, b)
            assert replicated.reduce == "tensor"
            assert cut_one.reduce == weight.reduce
        specs.append((a, b))
    for factor in (0, 1):
        assert_owned_once([pair[factor] for pair in specs])


def assert_owned_once(specs: list[Spec]) -> None:
    """The ranks' owned parts cover the tensor without overlap and lie inside what they hold."""
    count = torch.zeros(specs[0].shape, dtype=torch.int64)
    for spec in specs:
        held = torch.zeros(spec.shape, dtype=torch.bool)
        held[spec.index] = True
        if spec.owned is not None:
            assert held[spec.owned].all(), spec
            count[spec.owned] += 1
    assert (count == 1).all(), specs[0].name

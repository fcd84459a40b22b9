"""The order of the rows, their way to ranks and microbatches, and packing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.batches import StepOrder, epoch_order, microbatches, order, pack, packs
from train.data import Row


def row(index: int, ids: list[int], targets: str) -> Row:
    return Row(np.array(ids, np.int32), np.array([t == "x" for t in targets]), index, index + 1)


def test_the_order_never_changes() -> None:
    """Resuming with another version of anything must go on with the same rows: the values are fixed here."""
    assert order(7, 0, 1, 5) == [0, 2, 1, 5, 4]
    assert order(7, 0, 2, 5) == [3, 6, 5, 3, 2]
    assert order(7, 1, 1, 7) == [3, 5, 2, 0, 6, 1, 4]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(-5, 2**40), batch=st.integers(1, 60), steps=st.integers(1, 5))
def test_each_epoch_is_a_permutation(rows: int, seed: int, batch: int, steps: int) -> None:
    steps_in_turn = StepOrder(rows, seed, batch)
    taken = [number for step in range(1, steps + 1) for number in steps_in_turn.rows(step)]
    assert taken == [number for step in range(1, steps + 1) for number in order(rows, seed, step, batch)]
    assert len(taken) == steps * batch
    for start in range(0, len(taken), rows):
        epoch = taken[start : start + rows]
        assert epoch == epoch_order(rows, seed, start // rows).tolist()[: len(epoch)]
        assert max(Counter(epoch).values()) == 1
    assert set(taken) <= set(range(rows))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(0, 30), ranks=st.integers(1, 5), count=st.integers(1, 6))
def test_no_layout_moves_a_row(rows: int, ranks: int, count: int) -> None:
    numbers = list(range(rows))
    parts = [microbatches(numbers, ranks, rank, count) for rank in range(ranks)]
    assert [number for part in parts for batch in part for number in batch] == numbers
    assert all(len(part) == count for part in parts)
    per_rank = [sum(map(len, part)) for part in parts]
    assert sorted(per_rank, reverse=True) == per_rank
    assert max(per_rank) - min(per_rank) <= 1
    assert all(max(map(len, part)) - min(map(len, part)) <= 1 for part in parts)


def test_packing_keeps_documents_apart() -> None:
    packed = pack([row(4, [10, 11, 12], "xxx"), row(2, [20], "x"), row(9, [30, 31, 32, 33], "..x.")])
    assert packed.ids_T.tolist() == [10, 11, 12, 20, 30, 31, 32, 33]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert packed.cu_seqlens_B1.tolist() == [0, 3, 4, 8]
    assert packed.target_rows.tolist() == [0, 1, 5]
    assert packed.target_ids.tolist() == [11, 12, 32]
    assert packed.row_T.tolist() == [4, 4, 4, 2, 9, 9, 9, 9]
    assert (packed.max_seqlen, packed.num_tokens, packed.num_targets) == (4, 8, 3)
    types = (packed.ids_T, packed.positions_T, packed.target_rows, packed.target_ids, packed.row_T)
    assert {tensor.dtype for tensor in types} == {torch.int64}
    assert packed.cu_seqlens_B1.dtype == torch.int32
    assert packed.to(torch.device("cpu")).target_ids.equal(packed.target_ids)


def test_an_empty_microbatch_is_a_pass_without_tokens() -> None:
    for packing in (True, False):
        (empty,) = packs([], packing)
        assert (empty.num_tokens, empty.num_targets, empty.max_seqlen) == (0, 0, 0)
        assert empty.cu_seqlens_B1.tolist() == [0]
        assert empty.ids_T.dtype == empty.target_rows.dtype == torch.int64


def test_packing_off_is_one_pass_a_row_with_the_same_targets() -> None:
    rows = [row(0, [1, 2, 3], ".xx"), row(1, [4, 5], ".x")]
    (together,) = packs(rows, packing=True)
    alone = packs(rows, packing=False)
    assert [part.ids_T.tolist() for part in alone] == [[1, 2, 3], [4, 5]]
    assert [token for part in alone for token in part.target_ids.tolist()] == together.target_ids.tolist()


def test_packing_leaves_the_rows_alone() -> None:
    only = row(0, [1, 2], "xx")
    pack([only])
    assert only.targets.tolist() == [True, True]


@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step: int) -> None:
    with pytest.raises(AssertionError):
        order(3, 0, step, 1)

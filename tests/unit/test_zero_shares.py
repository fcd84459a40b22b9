"""Shares of a bucket: they cover it once, are balanced, and lie on chunks; strips are views in the bucket's order."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.zero import CHUNK, Strip, cut_shares, stretches

LENGTHS = st.lists(st.integers(0, 5 * CHUNK), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 9))
def test_shares_cover_a_bucket_once_and_lie_on_chunks(lengths: list[int], size: int) -> None:
    shares = cut_shares(lengths, size)
    assert (shares[0], shares[-1], len(shares)) == (0, sum(lengths), size + 1)
    assert list(shares) == sorted(shares)
    assert max(b - a for a, b in pairwise(shares)) <= sum(lengths) / size + CHUNK
    covered = [0] * len(lengths)
    for share in pairwise(shares):
        for number, (first, last) in enumerate(stretches(lengths, share)):
            if first < last:
                assert first == covered[number]
                assert first % CHUNK == 0
                covered[number] = last
    assert covered == lengths


def test_a_strip_between_two_places() -> None:
    tensors = [torch.arange(4.0).view(2, 2), torch.zeros(0), torch.arange(4.0, 9.0), torch.tensor([9.0])]
    strip = Strip.of(tensors)
    for first in range(11):
        for last in range(first, 11):
            views = strip.between(first, last)
            assert [x for view in views for x in view.tolist()] == list(range(first, last))
    strip.between(4, 6)[0][0] = 100.0
    assert tensors[2].tolist()[0] == 100.0

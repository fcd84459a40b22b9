"""ZeRO stage 1 (arXiv:1910.02054, sec. 5.1): each replica keeps the optimizer's state for a share of the parameters.

A flat bucket of gradients is cut into as many stretches as there are replicas, uneven ones where that doesn't divide:

    bucket      |  q_proj  | k | v |   o_proj   |norm|      gate_proj      | ...
    share              rank 0        |         rank 1          |      rank 2

    backward    reduce-scatter of the bucket      a rank gets the whole sum of its share
    update      of the share's parameters         the optimizer's state exists for these alone
    afterwards  all-gather of the parameters

A border lies at the start of a parameter or a multiple of `CHUNK` elements from it. Chunks are what the gradient's norm
is added up from, and vector instructions treat the elements of a parameter as they do without shares: so neither norm
nor update differs in a bit from those of one replica that has everything.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Group

CHUNK = 1 << 17
"""Elements: the squares of so many are added at once (their float64 copies stay in the cache), and shares are cut at
multiples of it."""
WINDOW = 1 << 18
"""Elements of each rank that are gathered at a time: a copy of them stays in the cache."""


def cut_shares(lengths: Sequence[int], size: int) -> tuple[int, ...]:
    """Offsets (length size + 1) that cut a bucket of parameters with so many elements into shares as even as can be.

    >>> cut_shares([10, 30, 20], 2)
    (0, 40, 60)
    """
    starts = [0, *accumulate(lengths)]
    edges = [start + at for start, length in zip(starts, lengths, strict=False) for at in range(0, length, CHUNK)]
    edges = sorted({0, *edges, starts[-1]})
    return tuple(_nearest(edges, starts[-1] * rank / size) for rank in range(size + 1))


def _nearest(edges: Sequence[int], place: float) -> int:
    after = min(bisect_left(edges, place), len(edges) - 1)
    before = max(after - 1, 0)
    return edges[after] if edges[after] - place < place - edges[before] else edges[before]


def stretches(lengths: Sequence[int], share: tuple[int, int]) -> list[tuple[int, int]]:
    """[start, stop) of the part of each parameter that lies in a share of their bucket; empty where none does."""
    starts = [0, *accumulate(lengths)]
    parts = [(max(share[0], start) - start, min(share[1], stop) - start) for start, stop in pairwise(starts)]
    return [(first, last) if first < last else (0, 0) for first, last in parts]


@dataclass(frozen=True)
class Strip:
    """Tensors that lie one after another in a bucket's order, wherever their memory is."""

    flats: Sequence[Tensor]
    """Each as one dimension."""

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Strip:
        """Of contiguous tensors; what is written to the strip is written to them."""
        return Strip([tensor.detach().view(-1) for tensor in tensors])

    def between(self, first: int, last: int) -> list[Tensor]:
        """The views that make up elements [first, last)."""
        starts = [0, *accumulate(flat.numel() for flat in self.flats)]
        views: list[Tensor] = []
        number = max(bisect_right(starts, first) - 1, 0)
        while first < last:
            stop = min(last, starts[number + 1])
            views.append(self.flats[number][first - starts[number] : stop - starts[number]])
            first, number = stop, number + 1
        return views


def gather(strip: Strip, shares: Sequence[int], group: Group) -> None:
    """Gives every rank of the group all of the strip, of which rank r has elements shares[r] to shares[r + 1].

    All-gathers the strip once, `WINDOW` elements of each rank at a time.
    """
    if group.size == 1:
        return
    longest = max(stop - start for start, stop in pairwise(shares))
    for at in range(0, longest, WINDOW):
        spans = [(min(start + at, stop), min(start + at + WINDOW, stop)) for start, stop in pairwise(shares)]
        mine = strip.between(*spans[group.rank])
        sizes = [stop - start for start, stop in spans]
        together = comm.all_gather(torch.cat(mine) if mine else strip.flats[0][:0], group, sizes, 0)
        for rank, (span, part) in enumerate(zip(spans, together.split(sizes), strict=True)):
            if rank == group.rank:
                continue
            views = strip.between(*span)
            for view, values in zip(views, part.split([view.numel() for view in views]), strict=True):
                view.copy_(values)

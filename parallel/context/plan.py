"""Context parallelism as data: which tokens of a pack each rank holds and which keys travel. Without torch.

The documents of a pack stand end to end and are cut, anywhere, into 2 * ring pieces of equal *work*: that of the real
documents, in which a token at position p attends to p + 1 keys. Rank r of the ring holds pieces r and 2 * ring - 1 - r:

    documents   aaaaaaaaaaaaaaaaaaaaaabbbcccccccccccc
    pieces      00000000001111112222|33333333344445555      ring=3
    rank        0         1     2    2        1   0

Equal work lets all ranks end together; the pairs even out the tokens too, as a document's late pieces are short (the
zigzag of Llama 3, arXiv:2407.21783 sec. 3.3.2, there with pieces of equal length).

Two pieces have at most one document in common: the one that crosses all borders between them. So what other ranks
need of a piece is its *tail*, the keys of the document that crosses its last border, and what its queries see of
others is their *past*, the keys of the document that crosses its first one. Nothing else travels.

With ulysses > 1 a ring's rank is a group of so many ranks, which share its tokens evenly and exchange them for heads
(arXiv:2309.14509) before they attend.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from conf.schema import Architecture
from parallel.sharding import partition


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of a token that sees n keys: `token + full * n + windowed * min(n, window)`, in query-key pairs."""

    token: int = 0
    full: int = 1
    windowed: int = 0
    window: int = 1

    @staticmethod
    def of(architecture: Architecture) -> Cost:
        """Of all layers of a model, its linears and its head: two multiply-adds a head's dimension make a pair."""
        a = architecture
        layer = a.width * (2 * a.head_dim * (a.num_heads + a.num_kv_heads) + 3 * a.ffn_width)
        weights = a.num_layers * layer + a.vocab_size * a.width
        windowed = 0
        if a.sliding_window is not None:
            windowed = a.num_layers if a.window_layers is None else sum(a.window_layers)
        return Cost(
            token=weights // (2 * a.num_heads * a.head_dim),
            full=a.num_layers - windowed,
            windowed=windowed,
            window=a.sliding_window or 1,
        )

    def upto(self, bounds: Sequence[int]) -> NDArray[np.int64]:
        """[T + 1]: work of the first 0, 1, ... T tokens of a pack with these documents; exact integers."""
        lengths = np.diff(np.asarray(bounds, dtype=np.int64))
        seen = np.arange(1, bounds[-1] + 1, dtype=np.int64) - np.repeat(np.asarray(bounds[:-1], np.int64), lengths)
        work = self.token + self.full * seen + self.windowed * np.minimum(seen, self.window)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(work)])


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a rank's queries over some keys of another piece: of the one document that both have."""

    queries: range
    """Rows among the rank's tokens; the first ones of a piece."""
    keys: range
    """Rows among the keys that the other rank sends."""
    offset: int
    """Query i sees keys j <= i + offset (with a window those with i + offset - j < window)."""
    source: int
    """The piece whose keys these are: parts are merged in its order."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """What one rank of the ring attends to, and which keys it sends, under one window."""

    bounds: tuple[int, ...]
    """[B + 1]: documents within the rank's pieces, among its own tokens."""
    sent: tuple[range, range]
    """Tails of its two pieces, as rows of its tokens; sent one behind the other."""
    sizes: tuple[int, ...]
    """[ring]: keys that each rank sends."""
    parts: tuple[tuple[Part, ...], ...]
    """[ring]: what it attends to of each rank's keys, its own (those of its first piece) among them."""
    reach: tuple[int, ...]
    """[ring]: how many ranks further the keys of each rank travel before nobody needs them any more."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one pack is shared by `ring * ulysses` ranks."""

    bounds: tuple[int, ...]
    """[B + 1]: document b is tokens bounds[b] .. bounds[b + 1] - 1 of the pack."""
    ring: int
    ulysses: int
    cuts: tuple[int, ...]
    """[2 * ring + 1]: piece i is tokens cuts[i] .. cuts[i + 1] - 1."""
    work: tuple[int, ...]
    """[ring]: each rank's, by `Cost`; ulysses ranks halve (third, ...) it among them."""

    @staticmethod
    def make(bounds: Sequence[int], cost: Cost, *, ring: int, ulysses: int = 1) -> Plan:
        """The plan with the borders nearest to equal work; the same on every rank, as all of it is integers."""
        upto = cost.upto(bounds)
        total, count = int(upto[-1]), 2 * ring
        cuts = [0]
        for piece in range(1, count) if ring > 1 else ():
            after = int(np.searchsorted(upto * count, total * piece))
            before = max(after - 1, 0)
            nearer = total * piece - int(upto[before]) * count <= int(upto[after]) * count - total * piece
            cuts.append(before if nearer else after)
        cuts += [bounds[-1]] * (count + 1 - len(cuts))
        pieces = [int(upto[stop] - upto[start]) for start, stop in pairwise(cuts)]
        work = tuple(pieces[rank] + pieces[count - 1 - rank] for rank in range(ring))
        return Plan(bounds=tuple(bounds), ring=ring, ulysses=ulysses, cuts=tuple(cuts), work=work)

    def pieces(self, rank: int) -> tuple[int, int]:
        """The two pieces of a rank of the ring."""
        return rank, 2 * self.ring - 1 - rank

    def num_tokens(self, rank: int) -> int:
        """Tokens of a rank of the ring."""
        return sum(len(self._piece(piece)) for piece in self.pieces(rank))

    def sizes(self, rank: int) -> tuple[int, ...]:
        """[ulysses]: tokens of each rank of the group that is the ring's `rank`."""
        return tuple(stop - start for start, stop in pairwise(partition(self.num_tokens(rank), self.ulysses)))

    def share(self, rank: int, place: int = 0) -> tuple[range, range]:
        """Tokens of the pack that the ulysses rank `place` of the ring's `rank` holds, ascending."""
        start, stop = partition(self.num_tokens(rank), self.ulysses)[place : place + 2]
        first, second = (self._piece(piece) for piece in self.pieces(rank))
        behind = len(first)
        return first[start:stop], second[max(start - behind, 0) : max(stop - behind, 0)]

    def route(self, rank: int, window: int | None) -> Route:
        """What `rank` of the ring does in layers with this sliding window (None: without)."""
        first, second = self.pieces(rank)
        ends = [0]
        for piece in (first, second):
            for length in self._lengths(piece):
                ends.append(ends[-1] + length)
        behind = len(self._piece(first))
        tails = [self._tail(piece, window) for piece in range(2 * self.ring)]
        rows = [
            range(tails[piece].start - self.cuts[piece] + start, tails[piece].stop - self.cuts[piece] + start)
            for piece, start in ((first, 0), (second, behind))
        ]
        parts = [[self._parts(to, of, window, tails) for of in range(self.ring)] for to in range(self.ring)]
        reach = tuple(
            max((step for step in range(self.ring) if parts[(of + step) % self.ring][of]), default=0)
            for of in range(self.ring)
        )
        return Route(
            bounds=tuple(ends),
            sent=(rows[0], rows[1]),
            sizes=tuple(sum(len(tails[piece]) for piece in self.pieces(of)) for of in range(self.ring)),
            parts=tuple(parts[rank]),
            reach=reach,
        )

    def _piece(self, piece: int) -> range:
        return range(self.cuts[piece], self.cuts[piece + 1])

    def _lengths(self, piece: int) -> list[int]:
        """Tokens of each document in a piece that has some there."""
        tokens = self._piece(piece)
        inside = self.bounds[bisect_right(self.bounds, tokens.start) : bisect_right(self.bounds, tokens.stop - 1)]
        borders = [tokens.start, *sorted(set(inside)), tokens.stop]
        return [stop - start for start, stop in pairwise(borders)] if tokens else []

    def _across(self, cut: int) -> range:
        """The document that has tokens on both sides of a cut; empty if there is none."""
        after = bisect_right(self.bounds, cut)
        start = self.bounds[after - 1]
        if start == cut or after == len(self.bounds):
            return range(cut, cut)
        return range(start, self.bounds[after])

    def _past(self, piece: int, window: int | None) -> range:
        """Tokens before a piece that its queries see."""
        cut = self.cuts[piece]
        start = self._across(cut).start if self._piece(piece) else cut
        return range(start if window is None else max(start, cut - window + 1), cut)

    def _tail(self, piece: int, window: int | None) -> range:
        """Tokens of a piece that queries of later pieces see."""
        cut = self.cuts[piece + 1]
        start = max(self._across(cut).start, self.cuts[piece])
        return range(start if window is None else max(start, cut - window + 1), cut)

    def _parts(self, to: int, of: int, window: int | None, tails: Sequence[range]) -> tuple[Part, ...]:
        """Parts of rank `to`'s queries over the keys that rank `of` sends, by the keys' place in the pack."""
        found: list[Part] = []
        start = 0  # of the piece's keys among those sent
        for source in self.pieces(of):
            behind = 0  # of the piece's queries among the rank's
            for piece in self.pieces(to):
                past, tail = self._past(piece, window), tails[source]
                keys = range(max(past.start, tail.start), min(past.stop, tail.stop))
                if piece > source and keys:
                    last = min(self.cuts[piece + 1], self._across(past.stop).stop)
                    if window is not None:
                        last = min(last, keys.stop + window - 1)
                    found.append(
                        Part(
                            queries=range(behind, behind + last - past.stop),
                            keys=range(start + keys.start - tail.start, start + keys.stop - tail.start),
                            offset=past.stop - keys.start,
                            source=source,
                        )
                    )
                behind += len(self._piece(piece))
            start += len(tails[source])
        return tuple(found)


def balance(plans: Sequence[Plan]) -> float:
    """Work of the ranks that have most, pack for pack, over the mean: ranks wait for each other in every layer."""
    total = sum(sum(plan.work) for plan in plans)
    return sum(max(plan.work) * plan.ring for plan in plans) / total if total else 1.0

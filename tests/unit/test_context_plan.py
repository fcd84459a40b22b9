"""Plans of context parallelism: every token on one rank, every visible key where its query is, work even."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.context.plan import Cost, Plan, balance
from tests.models import TINY

LENGTHS = st.lists(st.integers(0, 40), max_size=12)
DEGREES = {"ring": st.integers(1, 5), "ulysses": st.integers(1, 3)}
WINDOWS = st.none() | st.integers(1, 50)


def make(lengths: list[int], cost: Cost, ring: int, ulysses: int = 1) -> Plan:
    return Plan.make([0, *accumulate(lengths)], cost, ring=ring, ulysses=ulysses)


def seen(plan: Plan, window: int | None) -> set[tuple[int, int]]:
    """(query, key) of every pair of the pack, by definition."""
    pairs = set()
    for start, stop in pairwise(plan.bounds):
        for i in range(start, stop):
            pairs |= {(i, j) for j in range(start, i + 1) if window is None or i - j < window}
    return pairs


def computed(plan: Plan, window: int | None) -> list[tuple[int, int]]:
    """(query, key) of every pair that some rank computes, as the ranks' routes say."""
    tokens = [[t for piece in plan.share(rank) for t in piece] for rank in range(plan.ring)]
    routes = [plan.route(rank, window) for rank in range(plan.ring)]
    sent = [[tokens[rank][row] for rows in route.sent for row in rows] for rank, route in enumerate(routes)]
    pairs = []
    for rank, route in enumerate(routes):
        assert route.sizes == tuple(map(len, sent))
        for start, stop in pairwise(route.bounds):
            rows = range(start, stop)
            pairs += [(tokens[rank][i], tokens[rank][j]) for i in rows for j in rows if within(i - j, window)]
        for source, parts in enumerate(route.parts):
            assert not parts or (rank - source) % plan.ring <= route.reach[source]
            for part in parts:
                pairs += [
                    (tokens[rank][query], sent[source][key])
                    for i, query in enumerate(part.queries)
                    for j, key in enumerate(part.keys)
                    if within(i + part.offset - j, window)
                ]
    return pairs


def within(distance: int, window: int | None) -> bool:
    return distance >= 0 and (window is None or distance < window)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, DEGREES["ring"], DEGREES["ulysses"])
def test_every_token_is_on_one_rank_in_order(lengths: list[int], ring: int, ulysses: int) -> None:
    plan = make(lengths, Cost.of(TINY), ring, ulysses)
    held = []
    for rank in range(ring):
        own = [[t for piece in plan.share(rank, place) for t in piece] for place in range(ulysses)]
        together = [t for tokens in own for t in tokens]
        assert together == sorted(together)
        assert tuple(map(len, own)) == plan.sizes(rank)
        held += together
    assert sorted(held) == list(range(sum(lengths)))


@settings(deadline=None, max_examples=150)
@given(LENGTHS, DEGREES["ring"], WINDOWS)
def test_routes_compute_what_documents_see_and_each_pair_once(
    lengths: list[int], ring: int, window: int | None
) -> None:
    plan = make(lengths, Cost(), ring)
    pairs = computed(plan, window)
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == seen(plan, window)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, DEGREES["ring"], st.integers(0, 30), st.integers(0, 3), st.integers(1, 9))
def test_work_is_as_even_as_whole_tokens_allow(
    lengths: list[int], ring: int, token: int, windowed: int, window: int
) -> None:
    cost = Cost(token=token, full=1, windowed=windowed, window=window)
    plan = make(lengths, cost, ring)
    works = [token + p + windowed * min(p, window) for length in lengths for p in range(1, length + 1)]
    for rank in range(ring):
        tokens = [t for piece in plan.share(rank) for t in piece]
        assert plan.work[rank] == sum(works[t] for t in tokens)
        assert plan.work[rank] <= sum(works) / ring + 2 * max(works, default=0)


def test_one_long_document_is_cut_into_pairs_of_late_and_early_pieces() -> None:
    plan = make([1000], Cost(), 2)
    assert plan.cuts == (0, 500, 707, 866, 1000)
    assert [plan.share(rank) for rank in range(2)] == [
        (range(500), range(866, 1000)),
        (range(500, 707), range(707, 866)),
    ]
    assert balance([plan]) == pytest.approx(1, abs=0.01)


def test_short_documents_send_nothing_but_the_ones_that_are_cut() -> None:
    plan = make([10] * 100, Cost(), 4)
    assert max(sum(plan.route(rank, None).sizes) for rank in range(4)) < 7 * 10
    assert sum(make([10] * 16, Cost(), 4).route(0, None).sizes) == 0


def test_a_window_bounds_what_travels() -> None:
    plan = make([1000], Cost(), 4)
    assert sum(plan.route(0, None).sizes) == plan.cuts[-2]
    assert plan.route(0, 5).sizes == (4, 8, 8, 8)


def test_balance_counts_pack_for_pack() -> None:
    even, odd = make([1000], Cost(), 2), make([3], Cost(), 2)
    assert balance([odd]) > balance([even, odd]) > balance([even])
    assert balance([make([], Cost(), 2)]) == 1

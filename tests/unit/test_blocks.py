"""The page pool: order, counts, errors, and random walks against a plain model of it."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.blocks import OutOfPages, PagePool


def test_pages_are_given_lowest_first_whatever_the_order_of_their_return():
    pool = PagePool(5, 16)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.free([2])
    pool.free([0])
    assert pool.allocate(2) == [0, 2]
    assert pool.allocate(0) == []
    assert (pool.num_free, pool.num_used) == (1, 4)


def test_too_large_an_allocation_takes_nothing():
    pool = PagePool(3, 16)
    pool.allocate(1)
    with pytest.raises(OutOfPages, match="3 pages were asked for, 2 of 3 are free"):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check([[0]])


def test_a_shared_page_is_free_only_after_its_last_owner():
    pool = PagePool(4, 16)
    prefix = pool.allocate(2)
    pool.share(prefix)
    pool.share(prefix)
    pool.free(prefix)
    pool.free(prefix)
    assert pool.num_free == 2
    pool.check([prefix])
    pool.free(prefix)
    assert pool.num_free == 4
    pool.check([])


@pytest.mark.parametrize("method", ["share", "free"])
@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([0, 2], "page 2 has no owner: freed twice, or never allocated"),
        ([0, 9], "page 9 is outside the pool of 4"),
        ([0, -1], "page -1 is outside the pool of 4"),
        ([0, 1, 0], r"a page is listed twice in \[0, 1, 0\]"),
    ],
)
def test_bad_pages_are_refused_and_nothing_changes(method, pages, message):
    pool = PagePool(4, 16)
    held = pool.allocate(2)
    with pytest.raises(ValueError, match=message):
        getattr(pool, method)(pages)
    pool.check([held])


def test_pages_for_rounds_up():
    pool = PagePool(1, 4)
    assert [pool.pages_for(count) for count in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_a_pool_has_pages():
    with pytest.raises(ValueError, match="num_pages=0 and page_size=16 must both be at least 1"):
        PagePool(0, 16)


def test_check_finds_a_leak_and_a_false_owner():
    pool = PagePool(3, 16)
    pool.allocate(2)
    with pytest.raises(AssertionError, match=r"\{1: \(1, 0\)\}"):
        pool.check([[0]])
    with pytest.raises(AssertionError, match=r"\{2: \(0, 1\)\}"):
        pool.check([[0, 1], [2]])


@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from(["take", "share", "free"]), st.integers(0, 7))))
@settings(database=None, deadline=None, derandomize=True, max_examples=300)
def test_any_calls_agree_with_a_plain_count(num_pages, calls):
    pool = PagePool(num_pages, 16)
    counts = Counter()
    owners = []
    for call, number in calls:
        if call == "take":
            free = [page for page in range(num_pages) if not counts[page]]
            if number > len(free):
                with pytest.raises(OutOfPages):
                    pool.allocate(number)
                continue
            assert pool.allocate(number) == free[:number]
            owners.append(free[:number])
            counts.update(free[:number])
        elif owners:
            pages = owners[number % len(owners)]
            if call == "share":
                pool.share(pages)
                owners.append(pages)
                counts.update(pages)
            else:
                pool.free(owners.pop(number % len(owners)))
                counts.subtract(pages)
        assert pool.owners == tuple(counts[page] for page in range(num_pages))
        pool.check(owners)
    for pages in owners:
        pool.free(pages)
    assert pool.num_free == num_pages


def test_the_next_allocation_depends_on_the_owners_alone():
    one, other = PagePool(20, 16), PagePool(20, 16)
    held = one.allocate(20)
    other.allocate(20)
    order = random.Random(0)
    for pool in (one, other):
        pages = held[3:]
        order.shuffle(pages)
        for page in pages:
            pool.free([page])
    assert one.owners == other.owners
    assert one.allocate(9) == other.allocate(9)

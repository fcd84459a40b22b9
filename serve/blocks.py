"""Pages of the KV cache as numbers: who holds which, and which are free (no tensor here).

A page stores the keys and values of `page_size` consecutive tokens. A block table lists a sequence's pages in
order of position, so token position p lies in slot `p % page_size` of page `table[p // page_size]`:

    page_size=4, 6 tokens      table (5, 2)      page 5: 0 1 2 3      page 2: 4 5 . .

Pages have reference counts, because several owners may read the same one: every request of a P-tuning
adapter attends to the adapter's prefix pages, which the engine pins by holding them itself. The pool knows
nothing of contents: a page without an owner is simply free. A prefix cache would be one more owner of pages.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfPages(RuntimeError):
    """More pages were asked for than are free; nothing was allocated."""


class PagePool:
    """`num_pages` pages of `page_size` tokens each.

    The lowest free page is given out first, so that the next allocation depends only on which pages are free,
    not on how they got so: ranks that agree on the owners agree on every allocation to come.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Raises `ValueError` unless both are at least 1."""
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must both be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages))  # a heap
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return self.num_pages - len(self._free)

    @property
    def owners(self) -> tuple[int, ...]:
        """Reference count of every page: the pool's whole state."""
        return tuple(self._owners)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, the lowest first. Raises `OutOfPages`, taking none, if too few."""
        assert count >= 0, count
        if count > len(self._free):
            raise OutOfPages(f"{count} pages were asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds one owner to each of these pages. Raises `ValueError`, changing nothing, if one has none."""
        self._check_owned(pages)
        for page in pages:
            self._owners[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Takes one owner from each of these pages; those left without are free again.

        Raises `ValueError`, changing nothing, for a page without an owner (a double free) or listed twice.
        """
        self._check_owned(pages)
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                heapq.heappush(self._free, page)

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Raises `AssertionError` unless the free list and the counts agree.

        With `tables`, the page lists of *all* owners (requests and pinned prefixes), the counts must be
        exactly theirs: a page counted higher has leaked.
        """
        free = set(self._free)
        assert len(free) == len(self._free), f"pages listed free twice: {sorted(self._free)}"
        unowned = {page for page, count in enumerate(self._owners) if count == 0}
        assert free == unowned, f"free list and counts disagree on pages {sorted(free ^ unowned)}"
        assert min(self._owners) >= 0, f"negative count: {self._owners}"
        if tables is not None:
            held = Counter(page for table in tables for page in table)
            wrong = {page: (count, held[page]) for page, count in enumerate(self._owners) if count != held[page]}
            assert not wrong, f"page: (count, owners that list it) {wrong}"

    def _check_owned(self, pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages):
            raise ValueError(f"a page is listed twice in {list(pages)}")
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is outside the pool of {self.num_pages}")
            if self._owners[page] == 0:
                raise ValueError(f"page {page} has no owner: freed twice, or never allocated")

"""Where the queries and keys of one serving step lie: an argument that all layers share.

A request's keys live in pages of S slots, listed by its row of the block table; position p is slot `p % S` of
page `table[p // S]`. Three chunks of one step, page size 4 (`.` = unused slot, never read; `x` = unused table
entry):

    chunk  queries  kv_length  block table   slots
    0      1        6          7 2 x         7: 0 1 2 3   2: 4 5 . .      decode: the query is position 5
    1      3        3          5 x x         5: 0 1 2 .                   a whole prompt: queries 0 1 2
    2      2        9          0 9 4         0: 0 1 2 3   9: 4 5 6 7   4: 8 . . .     second chunk of a prompt

Queries are packed in chunk order; the last query of a chunk is at position `kv_length - 1`.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PagedLayout:
    """Query rows, key counts and pages of the B chunks of one step; a chunk may have a prefix segment.

    Build it with `PagedLayout.build` (or `Ops.paged_layout`, which adds what its backend wants precomputed).
    """

    page_size: int
    """S, slots per page."""
    query_starts: tuple[int, ...]
    """[B + 1] first query row of every chunk, then T."""
    kv_lengths: tuple[int, ...]
    """[B] keys in the cache for each chunk, its own included."""
    block_table_BM: Tensor
    """[B, M] int64 pages; entries past a chunk's last page hold any value and are never used."""
    prefix_lengths: tuple[int, ...]
    """[B] entries of the prefix segment, 0 for chunks without one."""
    prefix_table_BM: Tensor
    """[B, M'] int64 pages of the prefix segment; chunks of one adapter share them."""

    @classmethod
    def build(
        cls,
        query_lengths: Sequence[int],
        kv_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]] | Tensor,
        *,
        page_size: int,
        prefix_lengths: Sequence[int] | None = None,
        prefix_tables: Sequence[Sequence[int]] | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Checks the counts and pads the tables; ValueError names the argument that doesn't fit.

        `query_lengths[b] >= 1` queries of chunk b end at position `kv_lengths[b] - 1`. `block_tables` holds
        one list of pages per chunk (ragged) or a padded [B, M] integer tensor.
        """
        count = len(query_lengths)
        prefix_lengths = [0] * count if prefix_lengths is None else prefix_lengths
        prefix_tables = [()] * count if prefix_tables is None else prefix_tables
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be at least 1")
        if len(kv_lengths) != count or len(prefix_lengths) != count:
            raise ValueError(
                f"query_lengths, kv_lengths and prefix_lengths must have one entry per chunk, got {count}, "
                f"{len(kv_lengths)} and {len(prefix_lengths)}"
            )
        for b, (queries, keys) in enumerate(zip(query_lengths, kv_lengths, strict=True)):
            if not 1 <= queries <= keys:
                raise ValueError(f"chunk {b}: query_lengths={queries} must lie in 1..kv_lengths={keys}")
        starts = [0]
        for queries in query_lengths:
            starts.append(starts[-1] + queries)
        return cls(
            page_size=page_size,
            query_starts=tuple(starts),
            kv_lengths=tuple(kv_lengths),
            block_table_BM=_padded("block_tables", block_tables, kv_lengths, page_size, device),
            prefix_lengths=tuple(prefix_lengths),
            prefix_table_BM=_padded("prefix_tables", prefix_tables, prefix_lengths, page_size, device),
        )

    @property
    def num_queries(self) -> int:
        """T, the query rows of all chunks."""
        return self.query_starts[-1]

    @functools.cached_property
    def numbers(self) -> list[tuple[int, int, int, int]]:
        """Of each chunk: first query row, queries, keys without the prefix, prefix entries."""
        rows = itertools.pairwise(self.query_starts)
        each = zip(rows, self.kv_lengths, self.prefix_lengths, strict=True)
        return [(start, stop - start, keys, prefix) for (start, stop), keys, prefix in each]

    def check(self, q_TNH: Tensor, cache_PSKH: Tensor) -> None:
        """Raises ValueError unless the queries and the cache are those of this layout."""
        if self.num_queries != q_TNH.shape[0] or self.page_size != cache_PSKH.shape[1]:
            raise ValueError(
                f"layout has {self.num_queries} queries in pages of {self.page_size}, "
                f"q {tuple(q_TNH.shape)} and cache {tuple(cache_PSKH.shape)} differ"
            )

    def end(self, chunk: int) -> int:
        """Keys of a chunk, its prefix included."""
        return self.prefix_lengths[chunk] + self.kv_lengths[chunk]

    def slots(self, chunk: int, *, prefix: bool = False) -> Tensor:
        """Flat slots `page * S + slot`, [kv_length] int64, of a chunk's keys in order (or of its prefix)."""
        table = self.prefix_table_BM if prefix else self.block_table_BM
        length = (self.prefix_lengths if prefix else self.kv_lengths)[chunk]
        positions = torch.arange(length, device=table.device)
        return table[chunk, positions // self.page_size] * self.page_size + positions % self.page_size


def _padded(
    name: str,
    tables: Sequence[Sequence[int]] | Tensor,
    lengths: Sequence[int],
    page_size: int,
    device: torch.device | str,
) -> Tensor:
    """The tables as one int64 tensor [B, M]; ValueError when one has fewer pages than its length needs."""
    if len(tables) != len(lengths):
        raise ValueError(f"{name} has {len(tables)} rows for {len(lengths)} chunks")
    widths = [len(row) for row in tables]
    for b, (width, length) in enumerate(zip(widths, lengths, strict=True)):
        if width * page_size < length:
            raise ValueError(f"{name}[{b}] has {width} pages of {page_size} slots for {length} keys")
    if isinstance(tables, Tensor):
        return tables.to(device=device, dtype=torch.int64)
    columns = max(widths, default=0)
    rows = [list(row) + [0] * (columns - len(row)) for row in tables]
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), columns)

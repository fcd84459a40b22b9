"""Which CUDA blocks do what: lists made once for a step, that all layers with the same window share.

Keys come in parts of 128 by absolute position. A chunk with few queries is *split*: its parts go to different warps,
a second kernel merges them. The other chunks are *whole*: a block merges the parts of its rows on the way. Both give
the same bits (`kernels/cuda/attention.cuh`), so what is chosen here never shows in a result.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.paged import PagedLayout

PART = 128
"""Keys per part, `TILE * PART_TILES` of attention.cuh."""
PARTS_PER_ITEM = 2
"""Parts of a block that works on a split chunk."""
SPLIT_PAIRS = 16
"""Pairs (query, head of a kv head's group) that a split chunk has at most: rows of one warp."""
WHOLE_PAIRS = 64
"""Such pairs per block of a whole chunk."""
GRADIENT_ROWS = 64
"""Positions per entry of `PackedWork.query_tiles`, `LISTED` of attention_varlen_grad.cu."""
MAX_OFFSET = 1 << 30
"""Positions fit 32 bits."""
ITEM_ROWS, MOST_ADAPTERS = 16, 64
"""Rows per item of a low-rank update at most, `ROWS` of lora.cu, and updates of a launch."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The lists of one step for a window and a largest group; int64 on the layout's device."""

    whole: Tensor
    """[., 2] chunk, and which 64 of its pairs; those that see most keys first."""
    split: Tensor
    """[., 3] chunk, first of two parts, first row of the chunk in the workspace."""
    merges: Tensor
    """[., 2] split chunk, its first row in the workspace."""
    partial_rows: int
    """Rows of the workspace: parts x queries, summed over split chunks."""
    max_split_queries: int


class CudaLayout(PagedLayout):
    """The layout with the chunks' numbers in one tensor and the work of every window and group asked for so far."""

    @functools.cached_property
    def chunks(self) -> Tensor:
        """int64 [B, 6]: `numbers`, 0, and the position of the first query."""
        rows = [(first, queries, keys, prefix, 0, keys - queries) for first, queries, keys, prefix in self.numbers]
        return _integers(rows, 6, self.block_table_BM.device)

    @functools.cached_property
    def _made(self) -> dict[tuple[int, int, int], Work]:
        return {}

    def work(self, window: int, group: int, split_pairs: int = SPLIT_PAIRS) -> Work:
        """The lists for this window (0: none) where a kv head serves at most `group` query heads.

        Chunks of up to `split_pairs` pairs, at most 16, are split.
        """
        key = (window, group, split_pairs)
        if key not in self._made:
            self._made[key] = _plan(self.numbers, *key, self.block_table_BM.device)
        return self._made[key]


@dataclass(frozen=True, kw_only=True)
class PackedWork:
    """Packed documents as chunks that are all whole."""

    chunks: Tensor
    """int64 [B, 6]: first row of q, queries, keys, 0, first row of k, offset."""
    whole: Tensor
    """As in `Work`."""
    query_tiles: Tensor
    """int64 [., 6], for the gradients: a document's first row of q, queries, first row of k, keys and offset, and which
    64 of its queries."""
    key_tiles: Tensor
    """The same, and which 64 of its keys."""


@functools.lru_cache(maxsize=16)  # the layers of a step, and its microbatches
def packed_work(documents: Documents, window: int, group: int, device: torch.device) -> PackedWork:
    """The lists for these documents, where a kv head serves at most `group` query heads. ValueError: a wild offset."""
    if any(abs(offset) >= MAX_OFFSET for offset in documents.offsets):
        raise ValueError(f"offsets={documents.offsets} must lie between -2^30 and 2^30")
    rows = [(q.start, q.stop - q.start, k.start, k.stop - k.start, offset) for q, k, offset in documents.spans]
    chunks = [(q, queries, keys, 0, k, offset) for q, queries, k, keys, offset in rows]
    work = _plan([chunk[:4] for chunk in chunks], window, group, 0, device)
    tiles = (
        [(*row, tile) for row in rows for tile in range(-(-row[side] // GRADIENT_ROWS))]
        for side in (1, 3)  # queries, keys
    )
    query_tiles, key_tiles = (_integers(found, 6, device) for found in tiles)
    return PackedWork(
        chunks=_integers(chunks, 6, device), whole=work.whole, query_tiles=query_tiles, key_tiles=key_tiles
    )


@functools.lru_cache(maxsize=16)  # the linears of a step, and its microbatches
def low_rank_items(bounds: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int64 [., 3] from the rows start .. stop - 1 of every update: its place in `bounds`, first row, 1 to 16 rows."""
    items = [
        (update, row, min(ITEM_ROWS, stop - row))
        for update, (start, stop) in enumerate(bounds)
        for row in range(start, stop, ITEM_ROWS)
    ]
    return _integers(items, 3, device)


def _plan(numbers: Sequence[tuple[int, ...]], window: int, group: int, split_pairs: int, device: torch.device) -> Work:
    """The lists for chunks (first row, queries, keys, prefix entries)."""
    whole, split, merges, row, longest = [], [], [], 0, 0
    for b, (_, queries, keys, prefix) in enumerate(numbers):
        pairs = queries * group
        if pairs == 0 or pairs > split_pairs:
            whole += [(keys, b, tile) for tile in range(-(-pairs // WHOLE_PAIRS))]
            continue
        lowest = max(keys - queries - window + 1, 0) if window else 0
        parts = -(-prefix // PART) + -(-keys // PART) - lowest // PART
        split += [(b, part, row) for part in range(0, parts, PARTS_PER_ITEM)]
        merges.append((b, row))
        row += parts * queries
        longest = max(longest, queries)
    whole.sort(key=lambda item: (-item[0], item[1], -item[2]))
    return Work(
        whole=_integers([item[1:] for item in whole], 2, device),
        split=_integers(split, 3, device),
        merges=_integers(merges, 2, device),
        partial_rows=row,
        max_split_queries=longest,
    )


def _integers(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The query heads of every kv head, int32 on a device."""

    starts: Tensor
    """[K + 1]: where in `order` the heads of a kv head start."""
    order: Tensor
    """[N] query heads, by kv head."""
    kv_heads: Tensor
    """[N] the kv head of every query head."""
    group: int
    """Most query heads that a kv head serves."""


@functools.cache
def heads_of(kv_index: tuple[int, ...], num_kv_heads: int, device: torch.device) -> Heads:
    """From the kv head of every query head."""
    order = sorted(range(len(kv_index)), key=lambda n: (kv_index[n], n))
    counts = [kv_index.count(k) for k in range(num_kv_heads)]
    return Heads(
        starts=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device),
        order=torch.tensor(order, dtype=torch.int32, device=device),
        kv_heads=torch.tensor(kv_index, dtype=torch.int32, device=device),
        group=max(counts, default=0),
    )

"""Cuts one serving step into the tiles that `torch_ops.attention_paged` computes one by one.

A tile is a gathered copy of keys and the queries that meet them, all over one number of keys, the *extent*:

    position   0 .. 127   128 .. 255   ...   896 .. 1023   1024 .. 1535   1536 .. 2047   ...
    extent          128          256   ...          1024           1536           2048   ...

Decoding requests (one query) of one extent share tiles; a longer chunk is cut where the extent changes. The
prefix segment comes before position 0 of the request and counts as positions.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.paged import PagedLayout

_FINE, _COARSE = 128, 512
"""Extents are multiples of these, below and from `_FINE_END` on: few masked keys first, few pieces of a chunk later."""
_FINE_END = 1024
_TILE_SLOTS = 4096
"""Keys gathered at once for decoding requests: 3 MB of float32 keys with three kv heads of 64."""


def key_extent(position: int) -> int:
    """Keys that the query at this position meets: the next multiple of 128, from position 1024 on of 512.

    Keys past the position are masked out. The extent must follow from the position alone: it is the inner
    dimension of a matrix product, and libraries sum over 256 and over 512 terms in different orders.
    """
    block = _FINE if position < _FINE_END else _COARSE
    return (position // block + 1) * block


@dataclass(frozen=True, kw_only=True)
class Tile:
    """W chunks with Q queries each over `extent` keys: prefix entries, then positions of the request.

    Either Q = 1 (decoding requests) or W = 1 (part of a longer chunk).
    """

    rows: slice
    """Its queries: rows of the pack, for Q = 1 entries of `TiledLayout.single_rows`."""
    slots: Tensor
    """[W * extent] int64 cache slots; a key that no query of the chunk may see repeats one that it does."""
    extent: int
    positions_WQ: Tensor
    """int64 position of every query, prefix included."""
    prefix_W: Tensor
    """int64 prefix entries of every chunk."""
    causal_mask: Tensor
    """[W, 1, Q, extent] float32, 0 or -inf: the additive mask without a window."""

    def mask(self, window: int | None) -> Tensor:
        """The additive mask [W, 1, Q, extent]; the window doesn't hide the prefix."""
        if window is None or window >= self.extent:
            return self.causal_mask
        j = torch.arange(self.extent)
        outside = self.positions_WQ[..., None] - j >= window
        hidden = outside & (j >= self.prefix_W[:, None, None])
        return self.causal_mask.masked_fill(hidden[:, None], -torch.inf)


@dataclass(frozen=True, kw_only=True)
class TiledLayout(PagedLayout):
    """The layout with its tiles, built once per step and used by every layer."""

    single_rows: Tensor
    """int64 query rows of the chunks with one query, in the order of `single_tiles`."""
    single_tiles: tuple[Tile, ...]
    chunk_tiles: tuple[Tile, ...]


def paged_layout(
    query_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    block_tables: Sequence[Sequence[int]] | Tensor,
    *,
    page_size: int,
    prefix_lengths: Sequence[int] | None = None,
    prefix_tables: Sequence[Sequence[int]] | Tensor | None = None,
    device: torch.device | str = "cpu",
) -> TiledLayout:
    """`PagedLayout.build` plus the tiles of `attention_paged`."""
    plain = PagedLayout.build(
        query_lengths,
        kv_lengths,
        block_tables,
        page_size=page_size,
        prefix_lengths=prefix_lengths,
        prefix_tables=prefix_tables,
        device=device,
    )
    singles = [b for b, size in enumerate(query_lengths) if size == 1]
    singles.sort(key=lambda b: key_extent(plain.end(b) - 1))
    return TiledLayout(
        **{f.name: getattr(plain, f.name) for f in fields(plain)},
        single_rows=torch.tensor([plain.query_starts[b] for b in singles], dtype=torch.int64),
        single_tiles=tuple(_single_tiles(plain, singles)),
        chunk_tiles=tuple(_chunk_tiles(plain)),
    )


def _single_tiles(layout: PagedLayout, singles: list[int]) -> Iterator[Tile]:
    """Tiles of chunks with one query, sorted by key extent: one extent each, about `_TILE_SLOTS` keys."""
    start = 0
    for extent, group in itertools.groupby(singles, lambda b: key_extent(layout.end(b) - 1)):
        chunks, width = list(group), max(1, _TILE_SLOTS // extent)
        for first in range(0, len(chunks), width):
            some = chunks[first : first + width]
            positions_WQ = torch.tensor([[layout.end(b) - 1] for b in some])
            yield _tile(layout, some, slice(start, start + len(some)), extent, positions_WQ)
            start += len(some)


def _chunk_tiles(layout: PagedLayout) -> Iterator[Tile]:
    """Tiles of the longer chunks, cut where the key extent changes."""
    for b, (start, stop) in enumerate(itertools.pairwise(layout.query_starts)):
        end = layout.end(b)
        position = end - (stop - start)
        while stop - start > 1 and position < end:
            extent = key_extent(position)
            last = min(end, extent)
            rows = slice(stop - end + position, stop - end + last)
            yield _tile(layout, [b], rows, extent, torch.arange(position, last)[None])
            position = last


def _tile(layout: PagedLayout, chunks: list[int], rows: slice, extent: int, positions_WQ: Tensor) -> Tile:
    prefix_W = torch.tensor([layout.prefix_lengths[b] for b in chunks])
    hidden_WQS = torch.arange(extent) > positions_WQ[..., None]
    mask = torch.zeros(hidden_WQS.shape).masked_fill_(hidden_WQS, -torch.inf)
    return Tile(
        rows=rows,
        slots=_tile_slots(layout, chunks, prefix_W, positions_WQ[:, -1], extent).flatten(),
        extent=extent,
        positions_WQ=positions_WQ,
        prefix_W=prefix_W,
        causal_mask=mask[:, None],
    )


def _tile_slots(layout: PagedLayout, chunks: list[int], prefix_W: Tensor, last_W: Tensor, extent: int) -> Tensor:
    """[W, extent] flat slots; keys past the last query repeat the slot of its own key, which is filled."""
    index = torch.tensor(chunks)
    size = layout.page_size
    virtual = torch.minimum(torch.arange(extent)[None], last_W[:, None])
    position = (virtual - prefix_W[:, None]).clamp_(min=0)
    slots = _lookup(layout.block_table_BM, index, position, size)
    if not any(layout.prefix_lengths[b] for b in chunks):
        return slots
    in_prefix = virtual < prefix_W[:, None]
    entry = torch.where(in_prefix, virtual, 0)
    return torch.where(in_prefix, _lookup(layout.prefix_table_BM, index, entry, size), slots)


def _lookup(table_BM: Tensor, index_W: Tensor, position_WS: Tensor, page_size: int) -> Tensor:
    """Flat slots of the positions [W, S] in the table's rows `index`."""
    pages = table_BM[index_W].gather(1, torch.div(position_WS, page_size, rounding_mode="floor"))
    return pages * page_size + position_WS % page_size

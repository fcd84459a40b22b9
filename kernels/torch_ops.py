"""The torch CPU backend: the ops of `kernels.reference`, fast and row-invariant in float32, bfloat16 and float16.

A row's bits depend on that row alone: not on how many rows there are, where it stands, or how many threads
work. What that took (measured; `docs/kernels.md`):

* linear: oneDNN sums over K in one order for every row count above a small minimum; calls with fewer rows are
  padded. MKL, torch's own choice for float32, is both slower on AMD and has more exceptions.
* norm, softmax: torch reduces row by row. silu: see `autograd.silu_gate`.
* attention: the inner products of a query are always taken against the same blocks of keys,
  `key_extent(position)` keys from position 0 on, and its tile has a multiple of `row_multiple` rows.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import autograd, reference
from kernels.paged import PagedLayout

_FIRST_EXTENT = 256
_BLOCK = 512
_TILE_SLOTS = 16384
"""Keys gathered at once for decoding requests: with three kv heads of 64, 12 MB of float32 keys."""


def linear(
    x_TK: Tensor,
    w_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    product: autograd.Product,
    min_rows: int,
) -> Tensor:
    """`reference.linear`, row-invariant if one row of the product has the bits of any `min_rows` or more."""
    _check_linear(x_TK, w_NK, bias_N)
    if torch.is_grad_enabled():
        return autograd.Linear.apply(x_TK, w_NK, bias_N, product, min_rows)
    return autograd.padded_linear(x_TK, w_NK, bias_N, product, min_rows)


def _check_linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> None:
    if x_TK.dim() != 2 or w_NK.dim() != 2 or x_TK.shape[1] != w_NK.shape[1]:
        raise ValueError(f"linear: x {tuple(x_TK.shape)} and w {tuple(w_NK.shape)} must be [T, K] and [N, K]")
    if x_TK.dtype != w_NK.dtype or (bias_N is not None and bias_N.dtype != x_TK.dtype):
        raise ValueError(f"linear: x is {x_TK.dtype}, w is {w_NK.dtype}; x, w and bias must have one dtype")


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`, bit for bit, with a lean backward."""
    if not torch.is_grad_enabled():
        return reference.rms_norm(x_TD, w_D, eps)
    return autograd.RmsNorm.apply(x_TD, w_D, eps)


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.silu_gate`, row-invariant, with a lean backward."""
    if gate_TF.shape != up_TF.shape:
        raise ValueError(f"silu_gate: gate {tuple(gate_TF.shape)} and up {tuple(up_TF.shape)} must have one shape")
    if not torch.is_grad_enabled():
        return autograd.silu_gate(gate_TF, up_TF)
    return autograd.SiluGate.apply(gate_TF, up_TF)


def attention_varlen(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens_B1: Sequence[int] | Tensor,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_varlen` in O(T) memory, forward and backward."""
    reference.check_attention(q_TNH, k_TKH, v_TKH)
    heads = reference.check_kv_index(q_TNH.shape[1], k_TKH.shape[1], kv_index)
    bounds = reference.check_bounds(cu_seqlens_B1, q_TNH.shape[0])
    pieces = tuple(autograd.document_pieces(bounds, window, q_TNH))
    return autograd.Attention.apply(q_TNH, k_TKH, v_TKH, pieces, heads, scale)


def attention_prefix(
    q_TNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, *, kv_index: Sequence[int] | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.attention_prefix` in O(T) memory, forward and backward."""
    reference.check_attention(q_TNH, k_LKH, v_LKH)
    heads = reference.check_kv_index(q_TNH.shape[1], k_LKH.shape[1], kv_index)
    if not q_TNH.shape[0] or not k_LKH.shape[0]:
        return reference.attention_prefix(q_TNH, k_LKH, v_LKH, kv_index=heads, scale=scale)
    everything = slice(0, q_TNH.shape[0])
    piece = autograd.Piece(queries=everything, keys=slice(0, k_LKH.shape[0]), causal=False, mask_BQS=None)
    return autograd.Attention.apply(q_TNH, k_LKH, v_LKH, (piece,), heads, scale)


def write_pages(
    key_cache_PSKH: Tensor, value_cache_PSKH: Tensor, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor
) -> None:
    """`reference.write_pages`."""
    for cache, rows in ((key_cache_PSKH, k_TKH), (value_cache_PSKH, v_TKH)):
        if cache.shape[2:] != rows.shape[1:] or cache.dtype != rows.dtype or len(rows) != len(slots_T):
            raise ValueError(
                f"write_pages: rows {tuple(rows.shape)} {rows.dtype} don't fit slots {tuple(slots_T.shape)} "
                f"of a cache {tuple(cache.shape)} {cache.dtype}"
            )
        cache.flatten(0, 1).index_copy_(0, slots_T, rows)


def key_extent(position: int) -> int:
    """Keys that the query at this position is multiplied with: 256 for the first 256 positions, then blocks of 512.

    Keys past the position are masked out. The extent must follow from the position alone: it is the inner
    dimension of a matrix product, and libraries sum over 256 and over 512 terms in different orders.
    """
    return _FIRST_EXTENT if position < _FIRST_EXTENT else (position // _BLOCK + 1) * _BLOCK


@dataclass(frozen=True, kw_only=True)
class Tile:
    """W chunks with Q queries each over `extent` keys: prefix entries first, then the positions of the request."""

    rows: Tensor | slice
    """Query rows in the pack: an index [W] when Q = 1, else a slice of Q rows (W = 1)."""
    slots: Tensor
    """[W * extent] int64 flat cache slots; keys that no query of the tile may see repeat a slot that holds one."""
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

    tiles: tuple[Tile, ...]


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
    tiles = tuple(itertools.chain(_single_tiles(plain), _chunk_tiles(plain)))
    return TiledLayout(**{f.name: getattr(plain, f.name) for f in fields(plain)}, tiles=tiles)


def _single_tiles(layout: PagedLayout) -> Iterator[Tile]:
    """Tiles of the chunks with one query, grouped by key extent, at most `_TILE_SLOTS` keys each."""
    groups: dict[int, list[int]] = {}
    for b, (start, stop) in enumerate(itertools.pairwise(layout.query_starts)):
        if stop - start == 1:
            position = layout.prefix_lengths[b] + layout.kv_lengths[b] - 1
            groups.setdefault(key_extent(position), []).append(b)
    for extent, chunks in sorted(groups.items()):
        width = max(1, _TILE_SLOTS // extent)
        for first in range(0, len(chunks), width):
            yield _tile(layout, chunks[first : first + width], extent)


def _chunk_tiles(layout: PagedLayout) -> Iterator[Tile]:
    """Tiles of the longer chunks, cut where the key extent changes."""
    for b, (start, stop) in enumerate(itertools.pairwise(layout.query_starts)):
        end = layout.prefix_lengths[b] + layout.kv_lengths[b]
        position = end - (stop - start)
        while stop - start > 1 and position < end:
            extent = key_extent(position)
            last = min(end, extent)
            yield _tile(layout, [b], extent, positions=range(position, last))
            position = last


def _tile(layout: PagedLayout, chunks: list[int], extent: int, positions: range | None = None) -> Tile:
    """One tile: the last query of every chunk, or the queries of one chunk at `positions`."""
    prefix_W = torch.tensor([layout.prefix_lengths[b] for b in chunks])
    ends_W = prefix_W + torch.tensor([layout.kv_lengths[b] for b in chunks])
    rows: Tensor | slice
    if positions is None:
        positions_WQ = ends_W[:, None] - 1
        rows = torch.tensor([layout.query_starts[b] for b in chunks])
    else:
        positions_WQ = torch.arange(positions.start, positions.stop)[None]
        offset = layout.query_starts[chunks[0] + 1] - int(ends_W[0])
        rows = slice(offset + positions.start, offset + positions.stop)
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
    """[W, extent] flat slots; keys past the last query take the slot of its own key, which is always filled."""
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
    """Flat slots of the positions [W, S] in the table's rows `index`; position 0 must be in the table or unused."""
    pages = table_BM[index_W].gather(1, torch.div(position_WS, page_size, rounding_mode="floor"))
    return pages * page_size + position_WS % page_size


def attention_paged(
    q_TNH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    layout: PagedLayout,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    row_multiple: int,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_paged`, row-invariant; needs a layout of `paged_layout`. Not differentiable."""
    reference.check_attention(q_TNH, key_cache_PSKH, value_cache_PSKH)
    if not isinstance(layout, TiledLayout):
        raise ValueError(f"layout must come from this backend's paged_layout, got {type(layout).__name__}")
    if layout.num_queries != q_TNH.shape[0] or layout.page_size != key_cache_PSKH.shape[1]:
        raise ValueError(
            f"layout has {layout.num_queries} queries in pages of {layout.page_size}, "
            f"q {tuple(q_TNH.shape)} and cache {tuple(key_cache_PSKH.shape)} differ"
        )
    heads = reference.check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index)
    rows = _HeadRows.of(heads, key_cache_PSKH.shape[2], row_multiple)
    keys, values = key_cache_PSKH.flatten(0, 1), value_cache_PSKH.flatten(0, 1)
    out_TNH = torch.empty_like(q_TNH)
    lse_TN = q_TNH.new_empty(q_TNH.shape[:2], dtype=torch.float32)
    for tile in layout.tiles:
        shape = (-1, tile.extent, *keys.shape[1:])
        k, v = (t.index_select(0, tile.slots).view(shape) for t in (keys, values))
        if isinstance(tile.rows, slice):
            part = _attend_chunk(q_TNH[tile.rows], k[0], v[0], tile.mask(window), heads, scale, row_multiple)
        else:
            part = _attend_single(q_TNH[tile.rows], k, v, tile.mask(window), rows, scale)
        out_TNH[tile.rows], lse_TN[tile.rows] = part
    return out_TNH, lse_TN


@dataclass(frozen=True, kw_only=True)
class _HeadRows:
    """Where a decoding request's query heads lie as rows of its kv heads, padded to `num_rows` per kv head."""

    num_rows: int
    source: Tensor
    """[K * num_rows] query head of every row; padding rows repeat head 0."""
    place: Tensor
    """[N] row of every query head in [K * num_rows]."""

    @classmethod
    def of(cls, heads: tuple[int, ...], num_kv_heads: int, row_multiple: int) -> "_HeadRows":
        counts = [heads.count(k) for k in range(num_kv_heads)]
        num_rows = -(-max(counts, default=1) // row_multiple) * row_multiple
        used = [0] * num_kv_heads
        source, place = [0] * (num_kv_heads * num_rows), []
        for n, k in enumerate(heads):
            place.append(k * num_rows + used[k])
            source[place[-1]] = n
            used[k] += 1
        return cls(num_rows=num_rows, source=torch.tensor(source), place=torch.tensor(place))


def _attend_single(
    q_WNH: Tensor, k_WSKH: Tensor, v_WSKH: Tensor, mask: Tensor, rows: _HeadRows, scale: float
) -> tuple[Tensor, Tensor]:
    """One query per chunk -> (out [W, N, H], lse [W, N]); the query heads of a kv head are the rows of its product."""
    width, _, head_dim = q_WNH.shape
    q = q_WNH.index_select(1, rows.source).view(width, -1, rows.num_rows, head_dim)
    mask = mask.expand(-1, -1, rows.num_rows, -1)
    out, lse = autograd.blocked_attention(
        q, k_WSKH.transpose(1, 2), v_WSKH.transpose(1, 2), causal=False, mask_BQS=mask, scale=scale
    )
    return out.flatten(1, 2).index_select(1, rows.place), lse.flatten(1, 2).index_select(1, rows.place)


def _attend_chunk(
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    mask: Tensor,
    heads: tuple[int, ...],
    scale: float,
    row_multiple: int,
) -> tuple[Tensor, Tensor]:
    """The queries of one chunk -> (out [Q, N, H], lse [Q, N]); padding rows copy the last query's mask."""
    count = q_QNH.shape[0]
    padding = -count % row_multiple
    if padding:
        q_QNH = F.pad(q_QNH, (0, 0, 0, 0, 0, padding))
        mask = torch.cat((mask, mask[:, :, -1:].expand(-1, -1, padding, -1)), dim=2)
    q, k, v = autograd.group_heads(q_QNH, k_SKH, v_SKH, heads)
    out, lse = autograd.blocked_attention(q, k, v, causal=False, mask_BQS=mask, scale=scale)
    return autograd.ungroup_queries(out)[:count], autograd.ungroup_queries(lse[..., None])[:count, :, 0]

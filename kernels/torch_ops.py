"""The torch CPU backend: the ops of `kernels.reference`, fast and row-invariant up to float32.

A row's bits depend on that row alone: not on how many rows there are, where it stands, or how many threads
work. What that took (measured; `docs/kernels.md`):

* linear: oneDNN sums over K in one order for every row count above a small minimum; calls with fewer rows are
  padded. MKL, torch's own choice for float32, is both slower on AMD and has more exceptions.
* norm, softmax: torch reduces row by row. The gates: see `autograd_rows.Gate`.
* attention: the inner products of a query are always taken against the same blocks of keys,
  `tiles.key_extent(position)` keys from position 0 on, and its product has a multiple of `row_multiple` rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import autograd, autograd_rows, checks, reference
from kernels.documents import Documents
from kernels.ops import LowRank, Part, Weight
from kernels.paged import PagedLayout
from kernels.tiles import Tile, TiledLayout


def linear(
    x_TK: Tensor,
    w_NK: Weight,
    bias_N: Tensor | None = None,
    updates: Sequence[LowRank] = (),
    *,
    wide: bool = False,
    product: autograd.Product,
    min_rows: int,
) -> Tensor:
    """`reference.linear`, row-invariant if one row of the product has the bits of any `min_rows` or more."""

    def one(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return autograd.Linear.apply(x, w, bias, product, min_rows)
        return autograd.padded_linear(x, w, bias, product, min_rows)

    return reference.composed_linear(x_TK, w_NK, bias_N, updates, wide, one)


def linears(x_TK: Tensor, parts: Sequence[Part], *, product: autograd.Product, min_rows: int) -> tuple[Tensor, ...]:
    """`reference.linears`, one by one."""
    return tuple(
        linear(x_TK, part.w_NK, part.bias_N, part.updates, product=product, min_rows=min_rows) for part in parts
    )


def add_weight_gradient(out_NK: Tensor, grad_TN: Tensor, x_TK: Tensor, *, product: autograd.Product) -> None:
    """`reference.add_weight_gradient`, the product rounded to the dtype of x before it is added."""
    out_NK += product(grad_TN.t(), x_TK.t(), None)


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`, bit for bit, with a lean backward."""
    if not torch.is_grad_enabled():
        return reference.rms_norm(x_TD, w_D, eps)
    return autograd_rows.RmsNorm.apply(x_TD, w_D, eps, reference.rms_norm, autograd_rows.rms_norm_backward)


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`, bit for bit, with a lean backward."""
    if not torch.is_grad_enabled():
        return reference.add_rms_norm(x_TD, delta_TD, w_D, eps)
    return autograd_rows.AddRmsNorm.apply(
        x_TD, delta_TD, w_D, eps, reference.add_rms_norm, autograd_rows.rms_norm_backward
    )


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """`reference.rotary`, bit for bit, with a lean backward."""
    if not torch.is_grad_enabled():
        return reference.rotary(x_TNH, cos_TH, sin_TH)
    return autograd_rows.Rotary.apply(x_TNH, cos_TH, sin_TH, autograd_rows.rotary)


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.silu_gate`, row-invariant, with a lean backward."""
    return _gate(autograd_rows.SILU, gate_TF, up_TF)


def gelu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.gelu_gate`, row-invariant, with a lean backward."""
    return _gate(autograd_rows.GELU, gate_TF, up_TF)


def _gate(gate: autograd_rows.Gate, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    autograd_rows.check_gate(gate.name, gate_TF, up_TF)
    if not torch.is_grad_enabled():
        return gate.forward(gate_TF, up_TF)
    return autograd_rows.Gated.apply(gate_TF, up_TF, gate.forward, gate.backward)


def attention_varlen(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    documents: Sequence[int] | Tensor | Documents,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: checks.Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_varlen` in O(T) memory, forward and backward.

    Torch's kernel has no cap, no ALiBi and no queries that see nothing: those go to the reference, in O(T^2) memory.
    """
    checks.check_attention(q_TNH, k_SKH, v_SKH)
    checks.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    if soft_cap is not None or alibi_slopes is not None or isinstance(documents, Documents):
        options = {"kv_index": kv_index, "window": window, "soft_cap": soft_cap, "alibi_slopes": alibi_slopes}
        return reference.attention_varlen(q_TNH, k_SKH, v_SKH, documents, scale=scale, **options)
    heads = checks.check_kv_index(q_TNH.shape[1], k_SKH.shape[1], kv_index)
    bounds = Documents.of(documents, q_TNH.shape[0], k_SKH.shape[0]).query_bounds
    pieces = tuple(autograd.document_pieces(bounds, window, q_TNH))
    return autograd.Attention.apply(q_TNH, k_SKH, v_SKH, pieces, heads, scale)


def attention_prefix(
    q_TNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    *,
    kv_index: Sequence[int] | None = None,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_prefix` in O(T) memory, forward and backward; with a cap it is the reference itself."""
    checks.check_attention(q_TNH, k_LKH, v_LKH)
    heads = checks.check_kv_index(q_TNH.shape[1], k_LKH.shape[1], kv_index)
    if not q_TNH.shape[0] or not k_LKH.shape[0] or soft_cap is not None:
        return reference.attention_prefix(q_TNH, k_LKH, v_LKH, kv_index=heads, scale=scale, soft_cap=soft_cap)
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


def rotary_write(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_TH: Tensor,
    sin_TH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """`reference.rotary_write`."""
    write_pages(key_cache_PSKH, value_cache_PSKH, reference.rotary(k_TKH, cos_TH, sin_TH), v_TKH, slots_T)
    return reference.rotary(q_TNH, cos_TH, sin_TH)


def attention_paged(
    q_TNH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    layout: PagedLayout,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: checks.Slopes | None = None,
    row_multiple: int,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_paged`, row-invariant; needs a layout of `tiles.paged_layout`. Not differentiable.

    Torch's kernel has no cap and no ALiBi: steps with those go to the reference, which isn't row-invariant.
    """
    checks.check_attention(q_TNH, key_cache_PSKH, value_cache_PSKH)
    checks.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    if not isinstance(layout, TiledLayout):
        raise ValueError(f"layout must come from this backend's paged_layout, got {type(layout).__name__}")
    layout.check(q_TNH, key_cache_PSKH)
    if soft_cap is not None or alibi_slopes is not None:
        options = {"kv_index": kv_index, "window": window, "soft_cap": soft_cap, "alibi_slopes": alibi_slopes}
        return reference.attention_paged(q_TNH, key_cache_PSKH, value_cache_PSKH, layout, scale=scale, **options)
    heads = checks.check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index)
    out_TNH = torch.empty_like(q_TNH)
    lse_TN = q_TNH.new_empty(q_TNH.shape[:2], dtype=torch.float32)
    caches = _Caches.of(key_cache_PSKH, value_cache_PSKH, layout)
    if layout.single_tiles:
        rows = _HeadRows.of(heads, key_cache_PSKH.shape[2], row_multiple)
        out, lse = _attend_singles(q_TNH, caches, layout, rows, window, scale)
        out_TNH[layout.single_rows], lse_TN[layout.single_rows] = out, lse
    for tile in layout.chunk_tiles:
        k, v = caches.read(tile)
        part = _attend_chunk(q_TNH[tile.rows], k[0], v[0], tile.mask(window), heads, scale, row_multiple)
        out_TNH[tile.rows], lse_TN[tile.rows] = part
    return out_TNH, lse_TN


@dataclass(frozen=True, kw_only=True)
class _Caches:
    """The caches as flat slots, and room for the keys and values of the largest tile.

    One room for all tiles: fresh memory for each would cost more in page faults than the attention itself.
    """

    flat: tuple[Tensor, Tensor]
    room: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, key_cache_PSKH: Tensor, value_cache_PSKH: Tensor, layout: TiledLayout) -> "_Caches":
        sizes = [len(tile.slots) for tile in (*layout.single_tiles, *layout.chunk_tiles)]
        shape = (max(sizes, default=0), *key_cache_PSKH.shape[2:])
        flat = (key_cache_PSKH.flatten(0, 1), value_cache_PSKH.flatten(0, 1))
        return cls(flat=flat, room=(flat[0].new_empty(shape), flat[1].new_empty(shape)))

    def read(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Keys and values [W, extent, K, H] of a tile, valid until the next call."""
        shape = (-1, tile.extent, *self.flat[0].shape[1:])
        k, v = (
            torch.index_select(flat, 0, tile.slots, out=room[: len(tile.slots)]).view(shape)
            for flat, room in zip(self.flat, self.room, strict=True)
        )
        return k, v


@dataclass(frozen=True, kw_only=True)
class _HeadRows:
    """Where a decoding request's query heads lie among the rows of its kv heads, `num_rows` for each."""

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


def _attend_singles(
    q_TNH: Tensor, caches: _Caches, layout: TiledLayout, rows: _HeadRows, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """All chunks with one query -> (out [W, N, H], lse [W, N]) in the order of `layout.single_rows`.

    The query heads of a kv head are the rows of its product.
    """
    q = q_TNH[layout.single_rows].index_select(1, rows.source).unflatten(1, (-1, rows.num_rows))
    outs, lses = [], []
    for tile in layout.single_tiles:
        k, v = caches.read(tile)
        mask = tile.mask(window).expand(-1, -1, rows.num_rows, -1)
        out, lse = autograd.blocked_attention(
            q[tile.rows], k.transpose(1, 2), v.transpose(1, 2), causal=False, mask_BQS=mask, scale=scale
        )
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs).flatten(1, 2), torch.cat(lses).flatten(1, 2)
    return out.index_select(1, rows.place), lse.index_select(1, rows.place)


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

"""Forward/backward pairs for the torch CPU ops whose own autograd would be slow or hold too much memory.

| function  | saved for the backward | recomputed                     |
|-----------|------------------------|--------------------------------|
| Linear    | x, w                   | -                              |
| Attention | q, k, v, out, lse      | scores, in blocks inside torch |

The attention pair rests on torch's blocked CPU attention, which returns lse but has no gradient for it. With
`P = exp(S - lse)`, `dP = dO V^T` and `delta = rowsum(dO * O)` the wanted score gradient is

    dS = P * (dP - delta + dlse)

(arXiv:2205.14135, eq. 4 of appendix B.4, plus the term of lse: d lse / dS = P). Torch computes delta itself
from dO and O, so one more column is appended: O' = [O, 1], dO' = [dO, -dlse], V' = [V, 0] leaves dP as it is
and turns delta into delta - dlse (two columns, high and low part, so that bfloat16 doesn't round dlse).
Without a gradient for lse nothing is appended.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import working_dtype
from kernels.master import Master

_EXTRA_COLUMNS = 16
"""Columns appended to the head dim for the gradient of lse: two are used, the rest keep rows aligned."""


def onednn_linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x @ w^T + bias` by oneDNN, for float32 and bfloat16 of any strides; no autograd.

    In float32 it is twice as fast as torch's own choice (MKL) on AMD. In bfloat16 it is torch's own choice
    too, except that torch computes products of up to 4096 multiply-adds elsewhere, in another order of
    summation.
    """
    if 0 in (*x_TK.shape, *w_NK.shape):
        return F.linear(x_TK, w_NK, bias_N)
    if x_TK.shape[1] == 1:  # oneDNN has no kernel for some of these; one product per element needs none
        out = x_TK * w_NK.t()
        return out if bias_N is None else out + bias_N
    return torch.ops.mkldnn._linear_pointwise(x_TK, w_NK, bias_N, "none", [], "")


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`onednn_linear` or `F.linear`."""


def padded_linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None, product: Product, min_rows: int) -> Tensor:
    """The product with x padded with zero rows to `min_rows`, cut back to T rows."""
    rows = x_TK.shape[0]
    if 0 < rows < min_rows:
        return product(F.pad(x_TK, (0, 0, 0, min_rows - rows)), w_NK, bias_N)[:rows]
    return product(x_TK, w_NK, bias_N)


class Linear(torch.autograd.Function):
    """`x @ w^T + bias` by the given product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None, product: Product, min_rows: int) -> Tensor:
        """[T, N] in x.dtype, by `padded_linear`."""
        ctx.save_for_backward(x_TK, w_NK)
        ctx.product, ctx.master = product, w_NK if isinstance(w_NK, Master) else None
        return padded_linear(x_TK, w_NK, bias_N, product, min_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and bias, each only when asked for; a master's may be put off."""
        x_TK, w_NK = ctx.saved_tensors
        (grad_TN,) = grads
        product, master = ctx.product, ctx.master
        wants_x, wants_w, wants_bias = ctx.needs_input_grad[:3]

        def weight_gradient(grad_TN: Tensor, x_TK: Tensor) -> Tensor:
            return product(grad_TN.t(), x_TK.t(), None)

        grad_x = product(grad_TN, w_NK.t(), None) if wants_x else None
        grad_w = None
        if wants_w:
            make = weight_gradient if master is None else partial(master.gradient, weight_gradient)
            grad_w = make(grad_TN, x_TK)
        return grad_x, grad_w, grad_TN.sum(0) if wants_bias else None, None, None


def blocked_attention(
    q_BGQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, *, causal: bool, mask_BQS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Torch's blocked CPU attention without autograd -> (out [B, G, Q, H], lse [B, G, Q] in float32).

    Any strides, an expanded (stride 0) G included; `mask` [B or 1, 1, Q, S] is added to the scores.
    """
    if mask_BQS is not None:
        mask_BQS = mask_BQS.expand(q_BGQH.shape[0], -1, -1, -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BGQH, k_BGSH, v_BGSH, 0.0, causal, attn_mask=mask_BQS, scale=scale
    )


def even_group(heads: tuple[int, ...], num_kv_heads: int) -> int | None:
    """Query heads per kv head if the sharing is even and in order (0 0 0 1 1 1 ...), else None."""
    group = len(heads) // max(num_kv_heads, 1)
    is_even = heads == tuple(k for k in range(num_kv_heads) for _ in range(group))
    return group if is_even and heads else None


def group_heads(q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [B, G, tokens, H] for `blocked_attention`; `heads` is the kv head of every query head.

    Even sharing: views with B = K kv heads, G = N/K, keys expanded without a copy. Uneven sharing: B = N, G =
    1, keys copied for every query head.
    """
    group = even_group(heads, k_SKH.shape[1])
    if group is not None:
        q = q_QNH.unflatten(1, (-1, group)).permute(1, 2, 0, 3)
        k, v = (t.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for t in (k_SKH, v_SKH))
        return q, k, v
    index = torch.tensor(heads, dtype=torch.int64, device=k_SKH.device)
    k, v = (t.index_select(1, index).transpose(0, 1)[:, None] for t in (k_SKH, v_SKH))
    return q_QNH.transpose(0, 1)[:, None], k, v


def ungroup_queries(x_BGQH: Tensor) -> Tensor:
    """[Q, N, H] from [B, G, Q, H]."""
    return x_BGQH.permute(2, 0, 1, 3).flatten(1, 2)


def _ungroup_kv(grad_BGSH: Tensor, heads: tuple[int, ...], num_kv_heads: int) -> Tensor:
    """The gradient [S, K, H] of keys or values: summed over the query heads that read a kv head."""
    if even_group(heads, num_kv_heads) is not None:
        return grad_BGSH.sum(1).transpose(0, 1)
    index = torch.tensor(heads, dtype=torch.int64, device=grad_BGSH.device)
    shape = (num_kv_heads, *grad_BGSH.shape[2:])
    return grad_BGSH.new_zeros(shape).index_add_(0, index, grad_BGSH[:, 0]).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Queries `queries` of the pack attend keys `keys`: one call of the blocked attention."""

    queries: slice
    keys: slice
    causal: bool
    mask_BQS: Tensor | None
    """[1, 1, Q, S], added to the scores."""


def document_pieces(bounds: Sequence[int], window: int | None, like: Tensor) -> Iterator[Piece]:
    """One causal piece per document; documents longer than the window go in blocks of 512 queries with a mask.

    `like` gives device and (working) dtype of the masks.
    """
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        if window is None or stop - start <= window:
            yield Piece(queries=slice(start, stop), keys=slice(start, stop), causal=True, mask_BQS=None)
            continue
        for first in range(start, stop, 512):
            last = min(first + 512, stop)
            low = max(start, first - window + 1)
            i = torch.arange(first, last, device=like.device)[:, None]
            j = torch.arange(low, last, device=like.device)[None]
            hidden = (j > i) | (i - j >= window)
            mask = torch.zeros(hidden.shape, dtype=working_dtype(like.dtype), device=like.device)
            mask.masked_fill_(hidden, -torch.inf)
            yield Piece(queries=slice(first, last), keys=slice(low, last), causal=False, mask_BQS=mask[None, None])


def _attend_piece(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, piece: Piece, heads: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """(out [Q, N, H], lse [Q, N]) of one piece."""
    q, k, v = group_heads(q_TNH[piece.queries], k_TKH[piece.keys], v_TKH[piece.keys], heads)
    out, lse = blocked_attention(q, k, v, causal=piece.causal, mask_BQS=piece.mask_BQS, scale=scale)
    return ungroup_queries(out), ungroup_queries(lse[..., None])[..., 0]


def _with_columns(x_BGQH: Tensor, *columns: Tensor | float) -> Tensor:
    """x with the columns (tensors [B, G, Q] or constants) appended to H, then zeros up to `_EXTRA_COLUMNS`."""
    out = F.pad(x_BGQH, (0, _EXTRA_COLUMNS))
    for i, column in enumerate(columns):
        out[..., x_BGQH.shape[-1] + i] = column
    return out


def _piece_grads(
    saved: tuple[Tensor, ...],
    grads: tuple[Tensor | None, Tensor | None],
    piece: Piece,
    heads: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq [Q, N, H], dk [S, K, H], dv [S, K, H]) of one piece from those of out and lse."""
    q_TNH, k_TKH, v_TKH, out_TNH, lse_TN = saved
    q, k, v = group_heads(q_TNH[piece.queries], k_TKH[piece.keys], v_TKH[piece.keys], heads)
    shape = q.shape[:2]

    def like_q(x_TNH: Tensor) -> Tensor:
        return x_TNH[piece.queries].unflatten(1, shape).permute(1, 2, 0, 3)

    out, lse = like_q(out_TNH), like_q(lse_TN[..., None])[..., 0]
    grad_out = torch.zeros_like(out) if grads[0] is None else like_q(grads[0])
    if grads[1] is not None:
        grad_lse = -like_q(grads[1][..., None])[..., 0]
        high = grad_lse.to(q.dtype)
        low = (grad_lse - high).to(q.dtype)
        q, k, v = (_with_columns(t) for t in (q, k, v))
        out, grad_out = _with_columns(out, 1.0, 1.0), _with_columns(grad_out, high, low)
    mask = None if piece.mask_BQS is None else piece.mask_BQS.expand(q.shape[0], -1, -1, -1)
    grads_BGSH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, piece.causal, attn_mask=mask, scale=scale
    )
    grad_q, grad_k, grad_v = (t[..., : q_TNH.shape[-1]] for t in grads_BGSH)
    num_kv_heads = k_TKH.shape[1]
    return (
        ungroup_queries(grad_q),
        _ungroup_kv(grad_k, heads, num_kv_heads),
        _ungroup_kv(grad_v, heads, num_kv_heads),
    )


class Attention(torch.autograd.Function):
    """Attention over a list of pieces, differentiable through out and lse; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        k_SKH: Tensor,
        v_SKH: Tensor,
        pieces: Sequence[Piece],
        heads: tuple[int, ...],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """(out [T, N, H] in q.dtype, lse [T, N] in the working dtype); every query belongs to one piece."""
        ctx.set_materialize_grads(False)
        out_TNH = q_TNH.new_empty(q_TNH.shape)
        lse_TN = q_TNH.new_empty(q_TNH.shape[:2], dtype=working_dtype(q_TNH.dtype))
        for piece in pieces:
            part = _attend_piece(q_TNH, k_SKH, v_SKH, piece, heads, scale)
            out_TNH[piece.queries], lse_TN[piece.queries] = part
        ctx.save_for_backward(q_TNH, k_SKH, v_SKH, out_TNH, lse_TN)
        ctx.pieces, ctx.heads, ctx.scale = pieces, heads, scale
        return out_TNH, lse_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v; keys shared by pieces add up in the order of the pieces."""
        saved = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in saved[:3])
        if grads[0] is not None or grads[1] is not None:
            for piece in ctx.pieces:
                dq, dk, dv = _piece_grads(saved, (grads[0], grads[1]), piece, ctx.heads, ctx.scale)
                grad_q[piece.queries] = dq
                grad_k[piece.keys] += dk
                grad_v[piece.keys] += dv
        return grad_q, grad_k, grad_v, None, None, None

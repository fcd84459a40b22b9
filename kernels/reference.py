"""The spec of every op, in plain torch: any float dtype (float64 for proofs), differentiable, any device.

Speed is not its business. `kernels.torch_ops`, the C++ and the CUDA kernels are compared with these
functions.

Shape letters: T packed tokens, B documents or chunks, D width, N query heads, K kv heads, H head dim, F ffn
width, V vocab, P pages, S slots per page, M block-table width, L prefix length. In `linear` alone K, N are
the two widths.

Head sharing (GQA): query head n reads kv head `kv_index[n]`. `kv_index=None` means the usual even sharing
`n // (N / K)`. A rank that holds query heads 5, 6 of a model with groups of three reads `kv_index=(0, 1)`.

Empty attention: a query that sees no key has `out = 0`, `lse = -inf`, and merging such a part changes
nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import Linear
from kernels.checks import Slopes, check_attention, check_kv_index, check_linear, check_options, working_dtype
from kernels.documents import Documents
from kernels.master import Master
from kernels.ops import LowRank, Packed, Part, Weight
from kernels.paged import PagedLayout


def linear(
    x_TK: Tensor,
    w_NK: Weight,
    bias_N: Tensor | None = None,
    updates: Sequence[LowRank] = (),
    *,
    wide: bool = False,
) -> Tensor:
    """`x @ w^T + bias`, plus each update on its rows -> [T, N] in x.dtype, or with `wide` in the working dtype.

    w and the factors have the dtype of x or are masters in its working dtype, rounded to the dtype of x first. What an
    update's first factor gives is rounded to x.dtype; how often the sum is rounded, a backend may choose.
    """
    return composed_linear(x_TK, w_NK, bias_N, updates, wide, _product)


def _product(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`x @ w^T + bias`; the gradient of a master in x's dtype can be put off."""
    if isinstance(w_NK, Master) and torch.is_grad_enabled():
        return Linear.apply(x_TK, w_NK, bias_N, F.linear, 0)
    return F.linear(x_TK, w_NK, bias_N)


def linears(x_TK: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """`linear` of one x with every part: a tuple of [T, N_i], which may be columns of one tensor."""
    return tuple(linear(x_TK, part.w_NK, part.bias_N, part.updates) for part in parts)


def composed_linear(
    x_TK: Tensor,
    w_NK: Weight,
    bias_N: Tensor | None,
    updates: Sequence[LowRank],
    wide: bool,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """`linear` out of plain products `product(x, w, bias)`."""
    check_linear(x_TK, w_NK, bias_N, updates)
    dtype = x_TK.dtype
    out = product(x_TK, _plain(w_NK, dtype), bias_N)
    if updates:
        parts, done = [], 0
        for update in updates:
            x = x_TK[update.start : update.stop] if update.x_TK is None else update.x_TK
            hidden = product(x, _plain(update.a_RK, dtype), None)
            low_rank = product(hidden, _plain(update.b_NR, dtype), None)
            parts += [out[done : update.start], out[update.start : update.stop] + low_rank]
            done = update.stop
        out = torch.cat([*parts, out[done:]])
    return out.to(working_dtype(dtype)) if wide else out


def _plain(w_NK: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(w_NK, Packed):
        raise ValueError("linear: the weight is packed for another backend")
    return w_NK.to(dtype)


def input_gradient(grad_TN: Tensor, w_NK: Weight) -> Tensor:
    """`grad @ w` -> [T, K] in the working dtype: the gradient of a linear's x. Not differentiable."""
    return (grad_TN @ _plain(w_NK, grad_TN.dtype)).to(working_dtype(grad_TN.dtype))


def add_weight_gradient(out_NK: Tensor, grad_TN: Tensor, x_TK: Tensor) -> None:
    """`out += grad^T x`, in place, out in the working dtype."""
    work = out_NK.dtype
    out_NK += grad_TN.to(work).t() @ x_TK.to(work)


def embedding(ids_T: Tensor, w_VD: Tensor, part: int | None = None) -> Tensor:
    """Rows `w[ids]` -> [T, D] in w.dtype; ids are int32 or int64.

    part: w is a part of a larger table and holds the rows from this id on; ids of the other parts give zeros.
    """
    if part is not None:
        return embedding_part(F.embedding, ids_T, w_VD, part)
    return F.embedding(ids_T, w_VD)


def embedding_part(gather: Callable[[Tensor, Tensor], Tensor], ids_T: Tensor, w_VD: Tensor, part: int) -> Tensor:
    """`embedding` of a part of a table by `gather(ids, w)`, which takes ids of its rows alone."""
    is_here = (ids_T >= part) & (ids_T < part + w_VD.shape[0])
    x_TD = gather(torch.where(is_here, ids_T - part, 0), w_VD)
    return torch.where(is_here[:, None], x_TD, 0.0)


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`w * (x / sqrt(mean(x^2) + eps))` -> [T, D] in x.dtype (arXiv:1910.07467, eq. 4).

    The normalised value is computed in float32 (float64 for float64) and rounded to x.dtype *before* it is
    multiplied by w, as transformers' LlamaRMSNorm does.
    """
    x = x_TD.to(working_dtype(x_TD.dtype))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return w_D * x.to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(x + delta, rms_norm(x + delta, w, eps))`, both [T, D] in x.dtype: a residual addition and the norm behind it.

    The sum is rounded to x.dtype before it is normed.
    """
    sum_TD = x_TD + delta_TD
    return sum_TD, rms_norm(sum_TD, w_D, eps)


def rotary_angles(position_T: Tensor, frequency: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, H] of int64 positions times float64 [H/2] frequencies, times `factor`, halves repeated.

    In the working dtype of activations in `dtype`; the angles themselves are float64 (a position's phase is then
    exact to 1e-11 at 100 000 tokens).
    """
    half = position_T.to(torch.float64)[:, None] * frequency
    angle, work = torch.cat((half, half), dim=-1), working_dtype(dtype)
    return (angle.cos() * factor).to(work), (angle.sin() * factor).to(work)


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotary embedding in the half-split ("neox") layout of transformers -> [T, N, H] in x.dtype.

    `x * cos + rotate_half(x) * sin` with `rotate_half(x1, x2) = (-x2, x1)` on the two halves of H
    (arXiv:2104.09864, eq. 34, with the pairs (i, i + H/2)). cos and sin repeat their halves; they are in the
    working dtype of x, float32 for bfloat16 too: the product is rounded once.
    """
    x = x_TNH.to(cos_TH.dtype)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos_TH[:, None] + rotated * sin_TH[:, None]).to(x_TNH.dtype)


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`silu(gate) * up` -> [T, F] in gate.dtype (SwiGLU, arXiv:2002.05202, sec. 2), rounded once."""
    work = working_dtype(gate_TF.dtype)
    return (F.silu(gate_TF.to(work)) * up_TF.to(work)).to(gate_TF.dtype)


def gelu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`gelu(gate) * up` -> [T, F] in gate.dtype (GEGLU, arXiv:2002.05202, sec. 2), rounded once.

    GELU by its tanh approximation (arXiv:1606.08415, sec. 2), which Gemma uses.
    """
    work = working_dtype(gate_TF.dtype)
    return (F.gelu(gate_TF.to(work), approximate="tanh") * up_TF.to(work)).to(gate_TF.dtype)


def log_softmax(logits_BV: Tensor) -> Tensor:
    """Log-probabilities over the last dim -> [B, V] in the working dtype (float32, or float64 for float64)."""
    return torch.log_softmax(logits_BV.to(working_dtype(logits_BV.dtype)), dim=-1)


def log_sum_exp(logits_BV: Tensor) -> Tensor:
    """`log(sum(exp(row)))` -> [B] in the working dtype. Not differentiable in the fast backends."""
    return torch.logsumexp(logits_BV.to(working_dtype(logits_BV.dtype)), dim=-1)


def loss_gradient(logits_BV: Tensor, lse_B: Tensor, target_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of `lse - logits[target]` by the logits -> [B, V], computed in their dtype and rounded to `dtype`.

    lse: of the whole vocabulary, of which these may be some columns. target: int64 columns, -1 where it isn't among
    them. Not differentiable. The logits are of no use afterwards: a backend may lay the gradient in their memory.
    """
    grad = (logits_BV - lse_B[:, None]).exp_()
    hit = (target_B >= 0).nonzero()[:, 0]
    grad[hit, target_B[hit]] -= 1
    return grad.to(dtype)


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """How the score of query and key comes from their product, besides the mask."""

    scale: float
    soft_cap: float | None = None
    slopes: Slopes | None = None

    def scores(self, q_TNH: Tensor, k_SNH: Tensor, distance_TS: Tensor | None) -> Tensor:
        """[N, T, S] in the working dtype of q; a key is `distance` before the query, None: it has no position."""
        work = working_dtype(q_TNH.dtype)
        scores = torch.einsum("tnh,snh->nts", q_TNH.to(work), k_SNH.to(work)) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        if self.slopes is None or distance_TS is None:
            return scores
        slopes = torch.as_tensor(self.slopes, dtype=work, device=scores.device)
        return scores - slopes[:, None, None] * distance_TS


def _attend(
    q_TNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, distance_TS: Tensor | None, window: int | None, scoring: _Scoring
) -> tuple[Tensor, Tensor]:
    """Dense attention of T queries over S keys, one key per query head: (out [T, N, H], lse [T, N]).

    `distance_TS` is how far each key is behind each query: those from 0 to window - 1 are seen, None means all.
    """
    scores = scoring.scores(q_TNH, k_SNH, distance_TS)
    if distance_TS is not None:
        hidden = distance_TS < 0 if window is None else (distance_TS < 0) | (distance_TS >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    out = torch.einsum("nts,snh->tnh", weights, v_SNH.to(scores.dtype))
    return out.to(q_TNH.dtype), lse.transpose(0, 1)


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
    alibi_slopes: Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each packed document -> (out [T, N, H] in q.dtype, lse [T, N] in the working dtype).

    `documents` are the bounds `cu_seqlens`, integers on the host `0 = c_0 <= c_1 <= ... <= c_B = T`: document b is
    rows c_b..c_{b+1}-1. Query i of a document sees keys j with `j <= i` and, with a window, `i - j < window`:

        no window   window=2
        1 0 0 0     1 0 0 0
        1 1 0 0     1 1 0 0
        1 1 1 0     0 1 1 0
        1 1 1 1     0 0 1 1

    `Documents` instead of bounds gives queries and keys of different numbers, and i their offset. With

        s_ij = scale * q_i.k_j                              the score,
        s_ij = soft_cap * tanh(scale * q_i.k_j / soft_cap)  with a cap (Gemma 2, arXiv:2408.00118, sec. 2),
        s_ij = ... - alibi_slopes[n] * (i - j)              with ALiBi (arXiv:2108.12409, sec. 3), slopes positive,

    `lse_i = log(sum_j exp(s_ij))`; both results are differentiable in q, k and v.
    """
    check_attention(q_TNH, k_SKH, v_SKH)
    heads = list(check_kv_index(q_TNH.shape[1], k_SKH.shape[1], kv_index))
    check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    scoring = _Scoring(scale=scale, soft_cap=soft_cap, slopes=alibi_slopes)
    outs, lses = [q_TNH[:0]], [q_TNH[:0, :, 0].to(working_dtype(q_TNH.dtype))]
    for queries, keys, offset in Documents.of(documents, q_TNH.shape[0], k_SKH.shape[0]).spans:
        i = torch.arange(queries.stop - queries.start, device=q_TNH.device)[:, None] + offset
        j = torch.arange(keys.stop - keys.start, device=q_TNH.device)
        out, lse = _attend(q_TNH[queries], k_SKH[keys, heads], v_SKH[keys, heads], i - j, window, scoring)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def attention_varlen_backward(
    grad_out_TNH: Tensor | None,
    grad_lse_TN: Tensor | None,
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    documents: Sequence[int] | Tensor | Documents,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq [T, N, H], dk, dv [S, K, H]) of `attention_varlen` with the same options; None counts as zero.

    out and lse may be those over more keys than are given, of which these are some (a step of ring attention,
    arXiv:2310.01889): dk and dv are then theirs, and dq is their part of a sum over all keys. With `P = exp(S - lse)`

        dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O) + dlse)         (arXiv:2205.14135, appendix B.4)

    which is the gradient of a merge (`autograd_merge`) of these keys' attention with that over all others.
    """
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q_TNH, k_SKH, v_SKH)]
        part, part_lse = attention_varlen(inputs[0], inputs[1], inputs[2], documents, **options)
    share = torch.exp(part_lse - torch.where(lse_TN.isneginf(), 0.0, lse_TN)).detach()
    wide = torch.zeros_like(part) if grad_out_TNH is None else grad_out_TNH
    wide = wide.to(lse_TN.dtype)
    grad_lse = (wide * (part.detach() - out_TNH)).sum(-1)
    if grad_lse_TN is not None:
        grad_lse = grad_lse + grad_lse_TN
    grads = ((share[..., None] * wide).to(part.dtype), share * grad_lse)
    grad_q, grad_k, grad_v = torch.autograd.grad((part, part_lse), inputs, grads, materialize_grads=True)
    return grad_q, grad_k, grad_v


def attention_prefix(
    q_TNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    *,
    kv_index: Sequence[int] | None = None,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Every query attends all L prefix entries -> (out [T, N, H], lse [T, N]), both differentiable.

    The prefix segment of P-tuning v2 (arXiv:2110.07602, sec. 3.2): no causal mask, no window and, as its entries have
    no positions, no ALiBi. L = 0 gives the empty attention. Merge with the document part by `merge_attention`.
    """
    check_attention(q_TNH, k_LKH, v_LKH)
    heads = list(check_kv_index(q_TNH.shape[1], k_LKH.shape[1], kv_index))
    check_options(q_TNH.shape[1], None, soft_cap, None)
    scoring = _Scoring(scale=scale, soft_cap=soft_cap)
    return _attend(q_TNH, k_LKH[:, heads], v_LKH[:, heads], None, None, scoring)


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets from (out [T, N, H], lse [T, N]) of each -> (out, lse).

    `lse = log(sum_i exp(lse_i))`, `out = sum_i exp(lse_i - lse) out_i`, summed in the order given (the merge
    of flash-decoding and of ring attention, arXiv:2310.01889, sec. 3). Parts that saw no key (lse = -inf)
    contribute exactly nothing.
    """
    work = working_dtype(parts[0][0].dtype)
    top = parts[0][1].detach()
    for _, lse in parts[1:]:
        top = torch.maximum(top, lse.detach())
    top = torch.where(top.isneginf(), 0.0, top)
    weights = [torch.exp(lse - top) for _, lse in parts]
    total = weights[0]
    out = weights[0][..., None] * parts[0][0].to(work)
    for weight, (part, _) in zip(weights[1:], parts[1:], strict=True):
        total = total + weight
        out = out + weight[..., None] * part.to(work)
    none_seen = total == 0
    out = out / torch.where(none_seen, 1.0, total)[..., None]
    lse = torch.log(torch.where(none_seen, 1.0, total)) + top
    return out.to(parts[0][0].dtype), torch.where(none_seen, -torch.inf, lse)


def write_pages(
    key_cache_PSKH: Tensor, value_cache_PSKH: Tensor, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor
) -> None:
    """Stores k and v of T tokens in place at flat slots `page * S + slot` (int64, all different)."""
    key_cache_PSKH.flatten(0, 1)[slots_T] = k_TKH.to(key_cache_PSKH.dtype)
    value_cache_PSKH.flatten(0, 1)[slots_T] = v_TKH.to(value_cache_PSKH.dtype)


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
    """`rotary(q)`; `rotary(k)` and v go into the pages as `write_pages` stores them. Not differentiable."""
    write_pages(key_cache_PSKH, value_cache_PSKH, rotary(k_TKH, cos_TH, sin_TH), v_TKH, slots_T)
    return rotary(q_TNH, cos_TH, sin_TH)


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
    alibi_slopes: Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the chunks of one serving step over their cached pages -> (out [T, N, H], lse [T, N]).

    The chunk's own keys and values are already in the cache (`write_pages` comes first). The query at
    position p of its request sees the positions `j <= p` (and `p - j < window`) of its request and every
    entry of its prefix segment, if the chunk has one: neither the window nor ALiBi applies to the prefix. Scores as in
    `attention_varlen`. Not differentiable in the fast backends.
    """
    check_attention(q_TNH, key_cache_PSKH, value_cache_PSKH)
    heads = list(check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index))
    check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    scoring = _Scoring(scale=scale, soft_cap=soft_cap, slopes=alibi_slopes)
    out_TNH = torch.zeros_like(q_TNH)
    lse_TN = q_TNH.new_zeros(q_TNH.shape[:2], dtype=working_dtype(q_TNH.dtype))
    keys, values = key_cache_PSKH.flatten(0, 1), value_cache_PSKH.flatten(0, 1)
    for b in range(len(layout.kv_lengths)):
        rows = slice(layout.query_starts[b], layout.query_starts[b + 1])
        slots, length = layout.slots(b), layout.kv_lengths[b]
        i = torch.arange(length - (rows.stop - rows.start), length, device=q_TNH.device)[:, None]
        j = torch.arange(length, device=q_TNH.device)
        part = _attend(q_TNH[rows], keys[slots][:, heads], values[slots][:, heads], i - j, window, scoring)
        if layout.prefix_lengths[b]:
            slots = layout.slots(b, prefix=True)
            key, value = keys[slots][:, heads], values[slots][:, heads]
            part = merge_attention((_attend(q_TNH[rows], key, value, None, None, scoring), part))
        out_TNH[rows], lse_TN[rows] = part
    return out_TNH, lse_TN

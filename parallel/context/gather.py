"""Attention across context ranks by gathering keys and values (arXiv:2407.21783, sec. 3.3.2; Megatron-LM's all_gather).

    forward     all-gather of the tails' keys and values     each rank then attends in one call of the kernel
    backward    reduce-scatter of their gradients

With few KV heads this is the cheapest to do: 2 * tails * K/tp * H elements each way, but it isn't hidden behind the
computation, and a rank holds the keys of all tails at once.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops import Ops
from parallel import comm
from parallel.comm import Group
from parallel.context.plan import Part, Route
from parallel.context.tails import add_tails, tails


def attend(
    ops: Ops, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, route: Route, ring: Group, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out [T, N, H], lse [T, N]) of this rank's queries over all keys of their documents; options are the kernel's."""
    return _Gathered.apply(q_TNH, k_TKH, v_TKH, ops, route, ring, options)  # type: ignore[no-any-return]


Pieces = list[tuple[range, list[tuple[int, Part]]]]


def _order(route: Route) -> Pieces:
    """For each document on this rank: its own tokens, and the parts (with their rank) whose keys come before them."""
    first: dict[int, list[tuple[int, Part]]] = {}
    for rank, parts in enumerate(route.parts):
        for part in parts:
            first.setdefault(part.queries.start, []).append((rank, part))
    return [
        (range(start, stop), sorted(first.get(start, []), key=lambda item: item[1].source))
        for start, stop in pairwise(route.bounds)
    ]


def _documents(route: Route, pieces: Pieces) -> Documents:
    pasts = [sum(len(part.keys) for _, part in before) for _, before in pieces]
    keys = [0]
    for (tokens, _), past in zip(pieces, pasts, strict=True):
        keys.append(keys[-1] + past + len(tokens))
    return Documents(query_bounds=route.bounds, key_bounds=tuple(keys), offsets=tuple(pasts))


class _Gathered(torch.autograd.Function):
    """Gathering and attention in one: a rank without tokens takes part in both directions too."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        ops: Ops,
        route: Route,
        ring: Group,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        pieces = _order(route)
        starts = [0, *accumulate(route.sizes)]
        rows: list[tuple[slice, bool]] = []  # of the gathered tails (True) or of this rank's own tokens
        for tokens, before in pieces:
            rows += [(slice(starts[r] + p.keys.start, starts[r] + p.keys.stop), True) for r, p in before]
            rows.append((slice(tokens.start, tokens.stop), False))
        own = (k_TKH, v_TKH)
        gathered = comm.all_gather(tails(route, *own), ring, route.sizes, 1)
        keys, values = (
            torch.cat([x[:0], *(far[some] if is_far else x[some] for some, is_far in rows)])
            for x, far in zip(own, gathered, strict=True)
        )
        documents = _documents(route, pieces)
        out_TNH, lse_TN = ops.attention_varlen(q_TNH, keys, values, documents, **options)
        ctx.save_for_backward(q_TNH, keys, values, out_TNH, lse_TN)
        ctx.ops, ctx.route, ctx.ring, ctx.options = ops, route, ring, options
        ctx.rows, ctx.documents, ctx.shape = rows, documents, k_TKH.shape
        return out_TNH, lse_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        route: Route = ctx.route
        grad_q, *grad_kv = ctx.ops.attention_varlen_backward(*grads, *ctx.saved_tensors, ctx.documents, **ctx.options)
        found = grad_q.new_empty((2, *ctx.shape))
        far = grad_q.new_zeros((2, sum(route.sizes), *ctx.shape[1:]))
        at = 0
        for rows, is_far in ctx.rows:
            stop = at + rows.stop - rows.start
            for i, grad in enumerate(grad_kv):
                if is_far:
                    far[i, rows] += grad[at:stop]
                else:
                    found[i, rows] = grad[at:stop]
            at = stop
        add_tails(route, found, comm.reduce_scatter(far, ctx.ring, route.sizes, 1))
        return grad_q, found[0], found[1], None, None, None, None

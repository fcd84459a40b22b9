"""Ring attention (arXiv:2310.01889): keys and values go round the context ranks while they attend to them.

In step s a rank attends to the keys of the rank s places before it, having sent them on already. It keeps (out, lse)
of each step and merges them in the order of the keys; nothing that the causal mask, a document's border or the window
hides is computed, and keys that no rank further on needs are not sent on.

    step      0           1           2           3 (ring=4)
    rank 0    own         keys of 3   keys of 2   keys of 1
    rank 1    own         keys of 0   keys of 3   keys of 2

The backward pass sends the keys round again and recomputes the weights from the merged lse: with it and the merged out
the gradient of a part of the keys is that of the whole (arXiv:2205.14135, appendix B.4). The gradient of keys and
values follows them one step behind, each rank adding its own, in float32 at least; the last one sends it home.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops import Ops
from parallel import comm
from parallel.comm import Group, Pending
from parallel.context.plan import Part, Route
from parallel.context.tails import add_tails, tails


def attend(
    ops: Ops, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, route: Route, ring: Group, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out [T, N, H], lse [T, N]) of this rank's queries over all keys of their documents; options are the kernel's.

    Sends at most 2 * (tokens of its tails) * K/tp * H elements a step forward, that and their gradient backward.
    """
    return _Ring.apply(q_TNH, k_TKH, v_TKH, _Run(ops, route, ring, options))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Run:
    ops: Ops
    route: Route
    ring: Group
    options: dict[str, Any]

    def source(self, step: int) -> int:
        """The rank whose keys are here in this step."""
        return (self.ring.rank - step) % self.ring.size

    @property
    def following(self) -> int:
        """The rank that keys are sent on to."""
        return (self.ring.rank + 1) % self.ring.size

    def send_on(self, held: Tensor, step: int) -> list[Pending]:
        """Begins sending the keys of this step on, if anyone further on needs them."""
        if step >= self.route.reach[self.source(step)]:
            return []
        return [comm.send_start(held, self.ring, self.following)]

    def receive(self, step: int, like: Tensor) -> Tensor:
        """The keys of this step, from the rank before; nothing if they don't come as far as here."""
        source = self.source(step)
        if step == self.ring.size or step > self.route.reach[source]:
            return like[:, :0]
        held = like.new_empty((2, self.route.sizes[source], *like.shape[2:]))
        comm.receive(held, self.ring, self.source(1))
        return held


def _one(part: Part) -> Documents:
    return Documents(query_bounds=(0, len(part.queries)), key_bounds=(0, len(part.keys)), offsets=(part.offset,))


def _rows(rows: range) -> slice:
    return slice(rows.start, rows.stop)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, run: _Run) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ops, route = run.ops, run.route
        held = tails(route, k_TKH, v_TKH)
        sends = run.send_on(held, 0)
        out_TNH, lse_TN = ops.attention_varlen(q_TNH, k_TKH, v_TKH, route.bounds, **run.options)
        found: list[tuple[Part, Tensor, Tensor]] = []
        for step in range(run.ring.size):
            if step:
                sends += run.send_on(held, step)
            for part in route.parts[run.source(step)]:
                k, v = held[:, _rows(part.keys)]
                q = q_TNH[_rows(part.queries)]
                found.append((part, *ops.attention_varlen(q, k, v, _one(part), **run.options)))
            held = run.receive(step + 1, held)
        for pending in sends:
            pending.wait()
        _merge(ops, out_TNH, lse_TN, found)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, out_TNH, lse_TN)
        ctx.run = run
        return out_TNH, lse_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, out_TNH, lse_TN = ctx.saved_tensors
        run: _Run = ctx.run
        route, ring = run.route, run.ring
        held = tails(route, k_TKH, v_TKH)
        sends = run.send_on(held, 0)

        def gradients(rows: slice, k: Tensor, v: Tensor, documents: Any) -> tuple[Tensor, ...]:
            own = [None if grad is None else grad[rows] for grad in grads]
            saved = (q_TNH[rows], k, v, out_TNH[rows], lse_TN[rows])
            return run.ops.attention_varlen_backward(*own, *saved, documents, **run.options)

        first = gradients(slice(None), k_TKH, v_TKH, route.bounds)
        grad_q, grad_own = first[0].to(lse_TN.dtype), torch.stack(first[1:]).to(lse_TN.dtype)
        home = torch.zeros_like(held, dtype=lse_TN.dtype)  # of this rank's tails
        for step in range(ring.size):
            source = run.source(step)
            if step:
                sends += run.send_on(held, step)
            grad_kv = torch.zeros_like(held, dtype=lse_TN.dtype)
            for part in route.parts[source]:
                keys, rows = _rows(part.keys), _rows(part.queries)
                dq, dk, dv = gradients(rows, held[0, keys], held[1, keys], _one(part))
                grad_q[rows] += dq
                grad_kv[:, keys] += torch.stack((dk, dv))
            if step == 0:
                home += grad_kv
            elif step <= route.reach[source]:
                if step > 1:
                    before = torch.empty_like(grad_kv)
                    comm.receive(before, ring, run.source(1))
                    grad_kv += before
                to = run.following if step < route.reach[source] else source
                sends.append(comm.send_start(grad_kv, ring, to))
            held = run.receive(step + 1, held)
        if route.reach[ring.rank]:
            others = torch.empty_like(home)
            comm.receive(others, ring, (ring.rank + route.reach[ring.rank]) % ring.size)
            home += others
        for pending in sends:
            pending.wait()
        add_tails(route, grad_own, home)
        grad_k, grad_v = grad_own.to(k_TKH.dtype)
        return grad_q.to(q_TNH.dtype), grad_k, grad_v, None


def _merge(ops: Ops, out_TNH: Tensor, lse_TN: Tensor, found: list[tuple[Part, Tensor, Tensor]]) -> None:
    """Merges the parts into the attention over the rank's own keys, in place, in the order of the keys.

    Parts over keys further back may have fewer queries (a window): runs of queries with the same parts go together.
    """
    found = sorted(found, key=lambda item: item[0].source)
    for start in {part.queries.start for part, _, _ in found}:
        here = [item for item in found if item[0].queries.start == start]
        stops = sorted({part.queries.stop for part, _, _ in here})
        for first, last in pairwise([start, *stops]):
            members = [
                (out[first - start : last - start], lse[first - start : last - start])
                for part, out, lse in here
                if part.queries.stop >= last
            ]
            rows = slice(first, last)
            out_TNH[rows], lse_TN[rows] = ops.merge_attention((*members, (out_TNH[rows], lse_TN[rows])))

"""Attention of one context rank's tokens: in place of a kernel over whole documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from kernels.ops import Ops
from parallel.comm import Group
from parallel.context import gather, ring
from parallel.context.plan import Plan, Route
from parallel.context.ulysses import Swap, to_heads, to_tokens

Method = Literal["ring", "all_gather", "ulysses"]


@dataclass(frozen=True)
class ContextAttention:
    """Attention inside the documents of a pack whose tokens `plan` shares among ranks; collective over both groups."""

    plan: Plan
    method: Method
    """How the ring's ranks attend to each other's keys; ulysses: as a ring, between groups that swap heads."""
    ring: Group
    ulysses: Group
    _routes: dict[int | None, Route] = field(default_factory=dict, repr=False, compare=False)

    def __call__(
        self,
        ops: Ops,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        *,
        kv_index: Sequence[int],
        window: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """(out [T, N/tp, H], lse [T, N/tp]) of this rank's tokens; differentiable in q, k and v, which are turned.

        The options are those of `attention_varlen`.
        """
        if self.ulysses.size == 1:
            return self._attend(ops, (q_TNH, k_TKH, v_TKH), {**options, "kv_index": kv_index, "window": window})
        swap = Swap(self.ulysses, self.plan.sizes(self.ring.rank), kv_index)
        if options.get("alibi_slopes") is not None:
            options = {**options, "alibi_slopes": options["alibi_slopes"][swap.heads[self.ulysses.rank]]}
        inputs = to_heads(q_TNH, k_TKH, v_TKH, swap)
        found = self._attend(ops, inputs, {**options, "kv_index": swap.kv_index_here, "window": window})
        return to_tokens(*found, swap)

    def _attend(
        self, ops: Ops, inputs: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        route = self._route(options["window"])
        if not sum(route.sizes):  # no document is on several ranks
            return ops.attention_varlen(*inputs, route.bounds, **options)
        attend = gather.attend if self.method == "all_gather" else ring.attend
        return attend(ops, *inputs, route, self.ring, options)

    def _route(self, window: int | None) -> Route:
        if window not in self._routes:
            self._routes[window] = self.plan.route(self.ring.rank, window)
        return self._routes[window]

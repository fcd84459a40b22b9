"""Heads for tokens and back (DeepSpeed-Ulysses, arXiv:2309.14509): around attention each rank has all tokens of the
group and some of the heads, elsewhere all heads and some of the tokens.

    region       forward                       backward
    to_heads     all-to-all tokens -> heads    all-to-all heads -> tokens, summed over ranks that read one KV head
    to_tokens    all-to-all heads -> tokens    all-to-all tokens -> heads

A rank with T tokens in a group of u sends (N + 2 K) / tp * H * T * (u - 1) / u elements before attention and
N / tp * H * T * (u - 1) / u behind it. Query heads are cut as evenly as they go and needn't divide; a KV head goes to
every rank whose query heads read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Group
from parallel.sharding import partition


@dataclass(frozen=True)
class Swap:
    """Who of the group has which tokens, query heads and KV heads (of those on this tensor rank)."""

    group: Group
    sizes: Sequence[int]
    """Tokens of each rank."""
    kv_index: Sequence[int]
    """KV head of every query head, ascending."""

    @property
    def heads(self) -> list[slice]:
        """Query heads of each rank."""
        return [slice(*ends) for ends in pairwise(partition(len(self.kv_index), self.group.size))]

    @property
    def kv_heads(self) -> list[slice]:
        """KV heads that each rank's query heads read."""
        return [slice(self.kv_index[h.start], self.kv_index[h.stop - 1] + 1) for h in self.heads]

    @property
    def kv_index_here(self) -> tuple[int, ...]:
        """For this rank's query heads, the KV head among its own."""
        heads, kv = self.heads[self.group.rank], self.kv_heads[self.group.rank]
        return tuple(index - kv.start for index in self.kv_index[heads])

    @property
    def widths(self) -> list[int]:
        """Of each rank: its query heads, and twice its KV heads."""
        return [h.stop - h.start + 2 * (kv.stop - kv.start) for h, kv in zip(self.heads, self.kv_heads, strict=True)]

    def collect(self, parts: Sequence[Tensor], width: int) -> Tensor:
        """Tokens of all ranks [group's T, width, ...] from what each has for this one."""
        shapes = [(size, width, *parts[0].shape[2:]) for size in self.sizes]
        return torch.cat(comm.all_to_all(parts, self.group, shapes))

    def hand_out(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """This rank's tokens [T, widths[r], ...] from each rank; x: all tokens, its own heads."""
        size = self.sizes[self.group.rank]
        return comm.all_to_all(x.split(list(self.sizes)), self.group, [(size, w, *x.shape[2:]) for w in widths])


def to_heads(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, swap: Swap) -> tuple[Tensor, Tensor, Tensor]:
    """All the group's tokens of this rank's heads, from all heads of its tokens."""
    return _ToHeads.apply(q_TNH, k_TKH, v_TKH, swap)  # type: ignore[no-any-return]


def to_tokens(out_TNH: Tensor, lse_TN: Tensor, swap: Swap) -> tuple[Tensor, Tensor]:
    """All heads of this rank's tokens, from all the group's tokens of its heads."""
    return _ToTokens.apply(out_TNH, lse_TN, swap)  # type: ignore[no-any-return]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, swap: Swap) -> tuple[Tensor, Tensor, Tensor]:
        ctx.swap, ctx.num_kv_heads = swap, k_TKH.shape[1]
        parts = [
            torch.cat((q_TNH[:, heads], k_TKH[:, kv], v_TKH[:, kv]), 1)
            for heads, kv in zip(swap.heads, swap.kv_heads, strict=True)
        ]
        return _split(swap.collect(parts, swap.widths[swap.group.rank]), swap.kv_heads[swap.group.rank])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        swap: Swap = ctx.swap
        received = swap.hand_out(torch.cat(grads, 1), swap.widths)
        like = received[0]
        work = torch.float64 if like.dtype == torch.float64 else torch.float32
        queries, shape = [], (like.shape[0], ctx.num_kv_heads, like.shape[2])
        keys, values = like.new_zeros(shape, dtype=work), like.new_zeros(shape, dtype=work)
        for part, kv in zip(received, swap.kv_heads, strict=True):  # a KV head may come from several ranks
            dq, dk, dv = _split(part, kv)
            queries.append(dq)
            keys[:, kv] += dk
            values[:, kv] += dv
        return torch.cat(queries, 1), keys.to(like.dtype), values.to(like.dtype), None


def _split(x: Tensor, kv: slice) -> tuple[Tensor, Tensor, Tensor]:
    count = kv.stop - kv.start
    return x[:, : x.shape[1] - 2 * count], x[:, -2 * count : -count], x[:, -count:]


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_TNH: Tensor, lse_TN: Tensor, swap: Swap) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.swap = swap
        heads = [h.stop - h.start for h in swap.heads]
        # lse travels as further columns of out, whatever type these have
        bits = lse_TN.contiguous()[..., None].view(out_TNH.dtype)
        whole = torch.cat(swap.hand_out(torch.cat((out_TNH, bits), -1), heads), 1)
        out, lse = whole.split([out_TNH.shape[-1], bits.shape[-1]], -1)
        return out.contiguous(), lse.contiguous().view(lse_TN.dtype)[..., 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        swap: Swap = ctx.swap
        width = swap.heads[swap.group.rank].stop - swap.heads[swap.group.rank].start
        found = [
            None if grad is None else swap.collect([grad[:, heads] for heads in swap.heads], width) for grad in grads
        ]
        return *found, None

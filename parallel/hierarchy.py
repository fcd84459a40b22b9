"""Collectives of a group over several hosts: shared memory inside a host, the network between the hosts' first ranks.

    all_reduce    reduce in the host -> all-reduce between the first ranks -> broadcast in the host
    all_gather    gather in the host -> gather between the first ranks     -> broadcast in the host

So a value crosses the network once for each host, not once for each rank. Sums are taken in rank order inside a host,
then over the hosts: another order than on one host, but the same on every rank and, by `sum_in_rank_order`, for every
place in the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.shared_memory import SharedMemory
from parallel.hosts import Hosts


class Work(Protocol):
    """An operation under way."""

    def wait(self) -> object:
        """Blocks until it is complete."""


class Transport(Protocol):
    """A group's collectives; ranks are places in the group. Failures are RuntimeErrors. Tensors are contiguous, except
    what is scattered or gathered."""

    def all_reduce(self, x: Tensor, op: str) -> None:
        """Reduces `x` in place by `sum` or `max`."""

    def all_reduce_start(self, x: Tensor) -> Work | None:
        """Begins a sum in place; None when it is complete."""

    def sum_in_rank_order(self, x: Tensor) -> None:
        """Sums in place; an entry's bits don't depend on its place."""

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's part along dim 0 of the sum of `x`; `sizes` are the parts' lengths."""
        ...

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The ranks' `x` side by side along `dim`; `sizes` are their lengths."""
        ...

    def broadcast(self, x: Tensor, source: int) -> None:
        """Overwrites `x` with that of `source`."""

    def barrier(self) -> None:
        """Returns once every rank has called it."""

    def send(self, x: Tensor, to: int) -> Work | None:
        """Begins sending `x`; None when `x` may change."""

    def receive(self, x: Tensor, source: int) -> Work | None:
        """Begins receiving into `x`, or waits for it; None when it is there."""

    def receive_start(self, x: Tensor, source: int) -> Work | None:
        """Begins receiving into `x` without waiting."""


def by_rows(
    gather: Callable[[Tensor, Sequence[int], int], Tensor], x: Tensor, sizes: Sequence[int], dim: int
) -> Tensor:
    """A gather along `dim` by one along dim 0: each rank's x in one piece."""
    before, rest = x.shape[:dim], x.shape[dim + 1 :]
    counts = [math.prod(before) * size for size in sizes]
    parts = gather(x.reshape(math.prod(x.shape[: dim + 1]), *rest), counts, 0).split(counts)
    return torch.cat([part.view(*before, size, *rest) for part, size in zip(parts, sizes, strict=True)], dim)


@dataclass(frozen=True)
class Hierarchy:
    """A `Transport` over several hosts, some of which have several ranks of the group."""

    place: int
    hosts: Hosts
    network: Transport
    """Of all ranks: messages between hosts."""
    leaders: Transport | None
    """Of the hosts' first ranks, on those."""

    @property
    def _memory(self) -> SharedMemory | None:
        return self.hosts.memory

    def all_reduce(self, x: Tensor, op: str) -> None:
        """Reduces inside the hosts, then between them."""
        if self._memory is not None:
            self._memory.all_reduce(x, op)
        if self.leaders is not None:
            self.leaders.all_reduce(x, op)
        self._spread(x)

    def all_reduce_start(self, x: Tensor) -> None:
        """The sum, at once."""
        self.all_reduce(x, "sum")

    def sum_in_rank_order(self, x: Tensor) -> None:
        """Sums inside the hosts in rank order, then their sums in the order of the hosts."""
        if self._memory is not None:
            self._memory.all_reduce(x, "sum")
        if self.leaders is not None:
            self.leaders.sum_in_rank_order(x)
        self._spread(x)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's part of the whole sum, which every host gets."""
        total = x.clone(memory_format=torch.contiguous_format)
        self.all_reduce(total, "sum")
        return total.split(list(sizes))[self.place].clone()

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Gathers inside the hosts, then between them; every host gets the whole once."""
        if dim:
            return by_rows(self.all_gather, x, sizes, dim)
        by_host = [[sizes[place] for place in places] for places in self.hosts.places]
        part = x if self._memory is None else self._memory.all_gather(x, by_host[self.hosts.here], 0)
        whole = x.new_empty((sum(sizes), *x.shape[1:]))
        if self.leaders is not None:
            whole = self.leaders.all_gather(part, [sum(theirs) for theirs in by_host], 0)
        self._spread(whole)
        order = [place for places in self.hosts.places for place in places]
        if order == sorted(order):
            return whole
        parts = dict(zip(order, whole.split([sizes[place] for place in order]), strict=True))
        return torch.cat([parts[place] for place in sorted(parts)])

    def broadcast(self, x: Tensor, source: int) -> None:
        """Inside the source's host, between the hosts' first ranks, inside the others."""
        origin = next(i for i, places in enumerate(self.hosts.places) if source in places)
        if self._memory is not None and self.hosts.here == origin:
            self._memory.broadcast(x, self.hosts.places[origin].index(source))
        if self.leaders is not None:
            self.leaders.broadcast(x, origin)
        if self.hosts.here != origin:
            self._spread(x)

    def barrier(self) -> None:
        """Inside the hosts, between them, and inside them again."""
        if self._memory is not None:
            self._memory.barrier()
        if self.leaders is not None:
            self.leaders.barrier()
        if self._memory is not None:
            self._memory.barrier()

    def send(self, x: Tensor, to: int) -> Work | None:
        """Through memory or the network, by where `to` is."""
        way, to = self._way(to)
        return way.send(x, to)

    def receive(self, x: Tensor, source: int) -> Work | None:
        """Through memory or the network, by where `source` is."""
        way, source = self._way(source)
        return way.receive(x, source)

    def receive_start(self, x: Tensor, source: int) -> Work | None:
        """Through memory or the network, by where `source` is."""
        way, source = self._way(source)
        return way.receive_start(x, source)

    def _way(self, place: int) -> tuple[Transport, int]:
        mine = self.hosts.places[self.hosts.here]
        if self._memory is not None and place in mine:
            return self._memory, mine.index(place)
        return self.network, place

    def _spread(self, x: Tensor) -> None:
        if self._memory is not None:
            self._memory.broadcast(x, 0)

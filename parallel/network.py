"""torch.distributed as a transport: gloo between hosts, and NCCL for tensors on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.hierarchy import Work, by_rows


@dataclass(frozen=True)
class Network:
    """torch.distributed as a `Transport`."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    def exchange(self, record: bytes) -> list[bytes]:
        """Every rank's record; all of one length."""
        mine = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        return [bytes(x.numpy()) for x in self._gather(mine)]

    def all_reduce(self, x: Tensor, op: str) -> None:
        """In a ring's order: an entry's bits depend on its place."""
        dist.all_reduce(x, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)

    def all_reduce_start(self, x: Tensor) -> Work | None:
        """A sum by the group's own threads."""
        return dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group, async_op=True)

    def sum_in_rank_order(self, x: Tensor) -> None:
        """Of two ranks any all-reduce is that. More gather everything and add it themselves, in float32 at least:
        (size - 1) * bytes in, where a ring moves about 2 * bytes."""
        if len(self.ranks) == 2:
            return self.all_reduce(x, "sum")
        parts = self._gather(x)
        total = parts[0].float() if x.dtype in (torch.bfloat16, torch.float16) else parts[0]
        for part in parts[1:]:
            total += part
        x.copy_(total)
        return None

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Of unequal parts one of the all-reduced whole: gloo scatters equal ones only."""
        x = x.contiguous()
        if len(set(sizes)) == 1:
            out = x.new_empty((sizes[0], *x.shape[1:]))
            # the older name warns since torch 2.13
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            scatter(out, x, group=self.group)
            return out
        total = x.clone()
        self.all_reduce(total, "sum")
        return total.split(list(sizes))[self.group.rank()].clone()

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Unequal parts travel padded to the longest one: gloo gathers equal ones only."""
        if dim:
            return by_rows(self.all_gather, x, sizes, dim)
        x = x.contiguous()
        if len(set(sizes)) == 1:
            out = x.new_empty((sum(sizes), *x.shape[1:]))
            dist.all_gather(list(out.split(list(sizes))), x, group=self.group)
            return out
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        return torch.cat([part[:size] for part, size in zip(self._gather(padded), sizes, strict=True)])

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in self.ranks]
        dist.all_gather(parts, x, group=self.group)
        return parts

    def broadcast(self, x: Tensor, source: int) -> None:
        """Overwrites `x` with that of `source`."""
        dist.broadcast(x, self.ranks[source], group=self.group)

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        dist.barrier(group=self.group)

    def send(self, x: Tensor, to: int) -> Work | None:
        """Keep `x` until it is sent."""
        return dist.isend(x, self.ranks[to], group=self.group) if x.is_cpu else self._together((dist.isend, x, to))

    def receive(self, x: Tensor, source: int) -> Work | None:
        """Begins receiving into `x`."""
        way = dist.irecv
        return way(x, self.ranks[source], group=self.group) if x.is_cpu else self._together((way, x, source))

    def receive_start(self, x: Tensor, source: int) -> Work | None:
        """As `receive`."""
        return self.receive(x, source)

    def exchange_start(self, x: Tensor, to: int, y: Tensor, source: int) -> Work:
        """Begins both at once."""
        return self._together((dist.isend, x, to), (dist.irecv, y, source))

    def _together(self, *operations: tuple[Callable[..., object], Tensor, int]) -> Work:
        # NCCL has another communicator for what isn't in a batch: both sides must do alike, so GPUs do all in batches
        batch = [dist.P2POp(way, x, self.ranks[peer], self.group) for way, x, peer in operations]
        return _All(dist.batch_isend_irecv(batch))


@dataclass(frozen=True)
class _All:
    """Several operations under way."""

    works: Sequence[Work]

    def wait(self) -> None:
        """Blocks until all are complete."""
        for work in self.works:
            work.wait()

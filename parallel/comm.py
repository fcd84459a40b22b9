"""The only module that talks to torch.distributed: groups of ranks and counted collectives.

A `Group` is a value: who takes part, where this rank stands, and the handle of the process group (None when
the group has one rank: every collective is then a no-op and needs no initialised process group). Each call is
entered in the mesh's `Traffic`, so that tests and reports can say which collectives ran, on which axis, with
how many bytes.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported after `start`, its default arguments would keep the group for ever
from torch import Tensor


class PeerLost(RuntimeError):
    """A collective failed because a rank of its group is gone or unreachable."""


@dataclass
class Traffic:
    """Calls and payload bytes (this rank's input) by (operation, axis); the mesh owns the only mutable copy."""

    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    bytes: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, op: str, axis: str, num_bytes: int) -> None:
        """Counts one call of `op` over `axis` with `num_bytes` of payload."""
        key = (op, axis)
        self.calls[key] = self.calls.get(key, 0) + 1
        self.bytes[key] = self.bytes.get(key, 0) + num_bytes

    def clear(self) -> None:
        """Starts counting afresh."""
        self.calls.clear()
        self.bytes.clear()


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other: `ranks` are global, `rank` is this one's place among them."""

    axis: str
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    handle: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the group's first."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank is the group's last."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process: its global rank, the number of ranks, its place on the host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this host."""

    @staticmethod
    def from_environment() -> Launch:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (set by torchrun); a plain process is rank 0 of 1."""
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return Launch(*(int(os.environ.get(name, default)) for name, default in defaults.items()))


def start(launch: Launch, timeout_s: float = 1800.0, init_method: str | None = None) -> None:
    """Joins the job's process group (gloo on CPU, NCCL beside it where a GPU is); nothing to do for one rank."""
    if launch.world_size == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def device(launch: Launch) -> torch.device:
    """Where this rank computes: the host's GPU of its local rank, the CPU when there is none."""
    if launch.local_rank < torch.cuda.device_count():
        return torch.device("cuda", launch.local_rank)
    return torch.device("cpu")


TELL_S = 15.0
"""Seconds that the ranks with nothing to say leave to the one that has; it usually ends them far sooner."""


def tell(launch: Launch, error: Exception) -> None:
    """Prints a user's mistake once a host: rank 0 as it is, the first rank of another host with its name.

    The other ranks wait: a launcher ends all ranks when one has failed, and the message must be out before that.
    """
    if launch.local_rank == 0:
        where = "" if launch.rank == 0 else f"[rank {launch.rank} on {socket.gethostname()}] "
        print(f"{where}{error}", file=sys.stderr, flush=True)
    else:
        time.sleep(TELL_S)


def stop() -> None:
    """Leaves the process group, if one was joined; call it when no mesh or engine is referred to any more.

    The group's threads end with the last reference to it. One that still runs when Python shuts down can abort the
    process: it lets go of a collective's tensors a moment after the collective is complete, and needs Python's lock
    for that. Nothing may therefore keep a group in a global, a signal handler or a parameter's hook.
    """
    if dist.is_initialized():
        gc.collect()  # modules and autograd contexts refer to groups in cycles
        dist.destroy_process_group()


def new_handle(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """A process group of `ranks`; every rank of the job must call this in the same order. None for one rank."""
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    handle = dist.new_group(list(ranks))
    return handle if isinstance(handle, dist.ProcessGroup) else None


@contextmanager
def _named(op: str, group: Group, peer: int | None = None) -> Iterator[None]:
    """Turns a transport failure into one that names the operation, the axis and the peers (`peer`: a place among
    the group's ranks, where only one takes part)."""
    try:
        yield
    except RuntimeError as error:
        others = [rank for rank in group.ranks if rank != group.ranks[group.rank]]
        peers = others if peer is None else [group.ranks[peer]]
        who = f"rank {peers[0]}" if len(peers) == 1 else f"one of the ranks {peers}"
        raise PeerLost(
            f"[rank {group.ranks[group.rank]} on {socket.gethostname()}] {op} over the {group.axis} axis failed: "
            f"lost {who} ({str(error).splitlines()[0]})"
        ) from error


def sum_in_rank_order(x: Tensor, group: Group) -> Tensor:
    """The ranks' sum of contiguous `x`, added in rank order: the bits of an entry don't depend on its place.

    Of two ranks any all-reduce is that; a ring over more starts each part of the buffer at another rank. So more
    ranks gather everything and add it themselves: (size - 1) * bytes in, where a ring moves about 2 * bytes.
    """
    if group.size <= 2:
        return all_reduce(x, group)
    group.traffic.add("all_gather", group.axis, x.nbytes)
    parts = [torch.empty_like(x) for _ in group.ranks]
    with _named("all_gather", group):
        dist.all_gather(parts, x, group=group.handle)
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """Reduces contiguous `x` in place over the group (`sum` or `max`) and returns it."""
    if group.size == 1:
        return x
    group.traffic.add("all_reduce", group.axis, x.nbytes)
    with _named("all_reduce", group):
        dist.all_reduce(x, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group.handle)
    return x


@dataclass(frozen=True)
class Pending:
    """A collective under way; `wait()` before touching the tensor again."""

    op: str
    group: Group
    work: dist.Work | None
    keep: Tensor | None = None  # a send's buffer must outlive the transfer
    peer: int | None = None

    def wait(self) -> None:
        """Blocks until the operation is complete on this rank."""
        if self.work is not None:
            with _named(self.op, self.group, self.peer):
                self.work.wait()


def all_reduce_start(x: Tensor, group: Group) -> Pending:
    """Begins a sum of contiguous `x` in place over the group."""
    if group.size == 1:
        return Pending("all_reduce", group, None)
    group.traffic.add("all_reduce", group.axis, x.nbytes)
    with _named("all_reduce", group):
        work = dist.all_reduce(x, dist.ReduceOp.SUM, group=group.handle, async_op=True)
    return Pending("all_reduce", group, work)


def all_gather(x: Tensor, group: Group, sizes: Sequence[int], dim: int) -> Tensor:
    """Concatenates every rank's `x` along `dim`; `sizes` are the ranks' lengths there and may differ.

    Uneven parts travel padded to the longest one (gloo takes equal shapes only).
    """
    if group.size == 1:
        return x
    longest = max(sizes)
    front = x.movedim(dim, 0)
    part = front.new_zeros((longest, *front.shape[1:]))
    part[: front.shape[0]] = front
    group.traffic.add("all_gather", group.axis, part.nbytes)
    parts = [torch.empty_like(part) for _ in sizes]
    with _named("all_gather", group):
        dist.all_gather(parts, part, group=group.handle)
    return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)]).movedim(0, dim)


def broadcast(x: Tensor, group: Group, source: int = 0) -> Tensor:
    """Overwrites contiguous `x` with that of the group's rank `source`."""
    if group.size == 1:
        return x
    group.traffic.add("broadcast", group.axis, x.nbytes)
    with _named("broadcast", group):
        dist.broadcast(x, group.ranks[source], group=group.handle)
    return x


FRAME = 4096
"""Bytes of the first broadcast of `broadcast_bytes`, its length field included."""


def broadcast_bytes(payload: bytes, group: Group, source: int = 0) -> bytes:
    """The group's rank `source`'s payload on every rank: one broadcast of a frame, a second for what is longer."""
    if group.size == 1:
        return payload
    frame = torch.zeros(FRAME, dtype=torch.uint8)
    if group.rank == source:
        head = len(payload).to_bytes(8, "little") + payload[: FRAME - 8]
        frame[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    data = bytes(broadcast(frame, group, source).numpy())
    length, start = int.from_bytes(data[:8], "little"), data[8:]
    if length <= len(start):
        return start[:length]
    rest = torch.empty(length - len(start), dtype=torch.uint8)
    if group.rank == source:
        rest = torch.frombuffer(bytearray(payload[len(start) :]), dtype=torch.uint8)
    return start + bytes(broadcast(rest, group, source).numpy())


def send_start(x: Tensor, group: Group, to: int) -> Pending:
    """Begins sending contiguous `x` to the group's rank `to`."""
    group.traffic.add("send", group.axis, x.nbytes)
    with _named("send", group, to):
        work = dist.isend(x, group.ranks[to], group=group.handle)
    return Pending("send", group, work, x, to)


def receive_start(x: Tensor, group: Group, source: int) -> Pending:
    """Begins receiving into contiguous `x` from the group's rank `source`; messages of a pair arrive in order."""
    with _named("receive", group, source):
        work = dist.irecv(x, group.ranks[source], group=group.handle)
    return Pending("receive", group, work, x, source)


def disagreements(facts: Mapping[str, str], group: Group) -> list[str]:
    """Keys of `facts` whose value on some rank isn't that of the group's first one; the same list on every rank."""
    if group.size == 1:
        return []
    first = json.loads(broadcast_bytes(json.dumps(dict(facts)).encode(), group))
    differs = torch.tensor([int(first[key] != value) for key, value in facts.items()])
    return [key for key, flag in zip(facts, all_reduce(differs, group, "max").tolist(), strict=True) if flag]


def barrier(group: Group) -> None:
    """Returns once every rank of the group has called it."""
    if group.size > 1:
        with _named("barrier", group):
            dist.barrier(group=group.handle)

"""Groups of ranks and counted collectives: with `network.py` the only module that talks to torch.distributed.

A `Group` is a value: who takes part, where this rank stands, and the handle of what they talk through (None when
the group has one rank: every collective is then a no-op and needs no initialised process group). Each call is
entered in the mesh's `Traffic`, so that tests and reports can say which collectives ran, on which axis, with
how many bytes.

CPU tensors go through shared memory where all ranks of the group are on one host, through shared memory and gloo
where several hosts have several ranks, else through gloo; GPU tensors through NCCL (docs/collectives.md).
"""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported after `start`, its default arguments would keep the group for ever
from torch import Tensor

from kernels import shared_memory
from kernels.replay import Direct
from parallel import hosts
from parallel.group import DONE, Entry, Group, Handle, PeerLost, Pending, Traffic, lost, named
from parallel.hierarchy import Hierarchy
from parallel.network import Network

__all__ = [
    "Group", "Launch", "PeerLost", "Pending", "Traffic",
    "all_gather", "all_reduce", "all_reduce_start", "all_to_all", "barrier", "broadcast", "broadcast_bytes", "device",
    "direct_sum", "disagreements", "exchange_start", "new_handle", "receive", "receive_start", "reduce_scatter",
    "reduce_scatter_start", "send_start", "start", "stop", "sum_in_rank_order", "tell",
]  # fmt: skip


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
    """Joins the job's process group (gloo on CPU, NCCL beside it where a GPU is); nothing to do for one rank.

    timeout_s: how long a rank waits in a collective for one that is alive, but doesn't come.
    Raises ConfigError when ONEMESH_TRANSPORT is neither `shared` nor `gloo`.
    """
    asked = hosts.transport()
    if launch.world_size == 1 or dist.is_initialized():
        return
    if asked == "shared" and not shared_memory.LIBRARY.is_file() and launch.local_rank == 0:
        print(f"{shared_memory.LIBRARY.name} isn't built: ranks on this host talk through gloo", file=sys.stderr)
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


def new_handle(ranks: Sequence[int]) -> Handle | None:
    """What `ranks` talk through; every rank of the job must call this in the same order. None for one rank and for
    those that aren't among `ranks`."""
    if len(ranks) == 1:
        return None
    group = dist.group.WORLD if len(ranks) == dist.get_world_size() else dist.new_group(list(ranks))
    if not isinstance(group, dist.ProcessGroup):
        return None
    network = Network(group, tuple(ranks))
    timeout = group._get_backend(torch.device("cpu")).options._timeout  # what `start` was given
    found = hosts.meet(
        ranks,
        group.rank(),
        network.exchange,
        timeout_s=timeout.total_seconds(),
        ranks_on_host=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
    )
    if found is None:
        return Handle(network, network)
    if found.memory is not None and len(found.places) == 1:
        return Handle(found.memory, network)
    first = [ranks[places[0]] for places in found.places]
    leaders = None
    if dist.get_rank() in first:
        between = dist.new_group(first, use_local_synchronization=True)
        assert isinstance(between, dist.ProcessGroup)
        leaders = Network(between, tuple(first))
    return Handle(Hierarchy(group.rank(), found, network, leaders), network)


def sum_in_rank_order(x: Tensor, group: Group) -> Tensor:
    """Sums contiguous `x` in place and returns it; the bits of an entry don't depend on its place in `x`.

    Shared memory adds like that anyway; gloo gathers the ranks' `x` when there are more than two.
    """
    op = _sum_op(group)
    if op == "all_reduce":
        return all_reduce(x, group)
    group.traffic.add(op, group.axis, x.nbytes)
    named(op, group, group.through(x).sum_in_rank_order, x)
    return x


def direct_sum(x: Tensor, group: Group) -> Direct | None:
    """`sum_in_rank_order` for a replay to call without Python; None where the group doesn't share memory."""
    way = None if group.handle is None else group.through(x)
    if not isinstance(way, shared_memory.SharedMemory):
        return None
    op = _sum_op(group)

    def error(code: int) -> RuntimeError:
        return lost(way.broken(code), op, group)

    return way.direct_sum(x, error, Entry(group.traffic, op, group.axis, x.nbytes))


def _sum_op(group: Group) -> str:
    return "all_reduce" if group.size <= 2 else "all_gather"


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """Reduces contiguous `x` in place over the group (`sum` or `max`) and returns it."""
    handle = group.handle
    if handle is None:
        return x
    group.traffic.add("all_reduce", group.axis, x.nbytes)
    try:  # neither `named` nor `through`, here and where parts travel: a frame is a twentieth of a small call
        (handle.on_cpu if x.is_cpu else handle.network).all_reduce(x, op)
    except RuntimeError as error:
        raise lost(error, "all_reduce", group) from error
    return x


def all_reduce_start(x: Tensor, group: Group) -> Pending:
    """Begins a sum of contiguous `x` in place over the group."""
    if group.size == 1:
        return Pending("all_reduce", group, None)
    group.traffic.add("all_reduce", group.axis, x.nbytes)
    return Pending("all_reduce", group, named("all_reduce", group, group.through(x).all_reduce_start, x))


def all_gather(x: Tensor, group: Group, sizes: Sequence[int], dim: int) -> Tensor:
    """Concatenates every rank's `x` along `dim`; `sizes` are the ranks' lengths there and may differ.

    Counted with the longest part's bytes, which is what gloo moves.
    """
    handle = group.handle
    if handle is None:
        return x
    longest = max(sizes)
    if sizes[group.rank] == longest:
        num_bytes = x.nbytes
    else:
        num_bytes = longest * math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :]) * x.itemsize
    group.traffic.add("all_gather", group.axis, num_bytes)
    try:
        return (handle.on_cpu if x.is_cpu else handle.network).all_gather(x, sizes, dim)
    except RuntimeError as error:
        raise lost(error, "all_gather", group) from error


def reduce_scatter(x: Tensor, group: Group, sizes: Sequence[int], dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of the ranks' `x`; `sizes` are the parts' lengths and may differ.

    The gradient of `all_gather`. In shared memory it is bitwise a part of the `all_reduce`.
    """
    handle = group.handle
    if handle is None:
        return x
    front = x.movedim(dim, 0) if dim else x
    group.traffic.add("reduce_scatter", group.axis, x.nbytes)
    try:
        part = (handle.on_cpu if x.is_cpu else handle.network).reduce_scatter(front, sizes)
    except RuntimeError as error:
        raise lost(error, "reduce_scatter", group) from error
    return part.movedim(0, dim) if dim else part


def reduce_scatter_start(x: Tensor, group: Group, sizes: Sequence[int]) -> Pending:
    """Begins a sum of contiguous `x` over the group, of which this rank needs `x.split(sizes)[rank]`; in place.

    The other parts are of no use then. Shared memory scatters, at once; the network sums everything beside the
    computation (gloo scatters equal parts only, and waits for them).
    """
    if group.size == 1 or not isinstance(group.through(x), shared_memory.SharedMemory):
        return all_reduce_start(x, group)
    part = reduce_scatter(x, group, sizes, 0)
    x.split(list(sizes))[group.rank].copy_(part)
    return DONE


def all_to_all(parts: Sequence[Tensor], group: Group, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """What every rank has for this one, by rank: `parts[r]` goes to rank r, a tensor of `shapes[r]` comes from it.

    All parts have one dtype; they needn't be contiguous, and any may be empty.
    """
    if group.size == 1:
        return [parts[0]]
    group.traffic.add("all_to_all", group.axis, sum(part.nbytes for part in parts))
    received = [part.new_empty(shape) for part, shape in zip(parts, shapes, strict=True)]
    received[group.rank].copy_(parts[group.rank])
    way = group.through(parts[0])
    others = [(group.rank + i) % group.size for i in range(1, group.size)]
    under_way: list[Pending] = []
    for to in others:
        part = parts[to].contiguous()
        work = named("all_to_all", group, way.send, part, to, peer=to)
        under_way.append(Pending("all_to_all", group, work, part, to))
    for source in reversed(others):
        work = named("all_to_all", group, way.receive, received[source], source, peer=source)
        under_way.append(Pending("all_to_all", group, work, None, source))
    for pending in under_way:
        pending.wait()
    return received


def broadcast(x: Tensor, group: Group, source: int = 0) -> Tensor:
    """Overwrites contiguous `x` with that of the group's rank `source`."""
    if group.handle is None:
        return x
    group.traffic.add("broadcast", group.axis, x.nbytes)
    named("broadcast", group, group.through(x).broadcast, x, source)
    return x


FRAME = 4096
"""Bytes of the first broadcast of `broadcast_bytes`, its length field included."""


def broadcast_bytes(payload: bytes, group: Group, source: int = 0) -> bytes:
    """The group's rank `source`'s payload on every rank: one broadcast of a frame, a second for what is longer."""
    if group.size == 1:
        return payload
    frame = bytearray(FRAME)
    if group.rank == source:
        head = len(payload).to_bytes(8, "little") + payload[: FRAME - 8]
        frame[: len(head)] = head
    broadcast(torch.frombuffer(frame, dtype=torch.uint8), group, source)  # the same memory
    length, start = int.from_bytes(frame[:8], "little"), bytes(frame[8:])
    if length <= len(start):
        return start[:length]
    rest = torch.empty(length - len(start), dtype=torch.uint8)
    if group.rank == source:
        rest = torch.frombuffer(bytearray(payload[len(start) :]), dtype=torch.uint8)
    return start + bytes(broadcast(rest, group, source).numpy())


def send_start(x: Tensor, group: Group, to: int) -> Pending:
    """Begins sending contiguous `x` to the group's rank `to`; it arrives whatever this rank does in the meantime."""
    try:
        work = group.through(x).send(x, to)
    except RuntimeError as error:
        raise lost(error, "send", group, to) from error
    group.traffic.add("send", group.axis, x.nbytes)  # while the message is on its way
    return DONE if work is None else Pending("send", group, work, x, to)


def receive(x: Tensor, group: Group, source: int) -> None:
    """Waits for the next message of the group's rank `source`, into contiguous `x`; they arrive in order."""
    try:
        work = group.through(x).receive(x, source)
        if work is not None:
            work.wait()
    except RuntimeError as error:
        raise lost(error, "receive", group, source) from error


def receive_start(x: Tensor, group: Group, source: int) -> Pending:
    """Begins receiving the next message of the group's rank `source` into contiguous `x`, which is there after `wait`.

    Messages of one rank are waited for in the order in which they were asked for. Between hosts a message travels from
    now on; through shared memory it lies there anyway and is copied when it is waited for.
    """
    work = named("receive", group, group.through(x).receive_start, x, source, peer=source)
    return Pending("receive", group, work, None, source)


def exchange_start(x: Tensor, to: int, y: Tensor, source: int, group: Group) -> Pending:
    """Begins sending contiguous `x` to the group's rank `to` and receiving `y` from rank `source` as one operation.

    For GPUs, where messages of a rank wait for each other: two ranks that send to each other first would wait for ever.
    It goes over the network, as `send_start` and `receive` of a GPU's tensors do.
    """
    assert group.handle is not None
    way = group.handle.network
    assert isinstance(way, Network)
    work = named("send and receive", group, way.exchange_start, x, to, y, source)
    group.traffic.add("send", group.axis, x.nbytes)
    return Pending("send and receive", group, work, x)


def disagreements(facts: Mapping[str, str], group: Group) -> list[str]:
    """Keys of `facts` whose value on some rank isn't that of the group's first one; the same list on every rank."""
    if group.size == 1:
        return []
    first = json.loads(broadcast_bytes(json.dumps(dict(facts)).encode(), group))
    differs = torch.tensor([int(first[key] != value) for key, value in facts.items()])
    return [key for key, flag in zip(facts, all_reduce(differs, group, "max").tolist(), strict=True) if flag]


def barrier(group: Group) -> None:
    """Returns once every rank of the group has called it."""
    if group.handle is not None:
        named("barrier", group, group.handle.on_cpu.barrier)

"""Groups of ranks as values: who takes part, what they talk through, what they have said, and how a rank is lost."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

from torch import Tensor

from kernels.shared_memory import Broken
from parallel.hierarchy import Transport, Work

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class PeerLost(RuntimeError):
    """A collective failed because a rank of its group is gone or unreachable."""


@dataclass
class Traffic:
    """Calls and payload bytes (this rank's input) by (operation, axis); the mesh owns the only mutable copy."""

    _counts: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # by axis, then operation: no tuple to hash

    @property
    def calls(self) -> dict[tuple[str, str], int]:
        """A copy of the numbers of calls."""
        return {(op, axis): calls for axis, counts in self._counts.items() for op, (calls, _) in counts.items()}

    @property
    def bytes(self) -> dict[tuple[str, str], int]:
        """A copy of the bytes."""
        return {(op, axis): some for axis, counts in self._counts.items() for op, (_, some) in counts.items()}

    def add(self, op: str, axis: str, num_bytes: int, calls: int = 1) -> None:
        """Counts calls of `op` over `axis` with `num_bytes` of payload each."""
        try:
            count = self._counts[axis][op]
        except KeyError:
            count = self._counts.setdefault(axis, {}).setdefault(op, [0, 0])
        count[0] += calls
        count[1] += calls * num_bytes

    def clear(self) -> None:
        """Starts counting afresh."""
        self._counts.clear()


@dataclass(frozen=True)
class Entry:
    """Counts calls of one kind when it is told how many there were."""

    traffic: Traffic = field(compare=False)
    op: str
    axis: str
    num_bytes: int

    def __call__(self, calls: int) -> None:
        """Counts so many calls."""
        self.traffic.add(self.op, self.axis, self.num_bytes, calls)


@dataclass(frozen=True)
class Handle:
    """What the ranks of a group talk through."""

    on_cpu: Transport
    """For CPU tensors: shared memory, a hierarchy, or the network as well."""
    network: Transport
    """torch.distributed."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other: `ranks` are global, `rank` is this one's place among them."""

    axis: str
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    handle: Handle | None = None
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

    def through(self, x: Tensor) -> Transport:
        """What carries `x`; only for a group of several ranks."""
        handle = self.handle
        assert handle is not None
        return handle.on_cpu if x.is_cpu else handle.network


def lost(error: RuntimeError, op: str, group: Group, peer: int | None = None) -> RuntimeError:
    """A transport's failure as one that names the operation, the axis and the rank that is to blame; the ranks, where
    the transport doesn't know it (`peer`: a place among the group's ranks, where only one takes part)."""
    me = group.ranks[group.rank]
    what = f"[rank {me} on {socket.gethostname()}] {op} over the {group.axis} axis failed: "
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, Broken):
        who = f"rank {error.rank}"
        if not error.is_gone:
            return RuntimeError(f"{what}{who}: {reason}")
    else:
        others = [rank for rank in group.ranks if rank != me]
        peers = others if peer is None else [group.ranks[peer]]
        who = f"rank {peers[0]}" if len(peers) == 1 else f"one of the ranks {peers}"
    return PeerLost(f"{what}lost {who} ({reason})")


def named(op: str, group: Group, call: Callable[[*Ts], R], *arguments: *Ts, peer: int | None = None) -> R:
    """What a transport's `call` gives; its failure as one that says what failed and who is to blame (`lost`)."""
    try:
        return call(*arguments)
    except RuntimeError as error:
        raise lost(error, op, group, peer) from error


@dataclass(slots=True)
class Pending:
    """A collective under way; `wait()` before touching the tensor again."""

    op: str
    group: Group
    work: Work | None
    keep: Tensor | None = None  # a send's buffer must outlive the transfer
    peer: int | None = None

    def wait(self) -> None:
        """Blocks until the operation is complete on this rank."""
        if self.work is not None:
            try:
                self.work.wait()
            except RuntimeError as error:
                raise lost(error, self.op, self.group, self.peer) from error


DONE = Pending("", Group(""), None)
"""What is complete when it begins."""

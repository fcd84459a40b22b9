"""Which ranks of a group share a host's memory, found out by sharing it.

Ranks are on one host when they have the same host name, boot and process namespace: a container or a Slurm node with
a name or processes of its own is a host of its own, whatever machine it is on. ONEMESH_HOST replaces the host name.
Then every rank really opens the memory (a memfd of the host's first rank, through /proc, so that nothing has a name
that could be left behind); if one can't, the group goes through the network.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from conf.schema import ConfigError
from kernels.shared_memory import SharedMemory, load

TRANSPORTS = ("shared", "gloo")

_MASK_BYTES = 128
_RECORD = struct.Struct(f"<32sqq{_MASK_BYTES}s")
RECORD_BYTES = _RECORD.size


def transport() -> str:
    """What ONEMESH_TRANSPORT asks for: `shared` (the default) or `gloo`. Raises ConfigError for anything else."""
    asked = os.environ.get("ONEMESH_TRANSPORT", TRANSPORTS[0])
    if asked not in TRANSPORTS:
        raise ConfigError(f"ONEMESH_TRANSPORT={asked} is no way to communicate; use one of {', '.join(TRANSPORTS)}")
    return asked


@dataclass(frozen=True)
class Hosts:
    """Where the ranks of a group are, and this host's memory."""

    places: tuple[tuple[int, ...], ...]
    """The group's places by host, each in order, the hosts by their first."""
    here: int
    """This rank's host among them."""
    memory: SharedMemory | None
    """Of the ranks on this host, unless this is the only one."""


def meet(
    ranks: Sequence[int],
    place: int,
    exchange: Callable[[bytes], list[bytes]],
    *,
    timeout_s: float,
    ranks_on_host: int,
) -> Hosts | None:
    """The group's hosts; None when every rank is alone on its host, or when some ranks can't share memory.

    Collective over the group `ranks` (global), where this one is at `place`: two calls of `exchange`, which returns
    every rank's RECORD_BYTES. A rank that doesn't come to a collective is lost after `timeout_s`.
    """
    arena = load() if transport() == "shared" else None
    with _Memfd(arena is not None) as fd:
        offers = [_RECORD.unpack(record) for record in exchange(_RECORD.pack(_host(), os.getpid(), fd, _processors()))]
        places = _by_host([host for host, *_ in offers])
        here = next(i for i, host in enumerate(places) if place in host)
        mine = places[here]
        wanted = len(places) < len(ranks) and all(theirs >= 0 for _, _, theirs, _ in offers)
        memory, problem = None, ""
        if wanted and arena is not None and len(mine) > 1:
            pids = [offers[p][1] for p in mine]
            try:
                shared = os.open(f"/proc/{pids[0]}/fd/{offers[mine[0]][2]}", os.O_RDWR | os.O_CLOEXEC)
                mapped = arena(shared, mine.index(place), len(mine), timeout_s)
                mapped.watch(pids, ranks_on_host > _count([offers[p][3] for p in mine]))
                memory = SharedMemory(mapped, mine.index(place), tuple(ranks[p] for p in mine), timeout_s)
            except OSError as error:
                problem = str(error)
        opened = [_RECORD.unpack(record)[1] for record in exchange(_RECORD.pack(b"", not problem, 0, b""))]
    if problem:
        where = f"[rank {ranks[place]} on {socket.gethostname()}]"
        print(f"{where} can't share memory ({problem}); its group uses gloo", file=sys.stderr, flush=True)
    return Hosts(places, here, memory) if wanted and all(opened) else None


class _Memfd:
    """A memory file without a name while the context lasts; -1 where there can't be one."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._fd = -1

    def __enter__(self) -> int:
        if self._wanted:
            with suppress(OSError):
                self._fd = os.memfd_create("onemesh", os.MFD_CLOEXEC)
        return self._fd

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _host() -> bytes:
    """A hash of what tells this rank's host from others."""
    facts = [os.environ.get("ONEMESH_HOST") or socket.gethostname()]
    with suppress(OSError):  # without /proc, names must do
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).digest()


def _processors() -> bytes:
    """The processors that this rank may use, as bits."""
    bits = sum(1 << cpu for cpu in os.sched_getaffinity(0) if cpu < 8 * _MASK_BYTES)
    return bits.to_bytes(_MASK_BYTES, "little")


def _count(masks: Sequence[bytes]) -> int:
    """How many processors the ranks may use together."""
    together = 0
    for mask in masks:
        together |= int.from_bytes(mask, "little")
    return together.bit_count()


def _by_host(hosts: Sequence[bytes]) -> tuple[tuple[int, ...], ...]:
    found: dict[bytes, list[int]] = {}
    for place, host in enumerate(hosts):
        found.setdefault(host, []).append(place)
    return tuple(tuple(places) for places in found.values())

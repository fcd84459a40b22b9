"""Which transport a group gets, several hosts at once, and what happens when a rank dies in shared memory."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from conf.schema import ConfigError
from kernels import shared_memory
from parallel import comm
from parallel.comm import Group, Launch, PeerLost
from parallel.hierarchy import Hierarchy
from parallel.mesh import Mesh
from tests.ranks import needs_shared_memory, on_ranks

SOON_S = 5.0
"""A dead peer is an error within this time."""

def _kind(group: Group) -> str:
    return "" if group.handle is None else type(group.handle.on_cpu).__name__


def _check(group: Group) -> None:
    """Every collective once, on small and on ragged tensors."""
    me, n = group.rank, group.size
    x = torch.arange(70_001.0) + me
    whole = torch.arange(70_001.0) * n + sum(range(n))
    assert torch.equal(comm.all_reduce(x.clone(), group), whole)
    assert torch.equal(comm.sum_in_rank_order(x.clone(), group), whole)
    assert torch.equal(comm.all_reduce(x.clone(), group, "max"), torch.arange(70_001.0) + n - 1)
    pending = comm.all_reduce_start(y := x.clone(), group)
    pending.wait()
    assert torch.equal(y, whole)
    sizes = [3 * rank + (rank == 1) for rank in range(n)]
    found = comm.all_gather(torch.full((2, sizes[me]), float(me)), group, sizes, 1)
    assert torch.equal(found, torch.cat([torch.full((2, sizes[rank]), float(rank)) for rank in range(n)], 1))
    assert comm.all_gather(torch.tensor([me]), group, [1] * n, 0).tolist() == list(range(n))
    rows = torch.arange(float(sum(sizes))).view(-1, 1) + me
    part = comm.reduce_scatter(rows, group, sizes, 0)
    expected = torch.arange(float(sum(sizes))).view(-1, 1) * n + sum(range(n))
    assert torch.equal(part, expected.split(sizes)[me])
    equal = comm.reduce_scatter(torch.arange(2.0 * n) + me, group, [2] * n, 0)
    assert torch.equal(equal, (torch.arange(2.0 * n) * n + sum(range(n)))[2 * me : 2 * me + 2])
    shapes = [(source + me, 2) for source in range(n)]
    received = comm.all_to_all([torch.full((me + to, 2), 10.0 * me + to) for to in range(n)], group, shapes)
    for source, got in enumerate(received):
        assert torch.equal(got, torch.full((source + me, 2), 10.0 * source + me))
    for source in range(n):
        assert comm.broadcast(torch.tensor([me]), group, source).item() == source
    sent = comm.send_start(torch.tensor([me]), group, (me + 1) % n)
    got = torch.empty(1, dtype=torch.int64)
    comm.receive(got, group, (me - 1) % n)
    sent.wait()
    assert got.item() == (me - 1) % n
    assert comm.broadcast_bytes(b"y" * 9000 if me == n - 1 else b"", group, n - 1) == b"y" * 9000
    comm.barrier(group)


def _on_hosts(launch: Launch, hosts: str) -> list[str]:
    os.environ["ONEMESH_HOST"] = hosts[launch.rank]
    mesh = Mesh.build(launch, data=launch.world_size // 2, tensor=2)
    for group in (mesh.world, mesh.tensor, mesh.data):
        if group.size > 1:
            _check(group)
    if isinstance(found := mesh.world.handle and mesh.world.handle.on_cpu, Hierarchy):
        assert (found.leaders is not None) == (hosts.index(hosts[launch.rank]) == launch.rank)
        x = torch.randn(1000, generator=torch.Generator().manual_seed(launch.rank))
        alone = comm.sum_in_rank_order(x[7:8].clone(), mesh.world)
        assert torch.equal(comm.sum_in_rank_order(x, mesh.world)[7:8], alone)
    return [_kind(group) for group in (mesh.world, mesh.tensor, mesh.data)]


@needs_shared_memory
@pytest.mark.parametrize(
    ("hosts", "kinds"),
    [
        ("aa", ["SharedMemory", "SharedMemory", ""]),
        ("ab", ["Network", "Network", ""]),
        ("aabb", ["Hierarchy", "SharedMemory", "Network"]),
        ("abab", ["Hierarchy", "Network", "SharedMemory"]),
        ("aaabcb", ["Hierarchy", "SharedMemory", "Hierarchy"]),
    ],
)
def test_groups_on_several_hosts(hosts: str, kinds: list[str]) -> None:
    assert on_ranks(len(hosts), _on_hosts, hosts)[0] == kinds


def _opens_late(launch: Launch) -> float:
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[launch.rank]})
    opened = os.open
    if launch.rank == 1:
        os.open = lambda *arguments: (time.sleep(0.3), opened(*arguments))[1]
    world = Mesh.build(launch, tensor=2).world
    os.open = opened
    return sum(comm.all_reduce(torch.ones(1), world).item() for _ in range(10))


@needs_shared_memory
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor is always shared")
def test_ranks_agree_on_how_to_wait_before_all_have_opened_the_memory() -> None:
    """Each has a processor of its own, which the first to open can't learn from the memory."""
    assert on_ranks(2, _opens_late, silence_s=5.0) == [20.0, 20.0]


def _asked_for_gloo(launch: Launch, by: tuple[int, ...]) -> str:
    os.environ["ONEMESH_TRANSPORT"] = "gloo" if launch.rank in by else "shared"
    world = Mesh.build(launch, tensor=launch.world_size).world
    _check(world)
    return _kind(world)


@pytest.mark.parametrize("by", [(0, 1, 2), (1,)], ids=["by all", "by one"])
def test_gloo_can_be_asked_for(by: tuple[int, ...]) -> None:
    assert on_ranks(3, _asked_for_gloo, by) == ["Network"] * 3


def _without_library(launch: Launch) -> str:
    shared_memory.LIBRARY = Path("/nowhere/_shm.so")
    world = Mesh.build(launch, tensor=2).world
    _check(world)
    return _kind(world)


def test_without_a_compiler_ranks_talk_through_gloo() -> None:
    assert on_ranks(2, _without_library) == ["Network"] * 2


def _without_memory(launch: Launch) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    world = Mesh.build(launch, tensor=2).world
    _check(world)
    return _kind(world)


@needs_shared_memory
def test_a_host_that_gives_no_memory_leaves_gloo() -> None:
    assert on_ranks(2, _without_memory) == ["Network"] * 2


def test_a_transport_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEMESH_TRANSPORT", "smoke")
    with pytest.raises(ConfigError, match="ONEMESH_TRANSPORT=smoke is no way to communicate; use one of shared, gloo"):
        comm.start(Launch())


def _wait_in(launch: Launch, operation: str, victim: int, how: int | None) -> tuple[float, str]:
    mesh = Mesh.build(launch, tensor=launch.world_size)
    group = mesh.world
    x = torch.ones(1_000_000)
    for _ in range(3):
        comm.all_reduce(x, group)
    if launch.rank == victim:
        if how is None:
            del mesh, group
            comm.stop()
            time.sleep(60)
        else:
            os.kill(os.getpid(), how)
    started = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        while True:
            if operation == "receive":
                comm.receive(x, group, victim)
            elif operation == "broadcast":
                comm.broadcast(x, group, victim)
            elif operation == "tell":  # a source waits for nobody
                comm.broadcast(x[:1], group, launch.rank)
                time.sleep(0.3)
            else:
                comm.all_reduce(x, group)
    waited = time.monotonic() - started
    with pytest.raises(PeerLost):  # for good
        comm.barrier(group)
    return waited, str(caught.value)


def _named_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "onemesh" in name}


@needs_shared_memory
def test_a_source_notices_a_lost_rank_though_it_waits_for_nobody() -> None:
    """At its first broadcast, not when the slots run out after the fourth."""
    (waited, message), _ = on_ranks(2, _wait_in, "tell", 1, signal.SIGKILL, lost=[1])
    assert waited < 1.1
    assert message.endswith("lost rank 1 (its process has ended)")


@needs_shared_memory
@pytest.mark.parametrize(
    ("ranks", "operation", "how", "reason"),
    [
        (2, "all_reduce", signal.SIGKILL, "its process has ended"),
        (2, "receive", signal.SIGKILL, "its process has ended"),
        (4, "broadcast", signal.SIGKILL, "its process has ended"),
        (4, "all_reduce", signal.SIGKILL, "its process has ended"),
        (3, "all_reduce", None, "it has left the group"),
        (3, "all_reduce", signal.SIGSTOP, "it is alive, but nothing came from it for 3 s"),
        (2, "receive", signal.SIGSTOP, "it is alive, but nothing came from it for 3 s"),
    ],
)
def test_a_lost_rank_is_named_within_seconds(ranks: int, operation: str, how: int | None, reason: str) -> None:
    silence = 3.0 if how == signal.SIGSTOP else 60.0
    results = on_ranks(ranks, _wait_in, operation, 1, how, silence_s=silence, lost=[1])
    for rank, result in enumerate(results):
        if rank != 1:
            waited, message = result
            assert waited < (silence + SOON_S if how == signal.SIGSTOP else SOON_S)
            assert message.startswith(
                f"[rank {rank} on {socket.gethostname()}] {operation} over the world axis failed: "
            )
            assert message.endswith(f"lost rank 1 ({reason})")
    assert not _named_files()


def _die(launch: Launch, ready: str) -> None:
    group = Mesh.build(launch, tensor=launch.world_size).world
    comm.all_reduce(torch.ones(1_000_000), group)
    comm.send_start(torch.ones(1_000_000), group, (launch.rank + 1) % launch.world_size).wait()
    comm.barrier(group)
    Path(f"{ready}{launch.rank}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


@needs_shared_memory
def test_nothing_is_left_when_all_ranks_are_killed(tmp_path: Path) -> None:
    on_ranks(2, _die, f"{tmp_path}/ready", lost=[0, 1])

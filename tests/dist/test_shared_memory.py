"""Collectives in shared memory against plain tensors: every operation, dtype and kind of size, alone and mixed."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import shared_memory
from parallel import comm
from parallel.comm import Group, Launch
from parallel.mesh import Mesh
from tests.ranks import needs_shared_memory, on_ranks

pytestmark = needs_shared_memory

SIZES = (0, 1, 1023, 16 << 10, 150_001)
"""Items: none, odd ones, one slot, and chunks whose last is ragged."""
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def values(rank: int, items: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """What `rank` has; floats of many magnitudes, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 120, (items,), generator=generator).to(dtype)
    magnitude = torch.randint(-6, 7, (items,), generator=generator).double()
    return (torch.randn(items, generator=generator).double() * 2**magnitude).to(dtype)


def total(parts: list[Tensor]) -> Tensor:
    """The sum in rank order; of 16-bit floats in float32, rounded once."""
    wide = [part.float() if part.dtype in (torch.bfloat16, torch.float16) else part for part in parts]
    result = wide[0]
    for part in wide[1:]:
        result = result + part
    return result.to(parts[0].dtype)


def same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN included."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    equal = (found == expected) | ((found != found) & (expected != expected))
    assert equal.all(), (found[~equal][:5], expected[~equal][:5], int((~equal).sum()))


def same_bytes(found: Tensor, expected: Tensor) -> None:
    """For dtypes that can't be compared."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found, expected = (x.clone(memory_format=torch.contiguous_format) for x in (found, expected))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def world(launch: Launch) -> Group:
    """All ranks, through shared memory."""
    group = Mesh.build(launch, tensor=launch.world_size).world
    assert group.handle is not None and isinstance(group.handle.on_cpu, shared_memory.SharedMemory)
    return group


def _reductions(launch: Launch) -> None:
    group = world(launch)
    for dtype in shared_memory.DTYPES:
        for items in SIZES if dtype in FLOATS else SIZES[2::2]:
            parts = [values(rank, items, dtype) for rank in range(group.size)]
            mine = parts[launch.rank].clone()
            same(comm.all_reduce(mine.clone(), group), total(parts))
            same(comm.sum_in_rank_order(mine.clone(), group), total(parts))
            started = mine.clone()
            comm.all_reduce_start(started, group).wait()
            same(started, total(parts))
            same(comm.all_reduce(mine.clone(), group, "max"), torch.stack(parts).amax(0) if items else mine)
            lengths = [items * (rank + 1) // 3 % (items + 1) for rank in range(group.size)]
            whole = [values(rank, sum(lengths), dtype, 1) for rank in range(group.size)]
            expected = total(whole).split(lengths)[launch.rank]
            same(comm.reduce_scatter(whole[launch.rank].clone(), group, lengths, 0), expected)
    flags = [values(rank, 100, torch.bool) for rank in range(group.size)]
    same(comm.all_reduce(flags[launch.rank].clone(), group, "max"), torch.stack(flags).any(0))


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_sums_and_maxima_in_rank_order(ranks: int) -> None:
    on_ranks(ranks, _reductions)


def _bits(launch: Launch) -> None:
    group = world(launch)
    for dtype, kind in ((torch.float16, torch.int16), (torch.bfloat16, torch.int16)):
        every = torch.arange(-(1 << 15), 1 << 15).to(kind).view(dtype)
        other = every.flip(0) if launch.rank else every
        same(comm.all_reduce(other.clone(), group), (every.float() + every.flip(0).float()).to(dtype))
        same(comm.all_reduce(other.clone(), group, "max"), torch.maximum(every, every.flip(0)))
        nothing = torch.zeros(1 << 16, dtype=dtype)
        same(comm.all_reduce(nothing if launch.rank else every.clone(), group), (every.float() + 0).to(dtype))
    whole = torch.cat([values(launch.rank, 100_000, torch.float32), torch.tensor([torch.nan, torch.inf])])
    at_once = comm.all_reduce(whole.clone(), group)
    for begin, end in ((0, 1), (5, 5000), (70_001, 100_002)):
        same(comm.all_reduce(whole[begin:end].clone(), group), at_once[begin:end])


def test_every_16_bit_number_and_no_entry_depends_on_its_place() -> None:
    on_ranks(2, _bits)


def _movements(launch: Launch) -> None:
    group = world(launch)
    me, n = launch.rank, group.size
    for dtype in (torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64):
        for longest in (1, 5, 100_003):
            sizes = [(longest * (rank + 1) // n) * (rank != 1) for rank in range(n)]
            parts = [values(rank, 2 * size, torch.float32).view(2, size).to(dtype) for rank, size in enumerate(sizes)]
            same_bytes(comm.all_gather(parts[me], group, sizes, 1), torch.cat(parts, 1))
            turned = parts[me].t()  # not contiguous
            same_bytes(comm.all_gather(turned, group, sizes, 0), torch.cat(parts, 1).t())
            for source in range(n):
                x = parts[source].clone() if me == source else torch.zeros_like(parts[source])
                assert comm.broadcast(x, group, source) is x
                same_bytes(x, parts[source])

            def piece(a: int, b: int, longest: int = longest, dtype: torch.dtype = dtype) -> Tensor:
                return values(n * a + b, longest * (a + 2 * b) // (3 * n), torch.float32, 2).to(dtype)

            outgoing = [piece(me, to) for to in range(n)]
            received = comm.all_to_all(outgoing, group, [piece(source, me).shape for source in range(n)])
            for source, got in enumerate(received):
                same_bytes(got, piece(source, me))
    for payload in (b"", b"x", b"y" * 4088, b"z" * 4089, b"onemesh" * 200_000):
        assert comm.broadcast_bytes(payload if me == 1 else b"?", group, 1) == payload
    rows = [values(rank, 12, torch.float32).view(3, 4) for rank in range(n)]
    lengths = [4, *[0] * (n - 1)]
    part = comm.reduce_scatter(rows[me], group, lengths, 1)
    same(part, total(rows) if me == 0 else total(rows)[:, :0])


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_gathers_broadcasts_and_exchanges_of_any_dtype_and_ragged_sizes(ranks: int) -> None:
    on_ranks(ranks, _movements)


def _large_both_ways(launch: Launch) -> None:
    group = world(launch)
    other = 1 - launch.rank
    for _ in range(2):
        sends = []
        for seed, items in enumerate((5_000_000, 0, 1, 3_000_000)):
            x = values(launch.rank, items, torch.float32, seed)
            sends.append(comm.send_start(x, group, other))
            x.fill_(-1)  # it was copied
        found = [torch.empty(items) for items in (5_000_000, 0, 1, 3_000_000)]
        for x in found:
            comm.receive(x, group, other)
        for pending in sends:
            pending.wait()
        for seed, x in enumerate(found):
            same(x, values(other, x.numel(), torch.float32, seed))


def test_both_ranks_send_much_before_they_receive() -> None:
    on_ranks(2, _large_both_ways)


def _anything(launch: Launch, seed: int, steps: int) -> None:
    mesh = Mesh.build(launch, data=2, pipeline=launch.world_size // 2)
    plan, mine = random.Random(seed), random.Random(launch.rank)
    for number in range(steps):
        axis, operation = plan.choice(("data", "pipeline", "world")), plan.randrange(6)
        items = plan.choice((0, 1, 100, 9000, 50_000, 200_000))
        group: Group = getattr(mesh, axis)
        if group.size == 1:
            continue
        if mine.random() < 0.1:
            time.sleep(mine.random() * 0.003)
        parts = [values(rank, items, torch.float32, number) for rank in group.ranks]
        x = parts[group.rank].clone()
        if operation == 0:
            same(comm.all_reduce(x, group), total(parts))
        elif operation == 1:
            sizes = [items // (place + 1) for place in range(group.size)]
            mixed = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
            same(comm.all_gather(x[: sizes[group.rank]], group, sizes, 0), mixed)
        elif operation == 2:
            source = number % group.size
            same(comm.broadcast(x, group, source), parts[source])
        elif operation == 3:
            comm.barrier(group)
        elif operation == 4:
            sizes = [items - items // 2, *[0] * (group.size - 2), items // 2]
            same(comm.reduce_scatter(x, group, sizes, 0), total(parts).split(sizes)[group.rank])
        else:
            ahead, behind = (group.rank + 1) % group.size, (group.rank - 1) % group.size
            sent = comm.send_start(x, group, ahead)
            found = torch.empty(items)
            comm.receive(found, group, behind)
            sent.wait()
            same(found, parts[behind])


@pytest.mark.parametrize(("ranks", "steps"), [(2, 400), (4, 300), (6, 200)])
def test_any_sequence_on_groups_that_overlap(ranks: int, steps: int) -> None:
    on_ranks(ranks, _anything, ranks, steps)


def _refused(launch: Launch) -> list[str]:
    group = world(launch)
    messages = []
    wrong: list[Callable[[], object]] = [
        lambda: comm.all_reduce(torch.ones(4, 3).t(), group),
        lambda: comm.all_reduce(torch.ones(3, dtype=torch.bool), group),
        lambda: comm.send_start(torch.ones(4, 3).t(), group, 0),
        lambda: comm.broadcast(torch.ones(4, 3).t(), group),
        lambda: comm.receive(torch.ones(4, 3).t(), group, 0),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"contiguous|among") as caught:
            call()
        messages.append(str(caught.value))
    assert comm.all_reduce(torch.ones(1), group).item() == 2  # nothing has happened
    with pytest.raises(RuntimeError) as failed:
        comm.all_reduce(torch.ones(3 + launch.rank), group)
    messages.append(str(failed.value))
    with pytest.raises(RuntimeError):  # and it stays so
        comm.all_reduce(torch.ones(1), group)
    return messages


def test_misuse_is_one_clear_error() -> None:
    messages = on_ranks(2, _refused)[0]
    assert messages[0] == "the tensor of shape (3, 4) is not contiguous; pass x.contiguous()"
    assert "op=sum of torch.bool is not among sum and max of float32" in messages[1]
    assert "all_reduce over the world axis failed: rank " in messages[-1]
    assert messages[-1].endswith(": it and another rank called different operations, or with different sizes")


OTHERS: dict[str, Callable[[Group], object]] = {
    "size": lambda group: comm.all_reduce(torch.ones(7), group),
    "chunks": lambda group: comm.all_reduce(torch.ones(50_000), group),
    "operation": lambda group: comm.all_gather(torch.ones(5), group, [5] * group.size, 0),
    "parts": lambda group: comm.reduce_scatter(torch.ones(5), group, [1] * group.size, 0),
    "barrier": comm.barrier,
}


def _one_differs(launch: Launch) -> list[tuple[float, str]]:
    found = []
    for other in OTHERS.values():
        for it_is_last in (False, True):
            group = world(launch)
            comm.barrier(group)
            started = time.monotonic()
            if it_is_last == (launch.rank == 3):
                time.sleep(0.1)
            with pytest.raises(RuntimeError) as caught:
                other(group) if launch.rank == 3 else comm.all_reduce(torch.ones(5), group)
            found.append((time.monotonic() - started, str(caught.value)))
    return found


def test_more_ranks_than_processors_notice_that_one_calls_something_else() -> None:
    """The last one to arrive adds for all of them: whoever it is, nobody takes what it left for a sum."""
    for of_rank in on_ranks(5, _one_differs):
        assert len(of_rank) == 2 * len(OTHERS)
        for seconds, message in of_rank:
            assert seconds < 5 and message.endswith("called different operations, or with different sizes")


def _mismatched_message(launch: Launch) -> str:
    group = world(launch)
    if launch.rank == 0:
        comm.send_start(torch.ones(5), group, 1).wait()
        return ""
    with pytest.raises(RuntimeError) as caught:
        comm.receive(torch.ones(6), group, 0)
    return str(caught.value)


def test_a_message_of_another_size_is_refused() -> None:
    assert "rank 0: it and another rank called different operations" in on_ranks(2, _mismatched_message)[1]


def _held() -> tuple[int, int]:
    maps = sum("memfd:onemesh" in line for line in Path("/proc/self/maps").read_text().splitlines())
    links = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    ]
    return maps, sum("memfd:onemesh" in link or "pidfd" in link for link in links)


def _leaks(launch: Launch) -> tuple[tuple[int, int], ...]:
    before = _held()
    for _ in range(6):
        mesh = Mesh.build(launch, data=2, tensor=2)
        comm.all_reduce(torch.ones(100_000), mesh.world)
        comm.send_start(torch.ones(10), mesh.world, (launch.rank + 1) % 4).wait()
        comm.receive(torch.ones(10), mesh.world, (launch.rank - 1) % 4)
        comm.barrier(mesh.world)
        during = _held()
        del mesh
        gc.collect()
    return before, during, _held()


def test_groups_leave_no_memory_and_no_descriptors() -> None:
    for before, during, after in on_ranks(4, _leaks):
        assert before == after == (0, 0)
        assert during[0] > 5 and during[1] > 5


def _forked(launch: Launch) -> int:
    group = world(launch)
    comm.barrier(group)
    child = os.fork()
    if child == 0:
        try:
            comm.all_reduce(torch.ones(1), group)
        except RuntimeError as error:
            del group
            gc.collect()
            os._exit("the process that this one was forked from" in str(error))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert comm.all_reduce(torch.ones(1), group).item() == 2  # the child's end has closed nothing
    return code


def test_a_forked_child_cannot_use_or_end_the_group() -> None:
    assert on_ranks(2, _forked) == [1, 1]

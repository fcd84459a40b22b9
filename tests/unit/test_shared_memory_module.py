"""The library behind `kernels.shared_memory` as a Python module: its arguments, its lifetime, Python's lock."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import shared_memory
from tests.ranks import needs_shared_memory

Arena = shared_memory.load()
pytestmark = needs_shared_memory


def group(name: str, size: int = 2) -> list:
    """The places of one group, in one process."""
    assert Arena is not None
    fd = os.memfd_create(name)
    arenas = [Arena(os.dup(fd), place, size, 5.0) for place in range(size)]
    os.close(fd)
    for arena in arenas:
        arena.watch([os.getpid()] * size, size > 2)
    return arenas


@pytest.fixture
def pair() -> list:
    return group("onemesh-pair")


def test_the_lock_is_free_while_one_waits(pair: list) -> None:
    """Of two threads one would otherwise keep the other from coming."""
    x = [torch.full((1000,), float(place + 1)) for place in range(2)]
    codes = []

    def of(place: int) -> None:
        for _ in range(100):
            codes.append(pair[place].all_reduce(x[place], False))

    other = threading.Thread(target=of, args=(1,))
    other.start()
    of(0)
    other.join()
    assert codes == [0] * 200
    assert torch.equal(x[0], x[1]) and x[0][0].item() == 3 * 2.0**99


UNSUITABLE = 7


def test_wrong_arguments_are_errors_and_nothing_happens(pair: list) -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(TypeError, match="1 arguments instead of 2"):
        pair[0].all_reduce(x)
    with pytest.raises(TypeError, match=r"x=\[1, 2\] is no tensor"):
        pair[0].all_reduce([1, 2], False)
    with pytest.raises(ValueError, match="rank=2 is none of 2"):
        pair[0].send(x, 2)
    with pytest.raises(ValueError, match="rank=-1 is none of 2"):
        pair[0].receive(x, -1)
    with pytest.raises(ValueError, match="3 sizes for 2 ranks; give one for each"):
        pair[0].all_gather(x, [1, 1, 1], 0)
    with pytest.raises(ValueError, match="dim=2 is none of 2"):
        pair[0].all_gather(x, [1, 1], 2)
    with pytest.raises(ValueError, match="dim 1 of x has length 4, not 3 as sizes say"):
        pair[0].all_gather(x, [3, 4], 1)
    with pytest.raises(ValueError, match="dim 0 of x has length 2, not 3 as sizes say"):
        pair[0].reduce_scatter(x, [1, 2])
    with pytest.raises(TypeError):
        pair[0].all_gather(x, 2, 0)
    with pytest.raises(TypeError):
        pair[0].reduce_scatter(x, [1, None])
    with pytest.raises(OverflowError):
        pair[0].reduce_scatter(x, [3, -1])
    assert pair[0].all_reduce(x.t(), False) == UNSUITABLE
    assert pair[0].all_reduce(x.bool(), False) == pair[0].direct(x.bool()) == UNSUITABLE
    assert pair[0].all_reduce(x.to(torch.complex64), False) == UNSUITABLE
    assert pair[0].reduce_scatter(torch.zeros(()), [1, 0]) == UNSUITABLE
    assert [pair[0].send(x, 1), pair[1].receive(x, 0)] == [0, 0]


def both(call: Callable[[int], Tensor], size: int = 2) -> list[Tensor]:
    """What the places get, each in a thread of its own."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(call, range(size)))


def test_results_are_tensors_like_any_other(pair: list) -> None:
    """Memory of their own, which views keep; they take part in gradients, also after the group has gone."""
    x = [torch.arange(6.0).view(3, 2) + place for place in range(2)]
    whole = both(lambda place: pair[place].all_gather(x[place], [2, 2], 1))
    parts = both(lambda place: pair[place].reduce_scatter(x[place], [1, 2]))
    empty = both(lambda place: pair[place].reduce_scatter(x[place], [0, 3]))[0]
    pair.clear()
    assert torch.equal(whole[0], torch.cat(x, 1)) and torch.equal(whole[1], whole[0])
    assert torch.equal(torch.cat(parts), x[0] + x[1])
    assert empty.shape == (0, 2)
    view = whole[0][1:].t()
    whole[1].zero_()
    del whole
    for _ in range(100):
        torch.full((3, 4), 9.0)
    assert torch.equal(view, torch.cat(x, 1)[1:].t())
    part = parts[1].requires_grad_()
    (part * part).sum().backward()
    assert part.grad is not None and torch.equal(part.grad, 2 * part)
    assert part.data_ptr() % 64 == 0 and part.is_contiguous() and not part.is_inference()


@pytest.mark.parametrize("rows", [1, 700])  # in one step and in several
def test_many_ranks_gather_and_scatter(rows: int) -> None:
    """Some of them have nothing; tensors with gaps are taken as well."""
    size = 40
    places = group("onemesh-many", size)
    sizes = [rows * (place % 3) for place in range(size)]
    parts = [torch.randn(16, length).t() for length in sizes]
    whole = torch.cat(parts)
    for found in both(lambda place: places[place].all_gather(parts[place], sizes, 0), size):
        assert torch.equal(found, whole)
    total = whole.clone()
    for _ in range(size - 1):
        total += whole
    scattered = both(lambda place: places[place].reduce_scatter(whole.t().contiguous().t(), sizes), size)
    for found, expected in zip(scattered, total.split(sizes), strict=True):
        assert torch.equal(found, expected)


def test_results_are_given_back(pair: list) -> None:
    x = torch.zeros(1 << 20)
    before = None
    for round_ in range(60):
        both(lambda place: pair[place].all_gather(x, [1 << 20] * 2, 0))
        if round_ == 9:
            before = resident()
    assert before is not None and resident() - before < 64 << 20


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_cannot_be_mapped_is_an_error() -> None:
    assert Arena is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        Arena(-1, 0, 2, 1.0)
    for place, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"place={place} is none of {size}"):
            Arena(-1, place, size, 1.0)
    fd = os.memfd_create("onemesh-one")
    arena = Arena(os.dup(fd), 0, 2, 1.0)
    os.close(fd)
    with pytest.raises(OSError, match=r"."):
        arena.watch([os.getpid(), 1 << 30], False)


def test_the_last_reference_closes_it() -> None:
    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:onemesh-closed")

    arenas = group("onemesh-closed")
    method = arenas[0].barrier
    assert mapped() == 2
    arenas.clear()
    assert mapped() == 1, "a bound method needs it"
    del method
    assert mapped() == 0


def test_it_needs_the_limited_api_alone() -> None:
    """What begins with _Py is no part of it, but for two that its macros use."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", Path(shared_memory.LIBRARY)], check=True, capture_output=True, text=True
    )
    private = {name for name in listed.stdout.split() if name.startswith("_Py")}
    assert private <= {"_Py_Dealloc", "_Py_NoneStruct"}

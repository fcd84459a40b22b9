"""The library behind `kernels.shared_memory` as a Python module: its arguments, its lifetime, Python's lock."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from kernels import shared_memory

Arena = shared_memory.load()
pytestmark = pytest.mark.skipif(
    Arena is None, reason="_shm.so isn't built: there was no C++ compiler, or no Python.h, at `make install`"
)


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:onemesh-pair")


@pytest.fixture
def pair() -> list:
    """Two places of one group, in one process."""
    assert Arena is not None
    fd = os.memfd_create("onemesh-pair")
    arenas = [Arena(os.dup(fd), place, 2, 5.0) for place in range(2)]
    os.close(fd)
    for arena in arenas:
        arena.watch([os.getpid()] * 2, False)
    return arenas


def test_the_lock_is_free_while_one_waits(pair: list) -> None:
    """Of two threads one would otherwise keep the other from coming."""
    x = [torch.full((1000,), float(place + 1)) for place in range(2)]
    codes = []

    def of(place: int) -> None:
        for _ in range(100):
            codes.append(pair[place].all_reduce(x[place].data_ptr(), 1000, 0))

    other = threading.Thread(target=of, args=(1,))
    other.start()
    of(0)
    other.join()
    assert codes == [0] * 200
    assert torch.equal(x[0], x[1]) and x[0][0].item() == 3 * 2.0**99


def test_wrong_arguments_are_errors_and_nothing_happens(pair: list) -> None:
    x = torch.zeros(4)
    address = x.data_ptr()
    with pytest.raises(TypeError, match="2 arguments instead of 3"):
        pair[0].all_reduce(address, 4)
    with pytest.raises(TypeError):
        pair[0].all_reduce(address, "4", 0)
    with pytest.raises(OverflowError):
        pair[0].send(address, -1, 1)
    with pytest.raises(ValueError, match="3 sizes for 2 ranks; give one for each"):
        pair[0].all_gather(address, address, [1, 1, 1], 4, 1)
    with pytest.raises(TypeError):
        pair[0].all_gather(address, address, 2, 4, 1)
    with pytest.raises(TypeError):
        pair[0].reduce_scatter(address, address, [1, None], 4, 0)
    assert [pair[0].send(address, 16, 1), pair[1].receive(address, 16, 0)] == [0, 0]


def test_what_cannot_be_mapped_is_an_error() -> None:
    assert Arena is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        Arena(-1, 0, 2, 1.0)
    for place, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"place={place} is none of {size} ranks"):
            Arena(-1, place, size, 1.0)
    fd = os.memfd_create("onemesh-one")
    arena = Arena(os.dup(fd), 0, 2, 1.0)
    os.close(fd)
    with pytest.raises(OSError, match=r"."):
        arena.watch([os.getpid(), 1 << 30], False)


def test_the_last_reference_closes_it(pair: list) -> None:
    held = mapped()
    method = pair[0].all_reduce
    pair.clear()
    gc.collect()
    assert mapped() == held - 1, "a bound method needs it"
    del method
    gc.collect()
    assert mapped() == held - 2


def test_it_needs_the_limited_api_alone() -> None:
    """What begins with _Py is no part of it, but for two that its macros use."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", Path(shared_memory.LIBRARY)], check=True, capture_output=True, text=True
    )
    private = {name for name in listed.stdout.split() if name.startswith("_Py")}
    assert private <= {"_Py_Dealloc", "_Py_NoneStruct"}

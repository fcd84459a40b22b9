"""Collectives of ranks on one host through memory that they share (`kernels/shm/`), as methods on tensors.

The C++ side is a Python module, `kernels._shm`. Where it wasn't built (no compiler or no headers of Python at
installation), `load` returns None.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.replay import Direct

if TYPE_CHECKING:
    from kernels._shm import Arena

LIBRARY = Path(__file__).with_name("_shm.so")

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
"""What can be summed."""

_REASONS = {
    1: "its process has ended",
    2: "it has left the group",
    3: "it is alive, but nothing came from it for {timeout:g} s",
    4: "it and another rank called different operations, or with different sizes",
    5: "the host has no memory left to share",
    6: "the group belongs to the process that this one was forked from",
}
_FORKED, _UNSUITABLE = 6, 7
_GONE = (1, 2, 3)


class Broken(RuntimeError):
    """A group in shared memory failed, for good; `rank` is whose fault it is, `is_gone` whether that one is lost."""

    def __init__(self, rank: int, reason: str, is_gone: bool) -> None:
        super().__init__(reason)
        self.rank = rank
        self.is_gone = is_gone


def load() -> type[Arena] | None:
    """What maps a group's memory, None where it isn't built. Raises RuntimeError when it is built, but doesn't load."""
    if not LIBRARY.is_file() or sysconfig.get_config_var("Py_GIL_DISABLED"):  # such a Python has another ABI
        return None
    try:
        from kernels import _shm
    except ImportError as error:
        raise RuntimeError(f"{LIBRARY} doesn't load ({error}); build it again: make clean install") from None
    return _shm.Arena


@dataclass(eq=False)
class SharedMemory:
    """One group's shared memory, as the rank at `place` among `ranks` (global) sees it; all of them on this host.

    Every tensor is on the CPU and contiguous, but for what is scattered or gathered. Every method may raise Broken; the
    group is of no use then.
    Sums and maxima are taken in rank order, whatever the size: an entry's bits depend on the ranks' entries alone.
    bfloat16 and float16 are summed in float32 and rounded once. Integers wrap; a maximum with NaN is NaN.
    """

    arena: Arena
    """The memory; it is closed with the group."""
    place: int
    ranks: tuple[int, ...]
    timeout_s: float

    def __post_init__(self) -> None:
        arena = self.arena
        self._all_reduce = arena.all_reduce  # looked up once, not at every call
        self._reduce_scatter = arena.reduce_scatter
        self._all_gather = arena.all_gather
        self._broadcast = arena.broadcast
        self._barrier = arena.barrier
        self._send = arena.send
        self._receive = arena.receive

    def all_reduce(self, x: Tensor, op: str) -> None:
        """Reduces `x` in place by `sum` or `max`, in rank order."""
        maximum = op == "max"
        code = self._all_reduce(x, maximum) if maximum or op == "sum" else _UNSUITABLE
        if code:
            raise self._failure(code, x, op)

    def sum_in_rank_order(self, x: Tensor) -> None:
        """The sum of `all_reduce`."""
        self.all_reduce(x, "sum")

    def direct_sum(self, x: Tensor, error: Callable[[int], Exception], note: Callable[[int], None]) -> Direct:
        """The sum of `all_reduce`, for recordings; `error` must keep this group alive."""
        found = self.arena.direct(x)
        if isinstance(found, int):
            raise _unsuitable(x, "sum")
        function, handle, kind = found
        return Direct(function, handle, x, kind, error, note)

    def all_reduce_start(self, x: Tensor) -> None:
        """The sum, at once: there is no processor to spare that could do it beside the computation."""
        self.all_reduce(x, "sum")

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's part along dim 0 of the sum of the ranks' `x`; `sizes` are the parts' lengths."""
        found = self._reduce_scatter(x, sizes)
        if isinstance(found, int):
            raise self._failure(found, x, "sum")
        return found

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The ranks' `x` side by side along `dim`, where their lengths are `sizes`; contiguous."""
        found = self._all_gather(x, sizes, dim)
        if isinstance(found, int):
            raise self._failure(found, x)
        return found

    def broadcast(self, x: Tensor, source: int) -> None:
        """Overwrites `x` with that of the rank at `source`, which goes on before the others have it."""
        code = self._broadcast(x, source)
        if code:
            raise self._failure(code, x)

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        code = self._barrier()
        if code:
            raise self.broken(code)

    def send(self, x: Tensor, to: int) -> None:
        """Copies `x` for the rank at `to` and returns; `x` may change then. Waits only with 1 GB under way already."""
        code = self._send(x, to)
        if code:
            raise self._failure(code, x)

    def receive(self, x: Tensor, source: int) -> None:
        """Waits for the next message of the rank at `source`, whose size is that of `x`, and copies it there."""
        code = self._receive(x, source)
        if code:
            raise self._failure(code, x)

    def receive_start(self, x: Tensor, source: int) -> Asked:
        """`receive`, when it is waited for: the sender has put the message into memory of its own by then."""
        return Asked(self, x, source)

    def broken(self, code: int) -> Broken:
        """The error of this number, which a function of the library returned."""
        place = self.place if code == _FORKED else self.arena.lost()
        return Broken(self.ranks[place], _REASONS[code].format(timeout=self.timeout_s), code in _GONE)

    def _failure(self, code: int, x: Tensor, op: str = "") -> Exception:
        return (_unsuitable(x, op) if op else _gaps(x)) if code == _UNSUITABLE else self.broken(code)


@dataclass(frozen=True, slots=True)
class Asked:
    """A message that is received when it is waited for."""

    memory: SharedMemory
    x: Tensor
    source: int

    def wait(self) -> None:
        """Blocks until the message is there, and copies it."""
        self.memory.receive(self.x, self.source)


def _gaps(x: Tensor) -> ValueError:
    return ValueError(f"the tensor of shape {tuple(x.shape)} is not contiguous; pass x.contiguous()")


def _unsuitable(x: Tensor, op: str) -> ValueError:
    if not x.is_contiguous():
        return _gaps(x)
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return ValueError(f"op={op} of {x.dtype} is not among sum and max of {known} and max of bool")

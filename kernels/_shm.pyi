"""The library of `kernels/shm/`; `kernels.shared_memory` says what its functions do.

The collectives and messages let go of Python's lock. They return the number of an error (`Error` in arena.h), else
their result or 0. What can't be meant is a TypeError or ValueError, and nothing has happened.
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor

@final
class Arena:
    """The memory that a group's ranks on one host share, as one of them sees it; closed with the last reference."""

    def __new__(cls, fd: int, place: int, size: int, timeout_s: float, /) -> Arena:
        """Maps the memfd `fd`, which is the arena's from here on. Raises OSError when the host doesn't give memory."""

    def watch(self, pids: Sequence[int], crowded: bool, /) -> None:
        """Completes it. pids: of the ranks' processes, by place; OSError when one can't be watched. crowded: whether
        ranks share processors, which decides how they wait; all of them must say the same."""

    def lost(self) -> int:
        """The place of the rank that broke the group."""

    def direct(self, x: Tensor, /) -> tuple[int, int, int] | int:
        """Of `kernels.replay.Direct` the function, handle and kind that sum `x`."""

    def all_reduce(self, x: Tensor, maximum: bool, /) -> int: ...
    def reduce_scatter(self, x: Tensor, sizes: Sequence[int], /) -> Tensor | int: ...
    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int, /) -> Tensor | int: ...
    def broadcast(self, x: Tensor, source: int, /) -> int: ...
    def barrier(self) -> int: ...
    def send(self, x: Tensor, to: int, /) -> int: ...
    def receive(self, x: Tensor, source: int, /) -> int: ...

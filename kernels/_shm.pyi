"""The library of `kernels/shm/`; `kernels.shared_memory` offers it on tensors.

`x`, `out` and `data` are addresses, `type` is a place among TYPES of reduce.cpp times two, plus one for a maximum. The
collectives and messages return 0 or the number of an error (`Error` in arena.h), and let go of Python's lock.
"""

from collections.abc import Sequence
from typing import final

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

    def direct(self) -> tuple[int, int]:
        """Addresses of the function behind `all_reduce` and of its first argument (`kernels.replay.Direct`)."""

    def all_reduce(self, x: int, items: int, type: int, /) -> int: ...
    def reduce_scatter(self, x: int, out: int, rows: Sequence[int], row_bytes: int, type: int, /) -> int: ...
    def all_gather(self, x: int, out: int, sizes: Sequence[int], item_bytes: int, rows: int, /) -> int: ...
    def broadcast(self, x: int, num_bytes: int, source: int, /) -> int: ...
    def barrier(self) -> int: ...
    def send(self, data: int, num_bytes: int, to: int, /) -> int: ...
    def receive(self, data: int, num_bytes: int, source: int, /) -> int: ...

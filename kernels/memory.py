"""How this process's allocator treats the temporaries of a step, and memory for weights and caches."""

import ctypes
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_NEVER_TRIM = 2**31 - 1
_TOP_PAD = 16 << 20
_MADV_HUGEPAGE = 14  # Linux, asm-generic/mman-common.h
_HUGE_PAGE, _LINE = 2 << 20, 64


class Area:
    """Memory for tensors that come and go together: huge pages, where the system has them.

    A block of it is returned to the system when the last tensor in it is freed. Weights below 2 MB would never get a
    huge page of their own, and reading them costs a look-up of addresses every 4 KB; pages of a KV cache lie in any
    order, so that every one of 2 KB costs one.
    """

    def __init__(self, block_bytes: int = 32 << 20) -> None:
        """`block_bytes` are asked for at a time; what isn't used of them stays unmapped but for part of a page."""
        self._block_bytes = block_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of any contents, at a cache line; larger than a block: its own."""
        if num_bytes > self._block_bytes:
            return _huge_pages(num_bytes)
        if num_bytes > len(self._free):
            self._free = _huge_pages(self._block_bytes)
        taken, self._free = self._free[:num_bytes], self._free[-(-num_bytes // _LINE) * _LINE :]
        return taken

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty(shape, dtype=dtype)` on the CPU, at a cache line."""
        return self.take(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape)


def _huge_pages(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] that begins at a huge page. Only advice: where it fails the pages are small ones."""
    memory = torch.empty(num_bytes + _HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    if sys.platform.startswith("linux"):
        address = ctypes.c_void_p(memory.data_ptr() + start)
        whole = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(min(whole, len(memory) - start)), _MADV_HUGEPAGE)
    return memory[start : start + num_bytes]


def keep_freed_memory() -> bool:
    """Makes glibc keep what a step frees for the next step; returns whether it took the setting.

    By default blocks of more than 128 KB go back to the system when freed, and their pages are faulted in and zeroed
    again at the next step: a third of the time of prefill. Call it once weights are loaded: what loading frees is
    given back then. Only Linux with glibc; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    settings = (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_TOP_PAD, _TOP_PAD)
    return all(mallopt(name, value) == 1 for name, value in settings)

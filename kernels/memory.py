"""How this process's allocator treats the temporaries of a step."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_NEVER_TRIM = 2**31 - 1
_TOP_PAD = 16 << 20


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

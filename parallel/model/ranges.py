"""Byte ranges of weight files: exact reads, slices as ranges, and a cheap identity of what a file holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.schema import ConfigError

STAGING = 8 * 2**20
"""Bytes of the buffer that conversions between dtypes go through."""

_SAMPLE = 1024


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """A read-only file descriptor of `path`."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def read_exactly(file: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` (bytes) from byte `offset` of the open file.

    Raises:
        ConfigError: the file ends too early.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise ConfigError(
                f"{path} is truncated: it ends before byte {offset + len(buffer)}; copy or download it again"
            )
        done += count


def block_ranges(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """[start, stop) of each dimension; an index that doesn't fit the shape is our own mistake."""
    assert len(index) == len(shape), f"index {index} for shape {shape}"
    ranges: list[tuple[int, int]] = []
    for size, part in zip(shape, index, strict=True):
        start, stop, step = part.indices(size)
        assert step == 1 and part.stop in (None, stop), f"index {index} for shape {shape}"
        ranges.append((start, max(start, stop)))
    return ranges


def fingerprint(tensors: Iterable[tuple[str, str, tuple[int, ...], Path, int, int]]) -> str:
    """Identity of weights from names, dtypes, shapes and three samples of 1 KB per tensor.

    Each of `tensors` is (name, dtype, shape, file, first byte, one past the last byte).
    """
    digest = hashlib.blake2b(digest_size=16)
    buffer = bytearray(_SAMPLE)
    for name, dtype, shape, path, start, end in tensors:
        digest.update(f"{name} {dtype} {shape}\n".encode())
        length = min(_SAMPLE, end - start)
        with open_file(path) as file:
            for at in sorted({start, start + (end - start - length) // 2, end - length}):
                view = memoryview(buffer)[:length]
                read_exactly(file, view, at, path)
                digest.update(view)
    return digest.hexdigest()

"""A tensor's checksum that ranks compute of their own bytes and add up: no layout shows in it.

Multilinear hashing (arXiv:1202.4961, sec. 2, after Carter and Wegman 1979) with fixed coefficients: the tensor's bytes
are little-endian words w_i of 32 bits, zeros appended, and

    checksum = sum of c_i * w_i  mod 2^64        c_i odd, of 64 bits, from the word's place i

A rank with some of the bytes takes zeros for the others; the ranks' sums, modulo 2^64, are the sum over the tensor,
even where a word is cut. One changed word changes the sum for certain (c_i is odd), other damage but for a chance of
2^-32 or less (64-bit words would miss two flipped signs); it is no protection against someone who wants it to be right.

    pairs of words W_i = w_2i + 2^32 w_2i+1      c_2i = a_i, c_2i+1 = 2^32 a_i + b_i
    checksum = sum of a_i * W_i + b_i * (W_i >> 32)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from conf.schema import ConfigError

FILE = "train_state/checksums.json"
"""Where they are, below a checkpoint's directory."""
_ALGORITHM = "multilinear-64"
_PAIRS = 1 << 15
"""Pairs of words that share a factor: a_i = table[0, i % _PAIRS] * factor(i // _PAIRS), b_i likewise."""
_SCRATCH = 1 << 19
"""Bytes of the tensor in which short runs are put together."""
_SHORT = 1 << 13
_MASK = (1 << 64) - 1


class Checksum:
    """The sum over runs of one tensor's bytes, each given once."""

    def __init__(self) -> None:
        self._sum = 0
        self._scratch = np.empty(0, dtype=np.uint8)
        self._base = self._used = 0

    def add(self, offset: int, data: np.ndarray) -> None:
        """Adds the bytes `data` (uint8) that lie at `offset` of the tensor."""
        if len(data) >= _SHORT:
            self._sum += _sum(offset, data)
            return
        if not self._used or offset < self._base or offset + len(data) > self._base + _SCRATCH:
            self._flush()
            self._base = offset & ~7
        at = offset - self._base
        self._scratch[at : at + len(data)] = data
        self._used = max(self._used, at + len(data))

    def value(self) -> int:
        """The sum so far, in [0, 2^64)."""
        self._flush()
        return self._sum & _MASK

    def _flush(self) -> None:
        if self._used:
            self._sum += _sum(self._base, self._scratch[: self._used])
        if not len(self._scratch):
            self._scratch = np.zeros(_SCRATCH, dtype=np.uint8)
        self._scratch[: self._used] = 0
        self._used = 0


def _sum(offset: int, data: np.ndarray) -> int:
    """The sum over bytes that lie together."""
    head = min(-offset % 8, len(data))
    total = _part_of_pair(offset, data[:head])
    first = (offset + head) // 8
    pairs = data[head : head + (len(data) - head) // 8 * 8].view("<u8")
    total += _part_of_pair(offset + head + pairs.nbytes, data[head + pairs.nbytes :])
    at = 0
    while at < len(pairs):
        block, place = divmod(first + at, _PAIRS)
        count = min(_PAIRS - place, len(pairs) - at)
        a, b = _table()[:, place : place + count]
        some = pairs[at : at + count]
        total += (int(np.dot(some, a)) + int(np.dot(some >> np.uint64(32), b))) * _factor(block)
        at += count
    return total & _MASK


def _part_of_pair(offset: int, data: np.ndarray) -> int:
    """The share of fewer than 8 bytes of one pair."""
    block, place = divmod(offset // 8, _PAIRS)
    a, b = _table()[:, place].tolist()
    pair = int.from_bytes(data.tobytes(), "little") << 8 * (offset % 8)
    return (pair * a + (pair >> 32) * b) * _factor(block)


@functools.cache
def _table() -> np.ndarray:
    """uint64 [2, _PAIRS], odd."""
    return np.array([_mixed(number) for number in range(2 * _PAIRS)], dtype=np.uint64).reshape(2, _PAIRS)


@functools.cache
def _factor(block: int) -> int:
    return _mixed(2 * _PAIRS + block)


def _mixed(number: int) -> int:
    """An odd number of 64 bits from another: SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return (z ^ z >> 31) | 1


def to_text(sums: Mapping[str, Mapping[str, int]]) -> str:
    """The file's text: of each tensor file, by path, each tensor's sum."""
    files = {file: {name: f"{value:016x}" for name, value in of_file.items()} for file, of_file in sums.items()}
    return json.dumps({"algorithm": _ALGORITHM, "files": files}, indent=1) + "\n"


def read(directory: Path) -> dict[str, dict[str, int]] | None:
    """What `to_text` was given when the checkpoint was saved; None where it has no checksums.

    Raises:
        ConfigError: the file is damaged, or of another version.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["algorithm"] != _ALGORITHM:
            raise ConfigError(
                f"{path} holds checksums of another kind ({found['algorithm']}); use the version it is of"
            )
        return {
            file: {name: int(value, 16) for name, value in of_file.items()} for file, of_file in found["files"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged ({error})") from None

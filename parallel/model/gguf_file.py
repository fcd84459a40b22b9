"""GGUF files: the header parsed and checked, blocks of tensors read by row ranges and dequantised.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The `gguf`
package decodes the quantised blocks; its own reader isn't used because it turns every vocabulary entry into numpy
views (160 MB and 2 s for 49k tokens). Long arrays stay in the file until somebody asks for them.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from conf.schema import ConfigError
from parallel.model.ranges import open_file, read_exactly

CHUNK = 2 * 2**20
"""Bytes of float32 values dequantised at a time; the decoder's temporaries are about three times as much."""

SUPPORTED: tuple[str, ...] = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
"""Tensor types that can be read."""

_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata, still in the file."""

    kind: int
    count: int
    start: int
    """First byte of the first item."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch (the file has them reversed)."""
    start: int
    """First byte, counted from the beginning of the file."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True)
class GgufFile:
    """A checked GGUF file: scalar metadata in memory, arrays and tensors by position."""

    path: Path
    fields: Mapping[str, Any]
    """int, float, bool, str or GgufArray."""
    tensors: Mapping[str, GgufTensor]

    def number(self, key: str, default: float) -> float:
        """The positive number `key`, or `default` if there is no such key."""
        value = self.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{self.path}: {key}={value!r} must be a positive number")
        return float(value)

    def array(self, key: str) -> list[Any] | None:
        """The items of the array `key`, or None if there is no such key."""
        field = self.fields.get(key)
        if field is None:
            return None
        if not isinstance(field, GgufArray):
            raise ConfigError(f"{self.path}: {key} must be an array, not {field!r}")
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(self.path, data, field.start).items(field.kind, field.count)


def read_gguf(path: Path) -> GgufFile:
    """Parse and check the header of `path`.

    Raises:
        ConfigError: not a GGUF file, truncated, corrupt, a version or tensor type that isn't supported.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    size = path.stat().st_size
    if size < 24:
        raise ConfigError(f"{path} is truncated: {size} bytes are no GGUF file; copy or download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data, 0)
        magic, version, num_tensors, num_fields = cursor.unpack("4sIQQ")
        if magic != b"GGUF":
            raise ConfigError(f"{path} is not a GGUF file: it begins with {magic!r}")
        if version not in (2, 3):
            raise ConfigError(f"{path}: GGUF version {version} is not supported; supported are 2 and 3, little-endian")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.string()
            fields[key] = cursor.value(*cursor.unpack("I"))
        infos = [cursor.tensor_info() for _ in range(num_tensors)]
        header_end = cursor.at
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ConfigError(f"{path} is corrupt: general.alignment={alignment!r}")
    start = -(-header_end // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise ConfigError(f"{path} is corrupt: two tensors are called {name}")
        tensors[name] = _tensor(path, name, shape, kind, start + offset, size)
    _check_overlap(path, tensors)
    return GgufFile(path, MappingProxyType(fields), MappingProxyType(tensors))


def read_rows(
    path: Path, tensor: GgufTensor, rows: Sequence[int], columns: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`dtype` [len(rows), columns]: the dequantised matrix rows in the order asked for.

    A vector of n values is a matrix of n rows and one column. Besides the result about 4 x `CHUNK` bytes are held.

    Raises:
        ConfigError: the file ends too early.
    """
    width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    first_block, last_block = columns[0] // block, -(-columns[1] // block)
    row_bytes = width // block * block_bytes
    piece = (first_block * block_bytes, last_block * block_bytes)
    out = torch.empty((len(rows), columns[1] - columns[0]), dtype=dtype)
    inner = slice(columns[0] - first_block * block, columns[1] - first_block * block)
    chunk = max(1, CHUNK // max(1, (last_block - first_block) * block * 4))
    with open_file(path) as file:
        for first in range(0, len(rows), chunk):
            wanted = np.asarray(rows[first : first + chunk], dtype=np.int64)
            raw = _raw_rows(file, path, tensor.start, wanted, row_bytes, piece)
            values = torch.from_numpy(dequantize(raw, tensor.kind))
            out[first : first + len(wanted)].copy_(values[:, inner])
    return out


def _raw_rows(
    file: int, path: Path, start: int, rows: np.ndarray, row_bytes: int, piece: tuple[int, int]
) -> np.ndarray:
    """uint8 [len(rows), piece]: bytes `piece` of each row; neighbouring whole rows are read together."""
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    length = piece[1] - piece[0]
    raw = np.empty((len(rows), length), dtype=np.uint8)
    joined = length == row_bytes
    breaks = np.flatnonzero(np.diff(ascending) != 1) + 1 if joined else np.arange(1, len(rows))
    bounds = [0, *breaks.tolist(), len(rows)]
    buffer = memoryview(raw).cast("B") if raw.size else memoryview(b"")
    for begin, end in itertools.pairwise(bounds):
        offset = start + int(ascending[begin]) * row_bytes + piece[0]
        read_exactly(file, buffer[begin * length : end * length], offset, path)
    if np.array_equal(order, np.arange(len(rows))):
        return raw
    back = np.empty_like(order)
    back[order] = np.arange(len(rows))
    return raw[back]


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int, size: int) -> GgufTensor:
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        raise ConfigError(f"{path} is corrupt: {name} has the unknown tensor type {kind}") from None
    if quantization.name not in SUPPORTED:
        raise ConfigError(
            f"{path}: {name} has type {quantization.name}, which is not supported; supported are {', '.join(SUPPORTED)}"
        )
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if not shape or shape[-1] % block or (len(shape) == 1 and block > 1):
        raise ConfigError(f"{path} is corrupt: {name} {list(shape)} doesn't fit {quantization.name} blocks of {block}")
    end = start + math.prod(shape) // block * block_bytes
    if end > size:
        raise ConfigError(
            f"{path} is truncated: {name} ends at byte {end}, the file at {size}; copy or download it again"
        )
    return GgufTensor(quantization, shape, start, end)


def _check_overlap(path: Path, tensors: Mapping[str, GgufTensor]) -> None:
    at, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < at:
            raise ConfigError(f"{path} is corrupt: {name} overlaps {before}")
        at, before = tensor.end, name


class _Cursor:
    """Reads little-endian values one after another; running past the end is a ConfigError."""

    def __init__(self, path: Path, data: mmap.mmap, at: int) -> None:
        self.path, self.data, self.at = path, data, at

    def unpack(self, form: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + form)
        begin = self._advance(layout.size)
        return layout.unpack_from(self.data, begin)

    def string(self) -> str:
        (length,) = self.unpack("Q")
        begin = self._advance(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{self.path} is corrupt: the string at byte {begin} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A scalar, a string, or a GgufArray that is skipped."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            (value,) = self.unpack(_SCALARS[kind])
            return float(str(np.float32(value))) if kind == 6 else value
        if kind != _ARRAY:
            raise ConfigError(f"{self.path} is corrupt: unknown metadata type {kind} before byte {self.at}")
        item, count = self.unpack("IQ")
        array = GgufArray(item, count, self.at)
        if item in _SCALARS:
            self._advance(count * struct.calcsize("<" + _SCALARS[item]))
        elif item == _STRING:
            for _ in range(count):
                self._advance(*self.unpack("Q"))
        else:
            raise ConfigError(f"{self.path}: arrays of metadata type {item} are not supported")
        return array

    def items(self, kind: int, count: int) -> list[Any]:
        """The items of an array that `value` has walked over before."""
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.unpack(f"{count}{_SCALARS[kind]}"))

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape outermost first, type, offset in the data section)."""
        name = self.string()
        (dims,) = self.unpack("I")
        if dims > 4:
            raise ConfigError(f"{self.path} is corrupt: {name} has {dims} dimensions")
        *shape, kind, offset = self.unpack(f"{dims}QIQ")
        return name, tuple(reversed(shape)), kind, offset

    def _advance(self, count: int) -> int:
        begin = self.at
        if count > len(self.data) - begin:
            raise ConfigError(
                f"{self.path} is truncated: its header ends at byte {len(self.data)} of at least {begin + count}; "
                "copy or download it again"
            )
        self.at += count
        return begin

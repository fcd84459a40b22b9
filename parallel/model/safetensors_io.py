"""Safetensors files by byte range: headers parsed, checked and built; blocks read without touching the rest.

A file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, data_offsets), then the data
(https://github.com/huggingface/safetensors, "Format"). The `safetensors` package maps whole files; here a rank
reads just the bytes of its block with `preadv`, so anonymous memory holds the block and at most `STAGING` more:

    block = whole rows             same dtype: one read straight into the result
    block = columns of rows        one read per row
    other dtype asked for          reads go through a staging buffer, row range after row range
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from conf.schema import ConfigError
from parallel.model.ranges import STAGING, block_ranges, open_file, read_exactly

_MAX_HEADER = 100_000_000  # the format's own limit
_AGAIN = "copy or download it again"

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Safetensors' dtype codes that we read and write."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True)
class Header:
    """The parsed header of one file."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of `path`, checked against the file's size.

    Raises:
        ConfigError: missing, truncated or corrupt file, unknown dtype, offsets that overlap, leave holes or leave
            the file.
    """
    header, start = parse_header(path)
    _check_layout(path, header.entries, start, path.stat().st_size)
    return header


def parse_header(path: Path) -> tuple[Header, int]:
    """The header of `path`, whatever follows it in the file, and the first byte after it.

    Raises:
        ConfigError: missing or corrupt file, unknown dtype, a header that the file is too short for.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= _MAX_HEADER:
            raise ConfigError(f"{path} is not a safetensors file: its header length is {length} of {size} bytes")
        if 8 + length > size:
            raise ConfigError(
                f"{path} is truncated: its header ends at byte {8 + length}, the file at {size}; {_AGAIN}"
            )
        raw = file.read(length)
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is corrupt: its header is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is corrupt: its header is not a JSON object")
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ConfigError(f"{path} is corrupt: its __metadata__ is not an object")
    entries = {name: _entry(path, name, field, 8 + length) for name, field in fields.items()}
    return Header(MappingProxyType(entries), MappingProxyType(metadata)), 8 + length


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """The first bytes of a file that holds `tensors` (name -> dtype, shape) in that order, and where each will lie.

    The data begins at a multiple of 8 bytes, right after the returned bytes, and has no holes.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        length = math.prod(shape) * dtype.itemsize
        fields[name] = {
            "dtype": codes[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    raw = json.dumps(fields, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    entries = {
        name: Entry(dtype, tuple(shape), *(start + at for at in fields[name]["data_offsets"]))
        for name, (dtype, shape) in tensors.items()
    }
    return len(raw).to_bytes(8, "little") + raw, Header(MappingProxyType(entries), MappingProxyType(dict(metadata)))


def read_block(path: Path, entry: Entry, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
    """The block `full[index]` of the tensor at `entry`, as a new contiguous `dtype` tensor.

    Beyond the result at most `STAGING` bytes (or one row's, if that is more) are held. `index` has one slice with
    step 1 per dimension; dimensions after the second must be whole.

    Raises:
        ConfigError: the file ends before the block does.
    """
    ranges = block_ranges(entry.shape, index)
    block = torch.empty([stop - start for start, stop in ranges], dtype=dtype)
    if block.numel() == 0:
        return block
    rows, columns, width = _matrix(entry.shape, ranges)
    out = block.view(rows[1] - rows[0], columns[1] - columns[0])
    with open_file(path) as file:
        if dtype == entry.dtype:
            _read_rows(file, path, entry, rows, columns, width, out)
            return block
        chunk = max(1, STAGING // (out.shape[1] * entry.dtype.itemsize))
        staging = torch.empty((min(chunk, out.shape[0]), out.shape[1]), dtype=entry.dtype)
        for first in range(0, out.shape[0], chunk):
            last = min(first + chunk, out.shape[0])
            part = staging[: last - first]
            _read_rows(file, path, entry, (rows[0] + first, rows[0] + last), columns, width, part)
            out[first:last].copy_(part)
    return block


def _entry(path: Path, name: str, field: Any, data_start: int) -> Entry:
    try:
        code, shape, (start, end) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
        whole = all(isinstance(value, int) and value >= 0 for value in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole, code, shape, start, end = False, "", (), 0, 0
    if not whole:
        raise ConfigError(f"{path} is corrupt: the header entry of {name} is {json.dumps(field)[:120]}")
    if code not in DTYPES:
        raise ConfigError(f"{path}: {name} has dtype {code}; supported are {', '.join(DTYPES)}")
    dtype = DTYPES[code]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ConfigError(f"{path} is corrupt: {name} {code} {list(shape)} can't take {end - start} bytes")
    return Entry(dtype, shape, data_start + start, data_start + end)


def _check_layout(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors follow each other without overlap or hole, and the last one ends the file."""
    at, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            raise ConfigError(f"{path} is truncated: {name} ends at byte {entry.end}, the file at {size}; {_AGAIN}")
        if entry.start != at:
            problem = "overlaps" if entry.start < at else "leaves a hole after"
            raise ConfigError(f"{path} is corrupt: {name} {problem} {before}")
        at, before = entry.end, name
    if at != size:
        raise ConfigError(f"{path} is corrupt: {size - at} bytes follow the last tensor")


def _matrix(shape: tuple[int, ...], ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int], int]:
    """The block as (rows, columns, full number of columns) of a matrix; vectors are one column wide."""
    if len(shape) < 2:
        return (ranges[0] if ranges else (0, 1)), (0, 1), 1
    inner = math.prod(shape[2:])
    assert ranges[2:] == [(0, size) for size in shape[2:]], f"a cut beyond dimension 2 of {shape}"
    return ranges[0], (ranges[1][0] * inner, ranges[1][1] * inner), shape[1] * inner


def _read_rows(
    file: int,
    path: Path,
    entry: Entry,
    rows: tuple[int, int],
    columns: tuple[int, int],
    width: int,
    out: Tensor,
) -> None:
    """Read rows x columns of a matrix `width` wide into the contiguous `out` of the file's dtype."""
    size = entry.dtype.itemsize
    buffer = memoryview(out.view(torch.uint8).numpy()).cast("B")
    if columns == (0, width):
        read_exactly(file, buffer, entry.start + rows[0] * width * size, path)
        return
    step = (columns[1] - columns[0]) * size
    for number, row in enumerate(range(*rows)):
        offset = entry.start + (row * width + columns[0]) * size
        read_exactly(file, buffer[number * step : (number + 1) * step], offset, path)

"""Whether a checkpoint is as it was saved: every tensor's bytes against its checksum."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.schema import ConfigError
from parallel.checkpoint import checksum
from parallel.checkpoint.checksum import Checksum
from parallel.model.ranges import open_file, read_exactly
from parallel.model.safetensors_io import Entry, parse_header, read_header

_PART = 8 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    problems: tuple[str, ...]
    """Whatever is damaged, truncated or missing, a line each."""
    tensors: int
    """Tensors that are as they were saved; in files alone where there are no checksums."""
    files: int
    has_checksums: bool


def verify(directory: Path) -> Verdict:
    """Reads every tensor once. Without checksums (other tools' directories, older versions') only headers and sizes."""
    problems = [
        f"{path.relative_to(directory)} is damaged: it is no JSON"
        for path in sorted([*directory.glob("*.json"), *directory.glob("train_state/*.json")])
        if not _is_json(path)
    ]
    try:
        sums = checksum.read(directory)
    except ConfigError as error:
        return Verdict((*problems, str(error)), 0, 0, True)
    if sums is None:
        paths = sorted([*directory.glob("*.safetensors"), *directory.glob("train_state/*.safetensors")])
        right = 0
        for path in paths:
            try:
                right += len(read_header(path).entries)
            except ConfigError as error:
                problems.append(str(error))
        return Verdict(tuple(problems), right, len(paths), False)
    right = 0
    for name, expected in sums.items():
        wrong, good = _file(directory / name, name, expected)
        problems += wrong
        right += good
    return Verdict(tuple(problems), right, len(sums), True)


def _file(path: Path, name: str, expected: dict[str, int]) -> tuple[list[str], int]:
    """(problems, tensors that have none) of one file."""
    if not path.is_file():
        return [f"{name} is missing, and with it {len(expected)} tensors"], 0
    try:
        header, _ = parse_header(path)
    except ConfigError as error:
        return [str(error)], 0
    size, problems = path.stat().st_size, list[str]()
    for tensor, value in expected.items():
        entry = header.entries.get(tensor)
        if entry is None:
            problems.append(f"{name}: {tensor} is missing")
        elif entry.end > size:
            problems.append(f"{name}: {tensor} is truncated: it ends at byte {entry.end}, the file at {size}")
        elif _sum_of(path, entry) != value:
            problems.append(f"{name}: {tensor} is damaged: its bytes don't have the checksum that they were saved with")
    good = len(expected) - len(problems)
    return problems + [
        f"{name}: {tensor} was not there when the checkpoint was saved"
        for tensor in header.entries
        if tensor not in expected
    ], good


def _sum_of(path: Path, entry: Entry) -> int:
    total = Checksum()
    buffer = np.empty(_PART, dtype=np.uint8)
    with open_file(path) as file:
        for at in range(entry.start, entry.end, _PART):
            part = buffer[: min(_PART, entry.end - at)]
            read_exactly(file, memoryview(part), at, path)
            total.add(at - entry.start, part)
    return total.value()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True

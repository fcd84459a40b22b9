"""Sharded tensors to and from safetensors files: each rank writes and reads exactly its own bytes.

A checkpoint is a directory that is a valid model or adapter directory, with `train_state/` beside it for what only
training needs. It is written under another name and renamed when every byte is on disk, so a crash at any moment
leaves the previous checkpoint as it was:

    checkpoints/.step-20.partial/   written by all ranks, each tensor block once, at its place in the file
    checkpoints/step-20/            after the rename by rank 0
    checkpoints/latest -> step-20   a relative link, replaced by rename
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conf.schema import ConfigError
from parallel import comm
from parallel.mesh import Mesh
from parallel.model.ranges import open_file, read_exactly
from parallel.model.safetensors_io import build_header, read_header
from parallel.sharding import Index, Spec

PARTIAL = ".{name}.partial"


@dataclass(frozen=True)
class Block:
    """A rank's part of a tensor that goes into a file; `spec.owned` says which part it writes."""

    spec: Spec
    tensor: Tensor
    file_shape: tuple[int, ...] | None = None
    """Shape in the file where it differs from `spec.shape` (same elements in the same order)."""


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file of a checkpoint and this rank's share in it."""

    name: str
    """Path below the checkpoint's directory."""
    blocks: Sequence[Block]
    metadata: Mapping[str, str]


def save(directory: Path, files: Sequence[TensorFile], texts: Mapping[str, str], mesh: Mesh) -> None:
    """Writes a checkpoint directory; collective over the whole mesh. See the module's picture.

    files: sharded tensors. Only the first replica (data and context rank 0) writes them, the others hold the same.
    texts: small files by path, written by rank 0; equal on all ranks or given on rank 0 alone.
    Communicates names and shapes (JSON), three barriers and one more per file.
    """
    partial = directory.parent / PARTIAL.format(name=directory.name)
    if mesh.world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in texts.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            _sync(path)
    comm.barrier(mesh.world)
    writes = mesh.replicas.rank == 0
    for file in files:
        _write_file(partial / file.name, file, mesh, writes)
    comm.barrier(mesh.world)
    if mesh.world.rank == 0:
        publish(partial, directory)
    comm.barrier(mesh.world)


def publish(partial: Path, directory: Path) -> None:
    """Gives a finished checkpoint its name and points `latest` at it."""
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        _sync(folder)
    if directory.exists():  # the same step again, after a resume from an earlier one
        old = directory.parent / PARTIAL.format(name=f"{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        partial.rename(directory)
    _point(directory.parent / "latest", directory.name)


def reader(path: Path, prefix: str = "") -> Callable[[Spec, torch.dtype], Tensor]:
    """Reads this rank's block of a spec's tensor `prefix + name` from the file, whatever layout wrote it.

    The file may hold the same elements in the same order under another shape. Its header is read once, here.

    Raises:
        ConfigError: the file is missing or damaged; when reading, it lacks a tensor or holds it in another shape.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing; the checkpoint is not complete")
    header = read_header(path)

    def read(spec: Spec, dtype: torch.dtype) -> Tensor:
        name = prefix + spec.name
        entry = header.entries.get(name)
        if entry is None:
            raise ConfigError(f"{path} has no tensor {name}; it was saved with other tune.* settings")
        if math.prod(entry.shape) != math.prod(spec.shape):
            raise ConfigError(f"{path}: {name} has shape {list(entry.shape)}, expected {list(spec.shape)}")
        block = torch.empty(spec.local_shape, dtype=entry.dtype)
        data = memoryview(_bytes_of(block))
        at = 0
        with open_file(path) as file:
            for offset, length in _byte_runs(spec.shape, spec.index, entry.dtype.itemsize):
                read_exactly(file, data[at : at + length], entry.start + offset, path)
                at += length
        return block.to(dtype)

    return read


def _write_file(path: Path, file: TensorFile, mesh: Mesh, writes: bool) -> None:
    tensors = {block.spec.name: (block.tensor.dtype, block.file_shape or block.spec.shape) for block in file.blocks}
    raw, header = build_header(_agree(tensors, mesh), file.metadata)
    if mesh.world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.write(raw)
            out.truncate(max([len(raw), *(entry.end for entry in header.entries.values())]))
    comm.barrier(mesh.world)
    if not writes:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for block in file.blocks:
            if block.spec.owned is not None:
                _write_block(descriptor, header.entries[block.spec.name].start, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _agree(
    mine: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], mesh: Mesh
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of all ranks, sorted by name, from each rank's own."""
    text = json.dumps({name: [str(dtype).removeprefix("torch."), list(shape)] for name, (dtype, shape) in mine.items()})
    union: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for source in range(mesh.model.size):
        part = json.loads(comm.broadcast_bytes(text.encode(), mesh.model, source))
        union |= {name: (getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in part.items()}
    return dict(sorted(union.items()))


def _write_block(descriptor: int, start: int, block: Block) -> None:
    """Writes the owned part: one call per run of bytes that lie together in the file."""
    spec = block.spec
    assert spec.owned is not None
    inner = tuple(slice(o.start - i.start, o.stop - i.start) for o, i in zip(spec.owned, spec.index, strict=True))
    data = _bytes_of(block.tensor.detach()[inner].cpu().contiguous())
    at = 0
    for offset, length in _byte_runs(spec.shape, spec.owned, block.tensor.dtype.itemsize):
        _write_exactly(descriptor, data[at : at + length], start + offset)
        at += length


def _bytes_of(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return x.reshape(-1).view(torch.uint8).numpy()


def _byte_runs(shape: tuple[int, ...], index: Index, itemsize: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of the runs that `index` makes in a row-major tensor, in order."""
    outer = len(shape)
    while outer > 0 and index[outer - 1] == slice(0, shape[outer - 1]):
        outer -= 1
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    if outer == 0:
        yield 0, math.prod(shape) * itemsize
        return
    last = index[outer - 1]
    length = (last.stop - last.start) * strides[outer - 1]
    if length == 0:
        return
    for place in product(*(range(s.start, s.stop) for s in index[: outer - 1])):
        offset = sum(at * stride for at, stride in zip(place, strides, strict=False))
        yield offset + last.start * strides[outer - 1], length


def _write_exactly(descriptor: int, data: np.ndarray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the `count` newest of the `step-N` directories up to the one `latest` points at.

    Later ones are left from a run that was begun again at an earlier step, and are nobody's newest.
    """
    latest = _step((folder / "latest").resolve())
    steps = sorted((step, path) for path in folder.iterdir() if (step := _step(path)) is not None)
    for _, path in [(step, path) for step, path in steps if latest is not None and step <= latest][:-count]:
        shutil.rmtree(path)


def _step(path: Path) -> int | None:
    """N of a directory named step-N."""
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found[1]) if found else None


def begin(folder: Path, start: Path | None) -> None:
    """Makes `latest` in the checkpoint folder of a run what the run starts from; before its metrics are cut.

    start: the checkpoint it goes on from, None for a fresh start. Without this a run that stops before its first
    checkpoint would be resumed from an earlier run's.
    """
    link = folder / "latest"
    if start is not None and start.parent == folder.resolve():
        _point(link, start.name)
    else:
        link.unlink(missing_ok=True)


def _point(link: Path, name: str) -> None:
    """Replaces the link in one rename."""
    new = link.with_name(PARTIAL.format(name=link.name))
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.rename(link)
    _sync(link.parent)


def renamed(spec: Spec, name: str) -> Spec:
    """The same placement under another name, e.g. an optimizer moment's."""
    return replace(spec, name=name)

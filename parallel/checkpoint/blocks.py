"""A rank's blocks in safetensors files: runs of bytes that are written and read at their places."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conf.schema import ConfigError
from parallel.checkpoint.checksum import Checksum
from parallel.model.ranges import open_file, read_exactly
from parallel.model.safetensors_io import Header, read_header
from parallel.sharding import Index, Spec

Stretch = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """A rank's part of a tensor that goes into a file; of that, `spec.owned` says which part it writes."""

    spec: Spec
    tensor: Tensor
    """[*spec.local_shape], or the elements of a stretch in one dimension."""
    file_shape: tuple[int, ...] | None = None
    """Shape in the file where it differs from `spec.shape` (same elements in the same order)."""
    stretch: Stretch | None = None
    """[start, stop) of the elements of the rank's block that `tensor` holds; None when it is all of them. Replicas
    hold the same block, but stretches of their own."""


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file of a checkpoint and this rank's share in it.

    Ranks that hold the same blocks list them in the same order.
    """

    name: str
    """Path below the checkpoint's directory."""
    blocks: Sequence[Block]
    metadata: Mapping[str, str]


def write(path: Path, header: Header, blocks: Sequence[Block], replica: tuple[int, int]) -> dict[str, int]:
    """Writes this rank's bytes into the file at `path`, which has its full size already, and to the disk.

    replica: (rank, size) among those that hold the same blocks: they write every size-th one each, but all of their
    own stretches. Returns this rank's part of the checksum of every tensor it wrote to.
    """
    sums: dict[str, int] = {}
    rank, size = replica
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for number, block in enumerate(blocks):
            mine = block.stretch is not None or number % size == rank
            if mine and block.spec.owned is not None:
                start = header.entries[block.spec.name].start
                sums[block.spec.name] = write_block(descriptor, start, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sums


def write_block(descriptor: int, start: int, block: Block) -> int:
    """Writes the owned part of a block of the tensor at byte `start`: one call per run of bytes that lie together in
    the file. Returns their checksum."""
    spec, itemsize = block.spec, block.tensor.dtype.itemsize
    assert spec.owned is not None
    assert block.tensor.numel() == _num_elements(spec, block.stretch), (spec.name, block.stretch)
    data = _bytes_of(block.tensor.detach().cpu().contiguous())
    checksum = Checksum()
    for offset, place, length in byte_runs(spec, spec.owned, itemsize, block.stretch):
        part = data[place : place + length]
        _write_exactly(descriptor, part, start + offset)
        checksum.add(offset, part)
    return checksum.value()


@dataclass(frozen=True)
class Reader:
    """Reads blocks from a file, whatever layout wrote it."""

    path: Path
    header: Header
    prefix: str

    def __call__(self, spec: Spec, dtype: torch.dtype, stretch: Stretch | None = None) -> Tensor:
        """This rank's block of the tensor `prefix + spec.name`, or a stretch of it in one dimension, as a new tensor.

        The file may hold the same elements in the same order under another shape. Reads only the block's bytes.

        Raises:
            ConfigError: the file lacks the tensor, holds it in another shape, or ends too early.
        """
        name = self.prefix + spec.name
        entry = self.header.entries.get(name)
        if entry is None:
            raise ConfigError(f"{self.path} has no tensor {name}; it was saved with other tune.* settings")
        if math.prod(entry.shape) != math.prod(spec.shape):
            raise ConfigError(f"{self.path}: {name} has shape {list(entry.shape)}, expected {list(spec.shape)}")
        block = torch.empty(_num_elements(spec, stretch), dtype=entry.dtype)
        data = memoryview(_bytes_of(block))
        with open_file(self.path) as file:
            for offset, place, length in byte_runs(spec, spec.index, entry.dtype.itemsize, stretch):
                read_exactly(file, data[place : place + length], entry.start + offset, self.path)
        return (block if stretch is not None else block.view(spec.local_shape)).to(dtype)


def reader(path: Path, prefix: str = "") -> Reader:
    """What reads tensors `prefix + name` from the file. Its header is read once, here.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing; the checkpoint is not complete")
    return Reader(path, read_header(path), prefix)


def byte_runs(
    spec: Spec, wanted: Index, itemsize: int, stretch: Stretch | None = None
) -> Iterator[tuple[int, int, int]]:
    """(offset in the full tensor, place in the stretch, length) in bytes of the runs that `wanted` makes, in order.

    wanted: a part of `spec.index`. stretch: elements of the row-major block `spec.index`; None for all of them.
    """
    first, last = (0, _num_elements(spec, None)) if stretch is None else stretch
    first, last = first * itemsize, last * itemsize
    inner = tuple(slice(w.start - i.start, w.stop - i.start) for w, i in zip(wanted, spec.index, strict=True))
    outer = len(spec.shape)  # dimensions before it are walked, those from it on are whole
    while outer > 0 and wanted[outer - 1] == slice(0, spec.shape[outer - 1]):
        outer -= 1
    if outer == 0:
        yield from _clipped(0, 0, math.prod(spec.shape) * itemsize, first, last)
        return
    full, local = _strides(spec.shape, itemsize), _strides(spec.local_shape, itemsize)
    cut = outer - 1
    length = (wanted[cut].stop - wanted[cut].start) * full[cut]
    for outside, inside in zip(_places(wanted[:cut], full), _places(inner[:cut], local), strict=True):
        offset, place = outside + wanted[cut].start * full[cut], inside + inner[cut].start * local[cut]
        yield from _clipped(offset, place, length, first, last)


def _clipped(offset: int, place: int, length: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """The run's part between bytes `first` and `last` of the block, if there is one."""
    start, stop = max(place, first), min(place + length, last)
    if start < stop:
        yield offset + start - place, start - first, stop - start


def _places(index: Index, strides: Sequence[int]) -> Iterator[int]:
    for at in product(*(range(part.start, part.stop) for part in index)):
        yield sum(number * stride for number, stride in zip(at, strides, strict=False))


def _strides(shape: Sequence[int], itemsize: int) -> list[int]:
    return [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]


def _num_elements(spec: Spec, stretch: Stretch | None) -> int:
    return math.prod(spec.local_shape) if stretch is None else stretch[1] - stretch[0]


def _bytes_of(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return x.reshape(-1).view(torch.uint8).numpy()


def _write_exactly(descriptor: int, data: np.ndarray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def renamed(spec: Spec, name: str) -> Spec:
    """The same placement under another name, e.g. an optimizer moment's."""
    return replace(spec, name=name)

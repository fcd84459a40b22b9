"""A checkpoint's directory: written by all ranks beside its name, published by rename, kept or removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from parallel import comm
from parallel.checkpoint import checksum
from parallel.checkpoint.blocks import TensorFile, write
from parallel.mesh import Mesh
from parallel.model.safetensors_io import Header, build_header

PARTIAL = ".{name}.partial"
Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def save(directory: Path, files: Sequence[TensorFile], texts: Mapping[str, str], mesh: Mesh) -> None:
    """Writes a checkpoint directory; collective over the whole mesh. See the package's picture.

    files: sharded tensors. Replicas (data and context ranks) hold the same blocks and take turns in writing them.
    texts: small files by path, written by rank 0; equal on all ranks or given on rank 0 alone.
    Communicates names and shapes (JSON), three barriers, and per file one more and a sum of 8 bytes a tensor.
    """
    partial = directory.parent / PARTIAL.format(name=directory.name)
    if mesh.world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in texts.items():
            _write_text(partial / name, text)
    comm.barrier(mesh.world)
    sums = {file.name: _write_file(partial / file.name, file, mesh) for file in files}
    comm.barrier(mesh.world)
    if mesh.world.rank == 0:
        _write_text(partial / checksum.FILE, checksum.to_text(sums))
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


def _write_file(path: Path, file: TensorFile, mesh: Mesh) -> dict[str, int]:
    """Writes this rank's part; returns the checksums of all tensors."""
    tensors = {block.spec.name: (block.tensor.dtype, block.file_shape or block.spec.shape) for block in file.blocks}
    everything = _agree(tensors, mesh)
    if mesh.world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = create(path, everything, file.metadata)
    else:
        header = build_header(everything, file.metadata)[1]
    comm.barrier(mesh.world)
    mine = write(path, header, file.blocks, (mesh.replicas.rank, mesh.replicas.size))
    parts = np.array([mine.get(name, 0) for name in everything], dtype=np.uint64).view(np.int64)
    whole = comm.all_reduce(torch.from_numpy(parts), mesh.world).numpy().view(np.uint64)  # integers wrap
    return dict(zip(everything, whole.tolist(), strict=True))


def create(path: Path, tensors: Described, metadata: Mapping[str, str]) -> Header:
    """Makes a safetensors file for these tensors, in its full size and without their values."""
    raw, header = build_header(tensors, metadata)
    with path.open("wb") as out:
        out.write(raw)
        out.truncate(max([len(raw), *(entry.end for entry in header.entries.values())]))
    return header


def _agree(mine: Described, mesh: Mesh) -> Described:
    """The tensors of all ranks, sorted by name, from each rank's own."""
    text = json.dumps({name: [str(dtype).removeprefix("torch."), list(shape)] for name, (dtype, shape) in mine.items()})
    union: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for source in range(mesh.model.size):
        part = json.loads(comm.broadcast_bytes(text.encode(), mesh.model, source))
        union |= {name: (getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in part.items()}
    return dict(sorted(union.items()))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    _sync(path)


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

"""Any layout to any layout, bitwise: all ranks of random layouts write and read in one process, without talking."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import TuneConf
from kernels import dispatch
from parallel import gradients, zero
from parallel.checkpoint import Block, blocks, reader, renamed
from parallel.checkpoint.blocks import Reader
from parallel.checkpoint.directory import create
from parallel.comm import Group
from parallel.gradients import Gradients, Piece
from parallel.mesh import Mesh
from parallel.model.safetensors_io import build_header
from parallel.sharding import Spec
from tests.models import TINY, RandomWeights
from tests.training import layout
from train.model import Model, build_model

SMALL = replace(TINY, num_layers=2, width=12, num_heads=6, num_kv_heads=3, head_dim=2, ffn_width=10, vocab_size=11)
TUNES = {
    "tied": TuneConf(kind="full"),
    "untied": TuneConf(kind="full"),
    "lora": TuneConf(kind="lora", rank=3, targets=("k_proj", "o_proj", "up_proj")),
    "prefix": TuneConf(kind="prefix", virtual_tokens=4),
    "projected": TuneConf(kind="prefix", virtual_tokens=4, prefix_projection=True, prefix_hidden=5),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """Sizes of a layout, and whether its replicas share the optimizer's state out."""

    stages: tuple[int, ...]
    tensor: int
    replicas: int
    zero: bool

    @staticmethod
    def draw(random: random.Random) -> Layout:
        stages = random.choice([(2,), (1, 1)])
        tensor, replicas = random.choice([1, 2, 3, 4, 5, 6]), random.choice([1, 2, 3])
        return Layout(stages, tensor, replicas, random.random() < 0.7)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1500)
    monkeypatch.setattr(zero, "CHUNK", 7)


@cache
def model_of(tune: str, stages: tuple[int, ...], size: int, stage: int, tensor: int) -> Model:
    mesh = Mesh(
        pipeline=Group("pipeline", stage, tuple(range(len(stages)))),
        tensor=Group("tensor", tensor, tuple(range(size))),
    )
    architecture = replace(SMALL, tied_embeddings=tune != "untied")
    run = layout(pipeline=len(stages), stages=stages, tune=TUNES[tune], architecture=architecture, dtype="float32")
    return build_model(
        run.config, RandomWeights(architecture), mesh, dispatch.select(torch.device("cpu"), torch.float32)
    )


@cache
def rank_of(tune: str, at: Layout, stage: int, tensor: int, replica: int) -> list[Piece]:
    """The whole parameters, then the pieces whose moments the rank has."""
    placed = model_of(tune, at.stages, at.tensor, stage, tensor).trainable()
    mesh = Mesh(replicas=Group("data+context", replica, tuple(range(at.replicas))))
    pieces = Gradients(mesh, placed, sharded=at.zero).pieces()
    return [*(Piece(spec, parameter) for spec, parameter in placed), *pieces]


def ranks_of(tune: str, at: Layout) -> list[tuple[int, list[Piece]]]:
    places = product(range(at.replicas), range(len(at.stages)), range(at.tensor))
    return [(replica, rank_of(tune, at, stage, tensor, replica)) for replica, stage, tensor in places]


def go_through(tune: str, at: Layout, source: Path, target: Path) -> dict[str, int]:
    """All ranks of the layout read `source`, then write `target`; returns the sum of their checksums."""
    read = {name: reader(source, name) for name in ("", *(f"{name}." for name in MOMENTS))}
    written = [(replica, _blocks(pieces, read)) for replica, pieces in ranks_of(tune, at)]
    tensors = {
        block.spec.name: (torch.float32, block.spec.shape) for _, blocks_of_rank in written for block in blocks_of_rank
    }
    header = create(target, dict(sorted(tensors.items())), {})
    sums: dict[str, int] = dict.fromkeys(header.entries, 0)
    for replica, blocks_of_rank in written:
        for name, part in blocks.write(target, header, blocks_of_rank, (replica, at.replicas)).items():
            sums[name] = (sums[name] + part) % 2**64
    return sums


def _blocks(pieces: list[Piece], read: dict[str, Reader]) -> list[Block]:
    half = len(pieces) // 2
    found = [Block(piece.spec, read[""](piece.spec, torch.float32)) for piece in pieces[:half]]
    for piece, name in product(pieces[half:], MOMENTS):
        moment = read[f"{name}."](piece.spec, torch.float32, piece.stretch)
        found.append(Block(renamed(piece.spec, f"{name}.{piece.spec.name}"), moment, stretch=piece.stretch))
    return found


def origin(tune: str, path: Path) -> None:
    """A file with random values, written without any of our code but its header's."""
    alone = Layout((2,), 1, 1, False)
    specs: list[Spec] = [piece.spec for piece in rank_of(tune, alone, 0, 0, 0)][
        : len(rank_of(tune, alone, 0, 0, 0)) // 2
    ]
    names = {f"{prefix}{spec.name}": spec.shape for spec in specs for prefix in ("", "exp_avg.", "exp_avg_sq.")}
    raw, _ = build_header({name: (torch.float32, names[name]) for name in sorted(names)}, {})
    values = np.random.default_rng(len(names)).standard_normal(sum(map(math.prod, names.values())), dtype=np.float32)
    path.write_bytes(raw + values.tobytes())


@pytest.mark.parametrize("tune", TUNES)
def test_random_layouts_there_and_back(tune: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 pairs for each kind of training: A -> B -> A leaves every byte of weights and moments as it was."""
    written: list[int] = []
    write = blocks._write_exactly

    def count(descriptor: int, data: np.ndarray, offset: int) -> None:
        written.append(len(data))
        write(descriptor, data, offset)

    monkeypatch.setattr(blocks, "_write_exactly", count)
    monkeypatch.setattr(blocks.os, "fsync", lambda descriptor: None)
    first = tmp_path / "first"
    origin(tune, first)
    expected, draw, sums = first.read_bytes(), random.Random(tune), None
    source = first
    for pair in range(40):
        first_layout, second = Layout.draw(draw), Layout.draw(draw)
        for at in (second, first_layout):  # what the first one writes are the bytes of `source`
            target = tmp_path / f"{pair}-{at is second}"
            found = go_through(tune, at, source, target)
            assert target.read_bytes() == expected, (first_layout, second, at)
            sums = sums or found
            assert found == sums, (first_layout, second, at)
            assert sum(written) == len(expected) - _header_bytes(expected), "bytes written twice"
            written.clear()
            if source is not first:
                source.unlink()
            source = target


def _header_bytes(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def test_the_layouts_of_the_pairs_have_what_is_hard() -> None:
    draw = random.Random("tied")
    drawn = [Layout.draw(draw) for _ in range(80)]
    assert sum(at.zero and at.replicas > 1 for at in drawn) > 20
    assert sum(at.tensor > 3 for at in drawn) > 20  # KV heads on several ranks

"""What tests of replays share: counting a recording's kernel calls, and some steps of decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from conf.schema import Architecture
from kernels.ops import Ops
from kernels.replay import Recording
from parallel.mesh import Mesh
from parallel.model.load import build_decoder
from serve.paged import KvCache
from serve.runner import Runner
from serve.scheduler import Chunk
from tests.models import RandomWeights

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape).to(dtype)


def num_calls(recording: Recording) -> int:
    """Of a replay whose calls follow each other on the clock."""
    recording.by_clock = True
    started = time.clock_gettime(time.CLOCK_MONOTONIC)
    recording.replay()
    ended = time.clock_gettime(time.CLOCK_MONOTONIC)
    recording.by_clock = False
    begins, ends = recording.times()
    worked = begins > 0
    assert worked.any(0).all() and torch.equal(worked, ends > 0) and (begins <= ends).all()
    last, first = ends.amax(0), torch.where(worked, begins, torch.inf).amin(0)
    assert started <= first[0] and (last[:-1] <= first[1:]).all() and last[-1] <= ended
    recording.replay()
    assert torch.equal(recording.times()[0], begins), "without the clock nothing is noted"
    return begins.shape[1]


def decoding(runner: Runner, steps: int, adapters: Sequence[str | None]) -> list[Tensor]:
    """Logits (of a tensor rank's share) of some steps behind prompts of different lengths; requests leave one by one."""
    size, results = runner.page_size, []
    tokens = [[(7 * i + 3 * j) % 101 for j in range(2 + 5 * i)] for i in range(len(adapters))]
    tables = [tuple(range(20 * i, 20 * i + 20)) for i in range(len(adapters))]

    def chunk(i: int, start: int) -> Chunk:
        pages = tables[i][: -(-len(tokens[i]) // size)]
        new = tuple(tokens[i][start:])
        return Chunk(id=str(i), adapter=adapters[i], start=start, tokens=new, pages=pages, samples=True)

    starts = [0] * len(adapters)
    for step in range(steps):
        count = len(adapters) - step // 5  # each number of requests comes several times
        logits = runner.forward([chunk(i, starts[i]) for i in range(count)])
        assert logits is not None
        results.append(logits.clone())
        for i in range(count):
            starts[i] = len(tokens[i])
            tokens[i].append((13 * i + 5 * step + 1) % 101)
    return results


def runner_of(architecture: Architecture, ops: Ops, mesh: Mesh | None = None) -> Runner:
    mesh = mesh or Mesh.single()
    decoder = build_decoder(
        RandomWeights(architecture), mesh, (5,), dtype=torch.bfloat16, ops=ops, trainable=False, packed=True
    )
    return Runner(decoder, mesh, KvCache.allocate(decoder, num_pages=200, page_size=4), 4, "")

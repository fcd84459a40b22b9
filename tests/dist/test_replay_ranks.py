"""Replays of ranks that share a decoder: bits of the plain step, communication within the program, and a rank that dies."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from kernels import shared_memory
from parallel.comm import Launch, PeerLost
from parallel.mesh import Mesh
from serve.scheduler import Chunk
from tests.backends import backend
from tests.models import BIASED, TINY
from tests.ranks import needs_shared_memory, on_ranks
from tests.replays import decoding, runner_of

SOON_S = 5.0
"""A dead peer is an error within this time."""

def _decodes(launch: Launch, biased: bool, threads: int) -> tuple[list[int], list[bool]]:
    """Calls from Python in a replay of each kind of step, and whether kernels follow each other without one."""
    torch.set_num_threads(threads)
    ops, architecture = backend("compiled", torch.bfloat16), BIASED if biased else TINY
    meshes = [Mesh.build(launch, tensor=launch.world_size) for _ in range(2)]
    plain = runner_of(architecture, replace(ops, record=None), meshes[0])
    replaying = runner_of(architecture, ops, meshes[1])
    with torch.inference_mode():
        adapters = [None] * 3
        for got, expected in zip(decoding(replaying, 15, adapters), decoding(plain, 15, adapters), strict=True):
            assert torch.equal(got, expected)
    assert meshes[0].traffic == meshes[1].traffic, "calls within a program are counted too"
    steps = replaying.replays.steps
    assert len(steps) == 3
    segments = [step.recording._segments for step in steps]
    return [sum(len(calls) for _, calls in some) for some in segments], [len(some) == 1 for some in segments]


@needs_shared_memory
@pytest.mark.parametrize(("ranks", "threads"), [(2, 1), (2, 2), (3, 1)])
def test_ranks_replay_the_bits_of_the_plain_step_without_python(ranks: int, threads: int) -> None:
    calls, whole = on_ranks(ranks, _decodes, False, threads)[0]
    assert set(calls) == {0}
    assert all(whole)


def test_biases_behind_a_sum() -> None:
    on_ranks(2, _decodes, True, 1)


def _decodes_through_gloo(launch: Launch) -> tuple[list[int], list[bool]]:
    os.environ["ONEMESH_TRANSPORT"] = "gloo"
    return _decodes(launch, False, 1)


def test_without_shared_memory_communication_is_called_from_python() -> None:
    calls, whole = on_ranks(2, _decodes_through_gloo)[0]
    assert set(calls) == {1 + 2 * TINY.num_layers}
    assert not any(whole)


def _dies(launch: Launch, threads: int) -> str:
    torch.set_num_threads(threads)
    mesh = Mesh.build(launch, tensor=2)
    runner = runner_of(TINY, backend("compiled", torch.bfloat16), mesh)
    chunks = [Chunk(id="0", adapter=None, start=4, tokens=(3,), pages=(0, 1), samples=True)]
    for _ in range(5):
        runner.forward(chunks)
    (step,) = runner.replays.steps
    if launch.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with torch.inference_mode(), pytest.raises(PeerLost) as caught:
        step.recording.replay()
    assert time.monotonic() - started < SOON_S
    return str(caught.value)


@needs_shared_memory
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rank_that_dies_ends_the_others_replay(threads: int) -> None:
    message = on_ranks(2, _dies, threads, lost=[1])[0]
    assert "all_reduce over the tensor axis failed: lost rank 1 (its process has ended)" in message

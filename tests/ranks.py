"""Runs a function on several ranks of this machine, for tests.

Ranks are forked from a server process that has imported torch once, so a test of four ranks costs tenths of a
second, not four imports.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from kernels import shared_memory

needs_shared_memory = pytest.mark.skipif(
    not shared_memory.LIBRARY.is_file(),
    reason="_shm.so isn't built: there was no C++ compiler, or no Python.h, at `make install`",
)

PRELOAD = ["torch._dynamo", "matplotlib.backends.backend_agg", "train.__main__", "serve.start", "tests.ranks"]


def on_ranks(
    count: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120.0,
    silence_s: float = 60.0,
    lost: Collection[int] = (),
) -> list[Any]:
    """`function(launch, *args)` on `count` ranks; returns what each returned, by rank.

    silence_s: how long a collective waits for a rank that lives. lost: ranks that are meant to die or to hang, and
    aren't waited for; they return None.

    function: defined at the top of a module. Raises AssertionError with the first failing rank's traceback, or
    when a rank dies or takes longer than `timeout_s`; no rank outlives the call.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(count):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, count, silence_s, Path(folder) / "store", send, function, args), daemon=True
            )
            process.start()
            send.close()
            processes.append(process)
            pipes.append(receive)
        try:
            return _collect(pipes, time.monotonic() + timeout_s, lost)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float, lost: Collection[int]) -> list[Any]:
    results: dict[int, Any] = dict.fromkeys(lost)
    while len(results) < len(pipes):
        ready = wait([pipe for i, pipe in enumerate(pipes) if i not in results], deadline - time.monotonic())
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} did not finish in time"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                failure, results[rank] = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert failure is None, f"rank {rank} failed:\n{failure}"
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, count: int, silence_s: float, store: Path, pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    import torch

    from parallel import comm

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    launch = comm.Launch(rank, count, rank)
    try:
        comm.start(launch, timeout_s=silence_s, init_method=f"file://{store}")
        result = function(launch, *args)
        pipe.send((None, result))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    else:
        comm.stop()

"""Times collectives through shared memory beside gloo: python -m parallel.bench [out=docs/benchmarks/collectives.md]

Starts two ranks and then eight, each tied to one processor. Both transports are called through
`parallel.comm` in the same processes, in turns, so that whatever else happens on the machine happens to both. A time is
that of a window of calls in a loop, by the number of calls: the median over the windows of rank 0. (A clock read around
each call is as long as a quarter of a small one: ranks that share a processor read it one after the other.) Of send and
receive it is half of a message's way there and back.

Ranks that share processors are timed twice: all in one session, as srun starts them, and each in its own, as torchrun
does. Where the kernel schedules by session (sched_autogroup_enabled), a rank that gives its processor up often gets it
back before those of other sessions, for which it waits (docs/collectives.md).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch

from kernels import shared_memory
from kernels.machine import commit, processor
from kernels.memory import keep_freed_memory
from parallel import comm
from parallel.comm import Group, Launch

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
WINDOWS = {4 << 10: (20, 20), 64 << 10: (20, 10), 1 << 20: (12, 5), 16 << 20: (10, 1)}
"""Windows of each transport in a round, and calls in each, by size."""
CROWDED_WINDOWS = ((5, 5), (50, 20))
"""Of gloo and of shared memory on more ranks than processors."""
ROUNDS = 3
TARGETS = {4 << 10: 40, 64 << 10: 10, 1 << 20: 3, 16 << 20: 5}
"""How many times as fast as gloo shared memory is meant to be on two ranks."""
CROWDED_TARGET_US = 20.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians of one operation on `ranks` ranks; `size` is the bytes of a whole tensor: all_gather's output, the
    others' input."""

    operation: str
    ranks: int
    size: int
    sessions: bool
    """Whether each rank had a session of its own."""
    gloo_us: float
    shared_us: float

    @property
    def ratio(self) -> float:
        """How many times as fast as gloo."""
        return self.gloo_us / self.shared_us


def operations(group: Group, size: int) -> dict[str, Callable[[], object]]:
    """One call of each operation on `size` bytes of float32; two ranks only have send and receive."""
    x = torch.zeros(size // 4)  # stay what they are in any number of sums
    equal = [size // 4 // group.size] * group.size
    part = x[: equal[0]].clone()
    found: dict[str, Callable[[], object]] = {
        "all_reduce": partial(comm.all_reduce, x, group),
        "reduce_scatter": partial(comm.reduce_scatter, x, group, equal, 0),
        "all_gather": partial(comm.all_gather, part, group, equal, 0),
    }
    if group.size == 2:
        found["send/receive"] = partial(_there_and_back, x, group)
    return found


def _there_and_back(x: torch.Tensor, group: Group) -> None:
    if group.is_first:
        comm.send_start(x, group, 1).wait()
        comm.receive(x, group, 1)
    else:
        comm.receive(x, group, 0)
        comm.send_start(x, group, 0).wait()


def measure(launch: Launch) -> list[Timing]:
    """Times every operation on all ranks of this job; collective."""
    sessions = os.getsid(0) == os.getpid()
    with _transport("gloo"):
        gloo = _world(launch)
    with _transport("shared"):
        shared = _world(launch)
    crowded = launch.world_size > 2
    timings: list[Timing] = []
    for size in SIZES[:1] if crowded else SIZES:
        windows = CROWDED_WINDOWS if crowded else 2 * (WINDOWS[size],)
        by_gloo, by_shared = operations(gloo, size), operations(shared, size)
        for name in by_gloo:
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                for operation, mine, (count, calls) in zip(
                    (by_gloo[name], by_shared[name]), times, windows, strict=True
                ):
                    operation()
                    comm.barrier(gloo)
                    mine += [_seconds(operation, calls) for _ in range(count)]
            scale = 0.5e6 if name == "send/receive" else 1e6
            medians = [statistics.median(mine) * scale for mine in times]
            timings.append(
                Timing(
                    operation=name,
                    ranks=launch.world_size,
                    size=size,
                    sessions=sessions,
                    gloo_us=medians[0],
                    shared_us=medians[1],
                )
            )
    return timings


def _seconds(operation: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        operation()
    return (time.perf_counter() - started) / calls


def _world(launch: Launch) -> Group:
    ranks = tuple(range(launch.world_size))
    return Group("world", launch.rank, ranks, comm.new_handle(ranks))


@contextmanager
def _transport(name: str) -> Iterator[None]:
    before = os.environ.get("ONEMESH_TRANSPORT")
    os.environ["ONEMESH_TRANSPORT"] = name
    try:
        yield
    finally:
        os.environ.pop("ONEMESH_TRANSPORT")
        if before is not None:
            os.environ["ONEMESH_TRANSPORT"] = before


def rank(launch: Launch, folder: Path) -> None:
    """What each rank of the benchmark does; the first one writes the timings into `folder`."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the server does
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[launch.local_rank % len(allowed)]})
    comm.start(launch, timeout_s=60, init_method=f"file://{folder / 'store'}")
    try:
        timings = measure(launch)
        if launch.rank == 0:
            (folder / "timings").write_text(json.dumps([asdict(timing) for timing in timings]))
    finally:
        comm.stop()


def job(ranks: int, sessions: bool) -> list[Timing]:
    """The timings of so many ranks on this host. Raises RuntimeError when one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "parallel.bench", f"rank={folder}"]
        running = [
            subprocess.Popen(
                command, env={**os.environ, **places, "RANK": str(i), "LOCAL_RANK": str(i)}, start_new_session=sessions
            )
            for i in range(ranks)
        ]
        if failed := [i for i, process in enumerate(running) if process.wait() != 0]:
            raise RuntimeError(f"ranks {failed} of {ranks} failed; what they printed is above")
        return [Timing(**timing) for timing in json.loads((Path(folder) / "timings").read_text())]


def main(arguments: list[str]) -> int:
    """Runs the jobs, prints the report and writes it to `out=<file>`; returns the exit code."""
    if len(arguments) > 1 or not all(argument.startswith("out=") for argument in arguments):
        print(f"python -m parallel.bench takes out=<file> alone, not {' '.join(arguments)}", file=sys.stderr)
        return 2
    if shared_memory.load() is None:
        print(f"{shared_memory.LIBRARY.name} isn't built: there is nothing to compare", file=sys.stderr)
        return 2
    timings = [timing for how in ((2, False), (8, False), (8, True)) for timing in job(*how)]
    text = report(timings)
    print(text)
    if arguments:
        Path(arguments[0].removeprefix("out=")).write_text(text)
    return 0


def report(timings: list[Timing]) -> str:
    """The page in Markdown."""
    lines = [
        "# Collectives in shared memory beside gloo",
        "",
        f"{date.today()}, {processor()}, {os.cpu_count()} processors, torch {torch.__version__}, commit {commit()}.",
        "Microseconds of a call of `parallel.comm`, Python included: the first rank's time for a window of calls in a",
        "loop, by their number, median over the windows; of send and receive half of the way there and back. float32;",
        "the size is that of the whole tensor. Each rank is tied to one processor and has one thread. Both transports",
        f"in the same processes, in {ROUNDS} rounds in turn. Own sessions: each rank has one, as torchrun starts them;",
        "else all have one together, as srun does.",
        "",
        "Command: `python -m parallel.bench out=docs/benchmarks/collectives.md`",
        "",
        "| operation | ranks | size | gloo | shared memory | ratio | aim |",
        f"|{7 * '---|'}",
    ]
    for t in timings:
        aim = f"{TARGETS[t.size]}x" if t.ranks == 2 else f"{CROWDED_TARGET_US:g} us"
        met = t.ratio >= TARGETS[t.size] if t.ranks == 2 else t.shared_us <= CROWDED_TARGET_US
        size = f"{t.size >> 20} MB" if t.size >= 1 << 20 else f"{t.size >> 10} KB"
        figures = f"{t.gloo_us:.1f} | {t.shared_us:.1f} | {t.ratio:.1f}x"
        ranks = f"{t.ranks}, own sessions" if t.sessions else str(t.ranks)
        lines.append(f"| {t.operation} | {ranks} | {size} | {figures} | {aim}{'' if met else ', missed'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("rank="):
        rank(Launch.from_environment(), Path(sys.argv[1].removeprefix("rank=")))
    else:
        sys.exit(main(sys.argv[1:]))

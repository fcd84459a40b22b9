"""Runs a contender in processes of its own, one a rank, and takes its steps' times, its losses and its memory."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900.0
SAMPLE_S = 0.05


class Failed(RuntimeError):
    """A contender ended before its last step; the message is the last line that it printed."""


@dataclass
class Memory:
    """Peaks of the sum over the ranks, in bytes."""

    anonymous: int = 0
    """Heap and shared memory, sampled: what the contender itself holds, without files of libraries."""
    resident: int = 0
    """Sum of the ranks' own peaks, as the kernel keeps them."""

    def sample(self, pids: Sequence[int]) -> None:
        """Looks at the processes; one that has ended counts for nothing."""
        fields = [_status(pid) for pid in pids]
        self.anonymous = max(self.anonymous, sum(f.get("RssAnon", 0) + f.get("RssShmem", 0) for f in fields))
        self.resident = max(self.resident, sum(f.get("VmHWM", 0) for f in fields))


@dataclass(frozen=True)
class Measured:
    """What a contender did."""

    seconds: tuple[float, ...]
    """Of each step after the warm-up."""
    losses: tuple[float, ...]
    """Of every step, before its update."""
    memory: Memory = field(default_factory=Memory)


def measure(command: Sequence[str], ranks: int, metrics: Path, steps: int, folder: Path) -> Measured:
    """Runs `command` on every rank until `metrics` has a line for each of the `steps`; the first one is the warm-up.

    The ranks share the cores that this process may use. Once the last step is told they are killed: what comes after
    it (a checkpoint) belongs to no step. Raises Failed, and leaves no process behind.
    """
    memory = Memory()
    with _started(command, ranks, folder) as processes:
        deadline = time.monotonic() + TIMEOUT_S
        while (count := _lines(metrics)) < steps:
            memory.sample([process.pid for process in processes])
            ended = [rank for rank, process in enumerate(processes) if process.poll() is not None]
            if ended and _lines(metrics) < steps:
                raise Failed(f"rank {ended[0]} ended after {count} steps: {_last_line(_log(folder, ended[0]))}")
            if time.monotonic() > deadline:
                raise Failed(f"only {count} steps in {TIMEOUT_S:.0f} s")
            time.sleep(SAMPLE_S)
    records = read_metrics(metrics)[:steps]
    return Measured(
        tuple(record["tokens"] / record["tokens_per_second"] for record in records[1:]),
        tuple(record["loss"] for record in records),
        memory,
    )


@contextmanager
def _started(command: Sequence[str], ranks: int, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks' processes, killed at the end; each writes to its log in `folder`."""
    cores = len(os.sched_getaffinity(0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # DeepSpeed looks for ninja
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of one rank would take the other's core
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with _log(folder, rank).open("wb") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def importable(python: str, module: str) -> bool:
    """Whether that interpreter finds the module; nothing of it is run but its parent package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def versions(python: str, distributions: Sequence[str]) -> list[str]:
    """`name version` of each distribution that the interpreter has."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass"
    )
    done = subprocess.run([python, "-c", code, *distributions], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _log(folder: Path, rank: int) -> Path:
    return folder / f"log-{rank}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"


def _status(pid: int) -> Mapping[str, int]:
    """Sizes in /proc/<pid>/status, in bytes."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value[:-3]) * 1024
    return found

"""The demo's subprocesses: each writes a log, ends with the demo, and fails with the last words of its log."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LAST_LINES = 15
LAUNCHER_NOISE = "torch/distributed/elastic/"
"""In torchrun's own reports, which come after the words of the rank that failed."""
START_SECONDS = 300.0
"""Most that a server may take until it is healthy."""
STOP_SECONDS = 60.0


class Failed(Exception):
    """Something the demo needs did not work; the message is for the user."""


def python(module: str, *arguments: str) -> list[str]:
    """The command line of one process: `python -m module k=v ...`."""
    return [_tool(Path(sys.executable).name), "-m", module, *arguments]


def torchrun(ranks: int, module: str, *arguments: str) -> list[str]:
    """The command line of several ranks: `torchrun --nproc-per-node=N -m module k=v ...`."""
    return [_tool("torchrun"), f"--nproc-per-node={ranks}", "-m", module, *arguments]


def _tool(name: str) -> str:
    """A program of this virtual environment, as a path from the current directory if it lies below."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def in_lines(command: Sequence[str], indent: str = "  ", width: int = 100) -> str:
    """A command as text that can be pasted into a shell, continued over lines of at most about `width`."""
    lines = [indent + shlex.quote(command[0])]
    for word in map(shlex.quote, command[1:]):
        if len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"{indent}  {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def environment(ranks: int) -> Mapping[str, str]:
    """This process's environment, with the machine's cores shared out between `ranks` unless it says otherwise."""
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, cores // ranks)), **os.environ}


def run(command: Sequence[str], log: Path, ranks: int, what: str) -> None:
    """Runs a command to its end: standard output is shown as it comes, standard error goes to `log`.

    Raises:
        Failed: it ended with another exit code than 0.
    """
    with log.open("wb") as errors, _started(command, ranks, stdout=None, stderr=errors) as process:
        code = process.wait()
    if code:
        raise Failed(report(what, code, log))


@contextmanager
def serving(command: Sequence[str], log: Path, ranks: int, url: str) -> Iterator[None]:
    """A server that is healthy inside the block and is asked to stop after it.

    All it prints goes to `log`.

    Raises:
        Failed: it ended by itself, did not get healthy, or did not stop with exit code 0.
    """
    with log.open("wb") as output, _started(command, ranks, stdout=output, stderr=subprocess.STDOUT) as process:
        _wait_until_healthy(process, url, log)
        yield
        if process.poll() is not None:
            raise Failed(report("the server", process.returncode, log))
        code = _stop(process)
    if code:
        raise Failed(report("the server was asked to stop and", code, log))


def report(what: str, code: int, log: Path) -> str:
    """What to tell about a subprocess that ended with `code`: where its log is, and how that ends."""
    how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    words = "\n".join(f"  | {line}" for line in last_words(log.read_text(encoding="utf-8", errors="replace")))
    return f"{what} {how}; its log is {log}" + (f" and ends with\n{words}" if words else ", which is empty")


def last_words(text: str) -> list[str]:
    """The last lines of a log, without what torchrun reports after its ranks have failed."""
    lines = text.rstrip().splitlines()
    own = next((number for number, line in enumerate(lines) if LAUNCHER_NOISE in line), len(lines))
    return (lines[:own] or lines)[-LAST_LINES:]


@contextmanager
def _started(
    command: Sequence[str], ranks: int, stdout: IO[bytes] | None, stderr: IO[bytes] | int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, so that nothing of it is left when the block is."""
    sys.stdout.flush()
    process = subprocess.Popen(
        command,
        env=environment(ranks),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Asks the ranks to stop and returns the exit code.

    The ranks get the signal, not torchrun: it would report a signal of its own as a failure.
    """
    for rank in _children(process.pid) or [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"the server did not stop within {STOP_SECONDS:.0f} s of SIGTERM") from None


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(report("the server", process.returncode, log))
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=10):
            return  # 503 while it starts is an HTTPError
        time.sleep(0.5)
    raise Failed(f"the server was not healthy after {START_SECONDS:.0f} s; its log is {log}")

"""Runs the commands as a user starts them, in processes of their own, for tests of whole programs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Command:
    """A running command and everything it has printed so far."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """Standard output and standard error of the command and of all its ranks."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120.0) -> str:
        """The first line that holds `text`; fails when the command ends before or takes longer."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll()
            for line in self.text.splitlines():
                if text in line:
                    return line
            assert ended is None, f"exit code {ended} before {text!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {text!r} in {seconds} s:\n{self.text}"
            time.sleep(0.05)

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code; fails when the command takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None

    def rank(self, number: int) -> int:
        """Process id of a rank that torchrun has started."""
        for pid in children(self.process.pid):
            if f"\0RANK={number}\0" in "\0" + Path(f"/proc/{pid}/environ").read_text():
                return pid
        raise AssertionError(f"there is no rank {number}:\n{self.text}")


@contextlib.contextmanager
def running(folder: Path, *arguments: str, ranks: int | None = None) -> Iterator[Command]:
    """`python -m <arguments>`, with `ranks` under torchrun; output goes to `folder`/log. Leaves no process behind."""
    launch = [] if ranks is None else ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *launch, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Command(process, log)
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def run(folder: Path, *arguments: str, ranks: int | None = None, seconds: float = 120.0) -> tuple[int, str]:
    """Exit code and output of a command that ends by itself."""
    with running(folder, *arguments, ranks=ranks) as command:
        return command.wait(seconds), command.text


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that live."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and those that they have, and so on."""
    direct = children(pid)
    return direct + [below for child in direct for below in descendants(child)]


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

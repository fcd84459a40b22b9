"""What the tests of bad input share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import train, write_chats
from tests.refusals import Refused


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats.jsonl and checkpoints of the tiny model: full, lora and prefix."""
    folder = tmp_path_factory.mktemp("trained")
    write_chats(folder / "chats.jsonl", 6)
    for tune in ("full", "lora", "prefix"):
        run = folder / f"run-{tune}"
        data = f"data.path={folder / 'chats.jsonl'}"
        code, printed = train(1, ["model=tiny", f"tune={tune}", data, f"run_dir={run}", "train.steps=1"])
        assert code == 0, printed
        shutil.copytree(run / "checkpoints" / "latest", folder / tune)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a test, with a copy of the chats; signal handlers are put back afterwards."""
    shutil.copy(trained / "chats.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The runner of refusals."""
    return Refused(capsys, monkeypatch)

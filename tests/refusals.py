"""Runs a command in this process on input that it must refuse."""

from __future__ import annotations

import pytest

import serve.__main__
import serve.generate
import train.__main__

COMMANDS = {"train": train.__main__.main, "serve": serve.__main__.main, "generate": serve.generate.main}


class Refused:
    """Runs a command in this process and returns what it said when it refused."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, command: str, *arguments: str, ranks: int = 1) -> str:
        """The message: all that was printed, on stderr, with exit code 2."""
        self._monkeypatch.setenv("WORLD_SIZE", str(ranks))
        self._monkeypatch.setenv("RANK", "0")
        self._monkeypatch.setenv("LOCAL_RANK", "0")
        self._capsys.readouterr()
        code = COMMANDS[command](arguments)
        printed = self._capsys.readouterr()
        assert (code, printed.out) == (2, ""), printed
        assert printed.err.endswith("\n")
        return printed.err.removesuffix("\n")


def assert_like(text: str, pattern: str) -> None:
    """A text that follows `pattern`, in which * stands for anything."""
    at = 0
    for part in pattern.split("*"):
        assert part in text[at:], (text, part)
        at = text.index(part, at) + len(part)
    assert pattern.endswith("*") or at == len(text), text

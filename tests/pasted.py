"""Runs command lines as if they were pasted from a text into a shell, on the tiny model so that it takes seconds."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from tests.processes import running

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
DEFAULT_PORT = 8000


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a Markdown file."""
    return [(language, textwrap.dedent(text)) for _, language, text in FENCED.findall(path.read_text())]


def commands(text: str) -> list[list[str]]:
    """The words of every command of a shell text; lines that end in a backslash go on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def module(words: list[str]) -> tuple[str, list[str], int | None]:
    """(module, arguments, ranks) of `python -m ...` (ranks None) or `torchrun --nproc-per-node=N -m ...`."""
    program = Path(words[0]).name
    if program == "torchrun":
        count = re.fullmatch(r"--nproc-per-node=(\d+)", words[1])
        assert count is not None, words
        ranks, words = int(count[1]), words[1:]
    else:
        assert re.fullmatch(r"python[\d.]*", program), words
        ranks = None
    assert words[1] == "-m", words
    return words[2], words[3:], ranks


def run(words: list[str], folder: Path, more: Mapping[str, list[str]]) -> str:
    """Runs a command to its end in `folder` and returns what it printed; `more` has further arguments by module."""
    name, arguments, ranks = module(words)
    with running(folder, name, *arguments, *more.get(name, []), ranks=ranks) as command:
        code = command.wait()
        assert code == 0, f"{shlex.join(words)} ended with {code}:\n{command.text}"
        return command.text


@contextlib.contextmanager
def serving(words: list[str], folder: Path, more: Mapping[str, list[str]]) -> Iterator[int]:
    """A server started by a command that names no port; the port it listens on, once it is healthy."""
    name, arguments, ranks = module(words)
    assert name == "serve", words
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = folder / "server"
    logs.mkdir()
    arguments = [argument.replace("=runs/", f"={folder}/runs/") for argument in arguments]
    with running(logs, name, *arguments, *more.get(name, []), f"port={port}", ranks=ranks) as command:
        command.wait_for("serving ")
        url = f"http://127.0.0.1:{port}/health"
        while httpx.get(url, timeout=60).status_code == 503:
            pass
        yield port


def curl(words: list[str], port: int) -> httpx.Response:
    """What `curl <url> -d <body>` gets, from `port` instead of the default one."""
    program, url, option, body = words
    assert (program, option) == ("curl", "-d"), words
    assert f":{DEFAULT_PORT}/" in url, words
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl calls it
    return httpx.post(url.replace(f":{DEFAULT_PORT}/", f":{port}/"), content=body, headers=form, timeout=60)

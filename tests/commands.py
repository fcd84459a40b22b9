"""Runs `python -m train` on several ranks inside forked processes, for tests of whole runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from parallel.comm import Launch
from tests.ranks import on_ranks

WORDS = [
    "mesh",
    "rank",
    "page",
    "stage",
    "loss",
    "token",
    "shard",
    "prefix",
    "chunk",
    "slot",
    "adapter",
    "engine",
    "step",
    "layer",
    "head",
    "row",
]


def write_chats(path: Path, count: int = 40) -> Path:
    """A small chat file whose answers follow from the questions."""
    rows = []
    for i in range(count):
        word, other = WORDS[i % len(WORDS)], WORDS[(i * 7 + 3) % len(WORDS)]
        turns = [("user", f"What is a {word}?"), ("assistant", f"A {word} goes with a {other}.")]
        if i % 3 == 0:
            turns += [("user", "And then?"), ("assistant", f"Then comes the {other}, number {i}.")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(ranks: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Runs training with these arguments on `ranks` ranks; returns rank 0's exit code and what it printed."""
    results = on_ranks(ranks, train_rank, list(arguments), timeout_s=300)
    assert len({code for code, _ in results}) == 1, results
    return results[0]


def train_rank(launch: Launch, arguments: list[str]) -> tuple[int, str]:
    """One rank's part."""
    return run_rank(launch, "train.__main__", arguments)


def run_rank(launch: Launch, module: str, arguments: list[str]) -> tuple[int, str]:
    """The exit code of `module`'s main on this rank, and what it printed."""
    main = importlib.import_module(module).main
    os.environ |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.rank),
        "LOCAL_WORLD_SIZE": str(launch.world_size),
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(arguments)
    return code, printed.getvalue()


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """The losses of metrics.jsonl; steps must count from 1."""
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]

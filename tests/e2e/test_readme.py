"""What the README and the guides say is true: commands run, keys and defaults exist, files and links are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conf import load
from conf.convert import leaves, show
from conf.schema import ROOTS, Config
from tests.pasted import DEFAULT_PORT, blocks, commands, curl, module, run, serving
from tests.processes import ROOT

README = ROOT / "README.md"
GUIDES = sorted(README.parent.glob("docs/*.md"))
QUICK = {
    "train": ["model=tiny", "train.batch_size=2"],
    "train.preview": ["model=tiny"],
    "serve": ["model=tiny"],
    "serve.generate": ["model=tiny", "max_tokens=4"],
}
"""Arguments that are added to a command, so that it takes seconds."""
COMMANDS = {
    "parallel.pipeline.show": "show",
    "train.preview": "preview",
    "train.compare": "compare",
    "serve.generate": "generate",
    "serve.bench": "bench",
    "slurm.submit": "submit",
}
"""Modules whose configuration has another name than they."""


def test_commands_of_the_readme_work(tmp_path: Path) -> None:
    """Top to bottom in one folder, steps divided by ten; make and sbatch have tests of their own."""
    ran: list[str] = []
    with ExitStack() as server:
        port = 0
        for language, text in blocks(README):
            if language == "python":
                python(text, tmp_path, port)
                ran.append("python")
            for words in commands(text) if language == "sh" else []:
                if words[0] == "curl":
                    answer = curl(words, port)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
                elif words[0] not in ("make", ".", "sbatch"):
                    server.close()
                    quick = [re.sub(r"^(train\.steps=\d+)0$", r"\1", word) for word in words]
                    if module(words)[0] == "serve":
                        port = server.enter_context(serving(quick, tmp_path, QUICK))
                    else:
                        run(quick, tmp_path, QUICK)
                ran.append(module(words)[0] if "-m" in words else words[0])
    assert {"serve.generate", "train", "serve", "curl", "python", "slurm.submit"} <= set(ran)
    checkpoints = tmp_path / "runs" / "mine" / "checkpoints"
    assert os.readlink(checkpoints / "latest") == "step-4"
    assert (checkpoints / "step-2").is_dir()
    assert len((tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()) == 4


def python(text: str, folder: Path, port: int) -> None:
    """Runs a Python text against the server on `port`."""
    assert f":{DEFAULT_PORT}/" in text
    script = text.replace(f":{DEFAULT_PORT}/", f":{port}/")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [README, *GUIDES], ids=lambda path: path.name)
def test_every_command_has_valid_keys(path: Path) -> None:
    for language, text in blocks(path):
        for words in commands(text) if language == "sh" else []:
            if words[0] == "sbatch":
                script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
                assert (ROOT / words[script]).is_file()
                load.load(words[script + 1 :], Path(words[script]).stem)  # pyright: ignore[reportArgumentType]
            elif words[0] == "make":
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            elif "-m" in words:
                words = [word for word in words if word not in ("key=value", "...")]
                name, arguments, _ = module([word.replace("=N", "=2") for word in words])
                if COMMANDS.get(name, name) in ROOTS:
                    load.load(arguments, COMMANDS.get(name, name))  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize("path", [ROOT / "docs/training.md", ROOT / "docs/serving.md"], ids=lambda path: path.name)
def test_tables_of_keys_are_the_schema(path: Path) -> None:
    """Every key exists, and defaults in backticks, as many as there are keys, are theirs (unless they are derived)."""
    known = {**leaves(Config), **dict.fromkeys(("model", "tune", "optim", "logger", "adapters.<name>"))}
    tables = re.findall(r"^\| key \| default \|.*\n((?:\|.*\n)+)", path.read_text(), re.MULTILINE)
    for row in "".join(tables).replace("|---|---|---|\n", "").splitlines():
        keys, defaults = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[1:3])
        assert keys, row
        assert set(keys) <= set(known)
        if len(defaults) == len(keys):
            for key, default in zip(keys, defaults, strict=True):
                field: Any = known[key]
                assert field is None or field.default in (None, "") or show(field.default) == default, key


def test_the_file_tree_names_what_there_is() -> None:
    tree = next(text for language, text in blocks(README) if not language and text.startswith("conf/"))
    folder, named = "", set()
    for line in tree.splitlines():
        names, comment = line[:22], line[22:].strip()
        assert comment, line
        for name in re.split(r",?\s+", names.strip()):
            path = name if names[0] != " " else folder + name
            assert (ROOT / path).exists(), path
            named.add(path.rstrip("/"))
        folder = names.strip() if names[0] != " " else folder
    packages = {path.parent for path in ROOT.glob("*/__init__.py")}
    assert {path.name for path in packages} <= named


@pytest.mark.parametrize("path", [README, *GUIDES, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_and_named_tests_exist(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    for cell in re.findall(r"^\|.*\| ([^|]*tests/[^|]*) \|$", text, re.MULTILINE):
        folder = Path()
        for name in re.findall(r"`([^`]+)`", cell):
            folder = Path(name).parent if "/" in name and name.endswith(".py") else folder
            assert (ROOT / name if "/" in name else ROOT / folder / name).exists(), name

"""Metrics files, the progress display and the tracker."""

from __future__ import annotations

import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.schema import LoggerConf
from train.metrics import EVAL_FILE, MetricsFile, NullLogger, Progress, open_logger, read_metrics

WANDB = LoggerConf(kind="wandb")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(file: MetricsFile, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        file.append({"step": step, "loss": loss})


def test_every_step_is_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run")
    for step in (1, 2):
        file.append({"step": step, "loss": 1.5, "tokens": 7, "name": "x"})
        assert lines(file.path)[-1] == {"step": step, "loss": 1.5, "tokens": 7, "name": "x"}
    with pytest.raises(AssertionError, match="step 2 after step 2"):
        file.append({"step": 2})
    file.close()


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    file.close()
    assert file.path.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.1}\n'


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", EVAL_FILE):
        first = MetricsFile(tmp_path, name)
        write_steps(first, 1, 9, 1.0)
        first.close()
        with (tmp_path / name).open("a") as stream:
            stream.write('{"step": 10, "lo')
        second = MetricsFile(tmp_path, name)
        assert second.cut_after(6) == 4
        write_steps(second, 7, 8, 2.0)
        second.close()
        expected = [{"step": step, "loss": 1.0 if step < 7 else 2.0} for step in range(1, 9)]
        assert lines(tmp_path / name) == expected == read_metrics(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [EVAL_FILE, "metrics.jsonl"]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n[]\n\0\0\0\n{"loss": 3}\n{"step": "x"}\n{"step": 4}')
    file = MetricsFile(tmp_path)
    assert [record["step"] for record in read_metrics(file.path)] == [1, 4]
    assert file.cut_after(0) == 6
    assert file.path.read_bytes() == b""
    write_steps(file, 1, 1, 0.5)
    assert lines(file.path) == [{"step": 1, "loss": 0.5}]
    file.close()


def test_a_crash_while_cutting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path)
    write_steps(file, 1, 3, 1.0)
    before = file.path.read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        file.cut_after(1)
    assert file.path.read_bytes() == before


def test_without_a_terminal_progress_is_some_lines() -> None:
    stream = io.StringIO()
    with Progress(100, start=20, console=Console(file=stream, width=40)) as progress:
        for step in range(21, 101):
            progress.update(step, {"step": step, "loss": 1 / step, "lr": 0.001, "tokens_per_second": 1234.5})
        progress.note("saved [bold]x[/bold] in a line that is much longer than the console is wide")
    shown = stream.getvalue().splitlines()
    assert [line.split()[1] for line in shown[:-1]] == [f"{n}/100" for n in (21, *range(24, 101, 4))]
    assert shown[0].startswith("step 21/100  loss 0.0476  lr 0.001  1,234 tokens/s  0:")
    assert shown[-1] == "saved [bold]x[/bold] in a line that is much longer than the console is wide"


def test_on_a_terminal_progress_is_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with Progress(3, console=console) as progress:
        progress.update(1, {"loss": 2.0, "grad_norm": None})
        progress.note("step 1: saved")
        progress.update(3, {"loss": 1.25})
    assert "loss 1.2500" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "step 1: saved" in stream.getvalue()
    assert "grad norm" not in stream.getvalue()


def test_no_tracker_imports_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = open_logger(LoggerConf(), tmp_path, "id7", {})
    assert isinstance(logger, NullLogger)
    assert logger.run_id == "id7"
    logger.log({"step": 1})
    logger.close()


class FakeRun:
    """Stands for a run of wandb: remembers calls, fails from the second `log` on."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.id = options, [], options["id"] or "new-id"

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, record: dict[str, Any]) -> None:
        self.logged.append(record)
        if len(self.logged) > 1:
            raise ConnectionError("the network is gone")

    def finish(self, exit_code: int) -> None:
        self.logged.append({"exit": exit_code})


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []
    module = types.ModuleType("wandb")

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    module.init = init  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return runs


@pytest.mark.parametrize(
    ("key", "asked", "mode"),
    [
        (None, None, "offline"), ("k" * 40, None, "online"), ("k" * 40, "offline", "offline"),
        (None, "disabled", "disabled"), (None, "online", "offline"),
    ],
)  # fmt: skip
def test_without_a_key_wandb_is_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_wandb: list[FakeRun],
    key: Any,
    asked: Any,
    mode: str,
) -> None:
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", asked)):
        if value is not None:
            monkeypatch.setenv(name, value)
    logger = open_logger(WANDB, tmp_path / "my-run", None, {"a": {"b": 1}})
    options = fake_wandb[0].options
    assert (options["mode"], options["resume"], logger.run_id) == (mode, None, "new-id")
    assert (options["project"], options["name"], options["config"]) == ("onemesh", "my-run", {"a": {"b": 1}})
    assert options["settings"] == {"silent": True, "console": "off"}


def test_a_resumed_run_keeps_its_id(tmp_path: Path, fake_wandb: list[FakeRun]) -> None:
    assert open_logger(WANDB, tmp_path, "abc", {}).run_id == "abc"
    assert (fake_wandb[0].options["id"], fake_wandb[0].options["resume"]) == ("abc", "allow")


def test_a_tracker_that_fails_is_warned_of_once(tmp_path: Path, fake_wandb: list[FakeRun]) -> None:
    logger = open_logger(WANDB, tmp_path, None, {})
    logger.log({"step": 1})
    with pytest.warns(RuntimeWarning, match="logger=wandb stopped: ConnectionError: the network is gone"):
        logger.log({"step": 2})
    logger.log({"step": 3})
    logger.close(1)
    assert fake_wandb[0].logged == [{"step": 1}, {"step": 2}]


def test_a_tracker_that_cannot_start_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(RuntimeWarning, match="logger=wandb stopped: ModuleNotFoundError"):
        logger = open_logger(WANDB, tmp_path, "abc", {})
    assert isinstance(logger, NullLogger)
    assert logger.run_id == "abc"


def test_wandb_itself_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for library in ("openai", "anthropic", "litellm"):  # wandb advertises a product to who has imported one
        monkeypatch.delitem(sys.modules, library, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    ids: list[str | None] = [None]
    for step in (1, 2):
        logger = open_logger(WANDB, tmp_path / "run", ids[-1], {"tune": {"rank": 8}})
        logger.log({"step": step, "loss": 0.5})
        logger.close(0)
        ids.append(logger.run_id)
    assert ids[1] is not None
    assert ids[1] == ids[2]
    recorded = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert recorded
    assert all(ids[1] in name for name in recorded)
    assert capfd.readouterr() == ("", "")

"""What a run tells about itself: metrics.jsonl and eval.jsonl, the progress display, and the tracker (wandb).

All of it is for rank 0 alone; other ranks build none of it and pass `NullLogger()` where a Logger is wanted.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from conf.schema import LoggerConf

METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"
PLAIN_LINES = 20
PLAIN_SECONDS = 30.0

Record = Mapping[str, Any]


class MetricsFile:
    """Appends one JSON object a step to `run_dir/name`, on disk line by line.

    Call `cut_after(step)` before the first `append`, with the step the run starts from (0 for a new run):
    steps are then written in ascending order, each exactly once.
    """

    def __init__(self, run_dir: Path, name: str = METRICS_FILE) -> None:
        self.path = run_dir / name
        run_dir.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a", encoding="utf-8")
        self._step = 0

    def append(self, record: Record) -> None:
        """Writes and flushes one line. `record` has "step"; numbers that are not finite become null."""
        step = record["step"]
        assert step > self._step, f"{self.path.name}: step {step} after step {self._step}"
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._stream.write(json.dumps(finite, allow_nan=False) + "\n")
        self._stream.flush()
        self._step = step

    def cut_after(self, step: int) -> int:
        """Keeps the lines up to `step` and returns how many others went, a half-written one among them.

        The file is replaced in one rename, so a crash leaves the old or the new one.
        """
        self._stream.close()
        lines = self.path.read_bytes().splitlines()
        records = {record["step"]: record for record in map(_record, lines) if record and record["step"] <= step}
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(records[number]) + "\n" for number in sorted(records))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path)
        self._stream = self.path.open("a", encoding="utf-8")
        self._step = max(records, default=0)
        return len(lines) - len(records)

    def close(self) -> None:
        """Closes the file; nothing was waiting to be written."""
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order, without lines that are incomplete."""
    return [record for record in map(_record, path.read_bytes().splitlines()) if record]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


class Progress:
    """Shows steps as they end: a live bar on a terminal, else plain lines, about 20 a run or one in 30 s.

    total: last step. start: step the run resumes from. console: where to show (standard output).
    """

    def __init__(self, total: int, *, start: int = 0, console: Console | None = None) -> None:
        self.total, self.start = total, start
        self._console = console or Console()
        self._begin = self._shown = time.monotonic()
        self._every = max(1, math.ceil((total - start) / PLAIN_LINES))
        self._bar: Bar | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def update(self, step: int, metrics: Record) -> None:
        """Shows step `step` with its metrics (the keys of metrics.jsonl; missing ones are left out)."""
        now = time.monotonic()
        left = (now - self._begin) / max(1, step - self.start) * (self.total - step)
        text = _summary(metrics, left)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        due = (step - self.start) % self._every == 0 or now - self._shown >= PLAIN_SECONDS
        if due or step in (self.start + 1, self.total):
            self._shown = now
            self.note(f"step {step}/{self.total}  {text}")

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _summary(metrics: Record, seconds_left: float) -> str:
    forms = (
        ("loss", "loss {:.4f}"),
        ("grad_norm", "grad norm {:.3g}"),
        ("lr", "lr {:.3g}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    )
    parts = [form.format(metrics[key]) for key, form in forms if metrics.get(key) is not None]
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left")
    return "  ".join(parts)


class Logger(Protocol):
    """A tracker that follows a run. `run_id` names the run in it, to be stored and given back on resume."""

    run_id: str | None

    def log(self, metrics: Record) -> None:
        """Sends the metrics of one step; `metrics` has "step"."""
        ...

    def close(self, exit_code: int = 0) -> None:
        """Ends the run in the tracker with the program's exit code."""
        ...


class NullLogger:
    """The logger of `logger=none` and of ranks other than 0. Keeps the run id it is given."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, metrics: Record) -> None:
        """Does nothing."""

    def close(self, exit_code: int = 0) -> None:
        """Does nothing."""


class WandbLogger:
    """Follows a run in Weights & Biases; its first failure is warned of and ends the logging, not the run.

    Without WANDB_API_KEY the run is recorded offline under run_dir/wandb (`wandb sync` uploads it later);
    WANDB_MODE=offline|disabled is respected. Nothing is asked on the terminal and nothing printed.
    """

    def __init__(self, conf: LoggerConf, run_dir: Path, run_id: str | None, config: Record) -> None:
        import wandb  # slow, and needed by this logger alone

        run_dir.mkdir(parents=True, exist_ok=True)
        asked = os.environ.get("WANDB_MODE", "")
        online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self._run = wandb.init(
            project=conf.project,
            name=conf.name or run_dir.absolute().name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=run_dir,
            config=dict(config),
            mode=asked if asked in ("offline", "disabled") else online,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Steps repeated after a crash land on the same abscissa; wandb's own counter would refuse them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.run_id: str | None = self._run.id
        self._alive = True

    def log(self, metrics: Record) -> None:
        """Sends the metrics of one step."""
        self._try(lambda: self._run.log(dict(metrics)))

    def close(self, exit_code: int = 0) -> None:
        """Finishes the run in wandb."""
        self._try(lambda: self._run.finish(exit_code=exit_code))

    def _try(self, call: Any) -> None:
        if not self._alive:
            return
        try:
            call()
        except Exception as error:
            self._alive = False
            _warn(error)


def open_logger(conf: LoggerConf, run_dir: Path, run_id: str | None, config: Record) -> Logger:
    """The tracker that `logger=` names; a tracker that can't start is warned of and replaced by none.

    run_id: the id stored by the run that is resumed, or None. config: the resolved configuration as plain
    data.
    """
    if conf.kind != "wandb":
        return NullLogger(run_id)
    try:
        return WandbLogger(conf, run_dir, run_id, config)
    except Exception as error:
        _warn(error)
        return NullLogger(run_id)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"logger=wandb stopped: {type(error).__name__}: {error}; training goes on without it, "
        f"{METRICS_FILE} has every step",
        RuntimeWarning,
        stacklevel=4,
    )

"""The loss curve of a run, as a picture and as a sketch for the terminal.

python -m train.curve <run_dir>
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import ConfigError
from train.metrics import EVAL_FILE, METRICS_FILE, read_metrics

PICTURE_FILE = "loss.png"
SMOOTHING_SHARE = 0.05
LABEL_WIDTH = 8
BLANK_BRAILLE = 0x2800
# Bits of the 2 x 4 dots of a braille character, by column and row from the top (Unicode 15.0, chart U+2800).
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def sketch(values: Sequence[float | None], width: int = 64, height: int = 10, first: int = 1) -> str:
    """A curve of `values` in braille dots, `height` lines of at most `width` characters, its ends labelled.

    values: one a step; None and non-finite ones are skipped. first: step of the first value. Several values
    that share a column of dots are averaged. Returns "" when there is nothing to draw.

        4.21 |.
             | `.._
        0.53 |     `-----
              -----------
              1        60
    """
    margin = LABEL_WIDTH + 2
    columns = max(1, width - margin)
    means = _column_means(values, columns * 2)
    if not means:
        return ""
    low, high = min(means.values()), max(means.values())
    dots = _dots(means, height * 4, low, high)
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines: list[str] = []
    for line in range(height):
        cells = (
            sum(DOTS[x][y] for x in range(2) for y in range(4) if (2 * column + x, 4 * line + y) in dots)
            for column in range(columns)
        )
        curve = "".join(chr(BLANK_BRAILLE + cell) if cell else " " for cell in cells)
        lines.append(f"{labels.get(line, ''):>{LABEL_WIDTH}} \u2502{curve}".rstrip())
    start, stop = str(first), str(first + len(values) - 1)
    axis = start + (stop.rjust(columns - len(start)) if len(values) > 1 else "")
    blank = " " * LABEL_WIDTH
    return "\n".join([*lines, f"{blank} \u2514{chr(0x2500) * columns}", f"{blank}  {axis}"])


def _column_means(values: Sequence[float | None], columns: int) -> dict[int, float]:
    """The mean of the finite values of each column of dots that has any, by column, in ascending order."""
    groups: dict[int, list[float]] = {}
    for number, value in enumerate(values):
        if value is not None and math.isfinite(value):
            groups.setdefault(round(number * (columns - 1) / max(1, len(values) - 1)), []).append(value)
    return {column: sum(group) / len(group) for column, group in groups.items()}


def _dots(means: Mapping[int, float], height: int, low: float, high: float) -> set[tuple[int, int]]:
    """The lit dots (x, y from the top): neighbouring columns are joined by a line, drawn as vertical runs."""
    dots: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for x, mean in means.items():
        y = round((high - mean) / (high - low) * (height - 1)) if high > low else height // 2
        x0, y0 = before or (x, y)
        for step in range(x - x0 + 1):
            here = y0 + (y - y0) * step / max(1, x - x0)
            there = y0 + (y - y0) * min(step + 1, x - x0) / max(1, x - x0)
            top, bottom = sorted((round(here), round(there)))
            dots.update((x0 + step, mark) for mark in range(top, bottom + 1))
        before = (x, y)
    return dots


def smooth(values: Sequence[float], span: int) -> list[float]:
    """The exponential moving average with weight 2 / (span + 1), corrected for its start as in Adam."""
    keep = 1 - 2 / (span + 1)
    result: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def picture(metrics_path: Path, out_png: Path) -> None:
    """Draws the loss of every step, its moving average, and the evaluations of the eval.jsonl beside it.

    Raises ConfigError when the file is missing or holds no loss.
    """
    from matplotlib.figure import Figure  # slow to import; the sketch does without it

    steps, losses = series(metrics_path)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1.0, label="loss of each step")
    span = max(2, round(len(losses) * SMOOTHING_SHARE))
    axes.plot(steps, smooth(losses, span), color="tab:blue", linewidth=2.0, label="moving average")
    evaluations = metrics_path.with_name(EVAL_FILE)
    if evaluations.is_file() and evaluations.stat().st_size:
        axes.plot(*series(evaluations, "eval_loss"), "o", color="tab:orange", label="evaluation")
    axes.set(xlabel="step", ylabel="loss per trained token (nats)", title=f"Loss of {metrics_path.parent.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_png, dpi=150)


def series(path: Path, key: str = "loss") -> tuple[list[int], list[float]]:
    """(steps, values of `key`) of a metrics file, finite ones. Raises ConfigError when there are none."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the run_dir of a training run")
    records: list[dict[str, Any]] = read_metrics(path)
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if not pairs:
        raise ConfigError(f"{path} holds no {key} yet; wait for the first step")
    return [step for step, _ in pairs], [value for _, value in pairs]


def main(arguments: Sequence[str]) -> int:
    """Draws run_dir/loss.png and prints the sketch; returns the exit code (2 for a missing or empty run)."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m train.curve <run_dir>", file=sys.stderr)
        return 2
    path = Path(arguments[0].removeprefix("run_dir="), METRICS_FILE)
    try:
        steps, losses = series(path)
        picture(path, path.with_name(PICTURE_FILE))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(sketch(losses, first=steps[0]))
    print(f"loss {losses[0]:.4f} at step {steps[0]}, {losses[-1]:.4f} at step {steps[-1]}")
    print(f"picture: {path.with_name(PICTURE_FILE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

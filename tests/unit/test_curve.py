"""The loss curve as a picture and as a sketch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.schema import ConfigError
from train.curve import main, picture, sketch, smooth


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_falling_line_goes_from_corner_to_corner() -> None:
    expected = [
        "       3 \u2502\u2813\u28a6\u2840",
        "       0 \u2502  \u2819\u2826\u28c4",
        "         \u2514" + "\u2500" * 5,
        "          1   4",
    ]
    assert sketch([3.0, 2.0, 1.0, 0.0], width=15, height=2).splitlines() == expected


def test_a_noisy_long_curve_is_averaged() -> None:
    values = [2.0 + (-1) ** step for step in range(1000)]
    lines = sketch(values, width=20, height=4).splitlines()
    top, bottom = (float(lines[number].partition("\u2502")[0]) for number in (0, 3))
    assert 1.9 < bottom <= top < 2.1


def test_labels_and_size() -> None:
    values = [4.21 * 0.97**step for step in range(100)]
    lines = sketch(values, width=60, height=9, first=101).splitlines()
    assert len(lines) == 11
    assert max(map(len, lines)) == 60
    assert lines[0].split("\u2502")[0].strip() == "4.21"
    assert lines[8].split("\u2502")[0].strip() == f"{values[-1]:.4g}"
    assert lines[-1].split() == ["101", "200"]
    drawn = [{c for c in line if "\u2801" <= c <= "\u28ff"} for line in lines[:9]]
    assert all(drawn), "a falling curve crosses every line"


def test_gaps_and_degenerate_curves() -> None:
    assert sketch([]) == sketch([None, float("nan")]) == ""
    assert "\u2502" in sketch([1.0])
    flat = sketch([2.0] * 50, width=30, height=5).splitlines()
    assert [index for index, line in enumerate(flat[:5]) if line.partition("\u2502")[2].strip()] == [2]
    assert sketch([1.0, None, float("inf"), 0.0]).lstrip().startswith("1 \u2502")


def test_the_moving_average_starts_at_the_first_value() -> None:
    assert smooth([3.0, 3.0, 3.0], 10) == pytest.approx([3.0, 3.0, 3.0])
    keep = 1 - 2 / 4
    second = (keep * (1 - keep) * 1.0 + (1 - keep) * 5.0) / (1 - keep**2)
    assert smooth([1.0, 5.0], 3) == pytest.approx([1.0, second])


def test_the_picture_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [{"step": step, "loss": 3.0 / step} for step in range(1, 41)]
    write(tmp_path / "metrics.jsonl", *losses, {"step": 41, "loss": None})
    picture(tmp_path / "metrics.jsonl", tmp_path / "a.png")
    write(tmp_path / "eval.jsonl", {"step": 20, "eval_loss": 1.0})
    assert main([f"run_dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "loss 3.0000 at step 1, 0.0750 at step 40" in shown
    assert f"picture: {tmp_path}/loss.png" in shown
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "loss.png")]
    assert all(content.startswith(b"\x89PNG") for content in pictures)
    assert pictures[0] != pictures[1], "the evaluation is drawn"


def test_runs_without_a_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: python -m train.curve <run_dir>" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path}/metrics.jsonl does not exist; give the run_dir" in capsys.readouterr().err
    write(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="holds no loss yet"):
        picture(tmp_path / "metrics.jsonl", tmp_path / "a.png")

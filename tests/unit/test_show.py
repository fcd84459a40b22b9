"""Schedule pictures: every action is drawn once, at its time, and the command prints what it must."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from parallel.pipeline import schedules
from parallel.pipeline.schedules import gpipe, make, one_f_one_b
from parallel.pipeline.show import main, svg, terminal

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_pictures_in_the_docstring_are_the_schedules(schedule: str) -> None:
    picture = "\n".join("    " + line for line in terminal(make(schedule, 4, 4)).splitlines())
    assert f"    {schedule}\n{picture}\n" in (schedules.__doc__ or "")


def test_terminal_columns_line_up_when_numbers_have_two_digits() -> None:
    lines = terminal(one_f_one_b(2, 11)).splitlines()
    assert lines[0] == (
        "rank 0 | F0  F1  ... ... B0----- F2  B1----- F3  B2----- F4  B3----- F5  B4----- F6  B5----- F7  "
        "B6----- F8  B7----- F9  B8----- F10 B9----- ... B10----"
    )
    assert lines[1].startswith("rank 1 | ... F0  B0----- F1  B1-----")


def test_svg_draws_each_action_once_in_its_rank_row() -> None:
    root = ElementTree.fromstring(svg(gpipe(3, 5), "title"))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert len(titles) == 3 * 2 * 5
    assert titles.count("F0: 0 to 1") == 1 and titles.count("F0: 2 to 3") == 1 and titles.count("B4: 15 to 17") == 1
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"rank 0", "rank 1", "rank 2", "forward", "backward", "idle", "in flight"} <= set(texts)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert x + float(rect.attrib["width"]) <= width and y + float(rect.attrib["height"]) <= height


@pytest.mark.parametrize("name", ["x.svg", "x.png"])
def test_command_writes_a_picture_and_names_bubble_and_peak(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert main(["schedule=1f1b", "stages=4", "microbatches=8", f"out={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "bubble 27.3% of the ranks' time ((p-1)/(m+p-1) = 27.3%)" in lines
    assert "in-flight peak, microbatches per rank: 4 3 2 1" in lines
    assert out.read_bytes().startswith(b"<svg" if name == "x.svg" else b"\x89PNG")


def test_command_without_out_draws_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=gpipe", "stages=2", "microbatches=1"]) == 0
    assert "rank 1 | .. F0 B0---\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("out=x.gif", "out=x.gif is neither an SVG nor a PNG file; use out=<name>.svg or out=<name>.png"),
        ("microbatches=0", "microbatches=0"),
        ("schedule=zigzag", "zigzag"),
        ("stage=2", "stages"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument]) == 2
    assert message in capsys.readouterr().err

"""Schedule pictures: every action is drawn once, at its time, and the command prints what it must."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from parallel.pipeline import schedules
from parallel.pipeline.picture import COLOURS, Panel, fill, ink, legend, measured, planned, terminal
from parallel.pipeline.plan import Action, Plan
from parallel.pipeline.png import png
from parallel.pipeline.schedules import SCHEDULES, gpipe, interleaved, make, one_f_one_b, zbv, zero_bubble
from parallel.pipeline.show import main
from parallel.pipeline.svg import svg
from parallel.pipeline.text import read
from parallel.pipeline.timeline import UNIT, Costs, Span

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


def panel(plan: Plan, costs: Costs = UNIT, title: str = "title") -> Panel:
    return planned(title, plan, costs)


PICTURED = {"gpipe": (4, 4), "1f1b": (4, 4), "zero_bubble": (4, 4), "interleaved": (2, 2), "zbv": (2, 3)}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_pictures_in_the_docstring_are_the_schedules(schedule: str) -> None:
    lines = terminal(panel(make(schedule, *PICTURED[schedule]))).splitlines()
    picture = "\n".join("    " + line for line in lines)
    assert f"    {schedule}\n{picture}\n" in (schedules.__doc__ or "")


def test_terminal_columns_line_up_when_numbers_have_two_digits() -> None:
    lines = terminal(panel(one_f_one_b(2, 11))).splitlines()
    assert lines[0] == (
        "rank 0 | F0  F1  ... ... B0----- F2  B1----- F3  B2----- F4  B3----- F5  B4----- F6  B5----- F7  "
        "B6----- F8  B7----- F9  B8----- F10 B9----- ... B10----"
    )
    assert lines[1].startswith("rank 1 | ... F0  B0----- F1  B1-----")


def test_terminal_cuts_names_of_short_actions() -> None:
    """A third as long as the others: its letter; no time at all: nothing."""
    assert terminal(panel(zero_bubble(2, 2), Costs(3.0, 3.0, 1.0))) == (
        "rank 0 | F0 F1 .. I0 W. I1 W\nrank 1 | .. F0 I0 F1 I1 WW"
    )
    assert terminal(panel(zero_bubble(2, 2), Costs(3.0, 3.0, 0.0))) == (
        "rank 0 | F0 F1 .. I0 .. I1\nrank 1 | .. F0 I0 F1 I1"
    )


def drawn(root: ElementTree.Element) -> list[str]:
    return [title.text or "" for title in root.iter(f"{SVG}title")]


def test_svg_draws_each_action_once_in_its_rank_row() -> None:
    root = ElementTree.fromstring(svg([panel(gpipe(3, 5))]))
    titles = drawn(root)
    assert len(titles) == 3 * 2 * 5
    assert titles.count("F0: 0 to 1") == 1 and titles.count("F0: 2 to 3") == 1 and titles.count("B4: 15 to 17") == 1
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"rank 0", "rank 1", "rank 2", "forward", "backward", "idle", "in flight"} <= set(texts)


@pytest.mark.parametrize("plan", [gpipe(3, 5), interleaved(3, 4, 4), zero_bubble(1, 1), zbv(4, 9)], ids=str)
@pytest.mark.parametrize("costs", [UNIT, Costs(1.0, 1.0, 0.0), Costs(1e-3, 2e-3, 1e-6)], ids=str)
def test_svg_stays_within_its_borders(plan: Plan, costs: Costs) -> None:
    root = ElementTree.fromstring(svg([panel(plan, costs)]))
    assert len(drawn(root)) == sum(map(len, plan.actions))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert x + float(rect.attrib["width"]) <= width + 1e-3 and y + float(rect.attrib["height"]) <= height


def test_a_measured_run_stands_below_the_plan_on_the_same_width(tmp_path: Path) -> None:
    plan = panel(one_f_one_b(2, 2))
    rows = [[Span(s.action, 7.0 + s.start / 9, 7.0 + s.end / 9) for s in row] for row in plan.rows]
    rows[1][0] = Span(Action("F", 0), 7.0 + 1 / 9, 7.0 + 1.5 / 9)  # a forward that took half the time
    below = measured("run <1>", rows, plan)
    assert below.summary == "bubble 36.1% measured, 33.3% predicted"
    root = ElementTree.fromstring(svg([plan, below]))
    assert len(drawn(root)) == 16
    assert [text.text for text in root.iter(f"{SVG}text") if text.get("font-weight")] == ["title", "run <1>"]
    idle = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") == "#eef0f3" and rect.get("height") == "26"]
    assert len(idle) == 4 and len({rect.get("width") for rect in idle}) == 1
    png([plan, below], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_colours_tell_kinds_and_chunks_apart() -> None:
    shades = [fill(kind, chunk, 4) for kind in COLOURS for chunk in range(4)]
    assert len(set(shades)) == 16 and fill("F", 0, 4) == fill("F", 0, 1) == COLOURS["F"]
    assert ink("#ffffff") != ink("#000000") == "#ffffff"
    names = [name for _, name in legend([panel(zbv(2, 3))])]
    assert names == [
        *("forward, chunk 0", "forward, chunk 1", "input gradient, chunk 0", "input gradient, chunk 1"),
        *("weight gradient, chunk 0", "weight gradient, chunk 1", "idle", "in flight"),
    ]


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


def test_command_says_what_split_backwards_keep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=zero_bubble", "stages=3", "microbatches=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "zero_bubble, stages 3, microbatches 4"
    assert "bubble 14.3% of the ranks' time ((p-1)(F+I-W)/(m(F+I+W)+(p-1)(F+I-W)) = 14.3%)" in lines
    assert lines[-2:] == ["in-flight peak, microbatches per rank: 3 3 3", "of these before their input gradient: 3 2 1"]


def test_command_counts_a_chunk_as_its_part_of_a_microbatch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=interleaved", "stages=4", "microbatches=8", "chunks=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "interleaved, stages 4, microbatches 8, chunks 2"
    assert lines[-2:] == [
        "bubble 15.8% of the ranks' time ((p-1)/(vm+p-1) = 15.8%)",
        "in-flight peak, microbatches per rank: 5.5 4.5 3.5 2.5",
    ]


def test_command_chooses_for_adapters_within_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=auto", "microbatches=16", "weight=0", "most_in_flight=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "zbv, stages 4, microbatches 16, chunks 2"
    assert lines[-8:] == [
        "schedule     chunks   time  bubble  in flight",
        "1f1b              1     38   15.8%          4",
        "gpipe             1     38   15.8%         16",
        "interleaved       2     35    8.6%        5.5",
        "interleaved       3     34    5.9%          5",
        "interleaved       4   33.5    4.5%       4.75",
        "zero_bubble       1     38   15.8%          4",
        "zbv               2     35    8.6%          4  <- chosen",
    ]


def test_command_writes_and_draws_schedule_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.txt"
    assert main(["schedule=zbv", "stages=2", "microbatches=3", f"out={file}"]) == 0
    assert read(file) == zbv(2, 3)
    assert main([f"file={file}", "weight=0.5"]) == 0
    assert capsys.readouterr().out.count("mine.txt, stages 2, microbatches 3, chunks 2") == 1
    file.write_text("F0 B0\nB0 F0\n")
    assert main([f"file={file}"]) == 2
    assert capsys.readouterr().err == f"{file}: rank 1 runs B0 before F0\n"


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_pictures_of_the_guide_are_the_schedules(schedule: str, tmp_path: Path) -> None:
    assert main([f"schedule={schedule}", "stages=4", "microbatches=8", f"out={tmp_path / 'x.svg'}"]) == 0
    assert (tmp_path / "x.svg").read_text() == (PICTURES / f"{schedule}.svg").read_text()


def test_command_without_out_draws_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=gpipe", "stages=2", "microbatches=1"]) == 0
    assert "rank 1 | .. F0 B0---\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("out=x.gif", "out=x.gif is no picture and no schedule file; use out=<name>.svg, .png or .txt"),
        ("chunks=2", "chunks=2 is more than schedule=1f1b has; use chunks=1 or schedule=interleaved"),
        ("file=none.txt", "none.txt can't be read as a schedule"),
        ("most_in_flight=3", "most_in_flight=3.0 has no effect with schedule=1f1b; remove it or set schedule=auto"),
        ("schedule=pipedream", "schedule=pipedream is not available yet"),
        ("forward=0", "forward=0.0 is out of range; use forward>0"),
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

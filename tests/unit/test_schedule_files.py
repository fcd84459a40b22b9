"""Schedules in files: any plan comes back equal, and each mistake is told with its place."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from conf.schema import ConfigError
from parallel.pipeline.plan import Plan
from parallel.pipeline.schedules import zbv
from parallel.pipeline.text import read, write
from tests.plans import made_plans, plan


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made_plans(5, 8))
def test_every_plan_comes_back(tmp_path: Path, made: tuple[str, Plan]) -> None:
    name, plan = made
    write(plan, tmp_path / "plan.txt", title=name)
    assert read(tmp_path / "plan.txt") == plan


def test_the_file_is_what_one_would_write(tmp_path: Path) -> None:
    file = tmp_path / "plan.txt"
    write(zbv(2, 1), file, title="zbv")
    assert file.read_text() == "# zbv\nplacement=vee\nF0 F0/1 I0/1 W0/1 I0 W0\nF0 F0/1 I0/1 W0/1 I0 W0\n"
    file.write_text("# mine\n\n  F0 F1 I0 W0   I1 W1\nF0\tB0 F1 B1\n")
    assert read(file) == plan(["F0 F1 I0 W0 I1 W1", "F0 B0 F1 B1"], 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{} has no actions; write a line such as F0 F1 B0 B1 for each rank"),
        ("# F0 B0\n", "{} has no actions; write a line such as F0 F1 B0 B1 for each rank"),
        (
            "F0 X1 B0\nF0 b0 F-1",
            "{0}:1: X1 is not an action; write F0, B0, I0 or W0, and F0/1 for chunk 1\n"
            "{0}:2: b0 is not an action; write F0, B0, I0 or W0, and F0/1 for chunk 1\n"
            "{0}:2: F-1 is not an action; write F0, B0, I0 or W0, and F0/1 for chunk 1",
        ),
        ("placement=tree\nF0 B0", "{}:1: placement=tree is not a setting; use placement=loop or placement=vee"),
        ("placement=vee\nF0 B0", "{}: a vee has 2 chunks per rank, not 1"),
        ("F0 B0\nF0", "{}: rank 1 never runs B0"),
        ("F0 F1 B1 B0", "{}: rank 0 runs the backwards of chunk 0 in the order [1, 0], not 0..m-1"),
        ("F1 B1", "{}: F1 makes it 2 microbatches through 1 chunks, but no rank has more than 2 actions; two for each"),
        ("F0 B0 " * 9 + "F9 B9", "{}: rank 0 runs F0 9 times"),
        ("B0 F0 " + "F1 " * 18, "{}: rank 0 runs F1 18 times"),
        ("F0 B0 F1 B1\nF0 F1 B0 B1", "{}: deadlock: rank 0 waits before B0 for B0 of rank 1; "),
    ],
)
def test_mistakes_are_told_with_their_place(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.txt"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(file)
    assert str(error.value).startswith(message.format(file))


def test_files_that_cant_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.txt can't be read as a schedule: .*No such file"):
        read(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="binary can't be read as a schedule"):
        read(tmp_path / "binary")

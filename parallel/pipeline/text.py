"""Schedules in files: a line of actions per rank, readable and writable by hand. Without torch.

    # two stages, two microbatches
    F0 F1 I0 W0 I1 W1
    F0 B0 F1 B1

A line holds what a rank does, in order, as `Action` writes itself: F0, B0, I0 or W0 for microbatch 0, F0/1 for the
rank's chunk 1. Lines that begin with # and empty ones don't count. `placement=vee` on a line of its own places two
chunks per rank in a vee instead of a loop. The ranks, microbatches and chunks are as many as the actions name.
"""

import re
from pathlib import Path
from typing import cast

from conf.schema import ConfigError
from parallel.pipeline.plan import Action, Kind, Placement, Plan, PlanError
from parallel.pipeline.verify import verify

_ACTION = re.compile(r"([FBIW])([0-9]{1,6})(?:/([0-9]{1,3}))?", re.ASCII)


def write(plan: Plan, path: Path, title: str = "") -> None:
    """Writes the plan as a file that `read` takes, under a comment with the title."""
    lines = [f"# {title}"] if title else []
    lines += ["placement=vee"] if plan.placement == "vee" else []
    lines += [" ".join(map(str, row)) for row in plan.actions]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def read(path: Path) -> Plan:
    """The verified plan of a file.

    Raises ConfigError with a line per problem: a file that can't be read, words that are no actions with the line
    they are on, or what `verify` has against the plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as a schedule: {error}") from error
    problems: list[str] = []
    placement: Placement = "loop"
    rows: list[tuple[Action, ...]] = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            rows.append(_row(line, f"{path}:{number}", problems))
        elif key == "placement" and value in ("loop", "vee"):
            placement = cast(Placement, value)
        else:
            problems.append(f"{path}:{number}: {line} is not a setting; use placement=loop or placement=vee")
    if not problems and not rows:
        problems.append(f"{path} has no actions; write a line such as F0 F1 B0 B1 for each rank")
    if problems:
        raise ConfigError("\n".join(problems))
    highest = max((action for row in rows for action in row), key=lambda action: action.microbatch)
    chunks = max(action.chunk for row in rows for action in row) + 1
    if 2 * (highest.microbatch + 1) * chunks > (most := max(map(len, rows))):
        pairs = f"{highest.microbatch + 1} microbatches through {chunks} chunks"
        raise ConfigError(f"{path}: {highest} makes it {pairs}, but no rank has more than {most} actions; two for each")
    plan = Plan(len(rows), chunks, highest.microbatch + 1, tuple(rows), placement)
    try:
        verify(plan)
    except PlanError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def parse(word: str) -> Action:
    """What `str` made of an action. Raises ValueError for anything else."""
    match = _ACTION.fullmatch(word)
    if match is None:
        raise ValueError(f"{word} is not an action; write F0, B0, I0 or W0, and F0/1 for chunk 1")
    return Action(cast(Kind, match[1]), int(match[2]), int(match[3] or 0))


def _row(line: str, place: str, problems: list[str]) -> tuple[Action, ...]:
    row: list[Action] = []
    for word in line.split():
        try:
            row.append(parse(word))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    return tuple(row)

"""When a run's pipeline ranks did what: written while it trains, read to be drawn below its plan. Without torch.

    run_dir/trace/stage-0.jsonl     {"step": 7, "placement": "loop", "actions": [["F0", 12.031, 12.054], ...]}

One file for each pipeline rank of the first replica's first tensor rank, one line for each step, of the last start of
the run. Times are seconds on `time.perf_counter`'s clock, which the processes of a host have in common, but not those
of several hosts. Waiting for messages is no part of an action.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from conf.schema import ConfigError
from parallel.pipeline.plan import Action, Kind, Plan, PlanError
from parallel.pipeline.text import parse
from parallel.pipeline.timeline import Costs, Span
from parallel.pipeline.verify import verify

FOLDER = "trace"
MILLISECONDS = 1e3


class Writer:
    """This rank's file of a run; an earlier one goes."""

    def __init__(self, run_dir: Path, stage: int) -> None:
        self._path = run_dir / FOLDER / f"stage-{stage}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("", encoding="utf-8")
        self._actions: list[tuple[str, float, float]] = []

    def note(self, action: Action, start: float, end: float) -> None:
        """Keeps an action's seconds until the step's end."""
        self._actions.append((str(action), start, end))

    def step(self, number: int, plan: Plan) -> None:
        """Writes the line of step `number`, which the plan was executed in."""
        line = {"step": number, "placement": plan.placement, "actions": self._actions}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._actions = []


@dataclass(frozen=True)
class Trace:
    """One step as it happened."""

    step: int
    plan: Plan
    rows: tuple[tuple[Span, ...], ...]
    """Each rank's spans in milliseconds from the first one's start."""

    def costs(self) -> Costs:
        """The median time of each virtual stage's passes; a whole backward counts as one without weights."""
        times: dict[tuple[Kind, int], list[float]] = {}
        for rank, row in enumerate(self.rows):
            for span in row:
                key = span.action.kind, self.plan.virtual_stage(rank, span.action)
                times.setdefault(key, []).append(span.end - span.start)

        def of(*kinds: Kind) -> tuple[float, ...]:
            stages = range(self.plan.stages * self.plan.chunks)
            return tuple(
                sum(median(times[kind, stage]) for kind in kinds if (kind, stage) in times) for stage in stages
            )

        return Costs(of("F"), of("B", "I"), of("W"))


def read(run_dir: Path) -> Trace:
    """The last step that every stage has written.

    Raises ConfigError: the run has no trace, or its files are damaged or of several runs.
    """
    files = sorted((run_dir / FOLDER).glob("stage-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    if not files:
        raise ConfigError(f"trace={run_dir} has no {FOLDER}/stage-*.jsonl; train with parallel.trace=true")
    steps = [_lines(path) for path in files]
    common = set.intersection(*(set(lines) for lines in steps))
    if not common:
        raise ConfigError(f"trace={run_dir}: no step is in all of the {len(files)} files of {FOLDER}")
    step = max(common)
    placement, first = steps[0][step]
    start = min(row[0].start for _, row in (lines[step] for lines in steps))
    rows = tuple(
        tuple(Span(s.action, MILLISECONDS * (s.start - start), MILLISECONDS * (s.end - start)) for s in lines[step][1])
        for lines in steps
    )
    chunks, microbatches = (max(getattr(s.action, of) for s in first) + 1 for of in ("chunk", "microbatch"))
    actions = tuple(tuple(span.action for span in row) for row in rows)
    plan = Plan(len(rows), chunks, microbatches, actions, "vee" if placement == "vee" else "loop")
    try:
        verify(plan)
    except PlanError as error:
        raise ConfigError(f"trace={run_dir}: step {step} of {FOLDER} is no whole schedule ({error})") from error
    return Trace(step, plan, rows)


def _lines(path: Path) -> dict[int, tuple[str, Sequence[Span]]]:
    """By step its placement and spans; a last line that a crash has cut off doesn't count."""
    found: dict[int, tuple[str, Sequence[Span]]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            data = json.loads(line)
            spans = [Span(parse(word), float(start), float(end)) for word, start, end in data["actions"]]
            found[int(data["step"])] = str(data["placement"]), spans
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number} is damaged ({error})") from error
    return {step: item for step, item in found.items() if item[1]}

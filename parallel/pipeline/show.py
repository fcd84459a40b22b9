"""Draws a pipeline schedule before it runs.

    python -m parallel.pipeline.show schedule=1f1b stages=4 microbatches=8 out=x.svg

Without `out` the picture goes to the terminal; `out=x.svg` writes an SVG by hand, `out=x.png` asks matplotlib,
`out=x.txt` writes the schedule in the form that `file=x.txt` draws. A rank is a row and time runs to the right.
`forward`, `input` and `weight` are the times of a rank's layers, of which each of its chunks takes an equal part.
Below a rank's blocks the SVG and PNG show, as steps, how many activations it keeps. `schedule=auto` draws the one
that `choose` picks, and what it predicted for the others.

    python -m parallel.pipeline.show trace=runs/mine out=x.svg

draws the last step of a run that was trained with `parallel.trace=true`, below what its schedule predicts for the times
that its passes took.
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

from conf.load import load
from conf.schema import ConfigError, ShowConfig
from parallel.pipeline.choose import Prediction, choose, predictions
from parallel.pipeline.formulas import bubble_formula
from parallel.pipeline.picture import Panel, measured, planned, terminal
from parallel.pipeline.plan import Plan
from parallel.pipeline.png import png
from parallel.pipeline.schedules import make
from parallel.pipeline.svg import svg
from parallel.pipeline.text import read, write
from parallel.pipeline.timeline import Costs, in_flight_peak
from parallel.pipeline.trace import read as read_trace

MOST_CHUNKS = 4
"""Chunks per rank that `schedule=auto` considers when nobody says how many."""


def caption(schedule: str, plan: Plan) -> str:
    """One line naming the plan: `1f1b, stages 4, microbatches 8`."""
    chunks = f", chunks {plan.chunks}" if plan.chunks > 1 else ""
    return f"{schedule}, stages {plan.stages}, microbatches {plan.microbatches}{chunks}"


def peaks(plan: Plan) -> list[str]:
    """The in-flight peak of every rank in microbatches through all its layers; split backwards have two."""
    kept = in_flight_peak(plan)
    lines = [f"in-flight peak, microbatches per rank: {' '.join(f'{peak / plan.chunks:g}' for peak in kept)}"]
    until_input = in_flight_peak(plan, until="input")
    if until_input != kept:
        each = " ".join(f"{peak / plan.chunks:g}" for peak in until_input)
        lines.append(f"of these before their input gradient: {each}")
    return lines


def table(made: list[Prediction], chosen: Prediction) -> list[str]:
    """What was predicted for each schedule, the chosen one marked."""
    lines = ["schedule     chunks   time  bubble  in flight"]
    for one in made:
        mark = "  <- chosen" if (one.schedule, one.chunks) == (chosen.schedule, chosen.chunks) else ""
        lines.append(
            f"{one.schedule:<12} {one.chunks:>6} {one.time:>6.4g}  {one.bubble:>6.1%} {one.in_flight:>10.4g}{mark}"
        )
    return lines


def main(argv: list[str]) -> int:
    """Draws the schedule that the arguments name; returns the exit code (2 for a user's mistake)."""
    try:
        config = load(argv, "show")
        if config.trace is not None:
            return _trace(config, Path(config.trace))
        name, plan, notes = _plan(config)
        costs = _costs(config).part(plan.chunks)
        panel = planned(caption(name, plan), plan, costs, bubble_formula(name, plan, costs))
        if config.out:
            _write(plan, [panel], Path(config.out))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(panel.title)
    print(f"wrote {config.out}" if config.out else terminal(panel))
    print("\n".join([panel.summary, *peaks(plan), *notes]))
    return 0


def _trace(config: ShowConfig, run_dir: Path) -> int:
    """Draws a step of a run below its plan."""
    default = ShowConfig(trace=config.trace, out=config.out)
    for field in fields(config):
        value = getattr(config, field.name)
        if value != getattr(default, field.name):
            raise ConfigError(f"{field.name}={value} has no effect with trace={config.trace}; remove one of them")
    trace = read_trace(run_dir)
    title = f"{run_dir}, step {trace.step}"
    expected = replace(planned(f"{title}: planned", trace.plan, trace.costs()), axis="milliseconds")
    found = measured(f"{title}: measured", trace.rows, expected, "milliseconds")
    if config.out:
        _write(trace.plan, [expected, found], Path(config.out))
        print(f"wrote {config.out}")
    else:
        print("\n".join([expected.title, terminal(expected), "", found.title, terminal(found)]))
    print("\n".join([found.summary, *peaks(trace.plan)]))
    return 0


def _costs(config: ShowConfig) -> Costs:
    return Costs(config.forward, config.input, config.weight, config.message)


def _plan(config: ShowConfig) -> tuple[str, Plan, list[str]]:
    """The schedule's name, the plan, and what is to be said about the choice."""
    if config.file is not None:
        return Path(config.file).name, read(Path(config.file)), []
    if config.schedule != "auto":
        plan = make(config.schedule, config.stages, config.microbatches, config.chunks)
        return config.schedule, plan, []
    counts = config.stages, config.microbatches, _costs(config)
    most_chunks = config.chunks or MOST_CHUNKS
    chosen = choose(*counts, config.most_in_flight, most_chunks)
    return chosen.schedule, chosen.plan, ["", *table(predictions(*counts, most_chunks), chosen)]


def _write(plan: Plan, panels: list[Panel], path: Path) -> None:
    if path.suffix == ".svg":
        path.write_text(svg(panels), encoding="utf-8")
    elif path.suffix == ".png":
        png(panels, path)
    elif path.suffix == ".txt":
        write(plan, path, panels[0].title)
    else:
        raise ConfigError(f"out={path} is no picture and no schedule file; use out=<name>.svg, .png or .txt")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Draws a pipeline schedule before it runs.

    python -m parallel.pipeline.show schedule=1f1b stages=4 microbatches=8 out=x.svg

Without `out` the picture goes to the terminal; `out=x.svg` writes an SVG by hand, `out=x.png` asks
matplotlib. In each form a rank is a row and time runs to the right: forwards take one unit, backwards two.
Below a rank's blocks the SVG and PNG show, as steps, how many microbatches are in flight there.
"""

import sys
from pathlib import Path

from conf.load import load
from conf.schema import ConfigError
from parallel.pipeline.plan import Plan
from parallel.pipeline.schedules import make
from parallel.pipeline.timeline import Span, bubble, in_flight, in_flight_peak, timeline

FILL = {"F": "#5b8ff9", "B": "#f6a04d"}
IDLE, INK, IN_FLIGHT = "#eef0f3", "#1f2933", "#8a94a6"
NAMES = {"F": "forward", "B": "backward"}

# SVG sizes in pixels: margins, row heights, and the widest and narrowest unit of time.
LEFT, RIGHT, TOP, BOTTOM = 72, 96, 64, 40
BLOCK, STEPS, GAP = 26, 14, 10
WIDEST_UNIT, NARROWEST_UNIT, WIDTH = 34.0, 9.0, 1200.0


def caption(schedule: str, plan: Plan) -> str:
    """One line naming the plan: `1f1b, stages 4, microbatches 8`."""
    return f"{schedule}, stages {plan.stages}, microbatches {plan.microbatches}"


def summary(plan: Plan) -> tuple[str, str]:
    """Two lines of text: the bubble with its closed form, and the in-flight peak of every rank."""
    formula = (plan.stages - 1) / (plan.microbatches + plan.stages - 1)
    peaks = " ".join(map(str, in_flight_peak(plan)))
    return (
        f"bubble {bubble(plan):.1%} of the ranks' time ((p-1)/(m+p-1) = {formula:.1%})",
        f"in-flight peak, microbatches per rank: {peaks}",
    )


def terminal(plan: Plan) -> str:
    """The schedule as text, one line per rank, a dot where it is idle: `rank 1 | .. F0 F1 B0---`."""
    width = len(str(plan.microbatches - 1)) + 2
    lines: list[str] = []
    for rank, row in enumerate(timeline(plan)):
        text = ""
        for span in row:
            text += ("." * (width - 1) + " ") * round(span.start - len(text) / width)
            cell = round(span.end - span.start) * width - 1
            text += str(span.action).ljust(cell, "-" if span.action.kind == "B" else " ") + " "
        lines.append(f"rank {rank:<{len(str(plan.stages - 1))}} | {text}".rstrip())
    return "\n".join(lines)


def svg(plan: Plan, title: str) -> str:
    """The schedule as an SVG document: numbered blocks, in-flight steps and their peak per rank, a legend."""
    rows = timeline(plan)
    end = max(row[-1].end for row in rows)
    unit = max(NARROWEST_UNIT, min(WIDEST_UNIT, (WIDTH - LEFT - RIGHT) / end))
    pitch = BLOCK + STEPS + GAP
    width, height = max(480.0, LEFT + end * unit + RIGHT), TOP + plan.stages * pitch + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" fill="{INK}">',
        "<style>text { font-family: sans-serif }</style>",
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{title}</text>',
        f'<text x="{LEFT}" y="40" font-size="12">{summary(plan)[0]}</text>',
        f'<text x="{LEFT + end * unit + 10:g}" y="{TOP - 8}" font-size="12">in-flight peak</text>',
    ]
    peaks, digits = in_flight_peak(plan), len(str(plan.microbatches - 1))
    for rank, row in enumerate(rows):
        y = TOP + rank * pitch
        parts.append(f'<text x="{LEFT - 10}" y="{y + 18}" font-size="13" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{end * unit:g}" height="{BLOCK}" fill="{IDLE}"/>')
        parts += [_svg_block(span, digits, y, unit) for span in row]
        parts.append(_svg_steps(row, max(peaks), y + BLOCK + STEPS, unit))
        parts.append(f'<text x="{LEFT + end * unit + 10:g}" y="{y + 18}" font-size="13">{peaks[rank]}</text>')
    parts += _svg_legend(height - BOTTOM + 14)
    return "\n".join([*parts, "</svg>", ""])


def png(plan: Plan, title: str, path: Path) -> None:
    """Writes the same picture as a PNG file through matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = timeline(plan)
    end = max(row[-1].end for row in rows)
    peaks = in_flight_peak(plan)
    figure = Figure(figsize=(min(100.0, 3.0 + 0.35 * end), 1.6 + 0.55 * plan.stages), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for rank, row in enumerate(rows):
        axes.barh(rank - 0.1, end, height=0.5, color=IDLE)
        for span in row:
            at, size = span.start, span.end - span.start
            axes.barh(rank - 0.1, size, left=at, height=0.5, color=FILL[span.action.kind], edgecolor="white")
            number = str(span.action.microbatch)
            axes.text(at + size / 2, rank - 0.1, number, ha="center", va="center", fontsize=8)
        times, counts = zip(*_in_flight_steps(row), strict=True)
        heights = [rank + 0.42 - 0.22 * count / max(peaks) for count in counts]
        axes.fill_between(times, rank + 0.42, heights, step="post", color=IN_FLIGHT, lw=0)
    axes.set_yticks(range(plan.stages), [f"rank {r} (peak {peak})" for r, peak in enumerate(peaks)])
    axes.invert_yaxis()
    axes.set_xlabel("time, forward = 1, backward = 2")
    axes.set_title(f"{title}\n{summary(plan)[0]}", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    colours = {NAMES["F"]: FILL["F"], NAMES["B"]: FILL["B"], "idle": IDLE, "in flight": IN_FLIGHT}
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> int:
    """Draws the schedule that the arguments name; returns the exit code (2 for a user's mistake)."""
    try:
        config = load(argv, "show")
        plan = make(config.schedule, config.stages, config.microbatches)
        title = caption(config.schedule, plan)
        if config.out:
            _write(plan, title, Path(config.out))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(title)
    print(f"wrote {config.out}" if config.out else terminal(plan))
    print("\n".join(summary(plan)))
    return 0


def _write(plan: Plan, title: str, path: Path) -> None:
    if path.suffix == ".svg":
        path.write_text(svg(plan, title), encoding="utf-8")
    elif path.suffix == ".png":
        png(plan, title, path)
    else:
        raise ConfigError(f"out={path} is neither an SVG nor a PNG file; use out=<name>.svg or out=<name>.png")


def _svg_block(span: Span, digits: int, y: float, unit: float) -> str:
    left, width = LEFT + span.start * unit, (span.end - span.start) * unit
    number = str(span.action.microbatch)
    size = min(13.0, 1.4 * width / digits)
    block = (
        f'<rect x="{left:g}" y="{y:g}" width="{width:g}" height="{BLOCK}" fill="{FILL[span.action.kind]}" '
        f'stroke="white"><title>{span.action}: {span.start:g} to {span.end:g}</title></rect>'
    )
    if size < 6.0:
        return block
    return block + (
        f'<text x="{left + width / 2:g}" y="{y + BLOCK / 2 + size * 0.35:g}" font-size="{size:g}" '
        f'text-anchor="middle">{number}</text>'
    )


def _in_flight_steps(row: tuple[Span, ...]) -> list[tuple[float, int]]:
    """(time, in-flight count from then on): a forward counts from its start, a backward until its end."""
    times = [span.start if span.action.kind == "F" else span.end for span in row]
    return list(zip(times, in_flight(tuple(span.action for span in row)), strict=True))


def _svg_steps(row: tuple[Span, ...], highest: int, base: float, unit: float) -> str:
    """The in-flight count of one rank as a filled staircase above the line `base`."""
    level = base
    points: list[tuple[float, float]] = []
    for time, count in _in_flight_steps(row):
        x = LEFT + time * unit
        points.append((x, level))
        level = base - (STEPS - 2) * count / highest
        points.append((x, level))
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polygon points="{path}" fill="{IN_FLIGHT}"/>'


def _svg_legend(y: float) -> list[str]:
    parts: list[str] = []
    x = float(LEFT)
    for colour, name in (
        (FILL["F"], "forward"),
        (FILL["B"], "backward"),
        (IDLE, "idle"),
        (IN_FLIGHT, "in flight"),
    ):
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20:g}" y="{y + 12:g}" font-size="12">{name}</text>')
        x += 34 + 8 * len(name)
    return parts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

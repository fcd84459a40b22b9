"""What a picture of a schedule shows, whatever draws it: panels of ranks, colours, a terminal's text. Without torch.

A panel is a plan's predicted times or the measured times of a run; a picture is one panel, or several under each
other, each with a time axis of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from parallel.pipeline.plan import KINDS, Kind, Plan
from parallel.pipeline.timeline import Costs, Span, idle_share, in_flight, timeline

NAMES: Mapping[Kind, str] = MappingProxyType(
    {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
)
# From the palettes of Okabe and Ito, of IBM and of Tol: the kinds of any schedule, in two chunks' shades, stay at least
# 22 apart in CIELAB for simulated protan, deutan and tritan eyes (Machado et al. 2009).
COLOURS: Mapping[Kind, str] = MappingProxyType({"F": "#332288", "B": "#d55e00", "I": "#ffb000", "W": "#009e73"})
IDLE, INK, PAPER, IN_FLIGHT = "#eef0f3", "#1f2933", "#ffffff", "#8a94a6"
LIGHTEST = 0.6
"""Share of white in the colour of a rank's last chunk, where it has several."""


@dataclass(frozen=True, slots=True)
class Panel:
    """The spans of every rank in one unit of time, and what is written above them."""

    title: str
    summary: str
    rows: tuple[tuple[Span, ...], ...]
    axis: str
    """What the time axis counts: `time, forward = 1, ...` or `milliseconds`."""

    @property
    def start(self) -> float:
        """The first start of any rank."""
        return min(row[0].start for row in self.rows)

    @property
    def length(self) -> float:
        """From the first start to the last end, in the unit of the spans."""
        return max(row[-1].end for row in self.rows) - self.start

    @property
    def chunks(self) -> int:
        """Chunks per rank."""
        return max(span.action.chunk for row in self.rows for span in row) + 1

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of actions that occur, in the order of the legend."""
        seen = {span.action.kind for row in self.rows for span in row}
        return [kind for kind in KINDS if kind in seen]

    @property
    def peaks(self) -> tuple[int, ...]:
        """Per rank, the most (microbatch, chunk) pairs kept."""
        return tuple(max(count for _, count in steps(row)) for row in self.rows)

    @property
    def labels(self) -> list[str]:
        """The peaks as written: microbatches through all chunks of a rank, `5.5`."""
        return [f"{peak / self.chunks:g}" for peak in self.peaks]

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time, 0 to 1."""
        return idle_share(self.rows)

    @property
    def typical(self) -> float:
        """The median time of an action that takes any."""
        times = sorted(span.end - span.start for row in self.rows for span in row if span.end > span.start)
        return times[len(times) // 2] if times else 1.0


def planned(title: str, plan: Plan, costs: Costs, formula: tuple[str, float] | None = None) -> Panel:
    """The predicted times of a plan at the costs of its virtual stages; `formula` and its value for the bubble."""
    bubble = f"bubble {idle_share(rows := timeline(plan, costs)):.1%} of the ranks' time"
    axis = "time, " + ", ".join(f"{name} {cost}" for name, cost in _costs(plan, costs))
    return Panel(title, bubble + (f" ({formula[0]} = {formula[1]:.1%})" if formula else ""), rows, axis)


def measured(title: str, rows: Sequence[Sequence[Span]], predicted: Panel, axis: str = "seconds") -> Panel:
    """What really happened: each rank's spans in the order of time, their unit, and what was predicted for them."""
    spans = tuple(map(tuple, rows))
    return Panel(title, f"bubble {idle_share(spans):.1%} measured, {predicted.bubble:.1%} predicted", spans, axis)


def fill(kind: Kind, chunk: int, chunks: int) -> str:
    """The colour of an action: of its kind, a rank's first chunk darkest, as in arXiv:2104.04473 fig. 4."""
    white = LIGHTEST * chunk / (chunks - 1) if chunks > 1 else 0.0
    red, green, blue = (round(part + (255 - part) * white) for part in _parts(COLOURS[kind]))
    return f"#{red:02x}{green:02x}{blue:02x}"


def ink(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG's contrast of relative luminances)."""
    light = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in _parts(colour)]
    luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]
    return PAPER if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else INK


def legend(panels: Sequence[Panel]) -> list[tuple[str, str]]:
    """(colour, name) of everything that the panels show."""
    chunks = max(panel.chunks for panel in panels)
    kinds: list[Kind] = [kind for kind in KINDS if any(kind in panel.kinds for panel in panels)]
    several = [(fill(kind, c, chunks), f"{NAMES[kind]}, chunk {c}") for kind in kinds for c in range(chunks)]
    return [
        *(several if chunks > 1 else [(COLOURS[kind], NAMES[kind]) for kind in kinds]),
        (IDLE, "idle"),
        (IN_FLIGHT, "in flight"),
    ]


def longest_first(row: tuple[Span, ...]) -> list[Span]:
    """The order to draw in: the edges of wide blocks don't cover narrow ones."""
    return sorted(row, key=lambda span: span.start - span.end)


def steps(row: tuple[Span, ...]) -> list[tuple[float, int]]:
    """(time, in-flight count from then on): a forward counts from its start, a gradient until its end."""
    times = [span.start if span.action.kind == "F" else span.end for span in row]
    return list(zip(times, in_flight(tuple(span.action for span in row)), strict=True))


def terminal(panel: Panel) -> str:
    """The panel as text, one line per rank, dots where it is idle: `rank 1 | .. F0 F1 B0---`.

    Of the actions that take at least half as long as the typical one the shortest gets room for its name; longer
    ones are filled with `-`. A name that doesn't fit is cut to its kind, and left out where no letter fits.
    """
    spans = [span for row in panel.rows for span in row]
    cell = max(len(str(span.action)) for span in spans) + 1
    named = (span.end - span.start for span in spans if span.end - span.start >= 0.5 * panel.typical)
    scale = cell / min(named, default=1.0)
    lines: list[str] = []
    for rank, row in enumerate(panel.rows):
        text = ""
        for span in row:
            start, end = (round((time - panel.start) * scale) for time in (span.start, span.end))
            text += _idle(start - len(text), cell) + _block(span, end - max(start, len(text)))
        lines.append(f"rank {rank:<{len(str(len(panel.rows) - 1))}} | {text}".rstrip())
    return "\n".join(lines)


def _idle(columns: int, cell: int) -> str:
    cells, rest = divmod(max(columns, 0), cell)
    return ("." * (cell - 1) + " ") * cells + ("." * (rest - 1) + " " if rest else "")


def _block(span: Span, columns: int) -> str:
    name = str(span.action)
    if columns < 1:
        return ""
    if columns == 1:
        return span.action.kind
    shown = name if len(name) < columns else span.action.kind
    return shown.ljust(columns - 1, "-" if span.action.kind != "F" else " ") + " "


def _costs(plan: Plan, costs: Costs) -> list[tuple[str, str]]:
    """(name, time) of each kind in the plan, of a chunk, and of a message if it takes any."""
    kinds: list[Kind] = [kind for kind in KINDS if any(action.kind == kind for row in plan.actions for action in row)]
    found: list[tuple[str, str]] = []
    for kind in kinds:
        times = sorted({costs.of(kind, v) for v in range(plan.stages * plan.chunks)})
        found.append((NAMES[kind], f"{times[0]:g}" + (f" to {times[-1]:g}" if len(times) > 1 else "")))
    return found + ([("message", f"{costs.message:g}")] if costs.message else [])


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)

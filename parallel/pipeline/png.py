"""A schedule as a PNG file, through matplotlib. Without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.pipeline.picture import IDLE, IN_FLIGHT, Panel, fill, ink, legend, longest_first, steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROWEST, NARROWEST_FIGURE, WIDEST_FIGURE, MARGINS = 0.2, 7.0, 60.0, 3.0
"""Inches: of a typical action, of the whole, of what is beside the time axis."""


def png(panels: Sequence[Panel], path: Path) -> None:
    """Writes the panels under each other: numbered blocks, in-flight steps and their peak per rank, and a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    blocks = max(panel.length / panel.typical for panel in panels)
    wide = min(WIDEST_FIGURE, max(NARROWEST_FIGURE, MARGINS + max(NARROWEST * blocks, min(0.35 * blocks, 9.0))))
    tall = [0.9 + 0.55 * len(panel.rows) for panel in panels]
    entries = legend(panels)
    columns = max(2, min(len(entries), int(wide / (2.2 if len(entries) > 6 else 1.5))))
    figure = Figure(figsize=(wide, sum(tall) + 0.4 + 0.22 * -(-len(entries) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": tall})
    for panel, axes in zip(panels, grid[:, 0], strict=True):
        _panel(panel, axes, (wide - MARGINS) / panel.length if panel.length else 1.0)
    handles = [Patch(color=colour, label=name) for colour, name in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _panel(panel: Panel, axes: "Axes", inches: float) -> None:
    """One panel; `inches` per unit of time."""
    peaks = panel.peaks
    for rank, row in enumerate(panel.rows):
        axes.barh(rank - 0.1, panel.length, height=0.5, color=IDLE)
        for span in longest_first(row):
            at, size = span.start - panel.start, span.end - span.start
            colour = fill(span.action.kind, span.action.chunk, panel.chunks)
            edge = "white" if size * inches > 0.03 else "none"
            axes.barh(rank - 0.1, size, left=at, height=0.5, color=colour, edgecolor=edge)
            number = str(span.action.microbatch)
            points = min(8.0, 72 * size * inches / (0.75 * len(number)))
            if points >= 4.0:
                place = {"ha": "center", "va": "center", "fontsize": points}
                axes.text(at + size / 2, rank - 0.1, number, color=ink(colour), **place)
        times, counts = zip(*steps(row), strict=True)
        heights = [rank + 0.42 - 0.22 * count / max(peaks) for count in counts]
        axes.fill_between([t - panel.start for t in times], rank + 0.42, heights, step="post", color=IN_FLIGHT, lw=0)
    axes.set_yticks(range(len(panel.rows)), [f"rank {r} (peak {label})" for r, label in enumerate(panel.labels)])
    axes.invert_yaxis()
    axes.set_xlim(0, panel.length or 1.0)
    axes.set_xlabel(panel.axis)
    axes.set_title(f"{panel.title}\n{panel.summary}", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)

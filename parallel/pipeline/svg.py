"""A schedule as an SVG document, written by hand. Without torch."""

from collections.abc import Sequence
from html import escape

from parallel.pipeline.picture import IDLE, IN_FLIGHT, INK, Panel, fill, ink, legend, longest_first, steps
from parallel.pipeline.timeline import Span

# Sizes in pixels: margins, heights of a row's parts, and the widest and narrowest typical action.
LEFT, RIGHT, HEAD, FOOT = 72, 110, 64, 40
BLOCK, STEPS, GAP = 26, 14, 10
WIDEST, NARROWEST, WIDTH = 34.0, 9.0, 1200.0


def svg(panels: Sequence[Panel]) -> str:
    """The panels under each other: numbered blocks, in-flight steps and their peak per rank, and a legend."""
    wide = max(panel.length * _unit(panel) for panel in panels)
    units = [wide / panel.length if panel.length else WIDEST for panel in panels]
    heights = [HEAD + len(panel.rows) * (BLOCK + STEPS + GAP) for panel in panels]
    width = max(480.0, LEFT + wide + RIGHT)
    entries, lines = _legend(panels, sum(heights) + 14, width)
    height = sum(heights) + FOOT + 22 * (lines - 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" fill="{INK}">',
        "<style>text { font-family: sans-serif }</style>",
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
    ]
    top = 0
    for panel, unit, tall in zip(panels, units, heights, strict=True):
        parts += _panel(panel, unit, top)
        top += tall
    return "\n".join([*parts, *entries, "</svg>", ""])


def _unit(panel: Panel) -> float:
    """Pixels per unit of time that suit the panel."""
    room = (WIDTH - LEFT - RIGHT) / panel.length if panel.length else WIDEST
    return max(NARROWEST / panel.typical, min(WIDEST / panel.typical, room))


def _panel(panel: Panel, unit: float, top: int) -> list[str]:
    end = LEFT + panel.length * unit
    parts = [
        f'<text x="{LEFT}" y="{top + 22}" font-size="15" font-weight="bold">{escape(panel.title)}</text>',
        f'<text x="{LEFT}" y="{top + 40}" font-size="12">{escape(panel.summary)}</text>',
        f'<text x="{end + 10:g}" y="{top + HEAD - 8}" font-size="12">in-flight peak</text>',
    ]
    peaks, digits = panel.peaks, max(len(str(span.action.microbatch)) for row in panel.rows for span in row)
    for rank, row in enumerate(panel.rows):
        y = top + HEAD + rank * (BLOCK + STEPS + GAP)
        parts.append(f'<text x="{LEFT - 10}" y="{y + 18}" font-size="13" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:g}" height="{BLOCK}" fill="{IDLE}"/>')
        for span in longest_first(row):
            parts.append(_block(span, LEFT + (span.start - panel.start) * unit, y, unit, digits, panel.chunks))
        parts.append(_steps(row, panel, unit, max(peaks), y + BLOCK + STEPS))
        parts.append(f'<text x="{end + 10:g}" y="{y + 18}" font-size="13">{panel.labels[rank]}</text>')
    return parts


def _block(span: Span, left: float, top: float, unit: float, digits: int, chunks: int) -> str:
    width, colour = (span.end - span.start) * unit, fill(span.action.kind, span.action.chunk, chunks)
    edge = ' stroke="white"' if width > 3 else ""
    block = (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{BLOCK}" fill="{colour}"{edge}>'
        f"<title>{span.action}: {span.start:g} to {span.end:g}</title></rect>"
    )
    size = min(13.0, 1.25 * width / digits)
    if size < 6.0:
        return block
    return block + (
        f'<text x="{left + width / 2:g}" y="{top + BLOCK / 2 + size * 0.35:g}" font-size="{size:g}" '
        f'fill="{ink(colour)}" text-anchor="middle">{span.action.microbatch}</text>'
    )


def _steps(row: tuple[Span, ...], panel: Panel, unit: float, highest: int, base: float) -> str:
    """The in-flight count of one rank as a filled staircase above the line `base`."""
    level = base
    points: list[tuple[float, float]] = []
    for time, count in steps(row):
        x = LEFT + (time - panel.start) * unit
        points.append((x, level))
        level = base - (STEPS - 2) * count / highest
        points.append((x, level))
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polygon points="{path}" fill="{IN_FLIGHT}"/>'


def _legend(panels: Sequence[Panel], top: float, width: float) -> tuple[list[str], int]:
    """The entries, and how many lines they take."""
    parts: list[str] = []
    x, y, lines = float(LEFT), top, 1
    for colour, name in legend(panels):
        size = 34 + 6.6 * len(name)
        if x + size > width and x > LEFT:
            x, y, lines = float(LEFT), y + 22, lines + 1
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20:g}" y="{y + 12:g}" font-size="12">{name}</text>')
        x += size
    return parts, lines

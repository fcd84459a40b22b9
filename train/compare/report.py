"""The figures of a run, what they say about each other, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from kernels.bench.timing import table
from train.compare.cases import LAYOUTS, PEERS, SHAPES, TOKENS, flops
from train.compare.launch import Measured

OURS = "onemesh"
FIRST_LOSS_TOLERANCE: Mapping[str, float] = {"float32": 1e-5, "bfloat16": 1e-3}
"""Relative distance between two contenders' losses before any update, by the computation's type.

In bfloat16 it is half of one value's largest rounding error: some round the residual stream, some the logits."""


@dataclass
class Row:
    """All contenders on one layout of one shape in one type."""

    shape: str
    dtype: str
    layout: str
    peak: float = 0.0
    """Operations per second of a large matrix product of this type on all cores, the best between contenders."""
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    """Contender -> its rounds."""
    absent: dict[str, str] = field(default_factory=dict)
    """Contender -> why it has no figure."""

    def speed(self, who: str) -> float:
        """Tokens per second: of the median step over all rounds."""
        return TOKENS / median(seconds for one in self.measured[who] for seconds in one.seconds)

    @property
    def ratio(self) -> float | None:
        """Our speed over that of the fastest peer; None without one."""
        peers = [self.speed(who) for who in self.measured if who != OURS]
        return self.speed(OURS) / max(peers) if peers and OURS in self.measured else None

    @property
    def peak_share(self) -> float:
        """Share of a matrix product's speed that our step reaches, everything in it counted as time."""
        return flops(SHAPES[self.shape], LAYOUTS[self.layout]) * self.speed(OURS) / TOKENS / self.peak

    def problems(self) -> list[str]:
        """Losses that don't fall over the steps, or differ between contenders before the first update.

        A new LoRA adapter changes nothing, so all start from the same loss; a new prefix is random for everyone.
        """
        found: list[str] = []
        own = next(iter(self.measured.get(OURS, [])), None)
        for who, rounds in self.measured.items():
            for one in rounds:
                if not one.losses[-1] < one.losses[0]:
                    found.append(f"{who}: the loss goes from {one.losses[0]:.4f} to {one.losses[-1]:.4f}")
                if own is not None and LAYOUTS[self.layout].tune != "prefix":
                    expected = own.losses[0]
                    if not abs(one.losses[0] - expected) <= FIRST_LOSS_TOLERANCE[self.dtype] * expected:
                        found.append(f"{who}: the first loss is {one.losses[0]:.5f}, ours {expected:.5f}")
        return [f"{self.shape}, {self.dtype}, {self.layout}: {problem}" for problem in found]


def tables(rows: Sequence[Row]) -> str:
    """Speed and memory as Markdown, a section for each shape and type."""
    sections: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sections.setdefault((row.shape, row.dtype), []).append(row)
    return "\n\n".join(_section(*key, members) for key, members in sections.items())


def _section(shape: str, dtype: str, rows: Sequence[Row]) -> str:
    who = [name for name in (OURS, *PEERS) if any(name in row.measured or name in row.absent for row in rows)]
    titles = [PEERS[name].title if name in PEERS else name for name in who]
    speed = [
        [
            row.layout,
            *(_cell(row, name, _speed) for name in who),
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.peak_share:.0%} of {row.peak / 1e9:.0f}" if OURS in row.measured else "-",
        ]
        for row in rows
    ]
    memory = [[row.layout, *(_cell(row, name, _memory) for name in who)] for row in rows]
    return "\n\n".join(
        [
            f"## {shape}, {dtype}",
            "Tokens per second:",
            table(["layout", *titles, "onemesh / best peer", "GEMM peak, GFLOP/s"], speed),
            "Peak memory of all ranks, MB (anonymous / resident):",
            table(["layout", *titles], memory),
            *(f"{name}: {reason}." for name, reason in _reasons(rows).items()),
        ]
    )


def _reasons(rows: Sequence[Row]) -> dict[str, str]:
    """Why a cell is empty, where the cell is too narrow to say it."""
    return {f"{row.layout}, {who}": reason for row in rows for who, reason in row.absent.items() if ":" in reason}


def _cell(row: Row, who: str, form: Callable[[Row, str], str]) -> str:
    if who in row.absent:
        return row.absent[who].partition(":")[0]
    return form(row, who) if who in row.measured else "-"


def _speed(row: Row, who: str) -> str:
    seconds = [seconds for one in row.measured[who] for seconds in one.seconds]
    spread = f" ({TOKENS / max(seconds):.0f}-{TOKENS / min(seconds):.0f})" if len(seconds) > 1 else ""
    return f"{row.speed(who):.0f}{spread}"


def _memory(row: Row, who: str) -> str:
    peaks = [one.memory for one in row.measured[who]]
    return f"{max(p.anonymous for p in peaks) / 1e6:.0f} / {max(p.resident for p in peaks) / 1e6:.0f}"

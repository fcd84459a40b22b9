"""Times of functions that are compared, and the limits of the machine that ran them, taken in the same run."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

_READ_BYTES = 256 << 20  # far more than the last cache level holds


def interleaved(functions: Mapping[str, Callable[[], object]], *, repeats: int = 3) -> dict[str, float]:
    """Median seconds of each function: a warm-up, then all in turn, so that a slow moment meets them alike."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def plain_read() -> Callable[[], object]:
    """A function that reads `read_bytes()` once from front to back, with torch's threads."""
    words = torch.ones(_READ_BYTES // 4)
    return words.sum


def read_bytes() -> int:
    """Bytes that `plain_read`'s function reads."""
    return _READ_BYTES


def matrix_product(dtype: torch.dtype, size: int = 1536) -> tuple[Callable[[], object], float]:
    """A square product by oneDNN, which comes near the peak of multiply-adds, and its floating-point operations."""
    x, w = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), 2.0 * size**3


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


Tables = dict[str, tuple[str, list[str], Callable[[torch.dtype], list[list[str]]]]]
"""Of a family, by name: what a table shows, its header, and what measures its rows."""


def measure(tables: Tables, dtypes: Sequence[torch.dtype], threads: Sequence[int]) -> str:
    """The tables as Markdown, for the instruction set that is loaded."""
    parts = []
    for (title, header, rows), dtype, count in itertools.product(tables.values(), dtypes, threads):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        label = f"{title}; {str(dtype).removeprefix('torch.')}, {count} thread{'s' * (count > 1)}:"
        parts.append(f"{label}\n\n{table(header, rows(dtype))}")
    return "\n\n".join(parts)

"""Decode steps of SmolLM2-135M, taken apart: python -m serve.step_bench writes docs/benchmarks/decode_step.md.

A step of each number of requests is timed four ways in turn: with its replay (as the server runs it), without one (each
kernel called from Python), with its replay by a clock around each thread's share of each kernel, and a plain read of
memory. No HTTP, no sampler, no scheduler: what one process adds to those is in `serve.compare`'s figures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import torch

from conf.schema import ModelConf
from kernels import dispatch
from kernels.bench import timing
from kernels.machine import commit, processor
from kernels.memory import keep_freed_memory
from kernels.ops import Packed
from parallel.mesh import Mesh
from parallel.model.decoder import Decoder
from parallel.model.load import build_decoder
from parallel.model.source import open_source
from serve.compare import MODEL
from serve.paged import KvCache
from serve.runner import Runner
from serve.scheduler import Chunk

REQUESTS = (1, 8, 32, 64)
CONTEXT, PAGE = 192, 16
ROUNDS, STEPS = 12, 3
REPORT = Path("docs/benchmarks/decode_step.md")


class Steps:
    """Decoding of some requests, one token each a call; every call is at the same place of the context."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        pages = -(-(CONTEXT + 1) // PAGE)
        cache = KvCache.allocate(decoder, num_pages=count * pages, page_size=PAGE)
        for x in cache.keys + cache.values:
            x.normal_()
        self.runner = Runner(decoder, Mesh.single(), cache, PAGE, "")
        self.chunks = [
            Chunk(id=str(b), adapter=None, start=CONTEXT, tokens=(b,), samples=True, pages=tuple(table))
            for b, table in enumerate(range(b * pages, (b + 1) * pages) for b in range(count))
        ]

    def step(self) -> float:
        """Seconds of one."""
        return _seconds(lambda: self.runner.forward(self.chunks))

    def parts(self) -> tuple[float, float, int]:
        """(seconds of a step in which some thread works on a kernel call; seconds of the rest of that step; number of
        the calls)."""
        (step,) = self.runner.replays.steps
        step.recording.by_clock = True
        whole = self.step()
        step.recording.by_clock = False
        begins, ends = step.recording.times()
        begins = torch.where(begins > 0, begins, torch.inf)
        work = float((ends.amax(0) - begins.amin(0)).sum())
        return work, whole - work, begins.shape[1]


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of the matrices that a step reads once."""
    packed = {id(x): x for module in decoder.modules() for x in vars(module).values() if isinstance(x, Packed)}
    return sum(weight.data.nbytes for weight in packed.values())


def measure(replaying: Decoder, plain: Decoder, count: int) -> list[str]:
    """A row of the table; times are medians in ms."""
    steps, without, read = Steps(replaying, count), Steps(plain, count), timing.plain_read()
    for function in (steps.step, steps.step, without.step, read):
        function()
    times: dict[str, list[float]] = {name: [] for name in ("replayed", "plain", "kernels", "beyond", "read")}
    calls = 0
    for _ in range(ROUNDS):
        for _ in range(STEPS):
            times["replayed"].append(steps.step())
            work, beyond, calls = steps.parts()
            times["kernels"].append(work)
            times["beyond"].append(beyond)
        times["plain"].append(without.step())
        times["read"].append(_seconds(read))
    ms = {name: 1e3 * median(values) for name, values in times.items()}
    limit = ms["read"] * weight_bytes(replaying) / timing.read_bytes()
    return [
        str(count),
        f"{ms['plain']:.2f} / {ms['replayed']:.2f}",
        f"{ms['kernels']:.2f} in {calls}",
        f"{ms['beyond']:.2f}",
        f"{limit:.2f}, {100 * limit / ms['replayed']:.0f}%",
    ]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> int:
    """Measures and writes the report."""
    ops, source = dispatch.select(torch.device("cpu"), torch.bfloat16), open_source(ModelConf(path=MODEL))
    if ops.record is None:
        print(f"the kernels {ops.name} have no replay", file=sys.stderr)
        return 1
    layers = (source.architecture.num_layers,)

    def decoder(backend: dispatch.Ops) -> Decoder:
        return build_decoder(
            source, Mesh.single(), layers, dtype=torch.bfloat16, ops=backend, trainable=False, packed=True
        )

    replaying, plain = decoder(ops), decoder(replace(ops, record=None))
    keep_freed_memory()
    rows = [measure(replaying, plain, count) for count in REQUESTS]
    header = ["requests", "ms a step: plain / replayed", "ms in kernel calls", "ms beyond", "ms to read the weights"]
    text = f"""# Decode steps

{date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, kernels {ops.name}, commit
{commit()}. SmolLM2-135M in bfloat16, {CONTEXT} tokens of context. Medians of {ROUNDS} rounds of {STEPS} steps, all
taken in turn.

Command: `python -m serve.step_bench`

{timing.table(header, rows)}

Plain: each kernel is called from Python. Kernel calls: the time from their first thread's begin to their last thread's
end, summed, and their number; beyond: the rest of that step, from one call to the next, in Python, and for reading the
clock (two readings a call: about 0.01 ms), without scheduler and sampler. The last column is the limit of a step that
did nothing but read its weights at the speed of a plain read in the same round, and the share of it that the replayed
step reaches.
"""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

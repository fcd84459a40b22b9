"""The host executor sees planted mistakes, and only them: one row per kind of mistake, one expectation per build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_host import KINDS, ORDERS, Outcome, arguments, draw, program, run

SOURCE = Path(__file__).with_name("planted.cu")
LINES = SOURCE.read_text().splitlines()


def mirrored_sum(x: Tensor) -> Tensor:
    return x.sum(0).flip(0)


PAGES = draw(7, 6, 4)
PAGES[2, 3] = PAGES[5] = torch.nan  # slots that no sequence uses
TABLE = torch.tensor([[3, 0], [1, 2]])
LENGTHS = torch.tensor([8, 7])
PAGED = {"x": PAGES, "table": TABLE, "lengths": LENGTHS, "blocks": 2, "width": 2}
SUMS = torch.stack([PAGES[3].sum() + PAGES[0].sum(), PAGES[1].sum() + PAGES[2, :3].sum()])
FULL = {"table": TABLE.flip(0), "lengths": LENGTHS.flip(0)}  # the last sequence's last page is full
INVALID = {"table": torch.tensor([[3, 0, 1 << 40], [1, 2, 1 << 40]]), "width": 3}
FACTORS = draw(7, 24, 16).bfloat16()
X = draw(7, 4, 64)

RIGHT = {
    "combine": ({"x": X, "out": torch.zeros(4), "blocks": 4}, X.sum(1)),
    "tiles": ({"x": X, "out": torch.zeros(64), "blocks": 1}, mirrored_sum(X)),
    "overwrite": ({"x": X, "out": torch.zeros(64), "blocks": 1}, mirrored_sum(X)),
    "barriers": ({"out": torch.zeros(64), "blocks": 1}, torch.ones(64)),
    "shuffles": ({"x": X[0], "out": torch.zeros(64), "blocks": 1}, X[0].view(32, 2).flip(1).flatten()),
    "neighbours": ({"x": X[0], "out": torch.zeros(64), "blocks": 1}, X[0].view(32, 2).flip(1).flatten()),
    "pages": (PAGED | {"out": torch.zeros(2)}, SUMS),
    "bounds": ({"x": X[0], "out": torch.zeros(64), "blocks": 1}, 2 * X[0]),
    "unaligned": ({"x": X[:2], "out": torch.zeros(32), "blocks": 1}, X[:2].reshape(32, 4).sum(1)),
    "writers": ({"x": X, "out": torch.zeros(4, 64), "blocks": 4}, X),
    "atomics": ({"x": X[0], "out": torch.zeros(1), "blocks": 1}, X[0].sum(0, keepdim=True)),
    "product": (
        {"x": FACTORS, "out": torch.zeros(16, 8), "blocks": 1},
        FACTORS[:16].float() @ FACTORS[16:].float().T,
    ),
}
"""Kernel -> its arguments, what comes out of the right program."""


def perform(kernel: str, kind: str, *, bug: int = 0, **changed: object) -> Outcome:
    values = RIGHT[kernel][0] | changed | {"bug": bug}
    struct = arguments(SOURCE.with_suffix(".h"))["Planted"]
    return run(program(SOURCE, kind), f"planted_{kernel}", struct, values, orders=ORDERS)


def line(mark: str) -> str:
    """`planted.cu:<line>` of the line with the comment `// mark`, as reports name it."""
    (number,) = (i for i, text in enumerate(LINES, 1) if text.endswith(f"// {mark}"))
    return f"planted.cu:{number}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", RIGHT)
def test_the_right_program_passes(kernel, kind):
    outcome = perform(kernel, kind)
    assert outcome.code == 0, outcome.text
    for results in outcome.runs:
        torch.testing.assert_close(results["out"], RIGHT[kernel][1])


def wrong(*marks: str) -> tuple[str, ...]:
    return ("wrong", *marks)


def race(*marks: str) -> tuple[str, ...]:
    return ("race", *marks)


def says(pattern: str, *marks: str) -> tuple[str, ...]:
    return (pattern, *marks)


POISON, HEAP, CRASH = "use-after-poison", "heap-buffer-overflow", "SEGV|signal 11"
EVERY = ("plain", "asan", "tsan")

CAUGHT = {
    "no barrier before a combine": (
        "combine",
        1,
        {},
        {"plain": wrong(), "asan": wrong(), "tsan": race("combine: write", "combine: read")},
    ),
    "no barrier before a buffer is filled again": ("tiles", 2, {}, {"plain": wrong(), "asan": wrong(), "tsan": race()}),
    "overwritten before others have read": (
        "overwrite",
        1,
        {},
        {"plain": wrong(), "tsan": race("overwrite: write", "overwrite: read")},
    ),
    "a barrier under a condition": (
        "barriers",
        1,
        {},
        dict.fromkeys(EVERY, says(r"threads 0-31 wait in __syncthreads.*\n.*32-63 have exited", "barriers: condition")),
    ),
    "two different barriers": (
        "barriers",
        2,
        {},
        dict.fromkeys(EVERY, says(r"threads 0-31 wait.*\n.*threads 32-63 wait", "barriers: first", "barriers: second")),
    ),
    "a barrier and a shuffle": ("barriers", 3, {}, dict.fromkeys(EVERY, says("deadlock", "barriers: alone"))),
    "a shuffle with lanes that have exited": (
        "shuffles",
        1,
        {},
        dict.fromkeys(
            EVERY, says(r"0-15 wait in __shfl_xor_sync \(mask ffffffff\).*\n.*16-31 have exited", "shuffles: here")
        ),
    ),
    "a shuffle with lanes that are elsewhere": (
        "shuffles",
        2,
        {},
        dict.fromkeys(EVERY, says("deadlock", "shuffles: other", "shuffles: here")),
    ),
    "a lane outside of its own mask": (
        "shuffles",
        3,
        {},
        dict.fromkeys(EVERY, says("mask 0000ffff, which lacks it", "shuffles: here")),
    ),
    "no __syncwarp": (
        "neighbours",
        1,
        {},
        {"plain": wrong(), "asan": wrong(), "tsan": race("neighbours: write", "neighbours: read")},
    ),
    "a shuffle taken for __syncwarp": ("neighbours", 2, {}, {"tsan": race("neighbours: write", "neighbours: read")}),
    "cp.async waited for one group too few": ("tiles", 1, {}, dict.fromkeys(EVERY, wrong())),
    "a page too many, the last page full": ("pages", 1, FULL, {"asan": says(HEAP, "pages: table")}),
    "a page too many, unused entries invalid": (
        "pages",
        1,
        INVALID,
        {"plain": says(CRASH), "asan": says(CRASH, "pages: read"), "tsan": says(CRASH)},
    ),
    "a position too many, unused slots NaN": ("pages", 2, {}, dict.fromkeys(EVERY, wrong())),
    "past the end of static shared memory": ("bounds", 1, {}, {"asan": says(POISON, "bounds: read")}),
    "past the end of dynamic shared memory": ("bounds", 2, {}, {"asan": says(POISON, "bounds: read")}),
    "a float4 off its border": (
        "unaligned",
        1,
        {"x": draw(7, 129)},
        {"asan": says("misaligned address", "unaligned: read")},
    ),
    "two threads write one element": ("writers", 1, {}, {"tsan": race("writers: write")}),
    "two blocks write one element": ("writers", 2, {}, {"tsan": race("writers: write")}),
    "an atomic and a plain update": ("atomics", 1, {}, {"tsan": race("atomics: plain")}),
    "swapped registers of mma": ("product", 1, {}, dict.fromkeys(EVERY, wrong())),
}
"""Mistake -> kernel, bug, changed arguments, and in each build that sees it: how, and the lines it names."""


@pytest.mark.parametrize(("mistake", "kind"), [(m, kind) for m, row in CAUGHT.items() for kind in row[3]])
def test_a_mistake_is_caught(mistake, kind):
    kernel, bug, changed, expected = CAUGHT[mistake]
    outcome = perform(kernel, kind, bug=bug, **changed)
    how, *marks = expected[kind]
    if how == "wrong":
        # ThreadSanitizer may call the read of an unfinished copy a race before the wrong result is out
        assert outcome.code in ((0, 97) if kind == "tsan" else (0,)), outcome.text
        assert outcome.code or not all(r["out"].allclose(RIGHT[kernel][1], atol=1e-5) for r in outcome.runs)
        return
    text = outcome.text + (f"signal {-outcome.code}" if outcome.code < 0 else "")
    assert outcome.code != 0
    assert re.search("data race" if how == "race" else how, text), text
    for mark in marks:
        assert line(mark) in text, (mark, text)


def test_a_block_is_whole_warps():
    outcome = run(
        program(SOURCE, "plain"), "planted_partial", arguments(SOURCE.with_suffix(".h"))["Planted"], {"blocks": 1}
    )
    assert outcome.code == 3 and "block (48,1,1) must be whole warps" in outcome.text


def test_orders_differ_and_repeat():
    """The two threads that write one element come in the order asked for."""
    first, last, *drawn = (r["out"].view(-1)[:32] for r in perform("writers", "plain", bug=1).runs)
    assert first.equal(X.view(-1)[193::2]) and last.equal(X.view(-1)[:64:2])
    again = [r["out"].view(-1)[:32] for r in perform("writers", "plain", bug=1).runs[2:]]
    assert all(a.equal(b) for a, b in zip(drawn, again, strict=True)) and not drawn[0].equal(drawn[1])

"""Draws and log-probabilities on the host executor: exactly those of a full sort with integer weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda_host import FORWARD, ORDERS, call, plant, seeded

SOURCE = "sampling.cu"
Numbers = tuple[float, int, float, float, float]
"""temperature, top_k, top_p, min_p, u"""


def drawn(
    logits: Tensor,
    numbers: Sequence[Numbers],
    rows: Sequence[int] | None = None,
    *,
    kind: str = "plain",
    orders: Sequence[tuple[int, int]] = (FORWARD,),
) -> list[int]:
    """The kernel's token for each draw; draw i is from row i unless `rows` says otherwise."""
    columns = dict(zip(("temperature", "top_k", "top_p", "min_p", "u"), zip(*numbers, strict=True), strict=True))
    values = {
        name: torch.tensor(column, dtype=torch.int64 if name == "top_k" else torch.float64)
        for name, column in columns.items()
    } | {
        "ids": torch.full((len(numbers),), -7),
        "logits": logits,
        "rows": torch.tensor(range(len(numbers)) if rows is None else rows),
        "count": len(numbers),
        "width": logits.shape[1],
    }
    first, *others = call(SOURCE, "draw", values, kind=kind, orders=orders)
    assert all(other["ids"].equal(first["ids"]) for other in others)
    return first["ids"].tolist()


def spec(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """As kernels.h defines it, by sorting everything."""
    largest = float(row.max())
    if not math.isfinite(largest):
        return -1
    if temperature == 0:
        return int(row.argmax())
    floor = largest - 33 * temperature
    if min_p > 0:
        floor = max(floor, largest + temperature * math.log(min_p))
    ids = np.flatnonzero(row >= np.float32(floor))
    ids = ids[np.argsort(-row[ids], kind="stable")]
    if 0 < top_k < len(ids):
        ids = ids[row[ids] >= row[ids[top_k - 1]]]
    weights = np.rint(np.exp((row[ids].astype(np.float64) - largest) * (1 / temperature)) * 2**42).astype(np.int64)
    sums = np.cumsum(weights)
    total = int(sums[-1])
    if top_p < 1:
        total = int(sums[np.searchsorted(sums, min(max(math.ceil(top_p * float(total)), 1), total))])
    return int(ids[np.searchsorted(sums, int(u * 2.0**53) * total >> 53, side="right")])


def check(logits: Tensor, numbers: Sequence[Numbers], **options: object) -> None:
    wanted = [spec(row, *each) for row, each in zip(logits.numpy(), numbers, strict=True)]
    assert drawn(logits, numbers, **options) == wanted  # type: ignore[arg-type]


def cases(count: int, width: int, seed: int, *, ties: bool) -> tuple[Tensor, list[Numbers]]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, width)).astype(np.float32) * 3
    if ties:
        logits = np.round(logits / 3)
        logits[:, ::3] = np.copysign(0, logits[:, ::3])  # zeros of both signs, which are equal
    numbers = [
        (
            float(generator.choice([0.3, 1.0, 2.0])),
            int(generator.choice([0, 1, 5, 40, width])),
            float(generator.choice([1.0, 0.9, 0.5, 0.01])),
            float(generator.choice([0.0, 0.0, 0.05, 0.5])),
            float(generator.choice([generator.random(), 0.0, 1 - 2.0**-53])),
        )
        for _ in range(count)
    ]
    return torch.from_numpy(logits), numbers


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("width", [1, 3, 40, 255, 1000, 4099])
def test_as_by_sorting(width, ties):
    check(*cases(24, width, width, ties=ties), orders=ORDERS[:2])


def test_shares_are_as_the_probabilities():
    """Even numbers u share the tokens out exactly: 1/4 steps over weights 2, 1, 1."""
    row = torch.tensor([[0.0, math.log(2), -math.inf, 0.0]])
    numbers = [(1.0, 0, 1.0, 0.0, u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.99)]
    assert drawn(row, numbers, [0] * 6) == [1, 1, 0, 0, 3, 3]
    for u, wanted in ((0.66, 1), (0.68, 0), (0.99, 0)):  # the first two reach 0.7 of 4, and 3 of 4 are kept
        assert drawn(row, [(1.0, 0, 0.7, 0.0, u)]) == [wanted]


def test_the_largest_and_rows_without_one():
    logits = torch.full((6, 300), -1.0)
    logits[0, [70, 290]] = 4.0
    logits[1, 299], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 1:], logits[5, 200] = -torch.inf, -0.5
    for temperature in (0.0, 1e-6):
        assert drawn(logits, [(temperature, 0, 1.0, 0.0, 0.0)] * 6, orders=ORDERS) == [70, -1, -1, -1, 0, 200]


def test_a_draw_doesnt_depend_on_the_others():
    logits, numbers = cases(5, 700, 1, ties=False)
    assert drawn(logits, numbers[::-1], [4, 3, 2, 1, 0])[::-1] == drawn(logits, numbers)
    assert drawn(logits[2:3], numbers[2:3]) == drawn(logits, numbers)[2:3]


def found_logprobs(
    logits: Tensor,
    rows: Sequence[int],
    ids: Sequence[int],
    num_top: Sequence[int],
    most: int,
    *,
    kind: str = "plain",
    orders: Sequence[tuple[int, int]] = (FORWARD,),
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the ids [C], ids and values [C, most] of the largest."""
    count = len(rows)
    values = {
        "found": torch.full((count,), math.nan, dtype=torch.float64),
        "top_ids": torch.full((count, most), -7),
        "top_values": torch.full((count, most), math.nan, dtype=torch.float64),
        "workspace": torch.full((count, most), -7),
        "logits": logits,
        "rows": torch.tensor(rows),
        "ids": torch.tensor(ids),
        "num_top": torch.tensor(num_top),
        "count": count,
        "width": logits.shape[1],
        "most": most,
    }
    names = ("found", "top_ids", "top_values")
    first, *others = call(SOURCE, "logprobs", values, kind=kind, orders=orders)
    assert all(other[name].equal(first[name]) for other in others for name in names)
    found, top_ids, top_values = (first[name] for name in names)
    return found, top_ids, top_values


def check_logprobs(logits: Tensor, most: int, **options: object) -> None:
    """Rows in reverse; each asks for another number of largest ones, up to `most`."""
    count, width = logits.shape
    rows, ids = list(range(count))[::-1], [7 * c % width for c in range(count)]
    num_top = [most if c == 0 else c % (most + 1) for c in range(count)]
    found, top_ids, top_values = found_logprobs(logits, rows, ids, num_top, most, **options)  # type: ignore[arg-type]
    exact = logits.double().log_softmax(-1)[rows].numpy()
    for c, row in enumerate(logits[rows].numpy()):
        assert found[c] == exact[c, ids[c]] or abs(found[c] - exact[c, ids[c]]) < 1e-7
        wanted = [id for id in np.argsort(-row, kind="stable")[: num_top[c]] if row[id] > -np.inf]
        left = most - len(wanted)
        assert top_ids[c].tolist() == wanted + [-1] * left
        assert np.allclose(top_values[c].numpy(), [*exact[c, wanted], *[-np.inf] * left], rtol=0, atol=1e-7)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("width", "most"), [(1, 1), (3, 2), (40, 40), (255, 0), (1000, 20), (4099, 300)])
def test_logprobs_as_by_sorting(width, most, ties):
    logits, _ = cases(6, width, width, ties=ties)
    if width > 3:
        logits[1, 2:] = logits[2, ::2] = -math.inf
    check_logprobs(logits, most, orders=ORDERS[:2])


def test_logprobs_of_a_row_dont_depend_on_the_others():
    logits, _ = cases(4, 700, 5, ties=True)
    together = found_logprobs(logits, [3, 1, 2], [5, 6, 7], [4, 9, 2], 9)
    alone = found_logprobs(logits[1:2], [0], [6], [9], 9)
    assert all(x[1:2].equal(one) for x, one in zip(together, alone, strict=True))


MUTANTS = {
    "a digit is not waited for": ("sampling.cu", "    __syncthreads();\n    place = *found;", "    place = *found;"),
    "of equals any": ("sampling.cu", "place++ == before", "place++ >= before"),
    "two zeros": ("sampling.cu", "x + 0.f", "x"),
    "of equals one too many": ("sampling.cu", "? room - place : 0", "? room - place + 1 : 0"),
    "equals by falling id": ("sampling.cu", "(other == key && j < i)", "(other == key && j > i)"),
    "the ids are not waited for": (
        "sampling.cu",
        "ids[place++] = i;\n  }\n  __syncthreads();",
        "ids[place++] = i;\n  }",
    ),
    "kept tokens are cut": (
        "sampling.cu",
        "((least - 1 - place.before) / weight + 1) * weight",
        "least - place.before",
    ),
}
"""What stands there instead: these cases must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *MUTANTS[name])

    def verify() -> None:
        test_shares_are_as_the_probabilities()
        for width in (3, 40, 4099):
            check(*cases(24, width, width, ties=True), orders=ORDERS[:2])
        test_logprobs_as_by_sorting(4099, 300, ties=True)

    with pytest.raises(AssertionError):
        verify()


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    check(*cases(4, 300, 3, ties=True), kind=kind, orders=(FORWARD, seeded(1)))
    check(*cases(4, 600, 4, ties=False), kind=kind)
    check_logprobs(cases(4, 300, 5, ties=True)[0], 20, kind=kind, orders=(FORWARD, seeded(1)))

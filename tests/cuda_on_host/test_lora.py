"""Grouped LoRA on the host executor: each segment as if it were alone, other rows untouched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.cuda_host import DTYPES, FORWARD, KERNELS, KINDS, ORDERS, assert_as_plain, build, call, plant, seeded

SOURCE = "lora.cu"
ITEM_ROWS = 16
SCALES = torch.tensor([0.5, 2.0, 1.25])
Segments = Sequence[tuple[int, int, int]]
"""Adapter, first row, end."""
Orders = Sequence[tuple[int, int]]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build(*((KERNELS / SOURCE, kind) for kind in KINDS))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, width_in: int, width_out: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"out": (rows, width_out), "x": (rows, width_in), "a": (3, rank, width_in), "b": (3, width_out, rank)}
    return {name: draw(i, *shape).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def updated(x: dict[str, Tensor], segments: Segments, *, kind: str = "plain", orders: Orders = (FORWARD,)) -> Tensor:
    items = [
        (adapter, row, min(ITEM_ROWS, end - row))
        for adapter, first, end in segments
        for row in range(first, end, ITEM_ROWS)
    ]
    (rows, width_in), (_, width_out, rank) = x["x"].shape, x["b"].shape
    values = x | {
        "hidden": torch.full((rows, rank), torch.nan, dtype=x["x"].dtype),
        "scales": SCALES,
        "items": torch.tensor(items, dtype=torch.int64).view(-1, 3),
        "num_items": len(items),
        "width_in": width_in,
        "width_out": width_out,
        "rank": rank,
        "x_stride": width_in,
        "out_stride": width_out,
        "dtype": DTYPES[x["x"].dtype],
    }
    first, *others = call(SOURCE, "lora", values, kind=kind, orders=orders)
    assert all(other["out"].equal(first["out"]) for other in others)
    return first["out"]


def spec(x: dict[str, Tensor], segments: Segments, dtype: torch.dtype) -> Tensor:
    x = {name: t.to(dtype) for name, t in x.items()}
    out = x["out"].clone()
    for adapter, first, end in segments:
        hidden = reference.linear(x["x"][first:end], x["a"][adapter])
        out[first:end] += reference.linear(hidden, x["b"][adapter]) * float(SCALES[adapter])
    return out


def check(x: dict[str, Tensor], *, kind: str = "plain", orders: Orders = (FORWARD,)) -> None:
    got = updated(x, SEGMENTS, kind=kind, orders=orders)
    assert_as_plain(got, spec(x, SEGMENTS, x["x"].dtype), spec(x, SEGMENTS, torch.float64))


SEGMENTS = [(2, 1, 6), (0, 6, 7), (2, 9, 42), (1, 42, 50)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width_in", "width_out", "rank"), [(96, 72, 8), (50, 130, 5), (64, 3, 80)])
def test_as_the_reference(width_in, width_out, rank, dtype):
    x = inputs(53, width_in, width_out, rank, dtype)
    x["x"][[0, 7, 8, 50]] = torch.nan  # rows without an adapter
    got = updated(x, SEGMENTS, orders=ORDERS[:3])
    used = torch.zeros(53, dtype=torch.bool)
    for _, first, end in SEGMENTS:
        used[first:end] = True
    assert got[~used].equal(x["out"][~used])
    assert_as_plain(got[used], spec(x, SEGMENTS, dtype)[used], spec(x, SEGMENTS, torch.float64)[used])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_doesnt_depend_on_its_segment(dtype):
    x = inputs(40, 72, 40, 8, dtype)
    at_once = updated(x, [(1, 0, 40)])
    assert updated(x, [(1, i, i + 1) for i in range(40)]).equal(at_once)
    assert updated(x, [(1, 0, 7), (1, 7, 40)]).equal(at_once)


def test_without_an_adapter_nothing_is_launched():
    x = inputs(4, 8, 8, 2, torch.bfloat16)
    assert updated(x, []).equal(x["out"])


MUTANTS = {
    "a segment that runs into the next": ("lora.cu", "first + r >= end || ", ""),
    "the first adapter for all": ("lora.cu", " + adapter * width * depth", ""),
}
"""What stands there instead: these cases must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *MUTANTS[name])
    x = inputs(50, 40, 70, 5, torch.bfloat16)
    with pytest.raises(AssertionError):
        check(x, orders=ORDERS[:3])


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    for dtype in (torch.bfloat16, torch.float32):
        check(inputs(50, 40, 70, 5, dtype), kind=kind, orders=(FORWARD, seeded(6)))

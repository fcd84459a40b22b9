"""Grouped LoRA on the host executor: each segment as if it were alone, other rows untouched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cuda_layout import low_rank_items
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, plant, seeded

SOURCE = "lora.cu"
Segments = Sequence[tuple[int, int, int]]
"""Adapter, first row, end."""
Orders = Sequence[tuple[int, int]]


def inputs(rows: int, width_in: int, width_out: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"out": (rows, width_out), "x": (rows, width_in), "a": (3, rank, width_in), "b": (3, width_out, rank)}
    return {name: draw(i, *shape).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def own(x: dict[str, Tensor], adapter: int) -> tuple[Tensor, Tensor]:
    """The factors of an adapter; that of the second has two ranks less."""
    rank = x["a"].shape[1] - (2 if adapter == 1 else 0)
    return x["a"][adapter, :rank], x["b"][adapter, :, :rank]


def laid_out(factors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """The factors somewhere in one tensor, the last first, NaN between them; where each begins."""
    parts, starts, length = [], [], 0
    for factor in reversed(factors):
        gap = -(-factor.numel() // 8) * 8 + 24 - factor.numel()  # they begin on 16-byte borders
        parts += [factor.flatten(), factor.new_full((gap,), torch.nan)]
        starts.insert(0, length)
        length += factor.numel() + gap
    return torch.cat(parts) if parts else torch.zeros(0), starts


def updated(x: dict[str, Tensor], segments: Segments, *, kind: str = "plain", orders: Orders = (FORWARD,)) -> Tensor:
    """By the items of the op, which is told where the factors of every segment lie."""
    factors = [own(x, adapter) for adapter, _, _ in segments]
    a, starts_a = laid_out([a for a, _ in factors])
    b, starts_b = laid_out([b for _, b in factors])
    table = [(*starts, a.shape[0]) for *starts, (a, _) in zip(starts_a, starts_b, factors, strict=True)]
    items = low_rank_items(tuple((first, end) for _, first, end in segments), torch.device("cpu"))
    (rows, width_in), (_, width_out, rank) = x["x"].shape, x["b"].shape
    values = x | {
        "a": a,
        "b": b,
        "factors": torch.tensor(table, dtype=torch.int64),
        "num_adapters": len(table),
        "hidden": torch.full((rows, rank), torch.nan, dtype=x["x"].dtype),
        "items": items,
        "num_items": len(items),
        "width_in": width_in,
        "width_out": width_out,
        "rank": rank,
        "x_stride": width_in,
        "out_stride": width_out,
        "dtype": DTYPES[x["x"].dtype],
        "out_dtype": DTYPES[x["out"].dtype],
    }
    first, *others = call(SOURCE, "lora", values, kind=kind, orders=orders)
    assert all(other["out"].equal(first["out"]) for other in others)
    return first["out"]


def spec(x: dict[str, Tensor], segments: Segments, dtype: torch.dtype) -> Tensor:
    x = {name: t.to(dtype) for name, t in x.items()}
    out = x["out"].clone()
    for adapter, first, end in segments:
        a, b = own(x, adapter)
        out[first:end] += reference.linear(reference.linear(x["x"][first:end], a), b)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_in_float32_is_not_rounded(dtype):
    """Inner products are: the error is that of one rounding in the middle, not of another at the end."""
    x = inputs(53, 96, 72, 8, dtype)
    x["out"] = draw(9, 53, 72) * 1e4
    got, plain = updated(x, SEGMENTS), spec(x, SEGMENTS, torch.float64)
    for adapter, first, end in SEGMENTS:
        a, b = own(x, adapter)
        hidden = (x["x"][first:end].float() @ a.float().T).to(dtype).double()
        plain[first:end] = x["out"][first:end].double() + hidden @ b.double().T
    assert got.dtype == torch.float32
    assert_as_plain(got, plain.float(), plain)


def test_without_an_adapter_nothing_is_launched():
    x = inputs(4, 8, 8, 2, torch.bfloat16)
    assert updated(x, []).equal(x["out"])


MUTANTS = {
    "a segment that runs into the next": ("lora.cu", "first + r >= end || ", ""),
    "the first adapter for all": ("lora.cu", "static_cast<const T*>(a.b) + a.factors[3 * i + 1]", "factors.b[0]"),
    "the largest rank for all": (
        "lora.cu",
        "const int64_t rank = factors.rank[adapter]",
        "const int64_t rank = a.rank",
    ),
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


def test_more_adapters_than_a_launch_takes_are_refused():
    x = inputs(65, 8, 8, 3, torch.bfloat16)
    updated(x, [(i % 3, i, i + 1) for i in range(64)])
    with pytest.raises(AssertionError, match=r"\[1\]"):
        updated(x, [(i % 3, i, i + 1) for i in range(65)])


def test_another_result_type_is_refused():
    x = inputs(50, 40, 70, 5, torch.float16)
    with pytest.raises(AssertionError, match=r"\[1\]"):
        updated(x | {"out": x["out"].bfloat16()}, SEGMENTS)

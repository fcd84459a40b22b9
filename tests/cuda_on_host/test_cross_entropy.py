"""The two steps of a cross-entropy on the host executor, against torch's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.cuda_host import DTYPES, FORWARD, KERNELS, KINDS, ORDERS, assert_as_plain, build, call, plant, seeded

SOURCE = "cross_entropy.cu"
FACTOR = 0.25
STATS = ("max", "sum", "picked")
Orders = Sequence[tuple[int, int]]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build(*((KERNELS / SOURCE, kind) for kind in KINDS))


def draw(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which some lie outside, as those of another rank's rows do."""
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(rows, width, generator=generator) * 5).to(dtype)
    targets = torch.randint(0, width, (rows,), generator=generator)
    targets[1::3] = width + 2
    targets[2::3] = -1
    return logits, targets


def sums(logits: Tensor, targets: Tensor, kind: str, orders: Orders, shift: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = logits.shape
    values = {name: torch.full((rows,), torch.nan) for name in STATS}
    values |= {"logits": logits, "targets": targets, "rows": rows, "width": width, "stride": logits.stride(0)}
    values |= {"dtype": DTYPES[logits.dtype]}
    first, *others = call(SOURCE, "cross_entropy", values, kind=kind, orders=orders, shift={"logits": shift})
    for other in others:  # bit for bit: NaN isn't equal to itself
        assert all(other[name].view(torch.int32).equal(first[name].view(torch.int32)) for name in STATS)
    return first["max"], first["sum"], first["picked"]


def grad(logits: Tensor, targets: Tensor, lse: Tensor, out: torch.dtype, kind: str, orders: Orders) -> Tensor:
    rows, width = logits.shape
    values = {"out": torch.full((rows, width), torch.nan, dtype=out), "logits": logits, "lse": lse, "targets": targets}
    values |= {"factor": torch.tensor([FACTOR]), "rows": rows, "width": width, "stride": width}
    values |= {"dtype": DTYPES[logits.dtype], "out_dtype": DTYPES[out]}
    first, *others = call(SOURCE, "cross_entropy_grad", values, kind=kind, orders=orders)
    assert all(other["out"].equal(first["out"]) for other in others)
    return first["out"]


def spec_grad(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    x = logits.to(dtype)
    here = (targets >= 0) & (targets < x.shape[1])
    hits = torch.zeros_like(x)
    hits[here, targets[here]] = 1
    return (torch.exp(x - x.logsumexp(-1, keepdim=True)) - hits) * FACTOR


def check(rows: int, width: int, dtype: torch.dtype, *, kind: str = "plain", orders: Orders = (FORWARD,)) -> None:
    logits, targets = draw(rows, width, dtype)
    top, total, picked = sums(logits, targets, kind, orders)
    work, exact = logits.float(), logits.double()
    assert top.equal(work.amax(-1))
    parts = [torch.exp(x - x.amax(-1, keepdim=True)).sum(-1) for x in (work, exact)]
    assert_as_plain(total, *parts)
    here = (targets >= 0) & (targets < width)
    assert picked[here].equal(work[here, targets[here]]) and not picked[~here].any()
    lse = top + total.log()
    for out in DTYPES if dtype == torch.float32 else (dtype,):
        got = grad(logits, targets, lse, out, kind, orders)
        plain = spec_grad(logits, targets, torch.float32).to(out)
        assert_as_plain(got, plain, spec_grad(logits, targets, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 13, 256, 2050, 5000])
def test_as_torch(width, dtype):
    check(4, width, dtype, orders=ORDERS[:3])


def test_a_row_doesnt_depend_on_where_it_lies():
    logits, targets = draw(3, 1000, torch.bfloat16)
    together = sums(logits, targets, "plain", (FORWARD,))
    alone = sums(logits[1:2], targets[1:2], "plain", (FORWARD,), shift=2)
    assert all(a.equal(t[1:2]) for a, t in zip(alone, together, strict=True))


def test_masked_and_broken_logits():
    """-inf weighs nothing, a row of it has sum 0, NaN is not swallowed."""
    logits = torch.full((4, 300), -torch.inf)
    logits[0, 7] = 2.0
    logits[1, ::5] = 1.0
    logits[3] = 1.0
    logits[3, 299] = torch.nan
    top, total, _ = sums(logits, torch.zeros(4, dtype=torch.int64), "plain", ORDERS)
    assert top[:2].tolist() == [2.0, 1.0] and total[:3].tolist() == [1.0, 60.0, 0.0]
    assert total[3].isnan()


MUTANTS = {
    "a maximum is not waited for": ("cross_entropy.cu", "  __syncthreads();\n  float top", "  float top"),
    "sums keep their own maximum": ("cross_entropy.cu", "__fmul_rn(sum, weight(max, top)));", "sum);"),
}
"""What stands there instead: these cases must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *MUTANTS[name])
    with pytest.raises(AssertionError):
        check(2, 2050, torch.float32, orders=ORDERS[:3])


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    for dtype in DTYPES:
        check(2, 300, dtype, kind=kind, orders=(FORWARD, seeded(2)))
    check(1, 1024, torch.bfloat16, kind=kind)


def test_another_result_type_is_refused():
    logits, targets = draw(1, 8, torch.float16)
    with pytest.raises(AssertionError, match=r"\[1\]"):
        grad(logits, targets, torch.zeros(1), torch.float32, "plain", (FORWARD,))

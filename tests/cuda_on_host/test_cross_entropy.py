"""Log-sum-exp of rows of logits and the gradient of a cross-entropy, on the host executor, against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, plant, seeded

SOURCE = "cross_entropy.cu"
Orders = Sequence[tuple[int, int]]


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which some lie outside, as those of another rank's columns do."""
    target = torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(width))
    target[1::3] = width + 2
    target[2::3] = -1
    return (draw(width, rows, width) * 5).to(dtype), target


def lse_of(logits: Tensor, kind: str, orders: Orders, shift: int = 0) -> Tensor:
    rows, width = logits.shape
    values = {"out": torch.full((rows,), -7.0), "logits": logits, "rows": rows, "width": width}
    values |= {"stride": logits.stride(0), "dtype": DTYPES[logits.dtype]}
    first, *others = call(SOURCE, "log_sum_exp", values, kind=kind, orders=orders, shift={"logits": shift})
    for other in others:  # bit for bit: NaN isn't equal to itself
        assert other["out"].view(torch.int32).equal(first["out"].view(torch.int32))
    return first["out"]


def grad(logits: Tensor, target: Tensor, lse: Tensor, out: torch.dtype, kind: str, orders: Orders) -> Tensor:
    rows, width = logits.shape
    values = {"out": torch.full((rows, width), torch.nan, dtype=out), "logits": logits, "lse": lse, "target": target}
    values |= {"rows": rows, "width": width, "stride": width}
    values |= {"dtype": DTYPES[logits.dtype], "out_dtype": DTYPES[out]}
    first, *others = call(SOURCE, "loss_gradient", values, kind=kind, orders=orders)
    assert all(other["out"].equal(first["out"]) for other in others)
    return first["out"]


def spec_grad(logits: Tensor, target: Tensor) -> Tensor:
    target = torch.where(target < logits.shape[1], target, -1)
    return reference.loss_gradient(logits, reference.log_sum_exp(logits), target, logits.dtype)


def check(rows: int, width: int, dtype: torch.dtype, *, kind: str = "plain", orders: Orders = (FORWARD,)) -> None:
    logits, target = inputs(rows, width, dtype)
    lse = lse_of(logits, kind, orders)
    assert_as_plain(lse, reference.log_sum_exp(logits), reference.log_sum_exp(logits.double()))
    for out in DTYPES if dtype == torch.float32 else (dtype,):
        got = grad(logits, target, lse, out, kind, orders)
        assert_as_plain(got, spec_grad(logits.float(), target).to(out), spec_grad(logits.double(), target))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 13, 256, 2050, 5000])
def test_as_the_reference(width, dtype):
    check(4, width, dtype, orders=ORDERS[:3])


def test_a_row_doesnt_depend_on_where_it_lies():
    logits, _ = inputs(3, 1000, torch.bfloat16)
    alone = lse_of(logits[1:2], "plain", (FORWARD,), shift=2)
    assert alone.equal(lse_of(logits, "plain", (FORWARD,))[1:2])


def test_masked_and_broken_logits():
    """-inf weighs nothing, a row of it has the sum 0, NaN is not swallowed."""
    logits = torch.full((4, 300), -torch.inf)
    logits[0, 7] = 2.0
    logits[1, ::5] = 1.0
    logits[3] = 1.0
    logits[3, 299] = torch.nan
    lse = lse_of(logits, "plain", ORDERS)
    assert lse[:3].equal(reference.log_sum_exp(logits[:3])) and lse[3].isnan()


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
    logits, target = inputs(1, 8, torch.float16)
    with pytest.raises(AssertionError, match=r"\[1\]"):
        grad(logits, target, torch.zeros(1), torch.float32, "plain", (FORWARD,))

"""Linear and its gradients on the host executor: against the reference on ragged sizes, row-invariant bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, plant, seeded

SOURCE = "linear.cu"
FEW_LIMIT = 32
"""Rows up to which the kernel for few rows is taken."""
Orders = Sequence[tuple[int, int]]


def called(op: str, values: dict[str, Any], kind: str, orders: Orders, shift: dict[str, int] | None = None) -> Tensor:
    """`out`, the same bits in every order."""
    first, *others = call(SOURCE, op, values, kind=kind, orders=orders, shift=shift)
    assert all(other["out"].equal(first["out"]) for other in others)
    return first["out"]


def linear(
    x_TK: Tensor,
    w_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    out: torch.dtype | None = None,
    kind: str = "plain",
    orders: Orders = (FORWARD,),
    shift: dict[str, int] | None = None,
) -> Tensor:
    """The kernel's x w^T + bias; x's rows may have gaps, which are NaN for it."""
    out = out or x_TK.dtype
    (rows, width_in), width_out = x_TK.shape, len(w_NK)
    stride = x_TK.stride(0) if rows > 1 else width_in
    x = torch.full((rows, stride), torch.nan, dtype=x_TK.dtype)
    x[:, :width_in] = x_TK
    values = {"out": torch.full((rows, width_out), torch.nan, dtype=out), "x": x.flatten()[: rows * stride]}
    values |= {"weight": w_NK, "bias": bias_N, "rows": rows, "width_in": width_in, "width_out": width_out}
    values |= {"x_stride": stride, "dtype": DTYPES[x_TK.dtype], "out_dtype": DTYPES[out]}
    return called("linear", values, kind, orders, shift)


def check(
    rows: int,
    width_in: int,
    width_out: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    float_out: bool = False,
    gap: int = 0,
    kind: str = "plain",
    orders: Orders = (FORWARD,),
) -> None:
    x, w, b = draw(1, rows, width_in + gap).to(dtype)[:, :width_in], draw(2, width_out, width_in).to(dtype), None
    if bias:
        b = draw(3, width_out).to(dtype) * 3
    out = torch.float32 if float_out else dtype
    got = linear(x, w, b, out=out, kind=kind, orders=orders)
    inputs = [None if t is None else t.to(out) for t in (x, w, b)]
    exact = reference.linear(*(None if t is None else t.double() for t in (x, w, b)))  # type: ignore[arg-type]
    assert_as_plain(got, reference.linear(*inputs), exact)  # type: ignore[arg-type]


SIZES = [(1, 64, 64), (5, 40, 72), (16, 33, 65), (32, 128, 3), (33, 96, 130), (65, 1, 17), (130, 100, 200), (3, 0, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width_in", "width_out"), SIZES)
def test_as_the_reference(rows, width_in, width_out, dtype):
    check(rows, width_in, width_out, dtype, orders=ORDERS[:3])
    check(rows, width_in, width_out, dtype, bias=False, float_out=True, gap=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width_in", [136, 83])
def test_a_row_doesnt_depend_on_the_others(width_in, dtype):
    """Nor on the kernel that the number of rows chooses, nor on where the factors lie."""
    x, w, b = draw(1, 140, width_in).to(dtype), draw(2, 70, width_in).to(dtype), draw(3, 70).to(dtype)
    at_once = linear(x, w, b)
    for rows in (slice(0, 1), slice(139, 140), slice(3, 20), slice(60, 92), slice(60, 93), slice(1, 140)):
        assert linear(x[rows], w, b).equal(at_once[rows]), rows
    assert linear(x, w, b, shift={"x": dtype.itemsize, "weight": 2 * dtype.itemsize}).equal(at_once)
    assert linear(x, w[5:], b[5:]).equal(at_once[:, 5:])


def grads(rows: int, width_in: int, width_out: int, dtype: torch.dtype, kind: str, orders: Orders) -> None:
    x, w, grad = (
        draw(1, rows, width_in).to(dtype),
        draw(2, width_out, width_in).to(dtype),
        draw(3, rows, width_out).to(dtype),
    )
    sizes = {"grad": grad, "rows": rows, "width_in": width_in, "width_out": width_out, "dtype": DTYPES[dtype]}
    for out in {dtype, torch.float32}:
        values = sizes | {"out": torch.full_like(x, torch.nan, dtype=out), "weight": w, "out_dtype": DTYPES[out]}
        grad_x = called("linear_grad_input", values, kind, orders)
        assert_as_plain(grad_x, grad.to(out) @ w.to(out), grad.double() @ w.double())
    before = draw(4, width_out, width_in)
    grad_w = called("linear_grad_weight", sizes | {"out": before, "x": x}, kind, orders)
    plain, exact = (before.to(t) + grad.to(t).T @ x.to(t) for t in (torch.float32, torch.float64))
    assert_as_plain(grad_w, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width_in", "width_out"), [(70, 72, 136), (130, 37, 50), (1, 129, 8), (40, 3, 1)])
def test_gradients(rows, width_in, width_out, dtype):
    grads(rows, width_in, width_out, dtype, "plain", ORDERS[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_a_row_doesnt_depend_on_the_others(dtype):
    w, grad = draw(1, 40, 24).to(dtype), draw(2, 140, 40).to(dtype)

    def grad_x(grad_TN: Tensor) -> Tensor:
        values = {"out": torch.zeros(len(grad_TN), 24, dtype=dtype), "grad": grad_TN, "weight": w}
        values |= {"rows": len(grad_TN), "width_in": 24, "width_out": 40}
        values |= {"dtype": DTYPES[dtype], "out_dtype": DTYPES[dtype]}
        return called("linear_grad_input", values, "plain", (FORWARD,))

    assert grad_x(grad[130:]).equal(grad_x(grad)[130:])


def test_gradients_over_no_rows():
    out = draw(1, 3, 4)
    values = {"out": out, "grad": torch.empty(0, 3), "x": torch.empty(0, 4), "width_in": 4, "width_out": 3, "dtype": 0}
    assert called("linear_grad_weight", values, "plain", (FORWARD,)).equal(out)


MUTANTS = {
    "a stage is read before all have copied it": (
        "product.cuh",
        "      __syncthreads();  // all have copied stage t, and are done with the one that is filled next\n",
        "",
    ),
    "a wait for a group too few": ("product.cuh", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
    "a line that runs into the next": ("product.cuh", "m.columns - column : 0", "m.columns - column + 1 : 0"),
    "what was there is not added to": ("linear.cu", "*out + value : value", "value"),
}
"""What stands there instead: these cases must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *MUTANTS[name])

    def verify() -> None:
        for width_in in (33, 72):
            check(5, width_in, 9, torch.bfloat16, orders=ORDERS[:3])
            grads(5, width_in, 9, torch.float32, "plain", ORDERS[:3])

    with pytest.raises(AssertionError):
        verify()


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    orders = (FORWARD, seeded(3))
    for dtype in (torch.bfloat16, torch.float32):
        check(5, 136, 70, dtype, kind=kind, orders=orders)
        check(40, 75, 33, dtype, kind=kind, orders=orders)
        grads(35, 40, 24, dtype, kind, orders)
    check(FEW_LIMIT, 40, 9, torch.float16, kind=kind, orders=orders)


def test_another_result_type_is_refused():
    x, w = draw(1, 2, 8).half(), draw(2, 3, 8).half()
    with pytest.raises(AssertionError, match=r"\[1\]"):
        linear(x, w, out=torch.bfloat16)
    values = {"out": x.bfloat16(), "grad": draw(3, 2, 3).half(), "weight": w, "rows": 2, "width_in": 8, "width_out": 3}
    with pytest.raises(AssertionError, match=r"\[1\]"):
        called("linear_grad_input", values | {"dtype": 1, "out_dtype": 2}, "plain", (FORWARD,))

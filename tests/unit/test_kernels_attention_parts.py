"""Gradients of attention over some of the keys, from out and lse over all: they add up to those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import REFERENCE, Ops
from kernels.documents import Documents
from tests.backends import BACKENDS, backend

HEADS = (0, 1, 1, 0, 0)
CUT = 25
QUERIES, KEYS, OFFSET = 40, 70, 20
WHOLE = Documents(query_bounds=(0, QUERIES), key_bounds=(0, KEYS), offsets=(OFFSET,))
"""The last ten keys are seen by nobody."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 12},
    "all": {"window": 30, "soft_cap": 2.0, "alibi_slopes": [0.1, 0.2, 0.3, 0.0, 0.5]},
}


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradients of out and lse."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(QUERIES, 5, 16), (KEYS, 2, 16), (KEYS, 2, 16), (QUERIES, 5, 16), (QUERIES, 5)]
    q, k, v, out, lse = (torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes)
    return [*(x.to(dtype) for x in (q, k, v, out)), lse.to(reference.working_dtype(dtype))]


def whole(dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """By the reference's own graph."""
    q, k, v, *grads = inputs(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = reference.attention_varlen(*leaves, WHOLE, kv_index=HEADS, scale=0.3, **options)
    return torch.autograd.grad(found, leaves, grads)


def in_parts(ops: Ops, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of the keys before `CUT` and behind it, put together."""
    q, k, v, *grads = inputs(dtype)
    options = {"kv_index": HEADS, "scale": 0.3, **options}
    with torch.no_grad():
        out, lse = ops.attention_varlen(q, k, v, WHOLE, **options)
    found = []
    for keys in (slice(0, CUT), slice(CUT, KEYS)):
        count = keys.stop - keys.start
        part = Documents(query_bounds=(0, QUERIES), key_bounds=(0, count), offsets=(OFFSET - keys.start,))
        found.append(ops.attention_varlen_backward(*grads, q, k[keys], v[keys], out, lse, part, **options))
    (q0, k0, v0), (q1, k1, v1) = found
    return q0 + q1, torch.cat((k0, k1)), torch.cat((v0, v1))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_of_the_keys_add_up(name: str) -> None:
    pairs = zip(in_parts(REFERENCE, torch.float64, OPTIONS[name]), whole(torch.float64, OPTIONS[name]), strict=True)
    assert all(relative(got, expected) < 1e-13 for got, expected in pairs)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_plain_low_precision(dtype: torch.dtype, kernels: str, name: str) -> None:
    found = in_parts(backend(kernels, dtype), dtype, OPTIONS[name])
    plain, exact = whole(dtype, OPTIONS[name]), whole(torch.float64, OPTIONS[name])
    for got, low, wanted in zip(found, plain, exact, strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) <= 2 * relative(low, wanted) + torch.finfo(dtype).eps


@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_gradient_that_is_none_is_zero(kernels: str) -> None:
    ops = backend(kernels, torch.float32)
    q, k, v, grad_out, grad_lse = inputs(torch.float32)
    options = {"kv_index": HEADS, "scale": 0.3}
    with torch.no_grad():
        out, lse = ops.attention_varlen(q, k, v, WHOLE, **options)
    rest = (q, k, v, out, lse, WHOLE)
    for none, zero in (
        ((grad_out, None), (grad_out, grad_lse * 0)),
        ((None, grad_lse), (grad_out * 0, grad_lse)),
    ):
        some = ops.attention_varlen_backward(*none, *rest, **options)
        for got, expected in zip(some, ops.attention_varlen_backward(*zero, *rest, **options), strict=True):
            assert torch.equal(got, expected)

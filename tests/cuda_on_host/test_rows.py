"""Norm, gate, rotary embedding and the writing of pages, on the host executor, against the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, mutant

SOURCE = "rows.cu"
Spec = Callable[..., Tensor]


def check(results: list[dict[str, Tensor]], name: str, dtype: torch.dtype, spec: Spec, *inputs: Tensor) -> None:
    """Every order gave the same bits, near the spec of the inputs."""
    got = results[0][name]
    assert all(r[name].equal(got) for r in results)
    plain = spec(*inputs)
    assert plain.dtype == dtype
    assert_as_plain(got, plain, spec(*(x.double() for x in inputs)))


def gated(activation: int) -> Spec:
    def gelu(gate: Tensor, up: Tensor) -> Tensor:
        work = reference.working_dtype(gate.dtype)
        return (F.gelu(gate.to(work), approximate="tanh") * up.to(work)).to(gate.dtype)

    return gelu if activation else reference.silu_gate


def norm_case(rows: int, width: int, dtype: torch.dtype, kind: str, *, residual: bool = True, shift: int = 0) -> Tensor:
    x, y, w = draw(1, rows, width).to(dtype), draw(2, rows, width).to(dtype) * 3, draw(3, width).to(dtype)
    values = {"out": torch.zeros_like(x), "x": x, "weight": w, "rows": rows, "width": width}
    values |= {"eps": 1e-5, "dtype": DTYPES[dtype]}
    if residual:
        values |= {"residual": y, "sum": torch.zeros_like(x)}
        x = x + y
    results = call(
        SOURCE, "rms_norm", values, kind=kind, orders=ORDERS if kind == "plain" else ORDERS[:3], shift={"x": shift}
    )
    check(results, "out", dtype, lambda x, w: reference.rms_norm(x, w, 1e-5), x, w)
    if residual:
        assert all(r["sum"].equal(x) for r in results)
    return results[0]["out"]


def gate_case(rows: int, width: int, dtype: torch.dtype, kind: str, activation: int) -> None:
    both = draw(1, rows, 2 * width).to(dtype) * 4
    gate, up = both[:, :width], both[:, width:]
    values = {"out": torch.zeros(rows, width, dtype=dtype), "gate": both, "up": both.flatten()[width:], "rows": rows}
    values |= {"width": width, "gate_stride": 2 * width, "up_stride": 2 * width}
    values |= {"activation": activation, "dtype": DTYPES[dtype]}
    check(call(SOURCE, "gate", values, kind=kind, orders=ORDERS[:3]), "out", dtype, gated(activation), gate, up)


def rotary_case(
    rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, kind: str, *, turn: bool = True
) -> None:
    """q, k and v side by side, as one product gives them."""
    qkv = draw(1, rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    q, k, v = (
        x.unflatten(1, (-1, head_dim))
        for x in qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    )
    angle = draw(2, rows, head_dim // 2).repeat(1, 2)
    page_size, num_pages = 4, rows // 4 + 3
    slots = torch.randperm(page_size * num_pages, generator=torch.Generator().manual_seed(3))[:rows]
    cache = torch.full((num_pages, page_size, kv_heads, head_dim), torch.nan, dtype=dtype)
    flat, stride = qkv.flatten(), qkv.shape[1]
    values = {"q_out": torch.zeros_like(q.contiguous()), "q": flat, "k": flat[heads * head_dim :]}
    values |= {"v": flat[(heads + kv_heads) * head_dim :], "slots": slots, "key_cache": cache, "value_cache": cache}
    values |= {"rows": rows, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    values |= {"q_stride": stride, "k_stride": stride, "v_stride": stride, "dtype": DTYPES[dtype]}
    if turn:
        values |= {"cos": angle.cos(), "sin": angle.sin()}
    results = call(SOURCE, "rotary", values, kind=kind, orders=ORDERS[:3])

    def spec(x: Tensor) -> Tensor:
        work = reference.working_dtype(x.dtype)
        return reference.rotary(x, angle.cos().to(work), angle.sin().to(work)) if turn else x

    if heads:
        check(results, "q_out", dtype, spec, q)
    for name, x, written in (("key_cache", k, spec), ("value_cache", v, Tensor.clone)):
        for r in results:
            stored = r[name].flatten(0, 1)
            assert_as_plain(stored[slots], written(x), written(x.double()))
            untouched = torch.ones(len(stored), dtype=torch.bool).index_fill(0, slots, False)
            assert stored[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 576, 1000, 2051])
def test_rms_norm(width, dtype):
    norm_case(5, width, dtype, "plain")
    norm_case(3, width, dtype, "plain", residual=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_a_row_doesnt_depend_on_where_it_lies(dtype):
    alone = norm_case(1, 576, dtype, "plain")
    assert norm_case(1, 576, dtype, "plain", shift=dtype.itemsize).equal(alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (4, 256), (2, 1536)])
def test_gate(rows, width, activation, dtype):
    gate_case(rows, width, dtype, "plain", activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 128), (3, 2, 40), (0, 2, 64)])
def test_rotary_and_pages(heads, kv_heads, head_dim, dtype):
    rotary_case(7, heads, kv_heads, head_dim, dtype, "plain")


def test_pages_without_rotary():
    rotary_case(6, 0, 3, 24, torch.float16, "plain", turn=False)


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    for dtype in DTYPES:
        norm_case(2, 300, dtype, kind)
    norm_case(2, 1024, torch.bfloat16, kind)
    gate_case(2, 100, torch.float16, kind, 1)
    gate_case(2, 96, torch.bfloat16, kind, 0)
    rotary_case(3, 3, 2, 40, torch.float32, kind)
    rotary_case(3, 3, 1, 64, torch.bfloat16, kind)


def test_what_no_kernel_takes_is_an_error():
    x = torch.zeros(1, 4)
    values = {"x": x, "out": x, "weight": x[0], "rows": 1, "width": 4, "dtype": 3}
    with pytest.raises(AssertionError, match=r"\(0, \[1\]"):
        call(SOURCE, "rms_norm", values, orders=[FORWARD])


MUTANTS = {
    "a row's sum isn't waited for": ("vector.cuh", "  __syncthreads();\n  float total", "  float total"),
    "odd widths run over": ("vector.cuh", "else if (i < count) p[i]", "else p[i]"),
    "the tail isn't zero": ("vector.cuh", "i + j < count ? to_float(p[i + j]) : 0.f", "to_float(p[i + j])"),
}
"""Line -> what is left of it: each loss must show somewhere in these cases, or the cases don't test it."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", mutant(tmp_path, "rows.cu", *MUTANTS[name]))
    with pytest.raises(AssertionError):
        assert [norm_case(3, width, torch.float32, "asan") for width in (300, 7)]

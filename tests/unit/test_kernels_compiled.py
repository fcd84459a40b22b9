"""The compiled CPU kernels: every instruction set this processor has, bad arguments, and life without the library."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cpu_ops, dispatch
from kernels.dispatch import REFERENCE
from kernels.invariance import cancelling_factors
from tests.backends import BACKENDS, backend, packed

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SETS = {
    "generic": (),
    "sse42": ("sse4_2",),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512bf16": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
}
"""Instruction set -> flags of /proc/cpuinfo that it needs."""

CHECK = """
import sys
import torch
from kernels import cpu_ops
from kernels.dispatch import REFERENCE, select
from kernels.invariance import check_row_invariance
from tests.backends import packed
from tests.unit.test_kernels_rows_gradients import check_gradients

assert cpu_ops.load() == sys.argv[1]
for dtype in (torch.float32, torch.bfloat16):
    ops = select(torch.device("cpu"), dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        report = check_row_invariance(ops, dtype)
        assert report.checks > 50 and not report.failures, report
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    layout = ([1, 50, 9], [200, 90, 9], [range(13), range(13, 19), [19]])
    more = dict(page_size=16, prefix_lengths=[0, 20, 3], prefix_tables=[[], [20, 21], [22]])
    q, k, v, angle = draw(0, 60, 5, 40), draw(1, 23, 16, 2, 40), draw(2, 23, 16, 2, 40), draw(3, 60, 40).float()
    x, y = draw(4, 60, 77) * 4, draw(5, 60, 77)
    cases = {
        "attention_paged": lambda o, t: o.attention_paged(
            t(q), t(k), t(v), o.paged_layout(*layout, **more), kv_index=(0, 1, 1, 0, 0), window=60, scale=0.2)[0],
        "linear": lambda o, t: o.linear(t(x), packed(o, t(y)), t(x[:, 0].contiguous())),
        "silu_gate": lambda o, t: o.silu_gate(t(x), t(y)),
        "gelu_gate": lambda o, t: o.gelu_gate(t(x), t(y)),
        "rms_norm": lambda o, t: o.rms_norm(t(x), t(y[0]), 1e-5),
        "add_rms_norm": lambda o, t: o.add_rms_norm(t(x), t(y), t(y[0]), 1e-5)[1],
        "rotary": lambda o, t: o.rotary(t(q), t(angle.cos()), t(angle.sin())),
    }
    with torch.no_grad():
        for name, case in cases.items():
            exact = case(REFERENCE, torch.Tensor.double)
            plain, got = case(REFERENCE, lambda t: t).double(), case(ops, lambda t: t).double()
            error, allowed = (got - exact).abs().max(), (plain - exact).abs().max()
            assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max(), (name, dtype, error, allowed)
    check_gradients(dtype)
print("checked")
"""


@pytest.fixture(autouse=True)
def _built() -> None:
    backend("compiled", torch.float32)  # skips where there is no library


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_is_right_and_row_invariant(name):
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    missing = [flag for flag in SETS[name] if flag not in flags]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    environment = os.environ | {"ONEMESH_CPU_ISA": name}
    command = [sys.executable, "-c", CHECK, name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr


def test_an_instruction_set_that_is_not_there_is_named():
    code = "from kernels import cpu_ops; cpu_ops.load()"
    environment = os.environ | {"ONEMESH_CPU_ISA": "avx9"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "ONEMESH_CPU_ISA=avx9 is not one of " in done.stderr


def test_nothing_but_the_chosen_kernels_uses_wide_registers():
    """Functions that an instruction set's object shares with others would be the copy that everyone runs."""
    shared = subprocess.run(["nm", "-C", str(cpu_ops.LIBRARY)], capture_output=True, text=True, check=True).stdout
    symbols = [line[17:] for line in shared.splitlines() if line[:16].strip()]
    assert any("attend_generic" in symbol for symbol in symbols)
    weak = [symbol[2:] for symbol in symbols if symbol[0] in "WVu"]
    libraries = ("std::", "c10::", "torch::", "typeinfo", "vtable", "guard variable", "void std::", "void torch::")
    ops = "Call::"  # classes of call.h and calls.h, which no kernel includes
    assert not [symbol for symbol in weak if not symbol.startswith(libraries) and ops not in symbol]


def test_without_the_library_torch_does_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_ops, "LIBRARY", tmp_path / "_cpu.so")
    assert cpu_ops.load() is None
    assert dispatch.select(CPU, torch.float32).name.startswith("torch-cpu (")


def test_a_library_that_does_not_load_says_what_to_do(monkeypatch, tmp_path):
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu_ops, "LIBRARY", broken)
    with pytest.raises(RuntimeError, match="build it again: make clean install"):
        cpu_ops.load()


SHAPES = [(576, 576), (192, 577), (50, 1), (48, 3), (1, 64), (100, 130), (47, 40), (49, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packed_linear_is_right_and_row_invariant(dtype, n, k, thread_counts):
    """Against float64; then any number of rows, anywhere, on 1 and 2 threads, bit for bit."""
    ops = backend("compiled", dtype)
    (x, w), bias = cancelling_factors(n, k, 150, dtype), torch.randn(n).to(dtype) * 1e-3
    for b in (None, bias):
        full = ops.linear(x, packed(ops, w), b)
        exact = REFERENCE.linear(x.double(), w.double(), None if b is None else b.double())
        scale = (x.double().abs() @ w.double().abs().t()).max()  # the terms cancel
        assert (full - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max() + 1e-6 * scale
        for rows in (1, 2, 3, 9, 10, 33, 127, 128, 150):
            torch.set_num_threads(1 + rows % 2)
            for start in (0, 150 - rows):
                got = ops.linear(x[start : start + rows], packed(ops, w), b)
                assert torch.equal(got, full[start : start + rows]), (rows, start)


@pytest.mark.parametrize("k", [40, 41])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_has_the_bits_of_its_definition(dtype, k):
    """One chain of fused multiply-adds with rising k; of a pair of bfloat16 the second comes first."""
    fma = ctypes.CDLL(None).fmaf
    fma.restype, fma.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    ops = backend("compiled", dtype)
    x, w = cancelling_factors(50, k, 3, dtype)
    order = range(k) if dtype == torch.float32 else [j for i in range(0, k, 2) for j in (i + 1, i) if j < k]
    rows, columns = x.float().tolist(), w.float().tolist()
    expected = torch.zeros(3, 50)
    for t, row in enumerate(rows):
        for n, column in enumerate(columns):
            total = 0.0
            for j in order:
                total = fma(column[j], row[j], total)
            expected[t, n] = total
    assert torch.equal(ops.linear(x, packed(ops, w)), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_of_a_packed_weight(dtype, n, k):
    ops, w = backend("compiled", dtype), torch.randn(n, k).to(dtype)
    ids = torch.randint(0, n, (37,))
    assert torch.equal(ops.embedding(ids, packed(ops, w)), w[ids])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "stop"), [(0, 101), (0, 7), (7, 56), (56, 101)])
def test_rows_of_a_part_of_a_table(name, dtype, first, stop):
    ops, table, ids = backend(name, dtype), torch.randn(101, 13).to(dtype), torch.randint(0, 101, (300,))
    ids[:4] = torch.tensor([first, min(stop, 100), max(first - 1, 0), stop - 1])
    is_here = (ids >= first) & (ids < stop)
    expected = table[ids] * is_here[:, None]
    part = table[first:stop].clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(ops.embedding(ids, packed(ops, part.detach()), first), expected)
    out = ops.embedding(ids, part, first)
    assert torch.equal(out, expected)
    weights = torch.randint(-3, 4, out.shape).to(dtype)
    (grad,) = torch.autograd.grad(out, part, weights)
    exact = torch.zeros(101, 13).index_add_(0, ids, weights.float())[first:stop]
    assert torch.equal(grad, exact.to(dtype))


def test_what_a_packed_weight_cannot_do_is_named():
    ops = backend("compiled", torch.float32)
    w = packed(ops, torch.zeros(50, 8))
    assert w.to(torch.float32) is w
    with pytest.raises(ValueError, match=r"packed in torch.float32 can't be used in torch.bfloat16"):
        w.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"x \(2, 9\) and w \(50, 8\) must be"):
        ops.linear(torch.zeros(2, 9), w)
    raw = torch.ops.onemesh
    for x, weight, bias, width, message in (
        (torch.zeros(2, 8).bfloat16(), w.data, None, 50, "packed has another dtype"),
        (torch.zeros(2, 9), w.data, None, 50, r"packed is not of a weight \[50, 9\]"),
        (torch.zeros(2, 8), w.data, None, 97, r"packed is not of a weight \[97, 8\]"),
        (torch.zeros(2, 8), w.data, torch.zeros(49), 50, "bias has 49 entries, not 50"),
        (torch.zeros(2, 8), w.data[0], None, 50, "packed has 3 dimensions, not 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.linears(x, [weight], [bias], [width], False, [], [], [])
    for rows, first, message in (
        (torch.zeros(3, 9), 0, "packed is not of a weight"),
        (torch.zeros(3, 8).bfloat16(), 0, "w is bfloat16, packed float32"),
        (torch.zeros(3, 8, 2)[..., 0], 0, "w has strides 16, 2; one of them must be 1"),
        (torch.zeros(3, 8), 8, "first=8 must be a multiple of 48"),
        (torch.zeros(49, 8), 48, "49 rows from 48 on don't fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.pack_rows(w.data, rows, first)
    for ids, width, message in (
        (torch.tensor([0, 50]), 50, r"ids\[1\]=50 of 50 rows"),
        (torch.tensor([-1]), 50, r"ids\[0\]=-1"),
        (torch.tensor([0]).int(), 50, "ids has the wrong dtype"),
        (torch.tensor([0]), 40, "packed is not of a weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.packed_rows(ids, w.data, width, 8)


def attend(**changes):
    """One good call of the raw op, with some arguments replaced."""
    good = {
        "q": torch.zeros(3, 2, 8),
        "key_cache": torch.zeros(4, 4, 1, 8),
        "value_cache": torch.zeros(4, 4, 1, 8),
        "chunks": torch.tensor([[0, 2, 5, 0], [2, 1, 1, 3]]),
        "block_table": torch.tensor([[0, 1], [2, -1]]),
        "prefix_table": torch.tensor([[0], [3]]),
        "kv_index": [0, 0],
        "window": 0,
        "scale": 1.0,
        "soft_cap": 0.0,
        "slopes": None,
    }
    return torch.ops.onemesh.attention_paged(*(good | changes).values())


BAD = {
    "q: dtype": ({"q": torch.zeros(3, 2, 8).double()}, "q must be float32 or bfloat16"),
    "q: dimensions": ({"q": torch.zeros(3, 16)}, "q has 2 dimensions, not 3"),
    "q: strides": ({"q": torch.zeros(2, 3, 8).transpose(0, 1)}, "q is not contiguous"),
    "q: rows": ({"q": torch.zeros(4, 2, 8)}, "chunks hold 3 queries, q 4"),
    "key_cache: dtype": ({"key_cache": torch.zeros(4, 4, 1, 8).bfloat16()}, "key_cache has another dtype"),
    "value_cache: shape": ({"value_cache": torch.zeros(3, 4, 1, 8)}, "key_cache and value_cache differ in shape"),
    "head dim": ({"q": torch.zeros(3, 2, 16)}, "q has head dim 16, key_cache 8"),
    "q: odd head dim": (
        {"q": torch.zeros(3, 2, 7)} | dict.fromkeys(("key_cache", "value_cache"), torch.zeros(4, 4, 1, 7)),
        "q has an odd head dim 7",
    ),
    "no slots": ({"key_cache": torch.zeros(4, 0, 1, 8), "value_cache": torch.zeros(4, 0, 1, 8)}, "without slots"),
    "kv_index: value": ({"kv_index": [0, 1]}, r"kv_index\[1\]=1 of 1 kv heads"),
    "kv_index: length": ({"kv_index": [0]}, "kv_index has not one entry per head"),
    "block_table: page": ({"block_table": torch.tensor([[0, 4], [2, 0]])}, "block_table of chunk 0 names page 4 of 4"),
    "block_table: negative": ({"block_table": torch.tensor([[0, 1], [-1, 0]])}, "block_table of chunk 1 names page -1"),
    "block_table: narrow": ({"block_table": torch.tensor([[0], [2]])}, "block_table has too few pages for chunk 0"),
    "block_table: rows": ({"block_table": torch.tensor([[0, 1]])}, "block_table has not one row per chunk"),
    "block_table: dtype": ({"block_table": torch.zeros(2, 2).int()}, "block_table has the wrong dtype"),
    "prefix_table: page": ({"prefix_table": torch.tensor([[0], [9]])}, "prefix_table of chunk 1 names page 9 of 4"),
    "chunks: gap": ({"chunks": torch.tensor([[0, 2, 5, 0], [3, 1, 1, 3]])}, "chunk 1 is inconsistent"),
    "chunks: more queries than keys": ({"chunks": torch.tensor([[0, 2, 1, 0], [2, 1, 1, 3]])}, "chunk 0 is inconsist"),
    "chunks: width": ({"chunks": torch.zeros(2, 3).long()}, r"chunks must be \[B, 4\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, message = BAD[case]
    attend()
    with pytest.raises(RuntimeError, match=message):
        attend(**changes)


def test_a_window_and_gradients_that_make_no_sense_are_refused():
    ops = backend("compiled", torch.float32)
    layout, cache = ops.paged_layout([1], [3], [[1]], page_size=4), torch.zeros(2, 4, 1, 8)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        ops.attention_paged(torch.zeros(1, 2, 8), cache, cache, layout, window=0, scale=1.0)
    with pytest.raises(ValueError, match="attention_paged has no gradients"):
        ops.attention_paged(torch.zeros(1, 2, 8, requires_grad=True), cache, cache, layout, scale=1.0)


@pytest.mark.parametrize("bad", [0, 70, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_never_swallowed(dtype, bad):
    """A broken key, value or query shows in every query that sees it, and in no other one."""
    ops = backend("compiled", dtype)
    for where in ("q", "key", "value"):
        q, key, value = torch.randn(100, 3, 8), torch.randn(7, 16, 1, 8), torch.randn(7, 16, 1, 8)
        {"q": q, "key": key.view(112, 1, 8), "value": value.view(112, 1, 8)}[where][bad] = torch.nan
        for first in range(0, 100, 10):  # in chunks that end before or behind it
            layout = ops.paged_layout([10], [first + 10], [range(7)], page_size=16)
            out, lse = ops.attention_paged(
                q[first : first + 10].to(dtype), key.to(dtype), value.to(dtype), layout, scale=0.3
            )
            sees = [t == bad if where == "q" else t >= bad for t in range(first, first + 10)]
            got = out.isnan().flatten(1).any(1).tolist()
            if where != "value":
                assert got == sees
                assert lse.isnan().any(1).tolist() == sees
            else:  # queries computed together may show it too
                assert all(g for g, s in zip(got, sees, strict=True) if s)
                assert not lse.isnan().any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_rows(shape):
    ops, x = backend("compiled", torch.float32), torch.zeros(shape)
    assert torch.equal(ops.linear(x, packed(ops, torch.ones(5, shape[1]))), torch.zeros(shape[0], 5))
    assert ops.linear(x, packed(ops, torch.ones(0, shape[1]))).shape == (shape[0], 0)
    assert ops.silu_gate(x, x).shape == shape
    assert ops.rms_norm(x, torch.ones(shape[1]), 1e-5).shape == shape


def test_extremes_of_the_gate():
    """Far out the gate is 0 or the identity; NaN and infinities go where arithmetic sends them."""
    gate = torch.tensor([[0.0, -0.0, 200.0, -200.0, 1e30, -1e30, torch.nan, torch.inf, -88.0, 88.9, 1e-30]])
    ops = backend("compiled", torch.float32)
    got, expected = ops.silu_gate(gate, torch.ones_like(gate)), REFERENCE.silu_gate(gate, torch.ones_like(gate))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-36, equal_nan=True)

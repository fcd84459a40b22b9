"""Linears with low-rank updates and all gradients, against float64 and against their definition, on both CPU backends."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from kernels import cpu_linear
from kernels.dispatch import REFERENCE
from kernels.ops import LowRank, Part
from tests.backends import BACKENDS, backend, packed

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int) -> Tensor:
    """Values that bfloat16 holds exactly, in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def inputs(rows: int, n: int, k: int, bounds: list[tuple[int, int]], rank: int = 5) -> dict[str, Tensor]:
    """x, w, bias and the factors of an update for each pair of bounds."""
    found = {"x": draw(rows, k, seed=1), "w": draw(n, k, seed=2), "bias": draw(n, seed=3)}
    for i in range(len(bounds)):
        found |= {f"a{i}": draw(rank + i, k, seed=4 + i), f"b{i}": draw(n, rank + i, seed=9 + i)}
    return found


def run(ops, values: dict[str, Tensor], bounds: list[tuple[int, int]], dtype, *, wide=False, frozen=()):
    """Output, and the gradient of a weighted sum in every value that isn't frozen; masters stay in float32."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        k: v.to(dtype if k in ("x", "bias") else master).requires_grad_(k not in frozen) for k, v in values.items()
    }
    used = {k: packed(ops, v.detach().to(dtype)) if k in frozen else v for k, v in leaves.items()}
    updates = [
        LowRank(start=start, stop=stop, a_RK=used[f"a{i}"], b_NR=used[f"b{i}"])
        for i, (start, stop) in enumerate(bounds)
    ]
    out = ops.linear(used["x"], used["w"], used["bias"], updates, wide=wide)
    weights = draw(*out.shape, seed=20).to(out.dtype)
    wanted = [v for k, v in leaves.items() if k not in frozen]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [(), ("w", "a0", "b0", "a1", "b1")])
@pytest.mark.parametrize(
    ("rows", "n", "k", "bounds"),
    [
        (7, 50, 40, []),
        (150, 97, 41, [(0, 150)]),
        (33, 16, 64, [(3, 4), (10, 33)]),
        (1, 1, 1, [(0, 1)]),
        (300, 130, 7, [(0, 0), (200, 280)]),
    ],
)
def test_values_and_gradients(name, dtype, frozen, rows, n, k, bounds):
    """At most twice the error of the reference in the same dtype, plus a rounding."""
    ops = backend(name, dtype)
    values = inputs(rows, n, k, bounds)
    frozen = tuple(key for key in frozen if key in values)
    exact = run(REFERENCE, values, bounds, torch.float64, frozen=frozen)
    plain = run(REFERENCE, values, bounds, dtype, frozen=frozen)
    for got, low, wanted in zip(run(ops, values, bounds, dtype, frozen=frozen), plain, exact, strict=True):
        assert got.dtype == low.dtype
        assert relative(got, wanted) <= 2 * relative(low, wanted) + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_results_and_gradients(name, dtype):
    ops, values = backend(name, dtype), inputs(20, 50, 40, [(5, 11)])
    exact = run(REFERENCE, values, [(5, 11)], torch.float64)
    got = run(ops, values, [(5, 11)], dtype, wide=True)
    assert got[0].dtype == torch.float32
    for one, wanted in zip(got, exact, strict=True):
        assert relative(one, wanted) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_updates_are_independent_of_their_company(dtype, thread_counts):
    """Each segment alone, and every row of it alone, has the bits it has in the batch."""
    ops, bounds = backend("compiled", dtype), [(2, 3), (3, 20), (40, 75)]
    values = inputs(200, 130, 77, bounds)
    x, bias = values["x"].to(dtype), values["bias"].to(dtype)
    w, *factors = (packed(ops, values[key].to(dtype)) for key in ("w", "a0", "b0", "a1", "b1", "a2", "b2"))
    pairs = list(zip(factors[::2], factors[1::2], strict=True))

    def result(first: int, last: int) -> Tensor:
        updates = [
            LowRank(start=max(start, first) - first, stop=min(stop, last) - first, a_RK=a, b_NR=b)
            for (start, stop), (a, b) in zip(bounds, pairs, strict=True)
            if max(start, first) < min(stop, last)
        ]
        return ops.linear(x[first:last], w, bias, updates)

    full = result(0, 200)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for first, last in [
            (0, 2),
            (2, 3),
            (3, 20),
            (10, 60),
            (70, 200),
            (74, 75),
            (75, 76),
            *((i, i + 1) for i in range(15)),
        ]:
            assert torch.equal(result(first, last), full[first:last]), (first, last)
    plain = ops.linear(x, w, bias)
    assert torch.equal(full[75:], plain[75:])
    assert not torch.equal(full[3:20], plain[3:20])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_goes_on_in_the_chain_of_its_row(dtype):
    """The bits of the definition: fused multiply-adds along K, then along the rank."""
    fma = ctypes.CDLL(None).fmaf
    fma.restype, fma.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    ops, values = backend("compiled", dtype), inputs(2, 50, 9, [(1, 2)], rank=3)
    x, w, a, b = (values[key].to(dtype) for key in ("x", "w", "a0", "b0"))
    got = ops.linear(x, w, None, [LowRank(start=1, stop=2, a_RK=a, b_NR=b)], wide=True)
    hidden = ops.linear(x[1:], a)

    def chain(total: float, left: Tensor, right: Tensor) -> float:
        pairs = list(zip(left.tolist(), right.tolist(), strict=True))
        if dtype == torch.bfloat16:  # of a pair the second comes first
            pairs = [pair for i in range(0, len(pairs), 2) for pair in reversed(pairs[i : i + 2])]
        for one, other in pairs:
            total = fma(other, one, total)
        return total

    for n in range(50):
        assert got[0, n] == chain(0.0, x[0], w[n])
        assert got[1, n] == chain(chain(0.0, x[1], w[n]), hidden[0], b[n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 37, 5001])
def test_weight_gradients_go_on_from_what_is_there(dtype, rows, thread_counts):
    """Rows in one call or in two: the same chain, the same bits; right against float64; on any number of threads."""
    ops = backend("compiled", dtype)
    grad, x = draw(rows, 50, seed=1).to(dtype), draw(rows, 41, seed=2).to(dtype)
    start = draw(50, 41, seed=3).float()
    torch.set_num_threads(1)
    once = start.clone()
    ops.add_weight_gradient(once, grad, x)
    exact = start.double() + grad.double().t() @ x.double()
    assert relative(once, exact) < 1e-6
    torch.set_num_threads(2)
    twice, half = start.clone(), rows // 2 // 2 * 2  # a pair of bfloat16 stays together
    ops.add_weight_gradient(twice, grad[:half], x[:half])
    ops.add_weight_gradient(twice, grad[half:], x[half:])
    assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_wide_weight_is_that_of_its_parts(dtype):
    """It is computed some rows at a time (2016 of bfloat16, 1008 of float32), of some tokens at a time (2048)."""
    ops = backend("compiled", dtype)
    grad, x = draw(2101, 4100, seed=1).to(dtype), draw(2101, 5, seed=2).to(dtype)
    found, parts = draw(4100, 5, seed=3).float(), draw(4100, 5, seed=3).float()
    ops.add_weight_gradient(found, grad, x)
    for first in range(0, 4100, 500):
        ops.add_weight_gradient(parts[first : first + 500], grad[:, first : first + 500], x)
    assert torch.equal(found, parts)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(50,), (48, 7, 96), (5, 9, 3, 1, 20)])
def test_several_linears_of_one_x_are_each_one(name, dtype, widths):
    """Bits of the outputs; gradients of weights and updates too, that of x within a rounding of each part's."""
    ops = backend(name, dtype)
    x = draw(30, 17, seed=1).to(dtype).requires_grad_()
    parts = []
    for i, width in enumerate(widths):
        w, bias = (
            draw(width, 17, seed=2 + i).float().requires_grad_(),
            draw(width, seed=30 + i).to(dtype).requires_grad_(),
        )
        a, b = draw(3, 17, seed=50 + i).float().requires_grad_(), draw(width, 3, seed=70 + i).float().requires_grad_()
        # some parts have an update, on other rows than their neighbours
        parts.append(Part(w, bias if i % 2 else None, [LowRank(start=i, stop=20 + i, a_RK=a, b_NR=b)][: i % 3]))
    leaves = [t for p in parts for t in (p.w_NK, p.bias_N, *(f for u in p.updates for f in (u.a_RK, u.b_NR)))]
    leaves = [t for t in leaves if t is not None]
    weights = [draw(30, width, seed=90 + i).to(dtype) for i, width in enumerate(widths)]

    def grads(outs):
        return torch.autograd.grad(sum((out * w).sum() for out, w in zip(outs, weights, strict=True)), [x, *leaves])

    grouped = ops.linears(x, parts)
    single = [ops.linear(x, p.w_NK, p.bias_N, p.updates) for p in parts]
    for one, other in zip(grouped, single, strict=True):
        assert torch.equal(one, other)
    (grad_x, *found), (wanted_x, *wanted) = grads(grouped), grads(single)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert relative(grad_x, wanted_x) <= len(widths) * torch.finfo(dtype).eps


def test_a_part_that_nobody_used_has_no_gradient():
    ops = backend("compiled", torch.float32)
    x = draw(4, 5, seed=1).float().requires_grad_()
    w = [draw(n, 5, seed=n).float().requires_grad_() for n in (3, 6)]
    first, _ = ops.linears(x, [Part(w[0]), Part(w[1])])
    grad_x, grad_w, none = torch.autograd.grad(first.sum(), [x, *w], allow_unused=True)
    assert none is None
    assert torch.equal(grad_x, w[0].detach().sum(0).expand(4, -1).contiguous())
    assert grad_w.shape == w[0].shape


def test_rows_may_be_parts_of_wider_ones():
    """Column slices go in as they are: q, k and v of one product."""
    ops = backend("compiled", torch.bfloat16)
    wide, w = draw(40, 100, seed=1).bfloat16(), draw(50, 30, seed=2).bfloat16()
    part = wide[:, 37:67]
    assert torch.equal(ops.linear(part, w), ops.linear(part.contiguous(), w))
    turned = draw(30, 40, seed=3).bfloat16().t()
    assert torch.equal(ops.linear(turned, w), ops.linear(turned.contiguous(), w))
    out, same = torch.zeros(50, 30), torch.zeros(50, 30)
    grad = draw(40, 70, seed=4).bfloat16()[:, 11:61]
    ops.add_weight_gradient(out, grad, part)
    ops.add_weight_gradient(same, grad.contiguous(), part.contiguous())
    assert torch.equal(out, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (50, 41), (97, 64), (48, 3), (3, 48), (144, 145)])
def test_the_transpose_of_a_packed_weight(monkeypatch, dtype, n, k):
    ops, w = backend("compiled", dtype), draw(n, k, seed=1).to(dtype)
    one = packed(ops, w)
    grad = draw(13, n, seed=2).to(dtype)
    assert torch.equal(ops.input_gradient(grad, one), ops.input_gradient(grad, w))
    monkeypatch.setattr(cpu_linear, "_TURNED_BYTES", 1)  # a panel at a time
    assert torch.equal(ops.input_gradient(grad, one), ops.input_gradient(grad, w))
    turned = one.transposed()
    assert torch.equal(ops.embedding(torch.arange(k), turned), w.t())
    assert torch.equal(turned.data.view(torch.uint8), packed(ops, w.t()).data.view(torch.uint8))  # and zeros past it


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_what_does_not_fit_is_named(name):
    ops = REFERENCE if name == "reference" else backend(name, torch.float32)
    x, w = torch.zeros(4, 8), torch.zeros(50, 8)
    a, b = torch.zeros(3, 8), torch.zeros(50, 3)
    for arguments, message in (
        ((x, torch.zeros(50, 9)), r"x \(4, 8\) and w \(50, 9\) must be \[T, K\] and \[N, K\]"),
        ((x[0], w), r"x \(8,\) and w \(50, 8\)"),
        ((x.bfloat16(), w.double()), "w is torch.float64; w must have that dtype or be its master"),
        ((x, w, torch.zeros(49)), r"bias \(49,\) in torch.float32 must be \[50\] in torch.float32"),
        ((x, w, torch.zeros(50).bfloat16()), r"bias \(50,\) in torch.bfloat16"),
        ((x, w, None, [LowRank(start=3, stop=5, a_RK=a, b_NR=b)]), r"update of rows 3 .. 5 must lie in 0 .. 4"),
        ((x, w, None, [LowRank(start=0, stop=2, a_RK=b, b_NR=a)]), r"factors a \(50, 3\) and b \(3, 8\) must be"),
        (
            (x, w, None, [LowRank(start=1, stop=3, a_RK=a, b_NR=b), LowRank(start=2, stop=4, a_RK=a, b_NR=b)]),
            r"update of rows 2 .. 4 must lie in 3 .. 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear(*arguments)


def test_raw_ops_name_what_is_wrong():
    """The C++ checks behind the Python ones: a wrong call raises, it never crashes."""
    backend("compiled", torch.float32)
    raw = torch.ops.onemesh
    x, h = torch.zeros(4, 8), torch.zeros(2, 3)
    w, b = raw.empty_packed(x, 50, 8), raw.empty_packed(x, 50, 3)
    for arguments, message in (
        (([h], [b], [0, 3, 5]), "update 0 of rows 3, 5 must rise within 4 rows"),
        (([h], [b], [0, 2, 1]), "update 0 of rows 2, 1"),
        (([h], [b], [1, 0, 2]), "update 0 is of part 1 of 1"),
        (([h, h], [b, b], [0, 0, 2, 0, 1, 3]), "update 1 overlaps another of part 0"),
        (([h], [b], [0, 0, 3]), r"h\[0\] has 2 rows, not 3"),
        (([h], [b], [0]), "1 h, 1 b and 1 numbers of updates"),
        (([h.bfloat16()], [b], [0, 0, 2]), "h has another dtype"),
        (([h], [w], [0, 0, 2]), r"b is not of a weight \[50, 3\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.linears(x, [w], [None], [50], False, *arguments)
    with pytest.raises(RuntimeError, match="2 packed, 1 bias and 2 widths"):
        raw.linears(x, [w, w], [None], [50, 50], False, [], [], [])
    for xs, ws, message in (
        ([x] * 5, [w] * 5, "5 x and 5 packed; one to 4 of each"),
        ([x], [w, w], "1 x and 2 packed"),
        ([x, x[:3]], [w, w], r"x\[1\] has 3 rows, x\[0\] 4"),
        ([x, x.bfloat16()], [w, w], "x has another dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.sum_of_products(xs, ws, 50, False)
    for out, grad, other, message in (
        (torch.zeros(5, 8), torch.zeros(4, 5), torch.zeros(3, 8), "x has 3 rows, grad 4"),
        (torch.zeros(5, 7), torch.zeros(4, 5), x, r"out must be \[5, 8\]"),
        (torch.zeros(5, 8).bfloat16(), torch.zeros(4, 5), x, "out has the wrong dtype"),
        (torch.zeros(5, 8), torch.zeros(4, 5).bfloat16(), x, "x has another dtype"),
        (torch.zeros(5, 8), torch.zeros(5, 4).t(), x, "grad's rows are not contiguous"),
        (torch.zeros(5, 8), torch.zeros(4, 5), torch.zeros(4, 8, 1), "x has 3 dimensions, not 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.weight_gradient(out, grad, other, True)
    with pytest.raises(RuntimeError, match="turn: packed is not of a weight"):
        raw.turn(w, 50, 9, 0, 1)
    for first, last in ((-1, 1), (1, 0), (0, 2)):
        with pytest.raises(RuntimeError, match=f"turn: panels {first} .. {last} must rise within 1"):
            raw.turn(w, 50, 8, first, last)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (3, 200), (5, 1003)])
def test_softmax_of_the_loss(name, dtype, rows, width):
    ops = backend(name, dtype)
    logits = 20 * draw(rows, width, seed=1).float()
    logits[:1, : width // 2] = -torch.inf
    target = torch.arange(rows) % (width + 1) - 1
    lse = ops.log_sum_exp(logits)
    exact = REFERENCE.log_sum_exp(logits.double())
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)
    shifted = lse + 0.5  # as if other columns were elsewhere
    got = ops.loss_gradient(logits.clone(), shifted, target, dtype)
    wanted = REFERENCE.loss_gradient(logits.double(), shifted.double(), target, torch.float64)
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() <= torch.finfo(dtype).eps if rows else len(got) == 0


def test_softmax_of_the_loss_names_what_is_wrong():
    backend("compiled", torch.float32)
    raw, logits, lse = torch.ops.onemesh, torch.zeros(2, 5), torch.zeros(2)
    for arguments, message in (
        ((logits, lse, torch.tensor([0, 5])), r"target\[1\]=5 of 5 columns"),
        ((logits, lse, torch.tensor([-2, 0])), r"target\[0\]=-2"),
        ((logits, lse[:1], torch.tensor([0, 0])), "lse and target must have 2 entries"),
        ((logits.double(), lse, torch.tensor([0, 0])), "logits has the wrong dtype"),
        ((logits, lse, torch.tensor([0, 0]).int()), "target has the wrong dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.loss_gradient(*arguments, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_linear_does_not_keep_its_input(dtype):
    """It takes no part in the gradient of x; with a prefix it would be a quarter of what a layer keeps."""
    ops = backend("compiled", dtype)
    x, w = draw(5, 8, seed=1).to(dtype).requires_grad_(), draw(12, 8, seed=2)
    for weight, expected in ((packed(ops, w.to(dtype)), []), (w.float().requires_grad_(), [x.data_ptr()])):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t):
            out = ops.linear(x, weight)
        assert [p for p in kept if p == x.data_ptr()] == expected
        assert torch.autograd.grad(out.float().sum(), x)[0].isfinite().all()

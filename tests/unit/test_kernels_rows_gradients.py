"""Gradients of norms, gates, rotary embedding and embedding: against finite differences, float64 and any threads."""

import pytest
import torch

from kernels import autograd_rows, reference
from kernels.dispatch import REFERENCE
from kernels.ops import Ops
from tests.backends import BACKENDS, backend

TOKENS, WIDTH = 83, 77  # more rows than a block of the norm's, a width that fills no vector
CALLS = {
    "rms_norm": ((TOKENS, WIDTH), (WIDTH,)),
    "add_rms_norm": ((TOKENS, WIDTH), (TOKENS, WIDTH), (WIDTH,)),
    "silu_gate": ((TOKENS, WIDTH), (TOKENS, WIDTH)),
    "gelu_gate": ((TOKENS, WIDTH), (TOKENS, WIDTH)),
    "rotary": ((TOKENS, 3, 22),),
    "embedding": ((19, WIDTH),),
}
"""Op -> shapes of what it differentiates."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [draw(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def angles(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = draw(tokens, head_dim // 2, seed=3)
    angle = torch.cat((half, half), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def call(ops: Ops, name: str, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The op's outputs; ids repeat, one far more often than the others, and some are missing."""
    work = reference.working_dtype(inputs[0].dtype)
    if name == "embedding":
        ids = torch.tensor([t * t % 17 if t % 3 else 5 for t in range(TOKENS)])
        return (ops.embedding(ids, *inputs),)
    rest = {"rms_norm": (1e-5,), "add_rms_norm": (1e-5,), "rotary": angles(TOKENS, 22, work)}.get(name, ())
    out = getattr(ops, name)(*inputs, *rest)
    return out if isinstance(out, tuple) else (out,)


def run(ops: Ops, name: str, dtype: torch.dtype, wanted: slice = slice(None)) -> list[torch.Tensor]:
    """Outputs and the gradients of the wanted inputs, all numbers exact in bfloat16."""
    inputs = [t.to(torch.bfloat16).to(dtype).detach().requires_grad_() for t in leaves(*CALLS[name])]
    outs = call(ops, name, inputs)
    loss = sum((out * draw(*out.shape, seed=9 + i).to(torch.bfloat16).to(dtype)).sum() for i, out in enumerate(outs))
    return [*outs, *torch.autograd.grad(loss, inputs[wanted])]


def check_gradients(dtype: torch.dtype) -> None:
    """Of the compiled backend: at most twice the error of the reference in this dtype, plus one unit of rounding."""
    ops = backend("compiled", dtype)
    for name in CALLS:
        check(ops, name, dtype)


def check(ops: Ops, name: str, dtype: torch.dtype) -> None:
    exact, plain = run(REFERENCE, name, torch.float64), run(REFERENCE, name, dtype)
    for i, (got, low, wanted) in enumerate(zip(run(ops, name, dtype), plain, exact, strict=True)):
        assert got.dtype == dtype
        error, allowed = (got.double() - wanted).norm(), (low.double() - wanted).norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * wanted.norm(), (name, i, error, allowed)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_plain_low_precision(name, kernels, dtype):
    check(backend(kernels, dtype), name, dtype)


def test_gradcheck_of_the_pairs_of_torch():
    rows = autograd_rows
    norm = reference.rms_norm, rows.rms_norm_backward
    assert torch.autograd.gradcheck(lambda x, w: rows.RmsNorm.apply(x, w, 1e-5, *norm), leaves((5, 6), (6,)))
    norm = reference.add_rms_norm, rows.rms_norm_backward
    inputs = leaves((5, 6), (5, 6), (6,))
    assert torch.autograd.gradcheck(lambda x, d, w: rows.AddRmsNorm.apply(x, d, w, 1e-5, *norm), inputs)
    assert torch.autograd.gradcheck(
        lambda x, d, w: rows.AddRmsNorm.apply(x, d, w, 1e-5, *norm)[0], [*inputs[:2], inputs[2].detach()]
    )
    for gate in (rows.SILU, rows.GELU):
        assert torch.autograd.gradcheck(
            lambda g, u, gate=gate: rows.Gated.apply(g, u, gate.forward, gate.backward), leaves((5, 6), (5, 6))
        )
    turned = angles(5, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rows.Rotary.apply(x, *turned, rows.rotary), leaves((5, 2, 6)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_same_bits_for_any_number_of_threads(name, dtype, thread_counts, monkeypatch):
    monkeypatch.setitem(CALLS, "rms_norm", ((2000, 300), (300,)))  # large enough to be shared
    monkeypatch.setitem(CALLS, "add_rms_norm", ((2000, 300), (2000, 300), (300,)))
    ops = backend("compiled", dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(ops, name, dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_only_what_is_trained_gets_a_gradient(kernels):
    ops = backend(kernels, torch.float32)
    x, delta, w = (t.detach() for t in leaves((5, 8), (5, 8), (8,), dtype=torch.float32))
    assert not ops.add_rms_norm(x, delta, w, 1e-5)[1].requires_grad
    total, normed = ops.add_rms_norm(x, delta.requires_grad_(), w, 1e-5)
    alone = torch.autograd.grad(total.sum(), delta, retain_graph=True)[0]  # the norm took no part
    assert torch.equal(alone, torch.ones_like(x))
    (through,) = torch.autograd.grad(normed.square().sum(), delta)
    assert through.shape == x.shape and w.grad is None
    (grad_w,) = torch.autograd.grad(ops.rms_norm(x, w.requires_grad_(), 1e-5).sum(), w)
    assert grad_w.shape == w.shape


def test_gradients_arrive_in_any_strides():
    """A sum hands back an expanded gradient, a transposition one with swapped strides."""
    ops = backend("compiled", torch.float32)
    for name, shapes in CALLS.items():
        inputs = leaves(*shapes, dtype=torch.float32)
        (out, *_) = call(ops, name, inputs)[::-1]
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs, retain_graph=True))
        weight = draw(*out.shape[::-1], seed=4, dtype=torch.float32)
        swapped = torch.autograd.grad((out.permute(*range(out.dim())[::-1]) * weight).sum(), inputs, retain_graph=True)
        plain = torch.autograd.grad(out, inputs, weight.permute(*range(out.dim())[::-1]).contiguous())
        assert all(torch.equal(a, b) for a, b in zip(swapped, plain, strict=True)), name


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_gradients_of_nothing(shape):
    ops = backend("compiled", torch.float32)
    x, delta, w = leaves(shape, shape, shape[1:], dtype=torch.float32)
    ops.add_rms_norm(x, delta, w, 1e-5)[1].sum().backward()
    assert (x.grad.shape, w.grad.shape) == (shape, shape[1:])
    assert not w.grad.any()
    gate, up = leaves(shape, shape, dtype=torch.float32)
    ops.silu_gate(gate, up).sum().backward()
    assert gate.grad.shape == up.grad.shape == shape
    (table,) = leaves((4, shape[1]), dtype=torch.float32)
    ops.embedding(torch.zeros(shape[0], dtype=torch.int64), table).sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))

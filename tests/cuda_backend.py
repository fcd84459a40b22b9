"""The CUDA backend as a whole, from Python over the registered ops to the kernels, on the host executor.

    python -m tests.cuda_backend LIBRARY CHECK

runs one check in a process of its own: a mistake in a kernel ends it. `tests/cuda_on_host/test_backend.py` builds the
library, the ops and sources compiled by g++, whose ops take tensors on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from kernels.dispatch import CUDA, REFERENCE
from kernels.ops import LowRank, Ops, Part
from kernels.reference import working_dtype
from parallel.comm import Group
from parallel.loss import cross_entropy
from parallel.mesh import Mesh
from parallel.model.attend import DocumentAttend
from parallel.model.load import build_decoder
from parallel.model.step import Step
from tests import cuda_arguments, cuda_attention, cuda_draws
from tests.cuda_compare import Tensors, compare, exactly
from tests.cuda_host import DTYPES, assert_as_plain, draw
from tests.models import TINY, RandomWeights

# Rows


def check_rows() -> None:
    """Norms, gates, rotary embedding, pages: values, gradients, empty inputs."""
    inputs = exactly({"x": draw(4, 60, 77) * 4, "y": draw(5, 60, 77), "w": draw(6, 77)})
    q, angle = {"q": exactly({"q": draw(0, 60, 5, 64)})["q"]}, draw(3, 60, 32).repeat(1, 2)

    def pages(ops: Ops, t: Tensors) -> Sequence[Tensor]:
        keys, values = torch.zeros(2, 4, 16, 5, 64, dtype=t["q"].dtype)
        slots = torch.randperm(64, generator=torch.Generator().manual_seed(8))[:60]
        ops.write_pages(keys, values, t["q"], t["q"] * 2, slots)
        return keys, values

    def rotated(ops: Ops, t: Tensors) -> Sequence[Tensor]:
        work = working_dtype(t["q"].dtype)
        return (ops.rotary(t["q"], angle.cos().to(work), angle.sin().to(work)),)

    def layer(ops: Ops, t: Tensors) -> Sequence[Tensor]:
        total, normed = ops.add_rms_norm(ops.rms_norm(t["x"], t["w"], 1e-5), t["y"], t["w"], 1e-5)
        return (ops.silu_gate(normed, ops.gelu_gate(total, t["x"])),)

    for dtype in DTYPES:
        compare(lambda o, t: (o.rms_norm(t["x"], t["w"], 1e-5),), inputs, dtype)
        compare(lambda o, t: (o.silu_gate(t["x"], t["y"]), o.gelu_gate(t["x"], t["y"])), inputs, dtype)
        compare(layer, inputs, dtype, grad=True)
        compare(rotated, q, dtype)
        compare(rotated, q, dtype, grad=True)
        compare(pages, q, dtype)
        _check_fused_rows(inputs["x"].to(dtype), inputs["y"].to(dtype), q["q"].to(dtype), angle)


@torch.no_grad()
def _check_fused_rows(a: Tensor, b: Tensor, rows: Tensor, angle: Tensor) -> None:
    """Bit for bit what the single ops give; no rows and no columns."""
    dtype, w = a.dtype, b[0]
    total, out = CUDA.add_rms_norm(a, b, w, 1e-5)
    assert total.equal(a + b) and out.equal(CUDA.rms_norm(a + b, w, 1e-5))
    cos, sin, slots = angle.cos(), angle.sin(), torch.arange(60).flip(0)
    keys, values = torch.zeros(2, 4, 16, 5, 64, dtype=dtype)
    turned = CUDA.rotary_write(rows, rows * 2, rows * 3, cos, sin, keys, values, slots)
    assert turned.equal(CUDA.rotary(rows, cos, sin)) and values.flatten(0, 1)[slots].equal(rows * 3)
    assert keys.flatten(0, 1)[slots].equal(CUDA.rotary(rows * 2, cos, sin))
    for none in (torch.zeros(0, 8, dtype=dtype), torch.zeros(3, 0, dtype=dtype)):
        assert CUDA.silu_gate(none, none).shape == none.shape
        assert CUDA.rms_norm(none, none.new_zeros(none.shape[1]), 1e-5).shape == none.shape
    assert CUDA.rotary(rows[:0], cos[:0], sin[:0]).shape == (0, 5, 64)
    layout = CUDA.paged_layout([], [], [], page_size=16)
    out, lse = CUDA.attention_paged(rows[:0], keys, values, layout, scale=1.0)
    assert out.shape == (0, 5, 64) and lse.shape == (0, 5)


def check_embedding() -> None:
    """Rows and their gradient, in which an id stands often; a row's gradient doesn't depend on other ids."""
    ids = torch.randint(0, 40, (90,), generator=torch.Generator().manual_seed(2))
    ids[::3] = 7
    for width in (64, 37, 1100):
        inputs = exactly({"w": draw(1, 50, width)})
        for dtype in DTYPES:
            compare(lambda o, t: (o.embedding(ids, t["w"]), o.embedding(ids.int(), t["w"])), inputs, dtype)
            compare(lambda o, t: (o.embedding(ids, t["w"]),), inputs, dtype, grad=True)
            compare(lambda o, t: (o.embedding(ids + 80, t["w"], 85),), inputs, dtype, grad=True)  # a part of a table
    w, grad = draw(1, 50, 37).requires_grad_(), draw(2, 90, 37)
    (whole,) = torch.autograd.grad(CUDA.embedding(ids, w), w, grad)
    (alone,) = torch.autograd.grad(CUDA.embedding(ids[ids == 7], w), w, grad[ids == 7])
    assert whole[7].equal(alone[7]) and whole[40:].equal(torch.zeros(10, 37))
    assert CUDA.embedding(ids[:0], w).shape == (0, 37)
    outside = torch.tensor([3, -1, 50, 1 << 40])
    out = CUDA.embedding(outside, w)
    assert out[0].equal(w[3]) and out[1:].isnan().all()
    (only,) = torch.autograd.grad(out[:1].sum(), w)
    assert only[3].equal(torch.ones(37)) and only.count_nonzero() == 37


# Linears


def _linear_inputs(rows: int, n: int, k: int, ranks: Sequence[int]) -> Tensors:
    found = {"x": draw(1, rows, k), "w": draw(2, n, k), "bias": draw(3, n)}
    for i, rank in enumerate(ranks):
        found |= {f"a{i}": draw(4 + i, rank, k), f"b{i}": draw(9 + i, n, rank)}
    return exactly(found)


def _updates(t: Tensors, bounds: Sequence[tuple[int, int]]) -> list[LowRank]:
    return [
        LowRank(start=start, stop=stop, a_RK=t[f"a{i}"], b_NR=t[f"b{i}"], x_TK=t.get(f"x{i}"))
        for i, (start, stop) in enumerate(bounds)
    ]


LINEARS: Sequence[tuple[int, int, int, Sequence[tuple[int, int]]]] = (
    (7, 50, 40, []),
    (70, 97, 41, [(0, 70)]),
    (33, 16, 64, [(3, 4), (10, 33)]),
    (1, 1, 1, []),
    (1, 90, 30, [(0, 1)]),
    (50, 130, 7, [(0, 0), (20, 38)]),
    (0, 5, 8, [(0, 0)]),
    (40, 6, 0, []),
)
"""Rows, out and in width, rows with updates; their ranks are 3, 4, ..."""


def check_linear() -> None:
    """Values and gradients, of masters too; wide ones; updates of other inputs; several linears at once."""
    for dtype in DTYPES:
        for rows, n, k, bounds in LINEARS:

            def updated(ops: Ops, t: Tensors, bounds: Sequence[tuple[int, int]] = bounds) -> Sequence[Tensor]:
                return (ops.linear(t["x"], t["w"], t["bias"], _updates(t, bounds)),)

            inputs = _linear_inputs(rows, n, k, [3 + i for i in range(len(bounds))])
            if rows and k:
                compare(updated, inputs, dtype)
                compare(updated, inputs, dtype, grad=True, masters=inputs.keys() - {"x", "bias"})
            else:
                low = {name: x.to(dtype) for name, x in inputs.items()}
                assert updated(CUDA, low)[0].equal(low["bias"].expand(rows, n))
    _check_wide()
    _check_own_inputs()
    _check_frozen()
    _check_many_adapters()
    x = draw(1, 9, 8)
    parts = [
        Part(draw(2, 5, 8), draw(3, 5)),
        Part(draw(4, 7, 8), None, [LowRank(start=2, stop=4, a_RK=x[:2], b_NR=draw(5, 7, 2))]),
    ]
    for one, part in zip(CUDA.linears(x, parts), parts, strict=True):
        assert one.equal(CUDA.linear(x, part.w_NK, part.bias_N, part.updates))


def _check_wide() -> None:
    """float32 that was never rounded, but for x a^T: wide results, and the gradient of a master."""
    t = _linear_inputs(20, 50, 40, [3])
    for dtype in (torch.float16, torch.bfloat16):
        low, master = {name: x.to(dtype).requires_grad_() for name, x in t.items()}, t["w"].clone().requires_grad_()
        for bounds in ([], [(5, 11)]):
            out = CUDA.linear(low["x"], master, low["bias"], _updates(low, bounds), wide=True)
            exact = REFERENCE.linear(t["x"].double(), t["w"].double(), t["bias"].double())
            for start, stop in bounds:
                hidden = (t["x"][start:stop] @ t["a0"].T).to(dtype).double()
                exact[start:stop] += hidden @ t["b0"].T.double()
            assert out.dtype == torch.float32 and (out - exact).abs().max() < 1e-4
            grad_w, grad_bias = torch.autograd.grad(out.sum(), [master, low["bias"]])
            assert grad_bias.equal(torch.full_like(grad_bias, 20))
            assert (grad_w - t["x"].double().sum(0)).abs().max() < 1e-5


def _check_own_inputs() -> None:
    """Of an update with an x of its own (dropout): the gradient reaches that, and not the linear's on these rows."""
    t = _linear_inputs(20, 50, 40, [3, 5]) | exactly({"x1": draw(20, 6, 40)})
    for dtype in DTYPES:
        compare(
            lambda o, t: (o.linear(t["x"], t["w"], t["bias"], _updates(t, [(2, 5), (9, 15)])),), t, dtype, grad=True
        )


@torch.no_grad()
def _check_many_adapters() -> None:
    """More than a launch takes; the op is given the factors themselves, nothing is copied."""
    x, w, ranks = draw(1, 70, 40).bfloat16(), draw(2, 24, 40).bfloat16(), [1 + i % 7 for i in range(70)]
    factors = [(draw(i, rank, 40).bfloat16(), draw(i, 24, rank).bfloat16()) for i, rank in enumerate(ranks)]
    updates = [LowRank(start=i, stop=i + 1, a_RK=a, b_NR=b) for i, (a, b) in enumerate(factors)]
    given: list[Tensor] = []
    op = torch.ops.onemesh_cuda.lora

    def watched(out: Tensor, hidden: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], items: Tensor) -> None:
        given.extend([*a, *b])
        op(out, hidden, x, a, b, items)

    with mock.patch.object(torch.ops.onemesh_cuda, "lora", watched):
        got = CUDA.linear(x, w, None, updates)
    assert {t.data_ptr() for t in given} == {t.data_ptr() for pair in factors for t in pair}
    for i in (0, 1, 63, 64, 69):
        assert got[i : i + 1].equal(CUDA.linear(x[i : i + 1], w, None, [replace(updates[i], start=0, stop=1)]))
    exact = [u.double() for u in (x, w)]
    wide = [replace(u, a_RK=a.double(), b_NR=b.double()) for u, (a, b) in zip(updates, factors, strict=True)]
    assert_as_plain(got, REFERENCE.linear(x, w, None, updates), REFERENCE.linear(*exact, None, wide))


def _check_frozen() -> None:
    """Only what asks for a gradient gets one: factors and x, or x alone; the same bits without any."""
    t = {name: x.bfloat16() for name, x in _linear_inputs(20, 50, 40, [3]).items()}
    with torch.no_grad():
        plain = CUDA.linear(t["x"], t["w"], t["bias"], _updates(t, [(2, 19)]))
    for wanted in (("a0", "b0"), ("x",), ("x", "b0"), ("w",)):
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in t.items()}
        out = CUDA.linear(leaves["x"], leaves["w"], leaves["bias"], _updates(leaves, [(2, 19)]))
        assert out.equal(plain)
        out.sum().backward()
        assert {name for name, x in leaves.items() if x.grad is not None} == set(wanted)


@torch.no_grad()
def check_row_invariance() -> None:
    """A row of a linear alone, with its update of another rank than the batch's largest, has its bits in the batch."""
    for dtype in DTYPES:
        t = {name: x.to(dtype) for name, x in _linear_inputs(50, 70, 77, [3, 8]).items()}
        bounds = [(2, 3), (10, 45)]
        full = CUDA.linear(t["x"], t["w"], t["bias"], _updates(t, bounds))
        for i in (0, 2, 10, 30, 44, 45, 49):
            own = [replace(u, start=0, stop=1) for u in _updates(t, bounds) if u.start <= i < u.stop]
            assert CUDA.linear(t["x"][i : i + 1], t["w"], t["bias"], own).equal(full[i : i + 1]), i
        logits = CUDA.linear(t["x"], t["w"], wide=True)
        lse = CUDA.log_sum_exp(logits)
        assert CUDA.log_sum_exp(logits[7:9]).equal(lse[7:9])


# The loss, training


def check_loss() -> None:
    """The pieces against the reference, and the cross-entropy that is made of them with both gradients."""
    logits, target = draw(1, 40, 301) * 5, torch.arange(40) * 7 - 1
    for dtype in DTYPES:
        lse = CUDA.log_sum_exp(logits)
        assert_as_plain(lse, REFERENCE.log_sum_exp(logits), REFERENCE.log_sum_exp(logits.double()))
        exact = REFERENCE.loss_gradient(logits.double(), lse.double(), target, torch.float64)
        got, plain = (o.loss_gradient(logits, lse, target, dtype) for o in (CUDA, REFERENCE))
        assert_as_plain(got, plain, exact)

    target = torch.randint(0, 53, (40,), generator=torch.Generator().manual_seed(0))
    inputs = exactly({"hidden": draw(2, 40, 12), "w": draw(3, 53, 12)})

    def loss(ops: Ops, t: Tensors) -> Sequence[Tensor]:
        return (cross_entropy(t["hidden"], t["w"], target, first_row=0, tensor=Group("tensor"), ops=ops),)

    for dtype in DTYPES:
        compare(loss, inputs, dtype, masters=["w"])
        compare(loss, inputs, dtype, grad=True, masters=["w"])


LENGTHS = (17, 1, 30)


def check_training() -> None:
    """Loss and all gradients of a decoder with masters in float32, by the ops of one backend."""
    weights = RandomWeights(replace(TINY, num_layers=2, qkv_bias=True))
    ids = torch.randint(0, TINY.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    rows = torch.tensor([t for t in range(sum(LENGTHS)) if t + 1 not in ends])

    def step(ops: Ops, dtype: torch.dtype) -> tuple[Tensor, Tensors]:
        decoder = build_decoder(weights, Mesh.single(), [2], dtype=dtype, ops=ops, trainable=True)
        attend = DocumentAttend(decoder.architecture, decoder.here, ops, ends)
        hidden = decoder(ids, Step(position_T=torch.cat([torch.arange(n) for n in LENGTHS]), attend=attend))
        loss = cross_entropy(
            hidden[rows], decoder.head_weight, ids[rows + 1], first_row=0, tensor=Group("tensor"), ops=ops
        )
        loss.backward()
        return loss.detach(), {spec.name: p.grad for spec, p in decoder.placed() if p.grad is not None}

    exact, exact_grads = step(REFERENCE, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        (plain, plain_grads), (got, grads) = step(REFERENCE, dtype), step(CUDA, dtype)
        assert abs(got - exact) <= 2 * abs(plain - exact) + 1e-6 * exact
        assert grads.keys() == exact_grads.keys() and len(grads) > 20
        for name, wanted in exact_grads.items():
            assert grads[name].dtype == torch.float32
            error, allowed = ((g[name].double() - wanted).norm() / wanted.norm() for g in (grads, plain_grads))
            assert error <= 2 * allowed + torch.finfo(dtype).eps, f"{name}: {error}, plain {allowed}"


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for name, check in (globals() | vars(cuda_arguments) | vars(cuda_attention) | vars(cuda_draws)).items()
    if name.startswith("check_")
}

if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.set_num_threads(1)
    CHECKS[sys.argv[2]]()

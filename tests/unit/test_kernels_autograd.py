"""The hand-written backward passes against finite differences and against the reference's autograd."""

import math

import pytest
import torch

from kernels import autograd_merge, reference, torch_ops
from kernels.checks import working_dtype
from kernels.dispatch import REFERENCE, select

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [draw(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("bounds", "kv_index", "window"),
    [
        ([0, 1, 1, 5, 7], None, None),
        ([0, 6], (0, 0, 1, 1), 2),
        ([0, 2, 7], (0, 1, 1, 1), None),
        ([0, 5, 6], (1, 0, 1, 0), 3),
    ],
)
def test_gradcheck_of_attention_through_out_and_lse(bounds, kv_index, window):
    tokens = bounds[-1]
    inputs = leaves((tokens, 4, 3), (tokens, 2, 3), (tokens, 2, 3))
    assert torch.autograd.gradcheck(
        lambda q, k, v: torch_ops.attention_varlen(q, k, v, bounds, kv_index=kv_index, window=window, scale=0.6),
        inputs,
    )


@pytest.mark.parametrize("kv_index", [None, (0, 1, 1, 1)])
def test_gradcheck_of_prefix_merged_with_documents(kv_index):
    def merged(q, k, v, prefix_k, prefix_v):
        return reference.merge_attention(
            [
                torch_ops.attention_prefix(q, prefix_k, prefix_v, kv_index=kv_index, scale=0.6),
                torch_ops.attention_varlen(q, k, v, [0, 2, 5], kv_index=kv_index, scale=0.6),
            ]
        )

    inputs = leaves((5, 4, 3), (5, 2, 3), (5, 2, 3), (3, 2, 3), (3, 2, 3))
    assert torch.autograd.gradcheck(merged, inputs)


def parts_of(count, *, dtype=torch.float64):
    """(out, lse) of so many parts; query 1 sees nothing of the first one, query 2 nothing at all."""
    found = [(draw(5, 2, 3, seed=i, dtype=dtype), draw(5, 2, seed=9 + i, dtype=torch.float64)) for i in range(count)]
    found = [(out, lse.to(working_dtype(dtype))) for out, lse in found]
    for i, (out, lse) in enumerate(found):
        for row in (1, 2) if i == 0 else (2,):
            out[row], lse[row] = 0, -math.inf
    return [t.requires_grad_() for part in found for t in part]


def merged(merge, flat):
    return merge(list(zip(flat[::2], flat[1::2], strict=True)))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("chosen", [(1.0, 1.0), (1.0, None), (None, 1.0)])
def test_gradients_of_the_merge(count, chosen):
    """Those of the reference's own graph, where one of the results may be unused."""
    weights = draw(5, 2, 3, seed=20), draw(5, 2, seed=21)

    def run(merge):
        flat = parts_of(count)
        outs = merged(merge, flat)
        outs = outs[0], torch.where(outs[1].isneginf(), 0.0, outs[1])
        used = [(out * w).sum() for out, w, c in zip(outs, weights, chosen, strict=True) if c]
        return [*outs, *torch.autograd.grad(sum(used), flat, materialize_grads=True)]

    for got, wanted in zip(run(autograd_merge.merge_attention), run(reference.merge_attention), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-14)


def test_the_merge_keeps_its_parts_and_nothing_else():
    """Its bits are the reference's; a graph of plain operations would hold float32 copies of the parts."""
    flat = parts_of(2, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, lse = merged(autograd_merge.merge_attention, flat)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (*flat, lse)]
    for a, b in zip((out, lse), merged(reference.merge_attention, flat), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_index"), [((9, 3), None), ((3, 2), (0, 1, 1)), ((2, 2), (0, 1))])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_error_is_that_of_plain_low_precision(dtype, heads, kv_index, window):
    """Against float64; at most twice the error of the reference run in the low precision, plus one ulp."""
    num_heads, num_kv_heads = heads
    bounds = [0, 1, 700, 700, 933, 1000]
    weight, lse_weight = draw(1000, num_heads, 16, seed=7), draw(1000, num_heads, seed=8)

    def run(attention, dtype):
        shapes = ((1000, num_heads, 16), (1000, num_kv_heads, 16), (1000, num_kv_heads, 16))
        inputs = [t.to(torch.bfloat16).to(dtype).detach().requires_grad_() for t in leaves(*shapes)]
        out, lse = attention(*inputs, bounds, kv_index=kv_index, window=window, scale=0.25)
        grads = torch.autograd.grad((out * weight).sum() + (lse * lse_weight).sum(), inputs)
        return [out, lse, *grads]

    exact = run(reference.attention_varlen, torch.float64)
    plain = run(reference.attention_varlen, dtype)
    for got, low, wanted in zip(run(torch_ops.attention_varlen, dtype), plain, exact, strict=True):
        assert got.dtype == low.dtype
        assert relative(got, wanted) <= 2 * relative(low, wanted) + torch.finfo(dtype).eps


@pytest.mark.parametrize("with_lse", [False, True])
def test_lse_gradient_alone_and_absent(with_lse):
    q, k, v = leaves((40, 4, 8), (40, 2, 8), (40, 2, 8), dtype=torch.float32)
    chosen = 1 if with_lse else 0
    expected = torch.autograd.grad(
        reference.attention_varlen(q, k, v, [0, 15, 40], scale=0.3)[chosen].square().sum(), (q, k)
    )
    got = torch.autograd.grad(
        torch_ops.attention_varlen(q, k, v, [0, 15, 40], scale=0.3)[chosen].square().sum(), (q, k)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
def test_empty_pack(bounds):
    q, k, v = leaves((0, 4, 8), (0, 2, 8), (0, 2, 8), dtype=torch.float32)
    out, lse = torch_ops.attention_varlen(q, k, v, bounds, scale=1.0)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    prefix_k = draw(3, 2, 8, dtype=torch.float32).requires_grad_()
    prefix = torch_ops.attention_prefix(q, prefix_k, prefix_k, scale=1.0)
    merged, _ = reference.merge_attention([prefix, (out, lse)])
    merged.sum().backward()
    assert q.grad.shape == q.shape
    assert torch.equal(prefix_k.grad, torch.zeros_like(prefix_k))


def test_attention_memory_does_not_grow_with_the_square():
    """A pack of 4096 tokens in one document: the reference would hold 9 * 4096^2 scores (604 MB)."""
    q, k, v = leaves((4096, 9, 8), (4096, 3, 8), (4096, 3, 8), dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out, _ = torch_ops.attention_varlen(q, k, v, [0, 4096], scale=0.3)
    assert sum(saved) == q.numel() + k.numel() + v.numel() + out.numel() + 4096 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("width", [24, 1])
def test_linear_gradients(dtype, rows, frozen, width):
    ops = select(CPU, dtype)

    def run(linear):
        x, w, bias = leaves((rows, width), (10, width), (10,), dtype=dtype)
        w.requires_grad_(not frozen)
        out = linear(x, w, bias)
        wanted = [x, bias] if frozen else [x, w, bias]
        return [out, *torch.autograd.grad((out * draw(rows, 10, seed=5, dtype=dtype)).sum(), wanted)]

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    for got, expected in zip(run(ops.linear), run(reference.linear), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_linear_builds_a_graph_only_for_what_is_trained():
    ops = select(CPU, torch.float32)
    x, w = draw(3, 8, dtype=torch.float32), draw(4, 8, dtype=torch.float32)
    assert not ops.linear(x, w).requires_grad
    bias = draw(4, dtype=torch.float32).requires_grad_()
    ops.linear(x, w, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 3.0))


def test_float64_uses_the_reference():
    assert select(CPU, torch.float64) is REFERENCE
    assert select(CPU, torch.float16).name.startswith("torch-cpu (")


def test_linear_names_what_does_not_fit():
    ops = select(CPU, torch.float32)
    with pytest.raises(ValueError, match=r"linear: x \(2, 3\) and w \(4, 5\) must be \[T, K\] and \[N, K\]"):
        ops.linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"x is torch.float32, w is torch.bfloat16"):
        ops.linear(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must have one shape"):
        ops.silu_gate(torch.zeros(2, 3), torch.zeros(3, 3))

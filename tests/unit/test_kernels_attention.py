"""Attention over packed documents: every backend against the reference in float64, forward and every gradient."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.dispatch import REFERENCE
from kernels.documents import Documents
from tests.backends import BACKENDS, backend

ROOT = Path(__file__).parents[2]
LOW = [torch.float32, torch.bfloat16]
RING = Documents(query_bounds=(0, 70, 70, 200, 230), key_bounds=(0, 90, 95, 95, 300), offsets=(-3, 0, 4, 205))
"""Keys that some queries don't see, no queries, no keys, all keys."""


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bounds_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    return float((got.double() - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-30))


def with_gradients(attention, inputs, dtype, **options):
    """out, lse, dq, dk, dv of a function of both results, from inputs that are bfloat16 numbers in any dtype."""
    leaves = [t.bfloat16().to(dtype).requires_grad_() for t in inputs]
    out, lse = attention(*leaves, scale=leaves[0].shape[-1] ** -0.5, **options)
    weights = draw(*out.shape, seed=7).bfloat16(), draw(*lse.shape, seed=8)
    finite = torch.where(lse.isfinite(), lse, 0)
    total = (out * weights[0].to(dtype)).sum() + (finite * weights[1].to(finite.dtype)).sum()
    return [out, lse, *torch.autograd.grad(total, leaves)]


CASES = {
    "even sharing": ([1, 200, 0, 33, 2, 129], 64, (0, 0, 0, 1, 1, 1), {}),
    "long": ([1400, 3], 32, (0, 0, 1), {}),
    "uneven sharing": ([100, 65, 1], 80, (0, 1, 1, 0, 0), {}),
    "a kv head nobody reads": ([70], 96, (0, 2), {}),
    "multi-query": ([190], 16, (0,) * 9, {}),
    "wide": ([70, 150], 256, (0, 0), {}),
    "narrow": ([70, 2], 18, (0, 1), {}),
    "window": ([300, 90, 1], 24, (0, 1, 1), {"window": 100}),
    "long window": ([1300], 16, (0, 0), {"window": 300}),
    "cap": ([150, 20], 64, (0, 0, 1), {"soft_cap": 1.5}),
    "alibi": ([150, 1, 20], 64, (0, 0, 1), {"alibi_slopes": [0.5, 0.25, 0.01]}),
    "all at once": ([1100, 20], 40, (0, 1, 0), {"window": 700, "soft_cap": 2.0, "alibi_slopes": [0.5, 0.05, 0.0]}),
    "ring": (RING, 48, (0, 0, 1), {}),
    "ring with all": (RING, 48, (1, 0, 1), {"window": 50, "soft_cap": 3.0, "alibi_slopes": [0.5, 0.05, 0.1]}),
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", LOW)
def test_error_is_that_of_plain_low_precision(dtype, case, kernels):
    """Against float64; at most twice the error of the reference in the low precision, plus one ulp."""
    documents, head_dim, heads, options = CASES[case]
    documents = bounds_of(documents) if isinstance(documents, list) else documents
    rows, keys = (230, 300) if documents is RING else (documents[-1], documents[-1])
    shapes = (rows, len(heads)), (keys, max(heads) + 1), (keys, max(heads) + 1)
    inputs = [draw(*shape, head_dim, seed=i) for i, shape in enumerate(shapes)]

    def run(attention, dtype):
        def call(q, k, v, **more):
            return attention(q, k, v, documents, kv_index=heads, **more)

        return with_gradients(call, inputs, dtype, **options)

    exact, plain = run(reference.attention_varlen, torch.float64), run(reference.attention_varlen, dtype)
    results = run(backend(kernels, dtype).attention_varlen, dtype)
    for name, got, low, wanted in zip(("out", "lse", "dq", "dk", "dv"), results, plain, exact, strict=True):
        assert got.dtype == low.dtype and got.shape == low.shape
        assert relative(got, wanted) <= 2 * relative(low, wanted) + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("soft_cap", [None, 1.0])
@pytest.mark.parametrize("length", [0, 1, 20, 700])
@pytest.mark.parametrize("dtype", LOW)
def test_prefix(dtype, length, soft_cap, kernels):
    inputs = [draw(130, 4, 64, seed=0), draw(length, 2, 64, seed=1), draw(length, 2, 64, seed=2)]
    exact, plain = (
        with_gradients(reference.attention_prefix, inputs, d, soft_cap=soft_cap) for d in (torch.float64, dtype)
    )
    got = with_gradients(backend(kernels, dtype).attention_prefix, inputs, dtype, soft_cap=soft_cap)
    for a, low, wanted in zip(got, plain, exact, strict=True):
        assert relative(a, wanted) <= 2 * relative(low, wanted) + torch.finfo(dtype).eps


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_gradients_alone(which):
    ops = backend("compiled", torch.float32)
    inputs = [draw(40, n, 8, seed=i).requires_grad_() for i, n in enumerate((4, 2, 2))]
    expected, got = (
        torch.autograd.grad(
            o.attention_varlen(*inputs, [0, 15, 40], scale=0.3)[which].square().sum(), inputs, allow_unused=True
        )
        for o in (REFERENCE, ops)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"soft_cap": 1.0, "alibi_slopes": [0.1, 0.2, 0.3]}])
@pytest.mark.parametrize("dtype", LOW)
def test_a_document_has_one_result_and_gradient_in_any_pack(dtype, options):
    """Random packs against each document alone: bitwise, out, lse and gradients, at 1 and 2 threads."""
    ops = backend("compiled", dtype)
    lengths = [1, 2, 63, 64, 65, 300, 513, 1300]
    whole = [
        [draw(n, heads, 48, seed=heads * i + 1, dtype=dtype) for heads in (3, 2, 2)] for i, n in enumerate(lengths)
    ]

    def run(picks):
        leaves = [torch.cat(parts).requires_grad_() for parts in zip(*(whole[b] for b in picks), strict=True)]
        bounds = bounds_of([lengths[b] for b in picks])
        out, lse = ops.attention_varlen(*leaves, bounds, kv_index=(0, 1, 1), scale=0.2, **options)
        results = [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves)]
        return [[t[a:b] for t in results] for a, b in itertools.pairwise(bounds)]

    torch.set_num_threads(1)
    alone = [run([b])[0] for b in range(len(lengths))]
    chance = random.Random(0)
    for step in range(6):
        torch.set_num_threads(1 + step % 2 * 2)
        picks = chance.sample(range(len(lengths)), chance.randint(1, len(lengths)))
        for b, got in zip(picks, run(picks), strict=True):
            for name, a, expected in zip(("out", "lse", "dq", "dk", "dv"), got, alone[b], strict=True):
                assert torch.equal(a, expected), (step, lengths[b], name)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"soft_cap": 1.0, "alibi_slopes": [0.1, 0.2, 0.3]}])
@pytest.mark.parametrize("dtype", LOW)
def test_training_and_serving_share_bits(dtype, options):
    """One document packed, in chunks over pages and token by token."""
    ops = backend("compiled", dtype)
    q, k, v = (draw(1200, n, 40, seed=i, dtype=dtype) for i, n in enumerate((3, 2, 2)))
    more = {"kv_index": (0, 1, 1), "scale": 0.2, **options}
    out, lse = ops.attention_varlen(q, k, v, [0, 1200], **more)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0))
    caches = [torch.empty(75, 16, 2, 40, dtype=dtype) for _ in range(2)]
    for cache, rows in zip(caches, (k, v), strict=True):
        cache[order] = rows.view(75, 16, 2, 40)
    for first, last in ((0, 1200), (0, 7), (7, 515), (600, 601), (1024, 1025), (1199, 1200)):
        layout = ops.paged_layout([last - first], [last], [order.tolist()], page_size=16)
        got = ops.attention_paged(q[first:last], *caches, layout, **more)
        assert torch.equal(got[0], out[first:last]) and torch.equal(got[1], lse[first:last]), (first, last)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_caps_and_slopes_over_pages(dtype, kernels):
    """Decoding and prefill behind a prefix, which has neither positions nor a window."""
    ops = backend(kernels, dtype)
    q, key, value = (draw(*s, 32, seed=i, dtype=dtype) for i, s in enumerate(((90, 3), (60, 16, 2), (60, 16, 2))))
    more = {"kv_index": (0, 1, 1), "window": 300, "scale": 0.2, "soft_cap": 1.5, "alibi_slopes": [0.1, 0.01, 0.5]}

    def run(ops, q, key, value):
        layout = ops.paged_layout(
            [1, 80, 9],
            [700, 90, 9],
            [range(44), range(44, 50), [50]],
            page_size=16,
            prefix_lengths=[0, 20, 3],
            prefix_tables=[[], [51, 52], [53]],
        )
        return ops.attention_paged(q, key, value, layout, **more)

    exact = run(REFERENCE, q.double(), key.double(), value.double())
    for got, low, wanted in zip(run(ops, q, key, value), run(REFERENCE, q, key, value), exact, strict=True):
        assert relative(got, wanted) <= 2 * relative(low, wanted) + torch.finfo(dtype).eps


@pytest.mark.usefixtures("thread_counts")
def test_more_threads_than_processors_take_turns():
    """Segments of a long document add to the same keys in their order, however the threads run."""
    ops = backend("compiled", torch.float32)
    q, k, v = (draw(3000, n, 16, seed=n) for n in (2, 1, 1))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = ops.attention_varlen(*leaves, [0, 3000], scale=0.3)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernels", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1, or None"),
        ({"soft_cap": 0.0}, r"soft_cap=0.0 must be positive, or None"),
        ({"soft_cap": float("nan")}, "soft_cap=nan must be positive"),
        ({"alibi_slopes": [0.5]}, "alibi_slopes has 1 entries for the 2 heads of q"),
        ({"kv_index": (0, 1)}, r"kv_index=\(0, 1\) must hold 2 entries"),
        ({"documents": [0, 3]}, r"cu_seqlens=\[0, 3\] must rise from 0 to the 4 packed tokens of q"),
        ({"documents": Documents(query_bounds=(0, 4), key_bounds=(0, 3), offsets=(0,))}, r"key_bounds=\[0, 3\] must"),
        ({"documents": Documents(query_bounds=(0, 4), key_bounds=(0, 4), offsets=())}, "have 2, 2 and 0 entries"),
        ({"k": torch.zeros(5, 1, 8), "v": torch.zeros(5, 1, 8)}, "k has 5 rows, q 4; pass Documents"),
        ({"k": torch.zeros(4, 1, 8).bfloat16()}, "use one dtype"),
        ({"v": torch.zeros(4, 2, 8)}, "keys and values the whole shape"),
    ],
)
def test_bad_arguments_are_named(kernels, changes, message):
    ops = REFERENCE if kernels == "reference" else backend(kernels, torch.float32)
    good = {"q": torch.zeros(4, 2, 8), "k": torch.zeros(4, 1, 8), "v": torch.zeros(4, 1, 8), "documents": [0, 4]}
    arguments = good | changes
    rest = {name: arguments.pop(name) for name in set(arguments) - set(good)}
    with pytest.raises(ValueError, match=message):
        ops.attention_varlen(*(arguments[name] for name in good), scale=1.0, **rest)


@pytest.mark.parametrize("head_dim", [0, 7, 258])
def test_head_dims_without_kernels_are_refused(head_dim):
    ops = backend("compiled", torch.float32)
    q, k, cache = torch.zeros(4, 2, head_dim), torch.zeros(4, 1, head_dim), torch.zeros(2, 4, 1, head_dim)
    with pytest.raises(ValueError, match=f"q has head dim {head_dim}; the C\\+\\+ kernels take even ones"):
        ops.attention_varlen(q, k, k, [0, 4], scale=1.0)
    layout = ops.paged_layout([4], [4], [[1]], page_size=4)
    with pytest.raises(ValueError, match=f"q has head dim {head_dim}; the C\\+\\+ kernels take even ones"):
        ops.attention_paged(q, cache, cache, layout, scale=1.0)


def raw(backward: bool = False, **changes):
    """One good call of the raw op, with some arguments replaced."""
    good = {
        "grad_out": torch.zeros(4, 2, 8),
        "grad_lse": torch.zeros(4, 2),
        "q": torch.zeros(4, 2, 8),
        "k": torch.zeros(5, 1, 8),
        "v": torch.zeros(5, 1, 8),
        "out": torch.zeros(4, 2, 8),
        "lse": torch.zeros(4, 2),
        "documents": torch.tensor([[3, 5, 2], [1, 0, 0]]),
        "kv_index": [0, 0],
        "window": 0,
        "scale": 1.0,
        "soft_cap": 0.0,
        "slopes": None,
    }
    arguments = good | changes
    if backward:
        return torch.ops.onemesh.attention_varlen_backward(*arguments.values())
    for name in ("grad_out", "grad_lse", "out", "lse"):
        del arguments[name]
    return torch.ops.onemesh.attention_varlen(*arguments.values())


BAD = {
    "q: dtype": ({"q": torch.zeros(4, 2, 8).double()}, "q must be float32 or bfloat16"),
    "q: dimensions": ({"q": torch.zeros(4, 16)}, "q has 2 dimensions, not 3"),
    "q: strides": ({"q": torch.zeros(2, 4, 8).transpose(0, 1)}, "q is not contiguous"),
    "q: rows": ({"q": torch.zeros(6, 2, 8)}, "documents hold 4 queries, q 6"),
    "q: odd": ({"q": torch.zeros(4, 2, 7)} | dict.fromkeys("kv", torch.zeros(5, 1, 7)), "odd head dim 7"),
    "q: wide": ({"q": torch.zeros(4, 2, 258)} | dict.fromkeys("kv", torch.zeros(5, 1, 258)), "258, not 2 .. 256"),
    "q: empty": ({"q": torch.zeros(4, 2, 0)} | dict.fromkeys("kv", torch.zeros(5, 1, 0)), "0, not 2 .. 256"),
    "k: dtype": ({"k": torch.zeros(5, 1, 8).bfloat16()}, "k has another dtype"),
    "k: head dim": (dict.fromkeys("kv", torch.zeros(5, 1, 10)), "q has head dim 8, k 10"),
    "k: rows": (dict.fromkeys("kv", torch.zeros(6, 1, 8)), "documents hold 5 keys, k 6"),
    "v: shape": ({"v": torch.zeros(4, 1, 8)}, "k and v differ in shape"),
    "documents: queries": ({"documents": torch.tensor([[5, 5, 0]])}, "document 0 has 5 queries, q 4 more"),
    "documents: negative": ({"documents": torch.tensor([[4, -1, 0]])}, "document 0 has -1 keys"),
    "documents: keys": ({"documents": torch.tensor([[4, 6, 0]])}, "document 0 has 6 keys, k 5 more"),
    "documents: offset": ({"documents": torch.tensor([[4, 5, 2**62]])}, "of document 0 is out of range"),
    "documents: width": ({"documents": torch.zeros(1, 2).long()}, r"documents must be \[B, 3\]"),
    "documents: dtype": ({"documents": torch.zeros(1, 3).int()}, "documents has the wrong dtype"),
    "kv_index: value": ({"kv_index": [0, 1]}, r"kv_index\[1\]=1 of 1 kv heads"),
    "kv_index: length": ({"kv_index": [0]}, "kv_index has not one entry per head"),
    "window": ({"window": -1}, "window=-1 is negative"),
    "soft_cap": ({"soft_cap": -1.0}, "soft_cap=-1 must be positive"),
    "slopes: length": ({"slopes": torch.zeros(3)}, "slopes has 3 entries for 2 heads"),
    "slopes: dtype": ({"slopes": torch.zeros(2).double()}, "slopes has the wrong dtype"),
}
BAD_BACKWARD = {
    "grad_out: shape": ({"grad_out": torch.zeros(4, 2, 6)}, "grad_out and q differ in shape"),
    "grad_out: dtype": ({"grad_out": torch.zeros(4, 2, 8).bfloat16()}, "grad_out has another dtype"),
    "grad_lse: shape": ({"grad_lse": torch.zeros(2, 4)}, "grad_lse doesn't fit q"),
    "grad_lse: dtype": ({"grad_lse": torch.zeros(4, 2).double()}, "grad_lse has the wrong dtype"),
    "out: strides": ({"out": torch.zeros(2, 4, 8).transpose(0, 1)}, "out is not contiguous"),
    "lse: shape": ({"lse": torch.zeros(3, 2)}, "lse doesn't fit q"),
}


@pytest.mark.parametrize("case", BAD | BAD_BACKWARD)
def test_bad_arguments_of_the_raw_ops_are_named(case):
    backend("compiled", torch.float32)
    changes, message = (BAD | BAD_BACKWARD)[case]
    for backward in (True,) if case in BAD_BACKWARD else (False, True):
        raw(backward)
        with pytest.raises(RuntimeError, match=message):
            raw(backward, **changes)


CHECK = """
import sys
import torch
from kernels import cpu_ops
from kernels.dispatch import select
from tests.unit import test_kernels_attention as tests

assert cpu_ops.load() == sys.argv[1]
for dtype in tests.LOW:
    for case in ("even sharing", "uneven sharing", "wide", "narrow", "all at once", "ring with all"):
        tests.test_error_is_that_of_plain_low_precision(dtype, case, "compiled")
    tests.test_a_document_has_one_result_and_gradient_in_any_pack(dtype, {"window": 200})
    tests.test_training_and_serving_share_bits(dtype, {})
print("checked")
"""


@pytest.mark.parametrize("name", ["generic", "sse42", "avx2", "avx512"])
def test_every_instruction_set(name):
    backend("compiled", torch.float32)
    known = subprocess.run(
        [sys.executable, "-c", "from kernels import cpu_ops; cpu_ops.load()"],
        cwd=ROOT,
        env=os.environ | {"ONEMESH_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if known.returncode:
        pytest.skip(f"this processor or build has no {name}")
    command = [sys.executable, "-c", CHECK, name]
    environment = os.environ | {"ONEMESH_CPU_ISA": name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr

"""Row-invariance of the linear, pointwise and softmax ops on this CPU, bit for bit, at 1 and 2 threads."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch, invariance, reference
from kernels.dispatch import REFERENCE
from kernels.invariance import cancelling_factors, check_row_invariance
from tests.backends import BACKENDS, backend

ROWS = (1, 2, 3, 5, 9, 16, 33, 127, 512)
SMOLLM2 = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
HALVES_AND_THIRDS = [(320, 576), (64, 576), (768, 576), (576, 768), (576, 512)]
ODD = [
    (8, 576),
    (576, 8),
    (1536, 8),
    (16, 1536),
    (54, 72),
    (72, 54),
    (17, 31),
    (577, 333),
    (1, 64),
    (24, 72),
    (8, 8),
    (576, 1),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def on_one_thread(compute):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SMOLLM2 + HALVES_AND_THIRDS + ODD)
def test_linear_rows_do_not_depend_on_their_number_or_place(dtype, n, k, threads):
    ops = backend("torch", dtype)
    x, w = cancelling_factors(n, k, 530, dtype)
    bias = draw(n, seed=2, dtype=dtype) * 1e-6
    for b, counts in ((None, ROWS), (bias, (1, 2, 17))):
        expected = on_one_thread(lambda b=b: ops.linear(x, w, b))
        for rows in counts:
            start = 7 * rows % (531 - rows)
            got = ops.linear(x[start : start + rows], w, b)
            assert torch.equal(got, expected[start : start + rows]), (rows, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_rows(dtype, threads):
    ops = backend("torch", dtype)
    x, w = draw(64, 576, dtype=dtype), draw(24576, 576, seed=1, dtype=dtype)
    expected = on_one_thread(lambda: ops.linear(x, w))
    for rows in (1, 2, 5, 16, 33):
        assert torch.equal(ops.linear(x[:rows], w), expected[:rows])
        assert torch.equal(ops.log_softmax(expected[-rows:]), ops.log_softmax(expected)[-rows:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_rows_and_weights(dtype):
    """Weights mapped from a file start at any address."""
    ops = backend("torch", dtype)
    x, w = draw(40, 96, dtype=dtype), draw(48, 96, seed=1, dtype=dtype)
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (x, w)]
    assert all(t.data_ptr() % 64 for t in shifted)
    expected = ops.linear(x, w)
    assert torch.equal(ops.linear(*shifted), expected)
    assert torch.equal(ops.linear(shifted[0][3:4], shifted[1]), expected[3:4])


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [576, 72, 77, 1000, 1536])
def test_pointwise_rows(dtype, width, threads, kernels):
    """Widths that leave a vector tail, packs large enough that threads share them."""
    ops = backend(kernels, dtype)
    x, y = draw(700, width, dtype=dtype) * 3, draw(700, width, seed=1, dtype=dtype)
    angle = draw(700, 64, seed=2)
    cos, sin = angle.cos(), angle.sin()
    heads = draw(700, 3, 64, seed=3, dtype=dtype)
    cases = {
        "rms_norm": lambda s: ops.rms_norm(x[s], y[0], 1e-5),
        "silu_gate": lambda s: ops.silu_gate(x[s], y[s]),
        "log_softmax": lambda s: ops.log_softmax(x[s]),
        "rotary": lambda s: ops.rotary(heads[s], cos[s], sin[s]),
    }
    for name, case in cases.items():
        expected = on_one_thread(lambda case=case: case(slice(0, 700)))
        for rows in (1, 33, 511):
            for start in (0, 700 - rows):
                got = case(slice(start, start + rows))
                assert torch.equal(got, expected[start : start + rows]), (name, rows, start)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_forward_is_the_same_function_with_and_without_gradients(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        ops = backend(kernels, dtype)
        x, w = draw(3, 40, dtype=dtype).requires_grad_(), draw(8, 40, seed=1, dtype=dtype).requires_grad_()
        norm_w = draw(40, seed=2, dtype=dtype)
        with torch.no_grad():
            plain = ops.linear(x, w), ops.rms_norm(x, norm_w, 1e-5), ops.silu_gate(x, x)
        traced = ops.linear(x, w), ops.rms_norm(x, norm_w, 1e-5), ops.silu_gate(x, x)
        assert all(t.requires_grad for t in traced)
        assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_self_check_passes_on_this_cpu(dtype, threads, kernels):
    report = check_row_invariance(backend(kernels, dtype), dtype)
    assert report.checks > 50
    assert report.failures == ()


def test_a_processor_without_a_rule_is_told_of(monkeypatch):
    monkeypatch.setattr(invariance, "_linear_agrees", lambda *_: False)
    rule = invariance.measure_row_rule(torch.float32)
    assert (rule.exact_linears, rule.exact_attention, rule.min_rows) == (False, True, 32)
    assert "linears of at least 32 rows, NOT row-invariant on this processor" in dispatch.torch_cpu(rule).name
    assert "NOT" not in dispatch.torch_cpu(dataclasses.replace(rule, exact_linears=True)).name


def test_the_self_check_sees_a_backend_that_is_not_invariant():
    """torch's plain float32 linear differs for one row on every CPU we know; a planted difference surely does."""

    def planted(x, w, bias=None):
        return reference.linear(x, w, bias) * (1 + 1e-6 * (len(x) == 1))

    broken = dataclasses.replace(REFERENCE, linear=planted)
    report = check_row_invariance(broken, torch.float32)
    assert any(failure.startswith("linear") for failure in report.failures)

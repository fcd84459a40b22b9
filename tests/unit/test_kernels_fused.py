"""The fused ops over rows have the bits of their parts; inputs may be parts of wider matrices; bad ones are named."""

from dataclasses import replace

import pytest
import torch

from kernels.dispatch import REFERENCE
from kernels.ops import Ops
from serve.paged import KvCache, PagedAttend
from tests.backends import BACKENDS, backend
from tests.models import BIASED, RandomWeights
from tests.unit.test_decoder import LENGTHS, documents, our_model, packed_step

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def separate(ops: Ops) -> Ops:
    """`ops` with every fused op done by its parts."""

    def add_rms_norm(x, delta, w, eps):
        return x + delta, ops.rms_norm(x + delta, w, eps)

    def rotary_write(q, k, v, cos, sin, keys, values, slots):
        ops.write_pages(keys, values, ops.rotary(k, cos, sin), v, slots)
        return ops.rotary(q, cos, sin)

    return replace(ops, add_rms_norm=add_rms_norm, rotary_write=rotary_write)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 576), (33, 77), (2, 1), (0, 8), (3, 0)])
def test_add_rms_norm_has_the_bits_of_its_parts(kernels, dtype, shape, thread_counts):
    ops, (x, delta, w) = (
        backend(kernels, dtype),
        (draw(*s, seed=i, dtype=dtype) for i, s in enumerate((shape, shape, shape[1:]))),
    )
    expected = separate(ops).add_rms_norm(x, delta, w, 1e-5)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got = ops.add_rms_norm(x, delta, w, 1e-5)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [(700, 9, 3, 64), (5, 3, 2, 22), (1, 1, 1, 2), (0, 4, 2, 8), (3, 0, 0, 8)],
)
def test_rotary_write_has_the_bits_of_its_parts(kernels, dtype, tokens, heads, kv_heads, head_dim, thread_counts):
    """Scattered slots; every other slot keeps what it held."""
    ops = backend(kernels, dtype)
    q, k, v = (draw(tokens, n, head_dim, seed=n, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    angle = draw(tokens, head_dim, seed=5)
    cache = draw(2, tokens // 4 + 3, 8, kv_heads, head_dim, seed=6, dtype=dtype)
    slots = torch.randperm(cache.shape[1] * 8, generator=torch.Generator().manual_seed(7))[:tokens]
    expected_cache = cache.clone()
    expected = separate(ops).rotary_write(q, k, v, angle.cos(), angle.sin(), *expected_cache, slots)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got_cache = cache.clone()
        got = ops.rotary_write(q, k, v, angle.cos(), angle.sin(), *got_cache, slots)
        assert torch.equal(got, expected)
        assert torch.equal(got_cache, expected_cache)
    if tokens and kv_heads:
        assert not torch.equal(cache, expected_cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_the_decoder_has_the_bits_of_separate_ops(kernels, dtype):
    """Packed documents as in training, and the same documents into pages."""
    fused, parts = (our_model(RandomWeights(BIASED), dtype) for _ in range(2))
    ops = backend(kernels, dtype)
    for model, its_ops in ((fused, ops), (parts, separate(ops))):
        for module in model.modules():
            if hasattr(module, "ops"):
                module.ops = its_ops
    ids = torch.cat(documents(BIASED.vocab_size))
    with torch.no_grad():
        assert torch.equal(fused(ids, packed_step(fused, LENGTHS)), parts(ids, packed_step(parts, LENGTHS)))
        assert torch.equal(paged(fused, ids), paged(parts, ids))


def paged(decoder, ids: torch.Tensor) -> torch.Tensor:
    ops = decoder.ops
    layout = ops.paged_layout(LENGTHS, LENGTHS, [[1, 2, 3], [4], [5, 6, 7, 8]], page_size=8)
    slots = torch.cat([layout.slots(b) for b in range(len(LENGTHS))])
    cache = KvCache.allocate(decoder, num_pages=9, page_size=8)
    attend = PagedAttend(decoder.architecture, decoder.here, ops, cache, layout, slots)
    rows = torch.tensor([0, 16, 47])
    return decoder(ids, replace(packed_step(decoder, LENGTHS), attend=attend, rows=rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["part of wider rows", "transposed", "expanded"])
def test_inputs_of_any_strides(dtype, layout):
    """q, k, v as columns of one projection, gate and up of another: the bits of dense copies."""
    ops, tokens, head_dim, slots = backend("compiled", dtype), 40, 10, torch.arange(40).flip(0)
    qkv, angle = draw(tokens, 7 * head_dim, dtype=dtype), draw(tokens, head_dim, seed=1)
    wide = draw(tokens, 2 * 77 + 3, seed=2, dtype=dtype)
    if layout == "transposed":
        qkv, wide = qkv.t().contiguous().t(), wide.t().contiguous().t()
    elif layout == "expanded":
        qkv, wide = qkv[:1].expand(tokens, -1), wide[:1].expand(tokens, -1)
    q, k, v = (t.unflatten(1, (-1, head_dim)) for t in qkv.split([3 * head_dim, 2 * head_dim, 2 * head_dim], 1))
    gate, up = wide[:, :77], wide[:, 80:]

    def results(*inputs: torch.Tensor) -> list[torch.Tensor]:
        q, k, v, gate, up = inputs
        cache = torch.zeros(2, 5, 8, 2, head_dim, dtype=dtype)
        turned = ops.rotary_write(q, k, v, angle.cos(), angle.sin(), *cache, slots)
        return [
            turned,
            cache,
            ops.rotary(k, angle.cos(), angle.sin()),
            ops.silu_gate(gate, up),
            ops.gelu_gate(gate, up),
            ops.rms_norm(gate, up[0], 1e-5),
            *ops.add_rms_norm(gate, up, gate[0], 1e-5),
            ops.embedding(slots, gate),
        ]

    assert not gate.is_contiguous()
    expected = results(*(t.contiguous() for t in (q, k, v, gate, up)))
    for got, wanted in zip(results(q, k, v, gate, up), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_extremes_of_the_gates(kernels):
    """Far out a gate is 0 or the identity, and its slope 0 or 1; NaN stays."""
    ops = backend(kernels, torch.float32)
    values = [0.0, -0.0, 200.0, -200.0, 1e15, -1e15, torch.nan, -88.0, 88.9, 1e-30, -1.0]
    for name in ("silu_gate", "gelu_gate"):
        results = []
        for its_ops in (ops, REFERENCE):
            gate = torch.tensor([values], requires_grad=True)
            out = getattr(its_ops, name)(gate, torch.ones_like(gate))
            results.append((out, *torch.autograd.grad(out.sum(), gate)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-7, equal_nan=True)


GOOD = {
    "silu_gate": {"gate": torch.zeros(3, 8), "up": torch.zeros(3, 8)},
    "gelu_gate": {"gate": torch.zeros(3, 8), "up": torch.zeros(3, 8)},
    "silu_gate_backward": {"grad": torch.zeros(3, 8), "gate": torch.zeros(3, 8), "up": torch.zeros(3, 8)},
    "gelu_gate_backward": {"grad": torch.zeros(3, 8), "gate": torch.zeros(3, 8), "up": torch.zeros(3, 8)},
    "rms_norm": {"x": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": 1e-5},
    "add_rms_norm": {"x": torch.zeros(3, 8), "delta": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": 1e-5},
    "rms_norm_backward": {
        "grad": torch.zeros(3, 8), "grad_sum": torch.zeros(3, 8), "x": torch.zeros(3, 8), "weight": torch.zeros(8),
        "eps": 1e-5, "wants_weight": True,
    },
    "rotary": {"x": torch.zeros(3, 2, 8), "cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8)},
    "rotary_write": {
        "q": torch.zeros(3, 4, 8), "k": torch.zeros(3, 2, 8), "v": torch.zeros(3, 2, 8),
        "cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8),
        "key_cache": torch.zeros(2, 4, 2, 8), "value_cache": torch.zeros(2, 4, 2, 8), "slots": torch.tensor([7, 0, 3]),
    },
    "embedding": {"ids": torch.tensor([0, 4]), "weight": torch.zeros(5, 8)},
    "embedding_backward": {"grad": torch.zeros(2, 8), "ids": torch.tensor([0, 4]), "num_rows": 5},
}  # fmt: skip


def raw(name: str, **changes):
    return getattr(torch.ops.onemesh, name)(**(GOOD[name] | changes))


@pytest.mark.parametrize("name", GOOD)
def test_every_wrong_tensor_is_named(name):
    """Each tensor argument in turn gets another dtype, another number of dims, other sizes, no elements."""
    backend("compiled", torch.float32)
    raw(name)
    for argument, good in GOOD[name].items():
        if not isinstance(good, torch.Tensor):
            continue
        bad = [good.to(torch.float64 if good.is_floating_point() else torch.int32), good[None], good[..., None]]
        if good.is_floating_point() and (name, argument) not in LOW_TOO:
            bad.append(good.bfloat16())
        for x in bad:
            with pytest.raises(RuntimeError, match=rf"{name}: .*\b({argument}|{OTHERS.get(argument, argument)})\b"):
                raw(name, **{argument: x})
        for size in (0, 1, 9):
            for dim in range(good.dim()):
                shape = list(good.shape)
                shape[dim] = size
                if (name, argument, dim) not in FREE:
                    with pytest.raises(RuntimeError, match=f"{name}: "):
                        raw(name, **{argument: good.new_zeros(shape)})


OTHERS = {
    "x": "weight|delta|grad|cos",
    "gate": "up",
    "grad": "gate|x",
    "q": "cos|k|key_cache",
    "k": "v|key_cache",
    "key_cache": "value_cache",
}
"""Arguments that set the dtype or the sizes: the error is then about another one."""
LOW_TOO = {("rotary", "x"), ("embedding", "weight"), ("embedding_backward", "grad")}
"""Arguments that may be bfloat16 whatever the others are."""
FREE = {
    ("rms_norm", "x", 0), ("rotary", "x", 1), ("rotary_write", "q", 1), ("embedding", "ids", 0),
    ("embedding", "weight", 0), ("embedding", "weight", 1), ("embedding_backward", "grad", 1),
}  # fmt: skip
"""Sizes that nothing else sets."""


def test_ids_and_slots_out_of_range_are_named():
    backend("compiled", torch.float32)
    for bad in (-1, 8, 2**62):
        with pytest.raises(RuntimeError, match=rf"rotary_write: slots\[1\]={bad} of 8 slots"):
            raw("rotary_write", slots=torch.tensor([0, bad, 1]))
    for bad in (-1, 5, -(2**63)):
        with pytest.raises(RuntimeError, match=rf"embedding: ids\[1\]={bad} of 5 rows"):
            raw("embedding", ids=torch.tensor([0, bad]))
        with pytest.raises(RuntimeError, match=rf"embedding_backward: ids\[1\]={bad} of 5 rows"):
            raw("embedding_backward", ids=torch.tensor([0, bad]))
    with pytest.raises(RuntimeError, match="num_rows=-1 is negative"):
        raw("embedding_backward", num_rows=-1)
    with pytest.raises(RuntimeError, match="the head dim 7 is odd"):
        raw("rotary", x=torch.zeros(3, 2, 7), cos=torch.zeros(3, 7), sin=torch.zeros(3, 7))
    with pytest.raises(RuntimeError, match="key_cache is not contiguous"):
        raw("rotary_write", key_cache=torch.zeros(2, 2, 4, 8).transpose(1, 2))


def test_writing_pages_has_no_gradients():
    ops = backend("compiled", torch.float32)
    good = GOOD["rotary_write"]
    with pytest.raises(ValueError, match="rotary_write has no gradients"):
        ops.rotary_write(*(good | {"k": torch.zeros(3, 2, 8, requires_grad=True)}).values())

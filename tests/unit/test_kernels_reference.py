"""The spec against independent implementations: torch's SDPA and transformers' Llama layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from kernels import reference
from kernels.paged import PagedLayout


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_bitwise_that_of_llama(dtype):
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    norm.weight.data = draw(48, seed=1, dtype=dtype)
    x = draw(7, 48, dtype=dtype)
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_rotary_is_that_of_llama():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=128)
    q, k = draw(11, 4, 16, dtype=torch.float32), draw(11, 2, 16, seed=1, dtype=torch.float32)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(5, 16)[None])
    expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(reference.rotary(q, cos[0], sin[0]), expected_q[0].transpose(0, 1))
    torch.testing.assert_close(reference.rotary(k, cos[0], sin[0]), expected_k[0].transpose(0, 1))


def test_rotary_keeps_the_input_dtype_and_rounds_once():
    x = draw(3, 2, 8, dtype=torch.bfloat16)
    angle = draw(3, 4, seed=1, dtype=torch.float32).repeat(1, 2)
    got = reference.rotary(x, angle.cos(), angle.sin())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, reference.rotary(x.float(), angle.cos(), angle.sin()).bfloat16())


def test_silu_gate_is_that_of_llama():
    mlp = LlamaMLP(LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12)).double()
    x = draw(5, 8)
    got = reference.linear(reference.silu_gate(mlp.gate_proj(x), mlp.up_proj(x)), mlp.down_proj.weight)
    torch.testing.assert_close(got, mlp(x), rtol=0, atol=1e-14)


def test_attention_varlen_is_sdpa_on_each_document():
    bounds = [0, 1, 1, 8, 10]
    q, k, v = draw(10, 6, 8), draw(10, 2, 8, seed=1), draw(10, 2, 8, seed=2)
    out, lse = reference.attention_varlen(q, k, v, bounds, scale=0.3)
    for start, stop in ((0, 1), (1, 8), (8, 10)):
        heads_first = [t[start:stop].transpose(0, 1)[None] for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[start:stop], expected[0].transpose(0, 1), rtol=0, atol=1e-14)
    # the first query of a document sees one key: its lse is that score
    torch.testing.assert_close(lse[8], (q[8] * k[8].repeat_interleave(3, 0)).sum(-1) * 0.3)


def test_attention_varlen_window_hides_old_keys():
    q, k, v = draw(6, 1, 4), draw(6, 1, 4, seed=1), draw(6, 1, 4, seed=2)
    out, lse = reference.attention_varlen(q, k, v, [0, 6], window=2, scale=0.5)
    for i in range(6):
        low = max(0, i - 1)
        scores = (k[low : i + 1, 0] @ q[i, 0]) * 0.5
        torch.testing.assert_close(lse[i, 0], scores.logsumexp(0))
        torch.testing.assert_close(out[i, 0], scores.softmax(0) @ v[low : i + 1, 0])


def test_uneven_kv_index_picks_the_named_heads():
    q, k, v = draw(5, 3, 4), draw(5, 2, 4, seed=1), draw(5, 2, 4, seed=2)
    out, lse = reference.attention_varlen(q, k, v, [0, 5], kv_index=(0, 1, 1), scale=0.5)
    for n, kv in enumerate((0, 1, 1)):
        one = [q[:, n : n + 1], k[:, kv : kv + 1], v[:, kv : kv + 1]]
        expected, expected_lse = reference.attention_varlen(*one, [0, 5], scale=0.5)
        torch.testing.assert_close(out[:, n : n + 1], expected)
        torch.testing.assert_close(lse[:, n : n + 1], expected_lse)


def test_prefix_and_document_merge_to_one_attention():
    q, k, v = draw(4, 2, 8), draw(9, 2, 8, seed=1), draw(9, 2, 8, seed=2)
    parts = [
        reference.attention_prefix(q, k[:5], v[:5], scale=0.4),
        reference.attention_varlen(q, k[5:], v[5:], [0, 4], scale=0.4),
    ]
    out, lse = reference.merge_attention(parts)
    whole_q = torch.cat((q.new_zeros(5, 2, 8), q))
    expected, expected_lse = reference.attention_varlen(whole_q, k, v, [0, 9], scale=0.4)
    torch.testing.assert_close(out, expected[5:], rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, expected_lse[5:], rtol=0, atol=1e-14)


def test_merging_an_empty_part_changes_nothing():
    q, k, v = draw(4, 2, 8), draw(4, 2, 8, seed=1), draw(4, 2, 8, seed=2)
    part = reference.attention_varlen(q, k, v, [0, 4], scale=0.4)
    empty = reference.attention_prefix(q, k[:0], v[:0], scale=0.4)
    assert empty[1].isneginf().all()
    for parts in ([empty, part], [part, empty]):
        out, lse = reference.merge_attention(parts)
        assert torch.equal(out, part[0]) and torch.equal(lse, part[1])
    out, lse = reference.merge_attention([empty, empty])
    assert torch.equal(out, torch.zeros_like(out)) and lse.isneginf().all()


def test_merge_is_differentiable_through_out_and_lse():
    parts = [(draw(2, 2, 3, seed=i).requires_grad_(), draw(2, 2, seed=9 + i).requires_grad_()) for i in (0, 1)]
    flat = [t for part in parts for t in part]
    assert torch.autograd.gradcheck(lambda a, la, b, lb: reference.merge_attention([(a, la), (b, lb)]), flat)


@pytest.mark.parametrize("prefix", [0, 3])
def test_paged_attention_is_the_packed_one(prefix):
    """Two requests in shuffled pages, the second as a later chunk; unused slots hold NaN, unused entries nonsense."""
    q, k, v = draw(12, 4, 8), draw(12, 2, 8, seed=1), draw(12, 2, 8, seed=2)
    prefix_k, prefix_v = draw(prefix, 2, 8, seed=3), draw(prefix, 2, 8, seed=4)
    cache = [torch.full((9, 4, 2, 8), math.nan, dtype=torch.float64) for _ in range(2)]
    layout = PagedLayout.build(
        [5, 3],
        [5, 7],
        [[7, 2, -1], [5, 0]],
        page_size=4,
        prefix_lengths=[0, prefix],
        prefix_tables=[[10**9], [8]],
    )
    reference.write_pages(*cache, k, v, torch.cat((layout.slots(0), layout.slots(1))))
    reference.write_pages(*cache, prefix_k, prefix_v, layout.slots(1, prefix=True))
    rows = torch.tensor([0, 1, 2, 3, 4, 9, 10, 11])
    out, lse = reference.attention_paged(q[rows], *cache, layout, scale=0.3)
    expected = reference.attention_varlen(q, k, v, [0, 5, 12], scale=0.3)
    merged = reference.merge_attention(
        [reference.attention_prefix(q[5:], prefix_k, prefix_v, scale=0.3), (expected[0][5:], expected[1][5:])]
    )
    torch.testing.assert_close(out, torch.cat((expected[0][:5], merged[0]))[rows], rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, torch.cat((expected[1][:5], merged[1]))[rows], rtol=0, atol=1e-14)


def test_log_softmax_works_in_float32_for_low_precision():
    logits = draw(3, 50, dtype=torch.bfloat16)
    got = reference.log_softmax(logits)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.log_softmax(logits.float(), -1))
    assert reference.log_softmax(logits.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": [0, 3]}, r"cu_seqlens=\[0, 3\] must rise from 0 to the 4 packed tokens"),
        ({"cu_seqlens": [0, 3, 2, 4]}, "must rise from 0"),
        ({"cu_seqlens": [], "kv_index": None}, "must rise from 0"),
        ({"kv_index": (0, 2)}, r"kv_index=\(0, 2\) must hold 2 entries .* in 0..1"),
        ({"kv_index": (0,)}, "must hold 2 entries"),
        ({"num_kv_heads": 3}, "needs num_heads divisible by num_kv_heads, got 2 and 3"),
        ({"head_dim": 6}, "must share the head dim"),
        ({"dtype": torch.float32}, "use one dtype"),
    ],
)
def test_bad_attention_arguments_are_named(arguments, message):
    kv_shape = (4, arguments.get("num_kv_heads", 2), arguments.get("head_dim", 8))
    k = draw(*kv_shape, dtype=arguments.get("dtype", torch.float64))
    with pytest.raises(ValueError, match=message):
        reference.attention_varlen(
            draw(4, 2, 8),
            k,
            k,
            arguments.get("cu_seqlens", [0, 4]),
            kv_index=arguments.get("kv_index"),
            scale=1.0,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_lengths": [0]}, r"chunk 0: query_lengths=0 must lie in 1..kv_lengths=5"),
        ({"query_lengths": [6]}, r"chunk 0: query_lengths=6"),
        ({"kv_lengths": [5, 5]}, "one entry per chunk, got 1, 2 and 1"),
        ({"block_tables": [[3]]}, r"block_tables\[0\] has 1 pages of 4 slots for 5 keys"),
        ({"block_tables": torch.zeros(1, 1, dtype=torch.int32)}, "has 1 pages of 4 slots for 5 keys"),
        ({"block_tables": []}, "block_tables has 0 rows for 1 chunks"),
        ({"prefix_lengths": [9], "prefix_tables": [[1, 2]]}, r"prefix_tables\[0\] has 2 pages"),
        ({"page_size": 0}, "page_size=0 must be at least 1"),
    ],
)
def test_bad_layouts_are_named(arguments, message):
    good = {"query_lengths": [2], "kv_lengths": [5], "block_tables": [[3, 1]], "page_size": 4}
    with pytest.raises(ValueError, match=message):
        PagedLayout.build(**(good | arguments))

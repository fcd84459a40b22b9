"""ChatGLM and Baichuan, which came with code of their own: files, logits and gradients against that code's maths.

The oracles compute from the tensors as they are in the files, with none of our kernels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import Architecture, ConfigError
from parallel.comm import Group
from parallel.loss import cross_entropy
from parallel.model.directory import DirectorySource
from parallel.model.hf import parameter_shapes, places, read_architecture, write_config
from tests.models import BAICHUAN, BAICHUAN_13B, GLM, RandomWeights, in_files
from tests.unit.test_decoder import our_model, packed_step

CHATGLM_CONFIG = {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "ffn_hidden_size": 100,
    "hidden_size": 72, "kv_channels": 8, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
    "multi_query_group_num": 3, "num_attention_heads": 9, "num_layers": 5, "original_rope": True,
    "padded_vocab_size": 101, "post_layer_norm": True, "rmsnorm": True, "seq_length": 256, "rope_ratio": 50,
    "tie_word_embeddings": False,
}  # fmt: skip
BAICHUAN_CONFIG = {
    "model_type": "baichuan", "hidden_act": "silu", "hidden_size": 72, "intermediate_size": 100,
    "max_position_embeddings": 256, "num_attention_heads": 9, "num_hidden_layers": 5, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "vocab_size": 101, "z_loss_weight": 0,
}  # fmt: skip
BAICHUAN_13B_CONFIG = {
    **{key: value for key, value in BAICHUAN_CONFIG.items() if key != "max_position_embeddings"},
    "model_max_length": 256,
}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def attention(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = torch.einsum("tnh,snh->nts", q_TNH, k_TNH) / math.sqrt(q_TNH.shape[-1]) + bias
    scores = scores + torch.full(scores.shape[1:], -math.inf, dtype=scores.dtype).triu(1)
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v_TNH).flatten(1)


def chatglm(w: Mapping[str, Tensor], ids_T: Tensor) -> Tensor:
    """Logits [T, V]."""
    c, head, groups = CHATGLM_CONFIG, 8, 3
    eps, count = 1e-5, len(ids_T)
    x = w["transformer.embedding.word_embeddings.weight"][ids_T]
    turned = head // 2
    base = 10000 * 50
    theta = 1.0 / base ** (torch.arange(0, turned, 2, dtype=x.dtype) / turned)
    angle = torch.outer(torch.arange(count, dtype=x.dtype), theta)
    cache = torch.stack((angle.cos(), angle.sin()), -1)[:, None]  # [T, 1, turned / 2, 2]

    def rotate(y: Tensor) -> Tensor:
        pairs, rest = y[..., :turned].unflatten(-1, (-1, 2)), y[..., turned:]
        out = torch.stack(
            (
                pairs[..., 0] * cache[..., 0] - pairs[..., 1] * cache[..., 1],
                pairs[..., 1] * cache[..., 0] + pairs[..., 0] * cache[..., 1],
            ),
            -1,
        )
        return torch.cat((out.flatten(-2), rest), -1)

    for layer in range(c["num_layers"]):
        p = f"transformer.encoder.layers.{layer}."
        mixed = F.linear(
            norm(x, w[f"{p}input_layernorm.weight"], eps),
            w[f"{p}self_attention.query_key_value.weight"],
            w[f"{p}self_attention.query_key_value.bias"],
        )
        q, k, v = (y.unflatten(-1, (-1, head)) for y in mixed.split([72, groups * head, groups * head], -1))
        q, k = rotate(q), rotate(k)
        k, v = (y[:, :, None].expand(-1, -1, 9 // groups, -1).flatten(1, 2) for y in (k, v))
        x = x + F.linear(attention(q, k, v), w[f"{p}self_attention.dense.weight"])
        h = F.linear(norm(x, w[f"{p}post_attention_layernorm.weight"], eps), w[f"{p}mlp.dense_h_to_4h.weight"])
        gate, up = h.chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, w[f"{p}mlp.dense_4h_to_h.weight"])
    x = norm(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return F.linear(x, w["transformer.output_layer.weight"])


def published_slopes(heads: int) -> list[float]:
    """Baichuan-13B's, as its code computes them."""

    def of_power(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return of_power(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return of_power(closest) + published_slopes(2 * closest)[0::2][: heads - closest]


def baichuan(w: Mapping[str, Tensor], ids_T: Tensor, *, alibi: bool) -> Tensor:
    """Logits [T, V]."""
    eps, head, count = 1e-6, 8, len(ids_T)
    x = w["model.embed_tokens.weight"][ids_T]
    position = torch.arange(count, dtype=x.dtype)
    slopes = torch.tensor(published_slopes(9), dtype=x.dtype)
    bias = slopes[:, None, None] * position[None, None] if alibi else 0.0
    angle = torch.outer(position, 10000 ** (-torch.arange(0, head, 2, dtype=x.dtype) / head)).repeat(1, 2)[:, None]

    def rotate(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y if alibi else y * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    for layer in range(5):
        p = f"model.layers.{layer}."
        packed = F.linear(norm(x, w[f"{p}input_layernorm.weight"], eps), w[f"{p}self_attn.W_pack.weight"])
        q, k, v = (y.unflatten(-1, (9, head)) for y in packed.unflatten(-1, (3, 72)).unbind(-2))
        x = x + F.linear(attention(rotate(q), rotate(k), v, bias), w[f"{p}self_attn.o_proj.weight"])
        h = norm(x, w[f"{p}post_attention_layernorm.weight"], eps)
        h = F.silu(F.linear(h, w[f"{p}mlp.gate_proj.weight"])) * F.linear(h, w[f"{p}mlp.up_proj.weight"])
        x = x + F.linear(h, w[f"{p}mlp.down_proj.weight"])
    return F.linear(norm(x, w["model.norm.weight"], eps), F.normalize(w["lm_head.weight"]))


@dataclass(frozen=True)
class Published:
    """A model: its config.json, what it is for us, and its code's maths."""

    config: Mapping[str, Any]
    architecture: Architecture
    logits: Callable[[Mapping[str, Tensor], Tensor], Tensor]


PUBLISHED = {
    "chatglm": Published(CHATGLM_CONFIG, replace(GLM, norm_eps=1e-5, rope_theta=5e5), chatglm),
    "baichuan2_7b": Published(BAICHUAN_CONFIG, BAICHUAN, lambda w, ids: baichuan(w, ids, alibi=False)),
    "baichuan2_13b": Published(BAICHUAN_13B_CONFIG, BAICHUAN_13B, lambda w, ids: baichuan(w, ids, alibi=True)),
}
IDS = torch.randint(0, 101, (40,), generator=torch.Generator().manual_seed(2))


def write(folder: Path, published: Published) -> dict[str, Tensor]:
    """A model directory with random weights; returns the tensors of its file."""
    weights = RandomWeights(published.architecture).state(torch.float64)
    tensors = in_files(weights, places(published.architecture, published.config))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(published.config))
    return tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_every_gradient_are_the_published_codes(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    tensors = {key: value.requires_grad_() for key, value in write(tmp_path, published).items()}
    source = DirectorySource(tmp_path)
    assert source.architecture == published.architecture
    decoder = our_model(source, torch.float64, trainable=True)  # pyright: ignore[reportArgumentType]
    hidden = decoder(IDS, packed_step(decoder, (len(IDS),)))
    expected = published.logits(tensors, IDS)
    with torch.no_grad():
        ours = decoder.logits(hidden)
        assert (ours - expected).abs().max() < 1e-10 * expected.abs().max()
    loss = cross_entropy(
        hidden[:-1], decoder.head_weight, IDS[1:], first_row=0, tensor=Group("tensor"), ops=decoder.ops
    )
    total = F.cross_entropy(expected[:-1], IDS[1:], reduction="sum")
    assert abs(loss.item() - total.item()) < 1e-10 * total.item()
    loss.backward()
    total.backward()
    found = places(source.architecture, source.hf_config)
    for spec, parameter in decoder.placed():
        place = found[spec.name]
        whole = tensors[place.name].grad
        assert whole is not None and parameter.grad is not None
        theirs = whole[place.first_row : place.first_row + len(parameter)]
        assert (parameter.grad - theirs).norm() < 1e-9 * theirs.norm().clamp(min=1e-3), spec.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_frozen_models_in_float32_give_the_same_logits(name: str, tmp_path: Path) -> None:
    tensors = write(tmp_path, PUBLISHED[name])
    decoder = our_model(DirectorySource(tmp_path), torch.float32)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        ours = decoder.logits(decoder(IDS, packed_step(decoder, (len(IDS),))))
        theirs = PUBLISHED[name].logits(tensors, IDS)
    assert torch.allclose(ours.double(), theirs, atol=2e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_blocks_of_joined_tensors_are_ranges_of_their_rows(name: str, tmp_path: Path) -> None:
    write(tmp_path, PUBLISHED[name])
    source, weights = DirectorySource(tmp_path), RandomWeights(PUBLISHED[name].architecture)
    for key, shape in parameter_shapes(source.architecture).items():
        index = (slice(1, shape[0] - 3), *(slice(2, size - 1) for size in shape[1:]))
        assert torch.equal(source.read(key, index, torch.float64), weights.full(key)[index]), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_is_written_back_as_it_was(name: str) -> None:
    published = PUBLISHED[name]
    written = write_config(published.architecture, published.config, "float32")
    assert read_architecture(written) == published.architecture
    assert {key: written[key] for key in published.config} == published.config


def test_slopes_are_the_published_ones() -> None:
    from parallel.model.alibi import slopes

    for heads in (1, 8, 9, 12, 40, 64):
        assert slopes(heads) == pytest.approx(published_slopes(heads), rel=1e-12)


def test_the_first_models_have_a_plain_head() -> None:
    config = {key: value for key, value in BAICHUAN_CONFIG.items() if key != "z_loss_weight"}
    assert not read_architecture(config).normalised_head
    assert read_architecture({**config, "vocab_size": 125696}).normalised_head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multi_query_attention": False}, "multi_query_attention=False is not supported with model_type=chatglm"),
        ({"add_bias_linear": True}, "add_bias_linear=True is not supported with model_type=chatglm"),
        ({"_name_or_path": "THUDM/chatglm2-6b-32k"}, "rope_ratio=50 is not supported for ChatGLM2"),
        ({"num_layers": None}, "has no num_layers"),
    ],
)
def test_other_variants_of_chatglm_are_refused(change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**CHATGLM_CONFIG, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        read_architecture(config)

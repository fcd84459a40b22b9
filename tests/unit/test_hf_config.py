"""config.json in both directions, against transformers' own reading of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from conf.schema import Architecture, ConfigError, RopeScaling
from parallel.model.hf import check_parameters, parameter_shapes, places, read_architecture, write_config

SMALL = Architecture(
    num_layers=3,
    width=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    ffn_width=40,
    vocab_size=50,
    max_positions=128,
    norm_eps=1e-6,
)
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 50,
}
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_positions=32)
FULL_YARN = RopeScaling(
    kind="yarn",
    factor=4.0,
    original_max_positions=32,
    beta_fast=16.0,
    beta_slow=2.0,
    attention_factor=1.5,
    mscale=0.7,
    mscale_all_dim=0.9,
    truncate=False,
)
GEMMA2 = replace(
    SMALL,
    norm_offset=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=24**0.5,
    attention_scalar=6.0,
    score_cap=50.0,
    logit_cap=30.0,
    tied_embeddings=True,
    sliding_window=16,
    window_layers=(True, False, True),
)
GEMMA3 = replace(GEMMA2, qk_norm=True, score_cap=None, logit_cap=None, rope_theta=1e6, window_rope_theta=1e4)
GLM = replace(SMALL, norm_eps=1e-5, qkv_bias=True, rotary_dim=2, rotary_interleaved=True)
ARCHITECTURES = {
    "llama": SMALL,
    "tied": replace(SMALL, tied_embeddings=True),
    "biases": replace(SMALL, qkv_bias=True, output_bias=True, mlp_bias=True),
    "wide heads": replace(SMALL, head_dim=8),
    "linear": replace(SMALL, rope_scaling=RopeScaling(kind="linear", factor=2.0), rope_theta=5e5),
    "llama3": replace(SMALL, rope_scaling=LLAMA3),
    "yarn": replace(SMALL, rope_scaling=YARN),
    "full yarn": replace(SMALL, rope_scaling=FULL_YARN),
    "qwen2": replace(SMALL, qkv_bias=True),
    "qwen2 window": replace(SMALL, qkv_bias=True, sliding_window=16, window_layers=(False, True, True)),
    "qwen2 window everywhere": replace(SMALL, qkv_bias=True, sliding_window=16),
    "mistral window": replace(SMALL, sliding_window=16),
    "qwen3": replace(SMALL, qk_norm=True, head_dim=8),
    "qwen3 window": replace(
        SMALL, qk_norm=True, qkv_bias=True, output_bias=True, sliding_window=16, window_layers=(False, True, True)
    ),
    "gemma2": GEMMA2,
    "gemma2 plain": replace(GEMMA2, score_cap=None, logit_cap=None, attention_scalar=None, sliding_window=16),
    "gemma3": GEMMA3,
    "gemma3 scaled": replace(GEMMA3, rope_scaling=RopeScaling(kind="linear", factor=8.0), rope_theta=1e4),
    "glm": GLM,
    "glm4": replace(GLM, post_norms=True, head_dim=8, rotary_dim=4),
    "gemma3 global": replace(GEMMA3, sliding_window=None, window_layers=None, window_rope_theta=None),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_through_transformers(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    written = write_config(architecture, None, "bfloat16")
    assert read_architecture(written) == architecture
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert str(theirs.dtype) == "torch.bfloat16"
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in again
    assert read_architecture(again) == architecture
    back = write_config(architecture, again, "float32")
    assert "rope_parameters" not in back
    assert read_architecture(back) == architecture
    (tmp_path / "config.json").write_text(json.dumps(back))
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {
        **theirs.to_dict(),
        "dtype": "float32",
        "transformers_version": AutoConfig.from_pretrained(tmp_path).to_dict()["transformers_version"],
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_transformers(name: str) -> None:
    architecture = ARCHITECTURES[name]
    written = write_config(architecture, None, "float32")
    model_type = written.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **written))
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert {place.name: place.shape for place in places(architecture, {"model_type": model_type}).values()} == theirs


def test_model_type_fits_the_features() -> None:
    types = {
        name: write_config(architecture, None, "float32")["model_type"] for name, architecture in ARCHITECTURES.items()
    }
    assert types["biases"] == "llama"
    assert types["qwen2"] == types["qwen2 window"] == "qwen2"
    assert types["mistral window"] == "mistral"


@pytest.mark.parametrize(
    ("model_type", "theirs"),
    [("llama", LlamaConfig), ("mistral", MistralConfig), ("qwen2", Qwen2Config), ("qwen3", Qwen3Config)],
)
def test_absent_keys_mean_what_transformers_means(model_type: str, theirs: Any) -> None:
    sizes = {**SIZES, "num_attention_heads": 8 if model_type == "mistral" else 32, "hidden_size": 128}
    ours = read_architecture({"model_type": model_type, **sizes})
    config = theirs(**sizes)
    assert ours.num_kv_heads == config.num_key_value_heads
    assert ours.max_positions == config.max_position_embeddings
    assert ours.norm_eps == config.rms_norm_eps
    assert ours.rope_theta == config.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == config.tie_word_embeddings
    assert ours.sliding_window == getattr(config, "sliding_window", None)


@pytest.mark.parametrize(("model_type", "theirs"), [("gemma2", Gemma2Config), ("gemma3_text", Gemma3TextConfig)])
def test_absent_keys_of_gemma_mean_what_transformers_means(model_type: str, theirs: Any) -> None:
    sizes = {**SIZES, "num_hidden_layers": 7}
    sizes["num_attention_heads"] = 8
    ours, config = read_architecture({"model_type": model_type, **sizes}), theirs(**sizes)
    assert (ours.num_kv_heads, ours.head_dim) == (config.num_key_value_heads, config.head_dim)
    assert (ours.max_positions, ours.norm_eps) == (config.max_position_embeddings, config.rms_norm_eps)
    assert (ours.score_cap, ours.logit_cap) == (config.attn_logit_softcapping, config.final_logit_softcapping)
    assert ours.score_scale == config.query_pre_attn_scalar**-0.5
    assert (ours.tied_embeddings, ours.sliding_window) == (config.tie_word_embeddings, config.sliding_window)
    assert ours.window_layers == tuple(kind == "sliding_attention" for kind in config.layer_types)
    rope = config.rope_parameters
    bases = (rope.get("full_attention", rope)["rope_theta"], rope.get("sliding_attention", {}).get("rope_theta"))
    assert (ours.rope_theta, ours.window_rope_theta) == bases


def test_nulls_are_defaults() -> None:
    config = {
        **SIZES,
        "model_type": "llama",
        "num_key_value_heads": None,
        "head_dim": None,
        "rope_scaling": None,
    }
    architecture = read_architecture({**config, "rope_theta": None, "quantization_config": None})
    assert (architecture.num_kv_heads, architecture.head_dim, architecture.rope_theta) == (6, 4, 10000.0)
    assert read_architecture({**SIZES, "model_type": "mistral", "num_key_value_heads": 6, "sliding_window": None}) == (
        replace(SMALL, num_kv_heads=6, max_positions=131072)
    )


def test_xverse_is_a_llama_without_grouping() -> None:
    config = {
        **SIZES,
        "model_type": "xverse",
        "max_tokenizer_truncation": 6144,
        "max_position_embeddings": 8192,
    }
    assert read_architecture(config) == replace(SMALL, num_kv_heads=6, max_positions=8192)
    written = write_config(read_architecture(config), {**config, "bos_token_id": 2}, "bfloat16")
    assert (written["model_type"], written["bos_token_id"]) == ("xverse", 2)


def test_old_spelling_of_rope_scaling() -> None:
    config = {**SIZES, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}
    assert read_architecture(config).rope_scaling == RopeScaling(kind="linear", factor=2.0)


def test_qwen2_window_from_max_window_layers() -> None:
    config = {**SIZES, "model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 9}
    assert read_architecture({**config, "max_window_layers": 2}).sliding_window is None
    windowed = {**config, "use_sliding_window": True}
    assert read_architecture({**windowed, "max_window_layers": 2}).window_layers == (False, False, True)
    assert read_architecture({**windowed, "max_window_layers": 0}).window_layers is None
    assert read_architecture({**windowed, "max_window_layers": 3}).sliding_window is None


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gptj"}, "model_type='gptj' is not supported; use one of ['baichuan', 'chatglm', 'gemma2', 'ge"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported is silu"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "24"}, "hidden_size='24' must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({"hidden_size": 25}, "hidden_size=25 is not a multiple of num_attention_heads=6"),
        ({"head_dim": 3}, "head_dim=3 must be even"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x' must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4} is not supported'),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; supported is 0.0"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type='longrope' is not supported; supported "),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing; rope_type=linear needs it"),
        ({"rope_scaling": {**LINEAR, "factor": "2"}}, "rope_scaling.factor='2' must be a positive number"),
        ({"rope_scaling": {**LINEAR, "beta_fast": 3}}, "rope_scaling.beta_fast is not supported with rope_type=linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate=1 must be true or false"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention is not supp"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; supported is 1.0"),
        ({"layer_types": ["full_attention"]}, "layer_types must list 3 layers"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types has 'chunked_att"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types has sliding_attention; model_type=llama has no win"),
    ],
)  # fmt: skip
def test_unsupported_configs_name_the_key(change: dict[str, Any], message: str) -> None:
    config = {**SIZES, "model_type": "llama", **change}
    if config["hidden_size"] is None:
        del config["hidden_size"]
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_architecture(config)


def test_what_no_model_type_expresses_is_refused() -> None:
    odd = replace(SMALL, mlp_bias=True)
    assert write_config(odd, None, "float32")["model_type"] == "llama"
    with pytest.raises(ConfigError, match="model_type=llama can't express"):
        write_config(replace(SMALL, output_bias=True), None, "float32")
    with pytest.raises(ConfigError, match="model_type=qwen2 can't express"):
        write_config(SMALL, {"model_type": "qwen2"}, "float32")
    with pytest.raises(ConfigError, match=r"model.dtype=int8 can't be written"):
        write_config(SMALL, None, "int8")


def test_check_parameters_lists_what_is_wrong() -> None:
    shapes = parameter_shapes(SMALL)
    check_parameters(SMALL, {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}, "here")
    wrong = {**shapes, "model.layers.0.self_attn.q_proj.bias": (24,), "model.norm.weight": (23,)}
    del wrong["lm_head.weight"]
    with pytest.raises(ConfigError) as caught:
        check_parameters(SMALL, wrong, "here")
    assert str(caught.value).splitlines() == [
        "here doesn't hold the weights its config describes:",
        "  lm_head.weight is missing",
        "  model.norm.weight has shape [23], its config says [24]",
        "  model.layers.0.self_attn.q_proj.bias is there but its config has no such parameter",
    ]

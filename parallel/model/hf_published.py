"""The config.json of models that came with code of their own instead of a class in transformers: ChatGLM and Baichuan.

`read` turns one into the keys that transformers' configs have, `write` goes back; other configs pass unchanged.

| model type | what it has of its own                                                                              |
|------------|-----------------------------------------------------------------------------------------------------|
| chatglm    | other names of keys; the rotary base is 10000 * rope_ratio                                          |
| baichuan   | the 13B models have ALiBi, known by their lack of max_position_embeddings (model_max_length only);  |
|            | Baichuan 2 normalises the head, known by its z_loss_weight or its vocabulary of 125696              |
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from conf.schema import Architecture, ConfigError
from parallel.model.hf_values import positive

# theirs -> transformers'
_CHATGLM: Mapping[str, str] = MappingProxyType(
    {
        "num_layers": "num_hidden_layers",
        "multi_query_group_num": "num_key_value_heads",
        "kv_channels": "head_dim",
        "ffn_hidden_size": "intermediate_size",
        "padded_vocab_size": "vocab_size",
        "seq_length": "max_position_embeddings",
        "layernorm_epsilon": "rms_norm_eps",
        "add_qkv_bias": "attention_bias",
    }
)
# what the published code can do otherwise, with the values that the published models have
_FIXED: Mapping[str, bool] = MappingProxyType(
    {
        "multi_query_attention": True,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
    }
)
_BAICHUAN2_VOCABULARY = 125696


def read(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """(the config in transformers' keys, fields of the architecture that those have no key for).

    Raises:
        ConfigError: a variant of ChatGLM that no published model is.
    """
    if config.get("model_type") == "chatglm":
        return _chatglm(config), {}
    if config.get("model_type") != "baichuan":
        return config, {}
    alibi = config.get("max_position_embeddings") is None
    normalised = "z_loss_weight" in config or config.get("vocab_size") == _BAICHUAN2_VOCABULARY
    positions = config.get("max_position_embeddings") or config.get("model_max_length", 4096)
    return {**config, "max_position_embeddings": positions}, {"alibi": alibi, "normalised_head": normalised}


def write(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """A config with transformers' keys in those of its `model_type`."""
    config = dict(config)
    if config["model_type"] == "chatglm":
        names = {common: theirs for theirs, common in _CHATGLM.items()}
        base = config.pop("rope_theta")
        for key in ("rope_scaling", "partial_rotary_factor"):
            del config[key]
        renamed = {names.get(key, key): value for key, value in config.items()}
        return {**renamed, **_FIXED, "rope_ratio": base / 10000}
    if config["model_type"] == "baichuan":
        if architecture.alibi:
            config["model_max_length"] = config.pop("max_position_embeddings")
        if architecture.normalised_head:
            config["z_loss_weight"] = 0
    return config


def _chatglm(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ConfigError(
                f"config.json {key}={config[key]!r} is not supported with model_type=chatglm; supported is {value} "
                "(ChatGLM2, ChatGLM3 and GLM-4)"
            )
    if "num_layers" not in config or "multi_query_group_num" not in config:
        raise ConfigError(
            "config.json has no num_layers or no multi_query_group_num; model_type=chatglm means ChatGLM2, ChatGLM3 "
            "and GLM-4 (the first ChatGLM is another model)"
        )
    if config.get("rope_ratio", 1) != 1 and "chatglm2" in str(config.get("_name_or_path", "")).lower():
        raise ConfigError(
            f"config.json rope_ratio={config['rope_ratio']} is not supported for ChatGLM2, which divides positions by "
            "it where later models stretch the rotary base"
        )
    common = {_CHATGLM.get(key, key): value for key, value in config.items() if key not in _FIXED}
    return {**common, "rope_theta": 10000.0 * positive(config, "rope_ratio", 1.0)}

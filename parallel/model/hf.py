"""Hugging Face's config.json in both directions, and the names and shapes of the parameters in their files.

Only this file and the readers beside it know Hugging Face's spelling: `read_architecture` turns a config.json into
an `Architecture`, `write_config` goes back. Supported `model_type`s are the Llama family: llama, mistral, qwen2 and
xverse are configurations of one decoder. Whatever would change the numbers and isn't supported is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conf.schema import Architecture, ConfigError
from parallel.model.hf_rope import read_rope, write_rope


@dataclass(frozen=True)
class _Family:
    """What a model_type leaves unsaid in its config.json, or can't say there."""

    max_positions: int
    kv_heads: int | None
    """num_key_value_heads when the key is absent; None means as many as query heads."""
    window: int | None = None
    """sliding_window when the key is absent."""
    qkv_bias: bool = False
    attention_bias_key: bool = False
    """Whether `attention_bias` (q, k, v and o) and `mlp_bias` exist."""
    architecture: str = ""


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "llama": _Family(2048, None, attention_bias_key=True, architecture="LlamaForCausalLM"),
        "mistral": _Family(131072, 8, window=4096, architecture="MistralForCausalLM"),
        "qwen2": _Family(32768, 32, window=4096, qkv_bias=True, architecture="Qwen2ForCausalLM"),
        "xverse": _Family(8192, None, architecture="XverseForCausalLM"),
    }
)

# keys that would change the numbers, with the only values under which they don't
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "quantization_config": (None,),
        "quantization_bit": (None, 0),
        "attention_dropout": (None, 0, 0.0),
        "partial_rotary_factor": (None, 1, 1.0),
        "is_encoder_decoder": (None, False),
    }
)

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        ConfigError: unknown `model_type`, a feature that isn't supported, or a missing or impossible value; the
            message names the key and what is supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ConfigError(f"config.json model_type={model_type!r} is not supported; use one of {sorted(_FAMILIES)}")
    family = _FAMILIES[model_type]
    _refuse_unsupported(config)
    heads = _integer(config, "num_attention_heads")
    kv_heads = _integer(config, "num_key_value_heads", family.kv_heads or heads, absent_if_none=heads)
    layers, width = _integer(config, "num_hidden_layers"), _integer(config, "hidden_size")
    head_dim = _head_dim(config, width, heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    attention_bias = family.attention_bias_key and _flag(config, "attention_bias")
    max_positions = _integer(config, "max_position_embeddings", family.max_positions)
    theta, scaling = read_rope(config, max_positions)
    window, window_layers = _windows(config, model_type, layers)
    return Architecture(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=_integer(config, "intermediate_size"),
        vocab_size=_integer(config, "vocab_size"),
        max_positions=max_positions,
        norm_eps=_positive(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.attention_bias_key and _flag(config, "mlp_bias"),
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        sliding_window=window,
        window_layers=window_layers,
    )


def write_config(architecture: Architecture, base: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """A config.json for `architecture` with weights stored as `dtype` ("float32", "bfloat16", ...).

    `base` is the config.json the model came from: its other keys (token ids, ...) and its model_type are kept.
    Without it the model_type is the first of llama, qwen2 and mistral that can express the architecture.

    Raises:
        ConfigError: no model_type (or not the one of `base`) can express this architecture.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"model.dtype={dtype} can't be written to config.json; use one of {list(_DTYPES)}")
    candidates = [base["model_type"]] if base and "model_type" in base else ["llama", "qwen2", "mistral"]
    for model_type in candidates:
        config = _fields(architecture, model_type)
        if read_architecture(config) == architecture:
            break
    else:
        raise ConfigError(f"config.json model_type={candidates[0]} can't express {architecture}")
    dropped = {
        "rope_parameters",
        "dtype",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
    }
    kept = {key: value for key, value in (base or {}).items() if key not in dropped}
    return {**kept, **config, "architectures": [_FAMILIES[model_type].architecture], "torch_dtype": dtype}


def read_config_file(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigError: the file is missing or isn't a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; a model directory needs it") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter of the full model in canonical order: Hugging Face name -> full shape.

    Linear weights are [out, in]. The head is absent when it is tied to the embedding.
    """
    width, ffn = architecture.width, architecture.ffn_width
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    linears = (
        ("self_attn.q_proj", queries, width, architecture.qkv_bias),
        ("self_attn.k_proj", keys, width, architecture.qkv_bias),
        ("self_attn.v_proj", keys, width, architecture.qkv_bias),
        ("self_attn.o_proj", width, queries, architecture.output_bias),
        ("mlp.gate_proj", ffn, width, architecture.mlp_bias),
        ("mlp.up_proj", ffn, width, architecture.mlp_bias),
        ("mlp.down_proj", width, ffn, architecture.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (architecture.vocab_size, width)}
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (width,)
        for name, rows, columns, has_bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not architecture.tied_embeddings:
        shapes["lm_head.weight"] = (architecture.vocab_size, width)
    return shapes


def check_parameters(architecture: Architecture, found: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raise ConfigError unless `found` (name -> shape) holds exactly the parameters of `architecture`.

    Tolerated beside them: stored rotary frequencies, and a head that is tied anyway. `origin` names the file or
    directory in the message.
    """
    if architecture.num_layers > len(found):
        raise ConfigError(f"{origin}: its config says {architecture.num_layers} layers, it holds {len(found)} tensors")
    expected = parameter_shapes(architecture)
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, its config says {list(expected[name])}")
        elif name not in expected and name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            problems.append(f"{name} is there but its config has no such parameter")
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n  ".join(problems[:5])
        raise ConfigError(f"{origin} doesn't hold the weights its config describes:\n  {listed}{more}")


def _fields(architecture: Architecture, model_type: str) -> dict[str, Any]:
    """The keys of `architecture` as `model_type` spells them (what it can't express is lost)."""
    if model_type not in _FAMILIES:
        raise ConfigError(f"config.json model_type={model_type!r} is not supported; use one of {sorted(_FAMILIES)}")
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_act": architecture.activation,
        "hidden_size": architecture.width,
        "intermediate_size": architecture.ffn_width,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_positions,
        "rms_norm_eps": architecture.norm_eps,
        "tie_word_embeddings": architecture.tied_embeddings,
        **write_rope(architecture.rope_theta, architecture.rope_scaling),
    }
    if _FAMILIES[model_type].attention_bias_key:
        config.update(attention_bias=architecture.output_bias, mlp_bias=architecture.mlp_bias)
    if model_type == "mistral":
        config["sliding_window"] = architecture.sliding_window
    if model_type == "qwen2":
        config.update(_qwen2_windows(architecture))
    return config


def _qwen2_windows(architecture: Architecture) -> dict[str, Any]:
    window = architecture.sliding_window
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    layers = architecture.window_layers or (True,) * architecture.num_layers
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": layers.index(True) if True in layers else architecture.num_layers,
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in layers],
    }


def _windows(config: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """(window in tokens, which layers use it or None for all)."""
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise ConfigError(f"config.json layer_types must list {layers} layers (num_hidden_layers), not {kinds!r}")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"config.json layer_types has {kind!r}; supported are full_attention and sliding_attention"
            )
    if model_type == "mistral":
        if len(set(kinds or ())) > 1:
            raise ConfigError("config.json layer_types mixes kinds of attention; with model_type=mistral all are equal")
        return _optional_window(config), None
    if model_type != "qwen2":
        if "sliding_attention" in (kinds or ()):
            raise ConfigError(f"config.json layer_types has sliding_attention; model_type={model_type} has no window")
        return None, None
    if not _flag(config, "use_sliding_window"):
        if "sliding_attention" in (kinds or ()):
            raise ConfigError("config.json layer_types has sliding_attention but use_sliding_window=false; set it true")
        return None, None
    window = _optional_window(config)
    first = config.get("max_window_layers", 28)
    flags = tuple(kind == "sliding_attention" for kind in kinds) if kinds else tuple(i >= first for i in range(layers))
    if window is None or not any(flags):
        return None, None
    return window, None if all(flags) else flags


def _optional_window(config: Mapping[str, Any]) -> int | None:
    if config.get("sliding_window", 0) is None:
        return None
    return _integer(config, "sliding_window", _FAMILIES["mistral"].window)


def _head_dim(config: Mapping[str, Any], width: int, heads: int) -> int:
    if config.get("head_dim") is None and width % heads:
        raise ConfigError(f"config.json hidden_size={width} is not a multiple of num_attention_heads={heads}")
    head_dim = _integer(config, "head_dim", width // heads, absent_if_none=width // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json head_dim={head_dim} must be even for rotary embeddings")
    return head_dim


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"config.json hidden_act={activation!r} is not supported; supported is silu")
    for key, allowed in _NEUTRAL.items():
        if config.get(key) not in allowed:
            raise ConfigError(
                f"config.json {key}={json.dumps(config[key])[:80]} is not supported; supported is "
                f"{'no such key' if allowed == (None,) else json.dumps(allowed[-1])}"
            )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None, absent_if_none: int | None = None) -> int:
    """A positive integer; `default` if the key is absent, `absent_if_none` if it is there but null."""
    value = config.get(key, default)
    if value is None and key in config and absent_if_none is not None:
        value = absent_if_none
    if value is None:
        raise ConfigError(f"config.json has no {key}; add it")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json {key}={value!r} must be a positive integer")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"config.json {key}={value!r} must be a positive number")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json {key}={value!r} must be true or false")
    return bool(value)

"""Hugging Face's config.json in both directions.

Only this file and the readers beside it know Hugging Face's spelling: `read_architecture` turns a config.json into
an `Architecture`, `write_config` goes back. Each supported `model_type` is a configuration of one decoder. Whatever
would change the numbers and isn't supported is an error.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conf.schema import Architecture, ConfigError
from parallel.model import hf_published
from parallel.model.hf_families import Family, family_of
from parallel.model.hf_rope import local_rope_keys, read_rope, split_local_rope, write_rope
from parallel.model.hf_shapes import parameter_shapes
from parallel.model.hf_values import flag, integer, optional, positive
from parallel.model.hf_windows import read_windows, write_windows
from parallel.model.names import Place

__all__ = [
    "check_layers",
    "check_parameters",
    "parameter_shapes",
    "places",
    "read_architecture",
    "read_config_file",
    "write_config",
]


# keys that would change the numbers, with the only values under which they don't
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "quantization_config": (None,),
        "quantization_bit": (None, 0),
        "attention_dropout": (None, 0, 0.0),
        "is_encoder_decoder": (None, False),
        "use_bidirectional_attention": (None, False),
    }
)

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ACTIVATIONS: Mapping[str, str] = MappingProxyType({"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"})


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        ConfigError: unknown `model_type`, a feature that isn't supported, or a missing or impossible value; the
            message names the key and what is supported.
    """
    family = family_of(config.get("model_type"))
    config, odd = hf_published.read(config)
    _refuse_unsupported(config)
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", family.kv_heads or heads, absent_if_none=heads)
    layers, width = integer(config, "num_hidden_layers"), integer(config, "hidden_size")
    head_dim = _head_dim(config, family.head_dim, width, heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    attention_bias = family.attention_bias is not None and flag(config, "attention_bias", family.attention_bias)
    max_positions = integer(config, "max_position_embeddings", family.max_positions)
    local_theta = None
    if family.local_rope:
        config, local_theta = split_local_rope(config)
    theta, scaling = read_rope(config, max_positions)
    window, window_layers = read_windows(config, family.windows, family.period, layers)
    fields: dict[str, Any] = {
        "qkv_bias": attention_bias,
        "output_bias": attention_bias and family.output_bias,
        "rotary_dim": _rotary_dim(config, family, head_dim),
        "activation": _activation(config, family),
        **(_gemma_fields(config, family, width, head_dim) if family.gemma else {}),
        **family.fixed,
        **odd,
    }
    return Architecture(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=integer(config, "intermediate_size"),
        vocab_size=integer(config, "vocab_size"),
        max_positions=max_positions,
        norm_eps=positive(config, "rms_norm_eps", family.norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        window_rope_theta=None if window is None or (local_theta == theta and scaling is None) else local_theta,
        mlp_bias=family.mlp_bias_key and flag(config, "mlp_bias"),
        tied_embeddings=flag(config, "tie_word_embeddings", family.tied),
        sliding_window=window,
        window_layers=window_layers,
        **fields,
    )


def write_config(architecture: Architecture, base: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """A config.json for `architecture` with weights stored as `dtype` ("float32", "bfloat16", ...).

    `base` is the config.json the model came from: its other keys (token ids, ...) and its model_type are kept.
    Without it the model_type is the first that can express the architecture.

    Raises:
        ConfigError: no model_type (or not the one of `base`) can express this architecture.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"model.dtype={dtype} can't be written to config.json; use one of {list(_DTYPES)}")
    candidates = [base["model_type"]] if base and "model_type" in base else _CANDIDATES
    for model_type in candidates:
        config = _fields(architecture, model_type)
        if _says(config, architecture):
            break
    else:
        raise ConfigError(f"config.json model_type={candidates[0]} can't express {architecture}")
    # no token pads what came without a config.json; some types' default is beyond smaller vocabularies
    kept = {key: value for key, value in (base or {"pad_token_id": None}).items() if key not in _REPLACED}
    return {**kept, **config, "architectures": [family_of(model_type).architecture], "torch_dtype": dtype}


# the model types that a model without a config.json may get, the first that fits
_CANDIDATES = ("llama", "qwen2", "mistral", "qwen3", "gemma2", "gemma3_text", "glm", "glm4", "baichuan")

# keys of a base config that say in another way what `_fields` writes
_REPLACED = frozenset(
    {
        "rope_parameters",
        "dtype",
        "layer_types",
        "sliding_window",
        "sliding_window_pattern",
        "use_sliding_window",
        "max_window_layers",
        "partial_rotary_factor",
    }
)


def places(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Place]:
    """Where each parameter lies in the files beside this config.json, by our name in canonical order."""
    return family_of(config["model_type"]).spelling.places(architecture)


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


def check_layers(architecture: Architecture, found: Collection[str], origin: str) -> None:
    """Raise ConfigError for more layers than tensors: before anything is made for each layer of a config that lies."""
    if architecture.num_layers > len(found):
        raise ConfigError(f"{origin}: its config says {architecture.num_layers} layers, it holds {len(found)} tensors")


def check_parameters(
    architecture: Architecture,
    found: Mapping[str, tuple[int, ...]],
    origin: str,
    files: Mapping[str, Place] | None = None,
) -> None:
    """Raise ConfigError unless `found` (name -> shape) holds exactly the parameters of `architecture`.

    Tolerated beside them: stored rotary frequencies, and a head that is tied anyway. `origin` names the file or
    directory in the message. files: where the parameters should be, if not under our own names.
    """
    check_layers(architecture, found, origin)
    expected = parameter_shapes(architecture)
    if files is not None:
        expected = {place.name: place.shape for place in files.values()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, its config says {list(expected[name])}")
        elif name not in expected and name != "lm_head.weight" and not name.endswith("inv_freq"):
            problems.append(f"{name} is there but its config has no such parameter")
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n  ".join(problems[:5])
        raise ConfigError(f"{origin} doesn't hold the weights its config describes:\n  {listed}{more}")


def _says(config: Mapping[str, Any], architecture: Architecture) -> bool:
    """Whether this config.json would be read as that architecture."""
    try:
        return read_architecture(config) == architecture
    except ConfigError:
        return False


def _fields(architecture: Architecture, model_type: str) -> dict[str, Any]:
    """The keys of `architecture` as `model_type` spells them (what it can't express is lost)."""
    a, family = architecture, family_of(model_type)
    config: dict[str, Any] = {
        "model_type": model_type,
        family.activation_key: next(name for name, ours in _ACTIVATIONS.items() if ours == a.activation),
        "hidden_size": a.width,
        "intermediate_size": a.ffn_width,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tied_embeddings,
        **write_rope(a.rope_theta, a.rope_scaling),
        **(local_rope_keys(a) if family.local_rope else {}),
        **write_windows(a, family.windows),
    }
    if family.attention_bias is not None:
        config["attention_bias"] = a.qkv_bias
    if family.mlp_bias_key:
        config["mlp_bias"] = a.mlp_bias
    if family.gemma:
        scalar = a.attention_scalar or a.head_dim
        config |= {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": a.score_cap,
            "final_logit_softcapping": a.logit_cap,
        }
    if family.rotary_share != 1:
        config["partial_rotary_factor"] = (a.rotary_dim or a.head_dim) / a.head_dim
    return hf_published.write(config, a)


def _rotary_dim(config: Mapping[str, Any], family: Family, head_dim: int) -> int | None:
    """None for the whole head."""
    key = "partial_rotary_factor"
    share = config.get(key, (config.get("rope_parameters") or {}).get(key))
    share = family.rotary_share if share is None else positive({key: share}, key, 1.0)
    if share == 1:
        return None
    if family.rotary_share == 1 or share > 1:
        raise ConfigError(f"config.json {key}={share} is not supported; supported is 1.0")
    return int(head_dim * share)


def _gemma_fields(config: Mapping[str, Any], family: Family, width: int, head_dim: int) -> dict[str, Any]:
    scalar = positive(config, "query_pre_attn_scalar", 256)
    return {
        "embedding_scale": width**0.5,
        "attention_scalar": None if scalar == head_dim else scalar,
        "score_cap": optional(config, "attn_logit_softcapping", family.caps[0]),
        "logit_cap": optional(config, "final_logit_softcapping", family.caps[1]),
    }


def _head_dim(config: Mapping[str, Any], default: int | None, width: int, heads: int) -> int:
    if default is None and config.get("head_dim") is None and width % heads:
        raise ConfigError(f"config.json hidden_size={width} is not a multiple of num_attention_heads={heads}")
    head_dim = integer(config, "head_dim", default or width // heads, absent_if_none=width // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json head_dim={head_dim} must be even for rotary embeddings")
    return head_dim


def _activation(config: Mapping[str, Any], family: Family) -> str:
    key, usual = family.activation_key, "gelu_pytorch_tanh" if family.gemma else "silu"
    name = config.get(key, usual)
    if name not in _ACTIVATIONS or (family.gemma and _ACTIVATIONS[name] != "gelu_tanh"):
        raise ConfigError(f"config.json {key}={name!r} is not supported; supported is {usual}")
    return _ACTIVATIONS[name]


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, allowed in _NEUTRAL.items():
        if config.get(key) not in allowed:
            raise ConfigError(
                f"config.json {key}={json.dumps(config[key])[:80]} is not supported; supported is "
                f"{'no such key' if allowed == (None,) else json.dumps(allowed[-1])}"
            )

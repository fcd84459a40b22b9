"""The rotary part of a config.json: `rope_theta` and `rope_scaling`, also as transformers 5's `rope_parameters`.

| kind   | source                                     | fields used                                                  |
|--------|--------------------------------------------|--------------------------------------------------------------|
| linear | arXiv:2306.15595                           | factor                                                       |
| llama3 | Llama 3.1 model card                       | factor, low/high_freq_factor, original_max_positions         |
| yarn   | arXiv:2309.00071                           | factor, original_max_positions, beta_*, attention_factor, ...|
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from conf.schema import Architecture, ConfigError, RopeScaling
from parallel.model.hf_values import positive

# Hugging Face key -> our field
_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    }
)
_REQUIRED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
)
_OPTIONAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": (),
        "llama3": (),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    }
)
_SILENT = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})


GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
"""Gemma 3's bases when the keys are absent."""


def read_rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling or None) of a config.json.

    `max_positions` stands in for a missing `original_max_position_embeddings`, as in transformers.

    Raises:
        ConfigError: a kind or key that isn't supported, a missing or impossible value.
    """
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(where) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json {where} must be an object, not {rope!r}")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    theta = 10000.0 if theta is None else _number(where, "rope_theta", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        _refuse_unknown(where, "default", rope, ())
        return theta, None
    if kind not in _REQUIRED:
        raise ConfigError(
            f"config.json {where}.rope_type={kind!r} is not supported; supported are default, linear, llama3, yarn"
        )
    rope = dict(rope)
    if "original_max_position_embeddings" in _REQUIRED[kind]:
        rope.setdefault(
            "original_max_position_embeddings",
            config.get("original_max_position_embeddings") or max_positions,
        )
    allowed = _REQUIRED[kind] + _OPTIONAL[kind]
    _refuse_unknown(where, kind, rope, allowed)
    values: dict[str, Any] = {}
    for key in allowed:
        value = rope.get(key)
        if value is None and key in _REQUIRED[kind]:
            raise ConfigError(f"config.json {where}.{key} is missing; rope_type={kind} needs it")
        if value is not None:
            values[_KEYS[key]] = _value(where, key, value)
    return theta, RopeScaling(kind=kind, **values)


def split_local_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Gemma 3's config for `read_rope`, and the base in layers with the window: both spellings, flat and nested.

    Raises:
        ConfigError: the windowed layers' frequencies are scaled.
    """
    flat = {key: value for key, value in config.items() if key != "rope_parameters"}
    nested = config.get("rope_parameters")
    if not isinstance(nested, Mapping):
        flat["rope_theta"] = config.get("rope_theta") or GLOBAL_THETA
        return flat, positive(config, "rope_local_base_freq", LOCAL_THETA)
    local = nested.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise ConfigError(
            f"config.json rope_parameters.sliding_attention.rope_type={local['rope_type']!r} is not supported; "
            "supported is default"
        )
    flat["rope_parameters"] = {"rope_theta": GLOBAL_THETA, **(nested.get("full_attention") or {})}
    return flat, _number("rope_parameters", "sliding_attention.rope_theta", local.get("rope_theta", LOCAL_THETA))


def local_rope_keys(architecture: Architecture) -> dict[str, Any]:
    """The base in layers with the window, in the flat spelling."""
    theta = architecture.rope_theta if architecture.sliding_window is not None else LOCAL_THETA
    return {"rope_local_base_freq": architecture.window_rope_theta or theta}


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The `rope_theta` and `rope_scaling` keys, in the spelling that transformers 4 and 5 both read."""
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    fields = {key: getattr(scaling, field) for key, field in _KEYS.items()}
    present = {key: value for key, value in fields.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": scaling.kind, **present}}


def _refuse_unknown(where: str, kind: str, rope: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key, value in rope.items():
        if key not in _SILENT and key not in allowed and value is not None:
            known = ", ".join(allowed) or "rope_theta only"
            raise ConfigError(f"config.json {where}.{key} is not supported with rope_type={kind}; known: {known}")


def _value(where: str, key: str, value: Any) -> Any:
    if key == "truncate":
        if not isinstance(value, bool):
            raise ConfigError(f"config.json {where}.truncate={value!r} must be true or false")
        return value
    number = _number(where, key, value)
    return int(number) if key == "original_max_position_embeddings" else number


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"config.json {where}.{key}={value!r} must be a positive number")
    return float(value)

"""Single values of a config.json, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.schema import ConfigError


def integer(config: Mapping[str, Any], key: str, default: int | None = None, absent_if_none: int | None = None) -> int:
    """A positive integer; `default` if the key is absent, `absent_if_none` if it is there but null.

    Raises:
        ConfigError: as do all here, when the value is of another kind; the message names the key.
    """
    value = config.get(key, default)
    if value is None and key in config and absent_if_none is not None:
        value = absent_if_none
    if value is None:
        raise ConfigError(f"config.json has no {key}; add it")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json {key}={value!r} must be a positive integer")
    return value


def positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive number; `default` if the key is absent."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"config.json {key}={value!r} must be a positive number")
    return float(value)


def optional(config: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """A positive number or null; `default` if the key is absent."""
    return None if config.get(key, default) is None else positive(config, key, default or 0.0)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false (or null, which is false); `default` if the key is absent."""
    value = config.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json {key}={value!r} must be true or false")
    return bool(value)

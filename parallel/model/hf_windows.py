"""The sliding window of a config.json, and which layers have it.

| kind   | model types        | what says which layers have the window                                  |
|--------|--------------------|-------------------------------------------------------------------------|
| none   | llama, ...         | none has                                                                |
| all    | mistral            | all have                                                                |
| switch | qwen2, qwen3       | with use_sliding_window: layer_types, else those from max_window_layers |
| period | gemma2, gemma3     | layer_types, else all but every 2nd (6th, or sliding_window_pattern-th)  |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from conf.schema import Architecture, ConfigError
from parallel.model.hf_values import flag, integer

Kind = Literal["none", "all", "switch", "period"]
Windows = tuple[int | None, tuple[bool, ...] | None]
WINDOW = 4096
"""sliding_window when the key is absent."""
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_windows(config: Mapping[str, Any], kind: Kind, period: int, layers: int) -> Windows:
    """(window in tokens or None, which layers have it or None for all).

    Raises:
        ConfigError: layer types that are unknown, too few or too many, or that the model type can't have.
    """
    types = _layer_types(config, layers)
    if kind == "all":
        if len(set(types or ())) > 1:
            model_type = config["model_type"]
            raise ConfigError(
                f"config.json layer_types mixes kinds of attention; with model_type={model_type} all are equal"
            )
        return _window(config), None
    if kind == "period":
        period = integer(config, "sliding_window_pattern", period)
        return _some(config, [t == _SLIDING for t in types] if types else [(i + 1) % period > 0 for i in range(layers)])
    on = kind == "switch" and flag(config, "use_sliding_window")
    if not on and _SLIDING in (types or ()):
        reason = "but use_sliding_window=false; set it true"
        if kind == "none":
            reason = f"; model_type={config['model_type']} has no window"
        raise ConfigError(f"config.json layer_types has {_SLIDING}{'' if kind == 'none' else ' '}{reason}")
    if not on:
        return None, None
    first = config.get("max_window_layers", 28)
    return _some(config, [t == _SLIDING for t in types] if types else [i >= first for i in range(layers)])


def write_windows(architecture: Architecture, kind: Kind) -> dict[str, Any]:
    """The keys that say the same."""
    window = architecture.sliding_window
    flags = architecture.window_layers or (window is not None,) * architecture.num_layers
    types = [_SLIDING if windowed else _FULL for windowed in flags]
    if kind == "all":
        return {"sliding_window": window}
    if kind == "period":
        return {"sliding_window": window or WINDOW, "layer_types": types}
    if kind == "none":
        return {}
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": flags.index(True) if True in flags else architecture.num_layers,
        "layer_types": types,
    }


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str] | None:
    types = config.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        raise ConfigError(f"config.json layer_types must list {layers} layers (num_hidden_layers), not {types!r}")
    for name in types or ():
        if name not in (_FULL, _SLIDING):
            raise ConfigError(f"config.json layer_types has {name!r}; supported are {_FULL} and {_SLIDING}")
    return types


def _some(config: Mapping[str, Any], flags: list[bool]) -> Windows:
    window = _window(config)
    if window is None or not any(flags):
        return None, None
    return window, None if all(flags) else tuple(flags)


def _window(config: Mapping[str, Any]) -> int | None:
    if config.get("sliding_window", 0) is None:
        return None
    return integer(config, "sliding_window", WINDOW)

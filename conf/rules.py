"""Rules that fields of `conf.schema` declare: bounds, options without effect, planned options."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from conf.convert import options, show
from conf.option import SET


def fields_of(config: object, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any, object]]:
    """(key, field, value, section that holds it) of every option in a tree."""
    for field in options(type(config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value, config


def out_of_range(config: object) -> list[str]:
    """Numbers outside the interval of their field."""
    problems: list[str] = []
    for key, field, value, _ in fields_of(config):
        numbers = value if isinstance(value, tuple) else (value,)
        interval = field.metadata.get("within")
        if interval and not all(_inside(interval, n) for n in numbers if isinstance(n, int | float)):
            problems.append(f"{key}={show(value)} is out of range; use {_in_words(interval, key)}")
    return problems


def unused(config: object, given: Collection[str] = ()) -> list[str]:
    """Options that are set (unlike their default, or in `given`) without effect beside a sibling's value."""
    problems: list[str] = []
    for key, field, value, siblings in fields_of(config):
        needs = field.metadata.get("needs")
        if not needs or (value == field.default and key not in given):
            continue
        name, wanted = needs
        current = getattr(siblings, name)
        if current in wanted or (SET in wanted and current is not None):
            continue
        parent = key.rpartition(".")[0]
        sibling = parent if name == "kind" else f"{parent}.{name}".removeprefix(".")
        if SET in wanted:
            advice = f"without {sibling}; remove it or set {sibling} too"
        elif current is None or None in wanted or "" in wanted:
            advice = f"with {sibling}={show(current)}; remove one of them"
        else:
            choices = " or ".join(f"{sibling}={show(choice)}" for choice in wanted)
            advice = f"with {sibling}={show(current)}; remove it or set {choices}"
        problems.append(f"{key}={show(value)} has no effect {advice}")
    return problems


def not_yet(config: object) -> list[str]:
    """Planned options at another value than their default."""
    return [
        f"{key}={show(value)} is not available yet; leave {key} at {show(field.default)}"
        for key, field, value, _ in fields_of(config)
        if field.metadata.get("later") and value != field.default
    ]


def _bounds(interval: str) -> tuple[str, str, str, str]:
    low, high = interval[1:-1].split(",")
    return low, "<=" if interval[0] == "[" else "<", high, "<=" if interval[-1] == "]" else "<"


def _inside(interval: str, number: float) -> bool:
    low, above, high, below = _bounds(interval)
    least, most = float(low), float(high)
    return (number >= least if above == "<=" else number > least) and (
        number <= most if below == "<=" else number < most
    )


def _in_words(interval: str, key: str) -> str:
    low, above, high, below = _bounds(interval)
    if high == "inf":
        return f"{key}{'>=' if above == '<=' else '>'}{low}"
    return f"{low}{above}{key}{below}{high}"

"""Plain mappings (YAML, the command line) to the dataclasses of `conf.schema` and back, by their annotations.

Problems are collected, not raised one by one: the user sees all of them at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from conf.schema import PLANNED

C = TypeVar("C")
UNIONS = (Union, types.UnionType)
_WRONG = object()


@functools.cache
def hints(cls: type) -> Mapping[str, Any]:
    """Type of each field of a dataclass."""
    return get_type_hints(cls)


def options(cls: type, command: str | None = None) -> list[dataclasses.Field[Any]]:
    """Fields of a dataclass that `command` reads; None = all."""
    known = dataclasses.fields(cls)
    return [f for f in known if command is None or not f.metadata["only"] or command in f.metadata["only"]]


def section(hint: Any) -> type | None:
    """The dataclass of a hint such as `Architecture | None`, None if there is no dataclass in it."""
    return next((member for member in (hint, *get_args(hint)) if dataclasses.is_dataclass(member)), None)  # pyright: ignore[reportReturnType]


def leaves(cls: type, command: str | None = None, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every option of a dataclass and its sections: dotted key -> field."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for field in options(cls, command):
        inner = section(hints(cls)[field.name])
        if inner is None:
            found[prefix + field.name] = field
        else:
            found |= leaves(inner, command, f"{prefix}{field.name}.")
    return found


def hint_of(cls: type, key: str) -> Any:
    """Type of the option with a dotted key."""
    first, _, rest = key.partition(".")
    hint = hints(cls)[first]
    inner = section(hint)
    return hint_of(inner, rest) if rest and inner else hint


def is_text(hint: Any) -> bool:
    """Whether an option is free text or a path, so that the command line takes it verbatim."""
    return hint is str or (get_origin(hint) in UNIONS and set(get_args(hint)) == {str, types.NoneType})


def suggestion(word: str, known: Collection[str]) -> str:
    """`; did you mean X?` with the nearest known word, or nothing."""
    last = word.rsplit(".", 1)[-1]
    near = sorted(key for key in known if key.rsplit(".", 1)[-1] == last)
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def choice_problem(key: str, value: str, known: Collection[str]) -> str:
    """Why `value` is not among the known values of `key`: planned for later, or unknown."""
    if value in PLANNED.get(key, ()):
        return f"{key}={value} is not available yet; use one of {', '.join(known)}"
    return f"{key}={value} is not one of {', '.join(known)}{suggestion(value, known)}"


def show(value: object) -> str:
    """A value as the command line spells it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{','.join(show(v) for v in value)}]"
        case Mapping():
            return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
        case _:
            return str(value)


def build(cls: type[C], data: Mapping[str, Any], problems: list[str], prefix: str = "") -> C | None:
    """The dataclass with the given values and defaults; None after adding what is wrong to `problems`."""
    before = len(problems)
    known = hints(cls)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in known:
            values[name] = _convert(known[name], value, problems, f"{prefix}{name}")
        else:
            problems.append(f"{prefix}{name} is not a key{suggestion(str(name), known)}")
    required = [
        field.name
        for field in options(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        problems.append(f"{prefix.removesuffix('.')} lacks {', '.join(missing)}")
    return cls(**values) if len(problems) == before else None


def _convert(hint: Any, value: Any, problems: list[str], key: str) -> Any:
    if value is None and types.NoneType in get_args(hint):
        return None
    inner = section(hint)
    if inner is not None:
        if isinstance(value, Mapping):
            return build(inner, value, problems, f"{key}.")
        first = next(iter(hints(inner)))
        problems.append(f"{key}={show(value)} is not possible: {key} is a section; set its keys, as {key}.{first}")
        return None
    for member in get_args(hint) if get_origin(hint) in UNIONS else (hint,):
        result = _simple(member, value)
        if result is not _WRONG:
            return result
    if get_origin(hint) is Literal and isinstance(value, str):
        problems.append(choice_problem(key.removesuffix(".kind"), value, get_args(hint)))
    else:
        problems.append(f"{key}={show(value)} is not {expected(hint)}")
    return None


def _simple(hint: Any, value: Any) -> Any:
    """`value` as a `hint` that is neither a union nor a section, or _WRONG."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if value in members else _WRONG
    if origin is tuple:
        return _items(members, value)
    if origin is not None:  # Mapping[str, str]
        fits = isinstance(value, Mapping) and all(isinstance(w, str) for item in value.items() for w in item)
        return dict(value) if fits else _WRONG
    if hint in (bool, str, types.NoneType):
        return value if isinstance(value, hint) else _WRONG
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return _WRONG
    return hint(value) if hint is float or value == int(value) else _WRONG


def _items(members: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _WRONG
    wanted = (members[0],) * len(value) if members[-1] is Ellipsis else members
    if len(wanted) != len(value):
        return _WRONG
    items = tuple(_simple(member, item) for member, item in zip(wanted, value, strict=True))
    return _WRONG if _WRONG in items else items


def expected(hint: Any) -> str:
    """What values an option takes, in words: `an integer or null`."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    origin, members = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return " or ".join(expected(member) for member in members)
    if origin is Literal:
        return str(members[0]) if len(members) == 1 else f"one of {', '.join(map(str, members))}"
    if origin is tuple:
        plural = {int: "integers", float: "numbers", bool: "true or false", str: "names"}[members[0]]
        return f"a list of {plural}" if members[-1] is Ellipsis else f"a list of {len(members)} {plural}"
    return names.get(hint, "a mapping of names to texts, {a: b}")


def plain(config: object, command: str | None = None) -> dict[str, Any]:
    """The options that `command` reads (None = all) as mappings, lists and scalars; secrets are left out."""
    tree: dict[str, Any] = {}
    for field in options(type(config), command):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tree[field.name] = plain(value, command)
        elif not field.metadata.get("secret"):
            tree[field.name] = list(value) if isinstance(value, tuple) else value
    return tree

"""Data files read row by row and checked: JSONL or a JSON array, four row shapes, one internal form.

    {"messages": [{"role": "system|user|assistant|tool", "content": "..."}]}            a chat
    {"conversations": [{"from": "human|gpt|...", "value": "..."}]}                     a ShareGPT chat
    {"instruction": "...", "input": "...", "output": "..."}                            a chat of one turn
    {"text": "..."}                                                                    a plain document

Chats may carry "tools" (a list, or a string that holds one as JSON) and "system" (text, put in front).
Nothing here knows about tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from conf.schema import ConfigError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
SHAPES = 'a row has "messages", "conversations", "text", or "instruction" with "output"'
PACKAGE_PREFIX = "package:"
_SPACE = re.compile(r"[ \t\r\n]*")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation: messages as the chat template takes them, and the tools it may call (or None)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Text:
    """A plain document: every token is trained."""

    text: str


@dataclass(frozen=True)
class Entry:
    """One checked row of a data file.

    index: row number in the file, from 0. line: line where the row starts, from 1.
    place: how messages name the row: "line 7", or "row 3 (line 41)" in a JSON array.
    """

    index: int
    line: int
    place: str
    content: Chat | Text


class RowError(ValueError):
    """A rule that a row breaks; `read_entries` adds file and place and raises it as ConfigError."""


def locate(path: str, key: str = "data.path") -> Path:
    """The file that `path` names; `package:<package>/<file>` lies inside an installed package.

    A package's folder is found without importing it, so the working directory plays no part.
    Raises ConfigError when there is no such file.
    """
    file = Path(path).expanduser()
    if path.startswith(PACKAGE_PREFIX):
        package, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"{key}={path} names package {package!r}, which is not installed; install it")
        file = Path(next(iter(spec.submodule_search_locations)), inside)
    if not path or not file.exists():
        raise ConfigError(f"{key}={path} does not exist; give a JSONL file or a JSON array")
    if not file.is_file():
        raise ConfigError(f"{key}={path} is not a file; give a JSONL file or a JSON array")
    return file


def read_entries(path: str, key: str = "data.path") -> Iterator[Entry]:
    """Yields the rows of a data file in order, each checked and in one of two forms (Chat, Text).

    Raises ConfigError that names the file and the line (in an array also the row) for bytes that are not
    UTF-8, text that is not JSON, a row that is not an object, an unknown shape or role, or an empty file.
    """
    file = locate(path, key)
    try:
        with file.open("rb") as stream:
            first = next((line for line in stream if line.strip()), b"")
        rows = _array_rows(file) if first.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"[") else _lines(file)
        index = -1
        for index, (line, place, value) in enumerate(rows):
            try:
                yield Entry(index, line, place, parse_row(value))
            except RowError as error:
                raise ConfigError(f"{key}={path} {place}: {error}") from error
    except _Unreadable as error:
        raise ConfigError(f"{key}={path} {error.place} {error}") from error
    if index < 0:
        raise ConfigError(f"{key}={path} is empty; {SHAPES}")


def parse_row(value: object) -> Chat | Text:
    """The checked form of one decoded row. Raises RowError naming the rule it breaks."""
    if not isinstance(value, dict):
        raise RowError(f"not an object but {_kind(value)}; {SHAPES}")
    row = cast(dict[str, Any], value)
    if "messages" in row:
        messages = _turns(row["messages"], "messages", _message)
    elif "conversations" in row:
        messages = _turns(row["conversations"], "conversations", _sharegpt_message)
    elif "text" in row:
        return Text(_text(row["text"], "text"))
    elif "instruction" in row and "output" in row:
        messages = _instruction(row)
    else:
        keys = ", ".join(sorted(row)) or "none"
        raise RowError(f"unknown row shape (keys: {keys}); {SHAPES}")
    if row.get("system"):
        if messages[0]["role"] == "system":
            raise RowError("both a system key and a system message; keep one")
        messages = ({"role": "system", "content": _text(row["system"], "system")}, *messages)
    return Chat(messages, _tools(row.get("tools")))


def _turns(value: object, name: str, parse: Callable[[Any, int], Message]) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} is {_kind(value)}; it must be a list with at least one message")
    return tuple(parse(turn, number) for number, turn in enumerate(cast(list[Any], value), 1))


def _message(turn: Any, number: int) -> Message:
    """A turn of the "messages" shape; keys beyond role and content go to the template as they are."""
    if not isinstance(turn, dict):
        raise RowError(f"message {number} is {_kind(turn)}; it must be an object with role and content")
    message = cast(dict[str, Any], turn)
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"message {number} has unknown role {role!r}; use one of {', '.join(ROLES)}")
    if message.get("content") is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(message.get("content"), list):  # text parts, which the template joins
        _text(message.get("content"), f"content of message {number}")
    return message


def _sharegpt_message(turn: Any, number: int) -> Message:
    """A turn of the ShareGPT shape; a function_call is an assistant turn, an observation a tool turn."""
    if not isinstance(turn, dict):
        raise RowError(f"message {number} is {_kind(turn)}; it must be an object with from and value")
    message = cast(dict[str, Any], turn)
    speaker = message.get("from")
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise RowError(f"message {number} has unknown role (from) {speaker!r}; use one of {known}")
    return {"role": role, "content": _text(message.get("value"), f"value of message {number}")}


def _instruction(row: Mapping[str, Any]) -> tuple[Message, ...]:
    request = _text(row["instruction"], "instruction")
    extra = _text(row.get("input") or "", "input")
    return (
        {"role": "user", "content": f"{request}\n\n{extra}" if extra else request},
        {"role": "assistant", "content": _text(row["output"], "output")},
    )


def _tools(value: object) -> tuple[Mapping[str, Any], ...] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"tools is not JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in cast(list[Any], value)):
        raise RowError(f"tools is {_kind(value)}; it must be a list of objects")
    return tuple(cast(Sequence[Mapping[str, Any]], value))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {_kind(value)}; it must be text")
    return value


def _kind(value: object) -> str:
    """JSON's own name for the type of a decoded value."""
    if value is None:
        return "null or missing"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return ("an empty list" if value == [] else None) or names[type(value)]


class _Unreadable(ValueError):
    """Bytes or text that cannot be decoded, with the place they stand at."""

    def __init__(self, place: str, rule: str) -> None:
        super().__init__(rule)
        self.place = place


def _lines(file: Path) -> Iterator[tuple[int, str, object]]:
    """(line, place, value) of each non-blank line of a JSONL file; only newlines end a line."""
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, 1):
            place = f"line {line}"
            text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, place)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                rule = f"is not JSON ({reason}); a file is one object a line or one array"
                raise _Unreadable(place, rule) from error
            yield line, place, value


def _array_rows(file: Path) -> Iterator[tuple[int, str, object]]:
    """(line, place, value) of each element of a JSON array, decoded one by one so that lines are known."""
    text = _decode(file.read_bytes().removeprefix(b"\xef\xbb\xbf"), "array")
    decoder, row, line, here = json.JSONDecoder(), 0, 1, 0
    there = _skip(text, text.index("[") + 1)
    more = not text.startswith("]", there)
    while more:
        row, line, here = row + 1, line + text.count("\n", here, there), there
        place = f"row {row} (line {line})"
        try:
            value, there = decoder.raw_decode(text, there)
        except (json.JSONDecodeError, RecursionError) as error:
            at = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "too deep"
            raise _Unreadable(place, f"is not JSON ({at})") from error
        yield line, place, value
        there = _skip(text, there)
        more = text.startswith(",", there)
        if more:
            there = _skip(text, there + 1)
        elif not text.startswith("]", there):
            raise _Unreadable(place, "is not JSON (neither a comma nor the closing ] follows this row)")
    line += text.count("\n", here, there)
    if text[there + 1 :].strip():
        raise _Unreadable(f"line {line}", "is not JSON (text follows the array)")


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not JSON's white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"line {line}" if place == "array" else place
        raise _Unreadable(where, f"is not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error

"""Chat messages as OpenAI's clients send them, into what the chat template reads.

Roles, contents and lists of text parts are the template's own business (parallel.model.template, the same
code as in training); here is what only the wire has.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from serve.errors import ApiError

FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})
"""What a message may say; templates see all of it."""

ANSWER_FIELDS = frozenset({"refusal", "annotations", "audio", "function_call", "reasoning_content", "reasoning"})
"""Fields of an answer that clients send back with the history; they are dropped when empty."""


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a request in the template's form.

    The role developer, as OpenAI calls system for some models, becomes system; the arguments of tool calls,
    text on the wire, become the objects that templates print; empty fields disappear.

    Raises:
        ApiError: 400, naming the message and the field.
    """
    if not messages:
        raise ApiError(400, "messages is empty; send at least one message", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in message.items():
        if value is None or (not value and name != "content" and name in FIELDS | ANSWER_FIELDS):
            continue
        if name not in FIELDS:
            raise ApiError(400, f"{where}.{name} is not supported; leave it out", param=f"{where}.{name}")
        result[name] = _tool_calls(value, f"{where}.{name}") if name == "tool_calls" else value
    if result.get("role") == "developer":
        result["role"] = "system"
    return result


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """The calls with their arguments parsed."""
    result: list[dict[str, Any]] = []
    for call in cast("list[Any]", calls) if isinstance(calls, list) else [calls]:
        fields = cast("dict[str, Any]", call) if isinstance(call, dict) else {}
        function = fields.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"{where} holds {reprlib.repr(call)}, which is no function call", param=where)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise ApiError(400, f"{where} has arguments that aren't JSON: {error}", param=where) from error
        if not isinstance(arguments, dict):
            raise ApiError(400, f"{where} has arguments that aren't an object", param=where)
        result.append({**fields, "function": {**function, "arguments": arguments}})
    return result

"""Chat templates: Jinja programs that models ship, rendered in a sandbox with Hugging Face's conventions.

The same rendering serves both sides: `render` writes the prompt of a request, and `split` cuts a whole conversation
into the texts the model is given and the answers it should learn to write:

    messages   user            assistant         user             assistant
    text       <prompt header> <answer end> \\n  <prompt header>  <answer end> \\n
               context         target       context               target       context

The cuts come from rendering growing prefixes of the conversation, each with the header that asks for an answer, so
nothing about a particular template is assumed, except that earlier text never changes when messages are added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conf.schema import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have; which of them a template accepts is up to the template."""

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    role: str
    """Role of the last message whose text it holds."""
    target: bool
    """Whether the model should learn to write it."""


class ChatTemplate:
    """A compiled template and the special tokens it may mention."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile `source`; `tokens` holds variables such as bos_token and eos_token.

        Raises:
            ConfigError: the template is not valid Jinja.
        """
        self.source = source
        self._tokens = dict(tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"chat_template is not valid Jinja: {error}; fix it") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool,
    ) -> str:
        """The text of `messages`; with `generation_prompt` it ends with the header of the answer to come.

        Raises:
            ConfigError: malformed messages (`check_messages`), or the template itself refuses them.
        """
        return self._render(check_messages(messages), tools, generation_prompt)

    def split(
        self,
        messages: Sequence[Message],
        end_tokens: Sequence[str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Piece]:
        """The rendered conversation in pieces, alternating context and targets.

        A target is what the model writes in one assistant turn: the content (and tool calls) up to and including the
        first of `end_tokens` after it. Everything between two targets is one context piece. The texts add up to
        `render(messages, generation_prompt=False)`.

        Raises:
            ConfigError: as `render`, or the template changes earlier text when messages are added, or it writes no
                end token after an answer.
        """
        checked = check_messages(messages)
        pieces: list[Piece] = []
        done, count, pending, role = "", 0, "", "system"
        for position, message in enumerate(checked):
            if message["role"] != "assistant":
                role = message["role"]
                continue
            prompt = self._render(checked[:position], tools, True)
            answered = self._render(checked[: position + 1], tools, False)
            pending += _added(done, prompt, count)
            answer = _added(prompt, answered, position)
            end = _answer_end(answer, message, end_tokens)
            if pending:
                pieces.append(Piece(pending, role, False))
            pieces.append(Piece(answer[:end], "assistant", True))
            pending, role, done, count = answer[end:], "assistant", answered, position + 1
        pending += _added(done, self._render(checked, tools, False), count)
        if pending:
            pieces.append(Piece(pending, role, False))
        return pieces

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        except TemplateError as error:
            raise ConfigError(f"messages don't fit the model's chat template: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ConfigError(f"messages don't fit the model's chat template: {problem}") from None


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`messages` as plain dicts: roles known, content a string (text parts are joined by line breaks, as in vLLM).

    An assistant message may have content None beside `tool_calls`; it becomes an empty string.

    Raises:
        ConfigError: not a list of messages, unknown role, or content of another type.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError('messages must be a non-empty list of {"role": ..., "content": ...} objects')
    return [_check_message(number, message) for number, message in enumerate(messages)]


def _check_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(f"messages[{number}] must be an object, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConfigError(f"messages[{number}].role={role!r} is unknown; use one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls)):
        raise ConfigError(f"messages[{number}].tool_calls must be a list of objects")
    if content is None and calls and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "\n".join(_text_of(number, part) for part in content)
    if not isinstance(content, str):
        raise ConfigError(
            f"messages[{number}].content must be text or a list of text parts, not {type(content).__name__}"
        )
    plain = {key: value for key, value in message.items() if value is not None}
    if calls:
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return {**plain, "role": role, "content": content}


def _plain_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tool call with its arguments as an object, which templates expect; OpenAI's API has them as JSON text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _text_of(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ConfigError(f"messages[{number}].content has a part of type {kind!r}; only text is supported")


def _added(before: str, after: str, count: int) -> str:
    """What `after` adds to `before`, the text of the first `count` messages, which it must begin with."""
    if after.startswith(before):
        return after[len(before) :]
    pairs = enumerate(zip(before, after, strict=False))
    same = next((at for at, (old, new) in pairs if old != new), min(len(before), len(after)))
    raise ConfigError(
        f"chat_template can't be trained on: the text of the first {count} messages changes when more follow, from "
        f"{before[same : same + 40]!r} to {after[same : same + 40]!r}; use a template that only appends"
    )


def _answer_end(answer: str, message: Message, end_tokens: Sequence[str]) -> int:
    """Where the answer ends in the text of an assistant turn: after the first end token behind the content."""
    for content in (message["content"], message["content"].strip(), ""):
        if content not in answer:
            continue
        begin = answer.index(content) + len(content)
        ends = [at + len(token) for token in end_tokens if (at := answer.find(token, begin)) >= 0]
        if ends:
            return min(ends)
    raise ConfigError(
        f"chat_template writes no end token after an assistant's answer ({answer[-40:]!r}); "
        f"it should write one of {list(end_tokens)}"
    )


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for transformers; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The tag's body, as if the tag weren't there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which templates don't expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)

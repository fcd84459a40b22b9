"""Text in, token ids out: prompts and chats through the model's own tokenizer and template.

The tokenizer holds the interpreter's lock, so a long text would stop everyone else's streams: texts are first
counted slice by slice, with a turn of the event loop between two slices, and those that can't fit the context
are refused before they are tokenised whole.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import ConfigError
from parallel.model.tokenizer import Tokenizer
from serve.errors import ApiError
from serve.request import model_defaults

SLICE = 16384
"""Characters counted at a time: a few milliseconds."""

LONGEST_TOKENIZE = 2**18
"""Characters that /tokenize takes: it has no context to fit into, but less than a second is enough."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids, and the text they were made from if the client sent text."""

    ids: tuple[int, ...]
    text: str | None


class TextModel:
    """The tokenizer, the chat template and the model's sampling defaults as the routes use them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.defaults = model_defaults(tokenizer.generation)
        """The model's own sampling, for requests that don't say."""

    async def prompt(self, prompt: str | Sequence[int], *, bos: bool, limit: int | None) -> Prompt:
        """A prompt as it came: text is tokenised, with a BOS if the model wants one and `bos`; ids stay.

        Raises ApiError (400) for text that can't fit into `limit` tokens, and for text that is none.
        """
        if not isinstance(prompt, str):
            return Prompt(ids=tuple(prompt), text=None)
        await self._check(prompt, limit, "prompt")
        return Prompt(ids=tuple(self.tokenizer.encode(prompt, bos=bos)), text=prompt)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        generation_prompt: bool,
        limit: int | None,
    ) -> Prompt:
        """The messages through the chat template.

        Raises ApiError (400) for messages that are malformed or that the template refuses, with the reason, for
        those that can't fit into `limit` tokens, and for tools that the template has no place for: the model
        would never hear of them.
        """
        try:
            text = self.tokenizer.render(messages, tools=tools or None, generation_prompt=generation_prompt)
            if tools and text == self.tokenizer.render(messages, generation_prompt=generation_prompt):
                raise ApiError(400, "the model's chat template has no place for tools", param="tools")
        except ConfigError as error:
            raise ApiError(400, str(error), param="messages") from error
        await self._check(text, limit, "messages")
        return Prompt(ids=tuple(self.tokenizer.encode(text)), text=None)

    def shown(self, prompt: Prompt) -> str:
        """The prompt as text, for echo."""
        return self.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text

    async def _check(self, text: str, limit: int | None, param: str) -> None:
        """Raises ApiError unless `text` is Unicode and may fit into `limit` tokens (None: into /tokenize)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"{param} is not Unicode text: {error.reason}", param=param) from error
        if limit is None:
            if len(text) > LONGEST_TOKENIZE:
                rule = f"{param} has {len(text)} characters; at most {LONGEST_TOKENIZE} are tokenised"
                raise ApiError(400, rule, param=param)
            return
        count = 0
        for start in range(0, len(text) if len(text) > SLICE else 0, SLICE):
            count += len(self.tokenizer.encode(text[start : start + SLICE]))
            if count > limit + limit // 8 + 100:  # a cut between two slices changes the count by a few tokens
                raise too_long(f"more than {limit + limit // 8}", limit, param)
            await asyncio.sleep(0)


def too_long(tokens: int | str, limit: int, param: str) -> ApiError:
    """The 400 for a prompt of `tokens` that leaves no room in a context of `limit`."""
    return ApiError(
        400,
        f"the prompt has {tokens} tokens, but the model's context holds {limit}, the answer included; "
        "shorten the prompt",
        param=param,
        code="context_length_exceeded",
    )

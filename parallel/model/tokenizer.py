"""Text to token ids and back, and conversations through the model's own chat template.

One class for training and serving, whatever the model came from: `tokenizer_files` builds it from a model directory,
`tokenizer_gguf` from GGUF metadata, `tokenizer_bytes` from nothing for random models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from conf.schema import ConfigError
from parallel.model.template import ChatTemplate, Message

_SPACE = "\u2581"  # SentencePiece's visible space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Segment:
    """A stretch of a tokenized conversation."""

    ids: tuple[int, ...]
    role: str
    """Role of the last message whose text it holds."""
    target: bool
    """Whether the model should learn to write it: an answer with its end token."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What a tokenizer is besides its vocabulary."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unknown: str | None = None
    eos_ids: frozenset[int] = frozenset()
    """All ids that end an answer, that of `eos` included."""
    template: str | None = None
    """Jinja source of the chat template."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The tokenizer_config.json it came from, kept when saving."""
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The generation_config.json it came from, kept when saving."""

    def tokens(self) -> dict[str, str]:
        """The special tokens by the names that tokenizer_config.json and templates know them by."""
        named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad, "unk_token": self.unknown}
        return {name: token for name, token in named.items() if token is not None}


class Tokenizer:
    """The tokenizer of a model, with its chat template."""

    def __init__(self, backend: Backend, facts: TokenizerFacts) -> None:
        """Wrap `backend`; `facts` says which of its tokens mean what.

        Raises:
            ConfigError: a special token that isn't in the vocabulary, or a template that isn't valid Jinja.
        """
        self._backend = backend
        self._facts = facts
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id: int | None = self._id_of(facts.bos)
        self.eos_id: int | None = self._id_of(facts.eos)
        self._added = backend.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self._anchor = self._prefix_anchor()
        self._template = None if facts.template is None else ChatTemplate(facts.template, facts.tokens())
        known = facts.eos_ids | ({self.eos_id} if self.eos_id is not None else set())
        self._end_tokens, ends = self._find_end_tokens(known)
        self.eos_ids: frozenset[int] = frozenset(known | ends)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render`, `chat` and `segments` work."""
        return self._template is not None

    @property
    def generation(self) -> Mapping[str, Any]:
        """The model's generation_config.json; empty without one."""
        return self._facts.generation

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any text.
            special: special tokens written out in `text` become their ids; otherwise they are plain text.
            bos: add what the model's own post-processing adds around a text (usually a BOS, or nothing).

        Raises:
            ConfigError: `text` is not Unicode (half of a surrogate pair, as JSON can write it).
        """
        backend = self._backend if special else self._plain_backend
        try:
            return backend.encode(text, add_special_tokens=bos).ids
        except (TypeError, UnicodeEncodeError):
            position = next((at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if position is None:
                raise
            raise ConfigError(f"text has half a surrogate pair at character {position}; it is not Unicode") from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; ids beyond the vocabulary (padding rows of the embedding) are nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token `id` stands for: concatenated over ids they are the text's UTF-8.

        Special tokens are their own name. Ids beyond the vocabulary are empty.
        """
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._spelling(id)
        return known

    def _spelling(self, id: int) -> bytes:
        """`token_bytes`, worked out."""
        if id in self._added:
            return self._added[id].content.encode()
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if self._is_byte_level:
            return bytes(self._byte_of[char] for char in token)
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode()

    def is_special(self, id: int) -> bool:
        """Whether `id` is a special token, which `decode` leaves out by default."""
        return id in self._added and self._added[id].special

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool,
    ) -> str:
        """The text of a conversation; with `generation_prompt` it ends where the next answer begins.

        Raises:
            ConfigError: malformed messages, the template refuses them, or there is no template.
        """
        return self._chat_template().render(messages, tools=tools, generation_prompt=generation_prompt)

    def chat(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Prompt ids for the next answer in a conversation; raises as `render`."""
        return self.encode(self.render(messages, tools=tools, generation_prompt=True))

    def segments(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Segment]:
        """The conversation as training sees it, context and targets in turn (see `template`).

        Ids up to a target are those of `chat` for the messages before it (exactly for the first one, and wherever
        templates put special tokens between turns); the target's are what the model must write next.

        Raises:
            ConfigError: as `render`, or the template isn't append-only, or it writes no end token.
        """
        pieces = self._chat_template().split(messages, self._end_tokens, tools=tools)
        return [
            Segment(
                tuple(self._continue(piece.text) if number else self.encode(piece.text)),
                piece.role,
                piece.target,
            )
            for number, piece in enumerate(pieces)
        ]

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
        generation_config.json into the existing `directory`: transformers' AutoTokenizer gives identical ids.
        """
        facts = self._facts
        self._backend.save(str(directory / "tokenizer.json"))
        tokens = facts.tokens()
        # tokenizer.json alone decides: model-specific classes of transformers rebuild parts of it their own way
        kept = {key: value for key, value in facts.config.items() if key not in ("chat_template", "auto_map")}
        config = {"clean_up_tokenization_spaces": False, **kept, **tokens}
        _write_json(directory / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
        _write_json(directory / "special_tokens_map.json", tokens)
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": sorted(self.eos_ids),
            "pad_token_id": self._id_of(facts.pad),
        }
        known = {key: value for key, value in ids.items() if value not in (None, [])}
        _write_json(directory / "generation_config.json", {**facts.generation, **known})
        if facts.template is not None:
            (directory / "chat_template.jinja").write_text(facts.template, encoding="utf-8")

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise ConfigError("the model has no chat template; use a chat model, or plain text rows and completions")
        return self._template

    def _continue(self, text: str) -> list[int]:
        """Ids of `text` that follows other text: without the space some tokenizers put before a first word."""
        if self._anchor is None:
            return self.encode(text)
        ids = self.encode("\n" + text)
        anchor = self._anchor
        return ids[len(anchor) :] if tuple(ids[: len(anchor)]) == anchor else self.encode(text)

    def _prefix_anchor(self) -> tuple[int, ...] | None:
        """Ids of a newline if this tokenizer puts a space before a text's first word, else None."""
        tokens = self._backend.encode("a", add_special_tokens=False).tokens
        if tokens and tokens[0].startswith((_SPACE, "\u0120")):
            return tuple(self.encode("\n"))
        return None

    def _find_end_tokens(self, known: frozenset[int] | set[int]) -> tuple[tuple[str, ...], set[int]]:
        """(end tokens to look for after an answer, their ids): the known ones, else what the template writes there."""
        names = tuple(name for id in sorted(known) if (name := self._backend.id_to_token(id)) is not None)
        if self._template is None:
            return names, set()
        special = [token.content for token in self._added.values() if token.special]
        probe = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
        try:
            text = self._template.render(probe, generation_prompt=False)
        except ConfigError:
            return names, set()
        tail = text[text.rfind("answer") + len("answer") :]
        if any(name in tail for name in names):
            return names, set()
        found = sorted((at, name) for name in special if (at := tail.find(name)) >= 0)
        if not found:
            return names, set()
        end = self._id_of(found[0][1])
        return (*names, found[0][1]), set() if end is None else {end}

    def _id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        id = self._backend.token_to_id(token)
        if id is None:
            raise ConfigError(f"special token {token!r} is not in the tokenizer's vocabulary")
        return id

    @cached_property
    def _plain_backend(self) -> Backend:
        """A copy that takes special tokens for plain text (the switch is a property of the whole object)."""
        plain = Backend.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._backend.decoder)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return {char: byte for byte, char in enumerate(byte_alphabet())}


def byte_alphabet() -> str:
    """GPT-2's visible character for each byte: printable Latin-1 is itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(hidden)) for byte in range(256))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

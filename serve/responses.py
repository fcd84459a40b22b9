"""The answers of the HTTP interface: OpenAI's shapes of whole answers and of the chunks of a stream.

`ChatAnswer` and `CompletionAnswer` have the same methods, so one route serves both. Every generated token has
one log-probability entry, the stop token included, as in vLLM.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serve.detokenize import Pieces, escaped, printable
from serve.generation import Piece, TokenReport

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for (vLLM's value)."""

END_OF_STREAM = b"data: [DONE]\n\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # making one costs as its use


def to_json(value: Mapping[str, Any]) -> bytes:
    """`value` as compact UTF-8 JSON."""
    return _ENCODER.encode(value).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every chunk of one answer repeats."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        """The fields in front of `choices`."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Answer(Protocol):
    """How pieces of choices look on the wire."""

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        ...

    def whole(self, pieces: Sequence[Piece], counts: Mapping[str, int]) -> dict[str, Any]:
        """The body of an answer that isn't streamed."""
        ...

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """The chunks of a stream before any token."""
        ...

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a stream for one piece."""
        ...

    def counts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for usage."""
        ...


class Frames:
    """The events of one stream: `answer.chunks`, but mere text is put into a frame that is rendered once a choice."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def events(self, piece: Piece) -> bytes:
        """The events of one piece."""
        if not piece.text or piece.reports or piece.finish_reason is not None:
            return b"".join(map(event, self._answer.chunks(piece)))
        if piece.index not in self._frames:
            self._frames[piece.index] = self._frame(piece.index)
        before, after = self._frames[piece.index]
        return before + _ENCODER.encode(piece.text).encode() + after

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text; no other text follows it."""
        (chunk,) = self._answer.chunks(Piece(index=index, text="\0"))
        before, _, after = event(chunk).rpartition(rb'"\u0000"')
        return before, after


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """The shapes of /v1/chat/completions."""

    head: Head
    pieces: Pieces
    with_logprobs: bool
    with_usage: bool = False

    def whole(self, pieces: Sequence[Piece], counts: Mapping[str, int]) -> dict[str, Any]:
        """The body of an answer that isn't streamed."""
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece.reports),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            for piece in pieces
        ]
        return {**self.head.fields("chat.completion"), "choices": choices, "usage": counts}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """The chunks before any token."""
        return [
            self._chunk([{
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }])
            for index in range(num_choices)
        ]  # fmt: skip

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The text, and then the end."""
        result: list[dict[str, Any]] = []
        if piece.text or piece.reports:
            choice = {
                "index": piece.index,
                "delta": {"content": piece.text},
                "logprobs": self._logprobs(piece.reports),
                "finish_reason": None,
            }
            result.append(self._chunk([choice]))
        if piece.finish_reason is not None:
            choice = {
                "index": piece.index,
                "delta": {},
                "logprobs": None,
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            result.append(self._chunk([choice]))
        return result

    def counts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The last chunk, without choices."""
        return {**self.head.fields("chat.completion.chunk"), "choices": [], "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self.head.fields("chat.completion.chunk"), "choices": choices}
        return {**chunk, "usage": None} if self.with_usage else chunk

    def _logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            {
                **self._token(report.logprob.id, report.logprob.logprob),
                "top_logprobs": [self._token(id, logprob) for id, logprob in report.logprob.top],
            }
            for report in reports
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        piece = self.pieces.token_bytes(id)
        return {"token": printable(piece), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(piece)}


@dataclass(frozen=True, kw_only=True)
class CompletionAnswer:
    """The shapes of /v1/completions; `echo` holds, per choice, the text that comes before the answer."""

    head: Head
    pieces: Pieces
    with_logprobs: bool
    echo: Sequence[str] = ()
    with_usage: bool = False

    def whole(self, pieces: Sequence[Piece], counts: Mapping[str, int]) -> dict[str, Any]:
        """The body of an answer that isn't streamed."""
        choices = [
            self._choice(
                index=piece.index,
                text=(self.echo[piece.index] if self.echo else "") + piece.text,
                reports=piece.reports,
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
            )
            for piece in pieces
        ]
        return {**self.head.fields("text_completion"), "choices": choices, "usage": counts}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """The chunks before any token."""
        return [self._chunk([self._choice(index=index, text=text)]) for index, text in enumerate(self.echo)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The text, with the end if it came."""
        choice = self._choice(
            index=piece.index,
            text=piece.text,
            reports=piece.reports,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )
        return [self._chunk([choice])]

    def counts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The last chunk, without choices."""
        return {**self.head.fields("text_completion"), "choices": [], "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self.head.fields("text_completion"), "choices": choices}
        return {**chunk, "usage": None} if self.with_usage else chunk

    def _choice(
        self,
        *,
        index: int,
        text: str,
        reports: Sequence[TokenReport] = (),
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(reports) if self.with_logprobs else None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def _logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        return {
            "tokens": [self._text(report.logprob.id) for report in reports],
            "token_logprobs": [max(report.logprob.logprob, LOWEST_LOGPROB) for report in reports],
            "top_logprobs": [
                {
                    self._text(id): max(logprob, LOWEST_LOGPROB)
                    for id, logprob in (*report.logprob.top, (report.logprob.id, report.logprob.logprob))
                }
                for report in reports
            ],
            "text_offset": [report.offset for report in reports],
        }

    def _text(self, id: int) -> str:
        return escaped(self.pieces.token_bytes(id))

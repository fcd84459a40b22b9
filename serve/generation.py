"""From the engine's tokens to text: one `Generation` per HTTP request, in it one `Choice` per sequence.

    engine output --> Choice.accept: detokenise, watch stop strings, count, time --> Choice.take: what is new
                                  |                                                     |
                      stop string: cancel at the engine               Generation.take (streams) / .finished

Tokens are turned into text the moment they arrive; a slow reader gets what has gathered in one piece.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.client import EngineClient, Phase
from serve.detokenize import Detokenizer
from serve.errors import ApiError
from serve.request import Output, Request, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """The log-probabilities of one token, and where its text begins (characters into the choice's text)."""

    logprob: TokenLogprob
    offset: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new in one choice: text, the reports of the tokens behind it, and why it ended if it did."""

    index: int
    text: str
    reports: tuple[TokenReport, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(kw_only=True, eq=False)
class Choice:
    """One sequence: a sink of the engine's outputs.

    A choice ends with the engine's `finish`, with a stop string, or with `Generation.cancel`. The stop token
    that ended it counts as a generated token but has no text (unless `show_stop_token`).
    """

    index: int
    request: Request
    detokenizer: Detokenizer
    show_stop_token: bool
    silent_stops: frozenset[int]
    """Stop tokens that aren't told as `stop_reason`: the model's own end tokens."""
    client: EngineClient
    changed: Callable[[], None]
    arrival: float = field(default_factory=time.monotonic)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    _text: list[str] = field(default_factory=list[str])
    _reports: list[TokenReport] = field(default_factory=list[TokenReport])
    _last_token: float | None = None
    _is_taken: bool = False

    @property
    def is_done(self) -> bool:
        """No more tokens will come."""
        return self.finish_reason is not None

    def accept(self, output: Output) -> None:
        """Takes one output of the engine's; Sink's interface."""
        self._time(len(output.tokens))
        last = len(output.tokens) - 1
        for position, token in enumerate(output.tokens):
            if output.logprobs is not None:
                offset = self.detokenizer.num_characters
                self._reports.append(TokenReport(logprob=output.logprobs[position], offset=offset))
            if output.finish == "stop" and position == last and not self.show_stop_token:
                self.detokenizer.count()
            else:
                self._text.append(self.detokenizer.push(token))
            if self.detokenizer.stopped is not None:
                self.client.cancel(self.request.id)
                self.finish("stop", self.detokenizer.stopped)
                return
        if output.finish is not None:
            self.error = output.error
            token = output.tokens[-1] if output.finish == "stop" and output.tokens else None
            self.finish(output.finish, None if token in self.silent_stops else token)
        else:
            self.changed()

    def fail(self, reason: str) -> None:
        """Ends the choice without an answer; Sink's interface."""
        if not self.is_done:
            self.error = reason
            self.finish("error")

    def finish(self, reason: str, stop: str | int | None = None) -> None:
        """Ends the choice: the text that was held back goes out, the metrics get the times."""
        assert not self.is_done, f"{self.request.id} ended twice: {self.finish_reason}, {reason}"
        self._text.append(self.detokenizer.finish())
        self.finish_reason = reason
        self.stop_reason = stop
        if self.client.metrics is not None:
            self.client.metrics.finished(reason, time.monotonic() - self.arrival)
        self.changed()

    def take(self) -> Piece | None:
        """What is new since the last call; None if that is nothing a reader could see."""
        if self._is_taken or not (self.is_done or any(self._text)):
            return None
        self._is_taken = self.is_done
        text, self._text = "".join(self._text), []
        reports, self._reports = tuple(self._reports), []
        return Piece(
            index=self.index,
            text=text,
            reports=reports,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _time(self, count: int) -> None:
        metrics = self.client.metrics
        if not count or metrics is None:
            return
        now = time.monotonic()
        if self._last_token is None:
            metrics.first_token(now - self.arrival, len(self.request.prompt))
            metrics.tokens(count, None)
        else:
            metrics.tokens(count, now - self._last_token)
        self._last_token = now


class Generation:
    """All sequences of one HTTP request. `on_change` is called whenever there may be something new to `take`."""

    def __init__(self, client: EngineClient) -> None:
        self.choices: list[Choice] = []
        self.is_cancelled = False
        self._client = client
        self._changed = asyncio.Event()
        self.on_change: Callable[[], None] = self._changed.set

    def add(
        self,
        request: Request,
        detokenizer: Detokenizer,
        *,
        show_stop_token: bool,
        silent_stops: frozenset[int],
    ) -> None:
        """Adds the next choice; `start` sends it."""
        self.choices.append(
            Choice(
                index=len(self.choices),
                request=request,
                detokenizer=detokenizer,
                show_stop_token=show_stop_token,
                silent_stops=silent_stops,
                client=self._client,
                changed=lambda: self.on_change(),
            )
        )

    def start(self) -> None:
        """Submits every choice to the engine, in one message."""
        for choice in self.choices:
            self._client.submit(choice.request, choice)

    def cancel(self) -> None:
        """Nobody waits any more: the engine is told at once, and nothing is new from now on."""
        self.is_cancelled = True
        for choice in self.choices:
            if not choice.is_done:
                self._client.cancel(choice.request.id)
                choice.finish("abort")
        self.on_change()

    def fail(self, reason: str) -> None:
        """Ends every choice without an answer, here and at the engine."""
        for choice in self.choices:
            self._client.cancel(choice.request.id)
            choice.fail(reason)

    @property
    def is_over(self) -> bool:
        """Nothing more will come: each choice has ended, one has failed, or the generation is cancelled."""
        reasons = [choice.finish_reason for choice in self.choices]
        return self.is_cancelled or None not in reasons or "error" in reasons or "abort" in reasons

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.detokenizer.num_tokens for choice in self.choices)

    def take(self) -> list[Piece]:
        """What is new in the choices since the last call; nothing once the generation is cancelled.

        Raises ApiError when the engine failed a request.
        """
        if self.is_cancelled:
            return []
        for choice in self.choices:
            if choice.finish_reason in ("error", "abort"):
                status = 503 if self._client.phase is Phase.STOPPING else 500
                raise ApiError(status, choice.error or "the engine aborted the request")
        return [piece for choice in self.choices if (piece := choice.take()) is not None]

    async def finished(self) -> list[Piece]:
        """The whole choices, once they have ended; none if the generation is cancelled.

        Raises ApiError when the engine fails a request.
        """
        while not self.is_over:
            await self._changed.wait()
            self._changed.clear()
        return self.take()

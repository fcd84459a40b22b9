"""Which tokens of which requests run in the next step: continuous batching, chunked prefill (no tensor here).

There is no prefill phase and no decode phase. A request knows its tokens (prompt, then what was sampled) and
how many of them are computed, that is, have keys and values in the cache; each step it catches up by a chunk:

    tokens      p p p p p p p p p s        p = prompt, s = sampled
    step 1      |----------|                         positions 0..5   (max_chunk=6)
    step 2                  |----|                   positions 6..8   reaches the end: samples s
    step 3                        ||                 position 9       samples the next one

A step, within `max_batch_tokens`:
1. Running requests, oldest first. A chunk shrinks to the pages that are free. If not one more token fits, the
   newest running request is preempted: its pages are freed and it goes back to the *front* of the queue with
   its tokens, to be recomputed later. The newest itself just waits, with its pages, for an older one to end.
2. Then waiting requests in order of arrival, none overtaking. The first enters if enough pages are free for
   it and all running requests to compute their known tokens and take `PAGES_AHEAD` pages each on top. That is
   a watermark: pages are only allocated chunk by chunk, but who enters should not soon lose them again, and
   with them its work. With nothing running the head of the queue always enters.

Hence the running requests are at all times older than the waiting ones, the oldest always advances, and every
request ends. All decisions are functions of the calls made so far (no clock, no randomness), so every rank
that replays the same calls holds the same state.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from serve.blocks import PagePool
from serve.request import INVALID_TOKEN, Finish, Output, Request, RequestError

PAGES_AHEAD = 2
"""Pages that a request should find free beyond its known tokens when another one enters.

Simulated with 64 requests of 50 prompt and 400 output tokens and memory for a fifth of them, per token needed
0.72, 0.46, 0.29, 0.20 tokens were computed again for 0, 1, 2, 4 pages; but 4 took 8% more steps than 0, and 2
took 5%. Asking only for the first chunk of a prompt instead of all of it: 0.47 against 0 with long prompts.
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds a scheduler works within. Raises `ValueError` unless all are at least 1."""

    max_length: int
    """Most tokens of a request, prompt and output together."""
    max_batch_tokens: int
    """Most tokens computed in one step."""
    max_sequences: int
    """Most requests running at once."""
    vocab_size: int
    """Token ids are below this."""
    max_chunk: int | None = None
    """Most tokens of one request in one step; None = `max_batch_tokens`."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


class Chunk(NamedTuple):
    """Consecutive tokens of one request to compute in this step; a named tuple, for one is made per token."""

    id: str
    """The request."""
    adapter: str | None
    """The adapter it runs with."""
    start: int
    """Position of the first token; everything before is in the cache."""
    tokens: tuple[int, ...]
    """The tokens at positions start .. end - 1."""
    pages: tuple[int, ...]
    """The request's block table: exactly the pages of positions 0 .. end - 1."""
    samples: bool
    """Whether the last token's logits are wanted, the chunk having reached the end of the known tokens."""

    @property
    def length(self) -> int:
        """Tokens in the chunk."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """Position after the last token, which is also the context length the chunk attends to."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one step computes. Chunks of one adapter are adjacent (base first, then by name), each by age."""

    chunks: tuple[Chunk, ...]
    """At most one per request; none if nothing can run."""
    preempted: tuple[str, ...]
    """Requests that lost their pages in making this plan, newest first."""

    @property
    def num_tokens(self) -> int:
        """Tokens over all chunks."""
        return sum(chunk.length for chunk in self.chunks)


@dataclass(eq=False, slots=True)
class _Live:
    """A request that hasn't ended, and how far it is."""

    request: Request
    arrival: int
    tokens: list[int]  # prompt, then output
    stops: frozenset[int]  # tokens that end it, once it has more than `least` tokens
    least: int
    most: int | None  # tokens at which it ends anyway
    computed: int = 0
    pages: tuple[int, ...] = ()  # shared with its chunks, hence never changed in place
    ended: bool = False


@dataclass(eq=False, slots=True)
class _Step:
    """A plan in the making."""

    budget: int
    parts: list[tuple[_Live, int]] = field(default_factory=list[tuple[_Live, int]])
    preempted: list[str] = field(default_factory=list[str])


class Scheduler:
    """The requests that haven't ended, their pages, and the decisions described at the top of this file.

    The engine's loop, the same on every rank:

        add / cancel ...  ->  plan = schedule()  ->  run and sample  ->  outputs = update(plan, sampled)

    `pool` may also hold pages of other owners (adapter prefixes); the scheduler frees only what it allocated.
    """

    def __init__(self, limits: Limits, pool: PagePool, eos_ids: frozenset[int]) -> None:
        self._limits = limits
        self._pool = pool
        self._eos_ids = eos_ids
        self._live: dict[str, _Live] = {}
        self._running: list[_Live] = []  # oldest first
        self._waiting: deque[_Live] = deque()  # oldest first, all younger than the running
        self._failed: list[Output] = []  # ended in schedule(), told by the next update()
        self._in_flight: tuple[Plan, tuple[_Live, ...]] | None = None
        self._arrivals = 0
        self._preemptions = 0

    def add(self, request: Request) -> Output | None:
        """Queues a request; returns an Output with finish="error" instead if it can never run.

        Raises `ValueError` if a live request has the same id.
        """
        if request.id in self._live:
            raise ValueError(f"request {request.id!r} is still running")
        try:
            limit = self._length_limit()
            request.check(vocab_size=self._limits.vocab_size, max_length=self._limits.max_length)
            if len(request.prompt) + 1 > limit:
                rule = f"tokens don't fit in the {limit} of the KV cache; shorten it or raise serve.kv_memory"
                raise RequestError("prompt", len(request.prompt), rule)
        except RequestError as error:
            return Output(id=request.id, finish="error", error=str(error))
        live = self._live_of(request)
        self._arrivals += 1
        self._live[request.id] = live
        self._waiting.append(live)
        return None

    def cancel(self, id: str) -> Output | None:
        """Ends a request at once, also between schedule() and update(); None if there is none of this id."""
        live = self._live.get(id)
        if live is None:
            return None
        self._remove(live)
        return Output(id=id, finish="abort")

    def schedule(self) -> Plan:
        """Decides the next step and gives its chunks their pages; update() must follow before the next call.

        While a request is live the plan holds a chunk, or else update() will report the request that failed.
        """
        assert self._in_flight is None, "schedule() again before update()"
        step = _Step(budget=self._limits.max_batch_tokens)
        self._continue_running(step)
        self._admit_waiting(step)
        parts = step.parts
        if any(live.request.adapter for live, _ in parts):
            parts = sorted(parts, key=lambda part: part[0].request.adapter or "")  # stable: each still by age
        chunks = tuple(_chunk(live, length) for live, length in parts)
        plan = Plan(chunks=chunks, preempted=tuple(step.preempted))
        self._in_flight = (plan, tuple(live for live, _ in parts))
        return plan

    def update(self, plan: Plan, sampled: Mapping[str, int]) -> list[Output]:
        """Takes in the results of `plan` and returns what every request concerned got, in plan order.

        `sampled` maps the id of every chunk with `samples` to its next token, or to `INVALID_TOKEN`, which
        ends the request with an error. Requests cancelled since schedule() are passed over.
        """
        assert self._in_flight is not None and self._in_flight[0] is plan, "not the plan of the last schedule()"
        lives = self._in_flight[1]
        self._in_flight = None
        outputs, self._failed = self._failed, []
        limit = self._length_limit()
        for chunk, live in zip(plan.chunks, lives, strict=True):
            if live.ended:
                continue
            live.computed = chunk.start + len(chunk.tokens)
            if chunk.samples:
                outputs.append(self._append(live, sampled[chunk.id], limit))
        return outputs

    def sampling(self) -> tuple[list[Request], list[Sequence[int]]]:
        """The requests of the plan in flight whose chunks sample, in plan order, and their known tokens, prompt then
        output, as the sampler takes them; read only."""
        assert self._in_flight is not None, "no plan in flight"
        plan, lives = self._in_flight
        chosen = [live for chunk, live in zip(plan.chunks, lives, strict=True) if chunk.samples]
        return [live.request for live in chosen], [live.tokens for live in chosen]

    def uses(self, adapter: str) -> bool:
        """Whether a live request runs with this adapter."""
        return any(live.request.adapter == adapter for live in self._live.values())

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a failure is yet to be told: then call schedule() and update()."""
        return bool(self._live or self._failed)

    def stats(self) -> dict[str, int]:
        """Gauges for `/metrics`: running, waiting, free_pages, num_pages, preemptions (total so far)."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "free_pages": self._pool.num_free,
            "num_pages": self._pool.num_pages,
            "preemptions": self._preemptions,
        }

    def state_digest(self) -> str:
        """Hash of the whole state, pool included; equal on ranks that replayed the same calls."""
        lives = [
            (live.request, live.arrival, live.tokens, live.computed, live.pages)
            for live in (*self._running, *self._waiting)
        ]
        state = (len(self._running), lives, self._failed, self._in_flight and self._in_flight[0])
        text = repr((state, self._arrivals, self._preemptions, self._pool.owners))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def check(self) -> None:
        """Raises `AssertionError` if the state contradicts itself; for tests and for hunting bugs."""
        self._pool.check()
        order = [live.arrival for live in (*self._running, *self._waiting)]
        assert order == sorted(order), f"out of order of arrival: {order}"
        assert sorted(order) == sorted(live.arrival for live in self._live.values()), "a request is lost"
        assert len(self._running) <= self._limits.max_sequences, len(self._running)
        planned = {} if self._in_flight is None else {chunk.id: chunk.end for chunk in self._in_flight[0].chunks}
        for live in self._running:
            end = planned.get(live.request.id, live.computed)
            assert len(live.pages) == self._pool.pages_for(end), (live.request.id, live.pages, end)
            assert live.computed < len(live.tokens) <= self._limits.max_length, live.request.id
        for live in self._waiting:
            assert not live.pages and not live.computed, (live.request.id, live.pages, live.computed)
        held = [page for live in self._running for page in live.pages]
        assert len(set(held)) == len(held), f"a page belongs to two requests: {sorted(held)}"
        assert all(self._pool.owners[page] for page in held), "a request holds a free page"

    def _continue_running(self, step: _Step) -> None:
        index, page_size = 0, self._pool.page_size
        while index < len(self._running) and step.budget:
            live = self._running[index]
            if live.computed + 1 == len(live.tokens) <= len(live.pages) * page_size:  # decodes, its page has room
                step.budget -= 1
                step.parts.append((live, 1))
                index += 1
                continue
            length = self._fitting(live, step)
            while not length and live is not self._running[-1]:
                self._preempt_newest(step)
                length = self._fitting(live, step)
            if length:
                self._place(live, length, step)
            index += 1
        if self._running and not step.parts:  # alone, and still no page: the pool has shrunk since add()
            self._fail(self._running[0])

    def _admit_waiting(self, step: _Step) -> None:
        while self._waiting and len(self._running) < self._limits.max_sequences and step.budget:
            live = self._waiting[0]
            needed = self._shortage(live) + sum(self._shortage(other) for other in self._running)
            if self._running and needed > self._pool.num_free:
                return
            length = self._fitting(live, step)
            if not length:
                self._fail(live)
                continue
            self._running.append(self._waiting.popleft())
            self._place(live, length, step)

    def _fitting(self, live: _Live, step: _Step) -> int:
        """Tokens of its next chunk, shrunk to its own and the free pages; 0 = not one more fits."""
        room = (len(live.pages) + self._pool.num_free) * self._pool.page_size - live.computed
        return min(len(live.tokens) - live.computed, step.budget, self._limits.max_chunk or step.budget, room)

    def _shortage(self, live: _Live) -> int:
        """Pages it should find free: those its known tokens still need, and some to go on."""
        return self._pool.pages_for(len(live.tokens)) - len(live.pages) + PAGES_AHEAD

    def _place(self, live: _Live, length: int, step: _Step) -> None:
        """Puts its next `length` tokens into the step and allocates their pages."""
        missing = self._pool.pages_for(live.computed + length) - len(live.pages)
        if missing:
            live.pages += tuple(self._pool.allocate(missing))
        step.budget -= length
        step.parts.append((live, length))

    def _preempt_newest(self, step: _Step) -> None:
        """Back to the front of the queue; never one already in the step, those being older."""
        live = self._running.pop()
        self._pool.free(live.pages)
        live.pages = ()
        live.computed = 0
        self._waiting.appendleft(live)
        self._preemptions += 1
        step.preempted.append(live.request.id)

    def _append(self, live: _Live, token: int, limit: int) -> Output:
        """Adds a sampled token and ends the request if that was its last."""
        id = live.request.id
        if token == INVALID_TOKEN:
            self._remove(live)
            return Output(id=id, finish="error", error="the model's logits for this request are not finite")
        assert 0 <= token < self._limits.vocab_size, (id, token)
        live.tokens.append(token)
        finish = self._finish(live, token, limit)
        if finish:
            self._remove(live)
        return Output(id=id, tokens=(token,), finish=finish)

    def _finish(self, live: _Live, token: int, limit: int) -> Finish | None:
        length = len(live.tokens)
        if token in live.stops and length > live.least:
            return "stop"
        return "length" if length == live.most or length >= limit else None

    def _live_of(self, request: Request) -> _Live:
        sampling, length = request.sampling, len(request.prompt)
        eos_ids: frozenset[int] = frozenset() if sampling.ignore_eos else self._eos_ids
        return _Live(
            request=request,
            arrival=self._arrivals,
            tokens=list(request.prompt),
            stops=eos_ids.union(sampling.stop_ids) if sampling.stop_ids else eos_ids,
            least=length + sampling.min_tokens,
            most=None if sampling.max_tokens is None else length + sampling.max_tokens,
        )

    def _length_limit(self) -> int:
        """Most tokens of a request: `max_length`, or what the pages not pinned by other owners hold."""
        held = sum(len(live.pages) for live in self._running)
        pinned = self._pool.num_used - held
        return min(self._limits.max_length, (self._pool.num_pages - pinned) * self._pool.page_size)

    def _fail(self, live: _Live) -> None:
        """Ends a request that no page is left for although it has the pool to itself."""
        self._remove(live)
        error = f"no KV page left: {self._pool.num_used} of {self._pool.num_pages} are pinned by adapters"
        self._failed.append(Output(id=live.request.id, finish="error", error=error))

    def _remove(self, live: _Live) -> None:
        """Forgets a request and frees its pages."""
        live.ended = True
        del self._live[live.request.id]
        (self._running if live in self._running else self._waiting).remove(live)
        self._pool.free(live.pages)
        live.pages = ()


def _chunk(live: _Live, length: int) -> Chunk:
    end = live.computed + length
    return Chunk(
        id=live.request.id,
        adapter=live.request.adapter,
        start=live.computed,
        tokens=tuple(live.tokens[live.computed : end]),
        pages=live.pages,
        samples=end == len(live.tokens),
    )

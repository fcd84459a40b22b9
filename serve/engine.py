"""The engine: every rank replays the same scheduler; one samples a row; rank 0 talks to the outside.

A turn of the loop, the same on every rank:

    rank 0: what came in  --broadcast-->  every rank: add, cancel, (un)load adapters
    schedule (deterministic, no communication)  ->  forward (all ranks)
    last stage: each tensor rank samples its share of the rows  --broadcasts-->  update

Nothing assumes that logits are equal on two ranks: a row is sampled by one of them. While idle, rank 0 sends an empty
turn every second, which is also how the other ranks know that it lives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from conf.schema import ConfigError
from parallel import comm
from parallel.mesh import Mesh
from serve.blocks import PagePool
from serve.request import Output, Request, RequestError, TokenLogprob
from serve.runner import Runner
from serve.sampler import Sampler
from serve.scheduler import Plan, Scheduler


@dataclass(frozen=True)
class Events:
    """What came in since the last turn, as rank 0 tells the others; plain JSON data."""

    submit: Sequence[Mapping[str, Any]] = ()
    """Requests (`Request.to_dict`)."""
    cancel: Sequence[str] = ()
    """Request ids."""
    adapters: Sequence[Mapping[str, Any]] = ()
    """{"op": "load" | "unload", "name", "path", "reply"}."""
    stop: bool = False
    """Leave the loop after this turn; what still runs is given up."""


@dataclass(frozen=True)
class Turn:
    """What a turn gave; only rank 0 tells it to anyone."""

    outputs: Sequence[Output] = ()
    replies: Sequence[Mapping[str, Any]] = ()
    """Answers to adapter events: {"reply", "error": text or None}, after a load also "max_length"."""
    stats: Mapping[str, int] = field(default_factory=dict)


class Front(Protocol):
    """Rank 0's side of the engine: the API process, or a list of prompts."""

    def events(self, *, idle: bool) -> Events:
        """What came in; when `idle` may wait up to a second for something."""
        ...

    def deliver(self, turn: Turn) -> None:
        """Takes what a turn gave."""
        ...


class Engine:
    """Scheduler, runner and sampler of one rank. All ranks of the mesh call `run` (or `turn`) together."""

    def __init__(self, runner: Runner, scheduler: Scheduler, sampler: Sampler, pool: PagePool, max_length: int) -> None:
        self.runner, self.scheduler, self.sampler, self.pool = runner, scheduler, sampler, pool
        self.max_length = max_length
        self.mesh: Mesh = runner.mesh
        self._unloading: dict[str, Any] = {}

    def run(self, front: Front | None) -> None:
        """Turns until an event says stop. front: on rank 0; None on the other ranks."""
        while True:
            events = Events() if front is None else front.events(idle=not self.scheduler.has_work)
            events = self.share(events)
            turn = self.turn(events)
            if front is not None:
                front.deliver(turn)
            if events.stop:
                return

    def share(self, events: Events) -> Events:
        """Rank 0's events on every rank (two broadcasts over the world)."""
        if self.mesh.world.size == 1:
            return events
        payload = json.dumps(vars(events)).encode() if self.mesh.world.rank == 0 else b""
        return Events(**json.loads(comm.broadcast_bytes(payload, self.mesh.world)))

    def turn(self, events: Events) -> Turn:
        """Applies the events, then computes one step if there is work."""
        outputs: list[Output] = []
        for fields in events.submit:
            outputs += self._submit(fields)
        for id in events.cancel:
            ended = self.scheduler.cancel(id)
            outputs += [] if ended is None else [ended]
        replies = [reply for event in events.adapters for reply in self._adapter(event)]
        if self.scheduler.has_work and not events.stop:
            outputs += self._step()
        replies += self._finish_unloading()
        return Turn(outputs, replies, self.scheduler.stats())

    def _submit(self, fields: Mapping[str, Any]) -> list[Output]:
        try:
            request = Request.from_dict(fields)
            if request.adapter is not None and (
                request.adapter not in self.runner.adapters or request.adapter in self._unloading
            ):
                raise RequestError("adapter", request.adapter, "is not loaded")
            request = self._within(request)
        except RequestError as error:
            return [Output(id=str(fields.get("id")), finish="error", error=str(error))]
        refused = self.scheduler.add(request)
        return [] if refused is None else [refused]

    def _within(self, request: Request) -> Request:
        """The request with max_tokens cut to what its adapter's prefix leaves of the context."""
        if request.adapter is None or not self.runner.adapters[request.adapter].length:
            return request
        longest = self.longest(request.adapter)
        request.check(vocab_size=self.runner.decoder.architecture.vocab_size, max_length=longest)
        room = longest - len(request.prompt)
        asked = request.sampling.max_tokens
        most = room if asked is None else min(asked, room)
        return replace(request, sampling=replace(request.sampling, max_tokens=most))

    def _adapter(self, event: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Replies to a load at once; to an unload when no request uses the adapter any more."""
        name, reply = event["name"], event["reply"]
        if event["op"] == "load":
            error = self._load(name, Path(event["path"]))
            longest = {} if error is not None else {"max_length": self.longest(name)}
            return [{"reply": reply, "error": error, **longest}]
        if self.scheduler.uses(name):
            self._unloading[name] = reply
            return []
        try:
            self.runner.unload_adapter(name, self.pool)
        except ConfigError as error:
            return [{"reply": reply, "error": str(error)}]
        return [{"reply": reply, "error": None}]

    def _load(self, name: str, directory: Path) -> str | None:
        """Loads on every rank or on none (a host may lack the files); returns what went wrong."""
        error: str | None = None
        try:
            self.runner.load_adapter(name, directory, self.pool)
            if self.longest(name) < 2:
                self.runner.unload_adapter(name, self.pool)
                raise ConfigError(f"adapters.{name}={directory}: its prefix fills the whole context")
        except Exception as refusal:  # whatever is wrong with the files, the requests that run must not suffer
            error = str(refusal)
            print(f"serve: [{self.mesh.label}] {error}", file=sys.stderr, flush=True)
        anywhere = comm.all_reduce(torch.tensor([int(error is not None)]), self.mesh.world, "max").item()
        if anywhere and error is None:
            self.runner.unload_adapter(name, self.pool)
            error = f"adapters.{name}={directory} could not be loaded on another rank; see its log"
        return error

    def longest(self, adapter: str) -> int:
        """Most tokens of a request with this adapter: a prefix takes its length off the context."""
        return self.max_length - self.runner.adapters[adapter].length

    def _finish_unloading(self) -> list[Mapping[str, Any]]:
        done = [name for name in self._unloading if not self.scheduler.uses(name)]
        for name in done:
            self.runner.unload_adapter(name, self.pool)
        return [{"reply": self._unloading.pop(name), "error": None} for name in done]

    def _step(self) -> list[Output]:
        plan = self.scheduler.schedule()
        sampled: dict[str, int] = {}
        logprobs: dict[str, TokenLogprob] = {}
        if plan.chunks:
            sampled, logprobs = self._sample(plan, self.runner.forward(plan.chunks))
        outputs = self.scheduler.update(plan, sampled)
        return [_with_logprobs(output, logprobs.get(output.id)) for output in outputs] if logprobs else outputs

    def _sample(self, plan: Plan, logits_BV: Tensor | None) -> tuple[dict[str, int], dict[str, TokenLogprob]]:
        """The sampled ids on every rank, and their log-probabilities where asked for."""
        ids = [chunk.id for chunk in plan.chunks if chunk.samples]
        if not ids:
            return {}, {}
        mesh, shares = self.mesh, self.runner.shares(len(ids))
        mine: tuple[list[int], list[TokenLogprob | None]] = [], []
        if logits_BV is not None and len(logits_BV):
            requests, histories = self.scheduler.sampling()
            share = shares[mesh.tensor.rank]
            mine = self.sampler.sample(logits_BV, requests[share], histories[share])
        tokens, details = mine if mesh.world.size == 1 else self._gather(*mine, shares)
        found = {id: detail for id, detail in zip(ids, details, strict=True) if detail is not None}
        return dict(zip(ids, tokens, strict=True)), found

    def _gather(
        self, tokens: list[int], details: list[TokenLogprob | None], shares: Sequence[slice]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """What the last stage's tensor ranks sampled, on every rank: a broadcast over the world from each that had
        rows."""
        mesh = self.mesh
        first = mesh.world.ranks[0] + (mesh.pipeline.size - 1) * mesh.tensor.size
        payload = json.dumps([tokens, [None if d is None else d.to_dict() for d in details]]).encode()
        all_tokens: list[int] = []
        all_details: list[TokenLogprob | None] = []
        for place, share in enumerate(shares):
            if share.start == share.stop:
                break  # the first ranks have the rows
            some, theirs = json.loads(comm.broadcast_bytes(payload, mesh.world, first + place))
            all_tokens += some
            all_details += [None if d is None else TokenLogprob.from_dict(d) for d in theirs]
        return all_tokens, all_details


def _with_logprobs(output: Output, detail: TokenLogprob | None) -> Output:
    if detail is None or not output.tokens:
        return output
    return Output(id=output.id, tokens=output.tokens, logprobs=(detail,), finish=output.finish, error=output.error)

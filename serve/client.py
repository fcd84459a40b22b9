"""The engine as the API process sees it: submit, cancel, adapters; outputs find their requests."""

import asyncio
import enum
import itertools
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from serve.errors import ApiError
from serve.link import Message
from serve.metrics import Metrics
from serve.request import Output, Request


class Phase(enum.Enum):
    """Where the server is in its life; the values are what /health says."""

    STARTING = "starting"
    READY = "ok"
    STOPPING = "stopping"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A name that requests can ask for: the base model, or an adapter on it (then `parent` is the base)."""

    name: str
    root: str
    max_length: int
    vocab_size: int
    parent: str | None = None
    created: int


class Sink(Protocol):
    """Whoever waits for the outputs of one request."""

    def accept(self, output: Output) -> None:
        """Takes one output; the one with `finish` set is the last."""
        ...

    def fail(self, reason: str) -> None:
        """No output will come any more, because of `reason`."""
        ...


class Sender(Protocol):
    """The part of serve.link.ApiLink that is needed here."""

    def say(self, key: str, item: Message | str) -> None:
        """Adds `item` to the list `key` of the next message to the engine."""
        ...


class EngineClient:
    """Routes messages between the requests of the API process and the engine; lives on one event loop.

    Nothing here waits for the engine except the changes of adapters.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.models: dict[str, Model] = {}
        self.settings: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_orderly = False
        self.metrics: Metrics | None = None
        self._link: Sender | None = None
        self._sinks: dict[str, Sink] = {}
        self._replies: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._adapters = asyncio.Lock()

    def attach(self, link: Sender) -> None:
        """Gives the client its way to the engine."""
        self._link = link

    # ---- towards the engine ----

    def submit(self, request: Request, sink: Sink) -> None:
        """Sends `request`; its outputs go to `sink` until one has `finish` set."""
        if self.closed.done():
            sink.fail(f"the server is shutting down: {self.closed.result()}")
            return
        self._sinks[request.id] = sink
        self._say("submit", request.to_dict())

    def cancel(self, id: str) -> None:
        """Tells the engine that nobody waits for request `id` any more; outputs under way are dropped."""
        if self._sinks.pop(id, None) is not None:
            self._say("cancel", id)

    async def load_adapter(self, name: str, path: str) -> None:
        """Has the engine load the adapter in directory `path`, and offers it as model `name`.

        Raises ApiError: 400 for a name that is taken or an adapter the engine refuses, 503 when that ends.
        """
        async with self._adapters:
            if name in self.models:
                raise ApiError(400, f"lora_name={name} is already served; unload it first", param="lora_name")
            reply = await self._change_adapter({"op": "load", "name": name, "path": path})
            self._add_adapter({**reply, "name": name, "path": path})

    async def unload_adapter(self, name: str) -> None:
        """Stops offering adapter `name`; requests that still use it go on, then the engine drops it.

        Raises ApiError: 404 for a name that is no adapter, 400 if the engine refuses, 503 when it ends.
        """
        async with self._adapters:
            if name not in self.models or self.models[name].parent is None:
                raise ApiError(404, f"lora_name={name} is no loaded adapter", param="lora_name")
            model = self.models.pop(name)
            try:
                await self._change_adapter({"op": "unload", "name": name, "path": model.root})
            except ApiError:
                self.models[name] = model
                raise

    def stop(self) -> None:
        """No new requests from now on; what runs goes on until the engine ends."""
        self.phase = Phase.STOPPING

    # ---- from the engine ----

    def on_message(self, message: Message) -> None:
        """Takes one message of the engine's."""
        for output in message.get("outputs", ()):
            self._route(Output.from_dict(output))
        for reply in message.get("replies", ()):
            answer = self._replies.pop(reply["reply"], None)
            if answer is not None and not answer.done():
                answer.set_result(reply)
        if "stats" in message and self.metrics is not None:
            self.metrics.engine_stats(message["stats"])
        if "settings" in message:
            self.settings.set_result(message["settings"])
        if "ready" in message:
            self._start(message["ready"])
        if "stopping" in message:
            self.stop()
        if "shutdown" in message:
            self.is_orderly = True
            self._end(message["shutdown"])

    def on_close(self, reason: str) -> None:
        """The channel is gone."""
        self._end(reason)

    def _route(self, output: Output) -> None:
        sink = self._sinks.get(output.id)
        if sink is None:
            return
        if output.finish is not None:
            del self._sinks[output.id]
        try:
            sink.accept(output)
        except Exception as error:  # a token nobody can spell must not end everyone else's streams
            traceback.print_exc()
            self.cancel(output.id)
            sink.fail(f"the server failed: {type(error).__name__}: {error}")

    def _start(self, ready: Mapping[str, Any]) -> None:
        name = ready["model_name"]
        self.models[name] = Model(
            name=name,
            root=ready["root"],
            max_length=ready["max_length"],
            vocab_size=ready["vocab_size"],
            created=int(time.time()),
        )
        self.metrics = Metrics(name)
        for adapter in ready.get("adapters", ()):
            self._add_adapter(adapter)
        if self.phase is Phase.STARTING:
            self.phase = Phase.READY

    def _add_adapter(self, adapter: Mapping[str, Any]) -> None:
        base = next(iter(self.models.values()))
        self.models[adapter["name"]] = Model(
            name=adapter["name"],
            root=adapter["path"],
            max_length=adapter.get("max_length", base.max_length),
            vocab_size=base.vocab_size,
            parent=base.name,
            created=int(time.time()),
        )

    def _end(self, reason: str) -> None:
        if self.closed.done():
            return
        self.phase = Phase.STOPPING
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.fail(f"the server is shutting down: {reason}")
        for answer in self._replies.values():
            if not answer.done():
                answer.set_exception(ApiError(503, f"the server is shutting down: {reason}"))
        self._replies.clear()
        self.closed.set_result(reason)

    async def _change_adapter(self, change: Message) -> Mapping[str, Any]:
        """Sends one change and waits for the answer; raises ApiError if it is a refusal."""
        if self.closed.done():
            raise ApiError(503, f"the server is shutting down: {self.closed.result()}")
        number = next(self._numbers)
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._replies[number] = answer
        self._say("adapters", {**change, "reply": number})
        reply = await answer
        if reply.get("error") is not None:
            raise ApiError(400, reply["error"], param="lora_path" if change["op"] == "load" else "lora_name")
        return reply

    def _say(self, key: str, item: Message | str) -> None:
        if self._link is not None:
            self._link.say(key, item)

"""Server-sent events: the way of a generation's pieces into the client's socket, without a task's turn for each.

    one engine message: 32 tokens --> Choice.accept, 32 times --> Outbox: renders 32 events, then writes 32 sockets

The task that serves the request waits meanwhile. It sends the head, waits for a slow reader, and sends the end:
the last pieces or the error, the usage, [DONE]. Waking it for each token, and ASGI's layers around `send`, would
take as long as all the rest. Rendering before writing is for readers on this machine: one that is woken by the
first event finds the others there, instead of being woken (and pushing somebody aside) by every one of them.
"""

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve import responses
from serve.errors import ApiError
from serve.generation import Generation, Piece
from serve.responses import Answer, Frames

EXTENSION = "onemesh.connection"
"""The ASGI extension that holds the connection of a request."""


class Connection(HttpToolsProtocol):
    """uvicorn's side of a connection, which streams find in their scope and write to."""

    def on_message_begin(self) -> None:
        """httptools' callback: a request begins, with a scope of its own."""
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: {"connection": self}}


class Outbox:
    """The streams that have news in this turn of the event loop."""

    def __init__(self) -> None:
        self._streams: dict[EventStream, None] = {}

    def add(self, stream: "EventStream") -> None:
        """Has `stream` rendered and written at the end of this turn."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._flush)
        self._streams[stream] = None

    def _flush(self) -> None:
        streams, self._streams = self._streams, {}
        taken = [(stream, stream.take()) for stream in streams]
        for stream, data in taken:
            if data:
                stream.write(data)


class EventStream(Response):
    """A response of server-sent events that cancels its generation the moment the client goes away."""

    def __init__(self, generation: Generation, answer: Answer, outbox: Outbox, *, prompt_tokens: int) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                           "X-Accel-Buffering": "no"})  # fmt: skip
        self._generation = generation
        self._answer = answer
        self._frames = Frames(answer)
        self._outbox = outbox
        self._prompt_tokens = prompt_tokens
        self._for_task = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; ASGI's interface, on a `Connection`."""
        self._connection: Connection = scope["extensions"][EXTENSION]["connection"]
        generation = self._generation
        async with cancelled_with_client(receive, generation):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            opening = b"".join(map(responses.event, self._answer.opening(len(generation.choices))))
            if opening:
                await send({"type": "http.response.body", "body": opening, "more_body": True})
            generation.on_change = lambda: self._outbox.add(self)
            while not generation.is_over:
                self._outbox.add(self)
                await self._for_task.wait()
                self._for_task.clear()
                await self._connection.flow.drain()
            await send({"type": "http.response.body", "body": self._end(), "more_body": False})

    def take(self) -> bytes:
        """The events of what is new; nothing when it is the task's turn, or nobody's because the client has left."""
        if self._generation.is_over or self._connection.flow.write_paused:
            self._for_task.set()
            return b""
        if self._connection.transport.is_closing():
            return b""
        try:
            return self._events(self._generation.take())
        except Exception as error:  # what can't be rendered must not end everyone else's streams
            traceback.print_exc()
            self._generation.fail(f"the server failed: {type(error).__name__}: {error}")
            return b""

    def write(self, data: bytes) -> None:
        """Writes `data` as one chunk of the body."""
        self._connection.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _events(self, pieces: list[Piece]) -> bytes:
        return b"".join(map(self._frames.events, pieces))

    def _end(self) -> bytes:
        """The last events; an error in the middle of an answer is one."""
        try:
            events = self._events(self._generation.take())
            if self._answer.with_usage:
                counts = responses.usage(self._prompt_tokens, self._generation.num_generated)
                events += responses.event(self._answer.counts(counts))
        except ApiError as error:
            events = responses.event(error.body())
        return events + responses.END_OF_STREAM


@contextlib.asynccontextmanager
async def cancelled_with_client(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Cancels `generation` at the engine as soon as the client disconnects or the block is left."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.cancel()

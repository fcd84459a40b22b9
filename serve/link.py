"""The channel between the engine (rank 0) and the API process: batched messages over one socket pair.

Frame: 4 bytes, big endian, the length of what follows; then one JSON object (UTF-8). Each side sends one
object per engine step (engine) or per turn of the event loop (API): a step costs one system call each way.

  API -> engine   {"submit": [{"id", "prompt": [ids], "sampling": {...}, "adapter": str | null}, ...],
                   "cancel": [id, ...],
                   "adapters": [{"op": "load" | "unload", "name", "path", "reply": id}, ...],
                   "stop": true}
  engine -> API   {"settings": {"tokenizer": directory, "api_key": str | null}}     once, before all else
                  {"ready": {"model_name", "root", "max_length", "vocab_size",
                             "adapters": [{"name", "path", "max_length" (default: the base's)}, ...]}}
                  {"outputs": [{"id", "tokens": [ids], "logprobs": [...] | null, "finish", "error"}, ...],
                   "replies": [{"reply": id, "error": str | null, "max_length" (default: the base's)}, ...],
                   "stats": {"running", "waiting", "kv_usage", "preemptions"}}
                  {"stopping": true}                   take no new requests; what runs goes on
                  {"shutdown": "why"}                  the last one; a socket that ends without it is a crash

Every key is optional. Requests and outputs are the dicts of serve.request. The engine never blocks on a
slow API process: what the socket doesn't take is kept and sent with the next call.
"""

import asyncio
import json
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

Message = dict[str, Any]

HEADER_BYTES = 4
LARGEST_FRAME = 256 * 2**20
LARGEST_BACKLOG = 256 * 2**20


class LinkClosed(ConnectionError):
    """The other process has ended, or the channel can't be used any more; the message says which."""


def encode(message: Message) -> bytes:
    """`message` as one frame."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class FrameReader:
    """Cuts a byte stream into messages; keeps the incomplete rest."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yields the messages that `data` completes, in order.

        Raises LinkClosed for a frame that is longer than any real one, or isn't JSON: the stream is lost.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            length = int.from_bytes(self._buffer[start : start + HEADER_BYTES], "big")
            if length > LARGEST_FRAME:
                raise LinkClosed(f"a message of {length} bytes came from the other process; the channel is broken")
            end = start + HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            try:
                message = json.loads(self._buffer[start + HEADER_BYTES : end])
            except ValueError as error:
                raise LinkClosed(f"a message that isn't JSON came from the other process: {error}") from error
            yield message
            start = end
        del self._buffer[:start]


@dataclass(kw_only=True)
class ClientMessages:
    """All that the API process said since the last poll, merged.

    Apply `submit`, then `cancel`, then `adapters`: an adapter is unloaded after the requests that still name
    it, and no request names one before its load was answered. `stop` asks for what SIGTERM asks for.
    """

    submit: list[Message] = field(default_factory=list)
    cancel: list[str] = field(default_factory=list)
    adapters: list[Message] = field(default_factory=list)
    stop: bool = False

    def __bool__(self) -> bool:
        return bool(self.submit or self.cancel or self.adapters or self.stop)


class EngineLink:
    """The engine's end, for one thread: synchronous, never blocks longer than the timeout it was given."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._reader = FrameReader()
        self._unsent = bytearray()

    def send(self, message: Message) -> None:
        """Queues `message` and writes what the socket takes at once.

        Raises LinkClosed if the API process has ended or doesn't read any more.
        """
        self._unsent += encode(message)
        self._write()
        if len(self._unsent) > LARGEST_BACKLOG:
            raise LinkClosed(f"the API process left {len(self._unsent)} bytes unread")

    def poll(self, timeout: float = 0.0) -> ClientMessages:
        """What the API process has said; waits up to `timeout` seconds when there is nothing yet.

        Raises LinkClosed if the API process has ended.
        """
        messages = ClientMessages()
        self._write()
        events = self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), timeout)
        if events & select.POLLOUT:
            self._write()
        if events & ~select.POLLOUT:
            self._read(messages)
        return messages

    def flush(self, timeout: float) -> bool:
        """Writes everything that is queued; False if `timeout` seconds weren't enough for a part of it."""
        while self._unsent:
            if not self._wait(select.POLLOUT, timeout):
                return False
            self._write()
        return True

    def close(self) -> None:
        """Closes this end; the API process sees the end of the stream."""
        self._socket.close()

    def _wait(self, events: int, timeout: float) -> int:
        poll = select.poll()
        poll.register(self._socket, events)
        ready = poll.poll(timeout * 1000)
        return ready[0][1] if ready else 0

    def _write(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed(f"the API process has ended ({error.strerror})") from error
            del self._unsent[:sent]

    def _read(self, messages: ClientMessages) -> None:
        while True:
            try:
                data = self._socket.recv(2**18)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed(f"the API process has ended ({error.strerror})") from error
            if not data:
                raise LinkClosed("the API process has ended")
            for message in self._reader.feed(data):
                messages.submit += message.get("submit", ())
                messages.cancel += message.get("cancel", ())
                messages.adapters += message.get("adapters", ())
                messages.stop |= message.get("stop", False)


class ApiLink(asyncio.Protocol):
    """The API process's end: messages arrive through `on_message`, the end of the stream through `on_close`.

    What is said within one turn of the event loop leaves as one message.
    """

    def __init__(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_close = on_close
        self._reader = FrameReader()
        self._transport: asyncio.WriteTransport | None = None
        self._outgoing: Message = {}

    @classmethod
    async def open(
        cls, sock: socket.socket, on_message: Callable[[Message], None], on_close: Callable[[str], None]
    ) -> "ApiLink":
        """The end that reads and writes `sock` on the running event loop."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: cls(on_message, on_close), sock=sock)
        return link

    def say(self, key: str, item: Message | str) -> None:
        """Adds `item` to the list `key` ("submit", "cancel", "adapters") of the next message."""
        self._schedule()
        self._outgoing.setdefault(key, []).append(item)

    def say_stop(self) -> None:
        """Asks the engine to shut down, as SIGTERM would."""
        self._schedule()
        self._outgoing["stop"] = True

    def close(self) -> None:
        """Closes this end; the engine sees the end of the stream."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's callback: the socket is ours."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        """asyncio's callback: bytes from the engine."""
        try:
            for message in self._reader.feed(data):
                self._on_message(message)
        except LinkClosed as error:
            self._lost(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's callback: the engine closed its end or died."""
        self._lost("the engine process has ended" + (f" ({exc})" if exc else ""))

    def _lost(self, reason: str) -> None:
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()
            self._on_close(reason)

    def _schedule(self) -> None:
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        message, self._outgoing = self._outgoing, {}
        if self._transport is not None and message:
            self._transport.write(encode(message))

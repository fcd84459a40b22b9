"""A small HTTP client for load tests: one connection per request, a few microseconds per event.

General clients spend so much time on every chunk of a stream that, on a small machine, they would be measured
instead of the server. Here nothing is awaited between two events: the socket's callback calls the caller's.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools


class HttpError(Exception):
    """An answer other than 200, or none; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    api_key: str | None = None

    @classmethod
    def at(cls, url: str, api_key: str | None) -> "Server":
        """The server of `url` (http, with or without /v1 behind the port); raises ValueError for anything else."""
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        if parts.scheme != "http" or not parts.hostname or parts.path.rstrip("/") not in ("", "/v1"):
            raise ValueError("must look like http://127.0.0.1:8000")
        return cls(host=parts.hostname, port=parts.port or 80, api_key=api_key)

    async def get(self, path: str) -> Any:
        """The JSON that GET `path` answers. Raises HttpError."""
        return json.loads(await self._body("GET", path, b""))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that POST `path` answers. Raises HttpError."""
        return json.loads(await self._body("POST", path, json.dumps(body).encode()))

    async def stream(self, path: str, body: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> None:
        """Calls `on_event` with every event that POST `path` streams the moment it has come.

        Raises HttpError, also for an event that is an error and for a stream that breaks off, and whatever
        `on_event` raises.
        """

        def take(body: bytearray) -> bool:
            *lines, rest = body.split(b"\n")
            body[:] = rest
            for line in lines:
                if line.startswith(b"data: [DONE]"):
                    return True
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise HttpError(event["error"]["message"])
                    on_event(event)
            return False

        exchange = await self._exchange("POST", path, json.dumps(body).encode(), take)
        if not exchange.ended.result():
            raise HttpError("the stream broke off")

    async def _body(self, method: str, path: str, body: bytes) -> bytearray:
        """The whole body of a 200."""
        return (await self._exchange(method, path, body, lambda body: False)).body

    async def _exchange(self, method: str, path: str, body: bytes, take: Callable[[bytearray], bool]) -> "Exchange":
        """Sends a request and waits for the end of its answer, a 200."""
        loop = asyncio.get_running_loop()
        request = self._head(method, path, len(body)) + body
        try:
            transport, exchange = await loop.create_connection(lambda: Exchange(request, take), self.host, self.port)
        except OSError as error:
            raise HttpError(f"no connection to {self.host}:{self.port}: {error.strerror or error}") from error
        try:
            await exchange.ended
        except (ConnectionError, ValueError, httptools.HttpParserError) as error:
            raise HttpError(f"the connection broke: {error}") from error
        finally:
            transport.close()
        if exchange.status != 200:
            raise HttpError(f"{exchange.status}: {_message(exchange.body[:2000].decode('utf-8', 'replace'))}")
        return exchange

    def _head(self, method: str, path: str, length: int) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            "Connection: close",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Exchange(asyncio.Protocol):
    """One request and its answer. `take` gets the body so far of a 200 each time more has come.

    `take` removes what it has dealt with, and returns True when it needs no more. The future `ended` then holds
    True, False if the answer came to its end before; or what went wrong.
    """

    def __init__(self, request: bytes, take: Callable[[bytearray], bool]) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.body = bytearray()
        self._request = request
        self._take = take
        self._parser = httptools.HttpResponseParser(self)
        self._is_complete = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's callback: the server accepted the connection."""
        cast("asyncio.WriteTransport", transport).write(self._request)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        """asyncio's callback: bytes from the server."""
        if self.ended.done():
            return
        try:
            self._parser.feed_data(data)
            if self.status == 200 and self._take(self.body):
                self.ended.set_result(True)
            elif self._is_complete:
                self.ended.set_result(False)
        except Exception as error:  # whatever it is, the one who waits for the answer must hear of it
            self.ended.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's callback: the server closed the connection, which may be how the body ends, or it broke."""
        if self.ended.done():
            return
        if exc is not None or not self.status:
            self.ended.set_exception(exc or HttpError("the connection ended without an answer"))
        else:
            self.ended.set_result(False)

    def on_headers_complete(self) -> None:
        """httptools' callback: the status is known."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """httptools' callback: a part of the body, without the framing of chunks."""
        self.body += data

    def on_message_complete(self) -> None:
        """httptools' callback: the body has its full length."""
        self._is_complete = True


def _message(text: str) -> str:
    """The message in OpenAI's error shape, or the text as it is."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text.strip()

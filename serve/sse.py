"""A small HTTP client for load tests: one connection per request, a few microseconds per event.

General clients spend so much time on every chunk of a stream that, on a small machine, they would be measured
instead of the server. HTTP/1.0 lets the server end a body by closing the connection, so there is no framing to undo.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LONGEST_LINE = 2**24


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
        return json.loads(b"".join([line async for line in self._lines("GET", path, b"")]))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that POST `path` answers. Raises HttpError."""
        return json.loads(b"".join([line async for line in self._lines("POST", path, json.dumps(body).encode())]))

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events that POST `path` streams, as they come. Raises HttpError, also for a stream that breaks off."""
        async for line in self._lines("POST", path, json.dumps(body).encode()):
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise HttpError(event["error"]["message"])
                yield event
        raise HttpError("the stream broke off")

    async def _lines(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        """The lines of the body of a 200."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, limit=LONGEST_LINE)
        except OSError as error:
            raise HttpError(f"no connection to {self.host}:{self.port}: {error.strerror or error}") from error
        try:
            writer.write(self._head(method, path, len(body)) + body)
            status = (await reader.readline()).split(b" ", 2)
            if len(status) < 2 or not status[1].isdigit():
                raise HttpError("the connection ended without an answer")
            while (await reader.readline()).strip():
                pass
            if status[1] != b"200":
                text = (await reader.read(2000)).decode("utf-8", "replace")
                raise HttpError(f"{status[1].decode()}: {_message(text)}")
            while line := await reader.readline():
                yield line
        except (ConnectionError, ValueError) as error:
            raise HttpError(f"the connection broke: {error}") from error
        finally:
            writer.close()

    def _head(self, method: str, path: str, length: int) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.0",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _message(text: str) -> str:
    """The message in OpenAI's error shape, or the text as it is."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text.strip()

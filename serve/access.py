"""What happens before a request is read: the API key and the size of the body are checked, the body is JSON."""

import secrets

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

LARGEST_BODY = 16 * 2**20
TOO_LARGE = f"the request body is larger than {LARGEST_BODY} bytes"
OPEN_PATHS = frozenset({"/health", "/metrics"})
"""Paths that need no key: probes and scrapers rarely have one."""


class Guard:
    """ASGI middleware: 401 without the key, 413 for a body above 16 MiB. `api_key` None = everyone may.

    Every body is taken as JSON, whatever its Content-Type says: `curl -d` calls it a form.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on or answers it; ASGI's interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await _answer(refusal, scope, receive, send)
            return
        named = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        json_scope = {**scope, "headers": [*named, (b"content-type", b"application/json")]}
        await self._app(json_scope, Limited(receive), send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        given = headers.get(b"authorization", b"")
        is_open = self._expected is None or path in OPEN_PATHS
        if not is_open and not secrets.compare_digest(given, self._expected or b""):
            rule = "the API key is missing or wrong; send Authorization: Bearer <serve.api_key>"
            return ApiError(401, rule, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > LARGEST_BODY:
            return ApiError(413, TOO_LARGE)
        return None


class Limited:
    """An ASGI receive channel that raises HTTPException (413) once a body has become too large.

    It counts what really comes: a chunked body has no length to look at beforehand. FastAPI lets exceptions
    of this class through while it reads a body, others become a 400.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._size = 0

    async def __call__(self) -> Message:
        """The next message."""
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > LARGEST_BODY:
            raise HTTPException(413, TOO_LARGE)
        return message


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body(), error.status)(scope, receive, send)

"""The one shape of every error of the HTTP interface, OpenAI's."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

ERROR_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200. The body is OpenAI's: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def from_validation_errors(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The 400 for what pydantic refused: the first problem, with the path of its field."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] in ("json_invalid", "json_type"):
        return ApiError(400, f"the request body isn't valid JSON: {first['ctx']['error']}", code="invalid_json")
    param = ".".join(path) or None
    if first["type"] == "missing":
        where = f"{param} is missing" if param else "the request has no body; send a JSON object"
        return ApiError(400, where, param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return ApiError(400, f"{param or 'body'}={reprlib.repr(first.get('input'))}: {message}", param=param)

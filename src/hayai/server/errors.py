"""Errors on the wire: a status, what a client may be told, and the body in the dialect that it speaks."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hayai.errors import HayaiError, RequestError
from hayai.frontend import EngineError

Dialect = Literal["openai", "anthropic"]
"""'openai' is also Azure's, and that of our own routes."""

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STATUSES: Mapping[Dialect, Mapping[int, int]] = {"openai": {}, "anthropic": {503: 529}}
"""Statuses that a dialect has its own for."""
ID_HEADERS: Mapping[Dialect, tuple[str, ...]] = {
    "openai": ("x-request-id",),
    "anthropic": ("request-id", "x-request-id"),
}
"""Where a dialect's clients look for a request's id."""
_ANTHROPIC_PATHS = ("/v1/messages",)


class ApiError(Exception):
    """An answer other than 200; neutral until `body` writes it in a dialect.

    `param` is the request field at fault, `code` a short stable identifier.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, dialect: Dialect = "openai", request_id: str | None = None) -> bytes:
        """The JSON body as clients of that dialect read it."""
        return orjson.dumps(_SHAPES[dialect](self, request_id))

    def response(self, dialect: Dialect = "openai") -> Response:
        """The whole answer, with an id that client and log can speak of."""
        request_id = "req_" + uuid.uuid4().hex
        status = _STATUSES[dialect].get(self.status, self.status)
        headers = dict.fromkeys(ID_HEADERS[dialect], request_id) | self.headers
        return Response(self.body(dialect, request_id), status, headers, "application/json")


def _openai(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}"""
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = _OPENAI_TYPES.get(error.status, default)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _anthropic(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """{"type": "error", "error": {"type", "message"}, "request_id"}; param and code are extensions."""
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(error.status, default)
    inner = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return {"type": "error", "error": inner, "request_id": request_id}


_SHAPES: Mapping[Dialect, Callable[[ApiError, str | None], dict[str, Any]]] = {
    "openai": _openai,
    "anthropic": _anthropic,
}


def dialect_of(request: Request) -> Dialect:
    """The dialect that a request's client reads: by its path, or by the header which that client sends."""
    if request.url.path.startswith(_ANTHROPIC_PATHS) or "anthropic-version" in request.headers:
        return "anthropic"
    return "openai"


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an ApiError; what is not the caller's fault keeps its details for the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_unavailable")
    if isinstance(error, HayaiError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


async def answer_error(request: Request, error: Exception) -> Response:
    """Handler of ApiError, RequestError and everything unexpected."""
    return as_api_error(error).response(dialect_of(request))


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Handler of the router's own 404 and 405."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        shown = ApiError(404, f"no such route: {where}; see /openapi.json", code="not_found")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"method not allowed: {where}; allowed: {allowed}"
        shown = ApiError(405, message, code="method_not_allowed", headers=error.headers)
    else:
        shown = ApiError(error.status_code, error.detail, headers=error.headers)
    return shown.response(dialect_of(request))

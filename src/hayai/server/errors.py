"""Errors on the wire: OpenAI's body, a status, and what a client may be told."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hayai.errors import HayaiError, RequestError
from hayai.frontend import EngineError

_TYPES = {400: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer other than 200, in the form that OpenAI's clients read.

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

    def body(self) -> bytes:
        """The JSON body: {"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


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
    return as_api_error(error).response()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Handler of the router's own 404 and 405."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"no such route: {where}; see /openapi.json", code="not_found").response()
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"method not allowed: {where}; allowed: {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers).response()
    return ApiError(error.status_code, error.detail, headers=error.headers).response()

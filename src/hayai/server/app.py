"""The HTTP face: routes, admission, life span. Wire formats are in openai.py and replies.py."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import hayai
from hayai.config import ServerConfig
from hayai.errors import RequestError
from hayai.frontend import EngineError, Frontend
from hayai.server.errors import ApiError, answer_error, answer_http_error
from hayai.server.generate import Gate, Generation
from hayai.server.openai import ChatRequest, CompletionRequest, Job, parse_chat, parse_completion
from hayai.server.replies import REPLIES, no_bytes

DEFAULT_NAME = "default"
"""Every server answers to this model name, beside the name of its file."""


def create_app(frontend: Frontend, config: ServerConfig) -> FastAPI:
    """The ASGI application of one loaded model. It closes `frontend` when it shuts down.

    `app.state.gate.close()` stops all work at the next step (the server calls it on Ctrl-C).
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        app.state.gate.close()
        frontend.close()

    app = FastAPI(
        title="Hayai",
        version=hayai.__version__,
        lifespan=lifespan,
        docs_url=None,  # the page would load its scripts from the network
        redoc_url=None,
        exception_handlers={
            ApiError: answer_error,
            RequestError: answer_error,
            EngineError: answer_error,
            HTTPException: answer_http_error,
            Exception: answer_error,
        },
    )
    app.state.gate = Gate(config.max_waiting)
    _add_routes(app, _Routes(frontend, config, app.state.gate))
    return app


class _Routes:
    """The endpoints; they hold what every request needs."""

    def __init__(self, frontend: Frontend, config: ServerConfig, gate: Gate) -> None:
        self.frontend = frontend
        self.config = config
        self.gate = gate
        self.started = int(time.time())
        tokenizer = frontend.tokenizer
        self.token_bytes = no_bytes if tokenizer is None else tokenizer.token_bytes
        self.fingerprint = f"hayai-{hayai.__version__}"

    async def health(self) -> Response:
        """Whether the process answers; says nothing of the model."""
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """Whether a request would be taken now. Never generates."""
        ready = not self.gate.closing and self.frontend.alive
        return _json({"status": "ready" if ready else "unavailable"}, 200 if ready else 503)

    async def models(self) -> Response:
        """The models that are served: one."""
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, model_id: str) -> Response:
        """One model's card."""
        self._check_model(model_id, None)
        return _json(self._model_card())

    async def chat_completions(self, request: Request) -> Response:
        """Continue a conversation."""
        return await self._generate(request, parse_chat)

    async def completions(self, request: Request) -> Response:
        """Continue a text, or token ids, as they are (no chat template)."""
        return await self._generate(request, parse_completion)

    async def _generate(self, request: Request, parse: Callable[[bytes], Job]) -> Response:
        job = parse(await _read_body(request, self.config.max_body_bytes))
        self._check_model(job.model, "model")
        self.gate.check(job.num_choices)
        reply_class = REPLIES[job.dialect]
        request_id = reply_class.id_prefix + uuid.uuid4().hex
        reply = reply_class(
            job,
            request_id,
            self.frontend.model_name,
            int(time.time()),
            self.fingerprint,
            self.token_bytes,
        )
        return Generation(self.frontend, job, reply, request_id, self.gate)

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.frontend.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "hayai",
            "context_length": self.frontend.context_length,
        }

    def _check_model(self, name: str | None, param: str | None) -> None:
        if name not in (None, DEFAULT_NAME, self.frontend.model_name):
            message = (
                f"no such model: {name[:100]!r}; served here: {self.frontend.model_name} (or {DEFAULT_NAME})"
            )
            raise ApiError(404, message, param=param, code="model_not_found")


def _add_routes(app: FastAPI, routes: _Routes) -> None:
    plain: dict[str, Any] = {"response_class": Response, "response_model": None}
    app.add_api_route("/health", routes.health, methods=["GET"], **plain)
    app.add_api_route("/ready", routes.ready, methods=["GET"], **plain)
    app.add_api_route("/v1/models", routes.models, methods=["GET"], **plain)
    app.add_api_route("/v1/models/{model_id:path}", routes.model, methods=["GET"], **plain)
    for path, endpoint, body in (
        ("/v1/chat/completions", routes.chat_completions, ChatRequest),
        ("/v1/completions", routes.completions, CompletionRequest),
    ):
        # bodies are read by us (limit, strictness, errors in OpenAI's form), so the schema is said here
        schema = body.model_json_schema()
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra, **plain)


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes of it (ApiError 413). Only JSON is read: a page of another origin can
    send other types without asking the browser's leave, and so could make this machine work for it."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        found = repr(content_type[:80]) if content_type else "none"
        raise ApiError(415, f"Content-Type must be application/json: {found}", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit, declared)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit, f"more than {limit}")
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "the client left before its body was complete", code="disconnected") from None
    return b"".join(parts)


def _too_large(limit: int, found: str) -> ApiError:
    message = f"the body is too large: {found} bytes, the limit is {limit}"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")

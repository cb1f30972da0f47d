"""The HTTP face: routes, admission, life span. Wire formats are in openai.py and replies.py.

Starlette without FastAPI: bodies are validated by us (limit, strictness, errors in OpenAI's form), so
FastAPI would add 12 MB and 90 ms of start-up for a schema page.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import hayai
from hayai.config import ServerConfig
from hayai.errors import RequestError
from hayai.frontend import EngineError, Frontend
from hayai.server.errors import ApiError, answer_error, answer_http_error
from hayai.server.gate import Gate
from hayai.server.generate import Generation
from hayai.server.job import Job
from hayai.server.openai import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse_chat,
    parse_completion,
)
from hayai.server.replies import REPLIES, token_bytes_of

DEFAULT_NAME = "default"
"""Every server answers to this model name, beside the name of its file."""


def create_app(frontend: Frontend, config: ServerConfig) -> Starlette:
    """The ASGI application of one loaded model. It closes `frontend` when it shuts down.

    `app.state.gate.close()` stops all work at the next step (the server calls it on Ctrl-C).
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        yield
        app.state.gate.close()
        frontend.close()

    gate = Gate(config.max_waiting)
    routes = _Routes(frontend, config, gate)
    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/openapi.json", routes.openapi),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model_id:path}", routes.model),
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: answer_error,
            RequestError: answer_error,
            EngineError: answer_error,
            HTTPException: answer_http_error,
            Exception: answer_error,
        },
    )
    app.state.gate = gate
    return app


class _Routes:
    """The endpoints; they hold what every request needs."""

    def __init__(self, frontend: Frontend, config: ServerConfig, gate: Gate) -> None:
        self.frontend = frontend
        self.config = config
        self.gate = gate
        self.started = int(time.time())
        self.token_bytes = token_bytes_of(frontend)
        self.fingerprint = f"hayai-{hayai.__version__}"

    async def health(self, request: Request) -> Response:
        """Whether the process answers; says nothing of the model."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether a request would be taken now. Never generates."""
        ready = not self.gate.closing and self.frontend.alive
        return _json({"status": "ready" if ready else "unavailable"}, 200 if ready else 503)

    async def models(self, request: Request) -> Response:
        """The models that are served: one."""
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """One model's card."""
        self._check_model(request.path_params["model_id"], None)
        return _json(self._model_card())

    async def openapi(self, request: Request) -> Response:
        """What there is to call, and the fields of the bodies."""
        return _json(describe_api(request.app.routes))

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


BODIES: dict[str, type[GenerationRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


def describe_api(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of the routes: summaries from their docstrings, bodies from the models."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for route in routes:
        assert isinstance(route, Route)
        summary = (route.endpoint.__doc__ or "").strip()
        entry: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "JSON, or events"}}}
        if route.path in BODIES:
            schema = BODIES[route.path].model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        path = route.path.replace(":path}", "}")
        for name in route.param_convertors:
            string = {"type": "string"}
            entry["parameters"] = [{"name": name, "in": "path", "required": True, "schema": string}]
        for method in (route.methods or set()) - {"HEAD"}:
            paths.setdefault(path, {})[method.lower()] = entry
    info = {"title": "Hayai", "version": hayai.__version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}

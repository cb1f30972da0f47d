"""The HTTP face: every surface's routes, errors, life span.

Starlette without FastAPI: bodies are validated by us (limit, strictness, errors in the client's dialect), so
FastAPI would add 12 MB and 90 ms of start-up for a schema page.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import hayai
from hayai.config import ServerConfig
from hayai.errors import RequestError
from hayai.frontend import EngineError, Frontend
from hayai.server import anthropic_routes, azure, openai_routes
from hayai.server.access import Access
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError, answer_error, answer_http_error
from hayai.server.gate import Gate
from hayai.server.metrics import Metrics
from hayai.server.openai_routes import json_response
from hayai.server.reply import token_bytes_of
from hayai.server.schema import describe_api

SURFACES: tuple[Callable[[ServerContext], list[BaseRoute]], ...] = (
    openai_routes.routes,
    anthropic_routes.routes,
    azure.routes,
)
"""Everything that is served, one entry per wire format."""


def create_app(frontend: Frontend, config: ServerConfig, access: Access | None = None) -> Starlette:
    """The ASGI application of one loaded model. It closes `frontend` and `access` when it shuts down.

    access None: an open server. `app.state.gate.close()` stops all work at the next step (the server calls it
    on Ctrl-C); `app.state.context` is what the routes share.
    """
    context = make_context(frontend, config, access or Access.open())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        yield
        context.gate.close()
        frontend.close()
        context.access.close()

    app = Starlette(
        lifespan=lifespan,
        routes=[*_own_routes(context), *(route for surface in SURFACES for route in surface(context))],
        exception_handlers={
            ApiError: answer_error,
            RequestError: answer_error,
            EngineError: answer_error,
            HTTPException: answer_http_error,
            Exception: answer_error,
        },
    )
    app.state.gate = context.gate
    app.state.context = context
    return app


def make_context(frontend: Frontend, config: ServerConfig, access: Access) -> ServerContext:
    described = frontend.loaded.describe()
    return ServerContext(
        frontend=frontend,
        config=config,
        gate=Gate(config.max_waiting),
        access=access,
        metrics=Metrics(),
        started=int(time.time()),
        fingerprint=f"hayai-{hayai.__version__}",
        token_bytes=token_bytes_of(frontend),
        machine={"precision": described.get("weights"), "isa": described.get("backend.isa")},
    )


def _own_routes(context: ServerContext) -> list[BaseRoute]:
    async def health(request: Request) -> Response:
        """Whether the process answers; says nothing of the model."""
        return json_response({"status": "ok"})

    async def ready(request: Request) -> Response:
        """Whether a request would be taken now. Never generates."""
        ready = not context.gate.closing and context.frontend.alive
        return json_response({"status": "ready" if ready else "unavailable"}, 200 if ready else 503)

    async def openapi(request: Request) -> Response:
        """What there is to call, and the fields of the bodies."""
        document: dict[str, Any] = describe_api(request.app.routes)
        return json_response(document)

    return [Route("/health", health), Route("/ready", ready), Route("/openapi.json", openapi)]

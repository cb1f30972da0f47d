"""The HTTP face: every surface's routes, errors, life span.

Starlette without FastAPI: bodies are validated by us (limit, strictness, errors in the client's dialect), so
FastAPI would add 12 MB and 90 ms of start-up for a schema page.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import hayai
from hayai.config import ServerConfig
from hayai.errors import RequestError
from hayai.frontend import EngineError, Frontend
from hayai.server import (
    anthropic_routes,
    azure,
    batches,
    files,
    openai_routes,
    ops,
    responses_routes,
    tokens,
    usage,
)
from hayai.server.access import Access
from hayai.server.batch_runner import BatchRunner
from hayai.server.batch_store import BatchStore
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError, answer_error, answer_http_error
from hayai.server.gate import Gate
from hayai.server.metrics import Metrics
from hayai.server.openai_routes import json_response
from hayai.server.ops import count_refusal
from hayai.server.reply import token_bytes_of
from hayai.server.schema import describe_api
from hayai.server.tracing import open_tracer

SURFACES: tuple[Callable[[ServerContext], list[BaseRoute]], ...] = (
    openai_routes.routes,
    responses_routes.routes,
    tokens.routes,
    anthropic_routes.routes,
    azure.routes,
    usage.routes,
)
"""Everything that is served, one entry per wire format."""


def create_app(frontend: Frontend, config: ServerConfig, access: Access | None = None) -> Starlette:
    """The ASGI application of one loaded model. It closes `frontend` and `access` when it shuts down.

    access None: an open server. `app.state.gate.close()` stops all work at the next step (the server calls it
    on Ctrl-C); `app.state.context` is what the routes share.
    """
    context = make_context(frontend, config, access or Access.open())
    runner = _batch_runner(context)
    tracer = None
    if config.otlp_endpoint is not None:
        tracer = open_tracer(config.otlp_endpoint, frontend.model_name)
        context.metrics.on_finished = tracer.request

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        await runner.start()
        yield
        context.gate.close()
        await runner.stop()
        frontend.close()
        for close in context.closers:
            close()
        context.access.close()
        if tracer is not None:
            tracer.close()
        if config.state_dir is None:
            shutil.rmtree(runner.store.folder, ignore_errors=True)

    async def refuse(request: Request, error: Exception) -> Response:
        count_refusal(context, error)
        return await answer_error(request, error)

    routes = [
        *ops.routes(context, runner),
        Route("/openapi.json", _openapi),
        *(route for surface in SURFACES for route in surface(context)),
        *files.routes(context, runner.store),
        *batches.routes(context, runner),
    ]
    app = Starlette(
        lifespan=lifespan,
        routes=[*routes, *azure.repeated(routes)],
        exception_handlers={
            ApiError: refuse,
            RequestError: refuse,
            EngineError: refuse,
            HTTPException: answer_http_error,
            Exception: refuse,
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
        gate=Gate(
            config.max_waiting,
            frontend.loaded.engine_config.max_sequences,
            queue_seconds=config.queue_seconds,
            request_timeout=config.request_timeout,
        ),
        access=access,
        metrics=Metrics(),
        started=int(time.time()),
        fingerprint=f"hayai-{hayai.__version__}",
        token_bytes=token_bytes_of(frontend),
        machine={"precision": described.get("weights"), "isa": described.get("backend.isa")},
    )


def _batch_runner(context: ServerContext) -> BatchRunner:
    """Files and batches in the state folder; without one in a folder that is gone when the server stops."""
    state = context.config.state_dir
    folder = Path(mkdtemp(prefix="hayai-")) if state is None else state / "batches"
    parallel = context.config.batch_parallel or max(1, context.gate.max_running // 2)
    return BatchRunner(context, BatchStore(folder), parallel)


async def _openapi(request: Request) -> Response:
    """What there is to call, and the fields of the bodies."""
    return json_response(describe_api(request.app.routes))

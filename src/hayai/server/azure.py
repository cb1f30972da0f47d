"""Azure OpenAI's paths over OpenAI's wire format.

Two generations of them:
* /openai/deployments/{deployment}/chat/completions?api-version=...: the deployment takes the place of `model`
  and is resolved as a model name is, through the aliases; any api-version is accepted, none is Azure's 404;
* /openai/v1/...: OpenAI's own API, byte for byte, where api-version is optional.

Keys come in `api-key` or `Authorization: Bearer`, as Access reads them. Answers have no content filter
results: nothing is filtered, and the official clients do without.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hayai.server.access import Principal
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError
from hayai.server.handle import Parse, prepare, read_body, read_off_loop
from hayai.server.openai import ChatRequest, CompletionRequest, parse_chat, parse_completion
from hayai.server.openai_routes import json_response
from hayai.server.schema import takes

_Endpoint = Callable[[Request], Awaitable[Response]]

_DEPLOYMENTS = "/openai/deployments"
_PER_DEPLOYMENT = ("/v1/chat/completions", "/v1/completions")
"""What Azure's dated API serves below a deployment, and not beside it."""
_ANTHROPICS = "/v1/messages"


def routes(context: ServerContext) -> list[BaseRoute]:
    """The routes of this surface."""
    azure = _Azure(context)
    below = _DEPLOYMENTS + "/{deployment:path}"
    return [
        Route(below + "/chat/completions", _versioned(azure.chat_completions), methods=["POST"]),
        Route(below + "/completions", _versioned(azure.completions), methods=["POST"]),
        Route(_DEPLOYMENTS, _versioned(azure.deployments)),
        Route(below, _versioned(azure.deployment)),
        Route(below, _versioned(azure.other_operation), methods=["POST"]),
    ]


def repeated(routes: Sequence[BaseRoute]) -> list[BaseRoute]:
    """OpenAI's routes among `routes` at Azure's places: below /openai/v1, and below /openai for requests that
    say their api-version."""
    again: list[BaseRoute] = []
    for route in routes:
        if not isinstance(route, Route) or not route.path.startswith("/v1/"):
            continue
        if route.path.startswith(_ANTHROPICS):
            continue
        path, methods = route.path, sorted(route.methods or ())
        again.append(Route("/openai" + path, route.endpoint, methods=methods))
        if path not in _PER_DEPLOYMENT:
            dated = "/openai" + path.removeprefix("/v1")
            again.append(Route(dated, _versioned(route.endpoint), methods=methods))
    return again


def _versioned(endpoint: _Endpoint) -> _Endpoint:
    """The endpoint, for requests that name an api-version."""

    @wraps(endpoint)
    async def checked(request: Request) -> Response:
        if not request.query_params.get("api-version"):
            message = "Resource not found: the query parameter api-version is missing (any value is accepted)"
            raise ApiError(404, message, param="api-version", code="404")
        return await endpoint(request)

    return checked


class _Azure:
    def __init__(self, context: ServerContext) -> None:
        self.context = context

    @takes(ChatRequest)
    async def chat_completions(self, request: Request) -> Response:
        """Continue a conversation (Azure's deployment path)."""
        return await self._generate(request, parse_chat, "chat/completions")

    @takes(CompletionRequest)
    async def completions(self, request: Request) -> Response:
        """Continue a text, or token ids, as they are (Azure's deployment path)."""
        return await self._generate(request, parse_completion, "completions")

    async def _generate(self, request: Request, parse: Parse, operation: str) -> Response:
        context, arrived = self.context, time.monotonic()
        principal = context.access.authenticate(request.headers)
        deployment = request.path_params["deployment"]
        self._resolve(deployment, principal)
        raw = await read_body(request, context.config.max_body_bytes)
        job = replace(await read_off_loop(raw, lambda: parse(raw, context)), model=deployment)
        endpoint = f"{_DEPLOYMENTS}/{{deployment}}/{operation}"
        return await prepare(context, principal, job, endpoint, arrived)

    async def deployments(self, request: Request) -> Response:
        """The deployments: the model and the names it is known by."""
        principal = self.context.access.authenticate(request.headers)
        cards = [self._card(name) for name in self.context.model_names(principal)]
        return json_response({"object": "list", "data": cards})

    async def deployment(self, request: Request) -> Response:
        """One deployment."""
        principal = self.context.access.authenticate(request.headers)
        name = request.path_params["deployment"]
        self._resolve(name, principal)
        return json_response(self._card(self.context.shown_name(name)))

    async def other_operation(self, request: Request) -> Response:
        """What a deployment does not do: embeddings, images, audio."""
        self.context.access.authenticate(request.headers)
        found = request.path_params["deployment"].partition("/")[2][:100] or "nothing"
        message = f"deployments here serve chat/completions and completions; asked for: {found}"
        raise ApiError(404, message, code="OperationNotSupported")

    def _card(self, name: str) -> dict[str, Any]:
        context = self.context
        return {
            "object": "deployment",
            "id": name,
            "model": context.frontend.model_name,
            "owner": "hayai",
            "status": "succeeded",
            "created_at": context.started,
            "updated_at": context.started,
            "scale_settings": {"scale_type": "standard"},
        }

    def _resolve(self, deployment: str, principal: Principal) -> None:
        """ApiError 404 in Azure's words where there is no such deployment."""
        try:
            self.context.resolve_model(deployment, principal, None)
        except ApiError as error:
            if error.status != 404:
                raise
            message = f"The API deployment for this resource does not exist: {error.message}"
            raise ApiError(404, message, code="DeploymentNotFound") from None

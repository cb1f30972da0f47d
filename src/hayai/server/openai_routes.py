"""OpenAI's routes: chat completions, completions, models (openai.py reads bodies, replies.py writes them)."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hayai.server.anthropic_models import VERSION_HEADER, anthropic_model, anthropic_model_list
from hayai.server.context import ServerContext
from hayai.server.handle import handle
from hayai.server.openai import ChatRequest, CompletionRequest, parse_chat, parse_completion
from hayai.server.schema import takes


def routes(context: ServerContext) -> list[BaseRoute]:
    """The routes of this surface."""
    openai = _OpenAI(context)
    return [
        Route("/v1/models", openai.models),
        Route("/v1/models/{model_id:path}", openai.model),
        Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
    ]


class _OpenAI:
    def __init__(self, context: ServerContext) -> None:
        self.context = context

    @takes(ChatRequest)
    async def chat_completions(self, request: Request) -> Response:
        """Continue a conversation."""
        return await handle(self.context, request, parse_chat)

    @takes(CompletionRequest)
    async def completions(self, request: Request) -> Response:
        """Continue a text, or token ids, as they are (no chat template)."""
        return await handle(self.context, request, parse_completion)

    async def models(self, request: Request) -> Response:
        """The model that is served, and the names it is known by."""
        principal = self.context.access.authenticate(request.headers)
        if VERSION_HEADER in request.headers:
            return json_response(anthropic_model_list(self.context, principal, request.query_params))
        cards = [model_card(self.context, name) for name in self.context.model_names(principal)]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """One model's card."""
        principal = self.context.access.authenticate(request.headers)
        name = request.path_params["model_id"]
        self.context.resolve_model(name, principal, None)
        card = anthropic_model if VERSION_HEADER in request.headers else model_card
        return json_response(card(self.context, self.context.shown_name(name)))


def model_card(context: ServerContext, name: str) -> dict[str, Any]:
    """OpenAI's Model object, with its length and, where `name` is an alias, the model behind it."""
    real = context.frontend.model_name
    return {
        "id": name,
        "object": "model",
        "created": context.started,
        "owned_by": "hayai",
        "context_length": context.frontend.context_length,
        "root": real,
        "parent": None if name == real else real,
    }


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")

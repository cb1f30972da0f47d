"""Anthropic's routes: bodies are read by anthropic.py, written by anthropic_replies.py.

`anthropic-version` may have any value, or be absent; `anthropic-beta` too: what a beta adds is asked for in
the body, where it is served, refused or warned of by name.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hayai.frontend import Prompt
from hayai.frontend_request import RequestOptions
from hayai.server.anthropic import CountTokensRequest, MessagesRequest, parse_count, parse_messages
from hayai.server.context import ServerContext
from hayai.server.handle import prepare, read_body, read_off_loop
from hayai.server.openai_routes import json_response
from hayai.server.schema import takes


def routes(context: ServerContext) -> list[BaseRoute]:
    """The routes of this surface."""
    anthropic = _Anthropic(context)
    return [
        Route("/v1/messages", anthropic.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
    ]


class _Anthropic:
    def __init__(self, context: ServerContext) -> None:
        self.context = context
        template = context.frontend.loaded.chat_template
        self.knows_effort = template is not None and "reasoning_effort" in template.source

    @takes(MessagesRequest)
    async def messages(self, request: Request) -> Response:
        """Continue a conversation (Anthropic's Messages)."""
        context, arrived = self.context, time.monotonic()
        principal = context.access.authenticate(request.headers)
        raw = await read_body(request, context.config.max_body_bytes)
        limits, effort = context.config.limits, self.knows_effort
        job, prefill = await read_off_loop(
            raw, lambda: parse_messages(raw, limits, template_knows_effort=effort)
        )
        if prefill is not None:
            context.resolve_model(job.model, principal)
            (prompt,) = job.prompts
            ids = await asyncio.to_thread(self._encode, prompt, job.options, prefill)
            job = replace(job, prompts=(Prompt(token_ids=ids),))
        return await prepare(context, principal, job, request.url.path, arrived)

    @takes(CountTokensRequest)
    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a prompt of /v1/messages has."""
        context = self.context
        principal = context.access.authenticate(request.headers)
        raw = await read_body(request, context.config.max_body_bytes)
        limits, effort = context.config.limits, self.knows_effort
        asked = await read_off_loop(raw, lambda: parse_count(raw, limits, template_knows_effort=effort))
        context.resolve_model(asked.model, principal)
        ids = await asyncio.to_thread(self._encode, asked.prompt, asked.options, asked.prefill)
        return json_response({"input_tokens": len(ids)})

    def _encode(self, prompt: Prompt, options: RequestOptions, prefill: str | None) -> tuple[int, ...]:
        """Token ids of the conversation, and of the answer's beginning behind it."""
        frontend = self.context.frontend
        ids = frontend.encode(prompt, options)
        if not prefill:
            return ids
        assert frontend.tokenizer is not None  # or `encode` had refused the messages
        return ids + tuple(frontend.tokenizer.encode(prefill, special=False))

"""/tokenize and /detokenize: what a text is in tokens, and back.

One route serves the two shapes that clients have. vLLM's: `prompt` or `messages` in, `tokens` with `count`
and `max_model_len` out, `token_strs` on request. llama-server's: `content` in, `tokens` out, as pieces with
`with_pieces`; `content` out of /detokenize. The field that a client sends decides. `prompt` and `messages`
are tokenised exactly as the generating routes do it; `content` without special tokens unless asked, as
llama-server does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hayai.errors import RequestError
from hayai.frontend import Prompt
from hayai.frontend_request import RequestOptions
from hayai.server.bodies import FieldTable, read_object, validate
from hayai.server.context import ServerContext
from hayai.server.fields import refuse
from hayai.server.handle import read_body
from hayai.server.openai import check_template_args
from hayai.server.openai_messages import MESSAGES_SCHEMA, read_messages
from hayai.server.openai_routes import json_response
from hayai.server.openai_tools import TOOLS_SCHEMA, read_tools
from hayai.server.schema import takes

_STRICT = ConfigDict(strict=True, extra="forbid")
_NO_FIELDS = FieldTable()


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: one of prompt (vLLM), messages (vLLM) and content (llama-server)."""

    model_config = _STRICT

    model: str | None = None
    # vLLM's
    prompt: str | None = None
    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)] = None
    tools: Annotated[Any, WithJsonSchema(TOOLS_SCHEMA)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: Annotated[Any, WithJsonSchema({"type": "object"})] = None
    # llama-server's
    content: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize; the answer has the text twice: `prompt` (vLLM), `content` (llama)."""

    model_config = _STRICT

    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=1 << 20)]


def routes(context: ServerContext) -> list[BaseRoute]:
    """The routes of this surface."""
    tokens = _Tokens(context)
    return [
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
    ]


class _Tokens:
    def __init__(self, context: ServerContext) -> None:
        self.context = context

    @takes(TokenizeRequest)
    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        context = self.context
        principal = context.access.authenticate(request.headers)
        raw = await read_body(request, context.config.max_body_bytes)
        kept, _ = _NO_FIELDS.sort(read_object(raw), TokenizeRequest.model_fields)
        body = validate(TokenizeRequest, kept)
        context.resolve_model(body.model, principal)
        given = [name for name in ("prompt", "messages", "content") if getattr(body, name) is not None]
        if len(given) != 1:
            refuse("prompt", f"give one of prompt, messages and content: {', '.join(given) or 'none'}")
        ids = list(await asyncio.to_thread(self._ids, body))
        if body.content is not None:
            return json_response({"tokens": self._pieces(ids) if body.with_pieces else ids})
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": context.frontend.context_length,
            "tokens": ids,
            "token_strs": self._strings(ids) if body.return_token_strs else None,
        }
        return json_response(answer)

    @takes(DetokenizeRequest)
    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        context = self.context
        principal = context.access.authenticate(request.headers)
        raw = await read_body(request, context.config.max_body_bytes)
        kept, _ = _NO_FIELDS.sort(read_object(raw), DetokenizeRequest.model_fields)
        body = validate(DetokenizeRequest, kept)
        context.resolve_model(body.model, principal)
        text = await asyncio.to_thread(context.frontend.decode, body.tokens)
        return json_response({"prompt": text, "content": text})

    def _ids(self, body: TokenizeRequest) -> Sequence[int]:
        frontend, limits = self.context.frontend, self.context.config.limits
        if body.messages is not None:
            tools = read_tools(body.tools, limits)
            args = check_template_args(body.chat_template_kwargs)
            if not body.add_generation_prompt:
                args["add_generation_prompt"] = False
            prompt = Prompt(messages=read_messages(body.messages, limits.max_messages), template_args=args)
            return frontend.encode(prompt, RequestOptions(tools=tools))
        tokenizer = frontend.tokenizer
        if tokenizer is None:
            message = f"model {frontend.model_name} has no vocabulary: its prompts are token ids"
            raise RequestError(message, param="prompt", code="no_vocabulary")
        if body.prompt is not None:
            bos = False if body.add_special_tokens is False else None
            return tokenizer.encode(body.prompt, special=True, bos=bos)
        bos = None if body.add_special else False
        return tokenizer.encode(body.content or "", special=body.parse_special, bos=bos)

    def _strings(self, ids: Sequence[int]) -> list[str]:
        return [self.context.token_bytes(token).decode("utf-8", "replace") for token in ids]

    def _pieces(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """As llama-server: text where it is valid, else the bytes."""
        pieces = []
        for token in ids:
            data = self.context.token_bytes(token)
            try:
                piece: str | list[int] = data.decode("utf-8")
            except UnicodeDecodeError:
                piece = list(data)
            pieces.append({"id": token, "piece": piece})
        return pieces

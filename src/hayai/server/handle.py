"""The one path of every generating route: who asks, what is asked, may it run, run it.

authenticate -> read the body -> parse -> resolve the model -> place in the queue -> tokenise -> admit ->
Generation. A surface is a parser inwards and a Reply outwards; everything between is here and in generate.py.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hayai.server.access import Principal
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError
from hayai.server.generate import Generation
from hayai.server.job import Job
from hayai.server.replies import REPLIES
from hayai.server.reply import ReplyHead

Parsed = TypeVar("Parsed")
Parse = Callable[[bytes, ServerContext], Job]
"""A surface's parser: body -> Job; RequestError names the field at fault."""

LONG_PROMPT = 16_384
"""Characters from which prompts are tokenised on another thread, so that the event loop keeps answering."""

BIG_BODY = 256 << 10
"""Bytes of a body from which it is parsed on another thread: some milliseconds of work."""


async def handle(context: ServerContext, request: Request, parse: Parse) -> Response:
    """Answer a generating request. Raises ApiError or RequestError; the app's handlers write them in the
    dialect of the route."""
    arrived = time.monotonic()
    principal = context.access.authenticate(request.headers)
    raw = await read_body(request, context.config.max_body_bytes)
    job = await read_off_loop(raw, lambda: parse(raw, context))
    return await prepare(context, principal, job, request.url.path, arrived)


async def read_off_loop(raw: bytes, parse: Callable[[], Parsed]) -> Parsed:
    """What `parse` makes of a body; of a big one on another thread, so that the event loop keeps
    answering."""
    return parse() if len(raw) <= BIG_BODY else await asyncio.to_thread(parse)


async def run_job(context: ServerContext, principal: Principal, job: Job, endpoint: str) -> bytes:
    """The whole body of a Job's answer, for callers without a socket (batches). Same path, same errors."""
    arrived = time.monotonic()
    job = replace(job, stream=False)
    generation = await prepare(context, principal, job, endpoint, arrived, background=True)
    return await generation.body_bytes()


async def prepare(
    context: ServerContext,
    principal: Principal,
    job: Job,
    endpoint: str,
    arrived: float,
    *,
    background: bool = False,
) -> Generation:
    """A Job that may run, ready to be sent. Refusals that cost nothing come before the tokeniser's work.

    arrived: monotonic seconds. background: nobody waits for it, so it takes no place in the queue.
    """
    context.resolve_model(job.model, principal)
    context.gate.check(job.num_choices, background, principal.tenant)
    options = replace(
        job.options,
        tenant=principal.tenant,
        cache_salt=principal.cache_salt + job.options.cache_salt,
        priority=max(job.options.priority, principal.priority),
    )
    job = replace(job, options=options)
    warnings = list(job.warnings)
    prompts = await encode_prompts(context, job, warnings)
    job = replace(job, warnings=tuple(warnings))
    reply_class = REPLIES[job.dialect]
    request_id = job.request_id or reply_class.id_prefix + uuid.uuid4().hex
    head = ReplyHead(
        request_id,
        context.shown_name(job.model),
        int(time.time()),
        context.fingerprint,
        context.token_bytes,
        prompts,
        context.machine,
    )
    room = context.frontend.context_length - min(map(len, prompts), default=0)
    ticket = context.access.admit(
        principal,
        request_id=request_id,
        endpoint=endpoint,
        model=context.frontend.model_name,
        num_choices=job.num_choices,
        prompt_tokens=head.prompt_tokens,
        max_tokens=min(room, job.params.max_tokens or room),
    )
    meter = context.metrics.request_started(endpoint, principal.tenant, arrived)
    return Generation(context, job, reply_class(job, head), head, ticket, meter, arrived, background)


async def encode_prompts(
    context: ServerContext, job: Job, warnings: list[str]
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each prompt. RequestError: one that can't be tokenised or doesn't fit the context."""
    encode, options = context.frontend.encode, job.options
    if sum([prompt.num_characters for prompt in job.prompts]) < LONG_PROMPT and not options.tools:
        return tuple([encode(prompt, options, warnings) for prompt in job.prompts])
    return tuple([await asyncio.to_thread(encode, prompt, options, warnings) for prompt in job.prompts])


async def read_body(request: Request, limit: int, content_type: str = "application/json") -> bytes:
    """The body, at most `limit` bytes of it (ApiError 413). Only JSON is read: a page of another origin can
    send other types without asking the browser's leave, and so could make this machine work for it."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != content_type:
        shown = repr(found[:80]) if found else "none"
        raise ApiError(415, f"Content-Type must be {content_type}: {shown}", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:18]) > limit:
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

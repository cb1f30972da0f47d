"""OpenAI's batches: make, look at, list, cancel. batch_runner.py runs them, batch_store.py keeps them."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hayai.server.batch_runner import ENDPOINTS, BatchRunner
from hayai.server.batch_store import Batch
from hayai.server.bodies import FieldTable, read_object, validate
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError
from hayai.server.files import EXPIRES_RANGE, Page, find_file
from hayai.server.handle import read_body
from hayai.server.openai_routes import json_response
from hayai.server.schema import takes, takes_query

MAX_OPEN = 100
"""Batches of one tenant that are not over."""
MAX_WINDOW_HOURS = 7 * 24
PAGE, MAX_PAGE = 20, 100
STAMPS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
"""States whose time a card shows."""


class ExpiresAfter(BaseModel):
    """When the output files are deleted: so many seconds after they were made."""

    model_config = ConfigDict(strict=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=EXPIRES_RANGE[0], le=EXPIRES_RANGE[1])]


class BatchRequest(BaseModel):
    """Body of POST /v1/batches. completion_window: '24h' as OpenAI's, or any number of hours up to a week."""

    model_config = ConfigDict(strict=True, extra="forbid")

    input_file_id: Annotated[str, Field(max_length=200)]
    endpoint: str
    completion_window: Annotated[str, Field(max_length=8)]
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = None
    output_expires_after: ExpiresAfter | None = None


_FIELDS = FieldTable()


def routes(context: ServerContext, runner: BatchRunner) -> list[BaseRoute]:
    """The routes of this surface."""
    batches = _Batches(context, runner)
    return [
        Route("/v1/batches", batches.create, methods=["POST"]),
        Route("/v1/batches", batches.list),
        Route("/v1/batches/{batch_id}", batches.card),
        Route("/v1/batches/{batch_id}/cancel", batches.cancel, methods=["POST"]),
    ]


class _Batches:
    def __init__(self, context: ServerContext, runner: BatchRunner) -> None:
        self.context = context
        self.runner = runner
        self.store = runner.store

    @takes(BatchRequest)
    async def create(self, request: Request) -> Response:
        """Run every line of an uploaded file."""
        principal = self.context.access.authenticate(request.headers)
        raw = await read_body(request, self.context.config.max_body_bytes)
        fields, _ = _FIELDS.sort(read_object(raw), BatchRequest.model_fields)
        body = validate(BatchRequest, fields)
        if body.endpoint not in ENDPOINTS:
            message = f"endpoint must be one of {', '.join(ENDPOINTS)}: {body.endpoint[:80]!r}"
            raise ApiError(400, message, param="endpoint", code="invalid_value")
        if body.metadata is not None and (
            len(body.metadata) > 16 or any(len(name) > 64 for name in body.metadata)
        ):
            message = "metadata: at most 16 entries, with names of at most 64 characters"
            raise ApiError(400, message, param="metadata", code="invalid_value")
        window = window_seconds(body.completion_window)
        file = await find_file(self.store, principal.tenant, body.input_file_id, "input_file_id")
        if file.purpose != "batch":
            message = f"{file.id} is not a batch's input: its purpose is {file.purpose}"
            raise ApiError(400, message, param="input_file_id", code="invalid_value")
        unfinished = await asyncio.to_thread(self.store.unfinished)
        if sum(b.tenant == principal.tenant for b in unfinished) >= MAX_OPEN:
            message = f"{MAX_OPEN} batches are not over yet; wait for one of them"
            raise ApiError(429, message, code="too_many_batches", headers={"Retry-After": "60"})
        now = int(time.time())
        after = body.output_expires_after
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=principal.tenant,
            created_at=now,
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            expires_at=now + window,
            output_expires_after=None if after is None else after.seconds,
            metadata=body.metadata,
            key_id=principal.key_id,
        )
        await asyncio.to_thread(self.store.add_batch, batch)
        self.runner.wake()
        return json_response(batch_card(batch))

    @takes_query(limit={"type": "integer", "minimum": 1, "maximum": MAX_PAGE}, after={"type": "string"})
    async def list(self, request: Request) -> Response:
        """The caller's batches, newest first (limit, after)."""
        principal = self.context.access.authenticate(request.headers)
        page = Page.read(request, PAGE, MAX_PAGE)
        if page.after is not None:
            await self._find(principal.tenant, page.after)
        found = await asyncio.to_thread(self.store.batches, principal.tenant, page.limit + 1, page.after)
        return json_response(page.answer([batch_card(batch) for batch in found]))

    async def card(self, request: Request) -> Response:
        """One batch: its state, counts and files."""
        principal = self.context.access.authenticate(request.headers)
        return json_response(batch_card(await self._find(principal.tenant, request.path_params["batch_id"])))

    async def cancel(self, request: Request) -> Response:
        """Start no further line; those that run come to their end."""
        principal = self.context.access.authenticate(request.headers)
        batch = await self._find(principal.tenant, request.path_params["batch_id"])
        stopped = await asyncio.to_thread(
            lambda: self.store.update_batch(batch.id, ("validating", "in_progress"), status="cancelling")
        )
        if stopped is None:
            batch = await self._find(principal.tenant, batch.id)
            if batch.status not in ("cancelling", "cancelled"):
                message = f"{batch.id} can't be cancelled any more: it is {batch.status}"
                raise ApiError(409, message, param="batch_id", code="batch_is_over")
        self.runner.wake()
        return json_response(batch_card(stopped or batch))

    async def _find(self, tenant: str, batch_id: str) -> Batch:
        batch = await asyncio.to_thread(self.store.batch, tenant, batch_id)
        if batch is None:
            message = f"no such batch: {batch_id[:100]!r}"
            raise ApiError(404, message, param="batch_id", code="batch_not_found")
        return batch


def window_seconds(window: str) -> int:
    """Seconds of a completion window, '1h' to '168h'; ApiError 400 for anything else."""
    found = re.fullmatch(r"([0-9]{1,3})h", window)
    if found is None or not 1 <= int(found[1]) <= MAX_WINDOW_HOURS:
        message = f"completion_window must be 24h (from 1h to {MAX_WINDOW_HOURS}h): {window!r}"
        raise ApiError(400, message, param="completion_window", code="invalid_value")
    return 3600 * int(found[1])


def batch_card(batch: Batch) -> dict[str, Any]:
    """OpenAI's Batch object."""
    errors = [
        {"code": code, "message": message, "param": param, "line": None if line is None else line + 1}
        for code, message, param, line in batch.errors
    ]
    usage = {
        "input_tokens": batch.prompt_tokens,
        "input_tokens_details": {"cached_tokens": batch.cached_tokens},
        "output_tokens": batch.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": batch.prompt_tokens + batch.completion_tokens,
    }
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{state}_at": batch.times.get(state) for state in STAMPS},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": usage,
        "metadata": batch.metadata,
    }

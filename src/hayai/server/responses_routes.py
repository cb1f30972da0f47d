"""Routes of the Responses API: create, fetch, delete, cancel, input items, count of input tokens."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hayai.server.access import Principal
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError
from hayai.server.fields import refuse
from hayai.server.handle import encode_prompts, prepare, read_body
from hayai.server.openai_routes import json_response
from hayai.server.responses import ResponsesRequest, make_job, read_response
from hayai.server.responses_replies import Form, Keep
from hayai.server.schema import takes

if TYPE_CHECKING:
    from hayai.server.responses_store import ResponseStore, StoredResponse

_log = logging.getLogger("hayai.server")
DEFAULT_PAGE = 20
MAX_PAGE = 100


def routes(context: ServerContext) -> list[BaseRoute]:
    """The routes of this surface."""
    api = _Responses(context)
    context.closers.append(api.close)
    return [
        Route("/v1/responses", api.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", api.input_tokens, methods=["POST"]),
        Route("/v1/responses/{response_id}", api.fetch, methods=["GET"]),
        Route("/v1/responses/{response_id}", api.delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", api.cancel, methods=["POST"]),
        Route("/v1/responses/{response_id}/input_items", api.input_items, methods=["GET"]),
    ]


class _Responses:
    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self._store: ResponseStore | None = None
        self._close_store: list[Any] = []
        self._lock = threading.Lock()

    @takes(ResponsesRequest)
    async def create(self, request: Request) -> Response:
        """Answer, and keep the answer so that the conversation can go on from its id."""
        context, arrived = self.context, time.monotonic()
        principal = context.access.authenticate(request.headers)
        raw = await read_body(request, context.config.max_body_bytes)
        body, warnings = read_response(raw)
        context.resolve_model(body.model, principal)
        job = make_job(body, warnings, await self._history(principal, body.previous_response_id), context)
        if body.store:
            job.extra["keep"] = self._keeper(principal, job.extra["form"])
        return await prepare(context, principal, job, "/v1/responses", arrived)

    @takes(ResponsesRequest)
    async def input_tokens(self, request: Request) -> Response:
        """How many tokens the prompt of such a request has. Generates nothing."""
        context = self.context
        principal = context.access.authenticate(request.headers)
        raw = await read_body(request, context.config.max_body_bytes)
        body, warnings = read_response(raw)
        context.resolve_model(body.model, principal)
        job = make_job(body, warnings, await self._history(principal, body.previous_response_id), context)
        (ids,) = await encode_prompts(context, job, [])
        return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})

    async def fetch(self, request: Request) -> Response:
        """A stored response."""
        if request.query_params.get("stream") == "true":
            refuse("stream", "stream: only a background response can be streamed again, and none is served")
        return json_response((await self._find(request)).body)

    async def delete(self, request: Request) -> Response:
        """Forget a stored response."""
        principal = self.context.access.authenticate(request.headers)
        response_id = request.path_params["response_id"]
        if not await asyncio.to_thread(lambda: self._opened().delete(principal.tenant, response_id)):
            raise _missing(response_id, None)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Only background responses can be cancelled, and none is served; a client stops one by leaving."""
        found = await self._find(request)
        message = f"{found.id} is {found.body['status']}: only a running background response can be cancelled"
        raise ApiError(400, message, code="not_cancellable")

    async def input_items(self, request: Request) -> Response:
        """The items that a response was made from, those of earlier turns included."""
        principal = self.context.access.authenticate(request.headers)
        response_id = request.path_params["response_id"]
        *before, last = await self._chain(principal, response_id, None)
        items = _all_items(before) + last.items
        return json_response(_page(items, request.query_params))

    # ------------------------------------------------------------------ the store

    async def _find(self, request: Request) -> StoredResponse:
        principal = self.context.access.authenticate(request.headers)
        response_id = request.path_params["response_id"]
        found = await asyncio.to_thread(lambda: self._opened().get(principal.tenant, response_id))
        if found is None:
            raise _missing(response_id, None)
        return found

    async def _chain(self, principal: Principal, response_id: str, param: str | None) -> list[StoredResponse]:
        found = await asyncio.to_thread(lambda: self._opened().chain(principal.tenant, response_id))
        if found is None:
            raise _missing(response_id, param)
        return found

    async def _history(self, principal: Principal, response_id: str | None) -> list[dict[str, Any]]:
        if response_id is None:
            return []
        return _all_items(await self._chain(principal, response_id, "previous_response_id"))

    def _keeper(self, principal: Principal, form: Form) -> Keep:
        def put(body: dict[str, Any]) -> None:
            # slow: SQLAlchemy, which only stored responses need; imported on this thread, not the loop
            from hayai.server.responses_store import StoredResponse

            items = [dict(item) for item in form.items]
            self._opened().put(principal.tenant, StoredResponse(body["id"], body, items, form.previous))

        async def keep(body: dict[str, Any]) -> bool:
            try:
                await asyncio.to_thread(put, body)
            except Exception:
                _log.exception("response %s could not be stored", body["id"])
                return False
            return True

        return keep

    def _opened(self) -> ResponseStore:
        """The store, opened by the first call. Blocks; runs on worker threads."""
        # slow: SQLAlchemy, as above
        from hayai.server.responses_store import ResponseStore
        from hayai.server.storage import Database

        with self._lock:
            if self._store is None:
                config = self.context.config
                url = config.database
                if url is None:
                    folder = config.state_dir
                    if folder is None:  # nothing is to outlive the process
                        folder = Path(mkdtemp(prefix="hayai-"))
                        self._close_store.append(lambda: shutil.rmtree(folder, ignore_errors=True))
                    folder.mkdir(parents=True, exist_ok=True)
                    url = str(folder / "responses.db")
                database = Database(url)
                self._close_store.insert(0, database.close)
                self._store = ResponseStore(database)
            return self._store

    def close(self) -> None:
        for close in self._close_store:
            close()


def _all_items(chain: Sequence[StoredResponse]) -> list[dict[str, Any]]:
    return [item for turn in chain for item in (*turn.items, *turn.body["output"])]


def _missing(response_id: str, param: str | None) -> ApiError:
    message = (
        f"no stored response has id {response_id[:100]!r}; they are kept for 30 days, if `store` is true"
    )
    return ApiError(404, message, param=param, code="response_not_found")


def _page(items: list[dict[str, Any]], query: Any) -> dict[str, Any]:
    """One page of a list, as `limit`, `order` and `after` ask."""
    limit, order, after = (
        query.get("limit", str(DEFAULT_PAGE)),
        query.get("order", "desc"),
        query.get("after"),
    )
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
        refuse("limit", f"limit must be from 1 to {MAX_PAGE}: {limit[:40]!r}")
    if order not in ("asc", "desc"):
        refuse("order", f"order must be asc or desc: {order[:40]!r}")
    rows = items if order == "asc" else items[::-1]
    if after is not None:
        place = next((i for i, item in enumerate(rows) if item["id"] == after), None)
        if place is None:
            refuse("after", f"after: no such item: {after[:60]!r}")
        rows = rows[place + 1 :]
    shown = rows[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else "",
        "last_id": shown[-1]["id"] if shown else "",
        "has_more": len(rows) > len(shown),
    }

"""GET /v1/usage: what the caller's tenant has used, and its limits."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hayai.errors import ConfigError
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError
from hayai.server.openai_routes import json_response


def routes(context: ServerContext) -> list[BaseRoute]:
    """The route of this surface."""

    async def usage(request: Request) -> Response:
        """What the tenant of the key has used, by model. since, until: ISO 8601, UTC; default: this month."""
        principal = context.access.authenticate(request.headers)
        query = request.query_params
        unknown = set(query) - {"since", "until"}
        if unknown:
            name = min(unknown)
            raise ApiError(
                400, f"unknown parameter: {name[:50]!r}", param=name[:50], code="unknown_parameter"
            )
        try:
            asked = context.access.usage_of(principal, query.get("since"), query.get("until"))
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        if asked is None:
            raise ApiError(404, "this server keeps no usage: it has no database", code="not_found")
        report: dict[str, Any] = await asyncio.to_thread(asked)
        return json_response(report)

    return [Route("/v1/usage", usage)]

"""Models as Anthropic's clients list them. The path is OpenAI's; a request that carries `anthropic-version`
gets this form."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from hayai.errors import RequestError
from hayai.server.access import Principal
from hayai.server.context import ServerContext

VERSION_HEADER = "anthropic-version"
"""What Anthropic's clients always send, and no others."""

_DEFAULT_PAGE, _MAX_PAGE = 20, 1000


def anthropic_model(context: ServerContext, name: str) -> dict[str, Any]:
    """A ModelInfo; `name` is what `context.model_names` gave."""
    length = context.frontend.context_length
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(context.started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": length,
        "max_tokens": length,
    }


def anthropic_model_list(
    context: ServerContext, principal: Principal, query: Mapping[str, str]
) -> dict[str, Any]:
    """A page of ModelInfos: `limit` of them, after `after_id` or before `before_id`. RequestError names the
    parameter that is wrong."""
    names = context.model_names(principal)
    limit = query.get("limit", str(_DEFAULT_PAGE))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= _MAX_PAGE):
        message = f"limit must be a number from 1 to {_MAX_PAGE}: {limit[:40]!r}"
        raise RequestError(message, param="limit", code="invalid_value")
    size = int(limit)
    after, before = (_place(names, query, key) for key in ("after_id", "before_id"))
    if before is not None:
        names = names[:before]
        page = names[-size:]
    else:
        names = names[0 if after is None else after + 1 :]
        page = names[:size]
    return {
        "data": [anthropic_model(context, name) for name in page],
        "has_more": len(page) < len(names),
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def _place(names: list[str], query: Mapping[str, str], key: str) -> int | None:
    name = query.get(key)
    if name is None:
        return None
    if name not in names:
        raise RequestError(f"{key}: no such model: {name[:100]!r}", param=key, code="invalid_value")
    return names.index(name)

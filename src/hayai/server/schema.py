"""What there is to call, as an OpenAPI document: summaries from docstrings, bodies from the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.routing import BaseRoute, Route

import hayai

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_BODY = "hayai_body"
_FORM = "hayai_form"
_QUERY = "hayai_query"


def takes(model: type[BaseModel]) -> Callable[[Endpoint], Endpoint]:
    """Decorator: the endpoint's JSON body, for /openapi.json."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _BODY, model)
        return endpoint

    return mark


def takes_form(schema: dict[str, Any]) -> Callable[[Endpoint], Endpoint]:
    """Decorator: the endpoint's multipart form, as a JSON schema of its fields."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _FORM, schema)
        return endpoint

    return mark


def takes_query(**schemas: dict[str, Any]) -> Callable[[Endpoint], Endpoint]:
    """Decorator: the endpoint's query parameters, none of them required, as JSON schemas by name."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _QUERY, schemas)
        return endpoint

    return mark


def describe_api(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of the routes."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for route in routes:
        assert isinstance(route, Route)
        summary = (route.endpoint.__doc__ or "").strip()
        entry: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "JSON, or events"}}}
        model: type[BaseModel] | None = getattr(route.endpoint, _BODY, None)
        if model is not None:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        form: dict[str, Any] | None = getattr(route.endpoint, _FORM, None)
        if form is not None:
            entry["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
        path = route.path.replace(":path}", "}")
        entry["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
        query: dict[str, Any] = getattr(route.endpoint, _QUERY, {})
        entry["parameters"] += [{"name": n, "in": "query", "schema": schema} for n, schema in query.items()]
        for method in (route.methods or set()) - {"HEAD"}:
            paths.setdefault(path, {})[method.lower()] = entry
    info = {"title": "Hayai", "version": hayai.__version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}

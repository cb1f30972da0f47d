"""OpenAI's own description of its API, as a judge of our bodies and events.

The file is data that the user names (HAYAI_DATA, folder `openapi_openai`); without it such tests are skipped.
Two things in it are not JSON Schema as it is meant, and are read as follows:
* `nullable: true` (OpenAPI 3.0, in a document that says 3.1) adds null to what a schema allows;
* `oneOf` whose branches overlap (an OutputMessage is an InputMessage too) is read as `anyOf`.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from hayai.config import read_environment


def path() -> Path | None:
    """Where the description is, if it is there."""
    data = read_environment().data
    found = None if data is None else data / "openapi_openai" / "openapi.yaml.gz"
    return found if found is not None and found.exists() else None


@cache
def document() -> dict[str, Any]:
    """The whole description; the test is skipped where it is not there."""
    file = path()
    if file is None:
        pytest.skip("HAYAI_DATA has no openapi_openai")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(gzip.decompress(file.read_bytes()), Loader=loader)


def _read(value: Any) -> Any:
    """A schema, or anything inside one, in the two senses above."""
    if isinstance(value, list):
        return [_read(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    schema: dict[str, Any] = {}
    for key, item in value.items():
        if key == "properties":  # names, not keywords
            schema[key] = {name: _read(v) for name, v in item.items()}
        elif key not in ("discriminator", "example", "description", "nullable"):
            schema["anyOf" if key == "oneOf" else key] = _read(item)
    return {"anyOf": [schema, {"type": "null"}]} if value.get("nullable") is True else schema


@cache
def _schemas() -> dict[str, Any]:
    return {name: _read(schema) for name, schema in document()["components"]["schemas"].items()}


@cache
def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": {"schemas": _schemas()}}
    )


def check(name: str, value: Any) -> None:
    """Fail with every place at which `value` is not what the API calls `name`."""
    found = validator(name).iter_errors(value)
    errors = [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:300]}" for e in found]
    assert not errors, f"not a {name}: " + "; ".join(errors)


def check_if_there(name: str, value: Any) -> None:
    """`check` for tests that say enough without it."""
    if path() is not None:
        check(name, value)


def event_name(event: Mapping[str, Any]) -> str:
    """The schema of one of the Responses API's events, by its type."""
    schemas = document()["components"]["schemas"]
    parts = schemas["ResponseStreamEvent"]
    names = [part["$ref"].rsplit("/", 1)[1] for part in parts.get("anyOf") or parts["oneOf"]]
    found = [n for n in names if schemas[n]["properties"]["type"]["enum"] == [event["type"]]]
    assert len(found) == 1, f"no event of the API: {event['type']}"
    return found[0]


def properties(name: str) -> set[str]:
    """Names of all properties of a schema, those of its parts included."""

    def of(schema: Mapping[str, Any]) -> set[str]:
        if "$ref" in schema:
            return of(document()["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]])
        found = set(schema.get("properties", ()))
        return found.union(*(of(part) for part in schema.get("allOf", ())))

    return of(document()["components"]["schemas"][name])

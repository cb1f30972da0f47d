"""Bodies of requests, what every wire format shares: JSON, sorting of fields, errors with a place."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from hayai.errors import RequestError
from hayai.server.fields import kind_of

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class FieldTable:
    """What a dialect does with the fields of a body that its model does not have.

    warned: accepted without effect, and the answer says so; field -> (what is not done, values that ask for
    nothing). refused: field -> (reason, values that ask for nothing). null never asks for anything.
    Everything else is unknown, and an error.
    """

    warned: Mapping[str, tuple[str, tuple[object, ...]]] = field(default_factory=dict)
    refused: Mapping[str, tuple[str, tuple[object, ...]]] = field(default_factory=dict)

    def sort(
        self, body: Mapping[str, object], known: Collection[str], where: str = ""
    ) -> tuple[dict[str, object], list[str]]:
        """The fields of `body` that are served, nulls dropped (null means: the default), and warnings.
        Paths of fields begin with `where`.

        RequestError for a refused field and for an unknown one, with a near name where there is one.
        """
        kept: dict[str, object] = {}
        warnings: list[str] = []
        for name, value in body.items():
            path = f"{where}.{name[:100]}" if where else name[:100]
            if name in known:
                if value is not None:
                    kept[name] = value
            elif name in self.refused:
                reason, harmless = self.refused[name]
                if _asks(value, harmless):
                    message = f"{path} is not supported: {reason}"
                    raise RequestError(message, param=path, code="unsupported_parameter")
            elif name in self.warned:
                reason, harmless = self.warned[name]
                if _asks(value, harmless):
                    warnings.append(f"{path}: {reason}")
            else:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise RequestError(f"unknown field: {path}{hint}", param=path, code="unknown_parameter")
        return kept, warnings


def _asks(value: object, harmless: tuple[object, ...]) -> bool:
    return value is not None and not any(value == h and type(value) is type(h) for h in harmless)


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body must be. RequestError, code 'invalid_json'."""
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"the body must be a JSON object: {kind_of(parsed)}", code="invalid_json")
    return parsed


def validate(model: type[Body], fields: Mapping[str, object], where: str = "") -> Body:
    """`fields` as the model; RequestError of the first that is wrong, its path beginning with `where`."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error, where) from None


def _first_error(error: ValidationError, where: str) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p[:100]}" for p in first["loc"])
    param = (where + path).lstrip(".")
    if first["type"] == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field: {param}", param=param, code="unknown_parameter")
    message = f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}; found {kind_of(first['input'])}"
    return RequestError(message, param=param, code="invalid_value")

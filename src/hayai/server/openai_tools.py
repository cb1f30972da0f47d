"""Tools and the form of an answer: OpenAI's and vLLM's fields -> the neutral RequestOptions.

tools, tool_choice and response_format are OpenAI's. For other structured output there are vLLM's names, both
generations of them: `structured_outputs` with one of json, json_object, regex, choice and grammar inside, and
the flat guided_json, guided_regex, guided_choice, guided_grammar. A grammar is Lark's, in llguidance's
dialect. Limits are config.LimitsConfig's; whether a schema or a grammar can be compiled is for
the frontend to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson

from hayai.config import LimitsConfig
from hayai.errors import RequestError
from hayai.frontend_request import Constraint, Tool, ToolChoice
from hayai.server.fields import kind_of, refuse

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ConstraintKind = Literal["json", "json_schema", "regex", "grammar", "choice"]

TOOLS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
                    "description": {"type": "string"},
                    "parameters": {"type": "object"},
                    "strict": {"type": "boolean"},
                },
                "required": ["name"],
            },
        },
        "required": ["type", "function"],
    },
}
TOOL_CHOICE_SCHEMA = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}
FORMAT_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
                "description": {"type": "string"},
                "schema": {"type": "object"},
                "strict": {"type": "boolean"},
            },
            "required": ["name"],
        },
    },
    "required": ["type"],
}


@dataclass(frozen=True)
class Choice:
    """`tool_choice`, understood. only: names of the tools that may be called; None = all."""

    mode: ToolChoice = "auto"
    forced: str | None = None
    only: frozenset[str] | None = None


# ---------------------------------------------------------------------- tools


def read_tools(value: object, limits: LimitsConfig, *, nested: bool = True) -> tuple[Tool, ...]:
    """`tools`: functions that the model may call. nested: name and parameters lie below `function` (chat), or
    beside `type` (responses). RequestError: what is wrong, and where."""
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse("tools", f"tools must be a list: {kind_of(value)}")
    if len(value) > limits.max_tools:
        refuse("tools", f"at most {limits.max_tools} tools: {len(value)}")
    tools = tuple(_tool(item, f"tools[{i}]", limits, nested) for i, item in enumerate(value))
    names = [tool.name for tool in tools]
    double = next((i for i, name in enumerate(names) if name in names[:i]), None)
    if double is not None:
        refuse(f"tools[{double}]", f"two tools are called {names[double]!r}")
    return tools


def _tool(value: object, where: str, limits: LimitsConfig, nested: bool) -> Tool:
    fields = _object(value, where)
    kind = fields.get("type")
    if kind != "function":
        message = f"{where}.type: only 'function' tools are served: {str(kind)[:40]!r}"
        raise RequestError(message, param=f"{where}.type", code="unsupported_parameter")
    if nested:
        _only(fields, ("type", "function"), where)
        where = f"{where}.function"
        fields = _object(fields.get("function"), where)
        _only(fields, ("name", "description", "parameters", "strict"), where)
    else:
        _only(fields, ("type", "name", "description", "parameters", "strict"), where)
    strict = fields.get("strict")
    if strict is not None and not isinstance(strict, bool):
        refuse(f"{where}.strict", f"{where}.strict must be true or false: {kind_of(strict)}")
    parameters = fields.get("parameters")
    schema = {} if parameters is None else check_schema(parameters, f"{where}.parameters", limits)
    return Tool(
        read_name(fields.get("name"), f"{where}.name"),
        _text(fields.get("description"), f"{where}.description"),
        schema,
        bool(strict),
    )


def read_tool_choice(value: object, tools: tuple[Tool, ...], *, nested: bool = True) -> Choice:
    """`tool_choice`; every name in it has to be a tool's."""
    if value is None or value == "auto":
        return Choice()
    if value == "none":
        return Choice("none")
    if not tools:
        refuse("tool_choice", f"tool_choice needs tools: {str(value)[:60]}")
    if value == "required":
        return Choice("required")
    if not isinstance(value, dict):
        refuse("tool_choice", f"tool_choice must be none, auto, required or an object: {kind_of(value)}")
    kind, names = value.get("type"), {tool.name for tool in tools}
    if kind == "function":
        name = _chosen(value, "tool_choice", nested, names)
        return Choice("required", forced=name)
    if kind == "allowed_tools":
        inner = _object(value.get("allowed_tools"), "tool_choice.allowed_tools") if nested else value
        mode, listed = inner.get("mode"), inner.get("tools")
        if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
            refuse("tool_choice", "tool_choice: allowed_tools needs mode (auto or required) and tools")
        chosen = [
            _chosen(_object(t, f"tool_choice.tools[{i}]"), f"tool_choice.tools[{i}]", nested, names)
            for i, t in enumerate(listed)
        ]
        return Choice("auto" if mode == "auto" else "required", only=frozenset(chosen))
    message = f"tool_choice.type must be function or allowed_tools: {str(kind)[:40]!r}"
    raise RequestError(message, param="tool_choice", code="unsupported_parameter")


def _chosen(value: Mapping[str, Any], where: str, nested: bool, names: set[str]) -> str:
    inner = _object(value.get("function"), f"{where}.function") if nested else value
    name = inner.get("name")
    if not isinstance(name, str) or name not in names:
        refuse(
            "tool_choice", f"{where}: no such tool: {str(name)[:64]!r}; there is {', '.join(sorted(names))}"
        )
    return name


# ---------------------------------------------------------------------- the form of the answer


def read_format(value: object, limits: LimitsConfig, where: str = "response_format") -> Constraint | None:
    """`response_format` of chat; or, `where` being "text.format", that of responses: the schema lies flat."""
    if value is None:
        return None
    fields = _object(value, where)
    kind = fields.get("type")
    if kind in ("text", "json_object"):
        _only(fields, ("type",), where)
        return None if kind == "text" else Constraint("json")
    if kind != "json_schema":
        message = f"{where}.type must be text, json_object or json_schema: {str(kind)[:40]!r}"
        raise RequestError(message, param=f"{where}.type", code="unsupported_parameter")
    if where == "response_format":
        _only(fields, ("type", "json_schema"), where)
        where = f"{where}.json_schema"
        fields = _object(fields.get("json_schema"), where)
        _only(fields, ("name", "description", "schema", "strict"), where)
    else:
        _only(fields, ("type", "name", "description", "schema", "strict"), where)
    read_name(fields.get("name"), f"{where}.name")
    _text(fields.get("description"), f"{where}.description")
    strict = fields.get("strict")
    if strict is not None and not isinstance(strict, bool):
        refuse(f"{where}.strict", f"{where}.strict must be true or false: {kind_of(strict)}")
    schema = fields.get("schema")
    if schema is None:
        return Constraint("json")
    return Constraint("json_schema", check_schema(schema, f"{where}.schema", limits))


FLAT: Mapping[str, ConstraintKind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
NESTED: Mapping[str, ConstraintKind] = {
    "json": "json_schema",
    "json_object": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
"""Names of the extensions -> kinds of Constraint."""


def read_structured(fields: Mapping[str, object], limits: LimitsConfig) -> dict[str, Constraint]:
    """The extensions that are set among `fields` (names of FLAT and 'structured_outputs'), by their path."""
    found: dict[str, Constraint] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name == "structured_outputs":
            inner = _object(value, name)
            _only(inner, tuple(NESTED), name)
            for key, item in inner.items():
                if item is not None and item is not False:
                    found[f"{name}.{key}"] = _constraint(NESTED[key], item, f"{name}.{key}", limits)
        else:
            found[name] = _constraint(FLAT[name], value, name, limits)
    return found


def one_constraint(found: Mapping[str, Constraint | None]) -> Constraint | None:
    """The only form that was asked for; two contradict each other."""
    asked = {name: constraint for name, constraint in found.items() if constraint is not None}
    if len(asked) > 1:
        names = sorted(asked)
        refuse(names[1], f"{' and '.join(names)} both give the form of the answer; use one of them")
    return next((replace(constraint, param=name) for name, constraint in asked.items()), None)


def _constraint(kind: ConstraintKind, value: object, where: str, limits: LimitsConfig) -> Constraint:
    if kind == "json":
        if value is not True:
            refuse(where, f"{where} must be true or false: {kind_of(value)}")
        return Constraint("json")
    if kind == "json_schema":
        return Constraint(kind, check_schema(_parsed(value, where), where, limits))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            refuse(where, f"{where} must be a list of non-empty strings: {kind_of(value)}")
        size, limit = sum(len(v.encode()) for v in value), limits.max_schema_bytes
    else:
        if not isinstance(value, str) or not value:
            refuse(where, f"{where} must be a non-empty string: {kind_of(value)}")
        size = len(value.encode())
        limit = limits.max_regex_bytes if kind == "regex" else limits.max_schema_bytes
    if size > limit:
        refuse(where, f"{where} has {size} bytes; at most {limit}")
    return Constraint(kind, value)


def _parsed(value: object, where: str) -> object:
    """vLLM takes a schema as JSON text too."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        refuse(where, f"{where} is not JSON: {error}")


def check_schema(value: object, where: str, limits: LimitsConfig) -> dict[str, Any]:
    """A JSON schema that is an object, within the limits of size and depth."""
    if not isinstance(value, dict):
        refuse(where, f"{where} must be a JSON schema (an object): {kind_of(value)}")
    size = len(orjson.dumps(value))
    if size > limits.max_schema_bytes:
        refuse(where, f"{where} has {size} bytes; at most {limits.max_schema_bytes}")
    if _deeper(value, limits.max_schema_depth):
        refuse(where, f"{where} is nested deeper than {limits.max_schema_depth} levels")
    return value


def _deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if levels == 0:
        return True
    items = value.values() if isinstance(value, dict) else value
    return any(_deeper(item, levels - 1) for item in items)


# ---------------------------------------------------------------------- pieces


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    return value


def _only(fields: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    unknown = next((name for name in fields if name not in known), None)
    if unknown is not None:
        path = f"{where}.{unknown[:100]}"
        raise RequestError(f"unknown field: {path}", param=path, code="unknown_parameter")


def read_name(value: object, where: str) -> str:
    """A name as the API allows it."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        shown = repr(value[:70]) if isinstance(value, str) else kind_of(value)
        refuse(where, f"{where} must be 1 to 64 letters, digits, _ and -: {shown}")
    return value


def _text(value: object, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        refuse(where, f"{where} must be a string: {kind_of(value)}")
    return value

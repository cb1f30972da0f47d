"""Reading one tool call: how it begins, and what it says as a whole. Formats: tool_formats.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from hayai.text.tool_formats import ToolFormat, is_text

ARGUMENT_KEYS = ("arguments", "parameters")
SPACE = " \t\r\n"

Tools = Mapping[str, Mapping[str, Any]]
"""Schemas of the arguments, by the tool's name."""

# ---------------------------------------------------------------- how a call begins


class Head(NamedTuple):
    """The beginning of a call. end: where its arguments begin. nested: they are a member of an object, which
    began before. arguments False: the call has none, and `end` is where its object closes."""

    name: str
    end: int
    nested: bool
    arguments: bool = True


def json_head(text: str, start: int) -> Head | Literal[False] | None:
    """Of {"name": "f", "arguments": {...}}, with other strings ("type", "id") in between. None: more text is
    needed; False: it is something else."""
    name: str | None = None
    at = start + 1
    while True:
        at = after_space(text, at)
        if at == len(text):
            return None
        if text[at] == "}":
            return Head(name, at, True, False) if name is not None else False
        key, at = _string(text, at)
        if not isinstance(key, str):
            return key
        at = after_space(text, at)
        if at < len(text) and text[at] != ":":
            return False
        at = after_space(text, at + 1)
        if key in ARGUMENT_KEYS:
            if at >= len(text):
                return None
            return Head(name, at, True) if name is not None and text[at] == "{" else False
        if key not in ("name", "type", "id"):
            return False
        value, at = _string(text, at)
        if not isinstance(value, str):
            return value
        if key == "name":
            name = value
        at = after_space(text, at)
        if at < len(text) and text[at] not in ",}":
            return False
        at += at < len(text) and text[at] == ","


def named_head(text: str, start: int) -> Head | Literal[False] | None:
    """Of f[ARGS]{...}, f[CALL_ID]x[ARGS]{...} and f{...}; as `json_head`."""
    found = _NAMED.match(text, start)
    if found is not None:
        return Head(found[1], found.end(), False)
    return None if _NAMED_PARTIAL.fullmatch(text, start) else False


_NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_NAMED_PARTIAL = re.compile(
    r"[\w.-]*\s*(?:\[[A-Z_]*|\[CALL_ID\]\s*\w*\s*(?:\[[A-Z]*)?|(?:\[CALL_ID\]\s*\w*\s*)?\[ARGS\]\s*)?"
)


def _string(text: str, at: int) -> tuple[str | Literal[False] | None, int]:
    """(the JSON string that begins here, where it ends); None: more text is needed; False: it is none."""
    if at >= len(text):
        return None, at
    found = _JSON_STRING.match(text, at)
    if found is None:
        return (None if text[at] == '"' and "\n" not in text[at:] else False), at
    try:
        return str(json.loads(found[0])), found.end()
    except ValueError:
        return False, at


_JSON_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')


def after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


# ---------------------------------------------------------------- calls as a whole

Calls = list[tuple[str, str]]
"""(name, arguments as JSON)"""


def whole_calls(form: ToolFormat, body: str, tools: Tools) -> Calls:
    """The calls between an opening and a closing tag; none where the body is not of the format."""
    return _WHOLE.get(form.name, _json_calls)(body, tools)


def _json_calls(body: str, tools: Tools) -> Calls:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return []
    calls: Calls = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and isinstance(item.get("function"), dict):
            item = item["function"]
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments: Any = next((item[key] for key in ARGUMENT_KEYS if key in item), {})
        if isinstance(arguments, str):  # JSON within JSON, as OpenAI's API has it
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return []
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            return []
        calls.append((item["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls


_GLM_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_GLM_NAME = re.compile(r"\s*([\w.-]+)\s*(?=<arg_key>|\Z)")
_XML_CALL = re.compile(r"\s*<function=([^>\n]+)>\s*?(.*?)\s*</function>", re.DOTALL)
_XML_ARGUMENT = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _glm_calls(body: str, tools: Tools) -> Calls:
    head = _GLM_NAME.match(body)
    if head is None:
        return []
    arguments = _tagged_arguments(body[head.end() :], _GLM_ARGUMENT, tools.get(head[1], {}))
    return [] if arguments is None else [(head[1], arguments)]


def _xml_calls(body: str, tools: Tools) -> Calls:
    calls: Calls = []
    at = 0
    for found in _XML_CALL.finditer(body):
        arguments = _tagged_arguments(found[2], _XML_ARGUMENT, tools.get(found[1], {}))
        if arguments is None or body[at : found.start()].strip():
            return []
        calls.append((found[1], arguments))
        at = found.end()
    return [] if body[at:].strip() else calls


def _tagged_arguments(text: str, pattern: re.Pattern[str], schema: Mapping[str, Any]) -> str | None:
    properties = schema.get("properties", {})
    arguments: dict[str, Any] = {}
    at = 0
    while (found := pattern.match(text, at)) is not None:
        key, value = found[1].strip(), found[2]
        known = properties.get(key) if isinstance(properties, Mapping) else None
        arguments[key] = value if is_text(known) else _value(value)
        at = found.end()
    return None if text[at:].strip() else json.dumps(arguments, ensure_ascii=False)


def _value(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_WHOLE: Mapping[str, Callable[[str, Tools], Calls]] = {
    "glm": _glm_calls,
    "xml": _xml_calls,
}

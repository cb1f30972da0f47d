"""Items of the Responses API, inwards: what a client sends as `input`, checked, and as chat messages.

An item is a message, a function call, its output, or reasoning. Neighbouring items of the assistant become
one message, which is how chat templates know them. Errors name the exact place (`input[2].content[0].type`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hayai.errors import RequestError
from hayai.server.fields import kind_of, refuse

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")

INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "object", "properties": {"type": {"type": "string"}}}},
    ]
}


def read_items(value: object, max_items: int) -> list[dict[str, Any]]:
    """`input` as items with ids and full content. RequestError: what is wrong, and where."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        refuse("input", f"input must be a string or a list of items: {kind_of(value)}")
    if len(value) > max_items:
        refuse("input", f"at most {max_items} items: {len(value)}")
    return [_item(item, f"input[{i}]") for i, item in enumerate(value)]


def _item(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    kind = value.get("type", "message")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        message = f"{where}.type must be one of {', '.join(_READERS)}: {str(kind)[:40]!r}"
        raise RequestError(message, param=f"{where}.type", code="unsupported_parameter")
    prefix, read = reader
    given = value.get("id")
    if given is not None and not isinstance(given, str):
        refuse(f"{where}.id", f"{where}.id must be a string: {kind_of(given)}")
    return {"id": given or f"{prefix}_{uuid.uuid4().hex}", "type": kind} | read(value, where)


def _message(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else kind_of(role)
        refuse(f"{where}.role", f"{where}.role must be one of {', '.join(ROLES)}: {shown}")
    text = _text(value.get("content"), f"{where}.content")
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"role": role, "status": "completed", "content": [part]}


def _function_call(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    call = {name: _string(value.get(name), f"{where}.{name}") for name in ("call_id", "name", "arguments")}
    return call | {"status": "completed"}


def _function_output(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    call_id = _string(value.get("call_id"), f"{where}.call_id")
    output = _text(value.get("output"), f"{where}.output")
    return {"call_id": call_id, "output": output, "status": "completed"}


def _reasoning(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = value.get("content")
    text = "" if content is None else _text(content, f"{where}.content")
    return {
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}] if text else [],
        "status": "completed",
    }


_READERS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], str], dict[str, Any]]]] = {
    "message": ("msg", _message),
    "function_call": ("fc", _function_call),
    "function_call_output": ("fco", _function_output),
    "reasoning": ("rs", _reasoning),
}
"""Type of an item -> how its id begins, and who reads it."""


def _text(value: object, where: str) -> str:
    """Content that is a string or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(where, f"{where} must be a string or a list of text parts: {kind_of(value)}")
    parts = []
    for i, part in enumerate(value):
        path = f"{where}[{i}]"
        if not isinstance(part, dict):
            refuse(path, f"{path} must be an object: {kind_of(part)}")
        kind = part.get("type")
        if kind == "refusal":
            parts.append(_string(part.get("refusal"), f"{path}.refusal"))
        elif kind in _TEXT_PARTS:
            parts.append(_string(part.get("text"), f"{path}.text"))
        else:
            refuse(f"{path}.type", f"{path}.type: only text is supported: {str(kind)[:40]!r}")
    return "".join(parts)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        refuse(where, f"{where} must be a string: {kind_of(value)}")
    return value


# ---------------------------------------------------------------------- to messages


def to_messages(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Chat messages of a whole conversation. RequestError for an output that answers no call."""
    messages: list[dict[str, Any]] = []
    calls: set[str] = set()
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            if item["call_id"] not in calls:
                refuse("input", f"input: no function call has call_id {item['call_id'][:60]!r}")
            messages.append({"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]})
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": ROLES[item["role"]], "content": _content_of(item)})
        else:
            turn = _assistant_turn(messages)
            if kind == "message":
                turn["content"] += _content_of(item)
            elif kind == "reasoning":
                if item["content"]:
                    turn["reasoning_content"] = turn.get("reasoning_content", "") + _content_of(item)
            else:
                calls.add(item["call_id"])
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                turn.setdefault("tool_calls", []).append(call)
    return tuple(messages)


def _assistant_turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _content_of(item: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in item["content"])

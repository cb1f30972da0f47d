"""Messages of OpenAI's chat format, checked: what comes back is what chat templates expect.

Roles, text parts, tool calls and their results. Errors name the exact place (`messages[2].content[0].type`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hayai.config import LimitsConfig
from hayai.errors import RequestError
from hayai.server.fields import kind_of, refuse

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Role on the wire -> role in the template."""

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "type", "function"],
}
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]
            },
            "name": {"type": "string"},
            "tool_call_id": {"type": "string"},
            "tool_calls": {"type": "array", "items": _CALL},
            "reasoning_content": {"type": "string"},
        },
        "required": ["role"],
    },
}

_EMPTY_FIELDS = ("function_call", "audio", "refusal", "annotations", "tool_calls", "tool_call_id")
"""Fields of messages as clients send them back; empty, they say nothing."""
_STRINGS = {
    "name": frozenset(ROLES.values()),
    "tool_call_id": frozenset({"tool"}),
    "reasoning_content": frozenset({"assistant"}),
}
"""Further fields that are text -> roles that have them."""


def read_messages(
    value: object, max_messages: int, max_parts: int = LimitsConfig.max_parts
) -> tuple[dict[str, Any], ...]:
    """`messages` of a request, checked. RequestError: what is wrong, and where."""
    if not isinstance(value, list) or not value:
        refuse("messages", f"messages must be a list with at least one message: {kind_of(value)}")
    if len(value) > max_messages:
        refuse("messages", f"at most {max_messages} messages: {len(value)}")
    check_parts(value, max_parts)
    calls: set[str] = set()
    return tuple(_message(m, f"messages[{i}]", calls) for i, m in enumerate(value))


def check_parts(messages: Sequence[object], most: int) -> None:
    """RequestError when the messages have more than `most` content parts in all, those inside of a tool's
    result counted too. Before the parts are read: nothing else limits how many there are."""
    found = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            continue
        found += len(content)
        if found <= most:
            for part in content:
                inner = part.get("content") if isinstance(part, dict) else None
                found += len(inner) if isinstance(inner, list) else 0
        if found > most:
            refuse("messages", f"at most {most} content parts in all messages: more than that were sent")


def _message(value: object, where: str, calls: set[str]) -> dict[str, Any]:
    """calls: ids of the tool calls so far; a result has to answer one of them."""
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else kind_of(role)
        refuse(f"{where}.role", f"{where}.role must be one of {', '.join(ROLES)}: {shown}")
    message: dict[str, Any] = {"role": ROLES[role]}
    for name, field in value.items():
        path = f"{where}.{name[:100]}"
        if name in ("role", "content") or (name in _EMPTY_FIELDS and field in (None, [])):
            continue
        if name == "tool_calls" and role == "assistant":
            message[name] = _tool_calls(field, path)
            calls.update(call["id"] for call in message[name])
        elif message["role"] in _STRINGS.get(name, ()):
            if field is not None:
                message[name] = _string(field, path)
        elif name != "refusal" or role != "assistant":
            raise RequestError(f"unsupported field: {path}", param=path, code="unknown_parameter")
    message["content"] = _message_content(value, message, f"{where}.content")
    if role == "tool" and message.get("tool_call_id") not in calls:
        path, found = f"{where}.tool_call_id", message.get("tool_call_id")
        refuse(path, f"{path} must be the id of an earlier tool call: {str(found)[:60]!r}")
    return message


def _message_content(value: Mapping[str, Any], message: Mapping[str, Any], where: str) -> str:
    content = value.get("content")
    if content is None and message["role"] == "assistant":
        if message.get("tool_calls"):
            return ""
        content = value.get("refusal")  # an answer that was only a refusal
    return read_text(content, where)


def read_text(value: object, where: str) -> str:
    """Content that is a string or a list of text parts, as one string."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(where, f"{where} must be a string or a list of text parts: {kind_of(value)}")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))


def _part(value: object, where: str) -> str:
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    kind = value.get("type")
    if kind not in ("text", "refusal"):
        refuse(f"{where}.type", f"{where}.type: only 'text' is supported: {str(kind)[:40]!r}")
    unknown = next((name for name in value if name not in ("type", kind)), None)
    if unknown is not None:
        refuse(f"{where}.{unknown[:100]}", f"unsupported field: {where}.{unknown[:100]}")
    return _string(value.get(kind), f"{where}.{kind}")


def _tool_calls(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        refuse(where, f"{where} must be a list of tool calls: {kind_of(value)}")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(value)]


def _tool_call(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    if value.get("type", "function") != "function":
        refuse(f"{where}.type", f"{where}.type: only 'function' is supported: {str(value['type'])[:40]!r}")
    function = value.get("function")
    if not isinstance(function, dict):
        refuse(f"{where}.function", f"{where}.function must be an object: {kind_of(function)}")
    return {
        "id": _string(value.get("id"), f"{where}.id"),
        "type": "function",
        "function": {
            "name": _string(function.get("name"), f"{where}.function.name"),
            "arguments": _string(function.get("arguments", ""), f"{where}.function.arguments"),
        },
    }


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        refuse(where, f"{where} must be a string: {kind_of(value)}")
    return value

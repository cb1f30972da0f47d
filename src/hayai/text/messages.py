"""Chat messages as the OpenAI API spells them, checked and brought into the form that templates expect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from hayai.errors import RequestError

# A role goes into the prompt as it is, between control tokens, so it may not be free text.
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def normalize_messages(messages: object) -> list[dict[str, object]]:
    """Check `messages` and return copies in which `content` is always a string.

    Text parts are joined by line feeds; null content becomes the empty string (only beside tool calls); JSON
    arguments of tool calls become mappings, which is what templates print or walk. Other fields stay as they
    are. Raises RequestError with the field's path as `param` (`messages[2].content`).
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        _fail("messages", "must be an array of messages", messages)
    if not messages:
        raise RequestError(
            "messages is empty; at least one message is needed", param="messages", code="empty"
        )
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(path: str, message: object) -> dict[str, object]:
    if not isinstance(message, Mapping):
        _fail(path, "must be an object", message)
    result = {key: value for key, value in message.items() if isinstance(key, str)}
    role = result.get("role")
    if role is None:
        raise RequestError(f"{path}.role is missing", param=f"{path}.role", code="missing_field")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        _fail(f"{path}.role", "must be a name such as system, user, assistant or tool", role)
    result["content"] = _content(f"{path}.content", result)
    if result.get("tool_calls") is not None:
        result["tool_calls"] = _tool_calls(f"{path}.tool_calls", result["tool_calls"])
    return result


def _content(path: str, message: Mapping[str, object]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("tool_calls"):
            return ""
        raise RequestError(f"{path} is missing", param=path, code="missing_field")
    if isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        return "\n".join(_part(f"{path}[{i}]", part) for i, part in enumerate(content))
    _fail(path, "must be a string or an array of text parts", content)


def _part(path: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        _fail(path, "must be an object", part)
    if part.get("type") != "text":
        raise RequestError(
            f"{path}.type is {part.get('type')!r:.60}; supported: 'text'",
            param=f"{path}.type",
            code="unsupported_content",
        )
    if not isinstance(part.get("text"), str):
        _fail(f"{path}.text", "must be a string", part.get("text"))
    return str(part["text"])


def _tool_calls(path: str, calls: object) -> list[dict[str, object]]:
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        _fail(path, "must be an array", calls)
    result: list[dict[str, object]] = []
    for i, call in enumerate(calls):
        if not isinstance(call, Mapping):
            _fail(f"{path}[{i}]", "must be an object", call)
        function = call.get("function")
        if function is None:
            result.append(dict(call))
            continue
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _fail(f"{path}[{i}].function", "must be an object with a name", function)
        result.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return result


def _arguments(arguments: object) -> object:
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        parsed: object = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _fail(path: str, expected: str, found: object) -> NoReturn:
    raise RequestError(
        f"{path} {expected}; found {type(found).__name__} {found!r:.60}", param=path, code="invalid_type"
    )

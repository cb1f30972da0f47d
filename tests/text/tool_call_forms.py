"""Tool calls as models write them: one function per format."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: Sequence[Call]) -> str:
    bodies = [_json({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def hermes_arguments_first(calls: Sequence[Call]) -> str:
    bodies = [_json({"arguments": arguments, "name": name}) for name, arguments in calls]
    return "\n".join(f"<tool_call>{body}</tool_call>" for body in bodies)


def hermes_one_tag(calls: Sequence[Call]) -> str:
    bodies = [_json({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "<tool_call>\n" + "\n".join(bodies) + "\n</tool_call>"


def llama3(calls: Sequence[Call]) -> str:
    return "; ".join(_json({"name": name, "parameters": arguments}) for name, arguments in calls)


def llama3_typed(calls: Sequence[Call]) -> str:
    bodies = [{"type": "function", "name": name, "parameters": arguments} for name, arguments in calls]
    return "<|python_tag|>" + "\n".join(map(_json, bodies))


def mistral(calls: Sequence[Call]) -> str:
    bodies = [{"name": name, "arguments": arguments, "id": "abcdefghi"} for name, arguments in calls]
    return "[TOOL_CALLS]" + _json(bodies)


def mistral_named(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(arguments)}" for name, arguments in calls)


def mistral_with_id(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]abc123def[ARGS]{_json(a)}" for name, a in calls)


def _bare(value: object) -> str:
    return value if isinstance(value, str) else _json(value)


def glm(calls: Sequence[Call]) -> str:
    parts = []
    for name, arguments in calls:
        pairs = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_bare(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        parts.append(f"<tool_call>{name}\n{pairs}</tool_call>")
    return "\n".join(parts)


def xml(calls: Sequence[Call]) -> str:
    parts = []
    for name, arguments in calls:
        pairs = "".join(f"<parameter={key}>\n{_bare(v)}\n</parameter>\n" for key, v in arguments.items())
        parts.append(f"<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>")
    return "\n".join(parts)


def json_list(calls: Sequence[Call]) -> str:
    return _json([{"name": name, "arguments": arguments} for name, arguments in calls])


def phi(calls: Sequence[Call]) -> str:
    return f"<|tool_call|>{json_list(calls)}<|/tool_call|>"


FORMS: dict[str, list[Callable[[Sequence[Call]], str]]] = {
    "hermes": [hermes, hermes_arguments_first, hermes_one_tag],
    "llama3": [llama3, llama3_typed],
    "mistral": [mistral, mistral_named, mistral_with_id],
    "glm": [glm],
    "xml": [xml],
    "json": [json_list, phi],
}
"""By the name of the format in hayai.text.tool_formats."""

TYPED = {glm, xml}
"""Forms whose strings have no quotes, so that only the schema tells "1" from 1."""

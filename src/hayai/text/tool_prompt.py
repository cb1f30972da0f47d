"""Tools for chat templates that know none, and what some templates want of the messages about them.

A template without a variable `tools` would drop definitions, calls and results without a word. Then they
become ordinary text in the form that Nous Research's Hermes models made common and that most models have
seen: the definitions go to the end of the system message, an assistant's calls into its content, and results
into user messages.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hayai.text.messages import normalize_messages
from hayai.text.tool_formats import format_of, knows_tools

Message = dict[str, Any]

_INSTRUCTIONS = """\
# Tools

You can call functions to answer the user. These are their signatures, one JSON object per line:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and its arguments between these tags:
<tool_call>
{{"name": <function name>, "arguments": <arguments as a JSON object>}}
</tool_call>

You then get the result between <tool_response> and </tool_response>."""


def definition(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI's API has it, which is what templates print."""
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    function["parameters"] = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def for_template(
    source: str, messages: object, tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], list[Mapping[str, Any]] | None, bool]:
    """(messages, tools, whether the tools are in the messages now), as the template `source` wants them.
    Errors as `normalize_messages`."""
    normal = normalize_messages(messages)
    if not knows_tools(source):
        return tools_as_text(normal, tools), None, bool(tools)
    if format_of(source).name == "mistral":
        normal = with_mistral_ids(normal)
    return normal, list(tools) or None, False


def tools_as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Normalised messages (messages.py) with all that concerns tools as plain text. tools: as OpenAI's API
    has them ({"type": "function", "function": ...}); none: only calls and results are rewritten."""
    result: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            _add_response(result, str(message["content"]))
        elif message.get("tool_calls"):
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            result.append({**kept, "content": _with_calls(str(message["content"]), message["tool_calls"])})
        else:
            result.append(dict(message))
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        _add_instructions(result, _INSTRUCTIONS.format(tools=lines))
    return result


def _add_instructions(messages: list[Message], text: str) -> None:
    if messages and messages[0]["role"] in ("system", "developer"):
        content = str(messages[0]["content"])
        messages[0]["content"] = f"{content}\n\n{text}" if content else text
    else:
        messages.insert(0, {"role": "system", "content": text})


def _add_response(messages: list[Message], content: str) -> None:
    text = f"<tool_response>\n{content}\n</tool_response>"
    if messages and messages[-1].get("role") == "user" and messages[-1].get("content", "").endswith(_END):
        messages[-1]["content"] += "\n" + text
    else:
        messages.append({"role": "user", "content": text})


_END = "</tool_response>"


def _with_calls(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    parts = [content] if content else []
    for call in calls:
        function = call.get("function", call)
        body = {"name": function.get("name"), "arguments": function.get("arguments", {})}
        parts.append(f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>")
    return "\n".join(parts)


# ---------------------------------------------------------------- ids

_LETTERS = string.ascii_letters + string.digits
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def mistral_id(call_id: str) -> str:
    """A call id as Mistral's templates demand it, nine letters and digits: itself where it is one, else made
    from it, so that call and result still have the same."""
    if _MISTRAL_ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest())
    letters = []
    for _ in range(9):
        number, digit = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[digit])
    return "".join(letters)


def with_mistral_ids(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages with every call id as Mistral's templates demand it."""
    result: list[Message] = []
    for message in messages:
        changed = dict(message)
        if isinstance(changed.get("tool_call_id"), str):
            changed["tool_call_id"] = mistral_id(changed["tool_call_id"])
        if changed.get("tool_calls"):
            changed["tool_calls"] = [
                {**call, "id": mistral_id(str(call.get("id", "")))} for call in changed["tool_calls"]
            ]
        result.append(changed)
    return result

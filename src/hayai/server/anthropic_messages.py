"""Anthropic's conversation, inwards: content blocks -> the messages that chat templates walk.

A turn of Anthropic's is a list of blocks, a template's message is one string with tool calls beside it. So a
user turn becomes its tool results (role `tool`) and its text, in their order; an assistant turn becomes one
message with text, `reasoning_content` and `tool_calls`. Turns of one role in a row are one turn, as the API
has it. What can't be read (images, documents, blocks of server tools) is refused with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hayai.config import LimitsConfig
from hayai.errors import RequestError
from hayai.server.fields import kind_of, refuse
from hayai.server.openai_messages import check_parts

_ROLES = ("user", "assistant", "system")

_TEXT_BLOCK = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
TEXT_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_BLOCK}]
}
"""JSON schema of `system`, and of what a tool gave back."""

_BLOCK_SCHEMAS = [
    _TEXT_BLOCK,
    {
        "type": "object",
        "properties": {
            "type": {"const": "tool_use"},
            "id": {"type": "string"},
            "name": {"type": "string"},
            "input": {"type": "object"},
        },
        "required": ["type", "id", "name", "input"],
    },
    {
        "type": "object",
        "properties": {
            "type": {"const": "tool_result"},
            "tool_use_id": {"type": "string"},
            "content": TEXT_SCHEMA,
            "is_error": {"type": "boolean"},
        },
        "required": ["type", "tool_use_id"],
    },
    {
        "type": "object",
        "properties": {
            "type": {"const": "thinking"},
            "thinking": {"type": "string"},
            "signature": {"type": "string"},
        },
        "required": ["type", "thinking"],
    },
]
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(_ROLES)},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {"anyOf": _BLOCK_SCHEMAS}},
                ]
            },
        },
        "required": ["role", "content"],
    },
}
"""JSON schema of `messages`; which block may stand in which turn is checked by the reader."""

_SHOWN = 40
"""Characters of a client's own text that an error repeats."""


@dataclass(frozen=True)
class Conversation:
    """messages: for the chat template. prefill: how the answer begins (a last turn of the assistant's), or
    None."""

    messages: tuple[dict[str, Any], ...]
    prefill: str | None = None


@dataclass
class _Builder:
    """What has been read so far; texts of a turn are lists of pieces until `join`."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tool_names: dict[str, str] = field(default_factory=dict)  # of every tool_use, by its id

    def add_text(self, role: str, text: str, joint: str) -> None:
        """Text of a turn, joined to the message before it where that is the same turn's."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == role:
            pieces = last["content"]
            if pieces:
                pieces += joint, text
            elif text:
                pieces.append(text)
        else:
            self.messages.append({"role": role, "content": [text] if text else []})

    def assistant(self) -> dict[str, Any]:
        """The assistant's message that is being written."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": []})
        return self.messages[-1]

    def join(self) -> None:
        """Make texts of the pieces, each of them once: text added to text would copy it for every block."""
        for message in self.messages:
            for name in ("content", "reasoning_content"):
                if isinstance(message.get(name), list):
                    message[name] = "".join(message[name])


def read_conversation(system: object, messages: object, limits: LimitsConfig) -> Conversation:
    """`system` and `messages` of a request. RequestError names the block (`messages[2].content[0]`)."""
    if not isinstance(messages, list) or not messages:
        refuse("messages", f"messages must be a list with at least one message: {kind_of(messages)}")
    if len(messages) > limits.max_messages:
        refuse("messages", f"at most {limits.max_messages} messages: {len(messages)}")
    check_parts([*messages, {"content": system}], limits.max_parts)
    builder = _Builder()
    if system is not None:
        _read_turn(builder, "system", system, "system")
    for i, message in enumerate(messages):
        _read_message(builder, message, f"messages[{i}]")
    builder.join()
    last = builder.messages[-1]
    if last["role"] != "assistant":
        return Conversation(tuple(builder.messages))
    where = f"messages[{len(messages) - 1}]"
    if "tool_calls" in last:
        refuse(where, f"{where}: a conversation can't end with a tool_use; send its tool_result")
    if "reasoning_content" in last:
        refuse(where, f"{where}: an answer can't be continued after a thinking block")
    if len(builder.messages) == 1:
        refuse(where, f"{where}: there is nothing to answer: no turn of the user's comes before it")
    return Conversation(tuple(builder.messages[:-1]), last["content"])


def _read_message(builder: _Builder, message: object, where: str) -> None:
    if not isinstance(message, dict):
        refuse(where, f"{where} must be an object: {kind_of(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        shown = repr(role[:_SHOWN]) if isinstance(role, str) else kind_of(role)
        refuse(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}: {shown}")
    unknown = next((name for name in message if name not in ("role", "content")), None)
    if unknown is not None:
        _unknown_field(where, unknown)
    _read_turn(builder, role, message.get("content"), f"{where}.content")


def _read_turn(builder: _Builder, role: str, content: object, where: str) -> None:
    """A turn's content: a string, or blocks of the types that `_BLOCKS` has for its role."""
    if isinstance(content, str):
        builder.add_text(role, content, _JOINTS[role])
        return
    if not isinstance(content, list) or not content:
        refuse(where, f"{where} must be a string or a list with at least one block: {kind_of(content)}")
    readers = _BLOCKS[role]
    for i, block in enumerate(content):
        place = f"{where}[{i}]"
        readers[_block_type(block, place, readers)](builder, role, block, place)


_REASONS = {
    "image": "images can't be read here",
    "document": "documents can't be read here; send their text in a text block",
    "search_result": "search results can't be read here; send their text in a text block",
    "tool_reference": "tools are not searched for here",
}
"""Why a block of the API is refused, where there is more to say than that it is."""


def _block_type(block: object, where: str, readers: Mapping[str, Any]) -> str:
    if not isinstance(block, dict):
        refuse(where, f"{where} must be an object: {kind_of(block)}")
    kind = block.get("type")
    if not isinstance(kind, str):
        refuse(f"{where}.type", f"{where}.type must be a string: {kind_of(kind)}")
    if kind not in readers:
        message = f"{where}.type: {kind[:_SHOWN]!r} is not supported; supported here: {', '.join(readers)}"
        reason = _REASONS.get(kind)
        raise RequestError(
            message + (f" ({reason})" if reason else ""), param=f"{where}.type", code="unsupported_content"
        )
    return kind


def _read_text(builder: _Builder, role: str, block: Mapping[str, Any], where: str) -> None:
    _check_block(block, where, ("text",), {"citations": (None, [])})
    builder.add_text(role, _string(block, "text", where), _JOINTS[role])


def _read_thinking(builder: _Builder, role: str, block: Mapping[str, Any], where: str) -> None:
    """Thinking of an earlier answer; its signature is not checked (templates show thinking to the model that
    wrote it, or leave it out)."""
    _check_block(block, where, ("thinking", "signature"), {})
    if block.get("signature") is not None:
        _string(block, "signature", where)
    text = _string(block, "thinking", where)
    message = builder.assistant()
    if text:
        message.setdefault("reasoning_content", []).append(text)


def _read_redacted(builder: _Builder, role: str, block: Mapping[str, Any], where: str) -> None:
    """Thinking that only its maker can read: there is nothing in it for another model."""
    _check_block(block, where, ("data",), {})
    _string(block, "data", where)
    builder.assistant()


def _read_tool_use(builder: _Builder, role: str, block: Mapping[str, Any], where: str) -> None:
    _check_block(block, where, ("id", "name", "input"), {"caller": (None, _DIRECT), "toolset_name": (None,)})
    call_id, name = _string(block, "id", where), _string(block, "name", where)
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        refuse(f"{where}.input", f"{where}.input must be an object: {kind_of(arguments)}")
    if call_id in builder.tool_names:
        refuse(f"{where}.id", f"{where}.id: two tool_use blocks have the id {call_id[:_SHOWN]!r}")
    builder.tool_names[call_id] = name
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    builder.assistant().setdefault("tool_calls", []).append(call)


def _read_tool_result(builder: _Builder, role: str, block: Mapping[str, Any], where: str) -> None:
    _check_block(block, where, ("tool_use_id", "content", "is_error"), {"toolset_name": (None,)})
    call_id = _string(block, "tool_use_id", where)
    name = builder.tool_names.get(call_id)
    if name is None:
        place = f"{where}.tool_use_id"
        refuse(place, f"{place}: no tool_use before it has the id {call_id[:_SHOWN]!r}")
    failed = block.get("is_error")
    if failed is not None and not isinstance(failed, bool):
        refuse(f"{where}.is_error", f"{where}.is_error must be true or false: {kind_of(failed)}")
    text = _result_text(block.get("content"), f"{where}.content")
    content = f"Error: {text}" if failed else text
    builder.messages.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": content})


def _result_text(content: object, where: str) -> str:
    """What a tool gave back: nothing, a string, or text blocks."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(where, f"{where} must be a string or a list of blocks: {kind_of(content)}")
    texts: list[str] = []
    for i, block in enumerate(content):
        place = f"{where}[{i}]"
        _block_type(block, place, {"text": None})
        _check_block(block, place, ("text",), {"citations": (None, [])})
        texts.append(_string(block, "text", place))
    return "\n".join(texts)


_DIRECT = {"type": "direct"}
"""Who calls a tool: the model itself, not a program that it wrote."""

_Reader = Callable[[_Builder, str, Mapping[str, Any], str], None]
_BLOCKS: Mapping[str, Mapping[str, _Reader]] = {
    "system": {"text": _read_text},
    "user": {"text": _read_text, "tool_result": _read_tool_result},
    "assistant": {
        "text": _read_text,
        "thinking": _read_thinking,
        "redacted_thinking": _read_redacted,
        "tool_use": _read_tool_use,
    },
}
_JOINTS = {"system": "\n", "user": "\n", "assistant": ""}
"""Between two texts of one turn: a user's blocks are separate things, an assistant's pieces of one answer."""


def _check_block(
    block: Mapping[str, Any], where: str, known: tuple[str, ...], harmless: Mapping[str, tuple[object, ...]]
) -> None:
    """Refuse fields of a block that are not ours. `harmless`: values of the others that ask for nothing."""
    for name, value in block.items():
        if name == "cache_control":
            check_cache_control(value, f"{where}.cache_control")
        elif name in harmless:
            if value not in harmless[name]:
                place = f"{where}.{name}"
                raise RequestError(f"{place} is not supported", param=place, code="unsupported_parameter")
        elif name != "type" and name not in known:
            _unknown_field(where, name)


def check_cache_control(value: object, where: str) -> None:
    """A cache breakpoint; accepted without effect, since every prompt's prefix is cached."""
    if value is not None and (not isinstance(value, dict) or value.get("type") != "ephemeral"):
        refuse(where, f"{where} must be {{'type': 'ephemeral'}}: {kind_of(value)}")


def _unknown_field(where: str, name: str) -> None:
    place = f"{where}.{name[:_SHOWN]}"
    raise RequestError(f"unknown field: {place}", param=place, code="unknown_parameter")


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        refuse(f"{where}.{name}", f"{where}.{name} must be a string: {kind_of(value)}")
    return value

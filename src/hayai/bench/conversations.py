"""Recorded agent conversations, as turns whose prompts grow: what a client sends before each of its answers.

A turn's prompt is the last turn's prompt, the recorded answer, and what came after it (a tool's output, the
user's next message). A small model's context does not hold a recording, so the new part of a turn is clipped
to a number of tokens, and a conversation ends where the context does. Tool results are given as user messages
and tool calls as JSON in the assistant's text, because not every template knows them; tool definitions are
left out.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = Mapping[str, str]
Encode = Callable[[Sequence[Message]], Sequence[int] | None]
"""Messages to token ids, by the model's chat template, ready for the assistant's answer; None: too long."""

FOLDER, FILE = "agentic_requests", "requests.jsonl"
ROLES = {"system": "system", "developer": "system", "assistant": "assistant"}


@dataclass(frozen=True)
class Recording:
    """One conversation as plain messages."""

    name: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Turn:
    """One request of a conversation. new_tokens: prompt tokens that the last turn's prompt did not have;
    clipped: whether its new messages were shortened."""

    number: int
    ids: tuple[int, ...]
    new_tokens: int
    clipped: bool


def read_recordings(path: Path, prefix: str = "agentic") -> list[Recording]:
    """The longest recording of every conversation whose name starts with `prefix`."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    longest: dict[str, Recording] = {}
    for line in text.splitlines():
        entry = json.loads(line)
        name = entry["name"]
        if not name.startswith(prefix):
            continue
        messages = tuple(plain(message) for message in entry["request"]["messages"])
        session = name.rpartition("_")[0]
        if session not in longest or len(messages) > len(longest[session].messages):
            longest[session] = Recording(name, messages)
    return list(longest.values())


def plain(message: Mapping[str, Any]) -> Message:
    """A recorded message with a role that every template knows, and all it says in its content."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    if calls:
        content = "\n".join(filter(None, [content, json.dumps(calls)]))
    return {"role": ROLES.get(message["role"], "user"), "content": content}


def turns(
    recording: Recording, encode: Encode, *, mark: str, context: int, new_tokens: int, first_tokens: int
) -> list[Turn]:
    """The turns of a conversation, as many as the context holds.

    mark: a text that starts the conversation, so that no two replays share a prefix. new_tokens: the most
    that a turn may add; first_tokens: the most that the first one may have.
    """
    found: list[Turn] = []
    history: list[Message] = []
    new: list[Message] = []
    before: Sequence[int] = ()
    for message in recording.messages:
        if message["role"] == "assistant" and (found or new):
            limit = new_tokens if found else first_tokens
            fitted, ids = fit(history, new, encode, len(before) + limit)
            if ids is None or len(ids) > context:
                break
            added = len(ids) - common_prefix(before, ids)
            found.append(Turn(len(found), tuple(ids), added, fitted != new))
            history, new, before = history + fitted, [], ids
        if not history and not new:
            message = {**message, "content": f"{mark}\n{message['content']}"}
        new.append(message)
    return found


def fit(
    history: Sequence[Message], new: Sequence[Message], encode: Encode, most: int
) -> tuple[list[Message], Sequence[int] | None]:
    """The new messages, the longest ones cut at the end until all has at most `most` tokens; ids None where
    even a few characters each are too many."""
    fitted = list(new)
    ids = encode([*history, *fitted])
    size = max((len(m["content"]) for m in fitted), default=0)
    while ids is None or len(ids) > most:
        size = size * 7 // 8
        if size < 8:
            return [], None
        fitted = [{**m, "content": m["content"][:size]} for m in new]
        ids = encode([*history, *fitted])
    return fitted, ids


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids two prompts share."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count

"""Recorded conversations as turns: prompts that grow, clipped and bounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from hayai.bench.conversations import (
    FILE,
    FOLDER,
    Message,
    Recording,
    common_prefix,
    fit,
    plain,
    read_recordings,
    turns,
)
from hayai.config import read_environment


def encode(messages: Sequence[Message]) -> list[int] | None:
    """One id per character and two around each message; nothing above 2,000."""
    ids = [i for m in messages for i in (1, *(ord(c) for c in m["content"]), 2)]
    return [*ids, 3] if len(ids) < 2000 else None


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


TALK = Recording(
    "talk",
    (
        say("system", "s" * 40),
        say("user", "hello"),
        say("assistant", "a" * 10),
        say("user", "b" * 20),
        say("assistant", "c" * 5),
        say("user", "d" * 500),
        say("assistant", "e"),
    ),
)


def test_every_answer_makes_a_turn_whose_prompt_goes_on_from_the_last() -> None:
    found = turns(TALK, encode, mark="#1", context=1000, new_tokens=600, first_tokens=200)
    assert [t.number for t in found] == [0, 1, 2]
    first, second, third = found
    # mark and line feed, system, user, and a frame of two each, and the opening of the answer
    assert len(first.ids) == 3 + 40 + 2 + 5 + 2 + 1
    assert common_prefix(first.ids, second.ids) == len(first.ids) - 1
    assert second.new_tokens == 1 + (10 + 2) + (20 + 2)
    assert len(third.ids) - len(second.ids) == 5 + 2 + 500 + 2
    assert not any(t.clipped for t in found)


def test_new_messages_are_clipped_to_the_limit() -> None:
    found = turns(TALK, encode, mark="#1", context=1000, new_tokens=100, first_tokens=200)
    assert [t.clipped for t in found] == [False, False, True]
    assert found[2].new_tokens <= 101 and len(found[2].ids) <= len(found[1].ids) + 100


def test_a_conversation_ends_where_the_context_does() -> None:
    assert len(turns(TALK, encode, mark="#1", context=300, new_tokens=600, first_tokens=200)) == 2
    assert turns(TALK, encode, mark="#1", context=30, new_tokens=600, first_tokens=200) == []


def test_replays_differ_from_their_first_line_on() -> None:
    one, two = (
        turns(TALK, encode, mark=m, context=1000, new_tokens=600, first_tokens=200)[0].ids for m in "12"
    )
    assert common_prefix(one, two) == 1


def test_what_does_not_fit_at_all_is_no_turn() -> None:
    assert fit([say("user", "x" * 100)], [say("user", "y")], encode, 50) == ([], None)
    messages, ids = fit([], [say("user", "z" * 5000)], encode, 100)
    assert ids is not None and len(ids) <= 100 and 50 <= len(messages[0]["content"]) < 100


def test_tools_become_plain_messages() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    found = plain({"role": "assistant", "content": "", "tool_calls": [call]})
    assert found["role"] == "assistant" and json.loads(found["content"]) == [call["function"]]
    assert plain({"role": "tool", "content": "42", "tool_call_id": "1"}) == say("user", "42")
    assert plain(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ) == (say("user", "ab"))


def test_the_longest_recording_of_a_session_is_taken(tmp_path: Path) -> None:
    lines = [
        {"name": f"agentic_x_{n:02}", "request": {"messages": [say("user", "m")] * n}} for n in (1, 5, 3)
    ] + [{"name": "trivial", "request": {"messages": [say("user", "m")]}}]
    path = tmp_path / FILE
    path.write_text("\n".join(map(json.dumps, lines)))
    (found,) = read_recordings(path)
    assert (found.name, len(found.messages)) == ("agentic_x_05", 5)


def test_the_recorded_conversations_have_many_turns() -> None:
    data = read_environment().data
    if data is None or not (data / FOLDER).is_dir():
        pytest.skip("the recorded conversations are not here (HAYAI_DATA)")
    found = read_recordings(data / FOLDER / f"{FILE}.gz")
    assert len(found) == 2
    for recording in found:
        assert sum(1 for m in recording.messages if m["role"] == "assistant") >= 15

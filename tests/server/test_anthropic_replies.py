"""Anthropic's answers, written: every kind of block, streamed and whole, read back by the official client."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import anthropic
import httpx2
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayai.engine.request import RequestTiming, SamplingParams
from hayai.frontend import Prompt, TextChunk, Usage
from hayai.frontend_request import ToolCallDelta
from hayai.server.anthropic_replies import AnswerForm, AnthropicReply, tool_input
from hayai.server.errors import ApiError
from hayai.server.job import Job
from hayai.server.reply import Choice, ReplyHead

USAGE = Usage(prompt_tokens=9, completion_tokens=4, cached_tokens=5)
HEAD = ReplyHead("msg_1", "claude-x", 0, "hayai", lambda _: b"", (tuple(range(9)),))
FORM = AnswerForm(max_tokens=4)


def reply(form: AnswerForm = FORM) -> AnthropicReply:
    prompts = (Prompt(text="x"),)
    job = Job("anthropic", None, prompts, SamplingParams(), extra={"form": form})
    return AnthropicReply(job, HEAD)


def end(reason: str = "stop", stop: str | None = None) -> TextChunk:
    return TextChunk("", finish_reason=reason, usage=USAGE, timing=RequestTiming(0.0), stop=stop)


def streamed(chunks: list[TextChunk], form: AnswerForm = FORM) -> bytes:
    writer = reply(form)
    body = b"".join(writer.event(0, chunk) for chunk in chunks)
    choice = Choice(0)
    choice.end(chunks[-1])
    return writer.opening() + body + writer.closing([choice])


def whole(chunks: list[TextChunk], form: AnswerForm = FORM) -> dict[str, Any]:
    choice = Choice(0)
    for chunk in chunks:
        choice.add(chunk)
    body: dict[str, Any] = orjson.loads(reply(form).whole([choice]))
    return body


def as_the_client_reads(stream: bytes) -> Any:
    """The message that Anthropic's own client puts together from these bytes."""

    def answer(request: Any) -> Any:
        return httpx2.Response(200, content=stream, headers={"content-type": "text/event-stream"})

    transport = httpx2.MockTransport(answer)
    with (
        httpx2.Client(transport=transport) as http,
        anthropic.Anthropic(api_key="x", http_client=http) as client,
        client.messages.stream(model="m", max_tokens=1, messages=[]) as events,
    ):
        return events.get_final_message()


def plain(block: Any) -> dict[str, Any]:
    kept = ("type", "text", "thinking", "signature", "id", "name", "input")
    return {name: value for name, value in block.items() if name in kept}


CALL = [
    TextChunk("", (5,), tool_calls=(ToolCallDelta(0, "", "call_a", "get_weather"),)),
    TextChunk("", (6,), tool_calls=(ToolCallDelta(0, '{"city": "Na'),)),
    TextChunk("", (7,), tool_calls=(ToolCallDelta(0, 'ra"}'), ToolCallDelta(1, "{}", "call_b", "now"))),
]
ANSWER = [
    TextChunk("", (1,), reasoning="Let me"),
    TextChunk("", (2,), reasoning=" see."),
    TextChunk("I ", (3,)),
    TextChunk("look.", (4,)),
    *CALL,
    end("tool_calls"),
]
SIGNATURE = hashlib.sha256(b"Let me see.").hexdigest()
BLOCKS = [
    {"type": "thinking", "thinking": "Let me see.", "signature": SIGNATURE},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "toolu_a", "name": "get_weather", "input": {"city": "Nara"}},
    {"type": "tool_use", "id": "toolu_b", "name": "now", "input": {}},
]


def test_every_kind_of_block_streamed_and_whole() -> None:
    message = as_the_client_reads(streamed(ANSWER))
    assert [plain(block.model_dump()) for block in message.content] == BLOCKS
    assert message.stop_reason == "tool_use" and message.model == "claude-x" and message.id == "msg_1"
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 5, 4)
    assert usage.output_tokens_details.thinking_tokens == 2
    body = whole(ANSWER)
    assert [plain(block) for block in body["content"]] == BLOCKS
    assert body["stop_reason"] == "tool_use" and body["usage"] == usage.model_dump(exclude_none=True)


def test_events_of_a_block_are_nested() -> None:
    """Blocks are numbered, opened, filled and closed one after the other."""
    events = [json.loads(part.split("data: ")[1]) for part in streamed(ANSWER).decode().split("\n\n")[:-1]]
    open_block = None
    seen = []
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == len(seen)
            open_block = event["index"]
            seen.append(event["content_block"]["type"])
        elif event["type"] in ("content_block_delta", "content_block_stop"):
            assert event["index"] == open_block
            open_block = None if event["type"] == "content_block_stop" else open_block
        else:
            assert open_block is None
    assert seen == ["thinking", "text", "tool_use", "tool_use"]


def test_thinking_that_is_not_shown_is_signed() -> None:
    form = AnswerForm(max_tokens=4, show_thinking=False)
    hidden = {"type": "thinking", "thinking": "", "signature": SIGNATURE}
    message = as_the_client_reads(streamed(ANSWER, form))
    assert [plain(b.model_dump()) for b in message.content] == [hidden, *BLOCKS[1:]]
    assert [plain(b) for b in whole(ANSWER, form)["content"]] == [hidden, *BLOCKS[1:]]


@pytest.mark.parametrize(
    ("last", "max_tokens", "expected"),
    [
        (end("stop"), 9, ("end_turn", None)),
        (end("stop", stop="END"), 9, ("stop_sequence", "END")),
        (end("length"), 4, ("max_tokens", None)),
        (end("length"), 9, ("model_context_window_exceeded", None)),
        (end("length"), 0, ("max_tokens", None)),
        (end("tool_calls"), 9, ("tool_use", None)),
    ],
)
def test_stop_reasons(last: TextChunk, max_tokens: int, expected: tuple[str, str | None]) -> None:
    form = AnswerForm(max_tokens=max_tokens)
    body = whole([TextChunk("x", (1,)), last], form)
    assert (body["stop_reason"], body["stop_sequence"]) == expected
    message = as_the_client_reads(streamed([TextChunk("x", (1,)), last], form))
    assert (message.stop_reason, message.stop_sequence) == expected


def test_an_empty_answer_has_no_blocks() -> None:
    assert whole([end()])["content"] == []
    assert as_the_client_reads(streamed([end()])).content == []


def test_a_stream_that_fails_says_so() -> None:
    error = ApiError(503, "gone", code="shutting_down")
    writer = reply()
    stream = writer.opening() + writer.event(0, TextChunk("x", (1,))) + writer.error(error)
    with pytest.raises(anthropic.APIStatusError, match="gone") as caught:
        as_the_client_reads(stream)
    body: Any = caught.value.body
    assert body["error"]["type"] == "overloaded_error" and body["request_id"] == "msg_1"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('{"a": {"b": "c', {"a": {"b": "c"}}),
        ('{"a": 1, "b', {"a": 1}),
        ("", {}),
        ("[1]", {}),
        ("nonsense", {}),
        ('{"a": 1} and more', {"a": 1}),
    ],
)
def test_arguments_that_were_cut(arguments: str, expected: dict[str, Any]) -> None:
    assert tool_input(arguments) == expected


PIECES = st.one_of(
    st.builds(lambda text: TextChunk(text, (1,)), st.text(max_size=5)),
    st.builds(lambda text: TextChunk("", (1,), reasoning=text), st.text(min_size=1, max_size=5)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_a_stream_holds_what_the_whole_holds(chunks: list[TextChunk]) -> None:
    """Text and thinking, in any order and cut anywhere, arrive complete."""
    message = as_the_client_reads(streamed([*chunks, end()]))
    texts = {"text": "", "thinking": ""}
    for block in message.content:
        texts[block.type] += getattr(block, block.type)
    assert texts["text"] == "".join(c.text for c in chunks)
    assert texts["thinking"] == "".join(c.reasoning for c in chunks)
    body = whole([*chunks, end()])
    assert {b["type"]: b[b["type"]] for b in body["content"]} == {k: v for k, v in texts.items() if v}

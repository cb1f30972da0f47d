"""Chunks that a plain model never makes (reasoning, text, calls at once) as bodies and events."""

from __future__ import annotations

import json
from typing import Any

import pytest

import openai_spec
from hayai.engine.request import Logprob, RequestTiming, SamplingParams
from hayai.frontend import Prompt, TextChunk, Usage
from hayai.frontend_request import ToolCallDelta
from hayai.server.errors import ApiError
from hayai.server.job import Job
from hayai.server.replies import REPLIES
from hayai.server.reply import Choice, Reply, ReplyHead
from hayai.server.responses_replies import Form

TIMING = RequestTiming(1.0, 1.5, 2.0, 4.0, 7, 3, 6, num_steps=6, sum_batch=15, max_batch=4, num_preemptions=1)
CHUNKS = [
    TextChunk("", (1,), reasoning="Let me "),
    TextChunk("", (2,), reasoning="think."),
    TextChunk("Sure", (3,)),
    TextChunk("", (4,)),
    TextChunk(", calling.", (5,), tool_calls=(ToolCallDelta(0, "", "call_a", "f"),)),
    TextChunk("", (6,), tool_calls=(ToolCallDelta(0, '{"x":'), ToolCallDelta(0, "1}"))),
    TextChunk("", (7,), tool_calls=(ToolCallDelta(1, "{}", "call_b", "g"),)),
    TextChunk("", (), (), "tool_calls", Usage(7, 7, 3), TIMING),
]
REQUEST = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "previous_response_id": None, "store": False, "temperature": 1.0, "tool_choice": "auto", "tools": [],
    "top_p": 1.0, "text": {"format": {"type": "text"}},
}  # fmt: skip


def make(dialect: str, stream: bool, **more: Any) -> Reply:
    form = Form(request=REQUEST, items=())
    prompt = Prompt(messages=({"role": "user", "content": "hi"},))
    job = Job(dialect, None, (prompt,), SamplingParams(), stream=stream, extra={"form": form}, **more)
    machine = {"precision": "q8_0", "isa": "avx2"}
    head = ReplyHead(
        REPLIES[dialect].id_prefix + "1", "m", 1, "f", lambda t: b"t%d" % t, ((0,) * 7,), machine
    )
    return REPLIES[dialect](job, head)


async def streamed(reply: Reply) -> list[dict[str, Any]]:
    text = b"".join(reply.event(0, chunk) for chunk in CHUNKS)
    choice = Choice(0)
    choice.end(CHUNKS[-1])
    await reply.keep([choice])
    text = reply.opening() + text + reply.closing([choice])
    return [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: {")]


async def whole(reply: Reply) -> dict[str, Any]:
    choice = Choice(0)
    for chunk in CHUNKS:
        choice.add(chunk)
    await reply.keep([choice])
    return json.loads(reply.whole([choice]))


async def test_chat_with_reasoning_and_calls() -> None:
    body = await whole(make("chat", False, timings=True))
    (choice,) = body["choices"]
    message = choice["message"]
    assert message["reasoning_content"] == "Let me think." and message["content"] == "Sure, calling."
    assert [(c["id"], c["function"]) for c in message["tool_calls"]] == [
        ("call_a", {"name": "f", "arguments": '{"x":1}'}),
        ("call_b", {"name": "g", "arguments": "{}"}),
    ]
    assert choice["finish_reason"] == "tool_calls"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    openai_spec.check_if_there("CreateChatCompletionResponse", body)


async def test_chat_streams_the_same() -> None:
    events = await streamed(make("chat", True, include_usage=True))
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "Let me think."
    assert "".join(d.get("content", "") for d in deltas) == "Sure, calling."
    calls = [call for d in deltas for call in d.get("tool_calls", ())]
    assert calls[0] == {
        "index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": ""},
    }  # fmt: skip
    assert [c["function"]["arguments"] for c in calls] == ["", '{"x":', "1}", "{}"]
    assert [c["index"] for c in calls] == [0, 0, 0, 1] and "id" not in calls[1]
    assert events[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    for event in events:
        openai_spec.check_if_there("CreateChatCompletionStreamResponse", event)


async def test_log_probabilities_go_with_the_first_delta_of_their_chunk() -> None:
    probs = (Logprob(5, -0.5, ((5, -0.5), (6, -1.5))),)
    reply = make("chat", True)
    mixed = TextChunk("a", (5,), probs, reasoning="b", tool_calls=(ToolCallDelta(0, "", "call_a", "f"),))
    lines = [json.loads(line[6:]) for line in reply.event(0, mixed).split(b"\n") if line]
    assert [bool(line["choices"][0]["logprobs"]) for line in lines] == [True, False, False]
    alone = json.loads(reply.event(0, TextChunk("", (5,), probs))[6:])["choices"][0]
    assert alone["delta"] == {"content": ""} and len(alone["logprobs"]["content"]) == 1


async def test_responses_with_reasoning_and_calls() -> None:
    body = await whole(make("responses", False))
    kinds = [item["type"] for item in body["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "Let me think."}]
    assert [(i["call_id"], i["name"], i["arguments"]) for i in body["output"][2:]] == [
        ("call_a", "f", '{"x":1}'),
        ("call_b", "g", "{}"),
    ]
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    openai_spec.check_if_there("Response", body)


async def test_responses_stream_the_same_and_every_item_is_opened_and_closed() -> None:
    events = await streamed(make("responses", True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    expected = await whole(make("responses", False))

    def shown(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in item.items() if k != "id"} for item in items]

    assert shown(final["output"]) == shown(expected["output"])
    closed = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    opened = [e["item"] for e in events if e["type"] == "response.output_item.added"]
    assert closed == final["output"] and [i["id"] for i in opened] == [i["id"] for i in closed]
    assert all(item["status"] == "in_progress" for item in opened)
    for index, item in enumerate(closed):
        mine = [e for e in events if e.get("output_index") == index]
        kinds = [e["type"].removeprefix("response.") for e in mine]
        name = {"reasoning": "reasoning_text", "message": "output_text"}.get(item["type"])
        name = name or "function_call_arguments"
        part = ["content_part.added"] if item["type"] != "function_call" else []
        end = ["content_part.done"] if part else []
        deltas = [k for k in kinds if k == f"{name}.delta"]
        assert kinds == [
            "output_item.added", *part, *deltas, f"{name}.done", *end, "output_item.done"
        ]  # fmt: skip
    for event in events:
        if openai_spec.path() is not None:
            openai_spec.check(openai_spec.event_name(event), event)


async def test_a_stream_that_fails_ends_with_a_failed_response() -> None:
    reply = make("responses", True)
    reply.opening(), reply.event(0, CHUNKS[2])
    line = next(line for line in reply.error(ApiError(503, "down")).split(b"\n") if line.startswith(b"data"))
    event = json.loads(line[6:])
    assert event["type"] == "response.failed" and event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "down"}
    openai_spec.check_if_there("ResponseFailedEvent", event)


@pytest.mark.parametrize("dialect", ["chat", "responses"])
async def test_timings_say_what_the_request_ran_in(dialect: str) -> None:
    body = await whole(make(dialect, False, timings=True))
    assert body["timings"] == [
        {
            "queue_ms": 500.0, "prefill_ms": 500.0, "decode_ms": 2000.0, "prompt_tokens": 7,
            "cached_tokens": 3, "output_tokens": 6, "steps": 6, "batch_mean": 2.5, "batch_max": 4,
            "preemptions": 1, "precision": "q8_0", "isa": "avx2",
        }
    ]  # fmt: skip

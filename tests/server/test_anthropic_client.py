"""The server as Anthropic's own client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic

from hayai.config import ServerConfig
from server_process import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "Say something."}]
# The client's newest versions have no argument for temperature, top_p and top_k; the API still takes them.
GREEDY: dict[str, Any] = {"model": "default", "max_tokens": 12, "extra_body": {"temperature": 0}}
GREEDY_BODY: dict[str, Any] = {"model": "default", "max_tokens": 12, "temperature": 0}
TOOLS: Any = [
    {
        "name": "get_weather",
        "description": "The weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message(claude: Anthropic) -> None:
    reply = claude.messages.create(messages=MESSAGES, system="Be brief.", **GREEDY)
    assert reply.type == "message" and reply.role == "assistant" and reply.model == "tiny-chat"
    assert reply.id.startswith("msg_") and reply._request_id == reply.id
    (block,) = reply.content
    assert block.type == "text" and block.text
    assert (reply.stop_reason, reply.stop_sequence) == ("max_tokens", None)
    usage = reply.usage
    assert usage.output_tokens == 12
    counted = claude.messages.count_tokens(model="default", messages=MESSAGES, system="Be brief.")
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens


def test_a_stream_is_the_same_message(claude: Anthropic) -> None:
    whole = claude.messages.create(messages=MESSAGES, **GREEDY)
    with claude.messages.create(messages=MESSAGES, stream=True, **GREEDY) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"} and len(kinds[2:-3]) > 1
    start, opened, *deltas = events[:-3]
    assert start.message.usage.input_tokens > 0 and start.message.content == []
    assert start.message.stop_reason is None and opened.content_block.text == ""
    assert "".join(d.delta.text for d in deltas) == text_of(whole)
    end = events[-2]
    assert end.delta.stop_reason == "max_tokens" and end.usage.output_tokens == 12
    total = end.usage.input_tokens + end.usage.cache_read_input_tokens
    assert total == start.message.usage.input_tokens


def test_the_stream_helper(claude: Anthropic) -> None:
    whole = claude.messages.create(messages=MESSAGES, **GREEDY)
    with claude.messages.stream(messages=MESSAGES, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(whole) == stream.get_final_text()
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == 12
    assert [block.type for block in final.content] == ["text"]


def test_events_on_the_wire(http: httpx.Client) -> None:
    """Each event has a name and the same type inside, and a ping follows the start."""
    body = {"messages": MESSAGES, "stream": True, **GREEDY_BODY}
    reply = http.post("/v1/messages", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    events = [part.split("\n") for part in reply.text.removesuffix("\n\n").split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    for name, data in events:
        assert data.startswith(f'data: {{"type":"{name.removeprefix("event: ")}"')


def test_stop_sequences(claude: Anthropic) -> None:
    text = text_of(claude.messages.create(messages=MESSAGES, **GREEDY))
    stop = text[len(text) // 2 :][:3]
    reply = claude.messages.create(messages=MESSAGES, stop_sequences=["\0never", stop], **GREEDY)
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    assert text_of(reply) == text[: text.index(stop)] and reply.usage.output_tokens < 12
    with claude.messages.stream(messages=MESSAGES, stop_sequences=[stop], **GREEDY) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    assert text_of(final) == text_of(reply)


def test_async_client_many_at_once(claude: Anthropic, server: ServerProcess) -> None:
    """Streams that run together give what each gives alone."""
    words = ["red", "green", "blue", "a longer prompt about nothing at all"]
    prompts: list[Any] = [[{"role": "user", "content": word}] for word in words]
    alone = [text_of(claude.messages.create(messages=p, **GREEDY)) for p in prompts]

    async def one(api: AsyncAnthropic, prompt: Any) -> str:
        async with api.messages.stream(messages=prompt, **GREEDY) as stream:
            return "".join([text async for text in stream.text_stream])

    async def all_of_them() -> list[str]:
        async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(one(api, p) for p in prompts))

    assert asyncio.run(all_of_them()) == alone


def test_a_conversation_of_the_clients_own_objects(claude: Anthropic) -> None:
    reply = claude.messages.create(messages=MESSAGES, **GREEDY)
    history = [*MESSAGES, {"role": "assistant", "content": reply.content}, *MESSAGES]
    again = claude.messages.create(messages=history, **GREEDY)
    before = reply.usage.input_tokens + reply.usage.cache_read_input_tokens
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens > before + 12


def test_tools_go_into_the_prompt_and_results_come_back(claude: Anthropic) -> None:
    plain = claude.messages.count_tokens(model="default", messages=MESSAGES).input_tokens
    with_tools = claude.messages.count_tokens(model="default", messages=MESSAGES, tools=TOOLS).input_tokens
    assert with_tools > plain
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Nara"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    reply = claude.messages.create(messages=history, tools=TOOLS, tool_choice={"type": "none"}, **GREEDY)
    assert reply.usage.output_tokens == 12


def test_an_answer_that_the_client_begins(claude: Anthropic) -> None:
    """The beginning is part of the prompt, token for token, and is not repeated."""
    begun: Any = [*MESSAGES, {"role": "assistant", "content": "The word is"}]
    plain = claude.messages.count_tokens(model="default", messages=MESSAGES).input_tokens
    counted = claude.messages.count_tokens(model="default", messages=begun).input_tokens
    assert plain < counted <= plain + 6
    reply = claude.messages.create(messages=begun, **GREEDY)
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens == counted
    assert not text_of(reply).startswith("The word is")


def test_no_tokens_only_fills_the_cache(claude: Anthropic) -> None:
    reply = claude.messages.create(messages=MESSAGES, model="default", max_tokens=0)
    assert reply.content == [] and reply.usage.output_tokens == 0 and reply.stop_reason == "max_tokens"


def test_a_full_context_says_so(claude: Anthropic) -> None:
    reply = claude.messages.create(messages=MESSAGES, **{**GREEDY, "max_tokens": 4096})
    assert reply.stop_reason in ("model_context_window_exceeded", "end_turn")
    assert reply.usage.output_tokens < 512


def test_extensions(claude: Anthropic) -> None:
    extra = {"timings": True, "seed": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}
    extra |= {"temperature": 1, "top_k": 9, "top_p": 0.9}
    reply = claude.messages.create(messages=MESSAGES, extra_body=extra, model="default", max_tokens=12)
    timing = (reply.model_extra or {})["timings"]
    assert timing["output_tokens"] == 12 and timing["decode_ms"] > 0
    again = claude.messages.create(messages=MESSAGES, extra_body=extra, model="default", max_tokens=12)
    assert again.content == reply.content


def test_what_has_no_effect_is_told(claude: Anthropic) -> None:
    raw = claude.messages.with_raw_response.create(
        messages=MESSAGES,
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body={"speed": "fast"},
        model="default",
        max_tokens=12,
    )
    warnings = raw.headers.get_list("x-hayai-warning")
    assert [w.partition(":")[0] for w in warnings] == ["metadata", "speed", "thinking.budget_tokens"]


def test_beta_client(claude: Anthropic) -> None:
    reply = claude.beta.messages.create(messages=MESSAGES, betas=["prompt-caching-2024-07-31"], **GREEDY)
    assert reply.content == claude.beta.messages.create(messages=MESSAGES, **GREEDY).content


def test_models(claude: Anthropic, http: httpx.Client) -> None:
    (model,) = claude.models.list().data
    assert (model.id, model.type, model.max_input_tokens) == ("tiny-chat", "model", 512)
    assert claude.models.retrieve("default").id == "tiny-chat"
    with pytest.raises(anthropic.NotFoundError, match="served here: tiny-chat"):
        claude.models.retrieve("claude-9")
    for limit in ("0", "1001", "00000000199999", "9" * 5000):
        with pytest.raises(anthropic.BadRequestError, match="limit must be"):
            claude.models.list(extra_query={"limit": limit})
    with pytest.raises(anthropic.BadRequestError, match="no such model"):
        claude.models.list(after_id="x")
    assert http.get("/v1/models").json()["object"] == "list"


def test_errors_are_the_clients_own(claude: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(
            messages=MESSAGES, model="default", max_tokens=1, extra_body={"temperature": 1.5}
        )
    error: Any = caught.value
    assert error.body["type"] == "error" and error.body["error"]["type"] == "invalid_request_error"
    assert error.body["error"]["param"] == "temperature"
    assert error.request_id == error.body["request_id"] and error.request_id.startswith("req_")
    with pytest.raises(anthropic.NotFoundError, match="served here: tiny-chat") as missing:
        claude.messages.create(messages=MESSAGES, model="claude-9", max_tokens=1)
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="context of 512"):
        claude.messages.create(messages=[{"role": "user", "content": "word " * 600}], **GREEDY)
    with pytest.raises(anthropic.NotFoundError, match="no such route"):
        claude.messages.batches.list()
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].type"):
        claude.messages.create(messages=[{"role": "user", "content": [image]}], **GREEDY)


def test_bodies_that_are_none(http: httpx.Client) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        headers = {"content-type": "application/json"}
        assert http.post(path, content=b"{", headers=headers).json()["error"]["code"] == "invalid_json"
        assert http.post(path, content=b"{}", headers=headers).json()["error"]["param"] == "messages"
        wrong = http.post(path, content=b"{}", headers={"content-type": "text/plain"})
        assert wrong.status_code == 415 and wrong.json()["type"] == "error"
        assert http.get(path).json()["error"]["type"] == "invalid_request_error"
    size = ServerConfig.max_body_bytes + 1

    def endless() -> Iterator[bytes]:
        for _ in range(size // (1 << 20) + 1):
            yield b" " * (1 << 20)

    large = http.post("/v1/messages", content=endless(), headers={"content-type": "application/json"})
    assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"

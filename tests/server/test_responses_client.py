"""The Responses API through OpenAI's own client, against a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from server_process import ServerProcess

GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}
TOOLS: Any = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}]


def test_a_response_and_its_stream_are_the_same(client: OpenAI) -> None:
    whole = client.responses.create(input="Say something.", **GREEDY)
    assert whole.object == "response" and whole.id.startswith("resp_") and whole.model == "tiny-chat"
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    (item,) = whole.output
    assert item.type == "message" and item.role == "assistant" and item.id.startswith("msg_")
    assert whole.output_text and whole.usage.output_tokens == 12
    events = list(client.responses.create(input="Say something.", stream=True, **GREEDY))
    kinds = [event.type for event in events]
    assert [k for k in kinds if k != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens


def test_the_clients_stream_helper(client: OpenAI) -> None:
    asked = GREEDY | {"max_output_tokens": 60}  # it knows only answers that end by themselves
    with client.responses.stream(input="?", text={"format": FORMAT}, **asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text


def test_a_conversation_goes_on_from_an_id(client: OpenAI) -> None:
    """Whatever way the history is given, the model sees the same."""
    first = client.responses.create(input="One.", instructions="Be brief.", **GREEDY)
    second = client.responses.create(input="Two.", previous_response_id=first.id, **GREEDY)
    third = client.responses.create(input="Three.", previous_response_id=second.id, **GREEDY)
    history: Any = [{"role": "user", "content": "One."}, *first.output]
    history += [{"role": "user", "content": "Two."}, *second.output, {"role": "user", "content": "Three."}]
    spelled = client.responses.create(input=history, store=False, **GREEDY)
    assert third.output_text == spelled.output_text
    assert third.usage.input_tokens == spelled.usage.input_tokens
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))  # the client pages
    assert [item.type for item in items] == ["message"] * 5
    assert [item.content[0].text for item in items[::2]] == ["One.", "Two.", "Three."]
    for limit in ("%C2%B2", "0", "999999"):  # a superscript two is a digit, and no number
        with pytest.raises(openai.BadRequestError, match="limit must be"):
            client.get(f"/responses/{third.id}/input_items?limit={limit}", cast_to=object)
    newest = client.responses.input_items.list(third.id, limit=1)
    assert newest.data[0].content[0].text == "Three." and newest.has_more


def test_stored_responses_are_fetched_and_forgotten(client: OpenAI) -> None:
    kept = client.responses.create(input="Hello.", metadata={"topic": "demo"}, **GREEDY)
    again = client.responses.retrieve(kept.id)
    assert again == kept and again.metadata == {"topic": "demo"}
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(kept.id)
    client.responses.delete(kept.id)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(kept.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input="And?", previous_response_id=kept.id, **GREEDY)
    assert caught.value.param == "previous_response_id"
    unkept = client.responses.create(input="Hello.", store=False, **GREEDY)
    assert unkept.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_a_stream_is_stored_before_its_last_event(client: OpenAI) -> None:
    last = None
    for event in client.responses.create(input="Hello.", stream=True, **GREEDY):
        last = event
    assert client.responses.retrieve(last.response.id).output_text == last.response.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_answered(client: OpenAI, stream: bool) -> None:
    asked: Any = {"input": "Weather?", "tools": TOOLS, "parallel_tool_calls": False}
    asked |= {"model": "default", "temperature": 0, "max_output_tokens": 60, "tool_choice": "required"}
    if stream:
        events = list(client.responses.create(stream=True, **asked))
        reply = events[-1].response
        done = next(e for e in events if e.type == "response.function_call_arguments.done")
        deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == done.arguments and len(deltas) > 2 and done.name == "get_weather"
    else:
        reply = client.responses.create(**asked)
    (call,) = reply.output
    assert reply.status == "completed" and call.type == "function_call" and call.status == "completed"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    answer: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}]
    after = client.responses.create(input=answer, previous_response_id=reply.id, **GREEDY)
    assert after.output_text and after.usage.input_tokens > reply.usage.input_tokens - 100


class City(BaseModel):
    city: Literal["Paris", "Rome"]


def test_the_clients_parse_gets_its_model(client: OpenAI) -> None:
    asked = GREEDY | {"max_output_tokens": 60}
    reply = client.responses.parse(input="?", text_format=City, **asked)
    assert reply.output_parsed.city in ("Paris", "Rome") and reply.status == "completed"
    reply = client.responses.create(input="?", text={"format": FORMAT}, **asked)
    assert City.model_validate_json(reply.output_text) and reply.text.format.name == "city"


def test_logprobs_of_the_text(client: OpenAI) -> None:
    asked: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    reply = client.responses.create(input="Say something.", **asked)
    probs = reply.output[0].content[0].logprobs
    assert len(probs) == 12 and all(len(p.top_logprobs) == 2 and p.logprob < 0 for p in probs)
    events = client.responses.create(input="Say something.", stream=True, **asked)
    streamed = [p for e in events if e.type == "response.output_text.delta" for p in e.logprobs]
    assert [(p.token, p.logprob) for p in streamed] == [(p.token, p.logprob) for p in probs]


def test_async_client_many_at_once(server: ServerProcess) -> None:
    async def talk(api: AsyncOpenAI, name: str) -> list[str]:
        texts, previous = [], None
        for _ in range(2):
            reply = await api.responses.create(input=name, previous_response_id=previous, **GREEDY)
            texts.append(reply.output_text)
            previous = reply.id
        return texts

    async def all_of_them() -> list[list[str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
            alone = [await talk(api, name) for name in ("red", "green", "blue")]
            together = await asyncio.gather(*(talk(api, name) for name in ("red", "green", "blue")))
            assert list(together) == alone
            return alone

    assert len(asyncio.run(all_of_them())) == 3


def test_input_tokens_are_counted(http: httpx.Client, client: OpenAI) -> None:
    body = {"model": "default", "input": "Say something."}
    counted = http.post("/v1/responses/input_tokens", json=body).json()
    assert counted["object"] == "response.input_tokens"
    used = client.responses.create(input="Say something.", **GREEDY).usage.input_tokens
    assert counted["input_tokens"] == used == client.responses.input_tokens.count(**body).input_tokens

"""Tools and structured output through OpenAI's own client, on a model that says anything it may."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

MESSAGES: Any = [{"role": "user", "content": "What is the weather?"}]
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 100}


def function(name: str, *cities: str) -> Any:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": list(cities)}},
        "required": ["city"],
        "additionalProperties": False,
    }
    described = {"name": name, "description": "Tells the weather.", "parameters": schema, "strict": True}
    return {"type": "function", "function": described}


TOOLS: Any = [function("get_weather", "Paris", "Rome"), function("get_tide", "Brest")]


def test_a_required_call_is_made_and_its_arguments_fit(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **GREEDY
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function" and call.id.startswith("call_")
    allowed = {"get_weather": ("Paris", "Rome"), "get_tide": ("Brest",)}[call.function.name]
    assert json.loads(call.function.arguments)["city"] in allowed


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "get_tide"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "get_tide"}}],
            },
        },
    ],
)
def test_a_named_tool_is_the_one_that_is_called(client: OpenAI, choice: Any) -> None:
    reply = client.chat.completions.create(
        messages=MESSAGES, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, **GREEDY
    )
    (call,) = reply.choices[0].message.tool_calls or ()
    assert call.function.name == "get_tide" and json.loads(call.function.arguments) == {"city": "Brest"}


def test_a_streamed_call_is_the_whole_one(client: OpenAI) -> None:
    asked: Any = {
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = client.chat.completions.create(**asked, **GREEDY).choices[0].message.tool_calls[0].function
    with client.chat.completions.create(stream=True, **asked, **GREEDY) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert {piece.index for piece in pieces} == {0} and chunks[-1].finish_reason == "tool_calls"
    assert pieces[0].id and pieces[0].type == "function" and pieces[0].function.name == whole.name
    assert all(piece.id is None and piece.function.name is None for piece in pieces[1:])
    assert "".join(piece.function.arguments for piece in pieces) == whole.arguments and len(pieces) > 2


def test_the_clients_own_stream_helper_collects_the_call(client: OpenAI) -> None:
    with client.chat.completions.stream(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **GREEDY
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.function.parsed_arguments["city"] in ("Paris", "Rome", "Brest")


def test_a_conversation_goes_on_after_a_call(client: OpenAI) -> None:
    first = client.chat.completions.create(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **GREEDY
    )
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "22 degrees"}
    history: Any = [*MESSAGES, message, result]
    second = client.chat.completions.create(messages=history, tools=TOOLS, tool_choice="none", **GREEDY)
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls
    assert second.usage.prompt_tokens > first.usage.prompt_tokens - 200


class Person(BaseModel):
    name: Literal["Ada", "Grace"]
    age: Literal[36, 85]


def test_the_clients_parse_gets_its_model(client: OpenAI) -> None:
    reply = client.chat.completions.parse(messages=MESSAGES, response_format=Person, **GREEDY)
    assert isinstance(reply.choices[0].message.parsed, Person)
    assert reply.choices[0].finish_reason == "stop"


def test_json_mode_begins_an_object(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        messages=MESSAGES, response_format={"type": "json_object"}, **{**GREEDY, "max_tokens": 20}
    )
    assert reply.choices[0].message.content.lstrip().startswith("{")


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_choice": ["red", "green"]}, "red|green"),
    ({"guided_regex": "[0-9]{3}-[0-9]{2}"}, "[0-9]{3}-[0-9]{2}"),
    ({"guided_json": SCHEMA}, r'\{\s*"answer"\s*:\s*"(yes|no)"\s*\}'),
    ({"guided_json": json.dumps(SCHEMA)}, r'\{\s*"answer"\s*:\s*"(yes|no)"\s*\}'),
    ({"guided_grammar": 'start: "a" ("b" | "c") "!"\n'}, "a[bc]!"),
    ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
    ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
    ({"structured_outputs": {"json": SCHEMA}}, r'\{\s*"answer"\s*:\s*"(yes|no)"\s*\}'),
    ({"structured_outputs": {"grammar": 'start: "x" | "yz"\n'}}, "x|yz"),
]


@pytest.mark.parametrize(("extra", "pattern"), FORMS, ids=[str(next(iter(f[0].items())))[:50] for f in FORMS])
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_has_the_form_that_was_asked(
    client: OpenAI, extra: dict[str, Any], pattern: str, stream: bool
) -> None:
    asked: Any = {"prompt": "Say", "model": "default", "temperature": 1, "seed": 4, "max_tokens": 60}
    reply = client.completions.create(stream=stream, extra_body=extra, **asked)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    text = "".join(c.text for c in choices)
    assert re.fullmatch(pattern, text) and choices[-1].finish_reason == "stop", text


BROKEN = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/no"}}}


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
        ({"guided_json": {"type": "nothing"}}, "guided_json"),
        ({"response_format": BROKEN}, "response_format"),
    ],
)
def test_a_form_that_cant_be_compiled_is_an_error(client: OpenAI, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=MESSAGES, extra_body=extra, **GREEDY)
    assert caught.value.code and caught.value.param


def test_what_has_no_effect_is_told(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "user": "me", "store": True, "metadata": {"a": "b"}}
    body |= {"service_tier": "flex", "prompt_cache_key": "k", "safety_identifier": "s"}
    for stream in (False, True):
        reply = http.post("/v1/chat/completions", json=body | {"stream": stream})
        told = [value.partition(":")[0] for value in reply.headers.get_list("x-hayai-warning")]
        assert sorted(told) == sorted(set(body) - {"messages", "max_tokens"})
    quiet = {"messages": MESSAGES, "max_tokens": 1, "store": False, "service_tier": "auto", "metadata": {}}
    assert "x-hayai-warning" not in http.post("/v1/chat/completions", json=quiet).headers


def test_template_arguments_reach_the_template_and_the_cache_may_be_salted(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": False}}
    assert http.post("/v1/chat/completions", json=body | {"cache_salt": "mine"}).status_code == 200
    effort = http.post("/v1/chat/completions", json=body | {"reasoning_effort": "low"})
    assert effort.status_code == 400 and effort.json()["error"]["param"] == "reasoning_effort"

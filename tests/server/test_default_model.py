"""The default model on the CPU backend, as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from server_process import start_server

pytestmark = pytest.mark.model
QUESTION: Any = [
    {"role": "user", "content": "What is the capital city of France? Answer in one short sentence."}
]


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[OpenAI]:
    server = start_server(default_model, backend="cpu")
    try:
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client
        assert server.interrupt() == (0, "stopped\n")
    finally:
        server.process.kill()
        server.process.wait()


def test_it_answers_and_stops_by_itself(real: OpenAI) -> None:
    reply = real.chat.completions.create(model="default", messages=QUESTION, temperature=0, max_tokens=64)
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop" and reply.model == real.models.list().data[0].id


def test_streamed_whole_and_beside_others_are_the_same(real: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "default", "messages": QUESTION, "max_tokens": 24, "seed": 11}
    whole = real.chat.completions.create(temperature=1, **asked).choices[0].message.content
    beside = real.chat.completions.create(temperature=1, n=3, **asked).choices
    assert beside[0].message.content == whole and len({c.message.content for c in beside}) > 1
    with real.chat.completions.create(temperature=1, stream=True, **asked) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == whole


def test_ignore_eos_gives_the_length_that_was_asked(real: OpenAI) -> None:
    reply = real.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, max_tokens=80, extra_body={"ignore_eos": True}
    )
    assert reply.usage is not None and reply.usage.completion_tokens == 80
    assert reply.choices[0].finish_reason == "length"


def test_it_calls_a_tool_and_goes_on(real: OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}}
    schema |= {"required": ["city"], "additionalProperties": False}
    function = {"name": "get_weather", "description": "Weather of a city", "parameters": schema}
    tools: Any = [{"type": "function", "function": function}]
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: Any = {"model": "default", "tools": tools, "temperature": 0, "max_tokens": 64}
    reply = real.chat.completions.create(
        messages=question, tool_choice="required", parallel_tool_calls=False, **asked
    )
    (call,) = reply.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees, sunny"}
    history: Any = [*question, reply.choices[0].message, result]
    assert real.chat.completions.create(messages=history, **asked).choices[0].message.content


def test_it_writes_json_of_a_schema(real: OpenAI) -> None:
    name, age = {"type": "string", "maxLength": 20}, {"type": "integer", "minimum": 0, "maximum": 120}
    schema = {"type": "object", "properties": {"name": name, "age": age}, "required": ["name", "age"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    reply = real.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Describe a person as JSON."}],
        response_format=form,
        temperature=0,
        max_tokens=96,
    )
    person = json.loads(reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop" and 0 <= person["age"] <= 120 and person["name"]


def test_a_likely_text_scores_higher(real: OpenAI) -> None:
    texts = ["The capital of France is Paris", "The capital of France is Banana"]
    reply = real.completions.create(
        model="default", prompt=texts, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    scores = [sum(c.logprobs.token_logprobs[1:-1]) for c in reply.choices]
    assert scores[0] > scores[1] + 2

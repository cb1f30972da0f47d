"""The default model on the CPU backend through Anthropic's client: tools, forms, the prefix cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic

from server_process import start_server

pytestmark = pytest.mark.model
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY: dict[str, Any] = {"model": "default", "max_tokens": 96, "extra_body": {"temperature": 0}}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA, "strict": True},
    {"name": "now", "description": "The time.", "input_schema": {"type": "object", "properties": {}}},
]


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[Anthropic]:
    server = start_server(default_model, backend="cpu")
    try:
        with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            yield client
        assert server.interrupt() == (0, "stopped\n")
    finally:
        server.process.kill()
        server.process.wait()


def test_it_answers_and_stops_by_itself(real: Anthropic) -> None:
    question: Any = [{"role": "user", "content": "What is the capital city of France? One short sentence."}]
    reply = real.messages.create(messages=question, **GREEDY)
    assert reply.stop_reason == "end_turn" and "Paris" in reply.content[0].text


def test_a_tool_that_is_asked_for_is_called(real: Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    reply = real.messages.create(messages=QUESTION, tools=TOOLS, tool_choice=choice, **GREEDY)
    (block,) = reply.content
    assert reply.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "get_weather"
    assert block.id.startswith("toolu_")
    assert set(block.input) == {"city", "days"} and block.input["city"] in ("Paris", "Rome")
    with real.messages.stream(messages=QUESTION, tools=TOOLS, tool_choice=choice, **GREEDY) as stream:
        final = stream.get_final_message()
    (streamed,) = final.content
    assert (streamed.name, streamed.input, final.stop_reason) == (block.name, block.input, "tool_use")
    # and the conversation goes on with its result
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny."}
    history: Any = [
        *QUESTION,
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": [result]},
    ]
    after = real.messages.create(messages=history, tools=TOOLS, tool_choice={"type": "none"}, **GREEDY)
    assert [b.type for b in after.content] == ["text"]


def test_any_tool_and_one_at_most(real: Anthropic) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    reply = real.messages.create(messages=QUESTION, tools=TOOLS, tool_choice=choice, **GREEDY)
    calls = [block for block in reply.content if block.type == "tool_use"]
    assert len(calls) == 1 and calls[0].name in ("get_weather", "now")


def test_tools_count(real: Anthropic) -> None:
    plain = real.messages.count_tokens(model="default", messages=QUESTION).input_tokens
    assert real.messages.count_tokens(model="default", messages=QUESTION, tools=TOOLS).input_tokens > plain


def test_a_form_is_kept(real: Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    reply = real.messages.create(messages=QUESTION, output_config=form, **GREEDY)
    answer = json.loads(reply.content[0].text)
    assert answer["city"] in ("Paris", "Rome") and 1 <= answer["days"] <= 9


def test_an_answer_goes_on_where_the_client_began_it(real: Anthropic) -> None:
    begun: Any = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]
    reply = real.messages.create(messages=begun, **GREEDY)
    assert reply.content[0].text.startswith(" Paris")


def test_a_prefix_is_read_from_the_cache(real: Anthropic) -> None:
    system = "You answer briefly. " * 40
    first = real.messages.create(messages=QUESTION, system=system, **GREEDY).usage
    again = real.messages.create(messages=QUESTION, system=system, **GREEDY).usage
    assert again.cache_read_input_tokens > 100
    assert again.input_tokens + again.cache_read_input_tokens == (
        first.input_tokens + first.cache_read_input_tokens
    )

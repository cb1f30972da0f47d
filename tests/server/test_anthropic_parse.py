"""Anthropic's bodies, read: what becomes of each part, and what is told about a wrong one. No server."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayai.config import LimitsConfig
from hayai.errors import RequestError
from hayai.frontend_request import Constraint
from hayai.server.anthropic import FIELDS, MessagesRequest, parse_count, parse_messages
from hayai.server.anthropic_messages import read_conversation
from hayai.server.anthropic_replies import AnswerForm
from hayai.server.job import Job

LIMITS = LimitsConfig()
HELLO = [{"role": "user", "content": "hi"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Kyoto"}}


def parse(**fields: Any) -> Job:
    return parse_with_prefill(**fields)[0]


def parse_with_prefill(**fields: Any) -> tuple[Job, str | None]:
    body = {"max_tokens": 8, "messages": HELLO} | fields
    return parse_messages(orjson.dumps(body), LIMITS)


def messages_of(job: Job) -> list[dict[str, Any]]:
    (prompt,) = job.prompts
    assert prompt.messages is not None
    return [dict(message) for message in prompt.messages]


def test_a_plain_request() -> None:
    job, prefill = parse_with_prefill(
        model="claude-x", temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["END"], stream=True
    )
    assert prefill is None and job.model == "claude-x" and job.dialect == "anthropic" and job.n == 1
    params = job.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (8, 0.5, 0.9, 7)
    assert params.stop == ("END",) and job.stream and not job.warnings
    assert messages_of(job) == HELLO
    assert job.extra["form"] == AnswerForm(max_tokens=8)


def test_system_and_blocks_become_messages() -> None:
    job = parse(
        system=[
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
            {"type": "text", "text": "Be kind."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": [{"type": "text", "text": "d", "citations": None}]},
            {"role": "assistant", "content": "e"},
            {"role": "user", "content": "f"},
        ],
    )
    assert messages_of(job) == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "a\nb\nc"},
        {"role": "assistant", "content": "de"},
        {"role": "user", "content": "f"},
    ]


def test_thinking_tools_and_their_results() -> None:
    job = parse(
        tools=[WEATHER],
        messages=[
            *HELLO,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "AAAA"},
                    {"type": "text", "text": "I look."},
                    USE,
                    USE | {"id": "toolu_2", "input": {"city": "Nara"}, "caller": {"type": "direct"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_2",
                        "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "net"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
    )
    _, assistant, *rest = messages_of(job)
    calls = assistant.pop("tool_calls")
    assert assistant == {"role": "assistant", "content": "I look.", "reasoning_content": "Hm."}
    assert [c["function"]["arguments"] for c in calls] == [{"city": "Kyoto"}, {"city": "Nara"}]
    assert [(c["id"], c["function"]["name"]) for c in calls] == [
        ("toolu_1", "get_weather"),
        ("toolu_2", "get_weather"),
    ]
    assert rest == [
        {"role": "tool", "tool_call_id": "toolu_1", "name": "get_weather", "content": "rain"},
        {"role": "tool", "tool_call_id": "toolu_2", "name": "get_weather", "content": "Error: no\nnet"},
        {"role": "user", "content": "And?"},
    ]
    (tool,) = job.options.tools
    assert (tool.name, tool.parameters) == ("get_weather", WEATHER["input_schema"])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, True)),
        ({"type": "auto"}, ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, False)),
        ({"type": "any"}, ("required", None, True)),
        ({"type": "tool", "name": "get_weather"}, ("required", "get_weather", True)),
        ({"type": "none"}, ("none", None, True)),
    ],
)
def test_tool_choice(choice: Any, expected: tuple[str, str | None, bool]) -> None:
    options = parse(tools=[WEATHER], tool_choice=choice).options
    assert (options.tool_choice, options.forced_tool, options.parallel_tools) == expected


def test_a_last_turn_of_the_assistants_begins_the_answer() -> None:
    job, prefill = parse_with_prefill(messages=[*HELLO, {"role": "assistant", "content": "The answer is ("}])
    assert prefill == "The answer is (" and messages_of(job) == HELLO


@pytest.mark.parametrize(
    ("thinking", "template_args"),
    [
        (None, {"enable_thinking": False, "thinking": False}),
        ({"type": "disabled"}, {"enable_thinking": False, "thinking": False}),
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True, "thinking": True}),
        ({"type": "adaptive"}, {}),
    ],
)
def test_thinking_is_the_templates_switch(thinking: Any, template_args: dict[str, object]) -> None:
    job = parse(thinking=thinking)
    assert job.prompts[0].template_args == template_args
    assert any("budget_tokens" in w for w in job.warnings) == (thinking is not None and len(thinking) == 2)


def test_effort_goes_to_a_template_that_knows_it() -> None:
    body = {"max_tokens": 1, "messages": HELLO, "output_config": {"effort": "low"}}
    job, _ = parse_messages(orjson.dumps(body), LIMITS, template_knows_effort=True)
    assert job.prompts[0].template_args["reasoning_effort"] == "low" and not job.warnings


def test_thinking_may_be_left_out_of_the_answer() -> None:
    assert parse(thinking={"type": "adaptive", "display": "omitted"}).extra["form"].show_thinking is False


def test_a_format_of_either_name_is_a_constraint() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    for fields, param in (
        ({"output_config": {"format": form}}, "output_config.format.schema"),
        ({"output_format": form}, "output_format.schema"),
    ):
        expected = Constraint("json_schema", schema, param)
        assert parse(**fields).options.constraint == expected, "errors name the field that the client sent"


def test_no_tokens_only_fills_the_cache() -> None:
    job = parse(max_tokens=0)
    assert not job.options.generate and job.extra["form"].max_tokens == 0


def test_what_changes_no_token_is_accepted_and_what_might_is_told() -> None:
    job = parse(
        metadata={},
        service_tier="auto",
        cache_control={"type": "ephemeral"},
        speed="standard",
        mcp_servers=[],
        container=None,
        tools=[WEATHER | {"type": "custom", "eager_input_streaming": True, "cache_control": None}],
    )
    assert job.warnings == ()
    job = parse(
        metadata={"user_id": "u"},
        service_tier="priority",
        speed="fast",
        inference_geo="eu",
        output_config={"effort": "low"},
        diagnostics={"previous_message_id": None},
        tools=[WEATHER | {"input_examples": [{"city": "Nara"}]}],
    )
    assert sorted(w.partition(":")[0] for w in job.warnings) == [
        "diagnostics",
        "inference_geo",
        "metadata",
        "output_config.effort",
        "service_tier",
        "speed",
        "tools[0].input_examples",
    ]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
ASSISTANT_USES = [*HELLO, {"role": "assistant", "content": [USE]}]
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1"}

BAD: list[tuple[str, dict[str, Any], str]] = [
    # field at fault, what is sent, text in the message
    ("max_tokens", {"max_tokens": None}, "required"),
    ("max_tokens", {"max_tokens": -1}, "greater than or equal to 0"),
    ("max_tokens", {"max_tokens": "9"}, "found a string"),
    ("messages", {"messages": None}, "required"),
    ("messages", {"messages": []}, "at least one message"),
    ("messages", {"messages": "hi"}, "a string"),
    ("messages", {"messages": HELLO * 4097}, "at most 4096"),
    ("messages[0]", {"messages": ["hi"]}, "must be an object"),
    ("messages[0].role", {"messages": [{"content": "x"}]}, "null or absent"),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    ("messages[0].name", {"messages": [{"role": "user", "content": "x", "name": "u"}]}, "unknown field"),
    ("messages[0].content", {"messages": [{"role": "user"}]}, "null or absent"),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}, "an empty list"),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["x"]}]}, "must be an object"),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{}]}]}, "must be a string"),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [IMAGE]}]}, "images"),
    (
        "messages[0].content[1].type",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "document"}]}]},
        "documents",
    ),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [USE]}]}, "tool_use"),
    (
        "messages[0].content[0].text",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "must be a string: 5",
    ),
    (
        "messages[0].content[0].weight",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "weight": 1}]}]},
        "unknown field",
    ),
    (
        "messages[0].content[0].citations",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "citations": [{}]}]}]},
        "not supported",
    ),
    (
        "messages[0].content[0].cache_control",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "cache_control": 1}]}]},
        "ephemeral",
    ),
    (
        "messages[0].content[0].tool_use_id",
        {"messages": [{"role": "user", "content": [RESULT]}]},
        "no tool_use before it",
    ),
    (
        "messages[1].content[1].id",
        {"messages": [*HELLO, {"role": "assistant", "content": [USE, USE]}]},
        "two tool_use blocks",
    ),
    (
        "messages[1].content[0].input",
        {"messages": [*HELLO, {"role": "assistant", "content": [USE | {"input": "{}"}]}]},
        "must be an object: a string",
    ),
    ("messages[1]", {"messages": ASSISTANT_USES}, "send its tool_result"),
    (
        "messages[2].content[0].content[0].type",
        {"messages": [*ASSISTANT_USES, {"role": "user", "content": [RESULT | {"content": [IMAGE]}]}]},
        "images",
    ),
    (
        "messages[2].content[0].is_error",
        {"messages": [*ASSISTANT_USES, {"role": "user", "content": [RESULT | {"is_error": 1}]}]},
        "true or false",
    ),
    (
        "messages[1]",
        {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}]},
        "after a thinking block",
    ),
    ("messages[0]", {"messages": [{"role": "assistant", "content": "x"}]}, "nothing to answer"),
    (
        "messages",
        {
            "messages": [*HELLO, {"role": "assistant", "content": "{"}],
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
        "can't be continued",
    ),
    ("system", {"system": 5}, "must be a string or a list"),
    ("system[0].type", {"system": [IMAGE]}, "supported here: text"),
    ("model", {"model": 5}, "found 5"),
    ("temperature", {"temperature": 1.5}, "less than or equal to 1"),
    ("temperature", {"temperature": -0.1}, "greater than or equal to 0"),
    ("top_p", {"top_p": 0}, "greater than 0"),
    ("top_k", {"top_k": -1}, "greater than or equal to 0"),
    ("top_k", {"top_k": 1.5}, "found 1.5"),
    ("stop_sequences", {"stop_sequences": "x"}, "found a string"),
    ("stop_sequences", {"stop_sequences": ["x"] * 17}, "at most 16"),
    ("stop_sequences", {"stop_sequences": ["x", ""]}, "must not be empty"),
    ("stop_sequences", {"stop_sequences": ["x" * 4000, "y" * 97]}, "at most 4096 bytes in all"),
    ("stream", {"stream": "yes"}, "found a string"),
    ("n", {"n": 2}, "unknown field"),
    ("stop", {"stop": ["x"]}, "unknown field"),
    ("tempratur", {"tempratur": 1}, "did you mean temperature?"),
    ("container", {"container": "c"}, "runs no code"),
    ("mcp_servers", {"mcp_servers": [{"type": "url"}]}, "calls no others"),
    ("context_management", {"context_management": {"edits": [{}]}}, "taken as it is"),
    ("cache_control", {"cache_control": {"type": "forever"}}, "ephemeral"),
    ("thinking.type", {"thinking": {"type": "hard"}}, "found a string"),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 0}}, "greater than"),
    ("output_config.format.schema", {"output_config": {"format": {"type": "json_schema"}}}, "required"),
    ("output_config.effort", {"output_config": {"effort": "huge"}}, "found a string"),
    (
        "output_format",
        {
            "output_format": {"type": "json_schema", "schema": {}},
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
        "give one of them",
    ),
    ("tools", {"tools": {}}, "must be a list"),
    ("tools", {"tools": [WEATHER] * 129}, "at most 128"),
    ("tools[0]", {"tools": ["x"]}, "must be an object"),
    ("tools[0].type", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "input_schema"),
    ("tools[0].name", {"tools": [WEATHER | {"name": "get weather"}]}, "must match"),
    ("tools[0].name", {"tools": [{"input_schema": {}}]}, "required"),
    ("tools[0].input_schema", {"tools": [{"name": "f"}]}, "required"),
    ("tools[0].input_schema", {"tools": [{"name": "f", "input_schema": []}]}, "an empty list"),
    ("tools[0].input_schema.type", {"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "object"),
    ("tools[0].input_schema", {"tools": [{"name": "f", "input_schema": {"enum": ["x" * 300_000]}}]}, "bytes"),
    (
        "output_config.format.schema",
        {"output_config": {"format": {"type": "json_schema", "schema": {"enum": ["x" * 300_000]}}}},
        "bytes",
    ),
    ("cache_salt", {"cache_salt": "x" * 257}, "at most 256"),
    ("tools[0].parameters", {"tools": [WEATHER | {"parameters": {}}]}, "unknown field"),
    ("tools[0].defer_loading", {"tools": [WEATHER | {"defer_loading": True}]}, "not searched"),
    ("tools[1].name", {"tools": [WEATHER, WEATHER]}, "two tools"),
    ("tool_choice", {"tool_choice": "auto"}, "found a string"),
    ("tool_choice", {"tool_choice": {"type": "any"}}, "needs tools"),
    ("tool_choice.type", {"tool_choice": {"type": "some"}}, "found a string"),
    ("tool_choice.name", {"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "null or absent"),
    ("tool_choice.name", {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "'f'"),
    ("tool_choice.name", {"tools": [WEATHER], "tool_choice": {"type": "any", "name": "get_weather"}}, "type"),
]


@pytest.mark.parametrize(("param", "fields", "text"), BAD)
def test_a_wrong_field_is_named(param: str, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.param == param and caught.value.code
    assert text in str(caught.value) and len(str(caught.value)) < 300


def test_a_server_answers_each_with_400_in_the_apis_form(http: httpx.Client) -> None:
    for param, fields, _ in BAD:
        body = {"max_tokens": 8, "messages": HELLO} | fields
        reply = http.post("/v1/messages", json=body)
        assert reply.status_code == 400, (param, reply.text)
        answer = reply.json()
        assert answer["type"] == "error" and answer["request_id"] == reply.headers["request-id"]
        assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", param)


def test_count_tokens_takes_what_makes_the_prompt() -> None:
    body = {"model": "m", "messages": HELLO, "system": "s", "tools": [WEATHER], "thinking": None}
    asked = parse_count(orjson.dumps(body), LIMITS)
    assert asked.model == "m" and asked.prompt.messages is not None and len(asked.prompt.messages) == 2
    assert len(asked.options.tools) == 1
    with pytest.raises(RequestError, match="unknown field: max_tokens"):
        parse_count(orjson.dumps(body | {"max_tokens": 1}), LIMITS)


# What JSON can hold, with the API's own words as likely keys and values.
WORDS = st.sampled_from(
    [
        *MessagesRequest.model_fields,
        *FIELDS.refused,
        *FIELDS.warned,
        *("role", "user", "assistant", "system", "content", "type", "text", "tool_use", "tool_result"),
        *(
            "thinking",
            "signature",
            "id",
            "name",
            "input",
            "tool_use_id",
            "is_error",
            "input_schema",
            "strict",
        ),
        *("enabled", "any", "tool", "auto", "json_schema", "schema", "format", "ephemeral", "toolu_1"),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=30,
)
BLOCK_FIELDS = ("text", "id", "name", "input", "tool_use_id", "content", "thinking", "is_error")
BLOCKS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"]) | JSON},
    optional=dict.fromkeys(BLOCK_FIELDS, JSON),
)
TURNS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]) | JSON,
        "content": st.text(max_size=8) | st.lists(BLOCKS | JSON, max_size=4) | JSON,
    }
)
BODIES = st.fixed_dictionaries(
    {"max_tokens": st.integers(-1, 9) | JSON, "messages": st.lists(TURNS | JSON, max_size=4) | JSON},
    optional=dict.fromkeys(
        sorted({*MessagesRequest.model_fields, *FIELDS.refused} - {"messages", "max_tokens"}), JSON
    ),
)


@settings(max_examples=400, deadline=None)
@given(BODIES | JSON)
def test_any_json_is_a_job_or_an_error_with_a_place(body: Any) -> None:
    raw = orjson.dumps(body, default=str) if _fits(body) else b"[]"
    for read in (parse_messages, parse_count):
        try:
            read(raw, LIMITS)
        except RequestError as error:
            assert str(error) and error.code and (error.param is not None or error.code == "invalid_json")


def _fits(value: Any) -> bool:
    """Whether orjson writes it: integers of 64 bits, text without lone surrogates."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_job_or_an_error(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_messages(raw, LIMITS)


def texts(count: int, text: str = "x") -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] * count


def test_many_blocks_are_read_in_time_that_grows_with_them() -> None:
    """Text added to text block by block would copy some 50 GB here."""
    count = 400_000
    thinking = [{"type": "thinking", "thinking": "y" * 60}] * count
    messages = [{"role": "user", "content": texts(count)}, {"role": "assistant", "content": thinking}, *HELLO]
    began = time.thread_time()
    conversation = read_conversation(None, messages, replace(LIMITS, max_parts=2 * count))
    seconds = time.thread_time() - began
    first, second, _ = conversation.messages
    assert first["content"] == "\n".join("x" * count)
    assert second == {"role": "assistant", "content": "", "reasoning_content": "y" * 60 * count}
    assert seconds < 8, seconds


def test_too_many_blocks_are_refused_before_they_are_read() -> None:
    most = LIMITS.max_parts
    use = {"role": "assistant", "content": [USE]}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": texts(most)}
    for fields in (
        {"messages": [{"role": "user", "content": texts(400_000)}]},
        {
            "messages": [{"role": "user", "content": texts(most // 2)}] * 2
            + [{"role": "user", "content": texts(1)}]
        },
        {"messages": [*HELLO, use, {"role": "user", "content": [result]}]},
        {"system": texts(most + 1)},
    ):
        body = orjson.dumps({"max_tokens": 8, "messages": HELLO} | fields)
        began = time.thread_time()
        with pytest.raises(RequestError, match=f"at most {most} content parts") as caught:
            parse_messages(body, LIMITS)
        assert (caught.value.param, time.thread_time() - began < 1) == ("messages", True)
    assert len(messages_of(parse(system=texts(most)))[0]["content"]) == 2 * most - 1

"""OpenAI's own schemas judge what we send, and every field of its requests is known to us by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

import openai_spec
from hayai.server.bodies import FieldTable
from hayai.server.openai import CHAT_FIELDS, COMPLETION_FIELDS, ChatRequest, CompletionRequest
from hayai.server.responses import FIELDS, ResponsesRequest

HELLO = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

REQUESTS: list[tuple[str, str, type[BaseModel], FieldTable, dict[str, Any]]] = [
    ("CreateChatCompletionRequest", CHAT, ChatRequest, CHAT_FIELDS, {"messages": HELLO, "max_tokens": 1}),
    ("CreateCompletionRequest", COMPLETION, CompletionRequest, COMPLETION_FIELDS, {"prompt": "x"}),
    ("CreateResponse", RESPONSES, ResponsesRequest, FIELDS, {"input": "x", "max_output_tokens": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "model", "table", "body"), REQUESTS, ids=[r[0] for r in REQUESTS])
def test_every_field_of_the_api_is_served_told_or_refused(
    http: httpx.Client, name: str, path: str, model: type[BaseModel], table: FieldTable, body: dict[str, Any]
) -> None:
    fields = openai_spec.properties(name)
    assert len(fields) > 15
    for field in sorted(fields):
        places = [field in model.model_fields, field in table.warned, field in table.refused]
        assert sum(places) == 1, f"{field}: {places}"
        if field in model.model_fields:
            continue
        odd = {"a value": "that asks for something"}
        reply = http.post(path, json=body | {field: odd})
        if field in table.refused:
            error = reply.json()["error"]
            assert reply.status_code == 400 and error["param"] == field, field
            assert error["code"] == "unsupported_parameter" and table.refused[field][0] in error["message"]
        else:
            assert reply.status_code == 200, reply.text
            assert f"{field}: " in reply.headers["x-hayai-warning"]
        assert http.post(path, json=body | {field: None}).status_code == 200


def events(http: httpx.Client, path: str, body: Mapping[str, Any]) -> list[Any]:
    with http.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 2, "temperature": 1, "seed": 3},
        {"timings": True, "stop": ["e"]},
    ],
)
def test_chat_is_what_the_api_says(http: httpx.Client, options: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0} | options
    openai_spec.check("CreateChatCompletionResponse", http.post(CHAT, json=body).json())
    for event in events(http, CHAT, body | {"stream_options": {"include_usage": True}}):
        openai_spec.check("CreateChatCompletionStreamResponse", event)


@pytest.mark.parametrize("options", [{}, {"logprobs": 3}, {"echo": True}, {"n": 2, "temperature": 1}])
def test_completions_are_what_the_api_says(http: httpx.Client, options: dict[str, Any]) -> None:
    body = {"prompt": ["Hello", "World"], "max_tokens": 6, "temperature": 0} | options
    openai_spec.check("CreateCompletionResponse", http.post(COMPLETION, json=body).json())
    reasons = []
    for event in events(http, COMPLETION, body):  # the schema knows no events, so it wants a reason in each
        reasons += [choice["finish_reason"] for choice in event["choices"]]
        ended = [choice | {"finish_reason": "stop"} for choice in event["choices"]]
        openai_spec.check("CreateCompletionResponse", event | {"choices": ended})
    assert len([reason for reason in reasons if reason == "length"]) == 2 * body.get("n", 1)


def test_echo_with_logprobs_is_what_the_api_says_but_for_the_null(http: httpx.Client) -> None:
    """The schema has no null in token_logprobs; the API's answers do, and evaluation harnesses rely on it."""
    body = {"prompt": "Hello there", "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1}
    reply = http.post(COMPLETION, json=body).json()
    probs = reply["choices"][0]["logprobs"]
    assert probs["token_logprobs"][0] is None and probs["top_logprobs"][0] is None
    probs["token_logprobs"][0], probs["top_logprobs"][0] = 0.0, {}
    openai_spec.check("CreateCompletionResponse", reply)


def test_models_and_errors_are_what_the_api_says(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()
    openai_spec.check("ListModelsResponse", models)
    openai_spec.check("Model", http.get(f"/v1/models/{models['data'][0]['id']}").json())
    for reply in (http.get("/v1/models/nothing"), http.post(CHAT, json={}), http.get("/v1/nothing")):
        openai_spec.check("ErrorResponse", reply.json())


def test_responses_are_what_the_api_says(http: httpx.Client) -> None:
    body = {"input": "hi", "max_output_tokens": 8, "temperature": 0, "metadata": {"a": "b"}}
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    for options in ({}, logprobs, {"instructions": "Be brief."}):
        whole = http.post(RESPONSES, json=body | options).json()
        openai_spec.check("Response", whole)
        stream = events(http, RESPONSES, body | options)
        for event in stream:
            openai_spec.check(openai_spec.event_name(event), event)
        assert [e["sequence_number"] for e in stream] == list(range(len(stream)))
    stored = http.get(f"{RESPONSES}/{whole['id']}").json()
    assert stored == whole
    openai_spec.check("ResponseItemList", http.get(f"{RESPONSES}/{whole['id']}/input_items").json())

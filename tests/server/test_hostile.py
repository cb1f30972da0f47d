"""What a client may get wrong, and what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny_models
from chat_model import CONTEXT
from hayai.config import ServerConfig
from hayai.server.handle import BIG_BODY, read_off_loop
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf
from server_process import InnerServer

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


def tool_with(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def nested(levels: int) -> dict[str, Any]:
    return {"items": nested(levels - 1)} if levels else {}


TOOL = tool_with({"type": "object"})
DEEP = nested(40)


def error_of(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


BAD_CHAT = [
    # field at fault, its value, text in the message
    ("temprature", 0.5, "did you mean temperature?"),
    ("frobnicate", None, "unknown field: frobnicate"),
    ("tools", {}, "must be a list"),
    ("tools", [{"type": "function"}], "tools[0].function must be an object"),
    ("tools", [{"type": "web_search"}], "only 'function'"),
    ("tools", [{"type": "custom", "custom": {"name": "x"}}], "only 'function'"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "letters, digits"),
    ("tools", [{"type": "function", "function": {"name": "f", "colour": 1}}], "unknown field"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}], "a JSON schema"),
    ("tools", [{"type": "function", "function": {"name": "f", "strict": 1}}], "true or false"),
    ("tools", [TOOL, TOOL], "two tools are called 'f'"),
    ("tools", [TOOL] * 129, "at most 128 tools"),
    ("tools", [tool_with(DEEP)], "nested deeper than 32"),
    ("tools", [tool_with({"enum": ["x" * (257 << 10)]})], "bytes; at most"),
    ("tool_choice", "required", "needs tools"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "needs tools"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024 tokens: 1025"),
    ("functions", [{"name": "f"}], "use tools"),
    ("function_call", {"name": "f"}, "use tool_choice"),
    ("parallel_tool_calls", "no", "found a string"),
    ("response_format", "json", "must be an object"),
    ("response_format", {"type": "xml"}, "text, json_object or json_schema"),
    ("response_format", {"type": "json_object", "schema": {}}, "unknown field"),
    ("response_format", {"type": "json_schema"}, "must be an object"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}, "letters, digits"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}, "a JSON schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}, "deeper"),
    ("structured_outputs", {"xml": "x"}, "unknown field"),
    ("structured_outputs", {"json": {}, "regex": "a"}, "use one of them"),
    ("guided_json", "{", "not JSON"),
    ("guided_json", 5, "a JSON schema"),
    ("guided_regex", "x" * (17 << 10), "bytes; at most"),
    ("guided_regex", ["x"], "non-empty string"),
    ("guided_choice", [], "list of non-empty strings"),
    ("guided_choice", ["a", ""], "list of non-empty strings"),
    ("guided_grammar", "", "non-empty string"),
    ("chat_template_kwargs", [], "must be an object"),
    ("chat_template_kwargs", {"messages": "x"}, "not a variable"),
    ("chat_template_kwargs", {"x": {}}, "must be a string, a number"),
    ("cache_salt", "x" * 257, "at most 256"),
    ("moderation", {}, "no moderation model"),
    ("web_search_options", {}, "does not search"),
    ("audio", {"voice": "alloy"}, "plain text"),
    ("verbosity", "low", "can't be set"),
    ("modalities", ["audio"], "plain text"),
    ("prediction", {"type": "content"}, "not served"),
    ("reasoning_effort", "high", "not supported"),
    ("temperature", 2.5, "from 0 to 2: 2.5"),
    ("temperature", "hot", "found a string"),
    ("temperature", True, "found true or false"),
    ("top_p", 0, "above 0 and at most 1"),
    ("top_p", 1.01, "from 0 to 1"),
    ("top_k", -1, "0 (off) or more"),
    ("top_k", 1.5, "found 1.5"),
    ("min_p", 2, "from 0 to 1"),
    ("repetition_penalty", 0, "above 0"),
    ("presence_penalty", 3, "from -2 to 2"),
    ("frequency_penalty", -3, "from -2 to 2"),
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_tokens", -1, "greater than or equal to 1"),
    ("max_tokens", "9", "found a string"),
    ("max_completion_tokens", 0, "greater than or equal to 1"),
    ("n", 0, "greater than or equal to 1"),
    ("n", 129, "less than or equal to 128"),
    ("seed", 1 << 64, "found"),
    ("seed", -(1 << 63) - 1, "found"),
    ("seed", 0.5, "found 0.5"),
    ("stream", "yes", "found a string"),
    ("stream_options", {"include_usage": True}, "needs stream: true"),
    ("ignore_eos", 1, "found 1"),
    ("logprobs", 3, "found 3"),
    ("top_logprobs", 3, "needs logprobs"),
    ("top_logprobs", 21, "less than or equal to 20"),
    ("stop", [""], "non-empty"),
    ("stop", ["x"] * 17, "at most 16"),
    ("stop", [1], "string or a list of strings"),
    ("stop", {}, "an object"),
    ("stop_token_ids", ["x"], "found a string"),
    ("stop_token_ids", list(range(65)), "at most 64"),
    ("logit_bias", {"x": 1}, "must be a token id: 'x'"),
    ("logit_bias", {"1": "x"}, "must be a number"),
    ("logit_bias", {"1": 101}, "from -100 to 100"),
    ("logit_bias", {"999999999": 1}, "the vocabulary has"),
    ("logit_bias", [1], "a list"),
    ("model", 5, "found 5"),
    ("messages", None, "required"),
    ("messages", [], "at least one"),
    ("messages", "hi", "a string"),
    ("messages", HELLO * 4097, "at most 4096"),
]


@pytest.mark.parametrize(("field", "value", "text"), BAD_CHAT)
def test_bad_chat_field_is_named(http: httpx.Client, field: str, value: object, text: str) -> None:
    body = {"messages": HELLO, "max_tokens": 1, field: value}
    error = error_of(http.post(CHAT, json=body))
    assert text in error["message"]
    assert re.split(r"[.\[]", error["param"])[0] == field and error["type"] == "invalid_request_error"
    assert error["code"]


BAD_MESSAGES = [
    ("messages[0]", "hi"),
    ("messages[0].role", {"content": "x"}),
    ("messages[0].role", {"role": "root", "content": "x"}),
    ("messages[0].role", {"role": "function", "name": "f", "content": "x"}),
    ("messages[0].tool_call_id", {"role": "tool", "content": "x"}),
    ("messages[0].tool_call_id", {"role": "tool", "content": "x", "tool_call_id": "unknown"}),
    ("messages[0].tool_call_id", {"role": "user", "content": "x", "tool_call_id": "a"}),
    ("messages[0].role", {"role": ["user"], "content": "x"}),
    ("messages[0].content", {"role": "user"}),
    ("messages[0].content", {"role": "user", "content": 5}),
    ("messages[0].content[1]", {"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}),
    ("messages[0].content[0].type", {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
    ("messages[0].content[0].text", {"role": "user", "content": [{"type": "text"}]}),
    (
        "messages[0].content[0].weight",
        {"role": "user", "content": [{"type": "text", "text": "", "weight": 1}]},
    ),
    ("messages[0].name", {"role": "user", "content": "x", "name": 5}),
    ("messages[0].content", {"role": "assistant", "content": None}),
    ("messages[0].content", {"role": "user", "content": None}),
    ("messages[0].tool_calls", {"role": "user", "content": "x", "tool_calls": [{}]}),
    ("messages[0].tool_calls", {"role": "assistant", "content": "x", "tool_calls": "f"}),
    ("messages[0].tool_calls[0].function", {"role": "assistant", "tool_calls": [{"id": "a"}]}),
    ("messages[0].tool_calls[0].type", {"role": "assistant", "tool_calls": [{"type": "custom"}]}),
    ("messages[0].tool_calls[0].id", {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}),
    (
        "messages[0].tool_calls[0].function.name",
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"arguments": "{}"}}]},
    ),
    ("messages[0].colour", {"role": "user", "content": "x", "colour": "red"}),
]


@pytest.mark.parametrize(("param", "message"), BAD_MESSAGES)
def test_bad_message_is_placed(http: httpx.Client, param: str, message: object) -> None:
    error = error_of(http.post(CHAT, json={"messages": [message, *HELLO]}))
    assert error["param"] == param and param in error["message"]


BAD_COMPLETIONS = [
    ("echo", "yes", "found a string"),
    ("suffix", "end", "no tokens to fill in the middle"),
    ("max_tokens", -1, "greater than or equal to 0"),
    ("n", 129, "less than or equal to 128"),
    ("guided_choice", "a", "list of non-empty strings"),
    ("tools", [], "unknown field"),
    ("best_of", 2, "use n"),
    ("logprobs", 21, "less than or equal to 20"),
    ("logprobs", True, "found true or false"),
    ("prompt", None, "required"),
    ("prompt", [], "an empty list"),
    ("prompt", 5, "5"),
    ("prompt", [1, "a"], "prompt[0]"),
    ("prompt", ["a", []], "prompt[1]"),
    ("prompt", [1, True], "prompt[0]"),
    ("prompt", [1, -1], "not a token id: -1"),
    ("prompt", [1 << 40], "not a token id"),
    ("prompt", [1, 49152], "not in the vocabulary"),
    ("prompt", "", "at least one token"),
    ("prompt", ["x"] * 129, "at most 128"),
    ("messages", HELLO, "unknown field"),
]


@pytest.mark.parametrize(("field", "value", "text"), BAD_COMPLETIONS)
def test_bad_completion_field_is_named(http: httpx.Client, field: str, value: object, text: str) -> None:
    error = error_of(http.post(COMPLETION, json={"prompt": "x", "max_tokens": 1, field: value}))
    assert text in error["message"] and error["param"] == field


def test_the_two_limits_of_length_must_agree(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}
    assert error_of(http.post(CHAT, json=body))["param"] == "max_tokens"
    body["max_completion_tokens"] = 1
    assert http.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_says_both_numbers(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": list(range(600)), "stream": stream}
    error = error_of(http.post(COMPLETION, json=body))
    assert "600 tokens" in error["message"] and f"{CONTEXT} tokens" in error["message"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    chat = {"messages": [{"role": "user", "content": "word " * 600}], "stream": stream, "n": 2}
    error = error_of(http.post(CHAT, json=chat))
    assert f"{CONTEXT} tokens" in error["message"] and error["param"] == "messages"
    assert error["code"] == "context_length_exceeded"


def test_token_ids_are_counted_before_they_are_read(http: httpx.Client) -> None:
    for prompt in ([-1] * 1_000_000, [[-1] * 1_000_000]):
        error = error_of(http.post(COMPLETION, json={"prompt": prompt}))
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert "1000000 tokens" in error["message"]


def test_too_many_content_parts_are_refused(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": ""}] * 8193
    messages = [{"role": "user", "content": parts}] * 2
    error = error_of(http.post(CHAT, json={"messages": messages}))
    assert error["param"] == "messages" and "at most 16384 content parts" in error["message"]


def test_a_big_body_is_parsed_beside_the_event_loop(http: httpx.Client) -> None:
    threads: list[str] = []

    async def run() -> None:
        for size in (BIG_BODY, BIG_BODY + 1):
            await read_off_loop(b" " * size, lambda: threads.append(threading.current_thread().name))

    asyncio.run(run())
    assert threads[0] == threading.main_thread().name != threads[1]
    reply = http.post(CHAT, json={"messages": [{"role": "user", "content": "hi", "colour": "x" * BIG_BODY}]})
    assert error_of(reply)["param"] == "messages[0].colour", "errors come back the same way"


def test_a_prompt_of_megabytes_is_refused_at_once(http: httpx.Client) -> None:
    error = error_of(http.post(COMPLETION, json={"prompt": "a b " * (2 << 20)}))
    assert error["code"] == "context_length_exceeded" and str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"messages": [}',
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b"[" * 100_000,
    ],
)
def test_bodies_that_are_not_json_objects(http: httpx.Client, body: bytes) -> None:
    reply = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert error_of(reply)["code"] == "invalid_json"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_read(http: httpx.Client, content_type: str | None) -> None:
    """A page of another origin may send these types without being asked."""
    headers = {} if content_type is None else {"content-type": content_type}
    reply = http.post(CHAT, content=json.dumps({"messages": HELLO}).encode(), headers=headers)
    assert error_of(reply, 415)["code"] == "unsupported_media_type"


def test_huge_bodies_are_refused(http: httpx.Client) -> None:
    limit = ServerConfig.max_body_bytes
    headers = {"content-type": "application/json", "content-length": str(limit + 1)}
    with socket.create_connection((http.base_url.host, http.base_url.port)) as raw:
        head = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413")

    def endless():
        for _ in range(limit // (1 << 20) + 1):
            yield b" " * (1 << 20)

    chunked = http.post(CHAT, content=endless(), headers={"content-type": "application/json"})
    error = error_of(chunked, 413)
    assert error["code"] == "body_too_large" and str(limit) in error["message"]


def test_routes_that_are_not_there(http: httpx.Client) -> None:
    assert error_of(http.get("/v2/models"), 404)["code"] == "not_found"
    reply = http.get(CHAT)
    assert error_of(reply, 405)["message"] == f"method not allowed: GET {CHAT}; allowed: POST"
    assert reply.headers["allow"] == "POST"
    error = error_of(http.post(CHAT, json={"messages": HELLO, "model": "x" * 5000}), 404)
    assert error["param"] == "model" and len(error["message"]) < 300


def test_health_ready_and_schema(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    schema = http.get("/openapi.json").json()
    chat = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "temperature", "top_k", "ignore_eos"} <= set(chat["properties"])
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)):
        assert schema["components"]["schemas"][name]["properties"]
    assert set(schema["paths"]["/v1/models/{model_id}"]) == {"get"}


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000, 431),
        (b"GET /" + b"y" * 200_000, 431),
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 40_000, 431),
        (b"\x16\x03\x01 this is not HTTP\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n", 400),
    ],
)
def test_heads_that_are_too_long_or_none(http: httpx.Client, head: bytes, status: int) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=10) as raw:
        raw.sendall(head)
        text = b""
        with contextlib.suppress(ConnectionResetError):  # it closes on what we still send
            while part := raw.recv(4096):
                text += part
    assert not text or text.startswith(f"HTTP/1.1 {status} ".encode())
    assert status != 400 or json.loads(text.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"
    assert http.get("/health").status_code == 200


def test_two_requests_in_one_packet(http: httpx.Client) -> None:
    """Pipelined requests are answered in order."""
    with socket.create_connection((http.base_url.host, http.base_url.port)) as raw:
        raw.sendall(
            b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
            b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        raw.settimeout(10)
        text = b""
        while part := raw.recv(4096):
            text += part
    assert text.index(b'"ok"') < text.index(b'"ready"')


def test_health_answers_while_a_long_prompt_runs(http: httpx.Client) -> None:
    async def both() -> list[float]:
        async with httpx.AsyncClient(base_url=str(http.base_url), timeout=60) as client:
            body = {"prompt": [list(range(1, 500 - i)) for i in range(16)], "max_tokens": 1}
            work = asyncio.create_task(client.post(COMPLETION, json=body))
            waits = []
            while not work.done():
                began = asyncio.get_running_loop().time()
                assert (await client.get("/health")).status_code == 200
                waits.append(asyncio.get_running_loop().time() - began)
                await asyncio.sleep(0.01)
            assert (await work).status_code == 200
            return waits

    waits = asyncio.run(both())
    assert len(waits) >= 3 and max(waits) < 1.0


def test_a_model_without_a_vocabulary_serves_token_ids(
    inner_server: Callable[..., InnerServer], tmp_path: Path
) -> None:
    config = replace(tiny_models.LLAMA, context_length=64)
    path = write_gguf(tmp_path / "bare.gguf", llama_metadata(config), random_llama(config))
    with httpx.Client(base_url=inner_server(model=path).url, timeout=30) as http:
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "logprobs": 1}
        reply = http.post(COMPLETION, json=body).json()
        assert reply["usage"]["completion_tokens"] == 4 and reply["choices"][0]["text"] == ""
        assert len(reply["choices"][0]["logprobs"]["token_logprobs"]) == 4
        for path_, field, value in ((COMPLETION, "prompt", "text"), (CHAT, "messages", HELLO)):
            error = error_of(http.post(path_, json={field: value}))
            assert error["code"] == "no_vocabulary" and error["param"] == field
        error = error_of(http.post(COMPLETION, json={"prompt": [1], "stop": "x"}))
        assert error["param"] == "stop"


def test_a_grammar_that_fails_on_the_way_is_no_failure_of_the_server(http: httpx.Client) -> None:
    """Clients try again after a 503; the same request would only fail again."""
    body = {"prompt": "x", "max_tokens": 200, "temperature": 0, "guided_regex": "((a{1,100}){1,100}){60,100}"}
    error = error_of(http.post(COMPLETION, json=body))
    assert (error["param"], error["code"]) == ("guided_regex", "invalid_grammar")
    assert error["type"] == "invalid_request_error"
    with http.stream("POST", COMPLETION, json=body | {"stream": True}) as reply:
        events = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert reply.status_code == 200 and len(events) > 1 and events[-1] != "[DONE]"
    assert json.loads(events[-1])["error"]["code"] == "invalid_grammar"

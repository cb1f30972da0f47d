"""/tokenize and /detokenize in vLLM's shape and in llama-server's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

import tiny_models
from chat_model import CONTEXT
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf
from server_process import InnerServer

HELLO = [{"role": "user", "content": "Hello there"}]


def test_a_text_comes_back(http: httpx.Client) -> None:
    text = "Hello, wörld 🦊\n"
    reply = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == CONTEXT and reply["token_strs"][0] == "Hello"
    back = http.post("/detokenize", json={"tokens": reply["tokens"], "model": "default"}).json()
    assert back == {"prompt": text, "content": text}


def test_the_shape_of_llama_server(http: httpx.Client) -> None:
    plain = http.post("/tokenize", json={"content": "Hello 🦊"}).json()
    assert set(plain) == {"tokens"}
    pieces = http.post("/tokenize", json={"content": "Hello 🦊", "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == plain["tokens"] and pieces[0]["piece"] == "Hello"
    data = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert data.decode() == "Hello 🦊" and any(isinstance(p["piece"], list) for p in pieces)
    marked = http.post("/tokenize", json={"content": "<|im_end|>"}).json()["tokens"]
    spelled = http.post("/tokenize", json={"content": "<|im_end|>", "parse_special": False}).json()["tokens"]
    assert len(marked) == 1 and len(spelled) > 1


def test_a_conversation_counts_as_much_as_it_is_charged(http: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for extra in ({}, {"tools": [tool]}):
        counted = http.post("/tokenize", json={"messages": HELLO} | extra).json()["count"]
        body = {"messages": HELLO, "max_tokens": 1} | extra
        used = http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
        assert counted == used
    bare = http.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()["count"]
    assert bare < http.post("/tokenize", json={"messages": HELLO}).json()["count"]


def test_a_text_longer_than_the_context_is_counted(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"prompt": "word " * 2000}).json()["count"] > CONTEXT


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "colour": 1}, "colour"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1 << 40]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, path: str, body: dict[str, object], param: str) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    missing = http.post(path, json={"prompt": "a", "tokens": [1], "model": "gpt-4"})
    assert missing.status_code in (400, 404)


def test_a_model_without_a_vocabulary_says_so(
    inner_server: Callable[..., InnerServer], tmp_path: Path
) -> None:
    config = replace(tiny_models.LLAMA, context_length=64)
    path = write_gguf(tmp_path / "bare.gguf", llama_metadata(config), random_llama(config))
    with httpx.Client(base_url=inner_server(model=path).url, timeout=30) as http:
        for route, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            reply = http.post(route, json=body)
            assert reply.status_code == 400 and reply.json()["error"]["code"] == "no_vocabulary"

"""Drop-in: code that names other people's models, with any key, on every surface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import AzureOpenAI, OpenAI

from server_process import ServerProcess, start_server

MESSAGES: Any = [{"role": "user", "content": "Say something."}]
GPT, CLAUDE = "gpt-4o", "claude-some-model"


@pytest.fixture(scope="module")
def aliased(chat_model: Path) -> Iterator[ServerProcess]:
    running = start_server(chat_model, "--alias", f"{GPT}=default", "--alias", f"{CLAUDE}=tiny-chat")
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def test_openai(aliased: ServerProcess) -> None:
    with OpenAI(base_url=f"{aliased.url}/v1", api_key="sk-anything", max_retries=0) as client:
        reply = client.chat.completions.create(model=GPT, messages=MESSAGES, max_tokens=2)
        assert reply.model == GPT
        assert [m.id for m in client.models.list().data] == ["tiny-chat", GPT, CLAUDE]
        assert client.models.retrieve(GPT).id == GPT
        with pytest.raises(openai.NotFoundError, match=f"served here: tiny-chat, {GPT}, {CLAUDE}"):
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)


def test_anthropic(aliased: ServerProcess) -> None:
    with Anthropic(base_url=aliased.url, api_key="sk-ant-anything", max_retries=0) as client:
        reply = client.messages.create(model=CLAUDE, messages=MESSAGES, max_tokens=2)
        assert reply.model == CLAUDE
        with client.messages.stream(model=CLAUDE, messages=MESSAGES, max_tokens=2) as stream:
            assert stream.get_final_message().model == CLAUDE
        first = client.models.list(limit=2)
        assert [m.id for m in first.data] == ["tiny-chat", GPT] and first.has_more
        assert [m.id for m in first] == ["tiny-chat", GPT, CLAUDE]  # the client turns the page
        before = client.models.list(before_id=CLAUDE, limit=1)
        assert [m.id for m in before.data] == [GPT] and before.has_more
        assert client.models.retrieve(CLAUDE).display_name == CLAUDE
        with pytest.raises(anthropic.NotFoundError, match=f"served here: tiny-chat, {GPT}, {CLAUDE}"):
            client.messages.create(model="claude-1", messages=MESSAGES, max_tokens=2)


def test_azure(aliased: ServerProcess) -> None:
    with AzureOpenAI(
        azure_endpoint=aliased.url, api_key="anything", api_version="2024-10-21", max_retries=0
    ) as client:
        assert client.chat.completions.create(model=GPT, messages=MESSAGES, max_tokens=2).model == GPT
        with pytest.raises(openai.NotFoundError, match=r"does not exist.*served here") as caught:
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert caught.value.code == "DeploymentNotFound"


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_any_key_on_loopback(aliased: ServerProcess, header: str) -> None:
    value = "Bearer x" if header == "authorization" else "x"
    body = {"model": GPT, "messages": MESSAGES, "max_tokens": 1}
    for path in ("/v1/chat/completions", "/v1/messages"):
        assert httpx.post(aliased.url + path, json=body, headers={header: value}).status_code == 200

"""The server as the AzureOpenAI client sees it, and Azure's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncAzureOpenAI, AzureOpenAI, OpenAI

from server_process import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "Say something."}]
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 12}
VERSION = "2024-10-21"
CHAT = "/openai/deployments/default/chat/completions"


@pytest.fixture(scope="module")
def azure(server: ServerProcess) -> Iterator[AzureOpenAI]:
    with AzureOpenAI(azure_endpoint=server.url, api_key="none", api_version=VERSION, max_retries=0) as client:
        yield client


def chat_text(client: OpenAI, **more: Any) -> str:
    reply = client.chat.completions.create(messages=MESSAGES, **{**GREEDY, **more})
    return reply.choices[0].message.content or ""


def test_chat_is_openais_chat(azure: AzureOpenAI, client: OpenAI) -> None:
    text = chat_text(client)
    assert chat_text(azure) == text != ""
    with azure.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


def test_completions(azure: AzureOpenAI, client: OpenAI) -> None:
    reply = azure.completions.create(prompt="Once", **GREEDY)
    assert reply.choices[0].text == client.completions.create(prompt="Once", **GREEDY).choices[0].text


def test_a_deployment_of_the_client_stands_above_the_model(server: ServerProcess, client: OpenAI) -> None:
    """The deployment in the path counts; `model` in the body is what the code calls it."""
    with AzureOpenAI(
        azure_endpoint=server.url,
        azure_deployment="tiny-chat",
        api_key="none",
        api_version="2099-01-01-preview",
        max_retries=0,
    ) as azure:
        assert chat_text(azure, model="whatever") == chat_text(client)
        assert [m.id for m in azure.models.list().data] == ["tiny-chat"]


def test_async_client_with_a_token(azure: AzureOpenAI, server: ServerProcess) -> None:
    async def one() -> str:
        async with AsyncAzureOpenAI(
            azure_endpoint=server.url, azure_ad_token="t", api_version=VERSION, max_retries=0
        ) as api:
            stream = await api.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    assert asyncio.run(one()) == chat_text(azure)


def test_the_v1_path_is_openais_api(server: ServerProcess, client: OpenAI) -> None:
    with OpenAI(base_url=f"{server.url}/openai/v1/", api_key="none", max_retries=0) as v1:
        assert chat_text(v1) == chat_text(client)
        assert v1.models.retrieve("default").id == "tiny-chat"
        assert v1.completions.create(prompt="Once", **GREEDY).usage is not None
        with pytest.raises(openai.NotFoundError, match="served here: tiny-chat"):
            chat_text(v1, model="gpt-9")


def test_models_and_deployments(azure: AzureOpenAI, http: httpx.Client) -> None:
    assert [m.id for m in azure.models.list().data] == ["tiny-chat"]
    query = {"api-version": VERSION}
    (card,) = http.get("/openai/deployments", params=query).json()["data"]
    assert (card["id"], card["model"], card["status"]) == ("tiny-chat", "tiny-chat", "succeeded")
    assert http.get("/openai/deployments/default", params=query).json()["id"] == "tiny-chat"
    assert http.get("/openai/deployments/none", params=query).json()["error"]["code"] == "DeploymentNotFound"


def test_files_at_both_paths(azure: AzureOpenAI, server: ServerProcess) -> None:
    line = b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}}'
    file = azure.files.create(file=("b.jsonl", line), purpose="batch")
    with OpenAI(base_url=f"{server.url}/openai/v1/", api_key="none", max_retries=0) as v1:
        assert v1.files.retrieve(file.id).bytes == len(line)
    assert azure.files.delete(file.id).deleted


def test_errors_are_azures(azure: AzureOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="served here: tiny-chat") as caught:
        chat_text(azure, model="gpt-9")
    assert caught.value.code == "DeploymentNotFound"
    with pytest.raises(openai.BadRequestError) as bad:
        chat_text(azure, temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="asked for: embeddings") as other:
        azure.embeddings.create(model="default", input="x")
    assert other.value.code == "OperationNotSupported"
    with pytest.raises(openai.NotFoundError, match="asked for: images/generations"):
        azure.images.generate(model="default", prompt="x")


BAD: list[tuple[str, dict[str, str], bytes, str, int]] = [
    # path, query, body, code, status
    (CHAT, {}, b"{}", "404", 404),
    (CHAT, {"api-version": ""}, b"{}", "404", 404),
    ("/openai/models", {}, b"", "404", 404),
    (CHAT, {"api-version": VERSION}, b"{}", "missing_required_parameter", 400),
    (CHAT, {"api-version": VERSION}, b"[", "invalid_json", 400),
    (CHAT, {"api-version": VERSION}, b'{"messages": 5}', "invalid_value", 400),
    (CHAT, {"api-version": VERSION}, b'{"data_sources": []}', "unknown_parameter", 400),
    ("/openai/deployments/a/b/chat/completions", {"api-version": "x"}, b"{}", "DeploymentNotFound", 404),
    ("/openai/deployments/%00/completions", {"api-version": "x"}, b"{}", "DeploymentNotFound", 404),
    ("/openai/deployments//completions", {"api-version": "x"}, b"{}", "DeploymentNotFound", 404),
    ("/openai/deployments/default/audio/speech", {"api-version": "x"}, b"{}", "OperationNotSupported", 404),
    ("/openai/deployments/default", {"api-version": "x"}, b"{}", "OperationNotSupported", 404),
    ("/openai/chat/completions", {"api-version": "x"}, b"{}", "not_found", 404),
    ("/openai/v1/embeddings", {}, b"{}", "not_found", 404),
]


@pytest.mark.parametrize(("path", "query", "body", "code", "status"), BAD)
def test_a_wrong_request_is_told_so(
    http: httpx.Client, path: str, query: dict[str, str], body: bytes, code: str, status: int
) -> None:
    if body:
        reply = http.post(path, params=query, content=body, headers={"content-type": "application/json"})
    else:
        reply = http.get(path, params=query)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code and reply.json()["error"]["message"]

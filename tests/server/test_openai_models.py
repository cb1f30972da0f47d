"""Names of models: the file's, `default`, and the aliases that let a pipeline keep its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import OpenAI

from server_process import InnerServer

HELLO: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def aliased(inner_server: Callable[..., InnerServer]) -> InnerServer:
    return inner_server(aliases={"gpt-4o": "default", "org/some model": "tiny-chat"})


def test_an_alias_is_served_and_shown_as_it_was_asked(aliased: InnerServer) -> None:
    with OpenAI(base_url=f"{aliased.url}/v1", api_key="any", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["tiny-chat", "gpt-4o", "org/some model"]
        card = client.models.retrieve("org/some model")
        assert card.id == "org/some model" and card.model_extra["root"] == "tiny-chat"
        for asked, shown in (("gpt-4o", "gpt-4o"), ("default", "tiny-chat"), ("tiny-chat", "tiny-chat")):
            chat = client.chat.completions.create(model=asked, messages=HELLO, max_tokens=1)
            assert chat.model == shown
            assert client.completions.create(model=asked, prompt="x", max_tokens=1).model == shown
            assert client.responses.create(model=asked, input="x", max_output_tokens=1).model == shown
            stream = client.chat.completions.create(model=asked, messages=HELLO, max_tokens=1, stream=True)
            assert {chunk.model for chunk in stream} == {shown}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/responses/input_tokens", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_an_unknown_name_is_a_404_that_lists_what_there_is(
    aliased: InnerServer, path: str, body: dict[str, Any]
) -> None:
    reply = httpx.post(aliased.url + path, json=body | {"model": "gpt-5"}, timeout=30)
    error = reply.json()["error"]
    assert reply.status_code == 404 and (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-5'; served here: tiny-chat, gpt-4o, org/some model (or default)" in error["message"]

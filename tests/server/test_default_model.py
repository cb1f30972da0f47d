"""The default model on the CPU backend, as a user meets it."""

from __future__ import annotations

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

"""Completions that repeat their prompt and score it: what evaluation harnesses ask for."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI

PROMPT = "Once upon a time there was a fox"
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0}


def test_echo_puts_the_prompt_first(client: OpenAI) -> None:
    plain = client.completions.create(prompt=PROMPT, max_tokens=5, **GREEDY)
    echoed = client.completions.create(prompt=PROMPT, max_tokens=5, echo=True, **GREEDY)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text and echoed.usage == plain.usage
    with client.completions.create(prompt=PROMPT, max_tokens=5, echo=True, stream=True, **GREEDY) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == echoed.choices[0].text


def test_logprobs_of_prompt_and_answer(client: OpenAI) -> None:
    reply = client.completions.create(prompt=PROMPT, max_tokens=3, echo=True, logprobs=2, **GREEDY)
    (choice,) = reply.choices
    probs = choice.logprobs
    count = reply.usage.prompt_tokens + 3
    assert [len(v) for v in (probs.tokens, probs.token_logprobs, probs.top_logprobs, probs.text_offset)] == [
        count
    ] * 4
    assert probs.token_logprobs[0] is None and probs.top_logprobs[0] is None
    assert "".join(probs.tokens) == choice.text
    for i in range(1, count):
        assert probs.token_logprobs[i] < 0 and probs.tokens[i] in probs.top_logprobs[i]
        assert choice.text[probs.text_offset[i] :].startswith(probs.tokens[i])
        best = max(probs.top_logprobs[i].values())
        assert i < count - 3 or probs.token_logprobs[i] == best  # greedy
    own = client.completions.create(prompt=PROMPT, max_tokens=3, logprobs=2, **GREEDY).choices[0].logprobs
    assert probs.token_logprobs[-3:] == own.token_logprobs and probs.tokens[-3:] == own.tokens
    with client.completions.create(
        prompt=PROMPT, max_tokens=3, echo=True, logprobs=2, stream=True, **GREEDY
    ) as stream:
        parts = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
    assert [v for p in parts for v in p.token_logprobs] == probs.token_logprobs
    assert [v for p in parts for v in p.text_offset] == probs.text_offset


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_prompt_is_scored(http: httpx.Client, stream: bool) -> None:
    """max_tokens 0: nothing is generated, nothing is charged as output."""
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    scored = http.post("/v1/completions", json=body).json()
    (choice,) = scored["choices"]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert scored["usage"]["completion_tokens"] == 0
    with_one = http.post("/v1/completions", json=body | {"max_tokens": 1}).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == with_one["logprobs"]["token_logprobs"][:-1]
    if stream:
        text = http.post("/v1/completions", json=body | {"stream": True}).text
        assert PROMPT in text and text.endswith("data: [DONE]\n\n")


def test_a_harness_finds_its_numbers(http: httpx.Client) -> None:
    """The request and the arithmetic of lm-evaluation-harness' local-completions: contexts and continuations
    as token ids, several per request, the last generated token dropped."""
    words = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    batch = [words, words[::-1], words[:4]]
    body = {"prompt": batch, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234, "temperature": 0}
    reply = http.post("/v1/completions", json=body).json()
    for choice, ids in zip(sorted(reply["choices"], key=lambda c: c["index"]), batch, strict=True):
        probs, context = choice["logprobs"], 2
        tokens, tops = probs["token_logprobs"][context:-1], probs["top_logprobs"][context:-1]
        assert len(tokens) == len(ids) - context and sum(tokens) < 0
        assert all(token <= max(top.values()) for token, top in zip(tokens, tops, strict=True))
    alone = http.post("/v1/completions", json=body | {"prompt": batch[1]}).json()["choices"][0]
    assert alone["logprobs"] == next(c for c in reply["choices"] if c["index"] == 1)["logprobs"]


def test_several_choices_echo_each(client: OpenAI) -> None:
    reply = client.completions.create(
        model="default", prompt=[PROMPT, "Second"], n=2, max_tokens=2, echo=True, logprobs=0, seed=1
    )
    assert [c.text.startswith(p) for c, p in zip(reply.choices, [PROMPT] * 2 + ["Second"] * 2, strict=True)]
    assert all(c.logprobs.token_logprobs[0] is None for c in reply.choices)
    assert reply.choices[0].logprobs.token_logprobs[1] == reply.choices[1].logprobs.token_logprobs[1]


def test_offsets_count_characters_not_bytes(client: OpenAI) -> None:
    text = "日本語 é 🦊 end"
    choice = client.completions.create(prompt=text, max_tokens=1, echo=True, logprobs=0, **GREEDY).choices[0]
    offsets = choice.logprobs.text_offset
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == len(text)


def test_best_of_is_n_or_refused(http: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 1, "n": 2, "best_of": 2}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert http.post("/v1/completions", json=body | {"best_of": 3}).json()["error"]["param"] == "best_of"

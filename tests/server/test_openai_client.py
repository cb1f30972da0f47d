"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from server_process import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "Say something."}]
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 12}


def chat_text(client: OpenAI, **more: Any) -> str:
    reply = client.chat.completions.create(messages=MESSAGES, **{**GREEDY, **more})
    return reply.choices[0].message.content


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny-chat" and model.owned_by == "hayai"
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"
    assert client.models.retrieve("default").id == "tiny-chat"
    with pytest.raises(openai.NotFoundError, match="served here: tiny-chat"):
        client.models.retrieve("gpt/4")


def test_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    (choice,) = reply.choices
    assert reply.object == "chat.completion" and reply.model == "tiny-chat"
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint.startswith("hayai-")
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12


def test_chat_stream_is_the_same_text(client: OpenAI) -> None:
    whole = chat_text(client)
    with client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        chunks = list(stream)
    *texts, last, usage = chunks
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in texts) == whole
    assert [c.choices[0].finish_reason for c in texts] == [None] * len(texts)
    assert last.choices[0].finish_reason == "length" and not last.choices[0].delta.content
    assert usage.choices == [] and usage.usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])


def test_stream_without_usage_has_none(client: OpenAI) -> None:
    with client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY) as stream:
        assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_completion_and_stream(client: OpenAI) -> None:
    whole = client.completions.create(prompt="Once upon", **GREEDY)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    with client.completions.create(prompt="Once upon", stream=True, **GREEDY) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completion_default_length_is_sixteen(client: OpenAI) -> None:
    reply = client.completions.create(model="default", prompt="Once", temperature=0)
    assert reply.usage.completion_tokens == 16


def test_async_client_many_at_once(client: OpenAI, server: ServerProcess) -> None:
    """Streams that run together give what each gives alone."""
    prompts = ["red", "green", "blue", "a longer prompt about nothing at all"]
    alone = [client.completions.create(prompt=p, **GREEDY).choices[0].text for p in prompts]

    async def one(api: AsyncOpenAI, prompt: str) -> str:
        stream = await api.completions.create(prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(one(api, p) for p in prompts))

    assert asyncio.run(all_of_them()) == alone


def test_prompts_as_tokens_and_lists(client: OpenAI) -> None:
    by_text = client.completions.create(prompt=["Hello", "World"], **GREEDY)
    assert [c.index for c in by_text.choices] == [0, 1]
    single = [client.completions.create(prompt=p, **GREEDY).choices[0].text for p in ("Hello", "World")]
    assert [c.text for c in by_text.choices] == single
    tokens = client.completions.create(prompt=[10, 20, 30], **GREEDY)
    assert tokens.usage.prompt_tokens == 3
    lists = client.completions.create(prompt=[[10, 20, 30], [7]], **GREEDY)
    assert lists.choices[0].text == tokens.choices[0].text
    assert lists.usage.prompt_tokens == 4 and lists.usage.completion_tokens == 24


def test_choices_differ_and_repeat_with_a_seed(client: OpenAI) -> None:
    def choices(seed: int) -> list[str]:
        reply = client.chat.completions.create(
            model="default", messages=MESSAGES, n=3, seed=seed, temperature=1, max_tokens=8
        )
        assert [c.index for c in reply.choices] == [0, 1, 2]
        assert reply.usage.completion_tokens == 24
        return [c.message.content for c in reply.choices]

    first = choices(5)
    assert len(set(first)) == 3 and choices(5) == first and choices(-9) != first


def test_choices_stream(client: OpenAI) -> None:
    whole = client.completions.create(model="default", prompt="x", n=2, seed=1, temperature=1, max_tokens=6)
    texts = ["", ""]
    reasons: list[str | None] = [None, None]
    with client.completions.create(
        model="default", prompt="x", n=2, seed=1, temperature=1, max_tokens=6, stream=True
    ) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
            reasons[chunk.choices[0].index] = chunk.choices[0].finish_reason
    assert texts == [c.text for c in whole.choices] and reasons == ["length", "length"]


def test_stop_string_cuts_text_and_usage(client: OpenAI) -> None:
    text = chat_text(client)
    stop = text[len(text) // 2 :][:3]
    reply = client.chat.completions.create(messages=MESSAGES, stop=[stop, "\0never"], **GREEDY)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.usage.completion_tokens < 12
    with client.chat.completions.create(messages=MESSAGES, stop=stop, stream=True, **GREEDY) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == reply.choices[0].message.content


def test_chat_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    content = reply.choices[0].logprobs.content
    assert len(content) == 12
    assert b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace")
    for token in content:
        assert len(token.top_logprobs) == 3
        best = token.top_logprobs[0]
        assert best.token == token.token and math.isclose(best.logprob, token.logprob, abs_tol=1e-6)
        assert token.logprob < 0 and [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
    with client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **GREEDY
    ) as stream:
        streamed = [t for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [(t.token, t.logprob) for t in streamed] == [(t.token, t.logprob) for t in content]


def test_chat_logprobs_without_alternatives(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, logprobs=True, **GREEDY)
    assert all(t.top_logprobs == [] and t.logprob < 0 for t in reply.choices[0].logprobs.content)


def test_completion_logprobs(client: OpenAI) -> None:
    reply = client.completions.create(prompt="x", logprobs=2, **GREEDY)
    (choice,) = reply.choices
    probs = choice.logprobs
    assert len(probs.tokens) == len(probs.token_logprobs) == len(probs.top_logprobs) == 12
    assert probs.text_offset[0] == 0 and probs.text_offset == sorted(probs.text_offset)
    assert all(
        len(top) == 2 and token in top for token, top in zip(probs.tokens, probs.top_logprobs, strict=True)
    )
    with client.completions.create(prompt="x", logprobs=2, stream=True, **GREEDY) as stream:
        parts = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
    assert [t for p in parts for t in p.tokens] == probs.tokens
    assert [o for p in parts for o in p.text_offset] == probs.text_offset


def test_logit_bias_forces_a_token(client: OpenAI) -> None:
    reply = client.completions.create(prompt="x", logit_bias={"1000": 100}, logprobs=0, **GREEDY)
    assert len(set(reply.choices[0].logprobs.tokens)) == 1


def test_extensions(client: OpenAI) -> None:
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "timings": True}
    reply = client.chat.completions.create(messages=MESSAGES, extra_body=extra, **GREEDY)
    (timing,) = reply.model_extra["timings"]
    assert timing["output_tokens"] == 12 and timing["prefill_ms"] > 0 and timing["decode_ms"] > 0
    with client.chat.completions.create(
        messages=MESSAGES, stream=True, extra_body={"timings": True}, **GREEDY
    ) as stream:
        last = list(stream)[-1]
    assert last.model_extra["timings"][0]["output_tokens"] == 12


def test_stop_token_ids(client: OpenAI) -> None:
    first = client.completions.create(prompt="x", logprobs=0, **GREEDY)
    forced = {"logit_bias": {"1000": 100}, "stop_token_ids": [1000]}
    reply = client.completions.create(prompt="x", extra_body=forced, **GREEDY)
    assert first.usage.completion_tokens == 12
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens == 0


def test_fields_without_effect_are_accepted(client: OpenAI) -> None:
    assert chat_text(
        client,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
    ) == chat_text(client)


def test_history_with_the_clients_own_message_objects(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    history = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        reply.choices[0].message.model_dump(),
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}],
            "name": "u",
        },
    ]
    again = client.chat.completions.create(messages=history, **GREEDY)
    assert again.usage.prompt_tokens > reply.usage.total_tokens


def test_errors_carry_param_and_code(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat_text(client, temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="served here: tiny-chat") as missing:
        chat_text(client, model="gpt-4")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="only 'function' tools are served"):
        chat_text(client, tools=[{"type": "custom", "custom": {"name": "f"}}])


def test_text_that_is_cut_inside_a_character_still_streams(client: OpenAI) -> None:
    """Every piece of a stream is valid text, whatever tokens a random model picks."""
    with client.completions.create(
        model="default", prompt="é", temperature=1.5, seed=3, max_tokens=64, stream=True
    ) as stream:
        text = "".join(chunk.choices[0].text for chunk in stream)
    whole = client.completions.create(model="default", prompt="é", temperature=1.5, seed=3, max_tokens=64)
    assert text == whole.choices[0].text

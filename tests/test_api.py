"""The Python API, on real files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hayai
from hayai import LLM, Completion, SamplingParams
from hayai.config import ModelConfig
from hayai.errors import RequestError
from hayai.frontend import Prompt
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf

TINY = ModelConfig("llama", 256, 64, 1, 2, 1, 32, 64, 256, 1e-5)
FASTEST = "cpu" if importlib.util.find_spec("hayai._native") else "reference"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_gguf(tmp_path_factory.mktemp("api") / "tiny.gguf", llama_metadata(TINY), random_llama(TINY))
    with LLM(str(path), backend="reference", seed=3) as llm:
        yield llm


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[LLM]:
    with LLM(str(default_model), backend=FASTEST, context_length=512) as llm:
        yield llm


def test_the_package_offers_the_api() -> None:
    assert {"LLM", "SamplingParams", "Completion", "Tool", "ToolCall"} <= set(hayai.__all__)
    assert all(hasattr(hayai, name) for name in hayai.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        hayai.nothing  # noqa: B018


def test_one_prompt_or_several(llm: LLM) -> None:
    one = llm.generate([5, 6, 7], temperature=0, max_tokens=4)
    assert isinstance(one, Completion) and len(one.token_ids) == 4
    several = llm.generate([[5, 6, 7], (8,)], temperature=0, max_tokens=4)
    assert isinstance(several, list) and several[0].token_ids == one.token_ids
    assert llm.generate(Prompt(token_ids=(5, 6, 7)), temperature=0, max_tokens=4).token_ids == one.token_ids
    assert llm.generate([], max_tokens=4) == []


def test_keywords_go_on_top_of_params(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=8, max_tokens=9)
    tokens = llm.generate([5], params).token_ids
    assert len(tokens) == 9 and tokens[2] not in tokens[:2]
    assert llm.generate([5], params, max_tokens=2).token_ids == tokens[:2]
    stopped = llm.generate([5], params, stop_token_ids=tokens[2])
    assert stopped.token_ids == tokens[:2] and stopped.finish_reason == "stop"


def test_stream_gives_the_same_tokens(llm: LLM) -> None:
    whole = llm.generate([5, 9], temperature=0.8, seed=1, max_tokens=12)
    chunks = list(llm.stream([5, 9], temperature=0.8, seed=1, max_tokens=12))
    assert tuple(t for c in chunks for t in c.token_ids) == whole.token_ids
    assert chunks[-1].usage == whole.usage


def test_seeds(llm: LLM) -> None:
    def sample(seed: int | None) -> tuple[int, ...]:
        return llm.generate([5], temperature=1.5, max_tokens=16, seed=seed).token_ids

    assert sample(1) == sample(1) != sample(2)
    assert sample(None) != sample(None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate([5], max_token=3), ["max_token", "max_tokens"]),
        (lambda llm: llm.generate([5], temperature=7), ["temperature", "7"]),
        (lambda llm: llm.generate("text"), ["vocabulary"]),
        (lambda llm: llm.generate(3.5), ["float"]),
        (lambda llm: llm.generate([5, "a"]), ["list of token ids"]),
        (lambda llm: llm.generate([256]), ["256", "255"]),
        (lambda llm: llm.stream([5] * 256), ["256"]),
        (lambda llm: llm.chat([{"role": "user", "content": "a"}]), ["vocabulary"]),
        (lambda llm: llm.generate([5], regex="a", choices=["b"]), ["regex, choices"]),
        (lambda llm: llm.generate([5], regex="a"), ["vocabulary"]),
        (lambda llm: llm.chat([], tools=[{"name": "f"}]), ["tools[0]", "'function'"]),
        (lambda llm: llm.chat([], tools=[hayai.Tool("f")], tool_choice="g"), ["'g'", "f"]),
    ],
)
def test_wrong_calls_say_what_is_wrong(llm: LLM, call: object, words: list[str]) -> None:
    with pytest.raises(RequestError) as info:
        call(llm)  # type: ignore[operator]
    assert all(word in str(info.value) for word in words), str(info.value)


PROGRAM = """
import asyncio, sys
from hayai import LLM
from hayai.frontend import Prompt, SamplingParams

llm = LLM(sys.argv[1], backend=sys.argv[2])
llm.generate([5], max_tokens=3)
half = llm.stream([5], max_tokens=200)
next(half)

async def begin():
    global stream
    stream = llm.frontend.stream(Prompt(token_ids=(5,)), SamplingParams(max_tokens=200))
    await anext(stream)
    await stream.aclose()

if sys.argv[3] == "thread":
    asyncio.run(begin())
print("end")
"""


@pytest.mark.parametrize("driver", ["thread", "caller"])
def test_a_process_ends_cleanly_without_close(tmp_path: Path, driver: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama_metadata(TINY), random_llama(TINY))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), FASTEST, driver],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.model
def test_the_default_model_completes_text(real: LLM) -> None:
    done = real.generate("The capital of France is", temperature=0, max_tokens=5)
    assert done.text.startswith(" Paris") and done.usage.prompt_tokens == 5
    stopped = real.generate("The capital of France is", temperature=0, max_tokens=5, stop="ris")
    assert (stopped.text, stopped.finish_reason, stopped.stop) == (" Pa", "stop", "ris")


@pytest.mark.model
def test_the_default_model_on_the_reference_backend(default_model: Path) -> None:
    with LLM(str(default_model), backend="reference", context_length=64) as llm:
        assert llm.generate("The capital of France is", temperature=0, max_tokens=2).text == " Paris."


@pytest.mark.model
def test_the_default_model_chats(real: LLM) -> None:
    done = real.chat(
        [{"role": "user", "content": "What is 1+1? Answer briefly."}], temperature=0, max_tokens=12
    )
    assert "2" in done.text and "<|" not in done.text
    chunks = list(real.stream("Once upon a time", temperature=0, max_tokens=6))
    together = real.generate(["Once upon a time", "One two three"], temperature=0, max_tokens=6)
    assert "".join(c.text for c in chunks) == together[0].text


@pytest.mark.model
def test_the_default_model_scores_a_prompt(real: LLM) -> None:
    prompt = "The capital of France is Paris"
    done = real.generate(prompt, prompt_logprobs=2, max_tokens=1, temperature=0)
    scores = done.prompt_logprobs
    assert scores is not None and len(scores) == done.usage.prompt_tokens and scores[0] is None
    last = scores[-1]
    assert last is not None and last.token_id == last.top[0][0] and last.logprob > -1.0
    assert real.generate(prompt, max_tokens=1).prompt_logprobs is None


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.model
def test_the_default_model_keeps_to_a_form(real: LLM) -> None:
    class City:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return dict(WEATHER["function"]["parameters"])

    done = real.generate("Where is the tower? As JSON: ", json_schema=City, temperature=0, max_tokens=60)
    assert set(json.loads(done.text)) == {"city"} and done.finish_reason == "stop"
    ask = [{"role": "user", "content": "Is snow white?"}]
    assert real.chat(ask, choices=["yes", "no"], temperature=0).text in ("yes", "no")
    number = "".join(c.text for c in real.stream("A number:", regex="[1-9][0-9]{2}", max_tokens=9, seed=1))
    assert number.isdecimal() and len(number) == 3
    listed = real.generate(["a", "b"], grammar='start: "[" /[a-z]+/ "]"', temperature=0, max_tokens=20)
    assert all(done.text.startswith("[") for done in listed)
    with pytest.raises(RequestError, match=r"json_schema: .*\"not\""):
        real.generate("a", json_schema={"not": {}})


@pytest.mark.model
def test_the_default_model_calls_a_tool(real: LLM) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": 80}
    with pytest.warns(UserWarning, match="knows no tools"):
        done = real.chat(messages, tools=[WEATHER], tool_choice="weather", **sampling)
    (call,) = done.tool_calls
    assert done.finish_reason == "tool_calls" and done.text == ""
    assert call.name == "weather" and set(json.loads(call.arguments)) == {"city"}
    function = {"name": call.name, "arguments": call.arguments}
    messages += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny, 20 degrees"},
    ]
    after = real.chat(messages, **sampling)
    assert after.text and after.usage.prompt_tokens > 60

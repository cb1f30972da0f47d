"""Tool calls, reasoning and grammars from prompt to chunks, on a fake runner and on the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from frontend_fakes import TOKENIZER, MakeFrontend, ids
from hayai.config import EngineConfig
from hayai.engine.request import SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Completion, Frontend, Prompt, TextChunk
from hayai.frontend_request import PLAIN, Constraint, RequestOptions, Tool
from hayai.frontend_text import join_calls, join_chunks
from hayai.load import load_model
from hayai.text.chat import ChatTemplate

GREEDY = SamplingParams(temperature=0.0)
HELLO = ({"role": "user", "content": "hello"},)
WEATHER = Tool(
    "weather",
    "The weather of a city.",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
    },
)
NOW = Tool("now", "The time.")
HERMES = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>{% endfor %}<|im_start|>"
)
THINKING = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<|im_start|>"


def saying(
    make_frontend: MakeFrontend, template: str, answer: str, prompt: Prompt, options: RequestOptions
) -> Frontend:
    """A frontend with this template whose model gives this answer to the prompt."""
    frontend, runner = make_frontend(template=template, **ROOM)
    length, tokens = len(frontend.encode(prompt, options)), ids(answer.encode())
    runner.reply = lambda past: (*tokens, 2)[min(len(past) - length, len(tokens))]
    return frontend


ROOM = {"num_blocks": 256, "max_context": 4096}


async def collect(
    frontend: Frontend, prompt: Prompt, options: RequestOptions, params: SamplingParams = GREEDY
) -> list[TextChunk]:
    async with aclosing(frontend.stream_tokens(prompt, params, options=options)) as stream:
        return [chunk async for chunks in stream for chunk in chunks]


# ---------------------------------------------------------------- routing


async def test_tool_calls_are_streamed_as_deltas(make_frontend: MakeFrontend) -> None:
    answer = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    prompt, options = Prompt(messages=HELLO), RequestOptions(tools=(WEATHER, NOW))
    frontend = saying(make_frontend, HERMES, answer, prompt, options)
    chunks = await collect(frontend, prompt, options)
    whole = join_chunks(chunks)
    assert (whole.text, whole.finish_reason) == ("I look.", "tool_calls")
    assert sum(bool(chunk.tool_calls) for chunk in chunks) > 5
    (call,) = join_calls(whole.tool_calls)
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    assert call.call_id.startswith("call_") and len(call.call_id) == 29
    assert whole.usage is not None and whole.usage.completion_tokens == len(answer)
    assert list(whole.token_ids) == ids(answer.encode())
    encoded = Prompt(token_ids=frontend.encode(prompt, options))
    assert join_chunks(await collect(frontend, encoded, options)).text == "I look."
    (done,) = frontend.generate([prompt], GREEDY, options)
    assert done.finish_reason == "tool_calls" and done.tool_calls[0].arguments == call.arguments


@pytest.mark.parametrize("options", [PLAIN, RequestOptions(tools=(NOW,), tool_choice="none")])
async def test_without_tools_a_call_is_text(make_frontend: MakeFrontend, options: RequestOptions) -> None:
    answer = '<tool_call>{"name": "now"}</tool_call>'
    prompt = Prompt(messages=HELLO)
    frontend = saying(make_frontend, HERMES, answer, prompt, options)
    whole = join_chunks(await collect(frontend, prompt, options))
    assert (whole.text, whole.tool_calls, whole.finish_reason) == (answer, (), "stop")


async def test_a_cut_answer_says_so(make_frontend: MakeFrontend) -> None:
    answer = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
    prompt, options = Prompt(messages=HELLO), RequestOptions(tools=(NOW,))
    frontend = saying(make_frontend, HERMES, answer, prompt, options)
    for length, arguments in ((44, '{"a"'), (20, None)):
        params = SamplingParams(temperature=0, max_tokens=length)
        whole = join_chunks(await collect(frontend, prompt, options, params))
        assert whole.finish_reason == "length"
        assert [call.arguments for call in join_calls(whole.tool_calls)] == ([arguments] if arguments else [])
        assert whole.text == ("" if arguments else answer[:20])


async def test_reasoning_is_apart_where_the_template_marks_it(make_frontend: MakeFrontend) -> None:
    prompt = Prompt(messages=HELLO)
    answer = "<think>\nhm\n</think>\n\nYes."
    frontend = saying(make_frontend, THINKING, answer, prompt, PLAIN)
    whole = join_chunks(await collect(frontend, prompt, PLAIN))
    assert (whole.reasoning, whole.text) == ("hm", "Yes.")
    (done,) = frontend.generate([prompt], GREEDY)
    assert (done.reasoning, done.text) == ("hm", "Yes.")
    again = Prompt(token_ids=frontend.encode(prompt))
    assert join_chunks(await collect(frontend, again, PLAIN)).reasoning == "hm"
    plain = RequestOptions(reasoning=False)
    assert join_chunks(await collect(frontend, prompt, plain)).text == answer
    raw = Prompt(token_ids=tuple(frontend.encode(prompt)))
    assert join_chunks(await collect(frontend, raw, PLAIN)).text == answer, "raw ids are no conversation"


@pytest.mark.parametrize(
    ("ending", "answer", "reasoning", "text"),
    [
        ("<think>\n", "hm</think>Yes.", "hm", "Yes."),
        ("<think>\n\n</think>\n\n", "Yes. <think>", "", "Yes. <think>"),
    ],
)
async def test_reasoning_that_the_prompt_opened_or_closed(
    make_frontend: MakeFrontend, ending: str, answer: str, reasoning: str, text: str
) -> None:
    prompt = Prompt(messages=HELLO)
    frontend = saying(make_frontend, THINKING + ending, answer, prompt, PLAIN)
    whole = join_chunks(await collect(frontend, prompt, PLAIN))
    assert (whole.reasoning, whole.text) == (reasoning, text)


async def test_stop_strings_and_calls(make_frontend: MakeFrontend) -> None:
    answer = 'a<tool_call>{"name": "now"}</tool_call>STOP b'
    prompt, options = Prompt(messages=HELLO), RequestOptions(tools=(NOW,))
    frontend = saying(make_frontend, HERMES, answer, prompt, options)
    params = SamplingParams(temperature=0, stop=("STOP",))
    whole = join_chunks(await collect(frontend, prompt, options, params))
    assert (whole.text, whole.stop, whole.finish_reason) == ("a", "STOP", "stop")
    assert join_calls(whole.tool_calls)[0].name == "now"


# ---------------------------------------------------------------- prompts


def test_tools_in_a_template_that_knows_them(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(template=HERMES, **ROOM)
    warnings: list[str] = []
    text = frontend.decode(
        frontend.encode(Prompt(messages=HELLO), RequestOptions(tools=(WEATHER, NOW)), warnings)
    )
    assert warnings == []
    tools = json.loads(text.split("<|im_start|>")[0])
    assert [tool["function"]["name"] for tool in tools] == ["weather", "now"]
    assert tools[0]["type"] == "function" and tools[0]["function"]["parameters"] == WEATHER.parameters
    assert tools[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    hidden = frontend.encode(Prompt(messages=HELLO), RequestOptions(tools=(WEATHER,), tool_choice="none"))
    assert hidden == frontend.encode(Prompt(messages=HELLO))


CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather and time?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
            {"id": "b", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "noon"}]},
)


def test_tools_in_a_template_that_knows_none(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(**ROOM)
    warnings: list[str] = []
    prompt = Prompt(messages=CONVERSATION)
    text = frontend.decode(frontend.encode(prompt, RequestOptions(tools=(WEATHER, NOW)), warnings))
    assert len(warnings) == 1 and "knows no tools" in warnings[0]
    system, user, assistant, results, _ = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n# Tools") and '"name": "weather"' in system
    assert user == "user\nWeather and time?<|im_end|>"
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in assistant
    assert results == (
        "user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>"
    )
    without = frontend.decode(frontend.encode(prompt))
    assert "# Tools" not in without and "<tool_response>\nnoon" in without
    bare = frontend.decode(frontend.encode(Prompt(messages=HELLO), RequestOptions(tools=(NOW,))))
    assert bare.startswith("<|im_start|>system\n# Tools")


def test_ids_of_calls_for_mistral(make_frontend: MakeFrontend) -> None:
    template = (
        "{% if tools %}{% endif %}[TOOL_CALLS]{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}({{ c.id }}){% endfor %}"
        "{% if m.role == 'tool' %}[{{ m.tool_call_id }}]{% endif %}{% endfor %}"
    )
    frontend, _ = make_frontend(template=template)
    text = frontend.decode(frontend.encode(Prompt(messages=CONVERSATION)))
    calls = [text.split("(")[i].split(")")[0] for i in (1, 2)]
    assert calls[0] != calls[1] and all(f"[{call}]" in text for call in calls)


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[Frontend]:
    with Frontend(load_model(EngineConfig(model=str(default_model), context_length=1024))) as frontend:
        yield frontend


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 3},
        "address": {
            "anyOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 30}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            ]
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
ASK = Prompt(messages=({"role": "user", "content": "Describe a person as JSON."},))
WHERE = Prompt(messages=({"role": "user", "content": "What is the weather in Paris?"},))


def ask(frontend: Frontend, prompt: Prompt, options: RequestOptions, **params: Any) -> Completion:
    return frontend.generate([prompt], SamplingParams(**{"max_tokens": 250} | params), options)[0]


@pytest.mark.model
@pytest.mark.parametrize("seed", [None, 1, 2, 3, 4])
def test_answers_are_valid_for_their_schema(real: Frontend, seed: int | None) -> None:
    options = RequestOptions(constraint=Constraint("json_schema", PERSON))
    done = ask(real, ASK, options, temperature=0.0 if seed is None else 1.3, seed=seed)
    assert done.finish_reason == "stop", done
    jsonschema.validate(json.loads(done.text), PERSON)


@pytest.mark.model
def test_answers_that_are_cut_are_a_beginning(real: Frontend) -> None:
    options = RequestOptions(constraint=Constraint("json_schema", PERSON))
    whole = ask(real, ASK, options, temperature=0.0)
    for length in (1, 2, 9):
        cut = ask(real, ASK, options, temperature=0.0, max_tokens=length)
        assert cut.finish_reason == "length" and whole.text.startswith(cut.text)
        assert cut.token_ids == whole.token_ids[:length]


@pytest.mark.model
def test_the_other_kinds_of_constraint(real: Frontend) -> None:
    def answer(kind: Any, value: Any = None, **kw: Any) -> str:
        options = RequestOptions(constraint=Constraint(kind, value))
        return ask(real, ASK, options, **{"temperature": 1.0, "seed": 5} | kw).text

    assert isinstance(json.loads(answer("json", temperature=0.0)), dict)
    assert answer("choice", ["red", "green"]) in ("red", "green")
    assert answer("regex", r"\d{3}-\d{4}").replace("-", "").isdecimal()
    assert answer("grammar", 'start: "<" /[a-z]{1,5}/ ">"').startswith("<")


@pytest.mark.model
async def test_constrained_and_free_requests_share_a_batch(real: Frontend, default_model: Path) -> None:
    import asyncio

    with Frontend(load_model(EngineConfig(model=str(default_model), context_length=512))) as frontend:
        constrained = RequestOptions(constraint=Constraint("json_schema", PERSON))
        kinds = [PLAIN, constrained, PLAIN, constrained]
        params = SamplingParams(temperature=0.0, max_tokens=60)
        answers = await asyncio.gather(*(collect(frontend, ASK, kind, params) for kind in kinds))
    texts = [join_chunks(chunks).text for chunks in answers]
    assert texts[0] == texts[2] and texts[1] == texts[3]
    for kind, text in zip(kinds, texts, strict=True):
        assert ask(real, ASK, kind, temperature=0.0, max_tokens=60).text == text


@pytest.mark.model
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_required_call_is_always_valid(real: Frontend, seed: int | None) -> None:
    sampling = {"temperature": 0.0 if seed is None else 1.3, "seed": seed}
    options = RequestOptions(tools=(WEATHER, NOW), tool_choice="required", parallel_tools=False)
    done = ask(real, WHERE, options, **sampling)
    assert (done.text, done.finish_reason, len(done.tool_calls)) == ("", "tool_calls", 1)
    tool = {"weather": WEATHER, "now": NOW}[done.tool_calls[0].name]
    jsonschema.validate(json.loads(done.tool_calls[0].arguments), dict(tool.parameters))
    forced = ask(real, WHERE, RequestOptions(tools=(NOW, WEATHER), forced_tool="weather"), **sampling)
    assert [call.name for call in forced.tool_calls] == ["weather"]
    jsonschema.validate(json.loads(forced.tool_calls[0].arguments), dict(WEATHER.parameters))


FORMAT_TEMPLATES = {
    "hermes": "<tool_call>",
    "xml": "<tool_call><function=",
    "glm": "<tool_call><arg_key>",
    "mistral": "[TOOL_CALLS]",
    "named": "[TOOL_CALLS][ARGS]",
    "llama3": "<|python_tag|>",
    "json": "",
}


BOOK = Tool(
    "book",
    "Books a table.",
    {
        "type": "object",
        "properties": {
            "place": {"type": "string", "enum": ["roof", "garden"]},
            "guests": {"type": "integer", "minimum": 1, "maximum": 9},
            "outside": {"type": "boolean"},
        },
        "required": ["place", "guests"],
    },
    strict=True,
)


@pytest.mark.model
@pytest.mark.parametrize("name", FORMAT_TEMPLATES)
def test_required_calls_in_every_format(default_model: Path, name: str) -> None:
    template = f"{{% if tools %}}{{% endif %}}{{# {FORMAT_TEMPLATES[name]} #}}" + CHATML
    loaded = load_model(EngineConfig(model=str(default_model), context_length=512))
    with Frontend(replace(loaded, chat_template=ChatTemplate(template))) as frontend:
        for seed in (None, 7, 8):
            options = RequestOptions(tools=(BOOK,), tool_choice="required", parallel_tools=False)
            sampling: dict[str, Any] = {"temperature": 0.0 if seed is None else 1.2, "seed": seed}
            done = ask(frontend, WHERE, options, **sampling)
            assert (done.text, done.finish_reason, len(done.tool_calls)) == ("", "tool_calls", 1), done
            jsonschema.validate(json.loads(done.tool_calls[0].arguments), dict(BOOK.parameters))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        (RequestOptions(constraint=Constraint("json_schema", {"not": {}})), "response_format", '"not"'),
        (RequestOptions(constraint=Constraint("regex", "(", "guided_regex")), "guided_regex", "unclosed"),
        (RequestOptions(tools=(Tool("f", "", {"uniqueItems": True}, True),)), "tools", "uniqueItems"),
    ],
)
async def test_what_can_not_be_enforced_is_refused(
    make_frontend: MakeFrontend, options: RequestOptions, param: str, words: str
) -> None:
    frontend, runner = make_frontend(**ROOM)
    with pytest.raises(RequestError, match=words) as info:
        await collect(frontend, Prompt(messages=HELLO), options)
    assert info.value.param == param and runner.steps == []


def test_a_tool_that_is_not_strict_is_kept_to_what_can_be(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(**ROOM)
    options = RequestOptions(tools=(Tool("f", "", {"uniqueItems": True}),), tool_choice="required")
    warnings: list[str] = []
    frontend.iterate(Prompt(messages=HELLO), GREEDY, options, warnings).close()
    assert any("f are not kept to its schema" in warning for warning in warnings)


def test_no_vocabulary_no_grammar(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(vocabulary=False)
    with pytest.raises(RequestError, match="no vocabulary"):
        frontend.iterate(Prompt(token_ids=(5,)), GREEDY, RequestOptions(constraint=Constraint("json")))
    assert TOKENIZER is not None


# ---------------------------------------------------------------- grammars that fail on the way

EXPLODES = Constraint("regex", "((a{1,100}){1,100}){1,100}", "guided_regex")
"""Compiles, and needs too many states once some tens of characters have been written."""


@pytest.mark.parametrize("tools", [(), (NOW,)])
async def test_a_grammar_that_fails_on_the_way_is_the_request_s_fault(
    make_frontend: MakeFrontend, tools: tuple[Tool, ...]
) -> None:
    prompt, options = Prompt(messages=HELLO), RequestOptions(constraint=EXPLODES, tools=tools)
    frontend = saying(make_frontend, HERMES, "a" * 200, prompt, options)
    written: list[TextChunk] = []
    with pytest.raises(RequestError, match="can't be followed further") as caught:
        async with aclosing(frontend.stream_tokens(prompt, GREEDY, options=options)) as stream:
            async for chunks in stream:
                written += chunks
    assert (caught.value.param, caught.value.code) == ("guided_regex", "invalid_grammar")
    assert 5 < len(join_chunks(written).token_ids) < 200, "what came before it was given out"
    with pytest.raises(RequestError, match="can't be followed further"):
        frontend.generate([prompt], GREEDY, options)
    (plain,) = frontend.generate([prompt], SamplingParams(temperature=0, max_tokens=5))
    assert plain.text == "aaaaa"

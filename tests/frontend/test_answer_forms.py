"""What the grammars of tool calls, free text and reasoning let through, for every format of tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tool_call_forms import Call, glm, hermes, json_list, llama3, mistral_named, xml

from frontend_fakes import CONTROL, MERGES, MakeFrontend, byte_letters
from hayai.errors import RequestError
from hayai.frontend import Prompt
from hayai.frontend_answer import AnswerForms
from hayai.frontend_request import Constraint, RequestOptions, Tool
from hayai.text.chat import ChatTemplate
from hayai.text.tokenizer import Tokenizer

CITY = Tool(
    "city",
    "",
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
        "required": ["name", "size"],
    },
    strict=True,
)
NOW = Tool("now")
TOOLS = (CITY, NOW)
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>")

MARKS = {
    "hermes": "<tool_call>",
    "xml": "<tool_call><function=",
    "glm": "<tool_call><arg_key>",
    "mistral": "[TOOL_CALLS]",
    "named": "[TOOL_CALLS][ARGS]",
    "llama3": "<|python_tag|>",
    "json": "",
}
WRITERS: dict[str, Any] = {
    "hermes": hermes,
    "xml": xml,
    "glm": glm,
    "mistral": lambda calls: "[TOOL_CALLS]" + json.dumps([_call(c, "arguments") for c in calls]),
    "named": mistral_named,
    "llama3": llama3,
    "json": lambda calls: json_list(calls) if len(calls) > 1 else json.dumps(_call(calls[0], "arguments")),
}
GOOD: list[Call] = [
    ("city", {"name": "Rome </x>", "size": 3, "kind": "b"}),
    ("now", {}),
    ("city", {"name": "", "size": 0}),
]
BAD: list[Call] = [
    ("city", {"size": 3}),
    ("city", {"name": "x", "size": "three"}),
    ("city", {"name": "x", "size": 3, "kind": "c"}),
    ("city", {"name": "x", "size": 3, "more": 1}),
    ("nobody", {}),
    ("now", {"a": 1}),
]


def _call(call: Call, key: str) -> dict[str, Any]:
    return {"name": call[0], key: call[1]}


def _tokenizer(control: tuple[str, ...]) -> Tokenizer:
    tokens = [*CONTROL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES), *control]
    tokenizer = Tokenizer.from_metadata({
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3 - len(control)) + [3] * len(control),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    })  # fmt: skip
    assert tokenizer is not None
    return tokenizer


TOKENIZERS = {"text": _tokenizer(()), "control": _tokenizer(MARKERS)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Iterator[Tokenizer]:
    """Markers as ordinary text, and as control tokens."""
    yield TOKENIZERS[request.param]


class Accepts:
    """Whether an answer passes the grammar of `options`, and can end there."""

    def __init__(self, make: MakeFrontend, tokenizer: Tokenizer, template: str, tail: str = "") -> None:
        frontend, _ = make()
        source = f"{{% if tools %}}{{% endif %}}{{# {template} #}}" if template is not None else ""
        loaded = replace(frontend.loaded, tokenizer=tokenizer, chat_template=ChatTemplate(source))
        self.forms = AnswerForms(loaded)
        self.tokenizer = tokenizer
        self.prompt = Prompt(messages=({"role": "user", "content": "x"},))
        self.ids = tokenizer.encode("x" + tail, special=True)

    def __call__(self, options: RequestOptions, text: str) -> bool:
        mask = self.forms.form(self.prompt, self.ids, options, None).mask
        assert mask is not None
        try:
            for token in self.tokenizer.encode(text, special=True):
                mask.accept(token)
        except ValueError:
            return False
        return mask.complete


REQUIRED = RequestOptions(tools=TOOLS, tool_choice="required")


@pytest.mark.parametrize("name", MARKS)
def test_required_calls(make_frontend: MakeFrontend, tokenizer: Tokenizer, name: str) -> None:
    accepts, write = Accepts(make_frontend, tokenizer, MARKS[name]), WRITERS[name]
    for calls in (GOOD[:1], GOOD[1:2], GOOD):
        assert accepts(REQUIRED, write(calls)), write(calls)
    for bad in BAD:
        assert not accepts(REQUIRED, write([bad])), write([bad])
    for text in ("", "Hello", write(GOOD[:1]) + "x", "x" + write(GOOD[:1])):
        assert not accepts(REQUIRED, text), text
    one = RequestOptions(tools=TOOLS, tool_choice="required", parallel_tools=False)
    assert accepts(one, write(GOOD[:1])) and not accepts(one, write(GOOD))
    forced = RequestOptions(tools=TOOLS, forced_tool="now")
    assert accepts(forced, write(GOOD[1:2])) and not accepts(forced, write(GOOD[:1]))


@pytest.mark.parametrize("name", MARKS)
def test_strict_tools_leave_text_free(make_frontend: MakeFrontend, tokenizer: Tokenizer, name: str) -> None:
    accepts, write = Accepts(make_frontend, tokenizer, MARKS[name]), WRITERS[name]
    auto = RequestOptions(tools=TOOLS)
    assert accepts(auto, "Hello < you [all]\nand so on") and accepts(auto, write(GOOD[:1]))
    for bad in BAD:
        assert not accepts(auto, write([bad])), write([bad])
    if name not in ("llama3", "json"):
        assert accepts(auto, "I look.\n" + write(GOOD[:1])), "text before"
        one = RequestOptions(tools=TOOLS, parallel_tools=False)
        assert accepts(one, "I look.\n" + write(GOOD[:1])) and accepts(one, "I look.")
    if name != "mistral":
        assert accepts(auto, write(GOOD))


def test_a_form_or_a_call(make_frontend: MakeFrontend, tokenizer: Tokenizer) -> None:
    accepts = Accepts(make_frontend, tokenizer, MARKS["hermes"])
    options = RequestOptions(tools=TOOLS, constraint=Constraint("choice", ["yes", "no"]))
    assert accepts(options, "yes") and accepts(options, hermes(GOOD[:1]))
    assert not accepts(options, "maybe") and not accepts(options, hermes(BAD[:1]))
    must = replace(options, tool_choice="required")
    assert accepts(must, hermes(GOOD[:1])) and not accepts(must, "yes")


@pytest.mark.parametrize(
    ("tail", "good", "bad"),
    [
        (
            "",
            ["<think>hm < \n</think>\n\nyes", "yes"],
            ["<think>hm", "hm</think>yes", "<think></think>maybe"],
        ),
        ("<think>\n", ["hm</think>\nyes", "</think>no"], ["yes", "hm</think>", "hm</think>maybe"]),
        ("<think>\n\n</think>\n\n", ["yes"], ["<think></think>yes"]),
    ],
)
def test_reasoning_comes_before_the_form(
    make_frontend: MakeFrontend, tokenizer: Tokenizer, tail: str, good: list[str], bad: list[str]
) -> None:
    accepts = Accepts(make_frontend, tokenizer, "</think>", tail)
    options = RequestOptions(constraint=Constraint("choice", ["yes", "no"]))
    assert [text for text in good if not accepts(options, text)] == []
    assert [text for text in bad if accepts(options, text)] == []


def test_what_a_tagged_format_can_not_enforce(make_frontend: MakeFrontend) -> None:
    accepts = Accepts(make_frontend, TOKENIZERS["text"], MARKS["glm"])
    for schema, words in (
        ({"properties": {"a": {"type": "string", "pattern": "x+"}}}, "pattern of a"),
        ({"anyOf": [{"properties": {}}]}, "anyOf"),
    ):
        tool = Tool("f", "", schema, strict=True)
        with pytest.raises(RequestError, match=words) as info:
            accepts(RequestOptions(tools=(tool,)), "")
        assert info.value.param == "tools"
        warnings: list[str] = []
        loose = RequestOptions(tools=(replace(tool, strict=False),), tool_choice="required")
        accepts.forms.form(accepts.prompt, accepts.ids, loose, warnings)
        assert len(warnings) == 1 and words in warnings[0]

"""Answers taken apart while they stream: whatever the pieces, the same parts, and no half tag."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tool_call_forms import FORMS, Call, hermes

from hayai.config import read_environment
from hayai.text.router import CallPiece, Router
from hayai.text.tool_formats import FORMATS, ToolFormat

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {"type": "object", "properties": {}},
}
CALLS: list[Call] = [
    ("weather", {"city": 'São "Paulo" </tool_cal', "days": 3}),
    ("now", {}),
    ("weather", {"city": "a\nb", "days": [1, {"x": None}]}),
]
THINK = ("<think>", "</think>")
BY_NAME = {form.name: form for form in FORMATS}


def cut(text: str, random_: random.Random) -> Iterator[str]:
    at = 0
    while at < len(text):
        size = random_.choice([1, 1, 2, 3, 5, 8, 40])
        yield text[at : at + size]
        at += size


def route(
    pieces: Sequence[str] | Iterator[str],
    form: ToolFormat | None,
    thinking: tuple[str, str, bool] | None = None,
    tools: dict[str, dict[str, Any]] = TOOLS,
) -> tuple[str, str, list[tuple[str, str]]]:
    """(text, reasoning, calls) of a whole answer."""
    router = Router(thinking, form, tools)
    parts = [router.push(piece) for piece in pieces]
    parts.append(router.flush())
    calls: list[tuple[str, str]] = []
    for piece in (piece for part in parts for piece in part.calls):
        _add(calls, piece)
    assert router.num_calls == len(calls)
    return "".join(p.text for p in parts), "".join(p.reasoning for p in parts), calls


def _add(calls: list[tuple[str, str]], piece: CallPiece) -> None:
    if piece.number == len(calls):
        assert piece.name is not None, "the first piece of a call has its name"
        calls.append((piece.name, piece.arguments))
    else:
        assert piece.name is None and piece.number == len(calls) - 1 and piece.arguments
        calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)


def parsed(calls: list[tuple[str, str]]) -> list[Call]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


WRITERS = [(BY_NAME[name], writer) for name, writers in FORMS.items() for writer in writers]


@pytest.mark.parametrize(("form", "write"), WRITERS, ids=lambda x: getattr(x, "name", None) or x.__name__)
@pytest.mark.parametrize("number", [1, 3])
def test_every_form_in_any_pieces(
    form: ToolFormat, write: Callable[[Sequence[Call]], str], number: int
) -> None:
    random_ = random.Random(5)
    text = write(CALLS[:number])
    for before in ["", "\n", "Let me see.\n\n"] if not form.bare or text[0] == "<" else ["", " \n"]:
        for _ in range(60):
            shown, reasoning, calls = route(cut(before + text + "\n", random_), form)
            assert parsed(calls) == CALLS[:number]
            assert (shown, reasoning) == (before.rstrip(), "")


def test_arguments_stream_as_they_are_written() -> None:
    router = Router(None, BY_NAME["hermes"], TOOLS)
    seen = [router.push(char).calls for char in hermes(CALLS[:1])]
    pieces = [piece for calls in seen for piece in calls]
    assert len(pieces) > 30 and pieces[0] == CallPiece(0, "weather", "{")
    assert json.loads("".join(p.arguments for p in pieces)) == CALLS[0][1]


# ---------------------------------------------------------------- what is no call


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call> and on'),
        ("hermes", "<tool_call>no json</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "argu'),
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_cal"),
        ("hermes", "a < b and <tool and </tool_call> "),
        ("hermes", '{"name": "now", "arguments": {}}'),
        ("llama3", '{"answer": 42}'),
        ("llama3", '{"name": "Ann", "age": 3}'),
        ("llama3", '{"name": "nobody", "parameters": {}}'),
        ("llama3", 'As JSON: {"name": "now", "parameters": {}}'),
        ("llama3", '<|python_tag|>brave_search.call(query="x")'),
        ("llama3", "{"),
        ("llama3", "  "),
        ("mistral", "[TOOL_CALLS] nothing"),
        ("mistral", '[TOOL_CALLS][{"name": "nobody", "arguments": {}}]'),
        ("mistral", "[TOOL_CALLS]nobody[ARGS]{}"),
        ("mistral", "[TOOL_"),
        ("glm", "<tool_call>nobody\n</tool_call>"),
        ("glm", "<tool_call>weather\n<arg_key>city</arg_key> oh no</tool_call>"),
        ("xml", "<tool_call>\n<function=now>\nnothing closes"),
        ("xml", "<tool_call><function=nobody></function></tool_call>"),
        ("json", "[1, 2, 3]"),
        ("json", '[{"a": 1}]'),
        ("json", "<|tool_call|>x<|/tool_call|>"),
    ],
)
def test_what_is_no_call_is_text_to_the_letter(name: str, text: str) -> None:
    for seed in range(30):
        assert route(cut(text, random.Random(seed)), BY_NAME[name]) == (text, "", [])


@pytest.mark.parametrize(
    ("name", "text", "shown", "calls"),
    [
        # the last brace is forgotten
        ("hermes", '<tool_call>{"name": "now", "arguments": {}</tool_call> ok', " ok", [("now", "{}")]),
        # the closing tag is forgotten
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}', "", [("now", "{}")]),
        # the answer was cut
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a', "", [("now", '{"a')]),
        # no JSON any more: the arguments are what the model wrote
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a": oh}}</tool_call>!',
            "!",
            [("now", '{"a": oh}}')],
        ),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("now", '{"a": 1}')],
        ),
        (
            "hermes",
            '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}</tool_call>',
            "",
            [("now", "{}")],
        ),
        ("mistral", '[TOOL_CALLS]now{"a": 1}', "", [("now", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS] [{"arguments": {}, "name": "now"}]', None, []),
        (
            "hermes",
            'x <tool_call>{"name": "nobody", "arguments": {}}</tool_call>'
            '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
            'x <tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
            [("now", "{}")],
        ),
    ],
)
def test_what_models_get_wrong(name: str, text: str, shown: str | None, calls: list[tuple[str, str]]) -> None:
    for seed in range(30):
        assert route(cut(text, random.Random(seed)), BY_NAME[name]) == (
            text if shown is None else shown, "", calls,
        )  # fmt: skip


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    ("opened", "text", "shown", "reasoning"),
    [
        (True, "hm, so\n</think>\n\nYes.", "Yes.", "hm, so"),
        (False, "<think>\nhm\n</think>\n\nYes.", "Yes.", "hm"),
        (False, "\n<think>hm</think>Yes.", "Yes.", "hm"),
        (False, "No <think>hm</think>", "No <think>hm</think>", ""),
        (False, "<thin", "<thin", ""),
        (False, "<think>", "", ""),
        (True, "cut off </thi", "", "cut off </thi"),
        (True, "</think>Yes </think>", "Yes </think>", ""),
        (True, "a </think", "", "a </think"),
        (False, "", "", ""),
    ],
)
def test_reasoning(opened: bool, text: str, shown: str, reasoning: str) -> None:
    for seed in range(20):
        assert route(cut(text, random.Random(seed)), None, (*THINK, opened)) == (shown, reasoning, [])


def test_reasoning_then_text_then_calls() -> None:
    text = f"Think: <tool_call>?</think>\nI look.\n{hermes(CALLS)}"
    for seed in range(50):
        shown, reasoning, calls = route(cut(text, random.Random(seed)), BY_NAME["hermes"], (*THINK, True))
        assert (shown, reasoning) == ("I look.", "Think: <tool_call>?")
        assert parsed(calls) == CALLS


# ---------------------------------------------------------------- any text

TAGS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>", "\n",
    '{"name": "now", "arguments": {', '"city": "x"', "}", "}}", "[", "]", ", ", ";", "now", "weather", "<",
    "<arg_key>city</arg_key>", "<arg_value>x</arg_value>", "<function=now>", "</function>", "{}", " ", "é",
    "<parameter=city>x</parameter>", '{"name": "now", "parameters": {}}', "\\", '"', "text ",
]  # fmt: skip
ANSWERS = st.lists(st.sampled_from(TAGS) | st.text(max_size=4), max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(ANSWERS, st.sampled_from(sorted(BY_NAME)), st.booleans(), st.integers(0, 2**32))
@example('{"name": "now", "arguments": {}}\n{', "json", True, 0)
def test_the_pieces_make_no_difference(text: str, name: str, opened: bool, seed: int) -> None:
    form = BY_NAME[name]
    once = route([text], form, (*THINK, opened))
    assert route(cut(text, random.Random(seed)), form, (*THINK, opened)) == once
    assert route(list(text), form, (*THINK, opened)) == once


@settings(max_examples=400, deadline=None)
@given(ANSWERS, st.sampled_from(sorted(BY_NAME)))
def test_without_calls_nothing_is_lost_or_made_up(text: str, name: str) -> None:
    shown, _, calls = route([text], BY_NAME[name])
    if not calls:
        assert shown == text


# ---------------------------------------------------------------- BFCL


def bfcl() -> Iterator[tuple[dict[str, dict[str, Any]], list[Call]]]:
    """(tools, the calls of the ground truth) of the Berkeley Function-Calling Leaderboard's questions."""
    data = read_environment().data
    if data is None or not (data / "bfcl").exists():
        pytest.skip("needs bfcl below HAYAI_DATA")
    for path in sorted((data / "bfcl" / "answers").glob("*.jsonl.gz")):
        if "multi_turn" in path.name:
            continue
        with gzip.open(data / "bfcl" / "questions" / path.name, "rt", encoding="utf-8") as lines:
            questions = {row["id"]: row for row in map(json.loads, lines)}
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                tools = {tool["name"]: tool["parameters"] for tool in questions[row["id"]]["function"]}
                yield tools, [_first(call) for call in row["ground_truth"]]


def _first(call: dict[str, dict[str, list[Any]]]) -> Call:
    """A call with the first accepted value of every argument; "" stands for one that may be left out."""
    ((name, arguments),) = call.items()
    return name, {key: values[0] for key, values in arguments.items() if values[:1] not in ([], [""])}


def test_bfcl_in_every_form() -> None:
    random_ = random.Random(0)
    count = 0
    for tools, truth in bfcl():
        for form, write in WRITERS:
            if form.name in ("glm", "xml"):
                # Strings stand without quotes there, so the schema decides what is one.
                tools_here = {name: _as_written(tools[name], truth) for name, _ in truth}
            else:
                tools_here = tools
            shown, _, calls = route(cut(write(truth), random_), form, None, tools_here)
            assert (shown, parsed(calls)) == ("", truth), write(truth)
            count += 1
    assert count > 10_000


def _as_written(schema: dict[str, Any], truth: list[Call]) -> dict[str, Any]:
    strings = {key for _, arguments in truth for key, value in arguments.items() if isinstance(value, str)}
    return {"type": "object", "properties": {key: {"type": "string"} for key in strings}}

"""docs/parameters.md against the code: every field of every body, with the word that is true of it."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from hayai.server import anthropic, batches, openai, responses, tokens
from hayai.server.bodies import FieldTable

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parameters.md"
WORDS = ("served", "extension", "told", "refused")

BODIES: dict[str, tuple[type[BaseModel], FieldTable]] = {
    "POST /v1/chat/completions": (openai.ChatRequest, openai.CHAT_FIELDS),
    "POST /v1/completions": (openai.CompletionRequest, openai.COMPLETION_FIELDS),
    "POST /v1/messages": (anthropic.MessagesRequest, anthropic.FIELDS),
    "POST /v1/messages/count_tokens": (anthropic.CountTokensRequest, anthropic.FIELDS),
    "POST /v1/responses": (responses.ResponsesRequest, responses.FIELDS),
    "POST /tokenize": (tokens.TokenizeRequest, FieldTable()),
    "POST /detokenize": (tokens.DetokenizeRequest, FieldTable()),
    "POST /v1/batches": (batches.BatchRequest, FieldTable()),
}
"""Heading of the page -> the model and the table of that body."""

# What an official client can send: its parameters, without those that it puts into headers.
HEADERS = {"betas", "user_profile_id", "workspace_id"}
CLIENTS: list[tuple[str, Any]] = [
    ("POST /v1/chat/completions", chat_create_params.CompletionCreateParamsBase),
    ("POST /v1/completions", completion_create_params.CompletionCreateParamsBase),
    ("POST /v1/responses", response_create_params.ResponseCreateParamsBase),
    ("POST /v1/messages", message_create_params.MessageCreateParamsBase),
    ("POST /v1/messages", beta_message_create_params.MessageCreateParamsBase),
    ("POST /v1/messages/count_tokens", message_count_tokens_params.MessageCountTokensParams),
]


def sections() -> dict[str, dict[str, str]]:
    """Heading -> parameter -> word, of the first table below each `## ` heading."""
    found: dict[str, dict[str, str]] = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", text.split("\n### ")[0], re.M)
        names = [name for name, _ in rows]
        assert len(names) == len(set(names)), f"{heading} has a parameter twice"
        found[heading] = dict(rows)
    return found


SECTIONS = sections()


def fields(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """Paths of a model's fields, those of the models inside it too."""
    for name, info in model.model_fields.items():
        path = before + (info.alias or name)
        yield path
        for inner in _models(info.annotation):
            yield from fields(inner, path + ".")


def _models(annotation: Any) -> list[type[BaseModel]]:
    kinds = [annotation, *typing.get_args(annotation)]
    return [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]


@pytest.mark.parametrize("heading", BODIES)
def test_every_field_is_on_the_page_with_the_right_word(heading: str) -> None:
    model, table = BODIES[heading]
    rows = SECTIONS[heading]
    wanted = {*fields(model), *table.warned, *table.refused}
    assert sorted(wanted - set(rows)) == [], "missing on the page"
    assert sorted(set(rows) - wanted) == [], "on the page, and not in the code"
    assert {name: rows[name] for name in table.warned} == dict.fromkeys(table.warned, "told")
    assert {name: rows[name] for name in table.refused} == dict.fromkeys(table.refused, "refused")
    top = {name: rows[name] for name in model.model_fields}
    assert {n: w for n, w in top.items() if w not in ("served", "extension")} == {}
    assert set(rows.values()) <= set(WORDS)


@pytest.mark.parametrize(
    ("heading", "params"), CLIENTS, ids=lambda v: v if isinstance(v, str) else v.__module__
)
def test_the_official_clients_have_no_parameter_that_the_page_lacks(heading: str, params: Any) -> None:
    there = set(params.__annotations__) - HEADERS
    assert sorted(there - set(SECTIONS[heading])) == []


@pytest.mark.parametrize("heading", BODIES)
def test_values_that_ask_for_nothing_are_on_the_page(heading: str) -> None:
    """`fine: ...` has as many values as the table, for the endpoints whose notes are not 'as above'."""
    _, table = BODIES[heading]
    text = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for name, (_, harmless) in {**table.warned, **table.refused}.items():
        note = re.search(rf"^\| `{name}` \| \w+ \| ?(.*)\|$", text, re.M)
        assert note is not None
        if heading != "POST /v1/messages/count_tokens":
            shown = re.findall(r"`[^`]*`", note[1].partition("fine: ")[2])
            assert len(shown) == len(harmless), f"{name}: {note[1]}"


def page_of_the_api() -> str:
    return PAGE.with_name("api.md").read_text()


def test_every_code_of_an_error_is_on_the_page_of_the_api() -> None:
    source = PAGE.parents[1] / "src" / "hayai"
    files = [
        *source.glob("*.py"),
        *(f for d in ("server", "engine", "text") for f in (source / d).glob("*.py")),
    ]
    codes = {code for file in files for code in re.findall(r'code="(\w+)"', file.read_text())}
    page = page_of_the_api()
    assert len(codes) > 30 and sorted(code for code in codes if f"`{code}`" not in page) == []


def test_every_route_is_on_the_page_of_the_api(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    there = {f"{method.upper()} {path}" for path, entries in paths.items() for method in entries}
    own = {r for r in there if " /openai/" not in r or " /openai/deployments" in r}
    rows = set(re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", page_of_the_api(), re.M))
    assert sorted(own - rows - {"POST /openai/deployments/{deployment}"}) == []
    assert sorted(rows - own) == []

"""Request fields that are not ours: ignored by name, refused by name, never dropped in silence.

Three tables, read by `check_fields` before a body is validated:
* IGNORED: bookkeeping of OpenAI's platform that changes no token; any value is accepted;
* REFUSED: fields that would change the answer; accepted only with a value that asks for nothing;
* everything else that a dialect's model does not list is unknown, and a 400.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import NoReturn

from hayai.errors import RequestError

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Accepted with any value; they name users, store transcripts or choose a price, and change no token."""

_NO_TOOLS = "this server does not call tools"
_TEXT_ONLY = "answers are plain text"

REFUSED_CHAT: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "functions": (_NO_TOOLS, ([],)),
    "function_call": (_NO_TOOLS, ("none", "auto")),
    "response_format": ("only {'type': 'text'} is served", ({"type": "text"},)),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "audio": (_TEXT_ONLY, ()),
    "prediction": ("predicted outputs are not served", ()),
    "web_search_options": ("this server does not search", ()),
    "reasoning_effort": ("the effort of reasoning can't be set", ()),
    "verbosity": ("verbosity can't be set", ("medium",)),
}
REFUSED_COMPLETION: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "echo": ("the prompt is not repeated in the answer", (False,)),
    "suffix": ("text can't be inserted before a suffix", ("",)),
    "best_of": ("every choice is returned; use n", (1,)),
}
"""field -> (reason, values that ask for nothing and are accepted). null is always accepted."""


def check_fields(
    body: Mapping[str, object],
    known: Collection[str],
    refused: Mapping[str, tuple[str, tuple[object, ...]]],
) -> dict[str, object]:
    """The fields of `body` that a dialect serves, nulls dropped (null means: the default).

    RequestError for a refused field and for an unknown one, with a near name where there is one.
    """
    kept: dict[str, object] = {}
    for name, value in body.items():
        if name in known:
            if value is not None:
                kept[name] = value
        elif name in refused:
            reason, harmless = refused[name]
            if value is not None and not any(value == h and type(value) is type(h) for h in harmless):
                raise RequestError(
                    f"{name} is not supported: {reason}", param=name, code="unsupported_parameter"
                )
        elif name not in IGNORED:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RequestError(f"unknown field: {name}{hint}", param=name, code="unknown_parameter")
    return kept


def refuse(param: str, message: str) -> NoReturn:
    """RequestError of a value that is not what a field takes."""
    raise RequestError(message, param=param, code="invalid_value")


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}


def kind_of(value: object) -> str:
    """A value as an error shows it: numbers themselves, anything longer by its kind."""
    if value is None:
        return "null or absent"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and not value:
        return "an empty list"
    return _KINDS.get(type(value), "a number")

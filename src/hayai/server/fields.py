"""What is done with fields that are not ours: told without effect, refused by name, never dropped in silence.

One FieldTable (bodies.py) per dialect, filled from here. A field of the API is either in the dialect's model,
and served, or here; a test walks the API's own schema and holds us to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from hayai.errors import RequestError

PLATFORM: dict[str, tuple[str, tuple[object, ...]]] = {
    "user": ("end users are not tracked", ("",)),
    "safety_identifier": ("end users are not tracked", ("",)),
    "service_tier": ("there is one tier; priority belongs to the key", ("auto", "default")),
    "prompt_cache_key": ("every prompt's prefix is cached; nothing has to be named", ("",)),
    "prompt_cache_retention": ("cached prefixes stay until their memory is needed", ()),
    "prompt_cache_options": ("cached prefixes stay until their memory is needed", ({},)),
}
"""Of OpenAI's platform; they change no token. field -> (what is not done, values that ask for nothing)."""

_NO_AUDIO = "answers are plain text"
_NO_SEARCH = "this server does not search the web"
_NO_MODERATION = "this server has no moderation model"

CHAT_WARNED = PLATFORM | {
    "metadata": ("nothing is stored that it could label", ({},)),
    "store": ("chat completions are not stored; /v1/responses can be", (False,)),
}
CHAT_REFUSED: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "functions": ("use tools, which took its place", ([],)),
    "function_call": ("use tool_choice, which took its place", ("none", "auto")),
    "modalities": (_NO_AUDIO, (["text"],)),
    "audio": (_NO_AUDIO, ()),
    "prediction": ("predicted outputs are not served", ()),
    "web_search_options": (_NO_SEARCH, ()),
    "verbosity": ("verbosity can't be set", ("medium",)),
    "moderation": (_NO_MODERATION, ()),
}


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

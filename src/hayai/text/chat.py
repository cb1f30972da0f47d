"""Chat templates: messages to prompt text, and to token ids in which nobody's text becomes a control token.

A model file carries a Jinja program (`tokenizer.chat_template`) that prints the conversation between control
tokens. It is rendered in a sandbox with bounds (sandbox.py).

Control tokens in text (`encode_chat`). A rendered prompt is one string, in which a user's literal
"<|im_end|>" looks like the template's own. Encoding template and messages piece by piece would lose merges
over their border and with it the ids the model was trained on; so the string stays whole, and only places
are marked:
1. in every string of the request, an occurrence of a control token's text gets a mark (a character that
   occurs nowhere else) after its first character; the template is rendered with these strings; control
   tokens are looked for in the result, which by now are the template's own; marks are removed, and each
   stretch between control tokens is encoded as plain text. Without such occurrences this is the plain
   rendering: same ids.
2. A template may join or change strings so that a control token comes into being (lower(), replace(), two
   adjoining fields). If a string holds a character that begins or ends control tokens (letters and digits
   excepted), the template is rendered a second time with all those characters replaced by stand-ins. Both
   must give the same control tokens; if not, the second rendering counts, with the characters put back
   after control tokens were looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hayai.errors import ModelError, RequestError
from hayai.text.messages import normalize_messages
from hayai.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE_CHARS = 1 << 18
MAX_DEPTH = 64  # of nested objects in a request
TEMPLATE_KEY = "tokenizer.chat_template"


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """Compile `source`; ModelError when it is not a valid template."""
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._template = _compile(source)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], tokenizer: Tokenizer) -> ChatTemplate | None:
        """The file's template; None when it has none."""
        source = metadata.get(TEMPLATE_KEY)
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelError(f"{TEMPLATE_KEY} must be a string; found {type(source).__name__}")
        bos, eos = (
            "" if token_id is None else tokenizer.token(token_id)
            for token_id in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(source, bos, eos)

    def render(
        self, messages: object, /, *, tools: object = None, add_generation_prompt: bool = True, **kw: object
    ) -> str:
        """The prompt as text. `kw` are further variables of the template (`enable_thinking=False`).

        Raises RequestError for bad messages, when the template refuses them, or when it exceeds its bounds.
        """
        variables: dict[str, object] = {
            **kw, "tools": tools, "add_generation_prompt": add_generation_prompt,
            "messages": normalize_messages(messages),
        }  # fmt: skip
        return self.render_checked(variables)

    def render_checked(self, variables: Mapping[str, object]) -> str:
        """Render with `variables` as they are; the messages in them are already normalised."""
        # Imported here, like all of jinja2: 20 ms that a run without a chat should not pay.
        from hayai.text.budget import MAX_TEXT, Budget, weigh
        from hayai.text.sandbox import BUDGET

        context = {"bos_token": self.bos_token, "eos_token": self.eos_token, **variables}
        context[BUDGET] = Budget(weigh(dict(variables), MAX_TEXT))
        try:
            return self._template.render(context)
        except Exception as error:  # a template can raise anything that Python can
            reason = str(error) or type(error).__name__
            raise RequestError(
                f"the model's chat template refuses these messages: {reason:.300}",
                param="messages",
                code="chat_template_error",
            ) from error


def _compile(source: str) -> Template:
    from hayai.text.sandbox import ChatEnvironment

    if len(source) > MAX_TEMPLATE_CHARS:
        raise ModelError(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS}")
    try:
        return ChatEnvironment().from_string(source)
    except Exception as error:  # syntax errors, and what Python's compiler makes of deep nesting
        raise ModelError(
            f"the chat template is not valid: {str(error) or type(error).__name__:.300}"
        ) from error


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: object,
    /,
    tools: object = None,
    *,
    add_generation_prompt: bool = True,
    **kw: object,
) -> list[int]:
    """Token ids of the prompt; control tokens come from the template alone, never from a request's string.

    Errors as `ChatTemplate.render`.
    """
    request: dict[str, object] = {**kw, "messages": normalize_messages(messages), "tools": tools}

    def render(change: Callable[[str], str]) -> str:
        changed = _map_strings(request, change)
        return template.render_checked({**changed, "add_generation_prompt": add_generation_prompt})

    text = "\n".join(_strings(request))
    unused = _unused_characters(text + template.source)
    mark = next(unused)
    parts = tokenizer.split_special(render(lambda string: tokenizer.break_control_tokens(string, mark)))
    originals = {mark: ""}
    edges = tokenizer.control_edges
    if not edges.isdisjoint(text):
        stand_ins = {ord(edge): ord(next(unused)) for edge in sorted(edges)}
        strict = tokenizer.split_special(render(lambda string: string.translate(stand_ins)))
        if _controls(strict, tokenizer) != _controls(parts, tokenizer):
            parts = strict
            originals = {chr(stand_in): chr(edge) for edge, stand_in in stand_ins.items()}
    ids = tokenizer.encode_parts(
        [part if isinstance(part, int) else _restore(part, originals) for part in parts]
    )
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


def _controls(parts: list[str | int], tokenizer: Tokenizer) -> list[int]:
    return [part for part in parts if isinstance(part, int) and part in tokenizer.special_ids]


def _map_strings(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """A copy of nested lists and mappings with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if depth > MAX_DEPTH:
        raise RequestError(f"the request is nested deeper than {MAX_DEPTH} levels", code="too_deep")
    if isinstance(value, Mapping):
        return {
            _map_strings(key, change): _map_strings(item, change, depth + 1) for key, item in value.items()
        }
    return [_map_strings(item, change, depth + 1) for item in value]


def _strings(value: object) -> list[str]:
    found: list[str] = []

    def note(string: str) -> str:
        found.append(string)
        return string

    _map_strings(value, note)
    return found


def _restore(text: str, originals: Mapping[str, str]) -> str:
    """`text` with every stand-in replaced, also where the template wrote it as an escape (ASCII JSON)."""
    text = text.translate({ord(stand_in): original for stand_in, original in originals.items()})
    if "\\u" in text.lower():
        for stand_in, original in originals.items():
            for escape in _escapes(stand_in):
                text = text.replace(escape, original)
    return text


def _escapes(character: str) -> tuple[str, str]:
    return json.dumps(character)[1:-1], ascii(character)[1:-1]


def _unused_characters(text: str) -> Iterator[str]:
    """Private-use characters (planes 15 and 16) that do not occur in `text`, nor do their escapes."""
    used = set(re.findall("[\U000f0000-\U0010ffff]", text))
    for plane in (0xF0000, 0x100000):
        for character in map(chr, range(plane, plane + 0xFFFE)):
            if character not in used and not any(escape in text for escape in _escapes(character)):
                yield character
    raise RequestError("the text uses every private-use character", param="messages", code="invalid_text")

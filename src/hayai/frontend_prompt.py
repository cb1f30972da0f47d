"""From what a caller gives to token ids: raw text, a conversation, or ids as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hayai.errors import RequestError
from hayai.frontend_request import PLAIN, RequestOptions
from hayai.load import LoadedModel
from hayai.text.chat import encode_chat
from hayai.text.tokenizer import Tokenizer


class ChatIds(tuple[int, ...]):
    """Token ids of a rendered conversation: the answer to them is an assistant's turn, with reasoning and
    tool calls, also where the prompt was encoded beforehand (to count it, or for several answers)."""

    __slots__ = ()


@dataclass(frozen=True)
class Prompt:
    """What to continue; exactly one of the three.

    messages: a conversation for the model's chat template ({"role": ..., "content": ...}).
    text: raw text, no template; control tokens written in it are control tokens (the caller owns the whole
    prompt, as in llama.cpp and vLLM).
    token_ids: used as they are; those that `Frontend.encode` made of a conversation (ChatIds) are still known
    as one.
    template_args: variables for the chat template.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in ("messages", "text", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"a prompt is one of messages, text and token_ids; given: {', '.join(given) or 'none'}",
                param="prompt",
            )

    @property
    def is_chat(self) -> bool:
        """Whether the answer is an assistant's turn."""
        return self.messages is not None or isinstance(self.token_ids, ChatIds)

    @property
    def param(self) -> str:
        """The field that an error in this prompt names."""
        return "messages" if self.messages is not None else "prompt"

    @property
    def num_characters(self) -> int:
        """Size of the text to tokenise, which is at most its number of bytes."""
        if self.text is not None:
            return len(self.text)
        return sum(_num_characters(message.get("content")) for message in self.messages or ())


class PromptEncoder:
    """Encodes prompts for one model. Immutable; safe to use from several threads."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._name = loaded.name
        self._tokenizer = loaded.tokenizer
        self._template = loaded.chat_template
        self._context_length = loaded.engine.max_length
        pieces = () if loaded.tokenizer is None else loaded.tokenizer.pieces
        self._longest_token = max(map(len, pieces), default=1)

    def encode(
        self, prompt: Prompt, options: RequestOptions = PLAIN, warnings: list[str] | None = None
    ) -> tuple[int, ...]:
        """Token ids of a prompt that leaves room for one more token; see `Frontend.encode`."""
        ids = self._encode(prompt, options, warnings)
        if len(ids) + 1 > self._context_length:
            raise self._too_long(str(len(ids)), prompt)
        return ids

    def _encode(self, prompt: Prompt, options: RequestOptions, warnings: list[str] | None) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        tokenizer = self.vocabulary(prompt.param, "give token ids")
        # No token is longer than the longest: text that can't fit is refused before it costs anything.
        least = prompt.num_characters // self._longest_token
        if least >= self._context_length:
            raise self._too_long(f"at least {least}", prompt)
        if prompt.text is not None:
            return tuple(tokenizer.encode(prompt.text, special=True))
        if self._template is None:
            raise RequestError(
                f"model {self._name} has no chat template: give a text prompt",
                param="messages",
                code="no_chat_template",
            )
        arguments = dict(prompt.template_args)
        messages: Sequence[Mapping[str, Any]] = list(prompt.messages or ())
        tools = arguments.pop("tools", None)
        if options.tools or any(m.get("role") == "tool" or m.get("tool_calls") for m in messages):
            # Imported for those who use tools: their formats take 5 ms of everybody else's start.
            from hayai.text.tool_prompt import definition, for_template

            offered = () if options.tool_choice == "none" else options.tools
            definitions = [definition(t.name, t.description, t.parameters) for t in offered]
            messages, own, described = for_template(self._template.source, messages, definitions)
            tools = tools or own
            if described and warnings is not None:
                warnings.append(
                    f"the chat template of {self._name} knows no tools: the system message describes them"
                )
        return ChatIds(encode_chat(self._template, tokenizer, messages, tools, **arguments))

    def infill(self, prefix: str, suffix: str) -> Prompt:
        """A prompt for the text between two; see `Frontend.infill`."""
        ids = self.vocabulary("suffix", "there is no text to fill in").encode_infill(prefix, suffix)
        if ids is None:
            raise RequestError(
                f"model {self._name} has no tokens to fill in the middle of a text: leave out the suffix",
                param="suffix",
                code="unsupported_parameter",
            )
        return Prompt(token_ids=tuple(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; see `Frontend.decode`."""
        tokenizer = self.vocabulary("tokens", "ids have no text")
        for token in ids:
            if not 0 <= token < tokenizer.vocab_size:
                raise RequestError(
                    f"token id {token} is not in the vocabulary: ids go from 0 to {tokenizer.vocab_size - 1}",
                    param="tokens",
                    code="invalid_value",
                )
        return tokenizer.decode(ids, special=True)

    def vocabulary(self, param: str, advice: str) -> Tokenizer:
        """The tokenizer; RequestError where the model has none."""
        if self._tokenizer is None:
            raise RequestError(
                f"model {self._name} has no vocabulary: {advice}", param=param, code="no_vocabulary"
            )
        return self._tokenizer

    def _too_long(self, tokens: str, prompt: Prompt) -> RequestError:
        return RequestError(
            f"the prompt has {tokens} tokens, and with at least one to generate it must fit the context of "
            f"{self._context_length} tokens",
            param=prompt.param,
            code="context_length_exceeded",
        )


def _num_characters(content: object) -> int:
    """Of a message's content: a string, or a list of strings and parts with text."""
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, (list, tuple)):
        return 0
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return sum(len(text) for text in texts if isinstance(text, str))

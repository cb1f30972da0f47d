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


@dataclass(frozen=True)
class Prompt:
    """What to continue; exactly one of the three.

    messages: a conversation for the model's chat template ({"role": ..., "content": ...}).
    text: raw text, no template; control tokens written in it are control tokens (the caller owns the whole
    prompt, as in llama.cpp and vLLM).
    token_ids: used as they are.
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
    def param(self) -> str:
        """The field that an error in this prompt names."""
        return "messages" if self.messages is not None else "prompt"

    @property
    def num_characters(self) -> int:
        """Size of the text to tokenise, which is at most its number of bytes."""
        if self.text is not None:
            return len(self.text)
        contents = (m.get("content") for m in self.messages or ())
        return sum(len(c) for c in contents if isinstance(c, str))


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
        return tuple(
            encode_chat(self._template, tokenizer, list(prompt.messages or ()), **prompt.template_args)
        )

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

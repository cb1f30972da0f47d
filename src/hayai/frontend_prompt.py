"""From what a caller gives to token ids: raw text, a conversation, or ids as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hayai.errors import RequestError
from hayai.frontend_request import PLAIN, RequestOptions, Tool
from hayai.load import LoadedModel
from hayai.text.chat import encode_chat
from hayai.text.messages import normalize_messages
from hayai.text.tokenizer import Tokenizer
from hayai.text.tool_formats import format_of, knows_tools
from hayai.text.tool_prompt import mentions_tools, tools_as_text, with_mistral_ids


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
        contents = (m.get("content") for m in self.messages or ())
        return sum(len(c) for c in contents if isinstance(c, str))


class PromptEncoder:
    """Encodes prompts for one model. Immutable; safe to use from several threads."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._name = loaded.name
        self._tokenizer = loaded.tokenizer
        self._template = loaded.chat_template
        source = "" if loaded.chat_template is None else loaded.chat_template.source
        self._knows_tools = knows_tools(source)
        self._format = format_of(source)
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
        messages, tools = self._conversation(prompt, options, warnings)
        arguments = dict(prompt.template_args)
        tools = arguments.pop("tools", None) or tools or None
        return ChatIds(encode_chat(self._template, tokenizer, messages, tools, **arguments))

    def _conversation(
        self, prompt: Prompt, options: RequestOptions, warnings: list[str] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(messages, tools) as the template wants them."""
        messages = normalize_messages(list(prompt.messages or ()))
        tools = [] if options.tool_choice == "none" else [_definition(tool) for tool in options.tools]
        if not self._knows_tools:
            if tools and warnings is not None:
                warnings.append(
                    f"the chat template of {self._name} knows no tools: the system message describes them"
                )
            if tools or mentions_tools(messages):
                messages = tools_as_text(messages, tools)
            return messages, []
        return with_mistral_ids(messages) if self._format.name == "mistral" else messages, tools

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


def _definition(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI's API has it, which is what templates print."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}

"""Anthropic's answers, outwards: text chunks -> typed events and Message bodies.

An answer is a list of content blocks (thinking, text, tool_use), each opened, filled and closed before the
next. As with OpenAI's chunks, an event is a prefix, the JSON of the new text and a suffix; prefixes are
encoded once per block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic_core import from_json

from hayai.frontend import TextChunk, Usage
from hayai.frontend_request import ToolCallDelta
from hayai.server.errors import ApiError
from hayai.server.job import Job
from hayai.server.reply import Choice, Reply, ReplyHead, timings

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CONTEXT_FULL = "model_context_window_exceeded"
"""The answer ended before max_tokens because prompt and answer fill the context."""


@dataclass(frozen=True)
class AnswerForm:
    """What the reply needs of its request (`Job.extra['form']`).

    prefill: how the answer begins, which the client has already and is not repeated. show_thinking False:
    thinking is counted and signed, its text left out. max_tokens: what the client asked for; 0 = only fill
    the prefix cache.
    """

    max_tokens: int
    show_thinking: bool = True


def sse(kind: str, value: dict[str, Any]) -> bytes:
    """One event, with its type as name and inside."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps({"type": kind} | value))


def usage_body(usage: Usage, thinking_tokens: int = 0) -> dict[str, Any]:
    """Usage as the API splits it: input_tokens are those that were computed, cached ones stand beside;
    output_tokens are all, thinking included."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": thinking_tokens},
    }


def tool_use_id(call_id: str) -> str:
    """A call's id as Anthropic's clients know them."""
    return "toolu_" + call_id.removeprefix("call_")


def sign(thinking: Any) -> str:
    """A thinking block's signature: the SHA-256 of its text, from a `hashlib` object. Nobody checks it: it is
    there because clients drop thinking without one."""
    return str(thinking.hexdigest())


@dataclass
class _Block:
    """The block that is being written."""

    kind: str
    call_index: int
    prefix: bytes
    digest: Any = field(default_factory=hashlib.sha256)


_DELTAS = {
    "text": (b"text_delta", b"text"),
    "thinking": (b"thinking_delta", b"thinking"),
    "tool_use": (b"input_json_delta", b"partial_json"),
}
"""Kind of block -> the type of its deltas and the field with the new text."""


class AnthropicReply(Reply):
    """Message, and the events from message_start to message_stop."""

    id_prefix = "msg_"
    id_headers = (b"request-id", b"x-request-id")
    ping = sse("ping", {})

    def __init__(self, job: Job, head: ReplyHead) -> None:
        super().__init__(job, head)
        form = job.extra["form"]
        assert isinstance(form, AnswerForm)
        self._form = form
        self._block: _Block | None = None
        self._num_blocks = 0
        self._thinking_tokens = 0

    # ------------------------------------------------------------------ streamed

    def opening(self) -> bytes:
        """message_start, which counts the whole prompt as input: what came from the cache is known at the end
        (message_delta), whose counts replace these."""
        usage = usage_body(Usage(self.head.prompt_tokens, 0))
        message = self._message() | {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return sse("message_start", {"message": message}) + self.ping

    def event(self, index: int, chunk: TextChunk) -> bytes:
        block = self._block
        plain = chunk.text and not (chunk.finish_reason or chunk.reasoning or chunk.tool_calls)
        if plain and block is not None and block.kind == "text":
            return block.prefix + orjson.dumps(chunk.text) + b"}}\n\n"  # nearly every token
        out = b""
        if chunk.reasoning:
            out += self._append("thinking", chunk.reasoning)
            if not chunk.text:
                self._thinking_tokens += len(chunk.token_ids)
        if chunk.text:
            out += self._append("text", chunk.text)
        for delta in chunk.tool_calls:
            out += self._call(delta)
        return out + self._close() if chunk.finish_reason is not None else out

    def closing(self, choices: Sequence[Choice]) -> bytes:
        (choice,) = choices
        assert choice.usage is not None
        delta = {"stop_reason": self._stop_reason(choice), "stop_sequence": choice.stop}
        body: dict[str, Any] = {"delta": delta, "usage": usage_body(choice.usage, self._thinking_tokens)}
        return sse("message_delta", body | self._timings(choice)) + sse("message_stop", {})

    def error(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + error.body("anthropic", self.head.request_id) + b"\n\n"

    def _call(self, delta: ToolCallDelta) -> bytes:
        """A piece of a tool call; the first piece of a call opens its block."""
        out = b""
        block = self._block
        if block is None or block.kind != "tool_use" or block.call_index != delta.call_index:
            use_id = tool_use_id(delta.call_id or "")
            body = {"type": "tool_use", "id": use_id, "name": delta.name or "", "input": {}}
            out = self._open("tool_use", body, delta.call_index)
        return out + self._append("tool_use", delta.arguments) if delta.arguments else out

    def _append(self, kind: str, text: str) -> bytes:
        out = b""
        if self._block is None or self._block.kind != kind:
            empty = {"thinking": "", "signature": ""} if kind == "thinking" else {"text": ""}
            out = self._open(kind, {"type": kind} | empty)
        block = self._block
        assert block is not None
        if kind == "thinking":
            block.digest.update(text.encode())
            if not self._form.show_thinking:
                return out
        return out + block.prefix + orjson.dumps(text) + b"}}\n\n"

    def _open(self, kind: str, body: dict[str, Any], call_index: int = -1) -> bytes:
        out, index = self._close(), self._num_blocks
        self._num_blocks += 1
        delta, name = _DELTAS[kind]
        prefix = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%s","%s":' % (index, delta, name)
        )
        self._block = _Block(kind, call_index, prefix)
        return out + sse("content_block_start", {"index": index, "content_block": body})

    def _close(self) -> bytes:
        block, self._block = self._block, None
        if block is None:
            return b""
        index, out = self._num_blocks - 1, b""
        if block.kind == "thinking":
            delta = {"type": "signature_delta", "signature": sign(block.digest)}
            out = sse("content_block_delta", {"index": index, "delta": delta})
        return out + sse("content_block_stop", {"index": index})

    # ------------------------------------------------------------------ whole

    def whole(self, choices: Sequence[Choice]) -> bytes:
        (choice,) = choices
        assert choice.usage is not None
        body = self._message() | {
            "content": self._content(choice),
            "stop_reason": self._stop_reason(choice),
            "stop_sequence": choice.stop,
            "usage": usage_body(choice.usage, choice.reasoning_tokens),
        }
        return orjson.dumps(body | self._timings(choice))

    def _content(self, choice: Choice) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        thinking, text = "".join(choice.reasoning), "".join(choice.text)
        if thinking:
            shown = thinking if self._form.show_thinking else ""
            signature = sign(hashlib.sha256(thinking.encode()))
            blocks.append({"type": "thinking", "thinking": shown, "signature": signature})
        if text:
            blocks.append({"type": "text", "text": text, "citations": None})
        for call in choice.tool_calls.values():
            arguments = tool_input(call.arguments)
            use_id = tool_use_id(call.call_id)
            blocks.append({"type": "tool_use", "id": use_id, "name": call.name, "input": arguments})
        return blocks

    # ------------------------------------------------------------------ both

    def _message(self) -> dict[str, Any]:
        head = self.head
        return {"id": head.request_id, "type": "message", "role": "assistant", "model": head.model}

    def _stop_reason(self, choice: Choice) -> str:
        reason, usage = choice.finish_reason, choice.usage
        assert reason is not None and usage is not None
        if choice.stop is not None:
            return "stop_sequence"
        if reason == "length" and usage.completion_tokens < self._form.max_tokens:
            return CONTEXT_FULL
        return STOP_REASONS[reason]

    def _timings(self, choice: Choice) -> dict[str, Any]:
        if not self.job.timings or choice.timing is None:
            return {}
        return {"timings": timings(choice.timing, self.head)}


def tool_input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as an object; of one that was cut at max_tokens, as much as there is (which is
    what the official client makes of the same stream)."""
    try:
        value = from_json(arguments.encode(), allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

"""OpenAI's wire format, outwards: text chunks -> SSE events and JSON bodies.

A stream's cost per token is the product, so an event is three pieces: a prefix and a suffix encoded once
per choice, and the JSON string of the new text. Only logprobs are built as objects.
"""

from __future__ import annotations

from abc import abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

import orjson

from hayai.engine.request import Logprob
from hayai.frontend import TextChunk
from hayai.frontend_request import ToolCallDelta
from hayai.server.anthropic_replies import AnthropicReply
from hayai.server.job import Job
from hayai.server.reply import LOWEST_LOGPROB, Choice, CollectedCall, Reply, ReplyHead, timings, totals
from hayai.server.responses_replies import ResponsesReply

DONE = b"data: [DONE]\n\n"


class ChunkReply(Reply):
    """What `chat.completion.chunk` and `text_completion` have in common."""

    object_name = ""
    chunk_object_name = ""

    def __init__(self, job: Job, head: ReplyHead) -> None:
        super().__init__(job, head)
        self.token_bytes = head.token_bytes
        self._head = {
            "id": head.request_id,
            "object": self.object_name,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._chunk_head = self._head | {"object": self.chunk_object_name}
        tail = b',"usage":null}\n\n' if job.include_usage else b"}\n\n"
        start = b"data: " + orjson.dumps(self._chunk_head)[:-1]
        self._prefixes = [start + self._choice_prefix(i) for i in range(job.num_choices)]
        self._suffix = b',"logprobs":null,"finish_reason":null}]' + tail
        self._tail = tail
        self._reasoning_tokens = 0

    def opening(self) -> bytes:
        """Events before the first token (the chat dialect's role)."""
        return b""

    def event(self, index: int, chunk: TextChunk) -> bytes:
        """The events of one chunk: its text if there is any, its finish reason if it is the last."""
        text, reason = chunk.text, chunk.finish_reason
        if not (reason or chunk.logprobs or chunk.reasoning or chunk.tool_calls):
            if not text:
                return b""  # bytes of an unfinished character, or text held back for a stop string
            return self._prefixes[index] + self._text_json(text) + self._suffix
        out = self._pieces(index, chunk)
        if reason is not None:
            out += self._final(index, reason)
        return out

    def _pieces(self, index: int, chunk: TextChunk) -> bytes:
        """A chunk that is not text alone."""
        if not (chunk.text or chunk.logprobs):
            return b""
        probs = orjson.dumps(self._logprobs(chunk.logprobs, index) if chunk.logprobs else None)
        out = self._prefixes[index] + self._text_json(chunk.text) + b',"logprobs":' + probs
        return out + b',"finish_reason":null}]' + self._tail

    def closing(self, choices: Sequence[Choice]) -> bytes:
        """The usage event where it was asked for, and the end mark."""
        extra = self._totals(choices) if self.job.include_usage else {}
        if self.job.timings:
            extra["timings"] = [timings(c.timing, self.head) for c in choices if c.timing is not None]
        if not extra:
            return DONE
        return b"data: " + orjson.dumps(self._chunk_head | {"choices": []} | extra) + b"\n\n" + DONE

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The body of an answer that is not streamed."""
        body = self._head | {"choices": [self._whole_choice(c) for c in choices]} | self._totals(choices)
        if self.job.timings:
            body["timings"] = [timings(c.timing, self.head) for c in choices if c.timing is not None]
        return orjson.dumps(body)

    def _totals(self, choices: Sequence[Choice]) -> dict[str, Any]:
        usage = totals(self.job, choices)
        shown = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
        }
        return {"usage": shown}

    @abstractmethod
    def _choice_prefix(self, index: int) -> bytes: ...

    @abstractmethod
    def _text_json(self, text: str) -> bytes: ...

    @abstractmethod
    def _final(self, index: int, reason: str) -> bytes: ...

    @abstractmethod
    def _logprobs(self, logprobs: Sequence[Logprob], index: int) -> Any: ...

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> dict[str, Any]: ...


class ChatReply(ChunkReply):
    """chat.completion and chat.completion.chunk."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def opening(self) -> bytes:
        role = b'{"role":"assistant","content":""}'
        return b"".join(p.removesuffix(b'{"content":') + role + self._suffix for p in self._prefixes)

    def _choice_prefix(self, index: int) -> bytes:
        return b',"choices":[{"index":%d,"delta":{"content":' % index

    def _text_json(self, text: str) -> bytes:
        return orjson.dumps(text) + b"}"

    def _final(self, index: int, reason: str) -> bytes:
        return self._delta(index, b"{}", b"null", reason)

    def _delta(self, index: int, delta: bytes, probs: bytes, reason: str | None = None) -> bytes:
        prefix = self._prefixes[index].removesuffix(b'{"content":')
        end = b"null" if reason is None else b'"%s"' % reason.encode()
        return prefix + delta + b',"logprobs":' + probs + b',"finish_reason":' + end + b"}]" + self._tail

    def _pieces(self, index: int, chunk: TextChunk) -> bytes:
        """An event each for reasoning, text and tool calls; log-probabilities go with the first."""
        deltas: list[dict[str, Any]] = []
        if chunk.reasoning:
            deltas.append({"reasoning_content": chunk.reasoning})
            if not chunk.text:
                self._reasoning_tokens += len(chunk.token_ids)
        if chunk.text or (chunk.logprobs and not chunk.reasoning and not chunk.tool_calls):
            deltas.append({"content": chunk.text})
        deltas += [{"tool_calls": [_call_delta(call)]} for call in chunk.tool_calls]
        probs = orjson.dumps(self._logprobs(chunk.logprobs, index) if chunk.logprobs else None)
        parts = []
        for delta in deltas:
            parts.append(self._delta(index, orjson.dumps(delta), probs))
            probs = b"null"
        return b"".join(parts)

    def whole(self, choices: Sequence[Choice]) -> bytes:
        self._reasoning_tokens = sum(c.reasoning_tokens for c in choices)
        return super().whole(choices)

    def _logprobs(self, logprobs: Sequence[Logprob], index: int) -> Any:
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(data),
        }

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        asked = self.job.params.logprobs is not None
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.tool_calls:
            message["content"] = text or None
            message["tool_calls"] = [_whole_call(call) for _, call in sorted(choice.tool_calls.items())]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs, choice.index) if asked else None,
            "finish_reason": choice.finish_reason,
        }


def _call_delta(delta: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    shown: dict[str, Any] = {"index": delta.call_index}
    if delta.call_id is not None:
        shown |= {"id": delta.call_id, "type": "function"}
    if delta.name is not None:
        function = {"name": delta.name} | function
    return shown | {"function": function}


def _whole_call(call: CollectedCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


class CompletionReply(ChunkReply):
    """text_completion, streamed or not."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, job: Job, head: ReplyHead) -> None:
        super().__init__(job, head)
        self._places = [_Place() for _ in range(job.num_choices)]

    def _choice_prefix(self, index: int) -> bytes:
        return b',"choices":[{"index":%d,"text":' % index

    def _text_json(self, text: str) -> bytes:
        return orjson.dumps(text)

    def _final(self, index: int, reason: str) -> bytes:
        rest = b'"","logprobs":null,"finish_reason":"%s"}]' % reason.encode()
        return self._prefixes[index] + rest + self._tail

    def _logprobs(self, logprobs: Sequence[Logprob | None], index: int, first: int = -1) -> Any:
        """first: the token that an entry of None stands for."""
        place, tokens, offsets = self._places[index], [], []
        for entry in logprobs:
            token_id = first if entry is None else entry.token_id
            tokens.append(self._token(token_id))
            offsets.append(place.characters)
            place.add(self.token_bytes(token_id))
        return {
            "tokens": tokens,
            "token_logprobs": [None if e is None else max(e.logprob, LOWEST_LOGPROB) for e in logprobs],
            "top_logprobs": [None if e is None else self._top(e) for e in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: Logprob) -> dict[str, float]:
        """The best tokens and the chosen one; of two with the same text the likelier."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._token(token_id), max(logprob, LOWEST_LOGPROB))
        return top

    def _token(self, token_id: int) -> str:
        """A token's text; one that is no valid UTF-8 as `bytes:\\xe2\\x96`: no two are equal."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        asked = self.job.params.logprobs is not None
        return {
            "index": choice.index,
            "text": "".join(choice.text),
            "logprobs": self._logprobs(choice.logprobs, choice.index) if asked else None,
            "finish_reason": choice.finish_reason,
        }


class _Place:
    """Where in the text the next token begins: whole characters so far."""

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        self.characters += len(self._decoder.decode(data))


class EchoReply(CompletionReply):
    """text_completion that begins with its prompt, and with the prompt's log-probabilities."""

    def __init__(self, job: Job, head: ReplyHead) -> None:
        super().__init__(job, head)
        self._silent = set(range(job.num_choices))

    def event(self, index: int, chunk: TextChunk) -> bytes:
        if index not in self._silent:
            return super().event(index, chunk)
        self._silent.remove(index)
        probs = orjson.dumps(self._prompt_logprobs(index, chunk.prompt_logprobs))
        out = self._prefixes[index] + self._text_json(self._prompt_text(index)) + b',"logprobs":' + probs
        return out + b',"finish_reason":null}]' + self._tail + super().event(index, chunk)

    def _prompt_text(self, index: int) -> str:
        prompt = index // self.job.n
        text = self.job.prompts[prompt].text
        if text is not None:
            return text
        return b"".join(map(self.token_bytes, self.head.prompts[prompt])).decode("utf-8", "replace")

    def _prompt_logprobs(self, index: int, entries: Sequence[Logprob | None] | None) -> Any:
        """The first token has none: nothing predicts it."""
        if entries is None:
            return None
        return self._logprobs(entries, index, self.head.prompts[index // self.job.n][0])

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        probs = self._prompt_logprobs(choice.index, choice.prompt_logprobs)
        shown = super()._whole_choice(choice)
        if probs is not None:
            shown["logprobs"] = {name: values + shown["logprobs"][name] for name, values in probs.items()}
        return shown | {"text": self._prompt_text(choice.index) + shown["text"]}


REPLIES: dict[str, type[Reply]] = {
    "chat": ChatReply,
    "completion": CompletionReply,
    "echo": EchoReply,
    "responses": ResponsesReply,
    "anthropic": AnthropicReply,
}

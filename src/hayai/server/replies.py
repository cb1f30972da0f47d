"""OpenAI's wire format, outwards: text chunks -> SSE events and JSON bodies.

A stream's cost per token is the product, so an event is three pieces: a prefix and a suffix encoded once
per choice, and the JSON string of the new text. Only logprobs are built as objects.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import orjson

from hayai.engine.request import Logprob
from hayai.frontend import TextChunk
from hayai.server.job import Job
from hayai.server.reply import Choice, Reply, ReplyHead, timings, totals

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; the API's own value."""


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
        self._text_offsets = [0] * job.num_choices

    def opening(self) -> bytes:
        """Events before the first token (the chat dialect's role)."""
        return b""

    def event(self, index: int, chunk: TextChunk) -> bytes:
        """The events of one chunk: its text if there is any, its finish reason if it is the last."""
        text, logprobs, reason = chunk.text, chunk.logprobs, chunk.finish_reason
        if reason is None and not logprobs:
            if not text:
                return b""  # bytes of an unfinished character, or text held back for a stop string
            return self._prefixes[index] + self._text_json(text) + self._suffix
        out = b""
        if text or logprobs:
            probs = orjson.dumps(self._logprobs(logprobs, index) if logprobs else None)
            out = self._prefixes[index] + self._text_json(text) + b',"logprobs":' + probs
            out += b',"finish_reason":null}]' + self._tail
        if reason is not None:
            out += self._final(index, reason)
        return out

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
        prefix = self._prefixes[index].removesuffix(b'"content":')
        return prefix + b'},"logprobs":null,"finish_reason":"%s"}]' % reason.encode() + self._tail

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
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": self._logprobs(choice.logprobs, choice.index) if asked else None,
            "finish_reason": choice.finish_reason,
        }


class CompletionReply(ChunkReply):
    """text_completion, streamed or not."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def _choice_prefix(self, index: int) -> bytes:
        return b',"choices":[{"index":%d,"text":' % index

    def _text_json(self, text: str) -> bytes:
        return orjson.dumps(text)

    def _final(self, index: int, reason: str) -> bytes:
        rest = b'"","logprobs":null,"finish_reason":"%s"}]' % reason.encode()
        return self._prefixes[index] + rest + self._tail

    def _logprobs(self, logprobs: Sequence[Logprob], index: int) -> Any:
        tokens = [self._token(entry.token_id) for entry in logprobs]
        offsets = []
        for entry in logprobs:
            offsets.append(self._text_offsets[index])
            self._text_offsets[index] += len(self.token_bytes(entry.token_id).decode("utf-8", "ignore"))
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, LOWEST_LOGPROB) for entry in logprobs],
            "top_logprobs": [
                {self._token(t): max(v, LOWEST_LOGPROB) for t, v in entry.top} for entry in logprobs
            ],
            "text_offset": offsets,
        }

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


REPLIES: dict[str, type[Reply]] = {"chat": ChatReply, "completion": CompletionReply}

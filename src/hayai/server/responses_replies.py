"""The Responses API, outwards: text chunks -> typed events and Response objects.

An answer is a list of items (reasoning, a message, function calls), each opened, filled and closed before the
next. As with chat's chunks a delta is a prefix encoded once per item, the JSON of the new text, and a number.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from hayai.engine.request import Logprob
from hayai.frontend import TextChunk
from hayai.frontend_request import ToolCallDelta
from hayai.server.errors import ApiError
from hayai.server.job import Job
from hayai.server.reply import LOWEST_LOGPROB, Choice, Reply, ReplyHead, timings, totals

Keep = Callable[[dict[str, Any]], Awaitable[bool]]
"""Stores a finished Response object; False where that failed."""


@dataclass(frozen=True)
class Form:
    """What the encoder needs of its request (`Job.extra['form']`).

    request: fields that the Response object repeats. items: the input of this turn. previous: the response it
    goes on from. logprobs: whether the text's are shown.
    """

    request: Mapping[str, Any]
    items: tuple[Mapping[str, Any], ...]
    previous: str | None = None
    logprobs: bool = False


@dataclass
class _Item:
    """One item of the output while it is filled. prefix: of its delta events, up to the text."""

    kind: str
    id: str
    index: int
    prefix: bytes = b""
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    call_index: int = -1
    call_id: str = ""
    name: str = ""

    def shown(self, status: str) -> dict[str, Any]:
        """The item as the API has it."""
        text = "".join(self.text)
        if self.kind == "function_call":
            own: dict[str, Any] = {"call_id": self.call_id, "name": self.name, "arguments": text}
        elif self.kind == "reasoning":
            own = {"summary": [], "content": [{"type": "reasoning_text", "text": text}] if text else []}
        else:
            own = {"role": "assistant", "content": [self.part()] if status != "in_progress" else []}
        return {"id": self.id, "type": self.kind, "status": status} | own

    def part(self, empty: bool = False) -> dict[str, Any]:
        """The item's only content part."""
        text = "" if empty else "".join(self.text)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if empty else self.logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class ResponsesReply(Reply):
    """A Response object, whole or as typed events."""

    id_prefix = "resp_"

    def __init__(self, job: Job, head: ReplyHead) -> None:
        super().__init__(job, head)
        self._form: Form = job.extra["form"]
        self._keep: Keep | None = job.extra.get("keep")
        self._stored = bool(self._form.request["store"])
        self._items: list[_Item] = []
        self._closed = 0  # items before this one are complete
        self._number = 2  # the first token's events are encoded before `opening`, which has 0 and 1
        self._pending = b""
        self._reasoning_tokens = 0
        self._choice: Choice | None = None

    # ------------------------------------------------------------------ events

    def opening(self) -> bytes:
        response = self._response("in_progress")
        events = ("response.created", "response.in_progress")
        return b"".join(
            _sse(name, {"response": response, "sequence_number": i}) for i, name in enumerate(events)
        )

    def event(self, index: int, chunk: TextChunk) -> bytes:
        out = b""
        if chunk.reasoning:
            if not chunk.text:
                self._reasoning_tokens += len(chunk.token_ids)
            out += self._add("reasoning", chunk.reasoning, ())
        if chunk.text or (chunk.logprobs and self._form.logprobs and not chunk.reasoning):
            out += self._add("message", chunk.text, chunk.logprobs)
        for delta in chunk.tool_calls:
            out += self._add_call(delta)
        return out

    def _add(self, kind: str, text: str, logprobs: Sequence[Logprob]) -> bytes:
        out = b""
        item = self._items[-1] if self._items else None
        if item is None or item.kind != kind or self._closed == len(self._items):
            out, item = self._open(_Item(kind, _PREFIXES[kind] + uuid.uuid4().hex, len(self._items)))
        item.text.append(text)
        tail = b""
        if kind == "message":
            shown = [self._logprob(entry) for entry in logprobs] if self._form.logprobs else []
            item.logprobs += shown
            tail = b',"logprobs":' + (orjson.dumps(shown) if shown else b"[]")
        return out + self._delta(item, text, tail)

    def _add_call(self, delta: ToolCallDelta) -> bytes:
        out = b""
        item = self._items[-1] if self._items else None
        if item is None or item.call_index != delta.call_index:
            item = _Item("function_call", "fc_" + uuid.uuid4().hex, len(self._items))
            item.call_index = delta.call_index
            item.call_id, item.name = delta.call_id or "", delta.name or ""
            out, item = self._open(item)
        item.text.append(delta.arguments)
        return out + (self._delta(item, delta.arguments, b"") if delta.arguments else b"")

    def _delta(self, item: _Item, text: str, tail: bytes) -> bytes:
        self._number += 1
        return b'%b%b%b,"sequence_number":%d}\n\n' % (
            item.prefix,
            orjson.dumps(text),
            tail,
            self._number - 1,
        )

    def _open(self, item: _Item) -> tuple[bytes, _Item]:
        out = self._close_last("completed")
        self._items.append(item)
        name = _DELTAS[item.kind] + ".delta"
        place: dict[str, Any] = {"type": name, "item_id": item.id, "output_index": item.index}
        out += self._sse("response.output_item.added", {
            "output_index": item.index, "item": item.shown("in_progress"),
        })  # fmt: skip
        if item.kind != "function_call":
            place["content_index"] = 0
            out += self._sse("response.content_part.added", {
                "item_id": item.id, "output_index": item.index, "content_index": 0, "part": item.part(True),
            })  # fmt: skip
        item.prefix = b'event: %b\ndata: %b,"delta":' % (name.encode(), orjson.dumps(place)[:-1])
        return out, item

    def _close_last(self, status: str) -> bytes:
        """The end of the item that is open, if one is."""
        if self._closed == len(self._items):
            return b""
        self._closed = len(self._items)
        item = self._items[-1]
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        text = "".join(item.text)
        if item.kind == "function_call":
            done: dict[str, Any] = {"name": item.name, "arguments": text}
        else:
            place["content_index"] = 0
            done = {"text": text} | ({"logprobs": item.logprobs} if item.kind == "message" else {})
        out = self._sse(_DELTAS[item.kind] + ".done", place | done)
        if item.kind != "function_call":
            out += self._sse("response.content_part.done", place | {"part": item.part()})
        shown = {"output_index": item.index, "item": item.shown(status)}
        return out + self._sse("response.output_item.done", shown)

    async def keep(self, choices: Sequence[Choice]) -> None:
        (self._choice,) = choices
        if not self.job.stream:
            self._fill(self._choice)
        elif not self._items:
            self._pending = self._add("message", "", ())  # an answer of no text is a message all the same
        if self._stored and self._keep is not None:
            self._stored = await self._keep(self._finished())

    def closing(self, choices: Sequence[Choice]) -> bytes:
        status = self._status()
        return (
            self._pending
            + self._close_last(status)
            + self._sse(f"response.{status}", {"response": self._finished()})
        )

    def whole(self, choices: Sequence[Choice]) -> bytes:
        return orjson.dumps(self._finished())

    def error(self, error: ApiError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = self._response("failed") | {"error": {"code": code, "message": error.message}}
        return self._sse("response.failed", {"response": response})

    def _sse(self, name: str, data: dict[str, Any]) -> bytes:
        self._number += 1
        return _sse(name, data | {"sequence_number": self._number - 1})

    # ------------------------------------------------------------------ the object

    def _fill(self, choice: Choice) -> None:
        """The items of an answer that was not streamed."""
        self._reasoning_tokens = choice.reasoning_tokens
        kinds = (("reasoning", choice.reasoning), ("message", choice.text))
        for kind, parts in kinds:
            text = "".join(parts)
            if text or (kind == "message" and not choice.tool_calls):
                item = _Item(kind, _PREFIXES[kind] + uuid.uuid4().hex, len(self._items), text=[text])
                if kind == "message" and self._form.logprobs:
                    item.logprobs = [self._logprob(entry) for entry in choice.logprobs]
                self._items.append(item)
        for index, call in sorted(choice.tool_calls.items()):
            item = _Item("function_call", "fc_" + uuid.uuid4().hex, len(self._items), text=[call.arguments])
            item.call_index, item.call_id, item.name = index, call.call_id, call.name
            self._items.append(item)

    def _status(self) -> str:
        cut = self._choice is not None and self._choice.finish_reason == "length"
        return "incomplete" if cut else "completed"

    def _finished(self) -> dict[str, Any]:
        assert self._choice is not None
        status = self._status()
        last = len(self._items) - 1
        output = [item.shown(status if i == last else "completed") for i, item in enumerate(self._items)]
        usage = totals(self.job, [self._choice])
        body = self._response(status) | {
            "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        if self.job.timings and self._choice.timing is not None:
            body["timings"] = [timings(self._choice.timing, self.head)]
        return body

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self.head.request_id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.head.model,
            "output": [],
            **self._form.request,
            "store": self._stored,
        }

    def _logprob(self, entry: Logprob) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in entry.top]
        return self._token(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.head.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(data),
        }


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name} | data))

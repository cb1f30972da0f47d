"""From the events of one request to chunks of text: detokenise, find stops, count, cut."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hayai.engine.request import Logprob, RequestTiming, SamplingParams, TokenEvent
from hayai.engine.service import EngineError
from hayai.errors import RequestError
from hayai.frontend_request import ToolCall, ToolCallDelta
from hayai.frontend_stops import StopMatcher
from hayai.text.detokenizer import Detokenizer
from hayai.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. completion_tokens: those that the caller got, without the end token and without
    what was cut at a stop string. cached_tokens: part of the prompt that was not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TextChunk(NamedTuple):
    """A piece of an answer. Every token appears in exactly one chunk, with its log-probability if asked.

    Text of a token may come a chunk later than its id (half a UTF-8 sequence). The last chunk has a
    `finish_reason` ('stop', 'length', 'tool_calls', 'timeout' or 'abort'), usage and timing; `stop` is the
    stop string that ended it. reasoning and tool_calls are what a router took out of the text.
    prompt_logprobs: on the first chunk where they were asked for; None for the prompt's first token.
    A named tuple for the same reason as TokenEvent.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    timing: RequestTiming | None = None
    stop: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None


class TextAssembler:
    """Turns the events of one request into chunks. The only place where text is made.

    tokenizer None: a model without a vocabulary, whose chunks have tokens and no text. grammar_param: the
    field that the request's grammar was made from.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_tokens: int,
        arrived: float,
        shown: frozenset[int] = frozenset(),
        grammar_param: str | None = None,
    ) -> None:
        self._grammar_param = grammar_param
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, shown=shown)
        self._vocab_size = 0 if tokenizer is None else tokenizer.vocab_size
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self._timing = RequestTiming(arrived, prompt_tokens=prompt_tokens)
        self._waiting: deque[tuple[int, TokenEvent]] = deque()  # (where its text starts, token)
        self._decoded = 0  # characters made so far
        self._shown = 0  # characters given out so far
        self._num_tokens = 0  # tokens given out so far
        self.plain = type(self) is TextAssembler and self._matcher is None
        """Each event but the last gives its token's text at once, and no text ends the answer."""
        self.finished = False
        """The last chunk was given out."""
        self.engine_finished = False
        """The engine is done with the request too: there is nothing to abort."""

    def push(self, event: TokenEvent) -> TextChunk | None:
        """The chunk that this event completes, if any. EngineError when the engine failed, RequestError when
        the request's own grammar did."""
        if event.timing is not None:
            self._timing = event.timing
        if event.finish_reason is not None:
            self.engine_finished = True
            return self._last(event)
        if self._matcher is not None:
            return self._match(event, self._matcher)
        self._num_tokens += 1
        logprob = event.logprob
        return TextChunk(
            self._decode(event.token_id), (event.token_id,), () if logprob is None else (logprob,)
        )

    def _decode(self, token_id: int) -> str:
        # A model may have more rows than the vocabulary has tokens (padding): those mean nothing.
        if self._detokenizer is None or token_id >= self._vocab_size:
            return ""
        return self._detokenizer.push(token_id)

    def _match(self, event: TokenEvent, matcher: StopMatcher) -> TextChunk | None:
        text = matcher.push(self._take(event))
        self._shown += len(text)
        if matcher.matched is not None:
            return self._finish(text, "stop", matcher.matched)
        tokens = self._release()
        return self._chunk(text, tokens) if text or tokens else None

    def _take(self, event: TokenEvent) -> str:
        """Decode a token and remember where its text starts."""
        self._waiting.append((self._decoded, event))
        text = self._decode(event.token_id)
        self._decoded += len(text)
        return text

    def _release(self) -> list[TokenEvent]:
        """Tokens whose text has begun to be shown: no stop can cut them any more."""
        waiting, tokens = self._waiting, []
        while waiting and waiting[0][0] < self._shown:
            tokens.append(waiting.popleft()[1])
        return tokens

    def _last(self, event: TokenEvent) -> TextChunk:
        reason = event.finish_reason
        assert reason is not None
        if reason == "error":
            self.finished = True
            message = event.error or "the engine failed"
            if event.own_fault:
                raise RequestError(message, param=self._grammar_param, code="invalid_grammar")
            raise EngineError(message)
        text = self._take(event) if reason == "length" else ""
        if self._detokenizer is not None:
            rest = self._detokenizer.flush()
            self._decoded += len(rest)
            text += rest
        if self._matcher is not None:
            text = self._matcher.push(text)
            if self._matcher.matched is not None:
                self._shown += len(text)
                return self._finish(text, "stop", self._matcher.matched)
            text += self._matcher.flush()
        self._shown = self._decoded + 1  # everything is out: no token is held back
        return self._finish(text, reason, None)

    def _finish(self, text: str, reason: str, stop: str | None) -> TextChunk:
        self.finished = True
        chunk = self._chunk(text, self._release())
        timing = self._timing
        if not self.engine_finished:
            timing = replace(timing, finished=time.monotonic(), output_tokens=self._num_tokens)
        usage = Usage(timing.prompt_tokens, self._num_tokens, timing.cached_tokens)
        return chunk._replace(finish_reason=reason, usage=usage, timing=timing, stop=stop)

    def _chunk(self, text: str, events: list[TokenEvent]) -> TextChunk:
        self._num_tokens += len(events)
        return TextChunk(
            text,
            tuple(e.token_id for e in events),
            tuple(e.logprob for e in events if e.logprob is not None),
        )


def join_chunks(chunks: Sequence[TextChunk]) -> TextChunk:
    """Several chunks in a row as one; the end of the last one is the end of it."""
    if len(chunks) == 1:
        return chunks[0]
    return chunks[-1]._replace(
        text="".join(c.text for c in chunks),
        token_ids=tuple(t for c in chunks for t in c.token_ids),
        logprobs=tuple(p for c in chunks for p in c.logprobs),
        reasoning="".join(c.reasoning for c in chunks),
        tool_calls=tuple(d for c in chunks for d in c.tool_calls),
        prompt_logprobs=chunks[0].prompt_logprobs,
    )


def join_calls(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The whole calls that pieces in a row make up."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.name is not None and delta.call_id is not None:
            calls.append(ToolCall(delta.call_id, delta.name, delta.arguments))
        else:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + delta.arguments)
    return tuple(calls)

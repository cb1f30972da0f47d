"""What a dialect must be able to write: the face between Generation and the wire formats.

One Reply encodes one request's answer, streamed or whole. Encoders know nothing of sockets; Generation knows
nothing of bodies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hayai.engine.request import Logprob, RequestTiming
from hayai.frontend import Frontend, TextChunk, Usage
from hayai.frontend_request import ToolCallDelta
from hayai.server.errors import ApiError
from hayai.server.job import Job

TokenBytes = Callable[[int], bytes]

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; the API's own value."""


def token_bytes_of(frontend: Frontend) -> TokenBytes:
    """How log-probabilities name tokens; b"" for one that the vocabulary lacks (a model may have more rows
    than its vocabulary has tokens, or no vocabulary at all)."""
    tokenizer = frontend.tokenizer
    vocab_size = 0 if tokenizer is None else tokenizer.vocab_size

    def token_bytes(token_id: int) -> bytes:
        return b"" if tokenizer is None or token_id >= vocab_size else tokenizer.token_bytes(token_id)

    return token_bytes


@dataclass(frozen=True)
class ReplyHead:
    """What an encoder is told beside the Job.

    model: the name that the answer shows. created: Unix seconds. prompts: the token ids of each prompt.
    machine: what `timings` says of precision and instruction set.
    """

    request_id: str
    model: str
    created: int
    fingerprint: str
    token_bytes: TokenBytes
    prompts: tuple[tuple[int, ...], ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.prompts))


@dataclass
class CollectedCall:
    """A tool call, put together from its pieces."""

    call_id: str = ""
    name: str = ""
    arguments: str = ""

    def add(self, delta: ToolCallDelta) -> None:
        self.call_id = delta.call_id or self.call_id
        self.name = delta.name or self.name
        self.arguments += delta.arguments


@dataclass
class Choice:
    """What one choice has produced so far. In a stream only its end is kept: reason, usage, timing."""

    index: int
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, CollectedCall] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    finish_reason: str | None = None
    stop: str | None = None
    usage: Usage | None = None
    timing: RequestTiming | None = None

    def add(self, chunk: TextChunk) -> None:
        self.text.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        if chunk.reasoning:
            self.reasoning.append(chunk.reasoning)
            if not chunk.text:
                self.reasoning_tokens += len(chunk.token_ids)
        for delta in chunk.tool_calls:
            self.tool_calls.setdefault(delta.call_index, CollectedCall()).add(delta)
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            self.end(chunk)

    def end(self, chunk: TextChunk) -> None:
        """Keep only how it ended."""
        self.finish_reason, self.stop = chunk.finish_reason, chunk.stop
        self.usage, self.timing = chunk.usage, chunk.timing


class Reply(ABC):
    """Encoder of one request's answer. `id_prefix` begins the request's id."""

    id_prefix = ""
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    """Headers that carry the request's id."""
    ping = b": ping\n\n"
    """Keeps a silent stream open; a comment, which every reader of server-sent events skips."""

    def __init__(self, job: Job, head: ReplyHead) -> None:
        self.job = job
        self.head = head

    @abstractmethod
    def opening(self) -> bytes:
        """Events before the first token."""

    @abstractmethod
    def event(self, index: int, chunk: TextChunk) -> bytes:
        """The events of one chunk of choice `index`; b"" where it has nothing to show."""

    async def keep(self, choices: Sequence[Choice]) -> None:
        """Store the answer, in a dialect that does; called once, before `closing` or `whole`."""
        return

    @abstractmethod
    def closing(self, choices: Sequence[Choice]) -> bytes:
        """The events after the last token. `choices` have their reason, usage and timing, no text."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The body of an answer that is not streamed."""

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that fails after it began."""
        return b"data: " + error.body() + b"\n\n"


def totals(job: Job, choices: Sequence[Choice]) -> Usage:
    """Usage over all choices: a prompt counts once, however many choices continue it."""
    usages = [c.usage for c in choices if c.usage is not None]
    prompts = [c.usage for c in choices if c.usage is not None and c.index % job.n == 0]
    return Usage(
        sum(u.prompt_tokens for u in prompts),
        sum(u.completion_tokens for u in usages),
        sum(u.cached_tokens for u in prompts),
    )


def timings(timing: RequestTiming, head: ReplyHead) -> dict[str, Any]:
    """The engine's own clock, in milliseconds, and what it ran in; beside a client's figures, never in their
    place. batch_mean and batch_max: sequences in the steps of this request."""
    return {
        "queue_ms": round(1e3 * (timing.scheduled - timing.arrived), 3),
        "prefill_ms": round(1e3 * (timing.first_token - timing.scheduled), 3),
        "decode_ms": round(1e3 * (timing.finished - timing.first_token), 3),
        "prompt_tokens": timing.prompt_tokens,
        "cached_tokens": timing.cached_tokens,
        "output_tokens": timing.output_tokens,
        "steps": timing.num_steps,
        "batch_mean": round(timing.sum_batch / timing.num_steps, 2) if timing.num_steps else 0.0,
        "batch_max": timing.max_batch,
        "preemptions": timing.num_preemptions,
        **head.machine,
    }

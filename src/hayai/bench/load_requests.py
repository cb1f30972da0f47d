"""From bytes on a socket to what happened to a request: its clock points, its tokens, or how it failed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hayai.bench.http_client import Event, HttpFailure, StreamResult, parse_stream, split_answer
from hayai.bench.load_client import Exchange
from hayai.bench.servers import Dialect


@dataclass(frozen=True)
class Request:
    """One request, from the client's side. Times are perf_counter seconds; nan where it did not happen.

    begun: t_req: the intended time in an open loop, the last byte sent in a closed one (docs/measuring.md).
    lag: how long after its due time the last byte was sent. times: arrivals of chunks with content.
    num_tokens, prompt_tokens, cached_tokens: the server's own count. failure: '' where the answer is whole,
    else its kind ('status 429', 'timeout', 'short' ...), and `detail` the server's words.
    """

    tag: int
    lane: int
    asked: int
    begun: float
    sent: float
    finished: float
    lag: float
    status: int = 0
    times: tuple[float, ...] = ()
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failure: str = ""
    detail: str = ""
    text: str = ""
    logprobs: Any = None
    server: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failure

    @property
    def ttft(self) -> float:
        """Seconds to the first content; nan without any."""
        return self.times[0] - self.begun if self.times else math.nan

    @property
    def e2e(self) -> float:
        """Seconds to the first byte of the last content; of a failed request, to its end."""
        return (self.times[-1] if self.ok and self.times else self.finished) - self.begun

    @property
    def tpot(self) -> float:
        """Seconds per token after the first: (e2e - TTFT) / (n - 1); nan below two tokens, or unseen."""
        return (self.e2e - self.ttft) / (self.num_tokens - 1) if self.num_tokens > 1 else math.nan

    @property
    def rate(self) -> float:
        """Decode tokens per second: (n - 1) / (t_last - t_first); nan below two tokens."""
        span = self.times[-1] - self.times[0] if self.times else 0.0
        return (self.num_tokens - 1) / span if self.num_tokens > 1 and span > 0 else math.nan

    @property
    def gaps(self) -> tuple[float, ...]:
        """Inter-token gaps in seconds; empty where a chunk held several tokens, or a token showed no text:
        what can't be seen is not made up."""
        if len(self.times) != self.num_tokens:
            return ()
        return tuple(b - a for a, b in zip(self.times, self.times[1:], strict=False))

    @property
    def pauses(self) -> tuple[float, ...]:
        """Gaps between successive chunks with text, in seconds: the token gaps where every token is a chunk,
        and never less than them where one showed no text of its own."""
        return tuple(b - a for a, b in itertools.pairwise(self.times))


def read(exchange: Exchange, dialect: Dialect, *, stream: bool = True, forced: bool = True) -> Request:
    """Understand one exchange. forced: the answer must have exactly the tokens asked for."""
    shot = exchange.shot
    begun = exchange.due if shot.at is not None else exchange.sent
    if math.isnan(begun):
        begun = exchange.due
    base = Request(
        shot.tag, exchange.lane, shot.asked, begun, exchange.sent, exchange.finished,
        exchange.sent - exchange.due,
    )  # fmt: skip
    try:
        if exchange.failure:
            status, times = _partial(exchange, dialect)
            return replace(base, status=status, times=times, failure=exchange.failure)
        understand = _streamed if stream else _whole
        return understand(base, exchange, dialect, forced)
    except HttpFailure as error:
        kind = f"status {error.status}" if error.status else "broken answer"
        return replace(base, status=error.status, failure=kind, detail=str(error))
    except (ValueError, KeyError, IndexError, StopIteration, TypeError) as error:
        return replace(base, failure="not understood", detail=f"{type(error).__name__}: {error}")


def _streamed(base: Request, exchange: Exchange, dialect: Dialect, forced: bool) -> Request:
    result = parse_stream(exchange.sent, exchange.pieces)
    wrong = next((e.data for e in result.events if "error" in e.data), None)
    times = tuple(e.time for e in result.events if dialect.content(e))
    if wrong is not None:
        detail = json.dumps(wrong)[:500]
        return replace(base, status=200, times=times, failure="error event", detail=detail)
    found = _counted(base, dialect.counts(result), times, forced)
    text = "".join(dialect.text(e) for e in result.events)
    return replace(found, status=result.status, text=text, server=dialect.timings(result.events))


def _whole(base: Request, exchange: Exchange, dialect: Dialect, forced: bool) -> Request:
    """An answer that is not streamed: one JSON body, and no clock point of a token."""
    status, body, _ = split_answer(exchange.pieces)
    event = Event(exchange.pieces[-1][0], json.loads(body))
    counts = dialect.counts(StreamResult(status, exchange.sent, exchange.finished, (event,)))
    choices: Sequence[Mapping[str, Any]] = event.data.get("choices") or ({},)
    found = replace(_counted(base, counts, (event.time,), forced), times=())
    return replace(found, status=status, text=dialect.text(event), logprobs=choices[0].get("logprobs"))


def _counted(base: Request, counts: tuple[int, int, int], times: tuple[float, ...], forced: bool) -> Request:
    """With the server's counts; an answer without content, or of another length than forced, has failed."""
    failure = "" if times else "no content"
    if times and forced and counts[0] != base.asked:
        failure = "short"
    return replace(
        base, times=times, num_tokens=counts[0], prompt_tokens=counts[1], cached_tokens=counts[2],
        failure=failure,
    )  # fmt: skip


def _partial(exchange: Exchange, dialect: Dialect) -> tuple[int, tuple[float, ...]]:
    """Status and content times of an answer that was cut: what there was of it still counts for its TTFT."""
    if not exchange.pieces:
        return 0, ()
    try:
        found = parse_stream(exchange.sent, exchange.pieces, partial=True)
    except (HttpFailure, ValueError) as error:
        return getattr(error, "status", 0), ()
    return found.status, tuple(e.time for e in found.events if dialect.content(e))

"""Named loads with made-up prompts: eight at a time, a stream beside long prompts, shared prefixes, overload.

Each is one function of a session; load.py lists them with what they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hayai.bench.arrivals import poisson
from hayai.bench.load_client import Shot, clock
from hayai.bench.load_metrics import LoadStats, median, percentiles
from hayai.bench.load_session import LoadSession, Repetition
from hayai.bench.load_sides import LoadSide, Probe, Room
from hayai.bench.servers import Prompt

OUR_SLOTS = 16
"""Sequences that run at the same time, for every side, where a case does not say otherwise."""

PROBE_SECONDS = 40.0
"""A setting whose short load takes longer is judged by what it had done until then."""
FREEZE_SECONDS = 150.0

# ---------------------------------------------------------------- closed loops of equal requests


@dataclass(frozen=True)
class Closed:
    """`users` at a time, each sending its next request when its last one is answered."""

    users: int
    rounds: int
    prompt_tokens: int
    output_tokens: int

    @property
    def context(self) -> int:
        """Tokens per sequence, rounded up to whole blocks of any common size."""
        return -(-(self.prompt_tokens + self.output_tokens + 1) // 256) * 256

    def draw(self, session: LoadSession) -> list[list[Prompt]]:
        """New prompts, by user."""
        return [[session.prompt(self.prompt_tokens) for _ in range(self.rounds)] for _ in range(self.users)]

    def lanes(
        self, session: LoadSession, side: LoadSide, prompts: Sequence[Sequence[Prompt]]
    ) -> list[list[Shot]]:
        return [
            [
                session.shot(side, prompt, self.output_tokens, tag=user * self.rounds + i)
                for i, prompt in enumerate(mine)
            ]
            for user, mine in enumerate(prompts)
        ]


PARALLEL8 = Closed(users=8, rounds=2, prompt_tokens=128, output_tokens=128)


def parallel8(session: LoadSession) -> None:
    """8 parallel, 128 tokens in, 128 out: system tokens per second, and median TTFT."""
    closed_loop(session, "parallel8", PARALLEL8)


def closed_loop(session: LoadSession, name: str, loop: Closed) -> None:
    """Ours and the peers in turn on the same cold prompts."""
    room = Room(loop.context, loop.users, "batch")
    short = Closed(loop.users, 1, loop.prompt_tokens, min(32, loop.output_tokens))
    drawn: list[list[list[Prompt]]] = []

    def probe(side: LoadSide) -> float:
        lanes = short.lanes(session, side, short.draw(session))
        return session.turn(name, side, -1, lanes, limit=PROBE_SECONDS).stats.output_rate

    def work(side: LoadSide, pair: int) -> None:
        now = short if pair < 0 else loop
        found = session.turn(name, side, pair, now.lanes(session, side, drawn[-1]))
        session.warn_of_hits(found)
        session.row(name, found, found.stats.output_rate, "tok/s", **spoken(found.stats))
        session.row(f"{name}-ttft", found, found.stats.ttft.p50 * 1e3, "ms")

    def draw(pair: int) -> None:
        drawn.append((short if pair < 0 else loop).draw(session))

    with session.sides(room, probe) as sides:
        session.alternate(name, sides, work, draw)


def spoken(stats: LoadStats) -> dict[str, float]:
    """What a reader must see beside a figure."""
    return {"tokens_per_chunk": stats.tokens_per_chunk}


# ---------------------------------------------------------------- open loop


def open_loop(
    session: LoadSession, name: str, rate: float, count: int, prompt_tokens: int, output_tokens: int
) -> None:
    """Poisson arrivals at `rate` per second: TTFT, TPOT, and what was achieved of the rate."""
    loop = Closed(OUR_SLOTS, 1, prompt_tokens, output_tokens)
    room = Room(loop.context, OUR_SLOTS, "batch")
    drawn: list[list[Prompt]] = []

    def draw(pair: int) -> None:
        drawn.append([session.prompt(prompt_tokens) for _ in range(count if pair >= 0 else 2)])

    def work(side: LoadSide, pair: int) -> None:
        times = poisson(rate, len(drawn[-1]), session.options.seed + pair)
        lanes = [
            [session.shot(side, prompt, output_tokens, at=at, tag=i)]
            for i, (prompt, at) in enumerate(zip(drawn[-1], times, strict=True))
        ]
        found = session.turn(name, side, pair, lanes, about={"rate": rate})
        session.warn_of_hits(found)
        session.row(name, found, found.stats.output_rate, "tok/s", **spoken(found.stats))
        session.row(f"{name}-ttft", found, found.stats.ttft.p50 * 1e3, "ms")
        session.row(f"{name}-tpot", found, found.stats.tpot.p50 * 1e3, "ms")

    def probe(side: LoadSide) -> float:
        short = Closed(min(8, OUR_SLOTS), 1, prompt_tokens, min(32, output_tokens))
        lanes = short.lanes(session, side, short.draw(session))
        return session.turn(name, side, -1, lanes, limit=PROBE_SECONDS).stats.output_rate

    with session.sides(room, probe) as sides:
        session.alternate(name, sides, work, draw)


# ---------------------------------------------------------------- a stream beside long prompts


@dataclass(frozen=True)
class Freeze:
    """One stream (answers of `answer` tokens, one after the other, so that its depth is that of the stream
    alone), and a cold prompt every `period` seconds beside it."""

    prompt_tokens: int = 2000
    period: float = 4.0
    arrivals: int = 4
    answer: int = 512
    stream_prompt: int = 32
    most_answers: int = 64

    @property
    def context(self) -> int:
        return -(-(max(self.prompt_tokens, self.stream_prompt + self.answer) + 16) // 256) * 256


FREEZE = Freeze()
QUICK_FREEZE = Freeze(prompt_tokens=500, period=1.0, arrivals=2, answer=64)
COLD_ANSWER = 8
"""Tokens that each long prompt is answered with."""
STREAM = 0
"""Tag of the stream's requests."""


class FreezeLoad:
    """The load of the case, for one side at a time."""

    def __init__(self, session: LoadSession, shape: Freeze) -> None:
        self.session, self.shape = session, shape
        self.streams: list[Prompt] = []
        self.cold: list[Prompt] = []

    def draw(self, pair: int) -> None:
        prompt, shape = self.session.prompt, self.shape
        self.streams = [prompt(shape.stream_prompt) for _ in range(shape.most_answers + 1)]
        self.cold = [prompt(shape.prompt_tokens) for _ in range(shape.arrivals)]

    def alone(self, side: LoadSide, pair: int) -> Repetition:
        shot = self.session.shot(side, self.streams[0], self.shape.answer)
        return self.session.turn("freeze-solo", side, pair, [[shot]])

    def beside(self, side: LoadSide, pair: int, cold: Sequence[Prompt]) -> Repetition:
        """The stream lasts until one period after the last prompt came."""
        shape, shot = self.shape, self.session.shot
        data = [shot(side, prompt, shape.answer, tag=STREAM) for prompt in self.streams[1:]]
        seconds = shape.period * (len(cold) + 0.25)

        def stream() -> Iterator[Shot]:
            end = clock() + seconds
            for one in data:
                if clock() >= end:
                    return
                yield one

        first = shape.period / 4
        lanes: list[Iterable[Shot]] = [stream()]
        for i, prompt in enumerate(cold):
            lanes.append([shot(side, prompt, COLD_ANSWER, at=first + i * shape.period, tag=1 + i)])
        limit = PROBE_SECONDS if pair < 0 else FREEZE_SECONDS
        return self.session.turn("freeze", side, pair, lanes, limit=limit)

    def work(self, side: LoadSide, pair: int) -> None:
        solo = self.alone(side, pair)
        if pair < 0:
            return
        found = self.beside(side, pair, self.cold)
        row = self.session.row
        self.session.warn_of_hits(found)
        seen = percentiles([g for r in found.requests if r.tag == STREAM and r.ok for g in r.pauses])
        usual = percentiles(solo.requests[0].pauses).p50
        row("freeze-solo", solo, usual * 1e3, "ms", **spoken(solo.stats))
        row("freeze-gap", found, seen.p99 * 1e3, "ms", longest_gap_ms=seen.max * 1e3, gaps=float(seen.n))
        row("freeze", found, seen.p99 / usual, "x", **spoken(found.stats))
        row("freeze-ttft", found, median([r.ttft for r in found.requests if r.tag != STREAM]) * 1e3, "ms")

    def probe(self, side: LoadSide) -> float:
        """The reciprocal of the stream's longest gap beside one prompt: settings that freeze it least win."""
        self.draw(-1)
        found = self.beside(side, -1, self.cold[:1])
        return 1.0 / max((g for r in found.requests if r.tag == STREAM for g in r.pauses), default=math.inf)


def freeze(session: LoadSession) -> None:
    """p99 of the stream's inter-token gaps while cold prompts arrive, over its median gap alone."""
    load = FreezeLoad(session, QUICK_FREEZE if session.options.quick else FREEZE)
    with session.sides(Room(load.shape.context, 4, "freeze"), load.probe) as sides:
        session.alternate("freeze", sides, load.work, load.draw)


# ---------------------------------------------------------------- shared prefixes

PREFIX_TOKENS = 1000
SUFFIX_TOKENS = 32
PREFIX_ANSWER = 8


def prefix(session: LoadSession) -> None:
    """TTFT of a second request with the same 1,000-token prefix and a fresh suffix, over the first one's."""
    drawn: list[list[list[int]]] = []

    def draw(pair: int) -> None:
        shared = session.prompts.ids(PREFIX_TOKENS)
        drawn.append([shared + session.prompts.ids(SUFFIX_TOKENS) for _ in range(2)])

    def ask(side: LoadSide, pair: int, name: str, ids: list[int]) -> Repetition:
        prompt = session.text_of(ids) if session.options.text_prompts else ids
        return session.turn(name, side, pair, [[session.shot(side, prompt, PREFIX_ANSWER, cached=True)]])

    def work(side: LoadSide, pair: int) -> None:
        cold = ask(side, pair, "prefix-cold", drawn[-1][0])
        warm = ask(side, pair, "prefix-warm", drawn[-1][1])
        session.warn_of_hits(cold)
        session.row("prefix-cold", cold, cold.stats.ttft.p50 * 1e3, "ms")
        session.row(
            "prefix-warm", warm, warm.stats.ttft.p50 * 1e3, "ms", cached=float(warm.stats.cached_tokens)
        )
        session.row("prefix", warm, warm.stats.ttft.p50 / cold.stats.ttft.p50, "x")

    with session.sides(Room(2048, 4, "cached"), cached_probe(session)) as sides:
        session.alternate("prefix", sides, work, draw)


def cached_probe(session: LoadSession) -> Probe:
    """Prompt tokens per second over four prompts at once: what is not cached must be computed fast."""

    def probe(side: LoadSide) -> float:
        loop = Closed(4, 1, 512, 8)
        lanes = loop.lanes(session, side, loop.draw(session))
        found = session.turn("calibration", side, -1, lanes, limit=PROBE_SECONDS)
        return found.stats.prompt_tokens / found.stats.window

    return probe


# ---------------------------------------------------------------- overload

OVERLOAD = Closed(users=OUR_SLOTS, rounds=2, prompt_tokens=128, output_tokens=64)
OVERLOAD_FACTOR = 10.0
OVERLOAD_SECONDS = 8.0
BUSY = ("status 429",)
"""How a server says that it has too much to do."""


def overload(session: LoadSession) -> None:
    """Ten times the rate that the server can take: what is accepted keeps its latency, the rest gets 429.

    Capacity and its latency come from a closed loop of as many users as sequences run, just before.
    """
    seconds = 2.0 if session.options.quick else OVERLOAD_SECONDS

    def work(side: LoadSide, pair: int) -> None:
        lanes = OVERLOAD.lanes(session, side, OVERLOAD.draw(session))
        full = session.turn("overload-capacity", side, pair, lanes)
        if pair < 0:
            return
        rate = OVERLOAD_FACTOR * full.stats.request_rate
        times = poisson(rate, max(2, int(rate * seconds)), session.options.seed + pair)
        shots = [
            [session.shot(side, session.prompt(OVERLOAD.prompt_tokens), OVERLOAD.output_tokens, at=at, tag=i)]
            for i, at in enumerate(times)
        ]
        found = session.turn(
            "overload", side, pair, shots, about={"capacity": full.stats.request_rate, "rate": rate}
        )
        report_overload(session, full, found)

    with session.sides(Room(OVERLOAD.context, OUR_SLOTS, "batch"), None, peers=False) as sides:
        session.alternate("overload", sides, work)


def report_overload(session: LoadSession, full: Repetition, found: Repetition) -> None:
    accepted = found.stats.e2e
    refused = [r for r in found.requests if r.failure in BUSY]
    other = [r for r in found.requests if not r.ok and r.failure not in BUSY]
    session.row(
        "overload", found, accepted.p50 / full.stats.e2e.p50, "x", accepted=float(accepted.n),
        refused=float(len(refused)),
    )  # fmt: skip
    session.row("overload-p99", found, accepted.p99 / full.stats.e2e.p99, "x")
    waits = percentiles([r.finished - r.begun for r in refused])
    session.row("overload-refusal", found, waits.p99 * 1e3, "ms")
    session.row("overload-failures", found, float(len(other)), "requests")

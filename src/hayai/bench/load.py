"""`hayai bench load`: named loads, or one of the user's own, against our server or a URL, and its peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from hayai.bench import load_agent, load_bits, load_cases, load_replay
from hayai.bench.load_cases import Closed
from hayai.bench.load_metrics import Slo
from hayai.bench.load_session import LoadSession, Say, open_load
from hayai.bench.load_sides import LoadOptions
from hayai.bench.peers import PeerFailure
from hayai.bench.session import SpeedOptions
from hayai.bench.speed import run as run_speed
from hayai.errors import ConfigError


@dataclass(frozen=True)
class LoadCase:
    """A named load. rows: the figures it reports, in words. data: whether it needs recorded data."""

    name: str
    title: str
    run: Callable[[LoadSession], None]
    rows: Mapping[str, str]
    data: bool = False


def overhead(session: LoadSession) -> None:
    """One stream over HTTP against the same prompts in process: `hayai bench speed --cases http`."""
    options = session.options
    if options.url:
        session.note("overhead: needs our own server in this run, so not with --url")
        return
    speed = SpeedOptions(
        options.model, options.home, options.threads, options.pairs, ("http",), (), seed=options.seed
    )
    measured = run_speed(speed, session.say)
    session.rows += measured.rows
    for note in measured.notes:
        session.note(note)


CASES: tuple[LoadCase, ...] = (
    LoadCase(
        "parallel8",
        "8 users at a time, 128 tokens in, 128 out",
        load_cases.parallel8,
        {
            "parallel8": "8 parallel, 128 in, 128 out: output tokens of all",
            "parallel8-ttft": "their median TTFT",
        },
    ),
    LoadCase(
        "freeze",
        "a stream beside a cold 2,000-token prompt every 4 s",
        load_cases.freeze,
        {
            "freeze-solo": "a stream alone: median gap between tokens",
            "freeze-gap": "the stream beside cold prompts: p99 gap between tokens",
            "freeze": "p99 gap beside cold prompts over the median gap alone",
            "freeze-ttft": "median TTFT of the cold prompts",
        },
    ),
    LoadCase(
        "prefix",
        "a shared prefix of 1,000 tokens with a fresh suffix of 32",
        load_cases.prefix,
        {
            "prefix-cold": "TTFT of 1,032 cold tokens",
            "prefix-warm": "TTFT of the same 1,000 and 32 new ones",
            "prefix": "warm TTFT over cold TTFT",
        },
    ),
    LoadCase(
        "bits",
        "16 requests alone, in parallel, cached, with and without logprobs: the same bits",
        load_bits.bits,
        {"bits": "requests whose answer changed in any situation"},
    ),
    LoadCase(
        "overhead",
        "one stream over HTTP against in process",
        overhead,
        {"http": "decode over HTTP after a 32-token prompt, against in process"},
    ),
    LoadCase(
        "overload",
        "ten times the rate that the server can take",
        load_cases.overload,
        {
            "overload": "accepted requests: median end to end over that of a full server",
            "overload-p99": "the same of the p99s",
            "overload-refusal": "p99 of the time to a 429",
            "overload-failures": "requests that failed in any other way",
        },
    ),
    LoadCase(
        "agent",
        "recorded agent conversations, turn by turn",
        load_agent.agent,
        {"agent-first": "first turns: median TTFT", "agent": "later turns: median TTFT"},
        data=True,
    ),
    LoadCase(
        "mooncake",
        "a recorded chat trace with shared prefixes, swept over rates",
        load_replay.mooncake,
        {"mooncake": "highest rate at which 90 % have TTFT <= 2 s and TPOT <= 50 ms"},
        data=True,
    ),
)
CASE_NAMES = tuple(case.name for case in CASES)


@dataclass(frozen=True)
class Custom:
    """A load of the user's own, instead of the named cases: one of the three kinds.

    concurrency: a closed loop. rate: Poisson arrivals, or with `trace` that trace at this rate. trace without
    a rate: swept over rates. requests: how many, per repetition.
    """

    concurrency: int | None = None
    rate: float | None = None
    trace: str | None = None
    requests: int = 32
    prompt_tokens: int = 128
    output_tokens: int = 128
    slo: Slo = field(default_factory=Slo)

    @property
    def name(self) -> str:
        if self.trace is not None:
            return f"{self.trace}-sweep" if self.rate is None else self.trace
        return "open" if self.concurrency is None else "closed"

    def titles(self) -> dict[str, str]:
        """Its figures in words."""
        lengths = f"{self.prompt_tokens} in, {self.output_tokens} out"
        if self.trace is not None and self.rate is None:
            return {self.name: f"{self.trace}: highest rate at which 90 % have {self.slo}"}
        if self.trace is not None:
            head = f"{self.trace} at {self.rate:g} requests/s"
            goodput = f"{head}: goodput at {self.slo}"
            return {
                f"{self.name}-goodput": goodput,
                f"{self.name}-ttft": "median TTFT",
                f"{self.name}-tpot": "median TPOT",
            }
        if self.concurrency is not None:
            head = f"{self.concurrency} users at a time, {lengths}"
        else:
            head = f"Poisson arrivals, {self.rate:g} requests/s, {lengths}"
        return {"closed": head, "closed-ttft": "median TTFT"} if self.name == "closed" else {
            "open": head, "open-ttft": "median TTFT", "open-tpot": "median TPOT",
        }  # fmt: skip

    def run(self, session: LoadSession) -> None:
        if self.trace is not None:
            if self.rate is None:
                load_replay.sweep(session, self.name, self.trace, self.slo)
            else:
                load_replay.at_one_rate(session, self.trace, self.rate, self.requests, self.slo)
        elif self.concurrency is not None:
            rounds = max(1, math.ceil(self.requests / self.concurrency))
            loop = Closed(self.concurrency, rounds, self.prompt_tokens, self.output_tokens)
            load_cases.closed_loop(session, self.name, loop)
        elif self.rate is not None:
            load_cases.open_loop(
                session, self.name, self.rate, self.requests, self.prompt_tokens, self.output_tokens
            )


def run(options: LoadOptions, say: Say, custom: Custom | None = None) -> LoadSession:
    """Measure; the session that comes back is closed and holds every row and repetition."""
    with open_load(options, say) as session:
        if custom is not None:
            with reported(session, custom.name):
                custom.run(session)
            return session
        for case in CASES:
            if case.name in options.cases:
                if case.data and options.data is None:
                    session.note(f"{case.name}: needs recorded data: --data DIR, or HAYAI_DATA")
                    continue
                say(f"{case.name}: {case.title}")
                with reported(session, case.name):
                    case.run(session)
        return session


@contextmanager
def reported(session: LoadSession, what: str) -> Iterator[None]:
    """Write a failure down and go on with the next case; the run's verdict shows what is missing."""
    try:
        yield
    except (PeerFailure, ConfigError) as error:
        session.note(f"{what}: {error}")


def expected(options: LoadOptions, custom: Custom | None = None) -> set[str]:
    """The figures that a run was asked for: one that is missing is a bar not measured."""
    if custom is not None:
        return set()
    return {name for case in CASES if case.name in options.cases for name in case.rows}


def titles(custom: Custom | None = None) -> dict[str, str]:
    """Figure -> what it is, in the order of the table."""
    if custom is not None:
        return custom.titles()
    return {name: words for case in CASES for name, words in case.rows.items()}

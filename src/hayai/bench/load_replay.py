"""Recorded traffic: traces of arrivals and lengths, swept over rates, and agent conversations turn by turn.

No recorded text is needed for a trace: equal block ids become equal made-up text, all else is made up too.
Conversations are sent with their recorded messages, clipped to what a small context takes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hayai.bench.arrivals import (
    Arrival,
    at_rate,
    read_trace,
    scaled_lengths,
    shared_tokens,
    thinned,
    time_factor,
)
from hayai.bench.load_cases import OUR_SLOTS, cached_probe, spoken
from hayai.bench.load_client import Exchange, Shot, Stop
from hayai.bench.load_metrics import Slo
from hayai.bench.load_session import LoadSession, Repetition
from hayai.bench.load_sides import LoadSide, Room
from hayai.bench.peers import PeerFailure
from hayai.bench.servers import Prompt
from hayai.bench.sweep import RateSearch

CONTEXT = 8192
CHAT_SLO = Slo(ttft=2.0, tpot=0.05)
WANTED_SHARE = 0.9
"""Of the requests must meet every level for a rate to count as stood."""
SWEEP_REQUESTS = 64
QUICK_REQUESTS = 8


# ---------------------------------------------------------------- from arrivals to requests


class Replay:
    """A sample of a trace, as requests: the same sample for every side and rate, its text new every time."""

    def __init__(self, session: LoadSession, name: str, count: int) -> None:
        options = session.options
        trace = read_trace(name, options.data)
        fitting = scaled_lengths(trace, options.length_factor, CONTEXT - 1)
        self.session, self.name = session, name
        self.arrivals = thinned(fitting, count, options.seed)[:count]
        hits, total = shared_tokens(self.arrivals)
        lengths = sorted(a.prompt_tokens for a in self.arrivals)
        outputs = sorted(a.output_tokens for a in self.arrivals)
        middle = len(lengths) // 2
        session.note(
            f"{name}: {len(self.arrivals)} of {len(trace)} requests, whole conversations drawn with seed "
            f"{options.seed}; lengths divided by {options.length_factor:g} (prompt median {lengths[middle]}, "
            f"largest {lengths[-1]} tokens; answer median {outputs[middle]}, largest {outputs[-1]}), "
            f"{len(trace) - len(fitting)} left out because they pass the context; {hits / total:.0%} of the "
            "prompt tokens stand in an earlier request's prefix"
        )

    def shots(self, side: LoadSide, rate: float) -> list[Shot]:
        """The sample at a rate; every call makes new text, equal only where block ids are equal."""
        blocks: dict[int, list[int]] = {}
        found = []
        for tag, arrival in enumerate(at_rate(self.arrivals, rate)):
            prompt = self._prompt(arrival, blocks)
            found.append(
                self.session.shot(
                    side, prompt, arrival.output_tokens, at=arrival.at, tag=tag, cached=bool(arrival.blocks)
                )
            )
        return found

    def _prompt(self, arrival: Arrival, blocks: dict[int, list[int]]) -> Prompt:
        prompts = self.session.prompts
        if not arrival.blocks:
            return self.session.prompt(arrival.prompt_tokens)
        for block in arrival.blocks:
            if block not in blocks:
                blocks[block] = prompts.ids(arrival.block_tokens)
        ids = list(itertools.chain.from_iterable(blocks[block] for block in arrival.blocks))
        ids = ids[: arrival.prompt_tokens]
        return self.session.text_of(ids) if self.session.options.text_prompts else ids

    def run(self, side: LoadSide, rate: float, case: str, pair: int, slo: Slo) -> Repetition:
        """One replay at a rate; given up as soon as too many requests have missed their levels."""
        shots = self.shots(side, rate)
        about = {"rate": rate, "time_factor": time_factor(self.arrivals, rate)}
        found = self.session.turn(
            case, side, pair, [[shot] for shot in shots], slo=slo, stop=hopeless(slo, len(shots)), about=about
        )
        if found.stopped:
            settle(self.session, side)
        return found


def hopeless(slo: Slo, count: int) -> Stop:
    """True once so many requests have surely missed a level that WANTED_SHARE is out of reach.

    A request is sure to have missed one when it took (or is taking) longer than TTFT + (n - 1) x TPOT.
    """
    allowed = math.floor((1.0 - WANTED_SHARE) * count + 1e-9)

    def stop(now: float, exchanges: Sequence[Exchange]) -> bool:
        missed = sum(
            1 for e in exchanges if (e.finished if e.over else now) - e.due > slo.latest(e.shot.asked)
        )
        return missed > allowed

    return stop


def settle(session: LoadSession, side: LoadSide) -> None:
    """Wait until a server has dropped what was given up: a short request comes back."""
    session.turn("settle", side, -1, [[session.shot(side, session.prompt(16), 2)]])


# ---------------------------------------------------------------- sweep


@dataclass
class Climb:
    """One side's search in one sweep. spent: seconds of load so far."""

    side: LoadSide
    search: RateSearch
    spent: float = 0.0
    best: Repetition | None = None
    last: Repetition | None = None


def sweep(session: LoadSession, case: str, trace: str, slo: Slo = CHAT_SLO) -> None:
    """The highest rate at which WANTED_SHARE of the requests meet the levels, for every side in turn.

    The sides take turns rate by rate, so that they see the same minutes. A side's first guess comes from a
    closed loop over the first requests; later sweeps start from the last one's result.
    """
    quick = session.options.quick
    replay = Replay(session, trace, QUICK_REQUESTS if quick else SWEEP_REQUESTS)
    room = Room(CONTEXT, OUR_SLOTS, "cached")
    guesses: dict[str, float] = {}
    with session.sides(room, cached_probe(session)) as sides:
        for side in tuple(sides):
            try:
                guesses[side.label] = first_guess(session, replay, side)
            except PeerFailure as error:
                session.note(f"{case}: {error}")
        running = [side for side in sides if side.label in guesses]
        for pair in range(session.options.pairs):
            session.measure_bandwidth()
            for climb in climb_all(session, replay, running, guesses, case, pair, slo):
                report_climb(session, case, climb)
                guesses[climb.side.label] = climb.search.passed or guesses[climb.side.label] / 2


def first_guess(session: LoadSession, replay: Replay, side: LoadSide) -> float:
    """Half the rate that eight users reach with the first requests of the sample."""
    shots = replay.shots(side, 1.0)[:16]
    queue = iter([replace(shot, at=None) for shot in shots])
    found = session.turn("guess", side, -1, [queue] * min(8, len(shots)))
    return max(0.02, found.stats.request_rate / 2)


def climb_all(
    session: LoadSession, replay: Replay, sides: Sequence[LoadSide], guesses: dict[str, float], case: str,
    pair: int, slo: Slo,
) -> list[Climb]:  # fmt: skip
    """Every side's search, one probe each in turn, within the time budget per side."""
    most = 2 if session.options.quick else 10
    climbs = [Climb(side, RateSearch(guesses[side.label], max_probes=most)) for side in sides]
    waiting = list(climbs)
    while waiting:
        for climb in tuple(waiting):
            rate = climb.search.next_rate()
            if rate is None or climb.spent > session.options.budget:
                waiting.remove(climb)
                continue
            began = time.perf_counter()
            try:
                found = replay.run(climb.side, rate, case, pair, slo)
            except PeerFailure as error:
                session.note(f"{case}: {error}")
                waiting.remove(climb)
                continue
            climb.spent += time.perf_counter() - began
            climb.last = found
            stood = not found.stopped and found.stats.met >= WANTED_SHARE
            climb.search.record(rate, stood)
            if stood:
                climb.best = found
            session.say(
                f"  {case} sweep {pair + 1}: {climb.side.label} at {rate:.2f}/s: {found.stats.met:.0%} met"
                f"{', given up' if found.stopped else ''}{'  ' + found.failures if found.failures else ''}"
            )
    return climbs


def report_climb(session: LoadSession, case: str, climb: Climb) -> None:
    found, search = climb.best or climb.last, climb.search
    if found is None:
        return
    if not search.bracketed:
        session.note(
            f"{case}: {climb.side.label} sweep {found.pair + 1} ended without a bracket after "
            f"{len(search.probes)} rates and {climb.spent:.0f} s: {search.passed:.2f}/s passed, "
            f"{'nothing failed' if math.isinf(search.failed) else f'{search.failed:.2f}/s failed'}"
        )
    rate = search.passed
    if rate == 0.0 and climb.side.peer != "hayai":
        # so that a ratio against it is a lower bound and not a division by zero
        rate = search.failed
        session.note(
            f"{case}: {climb.side.label} stood no rate that was tried; its figure is the lowest of them"
        )
    stats = found.stats
    cached = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
    session.row(
        case, found, rate, "requests/s", probes=float(len(search.probes)), failed_at=search.failed,
        cached_share=cached, time_factor=float(found.about.get("time_factor", math.nan)), **spoken(stats),
    )  # fmt: skip


def mooncake(session: LoadSession) -> None:
    """The Mooncake conversation trace, scaled, swept over arrival rates."""
    sweep(session, "mooncake", "mooncake")


def at_one_rate(session: LoadSession, trace: str, rate: float, count: int, slo: Slo) -> None:
    """A trace replayed once per pair at one rate, whatever comes of it."""
    replay = Replay(session, trace, count)

    def work(side: LoadSide, pair: int) -> None:
        if pair < 0:
            settle(session, side)
            return
        lanes = [[shot] for shot in replay.shots(side, rate)]
        about = {"rate": rate, "time_factor": time_factor(replay.arrivals, rate)}
        found = session.turn(trace, side, pair, lanes, slo=slo, about=about)
        session.row(f"{trace}-goodput", found, found.stats.goodput, "requests/s", met=found.stats.met)
        session.row(f"{trace}-ttft", found, found.stats.ttft.p50 * 1e3, "ms")
        session.row(f"{trace}-tpot", found, found.stats.tpot.p50 * 1e3, "ms", **spoken(found.stats))

    with session.sides(Room(CONTEXT, OUR_SLOTS, "cached"), cached_probe(session)) as sides:
        session.alternate(trace, sides, work)

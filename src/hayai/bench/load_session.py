"""One run of `hayai bench load`: servers as sides, turns with meters around them, and what was recorded."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import hayai
from hayai.bench.claims import step_bytes
from hayai.bench.inprocess import Roofline, load_frontend, measure_roofline
from hayai.bench.load_client import Driven, Shot, Stop, drive
from hayai.bench.load_metrics import LoadStats, Slo, measure
from hayai.bench.load_requests import Request, read
from hayai.bench.load_sides import LoadOptions, LoadSide, Peers, Probe, Remote, Room, our_side
from hayai.bench.machine import Load, LoadMeter, identity
from hayai.bench.peers import PeerFailure
from hayai.bench.prompts import PromptSource
from hayai.bench.rows import Row
from hayai.bench.servers import Prompt
from hayai.errors import ConfigError
from hayai.frontend import Frontend

Say = Callable[[str], None]


@dataclass(frozen=True)
class Repetition:
    """One load on one side. client_cpu, server_cpu: shares of one core over the wall time of the load."""

    case: str
    side: str
    peer: str
    file: str
    pair: int
    started: float
    requests: tuple[Request, ...]
    stats: LoadStats
    slo: Slo
    load: Load
    client_cpu: float
    server_cpu: float
    stopped: bool
    settings: str
    about: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def failures(self) -> str:
        return ", ".join(f"{count} x {kind}" for kind, count in self.stats.failures.items())


@dataclass
class LoadSession:
    """State of a run."""

    options: LoadOptions
    frontend: Frontend
    path: Path
    prompts: PromptSource
    say: Say
    peers: Peers
    rows: list[Row] = field(default_factory=list)
    repetitions: list[Repetition] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    identity: dict[str, object] = field(default_factory=dict)
    bandwidth: list[Roofline] = field(default_factory=list)

    @property
    def logs(self) -> Path:
        return self.options.home / "bench" / "logs"

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.say(text)

    def kv_token_bytes(self) -> float:
        """Bytes that one token's keys and values take in our cache."""
        facts = self.frontend.loaded.describe()
        size, tokens = facts.get("kv_mib_when_full"), facts.get("kv_tokens")
        if isinstance(size, (int, float)) and isinstance(tokens, int) and tokens:
            return size * 2**20 / tokens
        return 0.0

    # ------------------------------------------------------------ requests

    def prompt(self, tokens: int) -> Prompt:
        """A new prompt of that many token ids, or as a text of about as many."""
        ids = self.prompts.ids(tokens)
        return self.text_of(ids) if self.options.text_prompts else ids

    def text_of(self, ids: Sequence[int]) -> str:
        tokenizer = self.frontend.tokenizer
        if tokenizer is None:
            raise ConfigError("prompts as text need a model file with a vocabulary")
        return tokenizer.decode(ids)

    def shot(
        self, side: LoadSide, prompt: Prompt, tokens: int, *, at: float | None = None, tag: int = 0,
        cached: bool = False, stream: bool = True, patience: float = 180.0,
        more: Mapping[str, Any] | None = None,
    ) -> Shot:  # fmt: skip
        """One request in the side's own dialect. more: fields on top."""
        forced = self.options.forced
        fields = side.dialect.payload(prompt, tokens, forced=forced, cached=cached, stream=stream)
        body = json.dumps(fields | dict(more or {})).encode()
        return Shot(side.address.post(side.dialect.path, body), tokens, at, tag, patience)

    # ------------------------------------------------------------ one load

    def turn(
        self, case: str, side: LoadSide, pair: int, lanes: Sequence[Iterable[Shot]], *,
        slo: Slo | None = None, stream: bool = True, limit: float = math.inf, stop: Stop | None = None,
        about: Mapping[str, float | str] | None = None,
    ) -> Repetition:  # fmt: skip
        """Drive the lanes against one side with the meters around it. pair -1 is a warm-up: not recorded.

        PeerFailure where no request at all succeeded, unless the load was given up by `stop`.
        """
        side.resume()
        meter = LoadMeter()
        meter.start()
        server = side.cpu()
        try:
            driven: Driven = drive(side.address, lanes, limit=limit, stop=stop)
        finally:
            server = side.cpu() - server
            load = meter.stop()
            side.pause()
        wall = max(driven.finished - driven.started, 1e-9)
        forced = self.options.forced
        requests = tuple(read(e, side.dialect, stream=stream, forced=forced) for e in driven.exchanges)
        if isinstance(side, Remote) and not math.isnan(server):
            # the process is not our child, so the meter took its time for somebody else's
            load = Load(load.wall, max(0.0, load.others - server), load.steal)
        slo = slo or Slo()
        found = Repetition(
            case, side.label, side.peer, side.file, pair, driven.started, requests, measure(requests, slo),
            slo, load, driven.cpu / wall, server / wall, driven.stopped, side.settings(case), about or {},
        )  # fmt: skip
        if found.stats.num_ok == 0 and not driven.stopped:
            first = requests[0]
            raise PeerFailure(f"{side.label}: every request failed: {found.failures}; {first.detail[:300]}")
        if pair >= 0:
            self.repetitions.append(found)
        return found

    def row(self, name: str, found: Repetition, value: float, unit: str, **extra: float | str) -> None:
        """Record one figure of a repetition (nothing of a warm-up); note one that could not be observed."""
        if found.pair < 0:
            return
        about = f"{name} pair {found.pair + 1}: {found.side}"
        if math.isnan(value):
            self.note(f"{about}: not observable; {found.failures or 'no gaps between tokens'}")
            return
        shares = {"client_cpu": found.client_cpu, "server_cpu": found.server_cpu}
        row = Row(
            name, found.side, found.peer, found.file, found.pair, value, unit, found.started, (), found.load,
            threads=self.options.threads, settings=found.settings, extra=shares | extra,
        )  # fmt: skip
        self.rows.append(row)
        mark = "  CONTAMINATED" if found.load.contaminated else ""
        failed = f"  FAILURES: {found.failures}" if found.failures else ""
        self.say(f"  {about} {value:.4g} {unit}{mark}{failed}")

    def warn_of_hits(self, found: Repetition) -> None:
        """A cold load in which prompts came from a cache is void: say so."""
        if found.pair >= 0 and found.stats.cached_tokens:
            self.note(
                f"{found.case}: VOID: {found.side} took {found.stats.cached_tokens} prompt tokens from a "
                "cache in a load of cold prompts"
            )

    def alternate(
        self, case: str, sides: Sequence[LoadSide], work: Callable[[LoadSide, int], None],
        draw: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """A warm-up, then A B C A B C ...; `draw` makes a pair's new prompts before its first side."""
        running = list(sides)
        for pair in range(-1, self.options.pairs):
            if draw is not None:
                draw(pair)
            if pair >= 0:
                self.measure_bandwidth()
            for side in tuple(running):
                try:
                    work(side, pair)
                except PeerFailure as error:
                    running.remove(side)
                    self.note(f"{case}: {error}")

    def measure_bandwidth(self) -> None:
        """Read bandwidth between the turns, when every server of ours is stopped or asleep."""
        counted = step_bytes(self.path)
        found = measure_roofline(sorted({1, self.options.threads}), counted.total(0, screened=True))
        if found is not None:
            self.bandwidth.append(found)

    # ------------------------------------------------------------ sides

    @contextlib.contextmanager
    def sides(self, room: Room, probe: Probe | None, *, peers: bool = True) -> Iterator[list[LoadSide]]:
        """Ours (or the one given by URL) first, then the peers at their best settings; all wait stopped.

        probe: a short load, which chooses among the variants of a peer.
        """
        found = [our_side(self.options, self.path, self.logs, room, self.kv_token_bytes())]
        try:
            for file in self.peers.wanted_files() if peers else ():
                try:
                    found.append(self.peers.best(room, file, probe))
                except PeerFailure as error:
                    self.note(f"{self.peers.spec.name} {file}: {error}")
            yield found
        finally:
            for side in found:
                side.close()


@contextlib.contextmanager
def open_load(options: LoadOptions, say: Say) -> Iterator[LoadSession]:
    """Find the model, its vocabulary and the peers. ConfigError or ModelError where there is no model."""
    say(f"reading the vocabulary of {options.model}")
    frontend = load_frontend(options.model)
    with frontend:
        loaded = frontend.loaded
        tokenizer = loaded.tokenizer
        encode = None if tokenizer is None else (lambda text: tokenizer.encode(text, special=False))
        prompts = PromptSource(options.seed, loaded.model_config.vocab_size, encode)
        peers = Peers(options, loaded.path, options.home / "bench" / "logs", say)
        session = LoadSession(options, frontend, loaded.path, prompts, say, peers)
        session.identity = {
            "hayai": hayai.__version__,
            "machine": dict(identity()),
            "model": loaded.path.name,
            "model_bytes": loaded.path.stat().st_size,
            "prompts": "made-up sentences" if encode else "random token ids",
            "seed": options.seed,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        for name, install in peers.missing.items():
            say(f"{name}: not installed; {install}")
        for text in peers.notes:
            session.note(text)
        yield session


def repetition_json(found: Repetition) -> dict[str, Any]:
    """A repetition with its raw requests; their clock points count from its start."""
    raw = [request_json(request, found.started) for request in found.requests]
    plain = asdict(replace(found, requests=()))
    return plain | {"requests": raw, "contaminated": found.load.contaminated, "slo": str(found.slo)}


def request_json(request: Request, started: float) -> dict[str, Any]:
    """One line per request: every clock point in seconds since the load's start, nan as null."""
    known = asdict(request)
    known.pop("text")
    known.pop("logprobs")
    for name in ("begun", "sent", "finished"):
        known[name] = None if math.isnan(known[name]) else round(known[name] - started, 6)
    known["lag"] = None if math.isnan(known["lag"]) else round(known["lag"], 6)
    known["times"] = [round(t - started, 6) for t in request.times]
    return known

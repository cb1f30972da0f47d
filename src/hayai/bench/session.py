"""One run: the sides, the prompts, the meters and the rows, and the rule by which the sides alternate."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hayai
from hayai.bench.cases import Outcome, Prompts, RawCase, Sizes, probes
from hayai.bench.claims import StepBytes, step_bytes
from hayai.bench.inprocess import HayaiSide, Roofline, measure_roofline
from hayai.bench.machine import LoadMeter, identity
from hayai.bench.peers import Installation, PeerFailure, PeerSpec, Variant, find, read_specs, requantised
from hayai.bench.prompts import PromptSource
from hayai.bench.rows import Row
from hayai.bench.sides import PeerSide, Side, Trial, Turn

Say = Callable[[str], None]


@dataclass(frozen=True)
class SpeedOptions:
    """What `hayai bench speed` was asked for. pythons: further interpreters in which peers may live."""

    model: str
    home: Path
    threads: int
    pairs: int
    cases: tuple[str, ...]
    peers: tuple[str, ...]
    pythons: tuple[str, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    calibration_rounds: int = 2
    seed: int = 0
    backend: str = "cpu"


@dataclass
class Session:
    """State of a run. Sides are stopped (or asleep) whenever it is not their turn."""

    options: SpeedOptions
    ours: HayaiSide
    files: dict[str, Path]
    installations: dict[str, tuple[Installation, ...]]
    specs: Mapping[str, PeerSpec]
    prompts: PromptSource
    say: Say
    bytes_of: dict[str, StepBytes]
    peers: list[PeerSide] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    identity: dict[str, object] = field(default_factory=dict)
    quality_text: tuple[int, ...] = ()
    perplexity: dict[str, float] = field(default_factory=dict)
    server_choices: dict[str, tuple[str, Variant]] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.options.home / "bench" / "logs"

    # ------------------------------------------------------------ one turn

    def turn(
        self, case: str, side: Turn, pair: int, unit: str, work: Callable[[], Outcome], variant: str = ""
    ) -> Row:
        """Run one side's repetition with the meters around it; ours gets a roofline before and after.

        pair -1 is the warm-up: it is run and forgotten. variant: the calibrated case whose settings apply.
        """
        own = side.peer == "hayai" and pair >= 0
        before = self.roofline() if own else None
        side.resume()
        meter = LoadMeter()
        meter.start()
        outcome = work()
        load = meter.stop()
        side.pause()
        row = Row(
            case=case,
            side=side.label,
            peer=side.peer,
            file=side.file,
            pair=pair,
            value=outcome.value,
            unit=unit,
            started=outcome.started,
            times=tuple(t - outcome.started for t in outcome.times),
            load=load,
            roofline_before=before,
            roofline_after=self.roofline() if own else None,
            step_bytes=self._step_bytes(side, outcome),
            steps_per_second=outcome.steps_per_second,
            threads=self.options.threads,
            settings=side.settings(variant or case),
            extra=dict(outcome.details),
        )
        if pair >= 0:
            self.rows.append(row)
            mark = "  CONTAMINATED" if load.contaminated else ""
            self.say(f"  {case} pair {pair + 1}: {side.label} {row.value:.1f} {unit}{mark}")
        return row

    def roofline(self) -> Roofline | None:
        """Read bandwidth of this process now, on 1 thread and on as many as the engine uses."""
        counted = self.bytes_of["same"]
        return measure_roofline(sorted({1, self.options.threads}), counted.total(0, screened=True))

    def _step_bytes(self, side: Turn, outcome: Outcome) -> float:
        counted = self.bytes_of.get(side.file)
        if counted is None or not outcome.context:
            return 0.0
        # a step that took the whole head scored no row alone
        survivors = outcome.details.get("survivors", 0.0) if side.peer == "hayai" else 0.0
        return counted.total(outcome.context, screened=survivors > 0.0, survivors=survivors)

    # ------------------------------------------------------------ alternation

    def interleave(self, case: RawCase, sides: Sequence[Side]) -> None:
        """A warm-up of every side, then A B C A B C ...: each pair has one new set of prompts for all."""
        sizes = self.options.sizes
        running = []
        for side in sides:
            try:
                side.prepare(case.variant, case.shape(sizes))
                self._repetition(case, side, -1, case.draw(self.prompts, sizes))
                running.append(side)
            except PeerFailure as error:
                self.notes.append(f"{case.name}: {side.label} failed: {error}")
                self.say(f"  {self.notes[-1]}")
        for pair in range(self.options.pairs):
            prompts = case.draw(self.prompts, sizes)
            for side in tuple(running):
                try:
                    self._repetition(case, side, pair, prompts)
                except PeerFailure as error:
                    running.remove(side)
                    self.notes.append(f"{case.name}: {side.label} failed in pair {pair + 1}: {error}")
                    self.say(f"  {self.notes[-1]}")

    def _repetition(self, case: RawCase, side: Side, pair: int, prompts: Prompts) -> None:
        sizes = self.options.sizes
        self.turn(case.name, side, pair, case.unit, lambda: case.run(side, prompts, sizes), case.variant)


QUALITY_TOKENS = 256
QUALITY_LIMIT = 1.1
"""A peer whose perplexity is this much above the best one's is named: its speed buys another answer."""


@contextlib.contextmanager
def open_session(options: SpeedOptions, raw: Sequence[RawCase], say: Say) -> Iterator[Session]:
    """Load our engine, find and calibrate the peers that the chosen cases need; closes them all."""
    say(f"loading {options.model}")
    began = time.perf_counter()
    room = max((case.shape(options.sizes).tokens for case in raw), default=0)
    ours = HayaiSide(
        options.model,
        options.threads,
        context=max(2048, room + 64),
        sequences=max(8, options.sizes.batch_sequences),
        backend=options.backend,
    )
    try:
        session = _session(options, ours, say)
        session.identity["load_seconds"] = time.perf_counter() - began
        if options.backend == "cpu":
            ours.touch_cache(session.prompts)
        try:
            if raw:
                _start_peers(session, raw)
            yield session
        finally:
            for side in session.peers:
                side.close()
    finally:
        ours.close()


def _session(options: SpeedOptions, ours: HayaiSide, say: Say) -> Session:
    loaded = ours.loaded
    tokenizer = loaded.tokenizer
    encode = None if tokenizer is None else (lambda text: tokenizer.encode(text, special=False))
    session = Session(
        options,
        ours,
        {"same": loaded.path},
        {},
        read_specs(),
        PromptSource(options.seed, loaded.model_config.vocab_size, encode),
        say,
        {"same": step_bytes(loaded.path)},
    )
    session.identity = {
        "hayai": hayai.__version__,
        "machine": dict(identity()),
        "engine": json.loads(json.dumps(loaded.describe(), default=str)),
        "prompts": "made-up sentences" if encode else "random token ids",
        "seed": options.seed,
    }
    _find_peers(session)
    return session


def _find_peers(session: Session) -> None:
    for name in session.options.peers:
        spec = session.specs[name]
        found = find(spec, session.options.pythons)
        if found:
            session.installations[name] = found
        else:
            session.missing[name] = spec.install
            session.say(f"{name}: not installed; {spec.install}")
    if "q4_0" in {f for name in session.installations for f in session.specs[name].files}:
        _make_q4_0(session)


def _make_q4_0(session: Session) -> None:
    """The second file, by llama.cpp's quantiser where it is installed, a peer of this run or not."""
    spec = session.specs["llama.cpp"]
    found = session.installations.get(spec.name) or find(spec, session.options.pythons)
    if not found:
        session.notes.append(f"no Q4_0 rows: llama.cpp's quantiser is missing; {spec.install}")
        return
    folder = session.options.home / "bench"
    try:
        session.files["q4_0"] = requantised(
            session.files["same"], folder, found[0].python, session.options.threads
        )
        session.bytes_of["q4_0"] = step_bytes(session.files["q4_0"])
    except PeerFailure as error:
        session.notes.append(f"no Q4_0 rows: {error}")


def _start_peers(session: Session, raw: Sequence[RawCase]) -> None:
    options = session.options
    wanted = probes(raw, options.sizes)
    for name, installations in session.installations.items():
        spec = session.specs[name]
        if spec.kind != "library":
            continue
        for file in (f for f in spec.files if f in session.files):
            side = PeerSide(spec, file, session.files[file], installations, options.threads, session.logs)
            session.peers.append(side)
            session.say(f"calibrating {side.label} ({len(spec.variants)} variants)")
            try:
                side.calibrate(wanted, session.prompts, options.calibration_rounds, session.trials.append)
            except PeerFailure as error:
                session.notes.append(str(error))
                session.say(str(error))
            _check_quality(session, side)
            for case, choice in side.choices.items():
                session.say(f"  {case}: {choice.score:.0f} tok/s with {choice.variant.name}")


def _check_quality(session: Session, side: PeerSide) -> None:
    """Perplexity on one text for all library sides; a speed without the right answer is no speed."""
    if not side.choices:
        return
    if not session.quality_text:
        session.quality_text = tuple(session.prompts.ids(QUALITY_TOKENS))
    try:
        session.perplexity[side.label] = side.perplexity(session.quality_text)
    except PeerFailure as error:
        session.notes.append(f"{side.label}: perplexity not measured: {error}")


def quality_notes(session: Session) -> list[str]:
    """What the check text says about sides and files: a side that is clearly worse than another on the same
    file computes something else; a requantised file is another, worse model."""
    notes = []
    best: dict[str, float] = {}
    for side in session.peers:
        found = session.perplexity.get(side.label, math.inf)
        best[side.file] = min(found, best.get(side.file, math.inf))
    for side in session.peers:
        value = session.perplexity.get(side.label)
        if value is not None and value > QUALITY_LIMIT * best[side.file]:
            notes.append(
                f"{side.label} predicts the check text with perplexity {value:.1f}, another engine on "
                f"the same file with {best[side.file]:.1f}: its speed buys another answer"
            )
    if math.isfinite(best.get("q4_0", math.inf)) and math.isfinite(best.get("same", math.inf)):
        notes.append(
            f"perplexity of the check text: {best['same']:.1f} on the file, {best['q4_0']:.1f} as Q4_0"
        )
    return notes

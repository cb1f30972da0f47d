"""The sides of a comparison behind one small face: generate, batch, pause, resume.

Ours runs in this process (inprocess.py), a peer in its own (worker.py). Every clock point is
`time.perf_counter()`, which is one clock for all processes of a Linux host.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hayai.bench.machine import LoadMeter
from hayai.bench.peers import Installation, PeerFailure, PeerSpec, Variant, Worker
from hayai.bench.prompts import PromptSource

HOPELESS = 0.7
"""A variant whose warm-up is this far below the best one's score is not tried further."""
SPARE_PROBES = 2
"""Probes of the calibration that may be repeated because other processes disturbed them."""


@dataclass(frozen=True)
class Shape:
    """What a case needs room for: tokens per sequence (prompt and output) and sequences."""

    tokens: int
    sequences: int = 1


@dataclass(frozen=True)
class Generated:
    """One sequence. times[i] is when token i was known; times[0] is the first token's."""

    started: float
    times: tuple[float, ...]
    tokens: tuple[int, ...]
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds from the start of the prompt to the first token."""
        return self.times[0] - self.started

    @property
    def rate(self) -> float:
        """Decode tokens per second: (n - 1) / (t_last - t_first)."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


@dataclass(frozen=True)
class Batched:
    """Several sequences in lockstep: times[0] is when all had their first token, then one per step."""

    started: float
    times: tuple[float, ...]
    num_sequences: int
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Decode tokens per second over all sequences."""
        return (len(self.times) - 1) * self.num_sequences / (self.times[-1] - self.times[0])


class Turn(Protocol):
    """Whoever has a turn: a label, and a way to be quiet when the turn is over."""

    label: str
    peer: str
    file: str

    def settings(self, case: str) -> str: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Side(Turn, Protocol):
    """One engine on one file."""

    def prepare(self, case: str, shape: Shape) -> None:
        """Get ready for a case; not timed."""
        ...

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        """Greedy, end tokens ignored: the first token, then `steps` more."""
        ...

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> Batched:
        """All prompts, then `steps` steps of one token for each."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Choice:
    """How a peer runs best: which installation, which variant, and the score that decided."""

    installation: Installation
    variant: Variant
    score: float


@dataclass(frozen=True)
class Trial:
    """One line of the calibration: a variant's best tokens per second on a case."""

    label: str
    case: str
    python: str
    version: str
    variant: str
    score: float | None
    error: str = ""
    contaminated: bool = False


class PeerSide:
    """A peer on one file. One process per installation; variants reload the model where they must."""

    def __init__(
        self, spec: PeerSpec, file: str, path: Path, installations: Sequence[Installation],
        threads: int, logs: Path,
    ) -> None:  # fmt: skip
        self.label = f"{spec.name} {file}"
        self.peer, self.file = spec.name, file
        self.spec, self.path, self.threads = spec, path, threads
        self.installations = tuple(installations)
        self.choices: dict[str, Choice] = {}
        self.builds: dict[str, str] = {}
        self._logs = logs
        self._workers: dict[str, Worker] = {}
        self._loaded: dict[str, Mapping[str, object]] = {}
        self._current: Worker | None = None

    # ------------------------------------------------------------ running

    def prepare(self, case: str, shape: Shape) -> None:
        choice = self.choices[case]
        self.use(choice.installation, choice.variant, shape)

    def use(self, installation: Installation, variant: Variant, shape: Shape) -> None:
        """Load the variant and make a context of the shape's size."""
        worker = self._worker(installation)
        try:
            if self._loaded.get(installation.python) != variant.model:
                worker.call("load", path=str(self.path), params=dict(variant.model))
                self._loaded[installation.python] = variant.model
            context = {
                "n_ctx": round_up(shape.tokens, 256) * shape.sequences,
                "n_seq_max": shape.sequences,
                **variant.context,
            }
            worker.call("context", threads=self.threads, params=context)
        finally:
            worker.pause()
        self._current = worker

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        reply = self._busy().call("generate", prompt=list(prompt), steps=steps)
        return Generated(reply["started"], tuple(reply["times"]), tuple(reply["tokens"]))

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> Batched:
        reply = self._busy().call("batch", prompts=[list(p) for p in prompts], steps=steps)
        return Batched(reply["started"], tuple(reply["times"]), len(prompts))

    def perplexity(self, window: Sequence[int]) -> float:
        """Of a text, with the settings chosen for decoding: is what it computes so fast the right thing?"""
        choice = self.choices.get("decode") or next(iter(self.choices.values()))
        context: dict[str, object] = {"n_ctx": len(window), "n_batch": len(window), **choice.variant.context}
        if self.peer == "llama.cpp":
            context["n_outputs_max_per_seq"] = len(window)
        self.use(choice.installation, Variant(choice.variant.name, choice.variant.model, context), Shape(256))
        (losses,) = self._busy().call("score", windows=[list(window)])["nll"]
        self.pause()
        return math.exp(statistics.fmean(losses))

    def settings(self, case: str) -> str:
        choice = self.choices.get(case)
        if choice is None:
            return ""
        return f"{self.spec.package} {choice.installation.version}, {choice.variant.name}"

    def pids(self) -> list[int]:
        return [w.process.pid for w in self._workers.values()]

    def pause(self) -> None:
        for worker in self._workers.values():
            worker.pause()

    def resume(self) -> None:
        if self._current is not None:
            self._current.resume()

    def idle_cpu(self) -> float:
        """CPU seconds used while stopped: a check that the idle side really was idle."""
        return sum(w.idle_cpu for w in self._workers.values())

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._loaded.clear()
        self._current = None

    def _busy(self) -> Worker:
        assert self._current is not None, "generate() before prepare()"
        return self._current

    def _worker(self, installation: Installation) -> Worker:
        worker = self._workers.get(installation.python)
        if worker is None or worker.process.poll() is not None:
            if worker is not None:
                worker.close()
            self._logs.mkdir(parents=True, exist_ok=True)
            worker = Worker(self.peer, installation.python, self._logs / f"{self.spec.module}.log")
            self._workers[installation.python] = worker
            self._loaded.pop(installation.python, None)
            self.builds[installation.python] = str(worker.call("hello")["build"])
        return worker

    # ------------------------------------------------------------ calibration

    def calibrate(
        self,
        probes: Mapping[str, tuple[Shape, Callable[[Side, PromptSource], float]]],
        prompts: PromptSource,
        rounds: int,
        note: Callable[[Trial], None],
    ) -> None:
        """Try every variant on every case: `rounds` short probes after a warm-up, the best one counts.

        probes: case -> (shape, function giving tokens per second). A variant that fails on a case is
        reported and left out. PeerFailure where no variant works.
        """
        for installation in self.installations:
            for variant in self.spec.variants:
                for case, (shape, probe) in probes.items():
                    if variant.serves(case):
                        trial = self._try(installation, variant, case, shape, probe, prompts, rounds)
                        note(trial)
                        best = self.choices.get(case)
                        if trial.score is not None and (best is None or trial.score > best.score):
                            self.choices[case] = Choice(installation, variant, trial.score)
        missing = sorted(set(probes) - set(self.choices))
        self.pause()
        if missing:
            raise PeerFailure(f"{self.label}: no variant runs {', '.join(missing)}")

    def _try(
        self, installation: Installation, variant: Variant, case: str, shape: Shape,
        probe: Callable[[Side, PromptSource], float], prompts: PromptSource, rounds: int,
    ) -> Trial:  # fmt: skip
        about = (self.label, case, installation.python, installation.version, variant.name)
        try:
            self.use(installation, variant, shape)
            best = self.choices.get(case)
            meter = LoadMeter()
            meter.start()
            first = probe(self, prompts)
            quiet = not meter.stop().contaminated
            if quiet and best is not None and first < HOPELESS * best.score:
                return Trial(*about, first)
            clean, all_scores = self._scores(probe, prompts, rounds)
        except PeerFailure as error:
            return Trial(*about, None, str(error))
        finally:
            self.pause()
        return Trial(*about, max(clean or all_scores), contaminated=not clean)

    def _scores(
        self, probe: Callable[[Side, PromptSource], float], prompts: PromptSource, rounds: int
    ) -> tuple[list[float], list[float]]:
        """(scores of quiet moments, all scores): a contaminated probe is repeated, within reason."""
        clean: list[float] = []
        scores: list[float] = []
        meter = LoadMeter()
        while len(clean) < rounds and len(scores) < rounds + SPARE_PROBES:
            meter.start()
            scores.append(probe(self, prompts))
            if not meter.stop().contaminated:
                clean.append(scores[-1])
        return clean, scores


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step

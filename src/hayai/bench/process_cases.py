"""Cases about whole processes: start to first token, peak memory with a full context, contention."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

from hayai.bench.cases import DECODE_PROMPT, Outcome
from hayai.bench.http_cases import best_server, reported
from hayai.bench.inprocess import HayaiSide
from hayai.bench.machine import Load, status_kib, usable_cores
from hayai.bench.peers import PeerFailure
from hayai.bench.rows import Row
from hayai.bench.servers import Server, hayai_command, start_hayai
from hayai.bench.session import Session
from hayai.bench.sides import PeerSide, Shape, Turn

FULL_CONTEXT = 2048
LAST_TOKENS = 16
"""Tokens generated at the end of the full context."""
START_PROMPT = "Write one sentence about the sea."
POLL_SECONDS = 0.002
RUN_SECONDS = 120.0
SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1 << 20):
        pass
"""
"""A busy loop on one core, until it is killed or its parent is gone."""


# ---------------------------------------------------------------- start


def start(session: Session) -> None:
    """`hayai run` from process start to the first byte on stdout, the file in the page cache."""
    command = [
        *hayai_command(), "run", "--model", str(session.files["same"]), "--threads",
        str(session.options.threads), "--max-tokens", "8",
    ]  # fmt: skip
    session.say("start: hayai run, process start to first token")
    for pair in range(-1, session.options.pairs):
        number = session.prompts.text(4)
        work = [*command, f"{START_PROMPT} {number}"]
        session.turn("start", _Ours("hayai run"), pair, "ms", partial(first_output, work))


def first_output(command: Sequence[str]) -> Outcome:
    """Milliseconds to the first byte of stdout. PeerFailure where the command fails."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        now = time.perf_counter()
        process.stdout.read()
        errors = process.stderr.read()
        code = process.wait(RUN_SECONDS)
    if code != 0 or not first:
        raise PeerFailure(f"{command[0]} ended with {code}: {errors.decode(errors='replace')[-300:]}")
    return Outcome((now - started) * 1e3, started, (now,))


class _Ours:
    """A label for turns whose process lives only inside the turn."""

    def __init__(self, label: str, peer: str = "hayai", file: str = "same", facts: str = "") -> None:
        self.label, self.peer, self.file, self.facts = label, peer, file, facts

    def settings(self, case: str) -> str:
        return self.facts

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


# ---------------------------------------------------------------- memory


def memory(session: Session) -> None:
    """Peak resident memory (VmHWM, MB of 1e6 bytes) after a context of 2048 tokens was filled."""
    session.say(f"memory: peak of each process with {FULL_CONTEXT} tokens of context")
    _run_memory(session)
    _serve_memory(session)
    for side in session.peers:
        with reported(session, f"memory of {side.label}"):
            _library_memory(session, side)


def full_text(session: Session) -> tuple[str, int]:
    """A text that leaves LAST_TOKENS or a little more of the context, and its token count."""
    tokenizer = session.ours.loaded.tokenizer
    if tokenizer is None:
        raise PeerFailure("the model has no vocabulary, so `hayai run` can't be given a text")
    limit = FULL_CONTEXT - LAST_TOKENS
    text = session.prompts.text(64)
    while True:
        longer = f"{text} {session.prompts.text(1)}"
        if len(tokenizer.encode(longer, special=False)) > limit:
            return text, len(tokenizer.encode(text, special=False))
        text = longer


def _run_memory(session: Session) -> None:
    with reported(session, "memory of hayai run"):
        text, count = full_text(session)
        command = [
            *hayai_command(), "run", "--raw", "--model", str(session.files["same"]), "--threads",
            str(session.options.threads), "--context", str(FULL_CONTEXT),
            "--max-tokens", str(FULL_CONTEXT - count), text,
        ]  # fmt: skip
        _record(session, "memory-run", _Ours("hayai run"), peak_of(command), {"prompt_tokens": float(count)})


def peak_of(command: Sequence[str]) -> float:
    """Peak memory of a command in MB, read while it lives. PeerFailure where it fails."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            peak = max(peak, status_kib(process.pid, "VmHWM") or 0)
            time.sleep(POLL_SECONDS)
        assert process.stderr is not None
        errors = process.stderr.read()
    if process.returncode != 0:
        raise PeerFailure(f"{command[0]} ended with {process.returncode}: {errors.decode()[-300:]}")
    return peak * 1024 / 1e6


def _serve_memory(session: Session) -> None:
    with reported(session, "memory of hayai serve"):
        model, log = str(session.files["same"]), session.logs / "hayai-serve.log"
        server = start_hayai(model, session.options.threads, FULL_CONTEXT, log)
        try:
            _fill_server(session, "memory-serve", server)
        finally:
            server.close()
    spec = session.specs["llama-server"]
    if spec.name in session.installations:
        for file in (f for f in spec.files if f in session.files):
            with reported(session, f"memory of {spec.name} {file}"):
                server = best_server(session, spec, file, FULL_CONTEXT)
                try:
                    _fill_server(session, "memory-serve", server)
                finally:
                    server.close()


def _fill_server(session: Session, case: str, server: Server) -> None:
    server.stream(session.prompts.ids(FULL_CONTEXT - LAST_TOKENS), LAST_TOKENS)
    peak = server.peak_mb()
    if peak is None:
        raise PeerFailure(f"{server.label} has gone")
    _record(session, case, server, peak, {})


def _library_memory(session: Session, side: PeerSide) -> None:
    """A fresh process, so that the calibration's peak does not count."""
    choice = side.choices.get("decode") or next(iter(side.choices.values()), None)
    if choice is None:
        return
    fresh = PeerSide(side.spec, side.file, side.path, (choice.installation,), side.threads, session.logs)
    try:
        fresh.use(choice.installation, choice.variant, Shape(FULL_CONTEXT))
        fresh.generate(session.prompts.ids(FULL_CONTEXT - LAST_TOKENS), LAST_TOKENS - 1)
        (pid,) = fresh.pids()
        kib = status_kib(pid, "VmHWM") or 0
    finally:
        fresh.close()
    label = _Ours(side.label, side.peer, side.file, f"{choice.variant.name}; Python with numpy included")
    _record(session, "memory-run", label, kib * 1024 / 1e6, {})


def _record(session: Session, case: str, side: Turn, value: float, extra: dict[str, float | str]) -> None:
    """A row without a clock: one reading per process."""
    row = Row(
        case, side.label, side.peer, side.file, 0, value, "MB", time.perf_counter(), (),
        Load(0.0, 0.0, 0.0), settings=side.settings(case), extra=extra,
    )  # fmt: skip
    session.rows.append(row)
    session.say(f"  {case}: {side.label} {value:.0f} MB")


# ---------------------------------------------------------------- contention


def contention(session: Session) -> None:
    """Decode with all threads and with one, while a busy loop runs on every core; longest stall noted."""
    options = session.options
    single = HayaiSide(options.model, 1, backend=options.backend)
    single.label = "hayai, 1 thread"
    session.ours.label = f"hayai, {options.threads} threads"
    session.say("contention: a busy loop on every core")
    try:
        with busy_cores():
            for pair in range(-1, options.pairs):
                prompt = session.prompts.ids(DECODE_PROMPT)
                for side in (session.ours, single):
                    session.turn(
                        "contention",
                        side,
                        pair,
                        "tok/s",
                        partial(_contended, session, side, prompt),
                    )
    finally:
        session.ours.label = "hayai"
        single.close()


def _contended(session: Session, side: HayaiSide, prompt: Sequence[int]) -> Outcome:
    made = side.generate(prompt, session.options.sizes.decode_tokens)
    gaps = [b - a for a, b in zip(made.times, made.times[1:], strict=False)]
    details = {"longest_gap_ms": max(gaps) * 1e3, "threads_used": made.details.get("threads", 1.0)}
    return Outcome(made.rate, made.started, made.times, details=details)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """One process per usable core that does nothing but run."""
    loops = [subprocess.Popen([sys.executable, "-c", SPIN, str(core)]) for core in usable_cores()]
    time.sleep(0.5)
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()

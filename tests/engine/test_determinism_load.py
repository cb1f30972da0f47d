"""The determinism contract under load, on a real model and the native backend: a request has the same bits
alone, among sixteen others, after preemption, on a cached prefix, beside a 2,000-token prompt; with
log-probabilities and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_fakes import request, tokens_of
from hayai.config import EngineConfig
from hayai.engine.engine import Engine
from hayai.engine.request import EngineRequest, TokenEvent
from hayai.load import load_model

pytest.importorskip("hayai._native")

RNG = np.random.default_rng(5)


def prompt(length: int) -> list[int]:
    return RNG.integers(100, 40_000, length).tolist()


PREFIX = prompt(150)
PROBES = (
    request("greedy", prompt(23), max_tokens=24),
    request("prefixed", [*PREFIX, *prompt(11)], max_tokens=16),
    request("warm", [*PREFIX[:70], *prompt(30)], max_tokens=20, temperature=0.8, top_p=0.95, seed=3),
    request("penalties", prompt(48), max_tokens=20, repetition_penalty=1.2, presence_penalty=0.3),
)
OTHERS = tuple(
    request(f"other{i}", prompt(int(RNG.integers(3, 60))), max_tokens=30, temperature=1.0, seed=i)
    for i in range(16)
)
LONG = request("long", prompt(2000), max_tokens=2)

Bits = dict[str, tuple[list[int], list[float]]]


def with_logprobs(requests: tuple[EngineRequest, ...]) -> tuple[EngineRequest, ...]:
    return tuple(replace(r, params=replace(r.params, logprobs=3)) for r in requests)


def drain(engine: Engine) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    engine.check_integrity()
    return events


def bits(events: list[TokenEvent]) -> Bits:
    """Tokens of every probe; log-probabilities, chosen and alternatives, of those that asked."""
    found: Bits = {}
    for probe in PROBES:
        given = [e.logprob for e in events if e.request_id == probe.request_id and e.logprob]
        values = [value for p in given for value in (p.logprob, *(x for _, x in p.top))]
        found[probe.request_id] = (tokens_of(events, probe.request_id), values)
    return found


def run(engine: Engine, *requests: EngineRequest) -> Bits:
    for r in requests:
        engine.add(r)
    return bits(drain(engine))


def load(path: Path, **options: object) -> Engine:
    config = EngineConfig(model=str(path), context_length=2560, max_sequences=24, seed=1)
    return load_model(replace(config, **options), chat=False).engine  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(default_model: Path) -> Iterator[Engine]:
    with closing(load(default_model)) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(default_model: Path) -> tuple[Bits, Bits]:
    """Each probe on its own, without log-probabilities and with; nothing is cached."""
    with closing(load(default_model, prefix_cache=False)) as engine:
        plain: Bits = {}
        noted: Bits = {}
        for one, with_one in zip(PROBES, with_logprobs(PROBES), strict=True):
            name = one.request_id
            plain[name] = run(engine, one)[name]
            noted[name] = run(engine, with_one)[name]
            assert plain[name][0] == noted[name][0], "asking for log-probabilities changes no token"
            assert len(noted[name][1]) == 4 * len(plain[name][0])
    return plain, noted


@pytest.fixture(params=[0, 1], ids=["plain", "logprobs"])
def kind(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def probes(kind: int) -> tuple[EngineRequest, ...]:
    return with_logprobs(PROBES) if kind else PROBES


def test_among_sixteen_others(engine: Engine, alone: tuple[Bits, Bits], kind: int) -> None:
    for other in OTHERS:
        engine.add(other)
    for _ in range(4):
        engine.step()
    assert run(engine, *probes(kind)) == alone[kind]
    assert engine.stats().max_batch == 20


def test_on_a_cached_prefix(engine: Engine, alone: tuple[Bits, Bits], kind: int) -> None:
    for probe in PROBES:
        engine.add(replace(probe, request_id=f"before {probe.request_id}"))
    drain(engine)
    before = engine.stats().prefix_cached_tokens
    assert run(engine, *probes(kind)) == alone[kind]
    assert engine.stats().prefix_cached_tokens - before >= 16 + 160 + 96 + 32


def test_beside_a_long_prompt(engine: Engine, alone: tuple[Bits, Bits], kind: int) -> None:
    """Its chunks are as large as the clock says, and nobody sees it."""
    salt = f"run {kind}"  # nothing is cached yet
    for probe in probes(kind):
        engine.add(replace(probe, cache_salt=salt))
    events = engine.step()
    steps = engine.stats().num_steps
    engine.add(replace(LONG, cache_salt=salt))
    events += drain(engine)
    assert engine.stats().num_steps - steps > 20, "the long prompt was paced"
    assert bits(events) == alone[kind]


def test_after_preemption(default_model: Path, alone: tuple[Bits, Bits], kind: int) -> None:
    with closing(load(default_model, kv_tokens=400, max_step_tokens=64)) as engine:
        engine.scheduler.headroom = 0
        for other in OTHERS[:4]:
            engine.add(other)
        assert run(engine, *probes(kind)) == alone[kind]
        assert engine.stats().num_preemptions >= 2


def test_in_other_chunks(default_model: Path, alone: tuple[Bits, Bits]) -> None:
    with closing(load(default_model, max_step_tokens=24, step_ms=1.0)) as engine:
        assert run(engine, *probes(1)) == alone[1]


def test_with_prompt_logprobs(engine: Engine, alone: tuple[Bits, Bits]) -> None:
    asked = tuple(replace(p, prompt_logprobs=1) for p in probes(1))
    assert run(engine, *asked) == alone[1]

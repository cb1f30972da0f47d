"""Chunks beside running streams: the cost model learns, the step stays near its target, prompts end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from engine_fakes import FakeRunner, alone, drain, make_engine, request, tokens_of
from hayai.backends.base import StepInput, StepOutput
from hayai.engine.engine import Engine
from hayai.engine.pacing import DECODE_STEPS, FIRST_CHUNK, MIN_CHUNK, READABLE_SECONDS, TILE_ROWS, Pacer
from hayai.engine.request import BATCH

BASE, ROW, TOKEN, POSITION = 1.2e-3, 0.4e-3, 0.25e-3, 2.5e-7
"""A machine: seconds of a step, per decoding sequence, per prompt token, and per position before it."""


def decode(rows: int) -> float:
    return BASE + ROW * rows


def mixed(rows: int, tokens: int, position: float) -> float:
    return decode(rows) + tokens * (TOKEN + POSITION * position)


def taught(step_ms: float | None = None) -> Pacer:
    pacer = Pacer(step_ms)
    for rows in (1, 2, 8):
        pacer.observe_decode(rows, decode(rows))
    for position in range(0, 2000, 100):
        pacer.observe_prompt(1, 8, position, mixed(1, 8, position))
    return pacer


def test_before_anything_is_known_the_chunk_is_small() -> None:
    assert Pacer().prompt_tokens(1, 0) == FIRST_CHUNK


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("position", [0, 500, 1500])
def test_predicted_steps_stay_within_the_target(rows: int, position: int) -> None:
    pacer = taught()
    count = pacer.prompt_tokens(rows, position)
    target = DECODE_STEPS * decode(rows)
    assert mixed(rows, count, position + count / 2) <= 1.1 * target
    assert mixed(rows, count + 5, position + count / 2) >= 0.9 * target, "and use it"
    assert count == MIN_CHUNK or (rows + count) % TILE_ROWS == 0


def test_chunks_get_smaller_as_the_context_grows() -> None:
    pacer = taught()
    sizes = [pacer.prompt_tokens(1, position) for position in range(0, 4000, 200)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1] >= MIN_CHUNK


def test_an_operator_sets_the_target() -> None:
    assert taught(20.0).prompt_tokens(1, 0) > 2 * taught().prompt_tokens(1, 0)
    assert taught(0.1).prompt_tokens(1, 0) == MIN_CHUNK, "less than a decode step: prompts still end"


def test_a_backlog_makes_steps_longer_but_not_unreadable() -> None:
    pacer = taught()
    usual = pacer.prompt_tokens(2, 0, 4000)
    assert usual == pacer.prompt_tokens(2, 0)
    assert usual < pacer.prompt_tokens(2, 0, 8192) < pacer.prompt_tokens(2, 0, 16_384)
    assert mixed(2, pacer.prompt_tokens(2, 0, 1_000_000), 60) <= READABLE_SECONDS * 1.1
    assert taught(6.0).prompt_tokens(2, 0, 1_000_000) == taught(6.0).prompt_tokens(2, 0), (
        "an operator has said"
    )


def test_a_few_slow_steps_do_not_stall_prompts() -> None:
    """A step that lost its core for a while says little about the next one."""
    pacer = taught()
    before = pacer.prompt_tokens(1, 1000)
    for _ in range(2):
        pacer.observe_prompt(1, 8, 1000, 1.0)
    assert pacer.prompt_tokens(1, 1000) >= before / 2


def test_a_slower_machine_is_noticed() -> None:
    pacer = taught()
    before = pacer.prompt_tokens(8, 100)
    for _ in range(100):
        pacer.observe_prompt(8, 8, 100, decode(8) + 4 * 8 * TOKEN)
    assert pacer.prompt_tokens(8, 100) <= before / 2


def test_steps_without_decoding_teach_as_well() -> None:
    pacer = Pacer()
    pacer.observe_prompt(0, 512, 256, mixed(0, 512, 256))
    pacer.observe_decode(1, decode(1))
    assert 4 <= pacer.prompt_tokens(1, 0) <= 20


# ---------------------------------------------------------------- in the engine


class Clock:
    """A clock that only the runner moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lost = 0.0

    def __call__(self) -> float:
        return self.now


class Machine(FakeRunner):
    """Every step takes the time that the machine above would take."""

    clock = Clock()

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        counts = (step.query_start[1:] - step.query_start[:-1]).tolist()
        rows = sum(count == 1 for count in counts)
        prompts = [
            (count, step.positions[first])
            for count, first in zip(counts, step.query_start.tolist(), strict=False)
            if count > 1
        ]
        self.clock.now += (
            self.clock.lost + decode(rows) + sum(n * (TOKEN + POSITION * (at + n / 2)) for n, at in prompts)
        )
        return super().step(step, plan)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    machine_clock = Machine.clock
    machine_clock.now = 0.0
    monkeypatch.setattr("hayai.engine.engine.perf_counter", machine_clock)
    engine, runner = make_engine(
        num_blocks=400, max_sequences=4, max_tokens=512, max_context=4096, pacer=Pacer(), end_ids=()
    )
    engine.runner = Machine(runner.groups, 400)
    yield engine


def gaps(engine: Engine, name: str, until: str) -> list[float]:
    """Seconds between the tokens of one request until another one has its first."""
    times: list[float] = []
    while True:
        events = engine.step()
        if any(e.request_id == name for e in events):
            times.append(Machine.clock.now)
        if any(e.request_id == until for e in events):
            return [b - a for a, b in pairwise(times)]


def test_a_long_prompt_never_freezes_a_stream(engine: Engine) -> None:
    engine.add(request("stream", [5, 6, 7], max_tokens=3000))
    for _ in range(100):
        engine.step()
    for turn in range(3):
        engine.add(request(f"long{turn}", [10 + turn] * 2000, max_tokens=1))
        began = Machine.clock.now
        seen = gaps(engine, "stream", f"long{turn}")
        took = Machine.clock.now - began
        assert max(seen) <= 4.0 * decode(1), f"turn {turn}"
        assert took <= 2.0 * sum(TOKEN + POSITION * at for at in range(2000)), "at most half the time is lost"


def test_the_typical_step_is_the_median_of_the_latest(engine: Engine) -> None:
    engine.add(request("stream", [5, 6, 7], max_tokens=3000))
    pacer = engine.pacer
    assert pacer is not None
    for step in range(400):
        Machine.clock.lost = 0.1 if step % 4 == 0 else 0.0
        engine.step()
    Machine.clock.lost = 0.0
    engine.add(request("other", [5, 6], max_tokens=1))
    assert pacer.known(1) == pytest.approx(decode(1), rel=0.1), "one step in four lost its core"
    drain(engine)


def test_nothing_is_held_back_when_nobody_waits(engine: Engine) -> None:
    engine.add(request("alone", [5] * 1200, max_tokens=2))
    drain(engine)
    assert [tokens for _, tokens in engine.runner.steps] == [512, 512, 176, 1]  # type: ignore[attr-defined]


def test_batch_streams_do_not_hold_prompts_back(engine: Engine) -> None:
    engine.add(request("batch", [5, 6, 7], max_tokens=3000, priority=BATCH))
    for _ in range(20):
        engine.step()
    engine.add(request("prompt", [9] * 1000, max_tokens=1))
    engine.step()
    assert engine.runner.steps[-1] == (2, 512)  # type: ignore[attr-defined]


def test_pacing_changes_no_token() -> None:
    def run(pacer: Pacer | None) -> dict[str, list[int]]:
        engine, _ = make_engine(num_blocks=200, max_sequences=4, max_tokens=128, pacer=pacer)
        for i in range(6):
            engine.add(request(f"r{i}", [10 + i] * (20 + 30 * i), max_tokens=20))
        events = drain(engine)
        return {f"r{i}": tokens_of(events, f"r{i}") for i in range(6)}

    expected = {f"r{i}": alone([10 + i] * (20 + 30 * i), 20) for i in range(6)}
    assert run(None) == run(Pacer()) == run(Pacer(0.001)) == run(Pacer(1000.0)) == expected


def test_a_decision_costs_microseconds() -> None:
    pacer = taught()
    began = time.perf_counter()
    for position in range(1000):
        pacer.prompt_tokens(3, position)
        pacer.observe_prompt(3, 8, position, 5e-3)
    assert (time.perf_counter() - began) / 1000 < 1e-4

"""The step loop on a fake runner: what is scheduled, what finishes, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from engine_fakes import (
    FULL,
    STATE,
    VOCAB,
    WINDOW,
    FakeRunner,
    alone,
    drain,
    make_engine,
    request,
    scripted,
    tokens_of,
)
from hayai.backends.base import Limits, StepInput, StepOutput, TokenHistory
from hayai.engine.engine import Engine
from hayai.errors import ConfigError, RequestError
from hayai.plan.plan import CacheGroup


def prompt(length: int, first: int = 10) -> list[int]:
    return [first + i % 50 for i in range(length)]


# ---------------------------------------------------------------- scheduling


def test_one_request_prefills_then_decodes() -> None:
    engine, runner = make_engine()
    engine.add(request("a", prompt(5), max_tokens=4))
    events = drain(engine)
    assert tokens_of(events, "a") == alone(prompt(5), 4)
    assert [e.finish_reason for e in events] == [None, None, None, "length"]
    assert runner.steps == [(1, 5), (1, 1), (1, 1), (1, 1)]
    assert engine.cache.used_blocks() == 0


def test_a_long_prompt_runs_in_chunks_beside_a_decoding_sequence() -> None:
    engine, runner = make_engine(max_tokens=16, max_sequences=2)
    engine.add(request("a", prompt(3), max_tokens=20))
    engine.step()
    engine.add(request("b", prompt(40, 90), max_tokens=3))
    events = drain(engine)
    assert runner.steps[:4] == [(1, 3), (2, 16), (2, 16), (2, 11)]  # 1 + 15, 1 + 15, 1 + 10
    assert tokens_of(events, "b") == alone(prompt(40, 90), 3)
    assert tokens_of(events, "a") == alone(prompt(3), 20)[1:]


def test_decoding_is_never_delayed_by_prompts() -> None:
    engine, _ = make_engine(max_tokens=8, max_sequences=4, num_blocks=200)
    engine.add(request("a", prompt(3), max_tokens=30))
    engine.step()
    for name in "bcd":
        engine.add(request(name, prompt(100), max_tokens=2))
    for _ in range(29):
        assert tokens_of(engine.step(), "a"), "a step went by without a token for the decoding sequence"


def test_requests_beyond_max_sequences_wait_in_order() -> None:
    engine, runner = make_engine(max_sequences=2)
    for name in "abcde":
        engine.add(request(name, prompt(4), max_tokens=3))
    assert engine.stats().waiting == 5
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    events = drain(engine)
    finished = [e.request_id for e in events if e.finish_reason]
    assert finished == list("abcde")
    assert max(sequences for sequences, _ in runner.steps) == 2


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW), (FULL, STATE), (FULL, WINDOW, STATE)])
def test_preemption_gives_the_same_tokens(groups: tuple[CacheGroup, ...]) -> None:
    """Three sequences outgrow the cache; the newest is computed again and nobody sees a difference."""
    engine, _ = make_engine(*groups, num_blocks=16)
    for i, name in enumerate("abc"):
        engine.add(request(name, prompt(20, 10 + 60 * i), max_tokens=110))
    events = drain(engine)
    assert engine.stats().num_preemptions > 0
    for i, name in enumerate("abc"):
        assert tokens_of(events, name) == alone(prompt(20, 10 + 60 * i), 110)
    finished = [e.request_id for e in events if e.finish_reason]
    assert finished[0] == "a", "the oldest is never preempted"


def test_a_preempted_sequence_comes_back_before_later_ones() -> None:
    engine, _ = make_engine(num_blocks=12, max_sequences=2)
    for i, name in enumerate("abcd"):
        engine.add(request(name, prompt(20, 10 + 60 * i), max_tokens=110))
    while not engine.stats().num_preemptions:
        engine.step()
    assert [s.request_id for s in engine.scheduler.waiting] == list("bcd")
    finished = [e.request_id for e in drain(engine) if e.finish_reason]
    assert finished == list("abcd")


def test_preemption_does_not_thrash() -> None:
    """A preempted sequence comes back only with headroom, not to be thrown out every few steps."""
    engine, runner = make_engine(num_blocks=10, max_context=160)
    engine.add(request("a", prompt(20), max_tokens=130))
    engine.add(request("b", prompt(20, 90), max_tokens=130))
    drain(engine)
    assert engine.stats().num_preemptions <= 2
    assert len(runner.steps) <= 270


def test_the_same_batch_object_serves_a_steady_decode() -> None:
    engine, _ = make_engine()
    engine.add(request("a", prompt(5), max_tokens=40))
    engine.add(request("b", prompt(5), max_tokens=40))
    engine.step()
    batches, steps = set(), set()
    for _ in range(30):
        batch = engine.schedule()
        assert batch is not None
        batches.add(id(batch))
        steps.add(id(batch.step))
        engine.run(batch)
    assert len(batches) == len(steps) == 1


# ---------------------------------------------------------------- finishing


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        ({}, [5, 6, 2], "stop"),
        ({"ignore_eos": True, "max_tokens": 5}, [5, 6, 2, 7, 8], "length"),
        ({"stop_token_ids": (6,)}, [5, 6], "stop"),
        ({"stop_token_ids": (8,), "ignore_eos": True}, [5, 6, 2, 7, 8], "stop"),
        ({"max_tokens": 1}, [5], "length"),
        ({"max_tokens": 3}, [5, 6, 2], "stop"),
    ],
)
def test_finish_reasons(params: dict[str, object], tokens: list[int], reason: str) -> None:
    engine, _ = make_engine(reply=scripted(5, 6, 2, 7, 8, 9))
    engine.add(request("a", [20, 1], **params))
    events = drain(engine)
    assert tokens_of(events, "a") == tokens
    assert [e.finish_reason for e in events] == [None] * (len(tokens) - 1) + [reason]


def test_the_context_ends_a_request() -> None:
    engine, _ = make_engine(max_context=20)
    engine.add(request("a", prompt(15)))
    events = drain(engine)
    assert len(events) == 5 and events[-1].finish_reason == "length"


def test_a_cache_smaller_than_the_context_ends_a_request() -> None:
    engine, _ = make_engine(num_blocks=2, max_context=100)
    assert engine.max_length == 32
    engine.add(request("a", prompt(30)))
    events = drain(engine)
    assert len(events) == 2 and events[-1].finish_reason == "length"


def test_abort_takes_effect_at_the_next_step() -> None:
    engine, runner = make_engine()
    engine.add(request("a", prompt(5), max_tokens=50))
    engine.add(request("b", prompt(5), max_tokens=3))
    engine.step()
    engine.abort("a")
    engine.abort("nobody")
    assert engine.stats().running == 1, "its blocks are free at once"
    events = engine.step()
    assert [(e.request_id, e.token_id, e.finish_reason) for e in events[:1]] == [("a", -1, "abort")]
    assert runner.steps[-1] == (1, 1)
    drain(engine)
    assert engine.stats().finished == {"abort": 1, "length": 1}


def test_abort_of_a_waiting_request() -> None:
    engine, _ = make_engine(max_sequences=1)
    engine.add(request("a", prompt(5), max_tokens=2))
    engine.add(request("b", prompt(5), max_tokens=2))
    engine.abort("b")
    events = drain(engine)
    assert tokens_of(events, "b") == [] and len(tokens_of(events, "a")) == 2


def test_timing_and_counters() -> None:
    engine, _ = make_engine(max_tokens=8)
    engine.add(request("a", prompt(10), max_tokens=3), arrived=1.0)
    events = drain(engine)
    first, last = events[0].timing, events[-1].timing
    assert first is not None and last is not None and events[1].timing is None
    assert last.arrived == 1.0 < last.scheduled <= last.first_token <= last.finished
    assert (last.prompt_tokens, last.cached_tokens, last.output_tokens) == (10, 0, 3)
    stats = engine.stats()
    assert (stats.num_steps, stats.prompt_tokens, stats.output_tokens, stats.max_batch) == (4, 10, 3, 1)
    assert stats.step_seconds > 0 and (stats.kv_blocks, stats.kv_blocks_used) == (64, 0)


# ---------------------------------------------------------------- what reaches the backend


def _counts(history: TokenHistory) -> dict[int, int]:
    return dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))


class Recorder(FakeRunner):
    """Keeps copies of what the engine passes for sampling."""

    def __init__(self, *args: object, **kw: object) -> None:
        super().__init__(*args, **kw)  # type: ignore[arg-type]
        self.rows: list[tuple[object, ...]] = []
        self.histories: list[list[dict[int, int] | None]] = []

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        self.rows.append(step.sampling)
        self.histories.append([None if h is None else _counts(h) for h in step.histories])
        return super().step(step, plan)


def recording_engine(**kw: object) -> tuple[Engine, Recorder]:
    runner = Recorder({"kv": FULL}, 64, **kw)
    return Engine(runner, Limits(32, 4, 4, 64, 256), {"kv": FULL}, end_ids=(2,), seed=1), runner


def test_histories_are_counted_only_where_penalties_ask() -> None:
    engine, runner = recording_engine(reply=scripted(5, 6, 5, 20, 5))
    engine.add(request("a", [20, 21, 20, 1], max_tokens=5, presence_penalty=0.5))
    engine.add(request("b", prompt(4), max_tokens=5))
    runner.reply = lambda past: scripted(5, 6, 5, 20, 5)(past) if 1 in past else 7
    drain(engine)
    prompt_counts = {20: 0, 21: 0, 1: 0}
    assert [h[0] for h in runner.histories] == [
        prompt_counts,
        prompt_counts | {5: 1},
        prompt_counts | {5: 1, 6: 1},
        prompt_counts | {5: 2, 6: 1},
        prompt_counts | {5: 2, 6: 1, 20: 1},
    ]
    assert all(h[1] is None for h in runner.histories)


def test_no_histories_without_penalties() -> None:
    engine, runner = recording_engine()
    engine.add(request("a", prompt(4), max_tokens=5))
    drain(engine)
    assert runner.histories == [[]] * 5


def test_long_histories_grow() -> None:
    engine, runner = recording_engine()
    engine.add(request("a", prompt(4), max_tokens=200, repetition_penalty=1.1))
    tokens = tokens_of(drain(engine), "a")
    last = runner.histories[-1][0]
    assert last == dict.fromkeys(prompt(4), 0) | {t: tokens[:-1].count(t) for t in tokens[:-1]}


def test_sampling_rows_are_built_once_and_carry_the_parameters() -> None:
    engine, runner = recording_engine()
    engine.add(
        request("a", prompt(4), max_tokens=4, temperature=0.7, top_k=5, logit_bias={9: 1.0, 3: -2.0}, seed=99)
    )
    drain(engine)
    rows = [r[0] for r in runner.rows]
    assert all(r is rows[0] for r in rows)
    assert (rows[0].temperature, rows[0].top_k, rows[0].bias, rows[0].seed) == (
        0.7,
        5,
        ((3, -2.0), (9, 1.0)),
        99,
    )


def test_seeds_differ_between_requests_and_follow_the_engine_seed() -> None:
    def seeds() -> list[int]:
        engine, runner = recording_engine()
        for name in "abc":
            engine.add(request(name, prompt(4), max_tokens=1, temperature=1.0))
        drain(engine)
        return [row.seed for row in runner.rows[0]]

    assert len(set(seeds())) == 3
    assert seeds() == seeds()
    assert all(0 <= s < 1 << 64 for s in seeds())


def test_logprobs_reach_the_event() -> None:
    engine, _ = make_engine()
    engine.add(request("a", prompt(4), max_tokens=2, logprobs=2))
    engine.add(request("b", prompt(4), max_tokens=2))
    events = drain(engine)
    with_logprobs = [e.logprob for e in events if e.request_id == "a"]
    assert [p.top for p in with_logprobs if p] == [((0, 0.0), (1, 0.0))] * 2
    assert [p.token_id for p in with_logprobs if p] == tokens_of(events, "a")
    assert [p.logprob for p in with_logprobs if p] == [-1.0, -1.0]
    assert all(e.logprob is None for e in events if e.request_id == "b")


# ---------------------------------------------------------------- refusals


def test_a_prompt_that_cant_fit_is_refused_with_both_numbers() -> None:
    engine, _ = make_engine(max_context=50)
    engine.add(request("fits", prompt(49), max_tokens=5))
    with pytest.raises(RequestError, match=r"50 tokens.*51|51.*50|has 50 tokens") as info:
        engine.add(request("a", prompt(50)))
    assert info.value.code == "context_length_exceeded" and "50" in str(info.value)
    assert len(tokens_of(drain(engine), "fits")) == 1


@pytest.mark.parametrize(
    ("ids", "params", "field"),
    [
        ([], {}, "prompt"),
        ([3, VOCAB], {}, "prompt"),
        ([3, -1], {}, "prompt"),
        ([3], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    ],
)
def test_bad_requests_are_refused(ids: list[int], params: dict[str, object], field: str) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError) as info:
        engine.add(request("a", ids, **params))
    assert info.value.param == field
    assert not engine.has_work


def test_an_id_in_use_is_refused() -> None:
    engine, _ = make_engine()
    engine.add(request("a", [3]))
    with pytest.raises(RequestError, match="in use"):
        engine.add(request("a", [3]))


def test_a_step_must_hold_all_sequences() -> None:
    runner = FakeRunner({"kv": FULL}, 4)
    with pytest.raises(ConfigError, match="max_step_tokens"):
        Engine(runner, Limits(2, 4, 4, 4, 64), {"kv": FULL})


def test_reset_leaves_an_empty_working_engine() -> None:
    engine, _ = make_engine()
    engine.add(request("a", prompt(40), max_tokens=5))
    engine.step()
    engine.schedule()
    engine.reset()
    engine.check_integrity()
    assert not engine.has_work and engine.cache.used_blocks() == 0
    engine.add(request("a", prompt(5), max_tokens=3))
    assert tokens_of(drain(engine), "a") == alone(prompt(5), 3)


def test_numpy_tokens_become_plain_ints() -> None:
    engine, _ = make_engine()
    engine.add(request("a", [int(np.int32(4))], max_tokens=1))
    assert type(drain(engine)[0].token_id) is int

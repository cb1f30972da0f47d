"""Who runs, who waits, who loses its place: priorities, tenants, deadlines; what a request is told of it."""

from __future__ import annotations

import time

import pytest

from engine_fakes import alone, drain, make_engine, request, tokens_of
from hayai.engine.engine import Engine
from hayai.engine.request import BATCH, INTERACTIVE, TokenEvent


def prompt(length: int, first: int = 10) -> list[int]:
    return [first + i % 50 for i in range(length)]


def finished(events: list[TokenEvent]) -> list[str]:
    return [e.request_id for e in events if e.finish_reason]


def running(engine: Engine) -> list[str]:
    return [s.request_id for s in engine.scheduler.running]


# ---------------------------------------------------------------- priorities


def test_an_urgent_request_is_admitted_before_those_that_came_first() -> None:
    engine, _ = make_engine(max_sequences=1)
    for i in range(3):
        engine.add(request(f"batch{i}", prompt(4), max_tokens=3, priority=BATCH))
    engine.add(request("urgent", prompt(4), max_tokens=3, priority=INTERACTIVE))
    assert engine.stats().waiting_by_priority == {BATCH: 3, INTERACTIVE: 1}
    assert finished(drain(engine)) == ["urgent", "batch0", "batch1", "batch2"]


def test_an_urgent_request_takes_the_place_of_the_newest_of_lower_priority() -> None:
    engine, _ = make_engine(max_sequences=3, max_tokens=64)
    for i in range(3):
        engine.add(request(f"batch{i}", prompt(20, 60 * i), max_tokens=40, priority=BATCH))
    for _ in range(5):
        engine.step()
    engine.add(request("urgent", prompt(4), max_tokens=3))
    events = engine.step()
    assert running(engine) == ["batch0", "batch1", "urgent"] and tokens_of(events, "urgent")
    events += drain(engine)
    assert finished(events) == ["urgent", "batch0", "batch1", "batch2"]
    displaced = next(e.timing for e in events if e.request_id == "batch2" and e.finish_reason)
    assert displaced is not None and displaced.num_preemptions == 1


def test_equals_do_not_displace_each_other() -> None:
    engine, _ = make_engine(max_sequences=2)
    for name in "abc":
        engine.add(request(name, prompt(4), max_tokens=5))
    drain(engine)
    assert engine.stats().num_preemptions == 0


def test_nobody_is_displaced_in_vain() -> None:
    """All batch requests together would not give the memory that the urgent one needs."""
    engine, _ = make_engine(num_blocks=12, max_context=192, max_sequences=3, max_tokens=64)
    engine.add(request("old", prompt(100), max_tokens=60))
    engine.add(request("batch", prompt(20, 90), max_tokens=20, priority=BATCH))
    engine.step()
    engine.step()
    assert running(engine) == ["old", "batch"]
    engine.add(request("urgent", prompt(100, 60), max_tokens=5))
    for _ in range(5):
        engine.step()
    assert running(engine) == ["old", "batch"] and engine.stats().num_preemptions == 0
    drain(engine)


def test_memory_is_taken_from_the_lowest_priority_first() -> None:
    engine, _ = make_engine(num_blocks=16, max_sequences=4, max_tokens=64)
    engine.scheduler.headroom = 0
    engine.add(request("batch", prompt(20, 60), max_tokens=110, priority=BATCH))
    engine.step()
    for i, name in enumerate("abc"):
        engine.add(request(name, prompt(20, 10 + 60 * i), max_tokens=110))
    events: list[TokenEvent] = []
    while not engine.stats().num_preemptions:
        events += engine.step()
    assert [s.request_id for s in engine.scheduler.waiting] == ["batch"], "although it came first"
    events += drain(engine)
    assert finished(events)[0] == "a" and finished(events)[-1] == "batch"
    assert tokens_of(events, "a") == alone(prompt(20, 10), 110)


def test_urgent_prompts_get_the_budget_first() -> None:
    engine, _ = make_engine(max_tokens=16, max_sequences=4, num_blocks=200)
    engine.add(request("batch", prompt(100), max_tokens=2, priority=BATCH))
    engine.step()
    engine.add(request("urgent", prompt(40, 70), max_tokens=2))
    assert finished(drain(engine)) == ["urgent", "batch"]


# ---------------------------------------------------------------- prompts


def test_a_short_prompt_passes_a_long_one_that_has_begun() -> None:
    engine, runner = make_engine(max_tokens=16, num_blocks=200)
    engine.add(request("long", prompt(200), max_tokens=2))
    engine.step()
    time.sleep(0.002)
    engine.add(request("short", prompt(10, 90), max_tokens=1))
    events: list[TokenEvent] = []
    while not finished(events):
        events += engine.step()
    assert finished(events) == ["short"] and len(runner.steps) < 10


def test_a_long_prompt_is_not_held_up_for_ever() -> None:
    """Its response ratio grows while it waits, so fresh short ones fall behind."""
    engine, _ = make_engine(max_tokens=16, num_blocks=200)
    engine.add(request("long", prompt(100), max_tokens=1), arrived=time.monotonic() - 60.0)
    events: list[TokenEvent] = []
    for step in range(20):
        engine.add(request(f"short{step}", [60 + step % 7] * 15, max_tokens=1))
        events += engine.step()
    assert finished(events)[0] == "long"
    drain(engine)


# ---------------------------------------------------------------- tenants


def test_a_flood_does_not_hold_up_another_tenant() -> None:
    engine, _ = make_engine(max_sequences=2, num_blocks=200)
    for i in range(30):
        engine.add(request(f"flood{i}", prompt(4), max_tokens=4, tenant="flood"))
    for _ in range(10):
        engine.step()
    for i in range(3):
        engine.add(request(f"quiet{i}", prompt(4), max_tokens=4, tenant="quiet"))
    order = finished(drain(engine))
    assert max(order.index(f"quiet{i}") for i in range(3)) <= 8, order


def test_a_tenant_without_a_place_gets_one_from_the_tenant_with_the_most() -> None:
    """Else it would wait until a long answer of the flood ends."""
    engine, _ = make_engine(max_sequences=3, num_blocks=200, max_tokens=64)
    for i in range(5):
        engine.add(request(f"flood{i}", prompt(20, 60 * i), max_tokens=200, tenant="flood"))
    for _ in range(5):
        engine.step()
    engine.add(request("quiet", prompt(4), max_tokens=3, tenant="quiet"))
    engine.step()
    assert running(engine) == ["flood0", "flood1", "quiet"]
    engine.add(request("third", prompt(4), max_tokens=3, tenant="third"))
    engine.step()
    assert running(engine) == ["flood0", "quiet", "third"]
    engine.add(request("fourth", prompt(4), max_tokens=3, tenant="fourth"))
    engine.step()
    assert "flood0" in running(engine), "one place each: nobody has more than a share"
    drain(engine)


def test_two_busy_tenants_get_equal_shares_of_the_work() -> None:
    """One sends many short requests, the other few long ones: tokens are shared, not requests."""
    engine, _ = make_engine(max_sequences=2, num_blocks=200, prefix_cache=False)
    for i in range(400):
        engine.add(request(f"short{i}", prompt(10), max_tokens=5, tenant="short"))
    for i in range(60):
        engine.add(request(f"long{i}", prompt(10), max_tokens=60, tenant="long"))
    counts = {"short": 0, "long": 0}
    for _ in range(1500):
        for e in engine.step():
            counts[e.request_id.rstrip("0123456789")] += 1
    assert engine.stats().waiting > 0
    # A prompt of 10 counts as much as 2.5 tokens. Two long ones may still run.
    served = {"short": counts["short"] * 1.5, "long": counts["long"] * (1 + 2.5 / 60)}
    assert abs(served["short"] - served["long"]) <= 2 * 62.5, counts


def test_a_pause_earns_no_credit() -> None:
    engine, _ = make_engine(max_sequences=1, num_blocks=200, prefix_cache=False)
    engine.add(request("b-first", prompt(4), max_tokens=1, tenant="b"))
    drain(engine)
    for i in range(20):
        engine.add(request(f"a{i}", prompt(4), max_tokens=20, tenant="a"))
    for _ in range(210):
        engine.step()
    for i in range(20):
        engine.add(request(f"b{i}", prompt(4), max_tokens=20, tenant="b"))
    order = finished(drain(engine))
    owners = [name[0] for name in order[:12]]
    assert 4 <= owners.count("a") <= 8, f"they take turns from now on: {order}"


def test_idle_tenants_are_forgotten() -> None:
    engine, _ = make_engine()
    for i in range(1000):
        engine.add(request(f"r{i}", prompt(4), max_tokens=1, tenant=f"tenant{i}"))
        drain(engine, check=False)
    assert len(engine.scheduler.queue._shares[0]) < 200


# ---------------------------------------------------------------- deadlines


def test_a_deadline_ends_a_running_and_a_waiting_request() -> None:
    engine, runner = make_engine(max_sequences=1)
    soon = time.monotonic() + 0.02
    engine.add(request("runs", prompt(4), max_tokens=200, deadline=soon))
    engine.add(request("waits", prompt(4), max_tokens=200, deadline=soon))
    engine.add(request("other", prompt(4, 90), max_tokens=3, deadline=soon + 600))
    events = engine.step()
    time.sleep(0.03)
    ran = len(runner.steps)
    ended = engine.step()
    assert {(e.request_id, e.token_id, e.finish_reason) for e in ended if e.finish_reason} == {
        ("runs", -1, "timeout"),
        ("waits", -1, "timeout"),
    }
    assert len(runner.steps) - ran <= 1 and running(engine) == ["other"]
    events += drain(engine)
    assert tokens_of([*ended, *events], "other") == alone(prompt(4, 90), 3)
    assert (engine.stats().timeouts, engine.stats().finished["timeout"]) == (2, 2)


def test_a_deadline_that_has_passed_ends_a_request_before_it_runs() -> None:
    engine, runner = make_engine()
    engine.add(request("late", prompt(4), deadline=time.monotonic() - 1.0))
    assert [e.finish_reason for e in drain(engine)] == ["timeout"] and not runner.steps


def test_deadlines_of_finished_requests_are_forgotten() -> None:
    engine, _ = make_engine()
    for i in range(500):
        engine.add(request(f"r{i % 7}", prompt(4), max_tokens=1, deadline=time.monotonic() + 600))
        drain(engine, check=False)
    assert len(engine._deadlines) < 150
    engine.add(request("r0", prompt(4), max_tokens=1))
    assert [e.finish_reason for e in drain(engine)] == ["length"], (
        "an old deadline of the same id is not its own"
    )


# ---------------------------------------------------------------- what a request is told


def test_timing_says_in_which_steps_a_request_ran() -> None:
    engine, _ = make_engine(max_tokens=8)
    engine.add(request("a", prompt(10), max_tokens=6))
    events = engine.step()  # 8 tokens of its prompt
    events += engine.step()  # the other two and a token
    engine.add(request("b", prompt(4), max_tokens=2))
    events += drain(engine)
    timing = {e.request_id: e.timing for e in events if e.finish_reason}
    a, b = timing["a"], timing["b"]
    assert a is not None and b is not None
    assert (a.num_steps, a.sum_batch, a.max_batch, a.num_preemptions) == (7, 5 + 2 * 2, 2, 0)
    assert (b.num_steps, b.sum_batch, b.max_batch) == (2, 4, 2)
    assert engine.stats().batch_sizes == {1: 5, 2: 2} and engine.stats().max_batch == 2


def test_counters_include_a_batch_that_goes_on() -> None:
    engine, _ = make_engine()
    engine.add(request("a", prompt(10), max_tokens=100))
    for _ in range(20):
        engine.step()
    stats = engine.stats()
    assert stats.batch_sizes == {1: 20} and stats.num_steps == 20 and stats.max_batch == 1
    timings = [e.timing for e in drain(engine)]
    assert timings[-1] is not None and timings[-1].num_steps == 100
    assert not any(timings[:-1]), "timing comes with the first and the last event only"
    assert engine.stats().batch_sizes == {1: 100}


@pytest.mark.parametrize("value", [-1, 21])
def test_prompt_logprobs_are_limited(value: int) -> None:
    engine, _ = make_engine()
    with pytest.raises(Exception, match="prompt_logprobs must be from 0 to 20"):
        engine.add(request("a", prompt(4), prompt_logprobs=value))

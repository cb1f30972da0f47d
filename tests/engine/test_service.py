"""The engine's thread: submit, abort, order of delivery, crash, close; and the same without a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from queue import SimpleQueue

import pytest

from engine_fakes import FakeRunner, alone, make_engine, request
from hayai.backends.base import StepInput, StepOutput
from hayai.engine.request import TokenEvent
from hayai.engine.service import MAX_CRASHES, EngineError, EngineService
from hayai.errors import RequestError

WAIT = 10.0


@pytest.fixture
def service() -> Iterator[EngineService]:
    service = EngineService(make_engine()[0])
    service.start()
    yield service
    service.close()


def collect(service: EngineService, name: str, prompt: list[int], **params: object) -> list[TokenEvent]:
    """Submit and wait for the last event."""
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    service.submit(request(name, prompt, **params), events.put)
    return finish(events)


def finish(events: SimpleQueue[TokenEvent]) -> list[TokenEvent]:
    got: list[TokenEvent] = []
    while not got or got[-1].finish_reason is None:
        got.append(events.get(timeout=WAIT))
    return got


def slow(runner: FakeRunner, seconds: float) -> None:
    """Make every step take that long."""
    step: Callable[[StepInput, str], StepOutput] = runner.step

    def slower(batch: StepInput, plan: str = "main") -> StepOutput:
        time.sleep(seconds)
        return step(batch, plan)

    runner.step = slower  # type: ignore[method-assign]


def test_many_threads_submit(service: EngineService) -> None:
    results: dict[str, list[int]] = {}

    def work(index: int) -> None:
        for turn in range(5):
            name = f"{index}-{turn}"
            events = collect(service, name, [10 + index, 20 + turn], max_tokens=7)
            results[name] = [e.token_id for e in events]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(results) == 40
    for name, tokens in results.items():
        index, turn = map(int, name.split("-"))
        assert tokens == alone([10 + index, 20 + turn], 7)
    assert service.engine.cache.used_blocks() == 0


def test_refusals_are_raised_at_submit(service: EngineService) -> None:
    with pytest.raises(RequestError, match="context"):
        service.submit(request("a", [5] * 300), lambda event: None)
    with pytest.raises(RequestError, match="vocabulary"):
        service.submit(request("a", [100_000]), lambda event: None)
    assert len(collect(service, "a", [5], max_tokens=2)) == 2


def test_an_id_in_use_is_refused_and_free_again_later(service: EngineService) -> None:
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    slow(service.engine.runner, 0.01)  # type: ignore[arg-type]
    service.submit(request("a", [5], max_tokens=3), events.put)
    with pytest.raises(RequestError, match="in use"):
        service.submit(request("a", [5]), events.put)
    finish(events)
    assert len(collect(service, "a", [5], max_tokens=2)) == 2


def test_abort_stops_within_a_step() -> None:
    engine, runner = make_engine()
    slow(runner, 0.02)
    service = EngineService(engine)
    service.start()
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    service.submit(request("a", [5], max_tokens=200), events.put)
    events.get(timeout=WAIT)
    began, steps = time.monotonic(), len(runner.steps)
    service.abort("a")
    got = finish(events)
    assert got[-1].finish_reason == "abort" and time.monotonic() - began < 1.0
    # The step in flight, and no more than the one that was being scheduled.
    assert len(runner.steps) - steps <= 2
    service.close()


def test_the_next_step_is_launched_right_after_delivery() -> None:
    """Events of a step come out after the next one is scheduled; the listener never holds up a launch."""
    engine, _ = make_engine()
    order: list[str] = []
    schedule, run = engine.schedule, engine.run

    def recorded_schedule() -> object:
        batch = schedule()
        order.append("schedule")
        return batch

    def recorded_run(batch: object) -> list[TokenEvent]:
        order.append("run")
        return run(batch)  # type: ignore[arg-type]

    engine.schedule, engine.run = recorded_schedule, recorded_run  # type: ignore[method-assign,assignment]
    service = EngineService(engine)
    events: SimpleQueue[TokenEvent] = SimpleQueue()

    def deliver(event: TokenEvent) -> None:
        order.append("deliver")
        events.put(event)

    service.submit(request("a", [5], max_tokens=3), deliver)
    service.start()
    finish(events)
    service.close()
    assert order[:8] == ["schedule", "run", "schedule", "deliver", "run", "schedule", "deliver", "run"]
    assert order[8] == "deliver", "the last event does not wait for another step"


def test_an_idle_service_does_not_spin(service: EngineService) -> None:
    collect(service, "a", [5], max_tokens=2)
    began = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - began < 0.1


def run(service: EngineService, threaded: bool) -> None:
    """Begin to run: on the engine's own thread, or one step here."""
    if threaded:
        service.start()
    else:
        service.pump()


@pytest.mark.parametrize("threaded", [True, False])
def test_a_crash_fails_the_requests_in_the_engine_and_it_starts_again(threaded: bool) -> None:
    engine, runner = make_engine(max_sequences=1)
    service = EngineService(engine)
    first: SimpleQueue[TokenEvent] = SimpleQueue()
    waiting: SimpleQueue[TokenEvent] = SimpleQueue()
    runner.fail_with = OSError("the memory is gone")
    service.submit(request("a", [5]), first.put)
    service.submit(request("b", [5]), waiting.put)
    run(service, threaded)
    for events in (first, waiting):
        last = finish(events)[-1]
        assert last.finish_reason == "error" and last.error == "OSError: the memory is gone"
    runner.fail_with = None
    assert service.alive and service.failure is None
    engine.check_integrity()
    assert not engine.has_work and engine.stats().finished == {"error": 2}
    again: SimpleQueue[TokenEvent] = SimpleQueue()
    service.submit(request("a", [5], max_tokens=3), again.put)
    while not threaded and again.qsize() < 3:
        service.pump()
    assert [e.token_id for e in finish(again)] == alone([5], 3)
    service.close()


@pytest.mark.parametrize("threaded", [True, False])
def test_repeated_crashes_end_the_service_with_the_reason(threaded: bool) -> None:
    engine, runner = make_engine()
    service = EngineService(engine)
    deaths: list[str] = []
    service.on_death = deaths.append
    runner.fail_with = OSError("the memory is gone")
    for crash in range(MAX_CRASHES):
        assert service.alive and not deaths
        events: SimpleQueue[TokenEvent] = SimpleQueue()
        service.submit(request(f"r{crash}", [5]), events.put)
        run(service, threaded)
        assert finish(events)[-1].finish_reason == "error"
    deadline = time.monotonic() + WAIT
    while not deaths and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not service.alive and deaths == [service.failure] == ["OSError: the memory is gone"]
    with pytest.raises(EngineError, match="the memory is gone"):
        service.submit(request("c", [5]), events.put)
    service.close()


def test_crashes_long_ago_are_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hayai.engine.service.CRASH_WINDOW", 0.0)
    engine, runner = make_engine()
    service = EngineService(engine)
    runner.fail_with = OSError("a cosmic ray")
    for crash in range(2 * MAX_CRASHES):
        service.submit(request(f"r{crash}", [5]), lambda event: None)
        service.pump()
        time.sleep(0.001)
    assert service.alive
    service.close()


def test_what_was_not_taken_in_survives_a_crash() -> None:
    """Its turn had not come: neither the tokens nor the order of messages are lost."""
    engine, runner = make_engine()
    service = EngineService(engine)
    hit: SimpleQueue[TokenEvent] = SimpleQueue()
    late: SimpleQueue[TokenEvent] = SimpleQueue()
    gone: SimpleQueue[TokenEvent] = SimpleQueue()
    step = runner.step

    def crash(batch: StepInput, plan: str = "main") -> StepOutput:
        runner.step = step  # type: ignore[method-assign]
        service.submit(request("late", [7], max_tokens=3), late.put)
        service.submit(request("gone", [7], max_tokens=3), gone.put)
        service.abort("gone")
        raise OSError("torn")

    runner.step = crash  # type: ignore[method-assign]
    service.submit(request("hit", [5], max_tokens=3), hit.put)
    service.start()
    assert finish(hit)[-1].error == "OSError: torn"
    assert [e.token_id for e in finish(late)] == alone([7], 3)
    assert finish(gone)[-1].finish_reason == "abort"
    service.close()


def test_events_of_the_step_before_a_crash_come_once() -> None:
    engine, runner = make_engine()
    service = EngineService(engine)
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    step = runner.step

    def crash_at_the_third(batch: StepInput, plan: str = "main") -> StepOutput:
        if len(runner.steps) == 2:
            raise OSError("torn")
        return step(batch, plan)

    runner.step = crash_at_the_third  # type: ignore[method-assign]
    service.submit(request("a", [5], max_tokens=9), events.put)
    service.start()
    got = finish(events)
    assert [e.token_id for e in got] == [*alone([5], 2), -1] and got[-1].error == "OSError: torn"
    service.close()


def test_close_ends_running_and_waiting_requests() -> None:
    engine, runner = make_engine(max_sequences=1)
    slow(runner, 0.01)
    service = EngineService(engine)
    service.start()
    queues = [SimpleQueue[TokenEvent]() for _ in range(3)]
    for i, events in enumerate(queues):
        service.submit(request(f"r{i}", [5], max_tokens=250), events.put)
    queues[0].get(timeout=WAIT)
    began = time.monotonic()
    assert service.close()
    assert time.monotonic() - began < 1.0
    assert [finish(events)[-1].finish_reason for events in queues] == ["abort"] * 3
    assert engine.cache.used_blocks() == 0
    with pytest.raises(EngineError, match="closed"):
        service.submit(request("late", [5]), queues[0].put)
    service.close()


def test_close_says_when_a_step_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hayai.engine.service.CLOSE_SECONDS", 0.05)
    engine, runner = make_engine()
    slow(runner, 0.5)
    service = EngineService(engine)
    service.start()
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    service.submit(request("a", [5], max_tokens=1), events.put)
    time.sleep(0.1)
    assert not service.close()
    finish(events)


def test_a_listener_that_raises_loses_its_request_only(service: EngineService) -> None:
    def broken(event: TokenEvent) -> None:
        raise RuntimeError("event loop is closed")

    service.submit(request("broken", [7], max_tokens=200), broken)
    assert len(collect(service, "a", [5], max_tokens=5)) == 5
    deadline = time.monotonic() + WAIT
    while service.engine.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.engine.stats().finished["abort"] == 1


def test_a_listener_that_raises_beside_its_own_last_token() -> None:
    """The step after the event is scheduled by then, and in it the sequence ends: it must not end twice."""
    engine, _ = make_engine()
    with closing(EngineService(engine)) as service:
        for name in ("a", "b", "c"):
            seen: list[TokenEvent] = []

            def broken(event: TokenEvent, seen: list[TokenEvent] = seen) -> None:
                seen.append(event)
                if len(seen) == 2:
                    raise RuntimeError("event loop is closed")

            service.start()
            service.submit(request(f"broken-{name}", [7], max_tokens=3), broken)
            assert len(collect(service, name, [5], max_tokens=8)) == 8
        assert service.alive
    assert engine.stats().finished.get("error", 0) == 0


def test_without_a_thread_the_caller_runs_the_steps() -> None:
    engine, _ = make_engine()
    service = EngineService(engine)
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    service.submit(request("a", [5], max_tokens=4), events.put)
    assert events.empty() and not service.threaded
    for count in range(1, 5):
        service.pump()
        assert events.qsize() == count
    assert [e.token_id for e in finish(events)] == alone([5], 4)
    service.close()


def test_a_thread_takes_over_what_was_begun_without_one() -> None:
    engine, _ = make_engine()
    service = EngineService(engine)
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    service.submit(request("a", [5], max_tokens=100), events.put)
    service.pump()
    service.start()
    service.pump()  # does nothing now
    assert [e.token_id for e in finish(events)] == alone([5], 100)
    service.close()


def test_an_interrupt_leaves_a_working_engine() -> None:
    engine, runner = make_engine()
    service = EngineService(engine)
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    service.submit(request("a", [5] * 40, max_tokens=4), events.put)
    service.pump()
    runner.fail_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        service.pump()
    assert finish(events)[-1].finish_reason == "abort"
    runner.fail_with = None
    engine.check_integrity()
    assert service.alive and engine.cache.used_blocks() == 0
    service.submit(request("a", [5], max_tokens=3), events.put)
    while events.qsize() < 3:
        service.pump()
    assert [e.token_id for e in finish(events)] == alone([5], 3)
    service.close()

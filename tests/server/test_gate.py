"""How much is let in, when the rest is told to come back, and how it all ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from hayai.server.errors import ApiError
from hayai.server.gate import MAX_RETRY_SECONDS, Gate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def serve(gate: Gate, clock: Clock, seconds: float, num_choices: int = 1) -> None:
    """One request that takes `seconds`."""
    leave = start(gate, num_choices)
    clock.now += seconds
    await leave()


def start(
    gate: Gate, num_choices: int = 1, background: bool = False, tenant: str = ""
) -> Callable[..., object]:
    """Let a request in; what is returned ends it."""
    done = asyncio.Event()

    async def run() -> None:
        await done.wait()

    gate.check(num_choices, background, tenant)
    task = asyncio.create_task(run())
    gate.enter(task, num_choices, background, tenant)

    async def end(cancel: bool = False) -> None:
        if cancel:
            await asyncio.sleep(0)
            task.cancel()
        done.set()
        await asyncio.gather(task, return_exceptions=True)
        gate.leave(task, num_choices)

    return end


def refused(gate: Gate, num_choices: int = 1, tenant: str = "") -> ApiError:
    with pytest.raises(ApiError) as caught:
        gate.check(num_choices, tenant=tenant)
    return caught.value


async def test_the_queue_is_bounded_and_half_of_what_runs() -> None:
    gate = Gate(max_running=4)
    ends = [start(gate) for _ in range(6)]
    error = refused(gate)
    assert (error.status, error.code) == (429, "overloaded")
    assert error.headers["Retry-After"] == "1" and "at most 4 run and 2 wait" in error.message
    assert gate.num_waiting == 2
    await ends[0]()
    gate.check(1)
    for end in ends[1:]:
        await end()
    assert gate.num_choices == 0


async def test_many_choices_fill_the_running_places_only() -> None:
    """A request of 64 prompts is served by an idle server, and does not shut others out of the queue."""
    gate = Gate(2, 4)
    end = start(gate, 64)
    assert gate.num_choices == 4
    others = [start(gate), start(gate)]
    assert refused(gate).status == 429
    for each in (end, *others):
        await each()
    assert gate.num_choices == 0


async def test_one_tenant_does_not_lock_the_others_out() -> None:
    """Six places that one tenant holds: another gets its share above the limit, the first no more."""
    gate = Gate(2, 4)
    ends = [start(gate, tenant="much") for _ in range(6)]
    assert refused(gate, tenant="much").code == "overloaded"
    ends += [start(gate, tenant="little") for _ in range(3)]
    assert refused(gate, tenant="little").code == "overloaded", "three of six places are its share"
    assert refused(gate, tenant="much").code == "overloaded"
    ends.append(start(gate, tenant="third"))
    assert gate.num_of_tenant == {"much": 6, "little": 3, "third": 1}
    assert refused(gate, tenant="fourth").code == "overloaded", "the running places once more, and no further"
    await ends.pop()()
    for _ in range(3):  # what falls free is for those that have less than their share
        assert refused(gate, tenant="much").code == refused(gate, tenant="little").code == "overloaded"
    ends.append(start(gate, tenant="fourth"))
    for end in ends:
        await end()
    assert gate.num_choices == 0 and not gate.num_of_tenant


async def test_the_first_request_of_a_tenant_may_be_more_than_its_share() -> None:
    gate = Gate(2, 4)
    ends = [start(gate, tenant="much") for _ in range(6)]
    ends.append(start(gate, 4, tenant="new"))
    assert refused(gate, tenant="new").status == 429
    for end in ends:
        await end()


async def test_a_long_wait_behind_one_tenant_is_not_everybodys() -> None:
    clock = Clock()
    gate = Gate(8, 2, queue_seconds=45.0, clock=clock)
    for _ in range(30):
        ends = [start(gate, tenant="much"), start(gate, tenant="much")]
        clock.now += 60.0
        for end in ends:
            await end()
    ends = [start(gate, tenant="much") for _ in range(3)]
    assert "the longest is 45 s" in refused(gate, tenant="much").message
    ends.append(start(gate, tenant="little"))
    for end in ends:
        await end()


async def test_many_choices_of_one_request_are_served_as_fast_as_those_of_many() -> None:
    """Two places, a second per choice: 16 choices take 8 s, and two leave per second."""
    clock = Clock()
    gate = Gate(1, 2, clock=clock)
    await serve(gate, clock, 8.0, 16)
    assert gate.rate == pytest.approx(2.0)


async def test_retry_after_is_the_measured_time_until_there_is_room() -> None:
    """Four places, answers of 8 s: one place falls free every 2 s. Those who were refused come back too."""
    clock = Clock()
    gate = Gate(0, 4, queue_seconds=1e9, clock=clock)
    for _ in range(50):
        ends = [start(gate) for _ in range(4)]
        clock.now += 8.0
        for end in ends:
            await end()
    # Leaving one after the other, the four see 4, 3.5, 3 and 2.5 choices on average, counted as 4.
    assert gate.rate == pytest.approx(0.5, rel=0.05)
    ends = [start(gate) for _ in range(4)]
    waits = [int(refused(gate).headers["retry-after-ms"]) / 1000 for _ in range(4)]
    assert waits == pytest.approx([2.0, 4.0, 6.0, 8.0], rel=0.05)
    assert refused(gate).headers["Retry-After"] == str(math.ceil(10.0))
    for _ in range(100):
        last = float(refused(gate).headers["Retry-After"])
    assert last == MAX_RETRY_SECONDS
    clock.now += 600
    assert float(refused(gate).headers["Retry-After"]) == pytest.approx(2.0)
    for end in ends:
        await end()


async def test_long_answers_make_a_shorter_queue() -> None:
    """Two places and answers of 60 s: the second in the queue would wait a minute."""
    clock = Clock()
    gate = Gate(8, 2, queue_seconds=45.0, clock=clock)
    for _ in range(30):
        ends = [start(gate), start(gate)]
        clock.now += 60.0
        for end in ends:
            await end()
    ends = [start(gate) for _ in range(3)]
    error = refused(gate)
    assert error.status == 429 and "the wait would be about 60 s; the longest is 45 s" in error.message
    assert 10 <= int(error.headers["Retry-After"]) <= 30
    for end in ends:
        await end()


async def test_requests_that_were_not_served_say_nothing_of_the_speed() -> None:
    clock = Clock()
    gate = Gate(1, 2, clock=clock)
    await serve(gate, clock, 4.0)
    rate = gate.rate
    for _ in range(20):
        await start(gate)(cancel=True)  # type: ignore[misc]
    assert gate.rate == rate == 0.5


async def test_what_nobody_waits_for_takes_no_place() -> None:
    gate = Gate(0, 1)
    end = start(gate, background=True)
    other = start(gate)
    assert (gate.num_background, gate.num_choices) == (1, 1)
    start_more = start(gate, background=True)
    for each in (end, other, start_more):
        await each()
    assert (gate.num_background, gate.num_choices) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "header", "expected"),
    [
        (None, None, None),
        (2.0, None, 12.0),
        (None, "500", 10.5),
        (2.0, "500", 10.5),
        (2.0, "60000", 12.0),
        (None, "0.5", 10.0005),
    ],
)
def test_a_request_has_a_deadline(limit: float | None, header: str | None, expected: float | None) -> None:
    gate = Gate(request_timeout=limit)
    headers = {} if header is None else {"x-hayai-timeout-ms": header}
    assert gate.deadline(headers, 10.0) == expected


@pytest.mark.parametrize("header", ["", "soon", "0", "-1", "nan", "inf", "1e999"])
def test_a_bad_deadline_is_refused(header: str) -> None:
    with pytest.raises(ApiError) as caught:
        Gate().deadline({"x-hayai-timeout-ms": header}, 0.0)
    assert (caught.value.status, caught.value.param) == (400, "x-hayai-timeout-ms")


async def test_draining_lets_what_runs_end_and_nobody_in() -> None:
    gate = Gate(1, 2)
    end = start(gate)
    draining = asyncio.create_task(gate.drain(20))
    await asyncio.sleep(0)
    error = refused(gate)
    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "shutting_down", "1")
    with pytest.raises(ApiError):
        gate.check(1, background=True)
    assert not draining.done()
    await end()
    assert await draining


async def test_draining_stops_what_takes_too_long() -> None:
    gate = Gate(1, 2)
    stuck = asyncio.create_task(asyncio.sleep(60))
    gate.enter(stuck, 1)
    assert not await gate.drain(0.01)
    with pytest.raises(asyncio.CancelledError):
        await stuck
    gate.leave(stuck, 1)
    assert await gate.drain(1)

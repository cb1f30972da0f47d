"""Quotas: nobody gets more than the limit, and who is refused is told when to come back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayai.errors import ConfigError
from hayai.server.errors import ApiError
from hayai.server.quotas import Quotas, Reservation, month_of
from hayai.server.tenants import Limits, Tenant


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def quotas_of(clock: Clock, **limits: int) -> Quotas:
    quotas = Quotas(clock, clock)
    quotas.configure({"t": Tenant("t", Limits(**limits))})
    return quotas


def refusal(call: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value


def admit(quotas: Quotas, prompt: int = 0, most: int = 0, choices: int = 1) -> Reservation:
    return quotas.admit("t", choices, prompt, most)


def test_requests_per_minute() -> None:
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=3)
    for left in (2, 1, 0):
        assert admit(quotas).headers == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": f"{20 * (3 - left)}s" if left else "1m0s",
        }
    error = refusal(lambda: admit(quotas))
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.headers["Retry-After"] == "20" and error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 19.9
    assert refusal(lambda: admit(quotas)).headers["Retry-After"] == "1"
    clock.now += 0.1
    admit(quotas)
    clock.now += 3600
    for _ in range(3):  # a long pause stores one minute, not more
        admit(quotas)
    refusal(lambda: admit(quotas))


def test_tokens_are_reserved_and_given_back() -> None:
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=600)
    first = admit(quotas, prompt=100, most=100, choices=2)
    assert first.headers["x-ratelimit-remaining-tokens"] == "300"
    error = refusal(lambda: admit(quotas, prompt=200, most=200))
    assert error.headers["Retry-After"] == "10" and "600 tokens per minute" in error.message
    quotas.settle(first, 120)
    admit(quotas, prompt=200, most=200)
    clock.now += 8.0  # 80 of 600 were left, 80 came
    admit(quotas, prompt=160)
    refusal(lambda: admit(quotas, prompt=1))


def test_using_more_than_was_reserved_is_a_debt() -> None:
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=600)
    quotas.settle(admit(quotas, prompt=10), 900)
    assert refusal(lambda: admit(quotas, prompt=10)).headers["Retry-After"] == "31"


def test_waiting_as_long_as_told_is_enough() -> None:
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=700, requests_per_minute=7)
    rng = random.Random(1)
    for _ in range(500):
        need = rng.randrange(1, 700)
        try:
            admit(quotas, prompt=need)
        except ApiError as error:
            clock.now += int(error.headers["Retry-After"])
            admit(quotas, prompt=need)


def test_a_request_that_could_never_get_in_is_not_told_to_wait() -> None:
    quotas = quotas_of(Clock(), tokens_per_minute=600, max_parallel=2)
    error = refusal(lambda: admit(quotas, prompt=500, most=101))
    assert (error.status, error.code) == (400, "request_exceeds_limit") and "601 tokens" in error.message
    assert refusal(lambda: admit(quotas, choices=3)).status == 400
    admit(quotas, prompt=500, most=100)


def test_parallel_requests() -> None:
    clock = Clock()
    quotas = quotas_of(clock, max_parallel=3)
    one, two = admit(quotas, choices=2), admit(quotas)
    error = refusal(lambda: admit(quotas))
    assert (error.status, error.code) == (429, "too_many_parallel_requests")
    assert "3 of 3" in error.message and error.headers["Retry-After"] == "1"
    clock.now += 100.0
    quotas.settle(one, 5)
    admit(quotas, choices=2)
    # one request took 100 s, the mean is now 20.8 s, and three run
    assert refusal(lambda: admit(quotas)).headers["Retry-After"] == "7"
    quotas.settle(two, 5)
    admit(quotas)


def test_the_budget_is_for_a_month_and_retrying_is_in_vain() -> None:
    clock = Clock()
    quotas = quotas_of(clock, token_budget=100)
    month = month_of(clock.now)
    assert month == "2023-11" == quotas.month()
    running = admit(quotas, prompt=30, most=30)
    error = refusal(lambda: admit(quotas, prompt=50))
    assert (error.code, error.status) == (
        "rate_limit_exceeded",
        429,
    ) and "x-should-retry" not in error.headers
    quotas.settle(running, 40)
    quotas.recorded("t", month, 40)
    admit(quotas, prompt=10, most=50)
    error = refusal(lambda: admit(quotas, prompt=61))
    assert (error.code, error.status) == ("insufficient_quota", 429)
    assert error.headers == {"x-should-retry": "false"} and "40 are spent" in error.message
    quotas.set_spent(month, {"t": 95})  # another server's requests
    assert "95 are spent" in refusal(lambda: admit(quotas, prompt=10)).message
    clock.now += 31 * 86_400
    late = admit(quotas, prompt=40)
    quotas.settle(late, 40)
    assert refusal(lambda: admit(quotas, prompt=11)).code == "rate_limit_exceeded"  # 50 run since last month


def test_changed_limits_keep_what_was_used() -> None:
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=10)
    for _ in range(8):
        admit(quotas)
    quotas.configure({"t": Tenant("t", Limits(requests_per_minute=9))})
    admit(quotas)
    refusal(lambda: admit(quotas))
    quotas.configure({"t": Tenant("t")})
    for _ in range(100):
        admit(quotas)
    quotas.admit("somebody else", 1000, 10**12, 10**12)


@pytest.mark.parametrize("name", list(Limits.__dataclass_fields__))
@pytest.mark.parametrize("value", [0, -1, 1 << 60])
def test_limits_are_checked(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 40), st.integers(0, 300), st.integers(0, 100), st.integers(1, 3), st.floats(0, 1)
        ),
        max_size=60,
    )
)
def test_nobody_ever_gets_more_than_the_limits(steps: list[tuple[float, int, int, int, float]]) -> None:
    """In every window of a minute at most two minutes' worth (what was stored, and what came), at every
    moment at most max_parallel, and never more than the budget; after the end nothing is held."""
    clock = Clock()
    quotas = quotas_of(
        clock, tokens_per_minute=600, requests_per_minute=10, max_parallel=4, token_budget=3000
    )
    running: list[Reservation] = []
    used: list[tuple[float, int]] = []
    for pause, prompt, most, choices, share in steps:
        clock.now += pause
        if running and share < 0.5:
            reservation = running.pop(0)
            tokens = int(reservation.tokens * share * 2)
            quotas.settle(reservation, tokens)
            used.append((reservation.admitted, tokens))
        try:
            running.append(admit(quotas, prompt, most, choices))
        except ApiError as error:
            assert error.status in (400, 429)
        assert sum(r.num_choices for r in running) <= 4
        assert sum(t for _, t in used) + sum(r.tokens for r in running) <= 3000
    for reservation in running:
        quotas.settle(reservation, reservation.tokens)
        used.append((reservation.admitted, reservation.tokens))
    for start, _ in used:
        window = [tokens for at, tokens in used if start <= at < start + 60.0]
        assert sum(window) <= 2 * 600 and len(window) <= 2 * 10
    clock.now += 60.0
    assert sum(t for _, t in used) + 600 > 3000 or admit(quotas, prompt=600)


def test_threads_together_get_no_more_than_one() -> None:
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=5000, max_parallel=3, token_budget=4000)
    got: list[Reservation] = []
    running, most_running = 0, 0
    lock = threading.Lock()

    def client(seed: int) -> None:
        nonlocal running, most_running
        rng = random.Random(seed)
        for _ in range(1000):
            try:
                reservation = admit(quotas, prompt=rng.randrange(1, 20))
            except ApiError:
                continue
            with lock:
                got.append(reservation)
                running += 1
                most_running = max(most_running, running)
            time.sleep(0)
            with lock:
                running -= 1
            quotas.settle(reservation, reservation.tokens)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(r.tokens for r in got)
    assert 3980 < total <= 4000 and most_running <= 3

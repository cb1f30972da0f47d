"""What each tenant may still use: token buckets, parallel requests, a monthly budget.

A request reserves the most that it could use when it is let in (prompt plus max_tokens of every choice) and
gives back what it didn't when it ends, so that requests which run at the same time can't use more than the
limit together. Quotas are counted per server process; the budget is read from the database, so that several
processes share it to within a few seconds.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hayai.server.errors import ApiError
from hayai.server.tenants import Limits, Tenant

MIN_RETRY_SECONDS = 1
NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's and Anthropic's clients retry a 429 by themselves, unless this header says that it is in vain."""


class TokenBucket:
    """`per_minute` units per minute, at most one minute's worth in store. It starts full; what is taken
    without having been reserved may bring it below zero."""

    __slots__ = ("_level", "_updated", "capacity")

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = per_minute
        self._level = float(per_minute)
        self._updated = now

    def level(self, now: float) -> float:
        """Units in store."""
        passed = max(0.0, now - self._updated)
        return min(float(self.capacity), self._level + passed * self.capacity / 60.0)

    def wait(self, amount: int, now: float) -> float:
        """Seconds until `amount` (at most the capacity) is in store; 0 = now."""
        return self.seconds(amount - self.level(now))

    def take(self, amount: float, now: float) -> None:
        """Take units out, or put a negative amount back."""
        self._level = min(float(self.capacity), self.level(now) - amount)
        self._updated = now

    def resize(self, per_minute: int, now: float) -> None:
        """A new limit: what has been used stays used."""
        used = self.capacity - self.level(now)
        self.capacity = per_minute
        self._level, self._updated = per_minute - used, now

    def seconds(self, units: float) -> float:
        """How long it takes until so many units have come."""
        return max(0.0, units) * 60.0 / self.capacity


@dataclass(frozen=True)
class Reservation:
    """What a request holds of its tenant's quota. month: of its start, '2026-11' in UTC. headers: the
    tenant's x-ratelimit-* after it."""

    tenant: str
    num_choices: int
    tokens: int
    month: str
    admitted: float
    headers: Mapping[str, str]


class Quotas:
    """All tenants' quotas. Thread-safe; every method is short.

    clock: monotonic seconds; wall: seconds since 1970, for the months of budgets.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._lock = threading.RLock()  # a ticket that is collected may settle inside another call
        self._meters: dict[str, _Meter] = {}

    def configure(self, tenants: Mapping[str, Tenant]) -> None:
        """The tenants' limits from now on; what they have used stays used."""
        now = self._clock()
        with self._lock:
            for name, tenant in tenants.items():
                self._meter(name).configure(tenant.limits, now)

    def admit(self, tenant: str, num_choices: int, prompt_tokens: int, max_tokens: int) -> Reservation:
        """Reserve for a request. ApiError 429 with Retry-After where the tenant has to wait; 400 where the
        request could never get in."""
        tokens = prompt_tokens + num_choices * max_tokens
        now, month = self._clock(), month_of(self._wall())
        with self._lock:
            meter = self._meter(tenant)
            meter.turn(month)
            meter.check(num_choices, tokens, now)
            meter.reserve(num_choices, tokens, now)
            return Reservation(tenant, num_choices, tokens, month, now, meter.headers(now))

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """The request is over and used `tokens`: give back the rest. Once per reservation."""
        now = self._clock()
        with self._lock:
            self._meter(reservation.tenant).settle(reservation, tokens, now)

    def recorded(self, tenant: str, month: str, tokens: int) -> None:
        """The ledger has settled tokens on record now; `set_spent` will contain them."""
        with self._lock:
            meter = self._meter(tenant)
            if meter.month == month:
                meter.unrecorded -= tokens
                meter.spent += tokens

    def set_spent(self, month: str, spent: Mapping[str, int]) -> None:
        """Tokens per tenant that the ledger has for `month`, of all processes together."""
        with self._lock:
            for tenant, tokens in spent.items():
                meter = self._meter(tenant)
                meter.turn(month)
                if meter.month == month:
                    meter.spent = tokens

    def budgeted(self) -> list[str]:
        """The tenants that have a budget."""
        with self._lock:
            return [name for name, meter in self._meters.items() if meter.limits.token_budget is not None]

    def month(self) -> str:
        return month_of(self._wall())

    def _meter(self, tenant: str) -> _Meter:
        meter = self._meters.get(tenant)
        if meter is None:
            meter = self._meters[tenant] = _Meter()
        return meter


def month_of(seconds: float) -> str:
    """'2026-11' of seconds since 1970, in UTC."""
    return time.strftime("%Y-%m", time.gmtime(seconds))


class _Meter:
    """One tenant's counters. spent: on record for this month; unrecorded: settled, not yet on record;
    reserved: of requests that run."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.num_running = 0
        self.mean_seconds = 1.0
        self.month = ""
        self.spent = 0
        self.unrecorded = 0
        self.reserved = 0

    def configure(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.requests = _bucket(self.requests, limits.requests_per_minute, now)
        self.tokens = _bucket(self.tokens, limits.tokens_per_minute, now)

    def turn(self, month: str) -> None:
        """A new month has begun: nothing is spent. Months only go forward."""
        if month > self.month:
            self.month, self.spent, self.unrecorded = month, 0, 0

    def check(self, num_choices: int, tokens: int, now: float) -> None:
        """ApiError where a request has to wait, or can't be let in at all. Changes nothing."""
        limits = self.limits
        for name, limit, found in (
            ("max_parallel", limits.max_parallel, num_choices),
            ("tokens_per_minute", limits.tokens_per_minute, tokens),
        ):
            if limit is not None and found > limit:
                raise _too_large(name, limit, found)
        self._check_budget(tokens)
        waits = [
            (bucket.wait(amount, now), name, bucket.capacity)
            for name, bucket, amount in (
                ("requests", self.requests, 1),
                ("tokens", self.tokens, tokens),
            )
            if bucket is not None
        ]
        wait, name, limit = max(waits, default=(0.0, "", 0))
        if wait > 0.0:
            message = (
                f"rate limit reached: {limit} {name} per minute; "
                f"this request needs {1 if name == 'requests' else tokens}"
            )
            raise self._refusal(message, "rate_limit_exceeded", wait, now)
        if limits.max_parallel is not None and self.num_running + num_choices > limits.max_parallel:
            message = (
                f"too many parallel requests: {self.num_running} of {limits.max_parallel} answers are being "
                f"made, this request needs {num_choices}"
            )
            # one of them ends, on average, after this time
            wait = self.mean_seconds / max(1, self.num_running)
            raise self._refusal(message, "too_many_parallel_requests", wait, now)

    def _check_budget(self, tokens: int) -> None:
        budget = self.limits.token_budget
        if budget is None:
            return
        spent = self.spent + self.unrecorded
        if spent + tokens > budget:
            message = (
                f"the token budget of {budget} for {self.month} does not allow this request: {spent} are "
                f"spent, it may need {tokens}; ask the operator, or wait for the next month (UTC)"
            )
            raise ApiError(429, message, code="insufficient_quota", headers=NO_RETRY)
        if spent + self.reserved + tokens > budget:
            message = (
                f"the rest of the token budget of {budget} for {self.month} is reserved by requests that "
                f"run: {spent} are spent, {self.reserved} reserved, this request may need {tokens}"
            )
            headers = {"Retry-After": str(_whole_seconds(self.mean_seconds))}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    def reserve(self, num_choices: int, tokens: int, now: float) -> None:
        if self.requests is not None:
            self.requests.take(1, now)
        if self.tokens is not None:
            self.tokens.take(tokens, now)
        self.num_running += num_choices
        self.reserved += tokens

    def settle(self, reservation: Reservation, tokens: int, now: float) -> None:
        if self.tokens is not None:
            self.tokens.take(tokens - reservation.tokens, now)
        self.num_running -= reservation.num_choices
        self.reserved -= reservation.tokens
        if reservation.month == self.month:
            self.unrecorded += tokens
        self.mean_seconds += 0.2 * (now - reservation.admitted - self.mean_seconds)

    def headers(self, now: float) -> dict[str, str]:
        """OpenAI's rate limit headers, for the limits that there are."""
        headers: dict[str, str] = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                level = bucket.level(now)
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(level)))
                headers[f"x-ratelimit-reset-{name}"] = _duration(bucket.seconds(bucket.capacity - level))
        return headers

    def _refusal(self, message: str, code: str, wait: float, now: float) -> ApiError:
        seconds = _whole_seconds(wait)
        headers = {**self.headers(now), "Retry-After": str(seconds)}
        return ApiError(429, f"{message}; try again in {seconds} s", code=code, headers=headers)


def _bucket(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    if bucket.capacity != per_minute:
        bucket.resize(per_minute, now)
    return bucket


def _too_large(name: str, limit: int, found: int) -> ApiError:
    what = "choices at once" if name == "max_parallel" else "tokens (prompt and max_tokens of every choice)"
    message = (
        f"this request may need {found} {what}, the tenant's {name} is {limit}: it could never be let in; "
        "lower max_tokens or n"
    )
    return ApiError(400, message, code="request_exceeds_limit")


def _whole_seconds(wait: float) -> int:
    return max(MIN_RETRY_SECONDS, math.ceil(wait))


def _duration(seconds: float) -> str:
    """As OpenAI writes it: '20ms', '1.5s', '6m0s'."""
    if seconds < 1.0:
        return f"{math.ceil(1e3 * seconds)}ms"
    if seconds < 60.0:
        return f"{round(seconds, 3):g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"

"""What is in flight: counted, refused when it is too much, given a time to end, stopped at shutdown.

How much is let in. Running and waiting choices (a choice: one answer to one prompt) together are at most
max_running + max_waiting, where max_running is what the engine runs in one step. By Little's law a queue of
w choices before r running ones makes a request wait w / r of a mean service time, so its whole latency is at
most 1 + w / r times that of a server that is just full, however long the answers are. The default, w = r / 2,
keeps it at 1.5: the rest of the room to 2 is for the luck of the draw. Where answers are long that is still
a long wait, so `queue_seconds` bounds the estimated wait as well.

Who is refused. The engine is fair between tenants, but only to those that it sees: where the queue is full a
tenant among several is still let in with its first request, and as long as it holds at most an equal share of
the places, by up to max_running choices above the limit. Those that hold more get none of the places that
fall free there, so one tenant can't lock the others out by filling the queue.

What is refused is told when to come back. The rate at which choices leave is measured as
(choices in flight) / (time that each was in flight), again Little's law, over the last twenty or so that
were served. Retry-After is the time in which that rate makes room for those who were refused before (they
come back too) and then for this one: refused requests come back spread out over time, not all at once.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from hayai.server.errors import ApiError

DEFAULT_RUNNING = 16
QUEUE_SECONDS = 10.0
MAX_RETRY_SECONDS = 60.0
"""Of Retry-After: longer than that, an estimate says nothing."""
TIMEOUT_HEADER = "x-hayai-timeout-ms"

_MEMORY = 0.1
"""Weight of the newest request in the running means: about the last twenty count."""


class Gate:
    """Counts what is in flight, refuses what is too much, and stops all of it at shutdown.

    max_running: choices that run at the same time (the engine's max_sequences). max_waiting: choices that may
    wait beside them; None = half of max_running. queue_seconds: the longest estimated wait. request_timeout:
    seconds after which any request ends with 'timeout'; None = never. Everything runs on the event loop's
    thread.
    """

    def __init__(
        self,
        max_waiting: int | None = None,
        max_running: int = DEFAULT_RUNNING,
        *,
        queue_seconds: float = QUEUE_SECONDS,
        request_timeout: float | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.max_running = max_running
        self.max_waiting = math.ceil(max_running / 2) if max_waiting is None else max_waiting
        self.queue_seconds = queue_seconds
        self.request_timeout = request_timeout
        self.num_choices = 0
        """Choices in flight that somebody waits for."""
        self.num_of_tenant: Counter[str] = Counter()
        """Of `num_choices`, those of each tenant that has any."""
        self.num_background = 0
        """Choices in flight that nobody waits for (batches); they take no place from the others."""
        self.closing = False
        """No request is let in any more."""
        self._clock = clock
        self._running: dict[asyncio.Task[None], _Entry] = {}
        self._mean_seconds = 0.0
        self._mean_choices = 0.0
        self._backlog = 0.0
        self._backlog_time = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    # ------------------------------------------------------------------ who comes in

    def check(self, num_choices: int, background: bool = False, tenant: str = "") -> None:
        """ApiError 429 (code 'overloaded', Retry-After) where `num_choices` more of `tenant` would be too
        many, 503 where the server is closing.

        A request of more choices than could ever run at once counts as many as can: no more of it are handed
        to the engine at the same time (generate.py), so it fills the running places and leaves the queue, and
        the turns of others, as they are.
        """
        if self.closing:
            raise shutting_down()
        if background:
            return
        weight = self._weight(num_choices)
        after = self.num_choices + weight
        limit = self.max_running + self.max_waiting
        rate = self.rate
        wait = (after - self.max_running) / rate if rate else 0.0
        if after <= limit and wait <= self.queue_seconds:
            return
        places = min(limit, self.max_running + self.queue_seconds * rate) if rate else limit
        if self._below_share(tenant, weight, places):
            return
        if after > limit:
            why = (
                f"{self.num_choices} choices are running or waiting and {num_choices} more were asked for; "
                f"at most {self.max_running} run and {self.max_waiting} wait"
            )
        else:
            why = f"the wait would be about {wait:.0f} s; the longest is {self.queue_seconds:g} s"
        seconds = self._come_back(weight, max(after - limit, (wait - self.queue_seconds) * rate))
        raise ApiError(429, f"overloaded: {why}", code="overloaded", headers=_retry_after(seconds))

    def _below_share(self, tenant: str, weight: int, places: float) -> bool:
        """Whether a full server takes `weight` choices more of a tenant: one of several that has nothing
        here, or stays within an equal share of the places."""
        held = self.num_of_tenant[tenant]
        num_tenants = len(self.num_of_tenant) + (held == 0)
        if num_tenants == 1 or self.num_choices + weight > places + self.max_running:
            return False
        return held == 0 or held + weight <= places / num_tenants

    def _weight(self, num_choices: int) -> int:
        return min(num_choices, self.max_running)

    def _come_back(self, weight: int, excess: float) -> float:
        """Seconds until this request would have its turn behind everybody who was refused before it."""
        rate = self.rate
        if not rate:
            return 1.0
        now = self._clock()
        self._backlog = max(0.0, self._backlog - (now - self._backlog_time) * rate)
        self._backlog_time = now
        seconds = (self._backlog + max(excess, 0.0)) / rate
        self._backlog = min(self._backlog + weight, MAX_RETRY_SECONDS * rate)
        return min(max(seconds, 0.05), MAX_RETRY_SECONDS)

    @property
    def rate(self) -> float:
        """Choices per second that leave when the server is busy, as measured; 0 before the first one left."""
        return self._mean_choices / self._mean_seconds if self._mean_seconds else 0.0

    @property
    def num_waiting(self) -> int:
        """Choices beyond those that the engine runs at once."""
        return max(0, self.num_choices - self.max_running)

    def deadline(self, headers: Mapping[str, str], arrived: float) -> float | None:
        """When a request has to be over, in monotonic seconds: the configured time or the header's, whichever
        is sooner. ApiError 400 where the header is not a number of milliseconds above 0."""
        limit = self.request_timeout
        asked = headers.get(TIMEOUT_HEADER)
        if asked is not None:
            with suppress(ValueError):
                seconds = float(asked) / 1000
                if 0 < seconds < math.inf:
                    return arrived + (seconds if limit is None else min(limit, seconds))
            message = f"{TIMEOUT_HEADER} must be a number of milliseconds above 0: {asked[:40]!r}"
            raise ApiError(400, message, param=TIMEOUT_HEADER, code="invalid_value")
        return None if limit is None else arrived + limit

    # ------------------------------------------------------------------ what is in flight

    def enter(
        self, task: asyncio.Task[None], num_choices: int, background: bool = False, tenant: str = ""
    ) -> None:
        """`task` answers a request of `tenant` from now on."""
        weight = self._weight(num_choices)
        if background:
            self.num_background += weight
        else:
            self.num_choices += weight
            self.num_of_tenant[tenant] += weight
        self._running[task] = _Entry(self._clock(), self.num_choices, weight, background, tenant)
        self._idle.clear()

    def leave(self, task: asyncio.Task[None], num_choices: int) -> None:
        """`task` is over; what it was served says how fast the server is."""
        entry = self._running.pop(task)
        weight = entry.weight
        if entry.background:
            self.num_background -= weight
        else:
            if task.done() and not task.cancelled() and task.exception() is None:
                seconds = (
                    (self._clock() - entry.began) * weight / num_choices
                )  # that a place was held by a choice
                self._note(seconds, (entry.before + self.num_choices) / 2)
            self.num_choices -= weight
            self.num_of_tenant[entry.tenant] -= weight
            if not self.num_of_tenant[entry.tenant]:
                del self.num_of_tenant[entry.tenant]
        if not self._running:
            self._idle.set()

    def _note(self, seconds: float, choices: float) -> None:
        """One served request. Where the engine was not full, more of them would have taken hardly longer."""
        choices = max(choices, float(self.max_running))
        if not self._mean_seconds:
            self._mean_seconds, self._mean_choices = max(seconds, 1e-6), choices
            return
        self._mean_seconds += _MEMORY * (seconds - self._mean_seconds)
        self._mean_choices += _MEMORY * (choices - self._mean_choices)

    # ------------------------------------------------------------------ the end

    async def drain(self, seconds: float | None = None) -> bool:
        """Let nobody in any more and wait until everything in flight is over; after `seconds` stop what still
        runs. True where nothing had to be stopped."""
        self.closing = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self.close()
            return False
        return True

    def close(self) -> None:
        """Stop everything that runs; requests end with an error that says why."""
        self.closing = True
        for task in self._running:
            task.cancel()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A request in flight. began: seconds; before: choices in flight then, its own included."""

    began: float
    before: int
    weight: int
    background: bool
    tenant: str


def shutting_down() -> ApiError:
    """For requests that come or still run while the server stops. Another one may be there in a moment."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=_retry_after(1.0))


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds for everybody, milliseconds for clients that read them (OpenAI's do)."""
    return {"Retry-After": str(max(1, math.ceil(seconds))), "retry-after-ms": str(math.ceil(seconds * 1000))}

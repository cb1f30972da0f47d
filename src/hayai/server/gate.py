"""What is in flight: counted, refused when it is too much, stopped at shutdown."""

from __future__ import annotations

import asyncio

from hayai.server.errors import ApiError


class Gate:
    """Counts what is in flight, refuses what is too much, and stops all of it at shutdown."""

    def __init__(self, max_choices: int) -> None:
        self.max_choices = max_choices
        self.num_choices = 0
        self.closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self, num_choices: int) -> None:
        """ApiError 503 where `num_choices` more would pass the limit, or the server is closing; 400 where
        they would pass it on an idle server too."""
        if self.closing:
            raise shutting_down()
        if num_choices > self.max_choices:
            message = f"{num_choices} choices in one request; this server takes at most {self.max_choices}"
            raise ApiError(400, message, param="n", code="invalid_value")
        if self.num_choices + num_choices > self.max_choices:
            raise ApiError(
                503,
                f"too many requests in flight: {self.num_choices} of {self.max_choices} choices are taken, "
                f"{num_choices} more were asked for",
                code="overloaded",
                headers={"Retry-After": "1"},
            )

    def enter(self, task: asyncio.Task[None], num_choices: int) -> None:
        self.num_choices += num_choices
        self._tasks.add(task)

    def leave(self, task: asyncio.Task[None], num_choices: int) -> None:
        self.num_choices -= num_choices
        self._tasks.discard(task)

    def close(self) -> None:
        """Stop everything that runs; requests end with an error that says why."""
        self.closing = True
        for task in self._tasks:
            task.cancel()


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")

"""From the engine's thread to an asyncio loop, with one wake-up per step however many requests run."""

from __future__ import annotations

import asyncio
from collections import deque

from hayai.engine.request import TokenEvent


class LoopMailbox:
    """Carries events to one event loop. `post` runs on the engine's thread, everything else on the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[EventBox, TokenEvent]] = deque()
        self._awake = False

    def post(self, box: EventBox, event: TokenEvent) -> None:
        """Queue an event and wake the loop unless it is about to look anyway. RuntimeError: loop closed."""
        self._items.append((box, event))
        if not self._awake:
            self._awake = True
            self.loop.call_soon_threadsafe(self._sort)

    def _sort(self) -> None:
        # The flag falls before the queue is read: an event that is queued now finds it down and wakes us
        # again, one that was queued before is in the queue.
        self._awake = False
        items = self._items
        while items:
            box, event = items.popleft()
            box.put(event)


class EventBox:
    """The events of one request, for one waiting task."""

    def __init__(self, mailbox: LoopMailbox) -> None:
        self._mailbox = mailbox
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None

    def post(self, event: TokenEvent) -> None:
        """The engine's callback."""
        self._mailbox.post(self, event)

    def put(self, event: TokenEvent) -> None:
        """On the loop: hand over one event."""
        self._events.append(event)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[TokenEvent]:
        """Everything that has come, at least one event."""
        if not self._events:
            self._waiter = self._mailbox.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events

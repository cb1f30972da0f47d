"""From the engine's thread to an asyncio loop, with one wake-up per step however many requests run.

A stream that has the engine to itself can do without the loop: its events are diverted to a sink that runs on
the engine's thread (docs/log.md: the wake-up, the loop's turn and its write cost a tenth of the speed).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from hayai.engine.request import TokenEvent
from hayai.frontend_text import TextAssembler, TextChunk


class DirectSink(Protocol):
    """Takes chunks on the engine's thread. `open` runs on the loop and says whether it would."""

    writable: bool
    """False while it can't take another chunk."""

    async def open(self) -> bool: ...

    def send(self, chunk: TextChunk) -> None: ...


def forwarder(assembler: TextAssembler, sink: DirectSink) -> Callable[[TokenEvent], bool]:
    """For `EventBox.divert`: the text of every event but the last."""
    push, send = assembler.push, sink.send

    def forward(event: TokenEvent) -> bool:
        if event.finish_reason is not None or not sink.writable:
            return False
        chunk = push(event)
        if chunk is not None:
            send(chunk)
        return True

    return forward


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
    """The events of one request, for one waiting task.

    `divert` takes the loop out of the path: events then go to a function on the engine's thread, until it
    declines one.
    """

    def __init__(self, mailbox: LoopMailbox) -> None:
        self._mailbox = mailbox
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._lock = threading.Lock()  # who gets the next event, and whether all before it were taken
        self._on_the_way = 0  # events posted to the loop that `take` has not given out
        self._direct: Callable[[TokenEvent], bool] | None = None

    def post(self, event: TokenEvent) -> None:
        """The engine's callback."""
        with self._lock:
            direct = self._direct
            if direct is not None:
                if direct(event):
                    return
                self._direct = None
            self._on_the_way += 1
        self._mailbox.post(self, event)

    def divert(self, direct: Callable[[TokenEvent], bool]) -> bool:
        """On the loop: give the next events to `direct`, unless one is already under way here.

        `direct` runs on the engine's thread and returns False for an event that it leaves to the loop, which
        gets all that follow as well.
        """
        with self._lock:
            if self._on_the_way:
                return False
            self._direct = direct
            return True

    def undivert(self) -> None:
        """On the loop: after this call `direct` is not called any more."""
        with self._lock:
            self._direct = None

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
        with self._lock:
            self._on_the_way -= len(events)
        return events

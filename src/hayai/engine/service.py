"""The engine's face to other threads: submit, abort, events by callback.

Two ways to drive one engine, one code path:
  start()  a daemon thread of its own runs steps while there is work and sleeps otherwise (the server);
  pump()   without a thread, whoever waits for a token runs the step himself (`LLM`, `hayai run`): no
           hand-over between threads, so it is the way with the least overhead.

Order inside a turn: requests that came in are taken, the next step is scheduled, *then* the events of the
step before are delivered, and the backend is called at once. So whoever was woken by an event works while
the native step runs with the GIL released, and never delays it.

When a step raises, the requests in the engine end with 'error', the engine starts again empty, and those
that had not been taken in yet run as if nothing had happened. After `MAX_CRASHES` crashes in `CRASH_WINDOW`
seconds the service is dead for good and says so (`failure`, `on_death`): a process around it should end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

from hayai.engine.engine import Engine
from hayai.engine.request import EngineRequest, TokenEvent
from hayai.errors import RequestError
from hayai.logs import log

OnEvent = Callable[[TokenEvent], None]

CLOSE_SECONDS = 30.0
"""How long `close` waits for the step in flight."""

MAX_CRASHES = 3
CRASH_WINDOW = 60.0
"""Seconds. The crash that fills this window up is the last one."""


class EngineError(Exception):
    """The engine itself failed or is closed: not the request's fault."""


class _Abort:
    __slots__ = ("request_id",)

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


_Message = tuple[EngineRequest, float | None] | _Abort | None
"""A request with its time of arrival, an abort, or None: close."""


class EngineService:
    """Runs an engine for many callers. All methods but `pump` may be called from any thread.

    on_death: called once with the reason when the engine has failed for good, on the thread that ran it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._callbacks: dict[str, OnEvent] = {}
        self._events: list[TokenEvent] = []
        self._lock = threading.Lock()  # submit, close and start against each other
        self._turn_lock = threading.Lock()  # who runs a step
        self._thread: threading.Thread | None = None
        self._closing = False
        self._dead: str | None = None
        self._crashes: deque[float] = deque()
        self.on_death: Callable[[str], None] | None = None

    # ------------------------------------------------------------------ callers

    @property
    def threaded(self) -> bool:
        """Whether a thread runs the steps; if not, the callers pump."""
        return self._thread is not None

    @property
    def alive(self) -> bool:
        """Whether requests are accepted: the engine has neither failed nor been closed."""
        return self._dead is None and not self._closing

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped for good; None while it has not."""
        return self._dead

    def start(self) -> None:
        """Give the engine its own thread. Calling it again does nothing."""
        if self._thread is not None:
            return
        with self._turn_lock, self._lock:  # no step runs on a caller's thread now
            self._refuse_dead()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hayai-engine", daemon=True)
                self._thread.start()

    def submit(self, request: EngineRequest, on_event: OnEvent, arrived: float | None = None) -> None:
        """Queue a request; `on_event` is called with each event, on the thread that runs the engine.

        It has to be quick and must not raise. RequestError: can't be served; EngineError: dead or closed.
        """
        self.engine.check(request)
        with self._lock:
            self._refuse_dead()
            if self._callbacks.setdefault(request.request_id, on_event) is not on_event:
                raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
            self._inbox.put((request, arrived))

    def abort(self, request_id: str) -> None:
        """Stop a request before the next step. Unknown and finished ids are ignored."""
        self._inbox.put(_Abort(request_id))

    def pump(self) -> None:
        """Run one step on this thread and deliver its events; does nothing once a thread does it.

        An interrupt (Ctrl-C) in the middle drops every request and leaves an empty, working engine.
        """
        with self._turn_lock:
            if self._thread is not None or self._dead is not None:
                return
            try:
                self._take_inbox()
                self._deliver(self.engine.step())
            except Exception as error:
                self._recover(error)
            except BaseException:
                self.engine.reset()
                self._finish_all("abort", None)
                raise

    def close(self) -> bool:
        """Stop: running requests end with 'abort' after the step in flight. Further submits fail.

        True when no step runs any more; False when the one in flight did not end in `CLOSE_SECONDS`, so that
        the backend must not be freed under it.
        """
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        if self._thread is None:
            self.pump()
        elif self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    def _refuse_dead(self) -> None:
        if self._dead is not None:
            raise EngineError(f"the engine has stopped: {self._dead}")
        if self._closing:
            raise EngineError("the engine is closed")

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while True:
            try:
                self._turn()
                return
            except Exception as error:
                if not self._recover(error):
                    return
            except BaseException as error:
                self._die(error)
                return

    def _turn(self) -> None:
        """Run steps until the service is closed."""
        engine = self.engine
        while True:
            self._take_inbox()
            batch = engine.schedule()
            events, self._events = self._events, []
            self._deliver(events)
            self._events = engine.run(batch)
            if not engine.has_work:
                self._deliver(self._events)
                self._events = []
                if self._closing:
                    self._finish_all("abort", None)  # what came in after the last look
                    return
                self._take(self._inbox.get())  # sleeps until something comes

    def _take_inbox(self) -> None:
        inbox = self._inbox
        while not inbox.empty():
            try:
                self._take(inbox.get_nowait())
            except Empty:
                return

    def _take(self, message: _Message) -> None:
        if message is None:
            for request_id in list(self._callbacks):
                self.engine.abort(request_id)
        elif isinstance(message, _Abort):
            self.engine.abort(message.request_id)
        else:
            try:
                self.engine.add(*message)
            except Exception as error:
                # Checked when it was submitted: whatever is wrong now is wrong with this request alone.
                self._tell(message[0].request_id, "error", str(error))

    def _deliver(self, events: list[TokenEvent]) -> None:
        callbacks = self._callbacks
        for event in events:
            request_id = event.request_id
            callback = (
                callbacks.get(request_id) if event.finish_reason is None else callbacks.pop(request_id, None)
            )
            if callback is None:
                continue
            try:
                callback(event)
            except Exception:
                # The listener is gone (its event loop was closed): nobody wants the rest. The next step may
                # be scheduled already, so that the abort has to wait until it is done.
                callbacks.pop(request_id, None)
                self._inbox.put(_Abort(request_id))

    def _tell(self, request_id: str, reason: str, error: str | None) -> None:
        """Give a request its last event, made here."""
        with self._lock:
            callback = self._callbacks.pop(request_id, None)
        if callback is not None:
            try:
                callback(TokenEvent(request_id, -1, reason, error=error))
            except Exception:
                return  # its listener is gone as well

    def _recover(self, error: Exception) -> bool:
        """A step raised: fail what was in it and start again, or die when that has happened too often."""
        now = time.monotonic()
        self._crashes.append(now)
        while self._crashes[0] < now - CRASH_WINDOW:
            self._crashes.popleft()
        if len(self._crashes) >= MAX_CRASHES:
            self._die(error)
            return False
        log(
            "error", "hayai.engine", "the engine crashed and starts again: %s", _reason(error), exc_info=error
        )
        self._deliver(self._events)  # of the step before, which was sound
        self._events = []
        try:
            self.engine.reset("error")
        except Exception as worse:
            self._die(worse)
            return False
        with self._lock:
            messages = self._drain()
            innocent = {m[0].request_id for m in messages if isinstance(m, tuple)}
            lost = [request_id for request_id in self._callbacks if request_id not in innocent]
        for request_id in lost:
            self._tell(request_id, "error", _reason(error))
        for message in messages:
            self._take(message)
        return True

    def _die(self, error: BaseException) -> None:
        """The engine broke for good: no request is left waiting, none is accepted any more."""
        log("critical", "hayai.engine", "the engine has stopped: %s", _reason(error), exc_info=error)
        with self._lock:
            self._dead = _reason(error)
        self._finish_all("error", self._dead)
        if self.on_death is not None:
            self.on_death(self._dead)

    def _drain(self) -> list[_Message]:
        messages: list[_Message] = []
        while not self._inbox.empty():
            messages.append(self._inbox.get_nowait())
        return messages

    def _finish_all(self, reason: str, error: str | None) -> None:
        with self._lock:
            lost = list(self._callbacks)
            self._drain()
        for request_id in lost:
            self._tell(request_id, reason, error)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

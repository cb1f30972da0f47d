"""The engine's face to other threads: submit, abort, events by callback.

Two ways to drive one engine, one code path:
  start()  a daemon thread of its own runs steps while there is work and sleeps otherwise (the server);
  pump()   without a thread, whoever waits for a token runs the step himself (`LLM`, `hayai run`): no
           hand-over between threads, so it is the way with the least overhead.

Order inside a turn: requests that came in are taken, the next step is scheduled, *then* the events of the
step before are delivered, and the backend is called at once. So whoever was woken by an event works while
the native step runs with the GIL released, and never delays it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from hayai.engine.engine import Engine
from hayai.engine.request import EngineRequest, TokenEvent
from hayai.errors import RequestError

OnEvent = Callable[[TokenEvent], None]

CLOSE_SECONDS = 30.0
"""How long `close` waits for the step in flight."""


class EngineError(Exception):
    """The engine itself failed or is closed: not the request's fault."""


class _Abort:
    __slots__ = ("request_id",)

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


_Message = tuple[EngineRequest, float | None] | _Abort | None
"""A request with its time of arrival, an abort, or None: close."""


class EngineService:
    """Runs an engine for many callers. All methods but `pump` may be called from any thread."""

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

    # ------------------------------------------------------------------ callers

    @property
    def threaded(self) -> bool:
        """Whether a thread runs the steps; if not, the callers pump."""
        return self._thread is not None

    @property
    def alive(self) -> bool:
        """Whether requests are accepted: the engine has neither failed nor been closed."""
        return self._dead is None and not self._closing

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
                self._fail(error)
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
        engine = self.engine
        try:
            while True:
                self._take_inbox()
                batch = engine.schedule()
                self._deliver(self._events)
                self._events = engine.run(batch)
                if not engine.has_work:
                    self._deliver(self._events)
                    self._events = []
                    if self._closing:
                        self._finish_all("abort", None)  # what came in after the last look
                        return
                    self._take(self._inbox.get())  # sleeps until something comes
        except BaseException as error:
            self._fail(error)

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
            self.engine.add(*message)

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
                # The listener is gone (its event loop was closed): nobody wants the rest.
                callbacks.pop(request_id, None)
                self.engine.abort(request_id)

    def _fail(self, error: BaseException) -> None:
        """The engine broke: no request is left waiting, none is accepted any more."""
        with self._lock:
            self._dead = f"{type(error).__name__}: {error}"
        self._finish_all("error", self._dead)

    def _finish_all(self, reason: str, error: str | None) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks, {}
        while not self._inbox.empty():
            self._inbox.get_nowait()
        for request_id, callback in callbacks.items():
            try:
                callback(TokenEvent(request_id, -1, reason, error=error))
            except Exception:
                continue  # its listener is gone as well

"""Runs the application: binds the socket, handles signals, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hayai.config import ServerConfig
from hayai.errors import ConfigError
from hayai.server.direct import TRANSPORT
from hayai.server.errors import ApiError
from hayai.server.tls import Certificate

MAX_HEAD_BYTES = 64 << 10
"""Of a request's first line and headers together."""
MAX_AHEAD_BYTES = 64 << 10
"""Of further requests that a client sends (pipelines) while it waits for an answer."""

WATCH_SECONDS = 0.5
RENEW_SECONDS = 60.0
"""How often the engine, and the files of the certificate, are looked at."""
CUT_SECONDS = 10.0
"""How long clients have for the end of their answers, once work has stopped."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(config: ServerConfig, *, keyed: bool = False, allow_remote: bool = False) -> socket.socket:
    """A bound socket (port 0: the system chooses). ConfigError where it is taken, or where anybody on the
    network could use the server: it asks for no keys, and `allow_remote` doesn't say that this is meant.

    Bound before the model is loaded, so that a port in use is known at once; it does not listen yet.
    """
    if not keyed and not allow_remote and not is_loopback(config.host):
        raise ConfigError(
            f"binding to {config.host} opens the server to the network, and it asks for no keys; make one "
            "(hayai keys create), bind to 127.0.0.1, or say --allow-remote if that is what you want"
        )
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"port must be from 0 to 65535: {config.port}")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"can't resolve host {config.host!r}: {error.strerror or error}") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        where = f"{config.host}:{config.port}"
        raise ConfigError(f"can't listen on {where}: {error.strerror or error}") from None
    return sock


def url_of(sock: socket.socket, *, tls: bool = False) -> str:
    """http://host:port of a bound socket."""
    host, port = sock.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def make_server(
    app: Starlette,
    on_ready: Callable[[], None] | None = None,
    *,
    certificate: Certificate | None = None,
    drain_seconds: float = ServerConfig.drain_seconds,
    failure: Callable[[], str | None] | None = None,
) -> HttpServer:
    """A server for `app`, not started. `on_ready` is called when it accepts requests.

    drain_seconds: how long running requests may take to end after SIGTERM. failure: asked twice a second why
    the engine has failed; once it says something other than None the server stops, and has it as `failure`.
    """
    config = uvicorn.Config(
        app,
        loop="uvloop" if _has_uvloop() else "asyncio",
        http=LimitedProtocol,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        backlog=1024,
    )
    config.load()
    if certificate is not None:
        config.ssl = certificate.context
    return HttpServer(config, app, on_ready, certificate, drain_seconds, failure)


def serve(server: HttpServer, sock: socket.socket) -> None:
    """Serve until it is told to stop or its engine fails (`server.failure`).

    SIGTERM: new requests are refused, what runs may end. SIGINT: all work stops at the next step. A second
    signal doesn't wait for anything. ConfigError: somebody else listens on the port since it was bound.
    """
    try:
        server.run(sockets=[sock])
    except OSError as error:
        raise ConfigError(f"can't listen on {url_of(sock)}: {error.strerror or error}") from None


def _has_uvloop() -> bool:
    with suppress(ImportError):
        import uvloop  # noqa: F401  (absent on Windows)

        return True
    return False


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit on a request's head, errors in OpenAI's form, and an eye on clients
    that leave.

    The parser keeps a head until it is complete, however long it gets. uvicorn stops reading while a
    pipelined request waits for its turn, and tells only the newest request that the connection is lost: a
    client that pipelines and leaves would keep its answer running. Here reading goes on, within a limit.
    """

    _in_head = True
    _head_bytes = 0
    _ahead_bytes = 0
    _answering: RequestResponseCycle | None = None
    """The request that has its turn; those behind it are in `pipeline`."""

    def data_received(self, data: bytes) -> None:
        self._ahead_bytes = self._ahead_bytes + len(data) if self.pipeline else 0
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the request's head is too large: the limit is {MAX_HEAD_BYTES} bytes")
        if self.pipeline:
            if self._ahead_bytes > MAX_AHEAD_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        cycle = self._answering
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()
        self.scope["extensions"] = {TRANSPORT: {"transport": self.transport}}

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if self._answering is not None and not self._answering.response_complete:
            self.transport.abort()  # what is said now would be in the middle of another answer
            return
        body = ApiError(status, message, code="bad_request").body()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn's server, which knows how to stop, and does not raise the signal again."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: Starlette,
        on_ready: Callable[[], None] | None,
        certificate: Certificate | None,
        drain_seconds: float,
        failure: Callable[[], str | None] | None,
    ) -> None:
        super().__init__(config)
        self.failure: str | None = None
        """Why the engine failed, where the server stopped for that."""
        self._app = app
        self._on_ready = on_ready
        self._certificate = certificate
        self._drain_seconds = drain_seconds
        self._ask_failure = failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._start(self._watch())
        if self._on_ready is not None and self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for task in self._tasks:
            task.cancel()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only; whoever runs us elsewhere sets should_exit
            return
        before = {s: signal.signal(s, self.handle_exit) for s in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Stop all work, answer what is in flight with an error, and return from `run`."""
        self._exit(0.0)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._app.state.gate.close)

    def drain(self) -> None:
        """Let what runs end (at most `drain_seconds`), and return from `run`. Until then the server answers:
        new requests with 503, and whoever asks whether it is ready."""
        self._ending = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_draining)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ending:
            self.force_exit = True  # the second time: don't wait for anything
            self.stop()
        else:
            _ENDS[signal.Signals(sig)](self)

    def _exit(self, seconds: float) -> None:
        """Close the listeners. Other requests than the gate's have so many seconds; connections that nobody
        reads are cut a little later."""
        self._ending = self.should_exit = True
        self.config.timeout_graceful_shutdown = math.ceil(seconds + CUT_SECONDS)

    def _start_draining(self) -> None:
        self._start(self._drain())

    async def _drain(self) -> None:
        end = time.monotonic() + self._drain_seconds
        await self._app.state.gate.drain(self._drain_seconds)
        self._exit(max(0.0, end - time.monotonic()))

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Half alive is worse than dead: a server without its engine stops, so that a supervisor sees it."""
        seconds = 0.0
        while not self.should_exit:
            await asyncio.sleep(WATCH_SECONDS)
            self.failure = self._ask_failure() if self._ask_failure is not None else None
            if self.failure is not None:
                self.stop()
            seconds += WATCH_SECONDS
            if self._certificate is not None and seconds >= RENEW_SECONDS:
                seconds = 0.0
                self._certificate.refresh()


_ENDS: Mapping[int, Callable[[HttpServer], None]] = {
    signal.SIGTERM: HttpServer.drain,
    signal.SIGINT: HttpServer.stop,
}

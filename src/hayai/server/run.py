"""Runs the application: binds the socket, handles signals, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from hayai.config import ServerConfig
from hayai.errors import ConfigError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(config: ServerConfig, *, allow_remote: bool = False) -> socket.socket:
    """A bound socket (port 0: the system chooses). ConfigError where it is taken, or open to the network.

    Bound before the model is loaded, so that a port in use is known at once; it does not listen yet.
    """
    if not allow_remote and not is_loopback(config.host):
        raise ConfigError(
            f"binding to {config.host} opens the server to the network, and it has no keys yet; "
            "bind to 127.0.0.1, or say --allow-remote if that is what you want"
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


def url_of(sock: socket.socket) -> str:
    """http://host:port of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: Starlette, on_ready: Callable[[], None] | None = None) -> HttpServer:
    """A server for `app`, not started. `on_ready` is called when it accepts requests."""
    config = uvicorn.Config(
        app,
        loop="uvloop" if _has_uvloop() else "asyncio",
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        backlog=1024,
    )
    return HttpServer(config, app, on_ready)


def serve(app: Starlette, sock: socket.socket, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. The first stops all work at the next step, a second doesn't wait.

    ConfigError: somebody else listens on the port since it was bound.
    """
    try:
        make_server(app, on_ready).run(sockets=[sock])
    except OSError as error:
        raise ConfigError(f"can't listen on {url_of(sock)}: {error.strerror or error}") from None


def _has_uvloop() -> bool:
    with suppress(ImportError):
        import uvloop  # noqa: F401  (absent on Windows)

        return True
    return False


class HttpServer(uvicorn.Server):
    """uvicorn's server, which stops running requests at once and does not raise the signal again."""

    def __init__(self, config: uvicorn.Config, app: Starlette, on_ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._on_ready is not None and self.started:
            self._on_ready()

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
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._app.state.gate.close)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True  # the second time: don't wait for anything
        self.stop()

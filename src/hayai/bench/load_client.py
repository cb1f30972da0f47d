"""Drives a server with many requests at once from one thread, for as little CPU time as Python allows.

One epoll loop, raw sockets, whole requests encoded beforehand. While the server works the client only stores
(time, bytes) pairs; every answer is parsed when the load is over (load_requests.py), so a client on the
server's own cores takes almost nothing from it. What it took is measured and reported all the same.

Open loop: a shot has a time of its own (`at`), and is due then whatever became of the others; its latency
counts from that time, so a slow server can't slow the load down (no coordinated omission). Closed loop: a
shot without a time is sent when its lane's last one is done.
"""

from __future__ import annotations

import errno
import heapq
import math
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

clock = time.perf_counter

RECEIVE_BYTES = 1 << 16
LONGEST_WAIT = 0.25
"""Seconds between two looks at time limits."""


@dataclass(frozen=True)
class Address:
    """Where requests go: a base URL, taken apart. `prefix` stands before every path ('' or '/v1' ...)."""

    host: str
    port: int
    prefix: str = ""
    secure: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str] | None = None) -> Address:
        """From 'http://host:port/prefix'; ValueError for anything else than http and https."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http or https URL: {url!r}")
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        return cls(parts.hostname, port, parts.path.rstrip("/"), secure, headers or {})

    def post(self, path: str, body: bytes) -> bytes:
        """A whole POST request. `Connection: close` lets the end of the answer be the end of the socket."""
        more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = (
            f"POST {self.prefix}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nAccept: text/event-stream, application/json\r\n{more}"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True, slots=True)
class Shot:
    """One request to send. at: seconds after the start (open loop), None: when the lane is free.

    asked: output tokens that the answer must have. tag: what the caller knows it by. patience: seconds after
    which it is given up and counts as failed.
    """

    data: bytes
    asked: int
    at: float | None = None
    tag: int = 0
    patience: float = 120.0


@dataclass(slots=True)
class Exchange:
    """What was seen of one shot. Times are perf_counter seconds, nan where it never happened.

    due: when the request begins for its user: the intended time of an open loop, else when its lane was free.
    sent: the last byte was handed to the kernel. failure: '' or what cut it short on the wire.
    """

    shot: Shot
    lane: int
    due: float
    sent: float = math.nan
    finished: float = math.nan
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str = ""

    @property
    def over(self) -> bool:
        return not math.isnan(self.finished)


@dataclass(frozen=True)
class Driven:
    """A load that is over. cpu: seconds of CPU time that the client's loop used; stopped: given up early."""

    started: float
    finished: float
    exchanges: tuple[Exchange, ...]
    cpu: float
    stopped: bool = False


Stop = Callable[[float, Sequence[Exchange]], bool]
"""Whether the load can be given up: (seconds now, all exchanges so far). Asked at most every LONGEST_WAIT."""


def drive(
    address: Address, lanes: Sequence[Iterable[Shot]], *, limit: float = math.inf, stop: Stop | None = None
) -> Driven:
    """Send every lane's shots and receive all answers.

    Lanes run side by side, the shots of one lane one after the other; lanes may share one iterator, which
    makes a closed loop of so many users. limit: seconds after which everything unfinished is given up.
    """
    loop = _Loop(address, [iter(lane) for lane in lanes])
    try:
        return loop.run(limit, stop)
    finally:
        loop.close()


class _Connection:
    """A socket with its exchange; `left` is what was not sent yet."""

    __slots__ = ("exchange", "handshake", "left", "socket")

    def __init__(self, found: socket.socket, exchange: Exchange, handshake: bool) -> None:
        self.socket = found
        self.exchange = exchange
        self.left = memoryview(exchange.shot.data)
        self.handshake = handshake


class _Loop:
    """The epoll loop. One object per load."""

    def __init__(self, address: Address, lanes: list[Iterator[Shot]]) -> None:
        self._address = address
        self._lanes = lanes
        self._poll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._timers: list[tuple[float, int, Shot]] = []
        self._exchanges: list[Exchange] = []
        self._started = 0.0
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        self._family, self._target = found[0], found[4]
        self._tls = ssl.create_default_context() if address.secure else None

    def run(self, limit: float, stop: Stop | None) -> Driven:
        cpu = time.thread_time()
        self._started = clock()
        for lane in range(len(self._lanes)):
            self._next(lane, self._started)
        next_look = self._started + LONGEST_WAIT
        stopped = False
        while (self._open or self._timers) and not stopped:
            now = clock()
            while self._timers and self._timers[0][0] <= now:
                due, lane, shot = heapq.heappop(self._timers)
                self._launch(lane, shot, due)
            wait = next_look - now
            if self._timers:
                wait = min(wait, self._timers[0][0] - now)
            for descriptor, events in self._poll.poll(max(0.0, wait)):
                connection = self._open.get(descriptor)
                if connection is not None:
                    self._serve(connection, events)
            now = clock()
            if now >= next_look:
                next_look = now + LONGEST_WAIT
                self._give_up_late(now)
                over = now - self._started > limit
                stopped = over or (stop is not None and stop(now, self._exchanges))
        for connection in list(self._open.values()):
            self._end(connection, clock(), "given up")
        finished = clock()
        return Driven(
            self._started, finished, tuple(self._exchanges), time.thread_time() - cpu, bool(stopped)
        )

    def close(self) -> None:
        for connection in self._open.values():
            connection.socket.close()
        self._poll.close()

    # ------------------------------------------------------------ lanes

    def _next(self, lane: int, now: float) -> None:
        """Start a lane's next shot, or wait for its time."""
        shot = next(self._lanes[lane], None)
        if shot is None:
            return
        due = now if shot.at is None else self._started + shot.at
        if due <= now:
            self._launch(lane, shot, due)
        else:
            heapq.heappush(self._timers, (due, lane, shot))

    def _launch(self, lane: int, shot: Shot, due: float) -> None:
        exchange = Exchange(shot, lane, due)
        self._exchanges.append(exchange)
        found = socket.socket(self._family, socket.SOCK_STREAM)
        found.setblocking(False)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = found.connect_ex(self._target)
        if code not in (0, errno.EINPROGRESS):
            found.close()
            exchange.failure, exchange.finished = f"connect: {errno.errorcode.get(code, code)}", clock()
            self._next(lane, exchange.finished)
            return
        if self._tls is not None:
            found = self._tls.wrap_socket(
                found, server_hostname=self._address.host, do_handshake_on_connect=False
            )
        connection = _Connection(found, exchange, self._tls is not None)
        self._open[found.fileno()] = connection
        self._poll.register(found.fileno(), select.EPOLLOUT)

    # ------------------------------------------------------------ one connection

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if connection.left:
                self._send(connection)
            else:
                self._receive(connection)
        except (ssl.SSLWantReadError, BlockingIOError):
            self._poll.modify(connection.socket.fileno(), select.EPOLLIN)
        except ssl.SSLWantWriteError:
            self._poll.modify(connection.socket.fileno(), select.EPOLLOUT)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, type(error).__name__)
            started = not math.isnan(connection.exchange.sent)
            self._end(connection, clock(), f"{'connection' if started else 'connect'}: {name}")

    def _send(self, connection: _Connection) -> None:
        if connection.handshake:
            assert isinstance(connection.socket, ssl.SSLSocket)
            connection.socket.do_handshake()
            connection.handshake = False
            self._poll.modify(connection.socket.fileno(), select.EPOLLOUT)
        try:
            done = connection.socket.send(connection.left)
        except BlockingIOError:
            return
        connection.left = connection.left[done:]
        if not connection.left:
            connection.exchange.sent = clock()
            self._poll.modify(connection.socket.fileno(), select.EPOLLIN)

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(RECEIVE_BYTES)
        now = clock()
        if data:
            connection.exchange.pieces.append((now, data))
            # bytes that TLS has already decrypted raise no further event
            while isinstance(connection.socket, ssl.SSLSocket) and connection.socket.pending():
                connection.exchange.pieces.append((clock(), connection.socket.recv(RECEIVE_BYTES)))
        else:
            self._end(connection, now, "")

    def _end(self, connection: _Connection, now: float, failure: str) -> None:
        exchange = connection.exchange
        exchange.finished, exchange.failure = now, failure
        del self._open[connection.socket.fileno()]
        self._poll.unregister(connection.socket.fileno())
        connection.socket.close()
        self._next(exchange.lane, now)

    def _give_up_late(self, now: float) -> None:
        for connection in list(self._open.values()):
            exchange = connection.exchange
            if now - exchange.due > exchange.shot.patience:
                self._end(connection, now, "timeout")

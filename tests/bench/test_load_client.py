"""The load client: open and closed loops, times that count from when they should, failures by kind, cost."""

from __future__ import annotations

import math
import socket
import threading
import time

import pytest

from hayai.bench.load_client import Address, Exchange, Shot, drive
from hayai.bench.load_requests import read
from hayai.bench.servers import OPENAI
from streaming_server import END, HEAD, chunk, serving, token, usage


def shot(
    address: Address, tokens: int, *, at: float | None = None, tag: int = 0, patience: float = 30.0
) -> Shot:
    return Shot(address.post("/v1/completions", b'{"n": %d}' % tag), tokens, at, tag, patience)


def quick(connection: socket.socket, body: bytes, number: int) -> None:
    connection.sendall(HEAD + token("a") + token("b") + usage(2, cached=3) + END)


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix", "secure"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "", False),
        ("localhost:9", "localhost", 9, "", False),
        ("https://example.org/api/", "example.org", 443, "/api", True),
        ("http://[::1]:80", "::1", 80, "", False),
    ],
)
def test_a_base_url_is_taken_apart(url: str, host: str, port: int, prefix: str, secure: bool) -> None:
    address = Address.of(url)
    assert (address.host, address.port, address.prefix, address.secure) == (host, port, prefix, secure)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "unix:///run/x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not an http"):
        Address.of(url)


def test_a_closed_loop_has_as_many_in_flight_as_it_has_lanes() -> None:
    def slow(connection: socket.socket, body: bytes, number: int) -> None:
        time.sleep(0.02)
        quick(connection, body, number)

    with serving(slow) as served:
        address = Address("127.0.0.1", served.port)
        queue = iter([shot(address, 2, tag=i) for i in range(20)])
        driven = drive(address, [queue] * 4)
    assert served.most == 4
    assert sorted(int(body.split()[1].strip(b"}")) for body in served.bodies) == list(range(20))
    requests = [read(e, OPENAI) for e in driven.exchanges]
    assert all(r.ok for r in requests)
    assert {(r.num_tokens, r.prompt_tokens, r.cached_tokens) for r in requests} == {(2, 5, 3)}
    assert {r.text for r in requests} == {"ab"}
    assert all(r.begun == r.sent for r in requests), "a closed loop counts from the last byte sent"


def test_an_open_loop_counts_from_the_intended_time_even_when_the_server_is_late() -> None:
    """No coordinated omission: one request at a time is served, so the fifth waits for four others."""
    busy = threading.Lock()
    work = 0.15

    def one_at_a_time(connection: socket.socket, body: bytes, number: int) -> None:
        with busy:
            time.sleep(work)
            quick(connection, body, number)

    with serving(one_at_a_time) as served:
        address = Address("127.0.0.1", served.port)
        times = [0.01 * i for i in range(5)]
        driven = drive(address, [[shot(address, 2, at=at, tag=i)] for i, at in enumerate(times)])
    requests = sorted((read(e, OPENAI) for e in driven.exchanges), key=lambda r: r.begun)
    assert [r.begun - driven.started for r in requests] == pytest.approx(times)
    assert max(r.ttft for r in requests) >= 5 * work - 0.05
    assert sorted(r.ttft for r in requests)[2] >= 3 * work - 0.05


def test_a_busy_lane_does_not_move_the_intended_time() -> None:
    def slow(connection: socket.socket, body: bytes, number: int) -> None:
        time.sleep(0.2)
        quick(connection, body, number)

    with serving(slow) as served:
        address = Address("127.0.0.1", served.port)
        driven = drive(address, [[shot(address, 2, at=0.0), shot(address, 2, at=0.01, tag=1)]])
    second = read(driven.exchanges[1], OPENAI)
    assert second.begun - driven.started == pytest.approx(0.01)
    assert second.lag >= 0.15
    assert second.ttft >= 0.35


def answer_429(connection: socket.socket, body: bytes, number: int) -> None:
    error = b'{"error": {"message": "busy"}}'
    connection.sendall(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n" % len(error) + error)


def cut(connection: socket.socket, body: bytes, number: int) -> None:
    connection.sendall(HEAD + token("a"))


def reset(connection: socket.socket, body: bytes, number: int) -> None:
    connection.sendall(HEAD + token("a"))
    time.sleep(0.05)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def error_event(connection: socket.socket, body: bytes, number: int) -> None:
    connection.sendall(HEAD + token("a") + chunk(b'data: {"error": {"message": "no"}}\n\n') + END)


def short(connection: socket.socket, body: bytes, number: int) -> None:
    connection.sendall(HEAD + token("a") + usage(1) + END)


def empty(connection: socket.socket, body: bytes, number: int) -> None:
    connection.sendall(HEAD + usage(0) + END)


def nonsense(connection: socket.socket, body: bytes, number: int) -> None:
    connection.sendall(HEAD + chunk(b"data: {not json}\n\n") + END)


@pytest.mark.parametrize(
    ("answer", "kind", "status"),
    [
        (answer_429, "status 429", 429),
        (cut, "broken answer", 0),
        (reset, "connection: ECONNRESET", 200),
        (error_event, "error event", 200),
        (short, "short", 200),
        (empty, "no content", 200),
        (nonsense, "not understood", 0),
    ],
)
def test_failures_have_a_kind(answer, kind: str, status: int) -> None:  # type: ignore[no-untyped-def]
    with serving(answer) as served:
        address = Address("127.0.0.1", served.port)
        driven = drive(address, [[shot(address, 2)]])
    (request,) = (read(e, OPENAI) for e in driven.exchanges)
    assert (request.failure, request.status) == (kind, status)
    assert not request.ok
    assert request.e2e >= 0


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = Address("127.0.0.1", port)
    driven = drive(address, [[shot(address, 2), shot(address, 2)]])
    assert [read(e, OPENAI).failure for e in driven.exchanges] == ["connect: ECONNREFUSED"] * 2


def test_impatience_and_giving_up() -> None:
    """A silent server: one request times out by itself, the load is then given up by its stop function."""
    hold = threading.Event()

    def silent(connection: socket.socket, body: bytes, number: int) -> None:
        connection.sendall(HEAD + token("a"))
        hold.wait(20)

    def stop(now: float, exchanges) -> bool:  # type: ignore[no-untyped-def]
        return any(e.over for e in exchanges)

    try:
        with serving(silent) as served:
            address = Address("127.0.0.1", served.port)
            lanes = [[shot(address, 2, patience=0.3)], [shot(address, 2, tag=1)]]
            driven = drive(address, lanes, stop=stop)
            hold.set()
    finally:
        hold.set()
    assert driven.stopped
    first, second = (read(e, OPENAI) for e in driven.exchanges)
    assert (first.failure, second.failure) == ("timeout", "given up")
    assert first.e2e >= 0.3 and first.ttft < 0.3, "what came before the cut still has its time"


def test_a_large_request_is_sent_whole() -> None:
    with serving(quick) as served:
        address = Address("127.0.0.1", served.port)
        body = b'{"prompt": "' + b"x" * (8 << 20) + b'"}'
        driven = drive(address, [[Shot(address.post("/v1/completions", body), 2)]])
    assert read(driven.exchanges[0], OPENAI).ok
    assert served.bodies == [body]


def test_an_exchange_that_never_happened_has_no_times() -> None:
    exchange = Exchange(Shot(b"", 1), 0, 5.0, finished=6.0, failure="given up")
    request = read(exchange, OPENAI)
    assert math.isnan(request.ttft) and math.isnan(request.tpot) and request.e2e == 1.0


EVENTS = 400
STREAMS = 8


def test_receiving_a_token_costs_the_client_little_cpu_time() -> None:
    """CPU time of the client's loop, not wall time: 3,200 events in writes of their own, as a server sends
    them. Measured 6 to 15 microseconds each; a client that parses while it receives needs 60 and more."""
    part = token("x")

    def stream(connection: socket.socket, body: bytes, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(HEAD)
        for _ in range(EVENTS):
            connection.sendall(part)
            time.sleep(0.0005)
        connection.sendall(usage(EVENTS) + END)

    with serving(stream) as served:
        address = Address("127.0.0.1", served.port)
        driven = drive(address, [[shot(address, EVENTS, tag=i)] for i in range(STREAMS)])
    requests = [read(e, OPENAI) for e in driven.exchanges]
    assert all(r.ok and len(r.times) == EVENTS for r in requests)
    pieces = sum(len(e.pieces) for e in driven.exchanges)
    assert pieces > STREAMS * EVENTS / 20, (
        "the events must have come in many writes for this to mean anything"
    )
    assert driven.cpu / pieces < 50e-6

"""The raw streaming client: arrival times, chunked coding, broken answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from hayai.bench.http_client import HttpFailure, get_json, parse_stream, post_stream

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(n: int, end: bytes = b"\n\n") -> bytes:
    return f'data: {{"n": {n}}}'.encode() + end


def one_shot_server(answer: Callable[[socket.socket, bytes], None]) -> int:
    """Serves one connection on a thread: reads a request, hands it to `answer`. Returns the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            length = next(
                (int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), 0
            )
            while len(body) < length:
                body += connection.recv(65536)
            answer(connection, head + b"\r\n\r\n" + body)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def test_events_carry_the_time_of_their_first_byte() -> None:
    gap = 0.15

    def answer(connection: socket.socket, request: bytes) -> None:
        assert b'{"prompt": [1, 2]}' in request
        connection.sendall(HEAD + chunk(event(0)))
        time.sleep(gap)
        # the second event arrives in two pieces; its time is that of the first
        connection.sendall(chunk(event(1)[:5]))
        time.sleep(gap)
        connection.sendall(chunk(event(1)[5:] + event(2)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    result = post_stream("127.0.0.1", one_shot_server(answer), "/x", {"prompt": [1, 2]})
    assert [e.data["n"] for e in result.events] == [0, 1, 2]
    first, second, third = (e.time - result.sent for e in result.events)
    assert 0 <= first < gap
    assert second - first >= gap * 0.8
    assert third - second >= gap * 0.8
    assert result.finished >= result.events[-1].time


def test_bytes_may_be_cut_anywhere() -> None:
    raw = HEAD + chunk(event(0, b"\r\n\r\n") + b": ping\n\n") + chunk(event(1) + event(22)) + b"0\r\n\r\n"
    whole = parse_stream(0.0, [(1.0, raw)])
    assert [e.data["n"] for e in whole.events] == [0, 1, 22]
    places = [raw.index(f'data: {{"n": {n}}}'.encode()) for n in (0, 1, 22)]
    for cut in range(1, len(raw)):
        pieces = [(1.0, raw[:cut]), (2.0, raw[cut:])]
        times = [e.time for e in parse_stream(0.0, pieces).events]
        assert times == [1.0 if place < cut else 2.0 for place in places]


def test_an_answer_without_chunked_coding() -> None:
    raw = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + event(4) + event(5)
    assert [e.data["n"] for e in parse_stream(0.0, [(1.0, raw)]).events] == [4, 5]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no complete HTTP header"),
        (b"HTTP/1.1 200 OK\r\nTransf", "no complete HTTP header"),
        (HEAD + chunk(event(0)), "broke off"),
        (HEAD + b"ff\r\nshort", "broke off"),
        (b'HTTP/1.1 400 Bad\r\n\r\n{"error": "no"}', 'status 400: {"error": "no"}'),
    ],
)
def test_broken_answers_are_failures(raw: bytes, message: str) -> None:
    with pytest.raises(HttpFailure, match=message.replace("{", r"\{").replace("}", r"\}")):
        parse_stream(0.0, [(1.0, raw)])


def test_no_server_and_a_silent_server_are_failures() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        with pytest.raises(HttpFailure, match="timed out"):
            post_stream("127.0.0.1", port, "/x", {}, timeout=0.1)
    with pytest.raises(HttpFailure):
        post_stream("127.0.0.1", port, "/x", {}, timeout=0.5)


def test_get_json_reads_status_and_body() -> None:
    port = one_shot_server(lambda c, _: c.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}"))
    assert get_json("127.0.0.1", port, "/health") == (503, b"{}")

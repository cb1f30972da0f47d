"""A server for tests of the load client: every connection on a thread of its own, answers by a function."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def token(text: str = "x") -> bytes:
    """A completion event with one token's text, as a chunk."""
    return chunk(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")


def usage(tokens: int, prompt: int = 5, cached: int = 0) -> bytes:
    """The last events of a completion stream."""
    counts = {
        "completion_tokens": tokens,
        "prompt_tokens": prompt,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return chunk(b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n") + chunk(
        b"data: [DONE]\n\n"
    )


@dataclass
class Served:
    """What the server saw: its port, the bodies in order of arrival, and the most connections at a time."""

    port: int = 0
    bodies: list[bytes] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


Answer = Callable[[socket.socket, bytes, int], None]
"""Writes an answer: (connection, request body, number of the request)."""


@contextmanager
def serving(answer: Answer) -> Iterator[Served]:
    """Answer every connection with `answer` until the block ends."""
    served = Served()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    served.port = listener.getsockname()[1]

    def one(connection: socket.socket) -> None:
        with connection:
            body = read_request(connection)
            with served.lock:
                number = len(served.bodies)
                served.bodies.append(body)
                served.running += 1
                served.most = max(served.most, served.running)
            try:
                answer(connection, body, number)
            except OSError:
                pass  # the client has gone, which some tests want
            finally:
                with served.lock:
                    served.running -= 1

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def read_request(connection: socket.socket) -> bytes:
    raw = b""
    while b"\r\n\r\n" not in raw:
        data = connection.recv(65536)
        if not data:
            return b""
        raw += data
    head, _, body = raw.partition(b"\r\n\r\n")
    length = next(int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65536)
    return body

"""A streaming HTTP client that costs next to nothing: one socket, one recv loop, parsing afterwards.

While the server works, the client only stores (time, bytes) pairs, so it takes no measurable CPU from a
server on the same cores. Server-sent events are cut out of the stored bytes later; the time of an event is
the time at which its first byte had arrived. Sources: RFC 9112 (chunked coding), the WHATWG HTML standard,
section "Server-sent events".
"""

from __future__ import annotations

import bisect
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECEIVE_BYTES = 1 << 16


class HttpFailure(Exception):
    """The server answered with an error (`status`), broke off, or was silent for too long (status 0)."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Event:
    """One server-sent event's JSON payload; `time` is when its first byte arrived (perf_counter seconds)."""

    time: float
    data: Mapping[str, Any]


@dataclass(frozen=True)
class StreamResult:
    """A finished stream: `sent` is when the last byte of the request had been handed to the kernel."""

    status: int
    sent: float
    finished: float
    events: tuple[Event, ...]


def post_stream(
    host: str, port: int, path: str, payload: Mapping[str, Any], *, timeout: float = 120.0
) -> StreamResult:
    """POST JSON and read a server-sent event stream to its end. HttpFailure on any status but 200.

    The connection is opened before the clock starts: TTFT begins with the last byte of the request.
    """
    request = build_request(host, port, path, payload)
    pieces: list[tuple[float, bytes]] = []
    try:
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request)
            sent = time.perf_counter()
            while True:
                data = connection.recv(RECEIVE_BYTES)
                pieces.append((time.perf_counter(), data))
                if not data:
                    break
    except OSError as error:
        raise HttpFailure(f"POST {path} on port {port}: {error}") from error
    return parse_stream(sent, pieces)


def build_request(host: str, port: int, path: str, payload: Mapping[str, Any]) -> bytes:
    """`Connection: close` lets the end of the answer be the end of the socket."""
    body = json.dumps(payload).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def parse_stream(sent: float, pieces: list[tuple[float, bytes]], *, partial: bool = False) -> StreamResult:
    """Cut stored (time, bytes) pairs into events. HttpFailure where they are no complete answer.

    partial: the stream may break off anywhere after its header; an event that is not whole is left out.
    """
    raw = b"".join(data for _, data in pieces)
    starts: list[int] = []
    total = 0
    for _, data in pieces:
        starts.append(total)
        total += len(data)
    status, _, spans = split_raw(raw, partial)
    if status != 200:
        text = b"".join(raw[a:b] for a, b in spans)
        raise HttpFailure(f"status {status}: {text[:500].decode(errors='replace')}", status)

    def arrival(index: int) -> float:
        return pieces[bisect.bisect_right(starts, index) - 1][0]

    events = tuple(Event(arrival(at), data) for at, data in cut_events(raw, spans, partial))
    return StreamResult(status, sent, pieces[-1][0], events)


def split_raw(raw: bytes, partial: bool = False) -> tuple[int, int, list[tuple[int, int]]]:
    """(status, length of the header, payload ranges) of an answer's bytes."""
    head, separator, _ = raw.partition(b"\r\n\r\n")
    if not separator:
        raise HttpFailure(f"no complete HTTP header in {len(raw)} bytes: {raw[:200]!r}")
    status = int(head.split(b" ", 2)[1])
    offset = len(head) + 4
    if b"transfer-encoding: chunked" in head.lower():
        return status, offset, chunk_spans(raw, offset, partial)
    return status, offset, [(offset, len(raw))]


def split_answer(pieces: list[tuple[float, bytes]]) -> tuple[int, bytes, bytes]:
    """(status, body, header) of an answer that is no stream; HttpFailure on any status but 200."""
    raw = b"".join(data for _, data in pieces)
    status, offset, spans = split_raw(raw)
    body = b"".join(raw[a:b] for a, b in spans)
    if status != 200:
        raise HttpFailure(f"status {status}: {body[:500].decode(errors='replace')}", status)
    return status, body, raw[:offset]


def chunk_spans(raw: bytes, offset: int, partial: bool = False) -> list[tuple[int, int]]:
    """Payload ranges of a chunked body from `offset` on. HttpFailure where the last chunk is missing, or
    with `partial` the ranges of the whole chunks before it."""
    spans: list[tuple[int, int]] = []
    while True:
        end = raw.find(b"\r\n", offset)
        if end < 0:
            if partial:
                return spans
            raise HttpFailure("the chunked answer broke off")
        size = int(raw[offset:end].split(b";")[0], 16)
        if size == 0:
            return spans
        start = end + 2
        if start + size + 2 > len(raw):
            if partial:
                return spans
            raise HttpFailure("the chunked answer broke off")
        spans.append((start, start + size))
        offset = start + size + 2


def cut_events(
    raw: bytes, spans: list[tuple[int, int]], partial: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """(offset of its first byte in `raw`, payload) per JSON event; comments and [DONE] are passed over.

    partial: what follows the last blank line is no event yet.
    """
    body = b"".join(raw[a:b] for a, b in spans)
    inner: list[int] = []
    total = 0
    for a, b in spans:
        inner.append(total)
        total += b - a
    events: list[tuple[int, dict[str, Any]]] = []
    at = 0
    blocks = body.replace(b"\r\n\r\n", b"\n\n\x00\x00").split(b"\n\n")
    for block in blocks[:-1] if partial else blocks:
        # an event that ended in CRLF CRLF leaves two filler bytes, so that offsets stay true
        text = block.lstrip(b"\x00\r\n")
        start = at + len(block) - len(text)
        at += len(block) + 2
        data = b"\n".join(line[5:].strip() for line in text.split(b"\n") if line.startswith(b"data:"))
        if not data or data == b"[DONE]":
            continue
        span = bisect.bisect_right(inner, start) - 1
        payload = json.loads(data)
        if isinstance(payload, dict):
            events.append((spans[span][0] + start - inner[span], payload))
    return events


def get_json(host: str, port: int, path: str, *, timeout: float = 2.0) -> tuple[int, bytes]:
    """GET a small resource (health, properties): status and body."""
    with socket.create_connection((host, port), timeout=timeout) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        raw = b""
        while data := connection.recv(RECEIVE_BYTES):
            raw += data
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body

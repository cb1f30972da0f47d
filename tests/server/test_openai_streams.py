"""Streams that are silent, and readers that are slow: neither costs anybody else anything."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from hayai.server import generate
from server_process import InnerServer

StartServer = Callable[..., InnerServer]
BUFFER = 4096
"""Bytes that the kernel keeps on each side of a connection here, so that a slow reader is one soon."""
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100, "ignore_eos": True}
LONG |= {"stream": True, "logprobs": True, "top_logprobs": 20}
IN_FLIGHT = b'hayai_requests_in_flight{endpoint="/v1/chat/completions"} '


def post(url: str, path: str, body: dict[str, Any], buffer: int | None = None) -> socket.socket:
    """An open request; buffer: bytes that its socket takes while nobody reads."""
    host, port = url.removeprefix("http://").split(":")
    raw = socket.socket()
    if buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.settimeout(30)
    raw.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    raw.sendall(head.encode() + b"\r\n\r\n" + data)
    return raw


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def read_to_end(raw: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"0\r\n\r\n"):
        part = raw.recv(65536)
        if not part:
            break
        text += part
    return text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_silent_stream_says_that_it_lives(
    inner_server: StartServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Pings come before the first token and between tokens, and change nothing of the events."""
    monkeypatch.setattr(generate, "PING_SECONDS", 0.1)
    server = inner_server()
    runner = server.frontend.service.engine.runner
    whole = runner.step

    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(0.35)
        return whole(*args, **more)

    runner.step = slow  # type: ignore[method-assign]
    body: dict[str, Any] = {"stream": True, "temperature": 0}
    body |= {
        "/v1/completions": {"prompt": "x", "max_tokens": 3},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
        "/v1/responses": {"input": "x", "max_output_tokens": 3},
    }[path]
    with post(server.url, path, body) as raw:
        slow_text = read_to_end(raw)
    runner.step = whole  # type: ignore[method-assign]
    with post(server.url, path, body) as raw:
        fast_text = read_to_end(raw)
    assert slow_text.count(b": ping\n\n") >= 3 and b": ping" not in fast_text
    assert slow_text.index(b": ping\n\n") < slow_text.rindex(b"data: ")

    def texts(raw_text: bytes) -> list[Any]:
        events = [line[6:] for line in raw_text.split(b"\n") if line.startswith(b"data: {")]
        found = [json.loads(event) for event in events]
        shown = [[c.get("text", c.get("delta")) for c in e.get("choices", ())] for e in found]
        return [*shown, *(e.get("delta") for e in found)]

    assert texts(slow_text) == texts(fast_text)


def test_a_failure_after_a_ping_is_an_event(
    inner_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PING_SECONDS", 0.05)
    server = inner_server()

    def broken(*args: Any, **more: Any) -> Any:
        time.sleep(0.3)
        raise MemoryError("out of memory in a step")

    server.frontend.service.engine.runner.step = broken  # type: ignore[method-assign]
    body = {"input": "x", "stream": True}
    with post(server.url, "/v1/responses", body) as raw:
        text = read_to_end(raw)
    assert text.startswith(b"HTTP/1.1 200") and b": ping" in text
    assert b"event: response.failed" in text and b"out of memory in a step" in text


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_stops_is_let_go(
    inner_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    stream: bool,
) -> None:
    """It keeps neither KV blocks nor a place in the queue, and its connection ends."""
    monkeypatch.setattr(generate, "PING_SECONDS", 0.1)
    monkeypatch.setattr(generate, "STALL_SECONDS", 0.5)
    server = inner_server(send_buffer=BUFFER)
    engine = server.frontend.service.engine
    with post(server.url, CHAT, LONG | {"stream": stream}, BUFFER) as raw:
        assert wait_until(lambda: engine.stats().running == 1)
        assert wait_until(lambda: not engine.has_work)
        assert engine.stats().kv_blocks_used == 0
        assert wait_until(lambda: IN_FLIGHT + b"0" in metrics(server))
        time.sleep(1.2)
        text = b""
        with contextlib.suppress(ConnectionResetError):
            while part := raw.recv(65536):
                text += part
    assert len(text) > 1000 and not text.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"}"))
    assert not stream or b'status="cancelled"' in metrics(server)
    assert capfd.readouterr().err == ""


def metrics(server: InnerServer) -> bytes:
    return httpx.get(f"{server.url}/metrics", timeout=20).content


def test_slow_readers_cost_bounded_memory_and_nobody_else_time(inner_server: StartServer) -> None:
    """Four clients that read nothing: what waits for them is bounded by their answers, others go on."""
    server = inner_server(send_buffer=BUFFER)
    engine = server.frontend.service.engine
    with httpx.Client(base_url=server.url, timeout=60) as http:
        quick = {"prompt": "x", "max_tokens": 4}
        assert http.post("/v1/completions", json=quick).status_code == 200
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        readers = [post(server.url, CHAT, LONG | {"seed": i, "max_tokens": 60}, BUFFER) for i in range(4)]
        try:
            assert wait_until(lambda: engine.stats().running == 4)
            assert http.post("/v1/completions", json=quick).status_code == 200
            assert wait_until(lambda: not engine.has_work, 60.0)
            held = tracemalloc.get_traced_memory()[0] - before
            assert engine.stats().kv_blocks_used == 0 and held < 4 * 60 * 16_384
            whole = [read_to_end(raw) for raw in readers]  # and nothing of it is lost
        finally:
            tracemalloc.stop()
            for raw in readers:
                raw.close()
    assert all(text.count(b'"finish_reason":"length"') == 1 for text in whole)
    assert all(text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for text in whole)

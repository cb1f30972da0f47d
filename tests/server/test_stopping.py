"""Work stops when nobody wants it any more: clients that leave, a full server, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from hayai.config import EngineConfig, ServerConfig
from hayai.errors import ConfigError
from hayai.frontend import Frontend
from hayai.load import load_model
from hayai.server import generate
from hayai.server.app import create_app
from hayai.server.request_log import RequestLog
from hayai.server.run import bind, is_loopback, make_server
from server_process import InnerServer, start_server

LONG = {"prompt": [1, 2, 3], "max_tokens": 500, "ignore_eos": True, "temperature": 0}
StartServer = Callable[..., InnerServer]


def request_bytes(**more: object) -> bytes:
    body = json.dumps({**LONG, **more}).encode()
    head = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("options", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_stops_the_work(inner_server: StartServer, options: dict[str, object]) -> None:
    server = inner_server()
    engine = server.frontend.service.engine
    raw = connect(server.url)
    raw.sendall(request_bytes(**options))
    if options["stream"]:
        raw.recv(1)
    count = options.get("n", 1)
    assert wait_until(lambda: engine.stats().running == count and engine.stats().output_tokens > 5)
    raw.close()
    assert wait_until(lambda: not engine.has_work, 1.0)
    stats = engine.stats()
    assert stats.finished == {"abort": count} and stats.kv_blocks_used == 0
    assert stats.output_tokens < count * 500
    time.sleep(0.1)
    assert engine.stats().num_steps == stats.num_steps
    assert httpx.get(f"{server.url}/ready").status_code == 200


@pytest.mark.parametrize("ahead", [b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"G", b"GET /health"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_pipelines_and_leaves_stops_the_work(
    inner_server: StartServer, ahead: bytes, together: bool, reset: bool
) -> None:
    """Requests sent ahead must not hide that nobody reads the answer any more."""
    server = inner_server()
    engine = server.frontend.service.engine
    raw = connect(server.url)
    raw.sendall(request_bytes(stream=True) + (ahead if together else b""))
    raw.recv(1)
    if not together:
        raw.sendall(ahead)
    assert wait_until(lambda: engine.stats().output_tokens > 5)
    if reset:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
    assert wait_until(lambda: not engine.has_work, 1.0)
    assert engine.stats().finished == {"abort": 1}
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_requests_sent_ahead_are_answered_in_order_and_bounded(inner_server: StartServer) -> None:
    server = inner_server()
    engine = server.frontend.service.engine
    health = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with connect(server.url) as raw:
        raw.sendall(request_bytes(stream=True, max_tokens=20))
        text = raw.recv(1)
        raw.sendall(health)
        time.sleep(0.01)
        raw.sendall(health.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        while part := raw.recv(65536):
            text += part
    stream, _, rest = text.partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert stream.startswith(b"HTTP/1.1 200") and rest.count(b"HTTP/1.1 200 OK") == 2
    with connect(server.url) as raw, contextlib.suppress(OSError):
        raw.sendall(request_bytes(stream=True))
        raw.recv(1)
        raw.sendall(health * 10_000)
        while raw.recv(65536):
            pass
    assert wait_until(lambda: not engine.has_work, 1.0)
    assert engine.stats().finished == {"length": 1, "abort": 1}


def test_a_client_that_leaves_inside_its_body(inner_server: StartServer) -> None:
    server = inner_server()
    raw = connect(server.url)
    raw.sendall(request_bytes()[:-5])
    raw.close()
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=20).status_code == 200
    assert server.frontend.service.engine.stats().finished == {"length": 1}


def test_a_full_server_says_so(inner_server: StartServer) -> None:
    server = inner_server(max_waiting=0)
    engine = server.frontend.service.engine
    with connect(server.url) as raw:
        raw.sendall(request_bytes(n=16, stream=True))
        assert raw.recv(12) == b"HTTP/1.1 200"
        reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=20)
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "overloaded"
    assert wait_until(lambda: not engine.has_work, 1.0)
    assert wait_until(
        lambda: httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 200
    )


def test_many_choices_take_turns_with_what_others_ask(inner_server: StartServer) -> None:
    """Of 48 choices 16 run at a time; who comes then waits for one of them, not for all."""
    server = inner_server()
    engine = server.frontend.service.engine
    with connect(server.url) as raw:
        raw.sendall(request_bytes(n=48, stream=True, max_tokens=60))
        assert raw.recv(12) == b"HTTP/1.1 200"
        assert wait_until(lambda: engine.stats().running == 16)
        assert engine.stats().waiting == 0
        body = {"prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert sum(engine.stats().finished.values()) < 40
        text = b""
        while b"[DONE]" not in text:
            text += raw.recv(65536)
    assert text.count(b'"finish_reason":"length"') == 48


def test_ctrl_c_ends_a_stream_with_an_error_and_the_server_with_zero(chat_model: Path) -> None:
    server = start_server(chat_model)
    with connect(server.url) as raw, connect(server.url) as waiting:
        raw.sendall(request_bytes(stream=True))
        waiting.sendall(request_bytes(stream=False, max_tokens=400))
        text = raw.recv(4096)
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        while part := raw.recv(65536):
            text += part
        answer = b""
        while part := waiting.recv(65536):
            answer += part
    assert b'"code":"shutting_down"' in text and b"[DONE]" not in text
    assert answer.startswith(b"HTTP/1.1 503") and b'"code":"shutting_down"' in answer
    _, errors = server.process.communicate(timeout=20)
    assert (server.process.returncode, errors) == (0, "stopped\n")
    assert time.monotonic() - began < 3.0


def test_an_engine_that_breaks_fails_its_requests_and_serves_the_next(
    inner_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash ends what ran and nothing else; one crash after the other ends the service, which says so."""
    server = inner_server()
    runner = server.frontend.service.engine.runner
    whole = runner.step

    def broken(*args: object, **more: object) -> None:
        raise MemoryError("out of memory in a step")

    def ask() -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=20)

    with connect(server.url) as raw:
        raw.sendall(request_bytes(stream=True))
        text = raw.recv(4096)
        runner.step = broken  # type: ignore[method-assign]
        while b"0\r\n\r\n" not in text:
            text += raw.recv(65536)
    assert b'"code":"engine_unavailable"' in text and b"out of memory in a step" in text
    runner.step = whole  # type: ignore[method-assign]
    assert httpx.get(f"{server.url}/ready").status_code == 200 and ask().status_code == 200
    runner.step = broken  # type: ignore[method-assign]
    for _ in range(2):
        reply = ask()
        assert reply.status_code == 503 and "out of memory" in reply.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert ask().status_code == 503
    assert "failed" in caplog.text


def test_binding_to_the_network_has_to_be_meant() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="--allow-remote"):
            bind(ServerConfig(host=host, port=0))
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"):
        assert is_loopback(host)
    with bind(ServerConfig(host="0.0.0.0", port=0), allow_remote=True) as sock:
        assert sock.getsockname()[1] > 0


def test_a_port_in_use_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}"):
            bind(ServerConfig(port=port))


def test_slow_readers_hold_nobody_up(inner_server: StartServer) -> None:
    """A client that does not read must not keep another from its answer."""
    server = inner_server()
    with connect(server.url) as slow:
        slow.sendall(request_bytes(stream=True, logprobs=20))
        body = {"prompt": "x", "max_tokens": 4}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
        assert reply.json()["usage"]["completion_tokens"] == 4


def test_a_reader_that_stops_is_let_go_also_where_requests_are_logged(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log takes the direct way to the socket from a stream, and nothing else."""
    monkeypatch.setattr(generate, "PING_SECONDS", 0.1)
    monkeypatch.setattr(generate, "STALL_SECONDS", 0.5)
    frontend = Frontend(load_model(EngineConfig(model=str(chat_model), backend="reference")))
    config = ServerConfig(port=0)
    app = create_app(frontend, config)
    log = tmp_path / "requests.jsonl"
    app.add_middleware(RequestLog, path=log)
    sock = bind(config)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ready = threading.Event()
    server = make_server(app, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        assert ready.wait(20)
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.settimeout(20)
            raw.connect(sock.getsockname())
            raw.sendall(request_bytes(stream=True, logprobs=20))
            engine = frontend.service.engine
            assert wait_until(lambda: engine.stats().running == 1)
            assert wait_until(lambda: not engine.has_work, 20.0)
            assert wait_until(lambda: not server.server_state.connections), "it waits for ever"
        assert wait_until(lambda: log.read_bytes().endswith(b"\n"))
    finally:
        server.stop()
        thread.join(20)
        sock.close()
    assert not thread.is_alive() and json.loads(log.read_bytes())["status"] == 200

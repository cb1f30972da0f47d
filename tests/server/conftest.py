"""A real server process for the whole folder, and servers inside this process where a test looks within."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from chat_model import write_chat_model
from hayai.config import EngineConfig, ServerConfig
from hayai.frontend import Frontend
from hayai.load import load_model
from hayai.server.app import create_app
from hayai.server.run import bind, make_server, url_of
from server_process import InnerServer, ServerProcess, start_server


@pytest.fixture(scope="session")
def chat_model(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(default_model, tmp_path_factory.mktemp("models") / "tiny-chat.gguf")


@pytest.fixture(scope="session")
def server(chat_model: Path) -> Iterator[ServerProcess]:
    """One server for all tests; it has to end cleanly and without a word of warning."""
    running = start_server(chat_model)
    try:
        yield running
        code, errors = running.interrupt()
    finally:
        running.process.kill()
        running.process.wait()
    assert (code, errors) == (0, "stopped\n")


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as raw:
        yield raw


@pytest.fixture
def inner_server(chat_model: Path) -> Iterator[Callable[..., InnerServer]]:
    """Call it with ServerConfig fields, and with a model where it is not the tiny one. send_buffer: bytes
    that the kernel holds of what a client does not read."""
    stops: list[Callable[[], None]] = []

    def start(model: Path = chat_model, send_buffer: int | None = None, **options: int) -> InnerServer:
        frontend = Frontend(load_model(EngineConfig(model=str(model), backend="reference")))
        config = ServerConfig(port=0, **options)
        sock = bind(config)
        if send_buffer is not None:  # accepted connections inherit it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        ready = threading.Event()
        server = make_server(create_app(frontend, config), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()

        def stop() -> None:
            server.stop()
            thread.join(20)
            sock.close()
            assert not thread.is_alive()

        stops.append(stop)
        assert ready.wait(20)
        return InnerServer(frontend, url_of(sock))

    yield start
    for stop in stops:
        stop()

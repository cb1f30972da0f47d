"""How a server starts and ends: configuration file, TLS, draining, an engine that fails for good."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hayai.config import ServerConfig
from hayai.errors import ConfigError
from hayai.server.storage import Database
from hayai.server.tls import Certificate, certificate_of
from hayai_process import COMMAND
from server_process import ServerProcess, start_server

LONG: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 300, "ignore_eos": True}
SHORT: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 2}


def make_certificate(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make a certificate with")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return cert, key


# ---------------------------------------------------------------- configuration


def test_a_file_flags_and_the_environment(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is printed with its source; aliases and limits work; no secret is shown."""
    file = tmp_path / "hayai.toml"
    file.write_text(
        '[server]\nport = 1\nmax_body_bytes = 2000\n[engine]\nmodel = "nowhere.gguf"\nmax_sequences = 3\n'
        '[limits]\nmax_choices = 4\n[aliases]\n"gpt-4o" = "default"\n'
    )
    monkeypatch.setenv("HAYAI_THREADS", "1")
    server = start_server(chat_model, "--config", str(file), "--alias", "claude=default")
    rows = dict(re.findall(r"^(\S+)  +(.+)$", server.head, re.MULTILINE))
    assert rows["server.port"] == "0  (--port)" and rows["engine.model"] == f"{chat_model}  (--model)"
    assert rows["engine.max_sequences"] == f"3  ({file})" and rows["max_sequences"] == "3"
    assert rows["engine.threads"] == "1  (HAYAI_THREADS)" and rows["server.host"] == "127.0.0.1  (default)"
    assert rows["aliases"] == f"gpt-4o = default, claude = default  ({file}, --alias)"
    assert rows["keys"] == "not required: any key is accepted"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        assert {"gpt-4o", "claude"} <= {model.id for model in client.models.list()}
        for name in ("gpt-4o", "claude"):
            assert client.completions.create(model=name, prompt="x", max_tokens=1).model == name
        with pytest.raises(openai.NotFoundError, match="gpt-4o"):
            client.completions.create(model="gpt-5", prompt="x", max_tokens=1)
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="gpt-4o", prompt="x" * 3000)
        assert caught.value.status_code == 413
    assert server.interrupt() == (0, "stopped\n")


def test_what_is_wrong_with_a_file_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "hayai.toml"
    file.write_text("[server]\nprot = 1\n")
    done = subprocess.run([*COMMAND, "serve", "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {file}: unknown key prot in [server]; did you mean port?\n"


# ---------------------------------------------------------------- TLS


def test_tls(chat_model: Path, tmp_path: Path) -> None:
    """The official client over TLS, streamed and not; the protocol's limits hold there too."""
    cert, key = make_certificate(tmp_path)
    server = start_server(chat_model, "--tls-cert", str(cert), "--tls-key", str(key))
    assert server.url.startswith("https://")
    trust = ssl.create_default_context(cafile=str(cert))
    base_url = f"{server.url}/v1"
    with (
        httpx.Client(verify=trust, timeout=30) as http,
        openai.OpenAI(base_url=base_url, api_key="x", http_client=http, max_retries=0) as client,
    ):
        options: dict[str, Any] = {"model": "default", "prompt": [1, 2, 3], "max_tokens": 20, "seed": 1}
        whole = client.completions.create(**options)
        parts = client.completions.create(**options, stream=True)
        assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
        reply = http.get(f"{server.url}/health", headers={"x-long": "x" * 200_000})
        assert reply.status_code == 431
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/health")
    with pytest.raises(httpx.HTTPError):
        httpx.get(server.url.replace("https", "http") + "/health")
    with httpx.Client(verify=trust) as http:
        assert http.get(f"{server.url}/health").status_code == 200
    assert server.interrupt() == (0, "stopped\n")


def test_a_renewed_certificate_is_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = make_certificate(tmp_path)
    certificate = Certificate(cert, key)

    def served() -> str:
        """The common name that a new connection sees."""
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                connection, _ = listener.accept()
                certificate.context.wrap_socket(connection, server_side=True).close()

            thread = threading.Thread(target=answer)
            thread.start()
            trust = ssl.create_default_context(cafile=str(cert))
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as raw,
                trust.wrap_socket(raw, server_hostname="127.0.0.1") as wrapped,
            ):
                found: Any = wrapped.getpeercert()
            thread.join()
            return str(dict(pair[0] for pair in found["subject"])["commonName"])

    assert served() == "server"
    new_cert, new_key = make_certificate(tmp_path, "renewed")
    shutil.copy(new_cert, cert)
    certificate.refresh()  # the key is not there yet: the old pair stays
    assert "not renewed" in caplog.text
    shutil.copy(new_key, key)
    certificate.refresh()
    assert served() == "renewed"


def test_files_that_are_no_certificate(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    other, other_key = make_certificate(tmp_path, "other")
    junk = tmp_path / "junk"
    junk.write_bytes(b"\0junk")
    for bad in ((cert, other_key), (junk, key), (cert, junk), (tmp_path / "none", key), (cert, tmp_path)):
        with pytest.raises(ConfigError):
            certificate_of(ServerConfig(tls_cert=bad[0], tls_key=bad[1]))
    assert certificate_of(ServerConfig()) is None
    assert certificate_of(ServerConfig(tls_cert=other, tls_key=other_key)) is not None


# ---------------------------------------------------------------- several tenants


def test_a_tenant_that_fills_the_server_leaves_others_a_way_in(chat_model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "hayai.db")
    with Database(path) as database:
        much, little = (database.create_key(tenant)[0] for tenant in ("much", "little"))
    server = start_server(chat_model, "--database", path, "--max-waiting", "0")

    def ask(key: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{server.url}/v1/completions", json=SHORT | more, headers=headers, timeout=30)

    stream = Stream(server, {"authorization": f"Bearer {much}"}, n=16)
    reply = ask(much)
    assert reply.status_code == 429 and reply.json()["error"]["code"] == "overloaded"
    assert ask(little).status_code == 200
    assert server.interrupt() == (0, "stopped\n")
    assert "[DONE]" not in stream.end()


# ---------------------------------------------------------------- the end


@pytest.fixture
def slow(chat_model: Path) -> Iterator[list[ServerProcess]]:
    """A place for the servers of a test, which are killed where it fails."""
    started: list[ServerProcess] = []
    yield started
    for server in started:
        server.process.kill()
        server.process.communicate()


class Stream:
    """A completion that is being read on a thread of its own."""

    def __init__(self, server: ServerProcess, headers: dict[str, str] | None = None, **more: Any) -> None:
        self.text = ""
        self._url = f"{server.url}/v1/completions"
        self._headers = headers
        self._body = {**LONG, "stream": True, **more}
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._begun.wait(20)

    def _read(self) -> None:
        cut = contextlib.suppress(httpx.RemoteProtocolError)  # by a server that did not wait
        request: dict[str, Any] = {"json": self._body, "headers": self._headers, "timeout": 30}
        with cut, httpx.stream("POST", self._url, **request) as reply:
            for text in reply.iter_text():
                self.text += text
                self._begun.set()

    def end(self) -> str:
        self._thread.join(30)
        return self.text


def test_sigterm_lets_what_runs_end(chat_model: Path, slow: list[ServerProcess]) -> None:
    server = start_server(chat_model)
    slow.append(server)
    streams = [Stream(server, n=2), Stream(server)]
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 10
    while (ready := httpx.get(f"{server.url}/ready", timeout=5)).status_code == 200:
        assert time.monotonic() < end
    assert ready.status_code == 503 and httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    reply = httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=5)
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "shutting_down"
    for stream in streams:
        text = stream.end()
        assert text.endswith("data: [DONE]\n\n") and "shutting_down" not in text
    _, errors = server.process.communicate(timeout=20)
    assert (server.process.returncode, errors) == (0, "stopped\n")


def test_draining_has_an_end(chat_model: Path, slow: list[ServerProcess]) -> None:
    server = start_server(chat_model, "--drain-seconds", "0.2")
    slow.append(server)
    stream = Stream(server, n=8)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    text = stream.end()
    assert '"code":"shutting_down"' in text and "[DONE]" not in text
    _, errors = server.process.communicate(timeout=20)
    assert (server.process.returncode, errors) == (0, "stopped\n") and time.monotonic() - began < 4


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(
    chat_model: Path, slow: list[ServerProcess], second: signal.Signals
) -> None:
    server = start_server(chat_model)
    slow.append(server)
    stream = Stream(server, n=8)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    server.process.send_signal(second)
    assert "[DONE]" not in stream.end()
    server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and time.monotonic() - began < 4


BROKEN = """
import sys
from hayai.backends import reference
from hayai.cli.main import main

class Broken(Exception):
    pass

def load_then_break(*args, _real=reference.ReferenceRunner.step, **more):
    if flag.exists():
        raise Broken("no step works any more")
    return _real(*args, **more)

import pathlib
flag = pathlib.Path(sys.argv[1])
reference.ReferenceRunner.step = load_then_break
main(sys.argv[2:])
"""


def test_an_engine_that_fails_for_good_ends_the_process_with_the_reason(
    chat_model: Path, tmp_path: Path, slow: list[ServerProcess]
) -> None:
    """It is never half alive: requests get an error, and a supervisor sees an exit code."""
    flag = tmp_path / "broken"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            BROKEN,
            str(flag),
            "serve",
            "--port=0",
            f"--model={chat_model}",
            "--backend=reference",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = ""
    while not url:
        found = re.search(r"listening on (\S+)", process.stdout.readline())
        url = found[1] if found else ""
    slow.append(ServerProcess(process, url, ""))
    assert httpx.post(f"{url}/v1/completions", json=SHORT, timeout=20).status_code == 200
    flag.touch()
    end = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < end
        try:
            reply = httpx.post(f"{url}/v1/completions", json=SHORT, timeout=20)
        except httpx.HTTPError:
            continue  # it has stopped, or is about to
        assert reply.status_code >= 500 and json.loads(reply.text)["error"]["code"]
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: the engine failed, so the server stopped: ")
    assert "no step works any more" in last

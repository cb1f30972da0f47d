"""Keys, quotas and the ledger of a real server process, through the clients that people use."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from hayai.server.storage import Database
from hayai_process import COMMAND
from server_process import ServerProcess, start_server

HELLO: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hayai.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with Database(str(path)) as opened:
        yield opened


@pytest.fixture
def start(chat_model: Path, path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Call it with options: a server with the test's database. At the end each has to stop cleanly, and to
    have said nothing, unless the test has killed it."""
    servers: list[ServerProcess] = []

    def call(*options: str) -> ServerProcess:
        servers.append(start_server(chat_model, "--database", str(path), *options))
        return servers[-1]

    yield call
    for server in servers:
        if server.process.poll() is None:
            assert server.interrupt() == (0, "stopped\n")


def client_of(server: ServerProcess, key: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **more)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("SELECT * FROM requests ORDER BY started")]
    connection.close()
    return rows


def wait_for_rows(path: Path, count: int, status: str) -> list[dict[str, Any]]:
    end = time.monotonic() + 10
    while len(found := [row for row in rows_of(path) if row["status"] == status]) < count:
        assert time.monotonic() < end, rows_of(path)
        time.sleep(0.02)
    return found


def test_keys_usage_and_rows(start: Callable[..., ServerProcess], database: Database, path: Path) -> None:
    """What the client was told is what is on record, streamed or not, in every dialect."""
    key, record = database.create_key("acme")
    stranger, _ = database.create_key("stranger")
    server = start()
    assert "keys" in server.head and "required" in server.head
    expected = []
    with client_of(server, key) as client:
        for stream in (False, True):
            if not stream:
                reply = client.chat.completions.create(model="default", messages=HELLO, max_tokens=5)
                usage = reply.usage
            else:
                options: Any = {"stream": True, "stream_options": {"include_usage": True}}
                chunks = client.chat.completions.create(
                    model="default", messages=HELLO, max_tokens=6, **options
                )
                usage = [chunk.usage for chunk in chunks][-1]
            assert usage is not None
            expected.append((usage.prompt_tokens, usage.completion_tokens))
            assert len(rows_of(path)) == len(expected)  # on record before the client had the end
        many = client.completions.create(model="default", prompt=["a", "b"], n=2, max_tokens=3)
        assert many.usage is not None
        expected.append((many.usage.prompt_tokens, many.usage.completion_tokens))
    with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as claude:
        message = claude.messages.create(model="default", messages=HELLO, max_tokens=4)
        used = message.usage
        expected.append((used.input_tokens + (used.cache_read_input_tokens or 0), used.output_tokens))
    azure = openai.AzureOpenAI(
        azure_endpoint=server.url, api_key=key, api_version="2024-10-21", max_retries=0
    )
    with azure:
        reply = azure.chat.completions.create(model="default", messages=HELLO, max_tokens=2)
        assert reply.usage is not None
        expected.append((reply.usage.prompt_tokens, reply.usage.completion_tokens))
    rows = wait_for_rows(path, len(expected), "ok")
    assert [(r["prompt_tokens"], r["completion_tokens"]) for r in rows] == expected
    assert {(r["tenant"], r["key_id"], r["status"]) for r in rows} == {("acme", record.key_id, "ok")}
    assert all(0 < r["first_token_ms"] <= r["duration_ms"] + 50 for r in rows)
    sums = [sum(column) for column in zip(*expected, strict=True)]
    usage_url = f"{server.url}/v1/usage"
    mine = httpx.get(usage_url, headers={"authorization": f"Bearer {key}"}).json()
    (model,) = mine["data"]
    assert [model["prompt_tokens"], model["completion_tokens"]] == sums
    assert mine["tenant"] == "acme" and mine["month"]["tokens"] == sum(sums)
    theirs = httpx.get(usage_url, headers={"x-api-key": stranger}).json()
    assert (theirs["tenant"], theirs["data"]) == ("stranger", [])
    assert httpx.get(usage_url).status_code == 401
    assert (
        httpx.get(usage_url + "?since=x", headers={"x-api-key": key}).json()["error"]["code"]
        == "invalid_value"
    )
    assert httpx.get(usage_url + "?tenant=x", headers={"x-api-key": key}).status_code == 400


def test_who_has_no_key_gets_nothing(
    start: Callable[..., ServerProcess], database: Database, path: Path
) -> None:
    key, record = database.create_key("acme", "", {"models": frozenset({"gpt-4o"})})
    server = start("--alias", "gpt-4o=default", "--alias", "other=default")
    for bad in ("none", "hk-", key[:-1] + "!", "x" * 5000):
        with client_of(server, bad) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key" and key not in str(caught.value)
    for method, route in (
        ("GET", "/v1/models"), ("GET", "/v1/models/default"), ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"), ("POST", "/v1/messages"), ("GET", "/v1/usage"),
        ("GET", "/v1/files"), ("GET", "/v1/batches"),
        ("POST", "/openai/deployments/default/chat/completions?api-version=2024-10-21"),
    ):  # fmt: skip
        reply = httpx.request(method, server.url + route, json={} if method == "POST" else None)
        assert reply.status_code == 401, (route, reply.text)
        assert reply.headers["www-authenticate"] == "Bearer"
    for route in ("/health", "/ready"):
        assert httpx.get(server.url + route).status_code == 200
    with client_of(server, key) as client:
        assert client.chat.completions.create(model="gpt-4o", messages=HELLO, max_tokens=2).model == "gpt-4o"
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model="other", messages=HELLO, max_tokens=2)
        done = subprocess.run(
            [*COMMAND, "keys", "revoke", record.key_id, "--database", str(path)], check=False
        )
        assert done.returncode == 0
        began = time.monotonic()
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            while time.monotonic() < began + 5:
                client.models.list()
                time.sleep(0.02)
        assert time.monotonic() - began < 2.0


def test_limits_are_told_as_clients_read_them(
    start: Callable[..., ServerProcess], database: Database
) -> None:
    limits = {"requests_per_minute": 3, "tokens_per_minute": 2000}
    key, _ = database.create_key("acme", "", limits)
    poor, _ = database.create_key("poor", "", {"token_budget": 60})
    server = start()
    with client_of(server, key) as client:
        raw = client.chat.completions.with_raw_response.create(model="default", messages=HELLO, max_tokens=3)
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-remaining-requests"] == "2"
        assert 1900 < int(raw.headers["x-ratelimit-remaining-tokens"]) < 2000
        for _ in range(2):
            client.chat.completions.create(model="default", messages=HELLO, max_tokens=3)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="default", messages=HELLO, max_tokens=3)
        assert caught.value.code == "rate_limit_exceeded"
        assert 10 <= int(caught.value.response.headers["retry-after"]) <= 20
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=poor, max_retries=5) as client:
        client.chat.completions.create(model="default", messages=HELLO, max_tokens=3)
        began = time.monotonic()
        with pytest.raises(openai.RateLimitError) as caught:  # and the client doesn't try again in vain
            client.chat.completions.create(model="default", messages=HELLO, max_tokens=60)
        assert caught.value.code == "insufficient_quota" and time.monotonic() - began < 2.0


def test_parallel_requests_of_a_tenant(start: Callable[..., ServerProcess], database: Database) -> None:
    key, _ = database.create_key("acme", "", {"max_parallel": 8})
    free, _ = database.create_key("free")
    server = start()
    long: dict[str, Any] = {
        "prompt": [1, 2, 3],
        "max_tokens": 500,
        "ignore_eos": True,
        "stream": True,
        "n": 8,
    }
    short: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 2}
    headers = {"authorization": f"Bearer {key}"}
    url = f"{server.url}/v1/completions"
    with httpx.Client(timeout=20) as http:
        with http.stream("POST", url, json=long, headers=headers) as running:
            lines = running.iter_lines()  # kept: dropping it would close the connection
            next(lines)
            refused = http.post(url, json=short, headers=headers)
            assert refused.json()["error"]["code"] == "too_many_parallel_requests"
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert http.post(url, json=short, headers={"api-key": free}).status_code == 200
        end = time.monotonic() + 5  # a client that left gives its places back
        while (last := http.post(url, json=short, headers=headers)).is_error:
            assert time.monotonic() < end, last.text


def test_who_leaves_pays_for_what_came(
    start: Callable[..., ServerProcess], database: Database, path: Path
) -> None:
    key, _ = database.create_key("acme")
    server = start()
    body = {"prompt": [1, 2, 3], "max_tokens": 450, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(timeout=20) as http,
        http.stream("POST", f"{server.url}/v1/completions", json=body, headers={"x-api-key": key}) as reply,
    ):
        events = 0
        for line in reply.iter_lines():
            events += line.startswith("data:")
            if events == 10:
                break
    (row,) = wait_for_rows(path, 1, "cancelled")
    assert row["prompt_tokens"] == 3 and 10 <= row["completion_tokens"] < 450


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"authorization: Bearer hk-\0\r\n", (400,)),
        (b"x-api-key: \xff\xfe\xc3\xa9\r\n", (401,)),
        (b"x-api-key: " + "日本".encode() + b"\r\n", (401,)),
        (b"x-api-key: ' OR 1=1; DROP TABLE keys; --\r\n", (401,)),
        (b"x-api-key: " + b"x" * 1_000_000 + b"\r\n", (431, 400)),
        (b"x-api-key: a\r\n" * 3000, (401, 431)),
        (b"authorization: Bearer \r\nx-api-key:\r\n", (401,)),
    ],
)
def test_hostile_headers(keyed: ServerProcess, head: bytes, status: tuple[int, ...]) -> None:
    host, port = keyed.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            raw.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n")
        assert int(raw.recv(65536).split()[1]) in status
    assert httpx.get(f"{keyed.url}/health").status_code == 200


@pytest.fixture(scope="module")
def keyed(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that asks for keys, for tests that only knock."""
    path = tmp_path_factory.mktemp("keyed") / "x.db"
    running = start_server(chat_model, "--database", str(path), "--require-keys")
    yield running
    assert running.interrupt() == (0, "stopped\n")


def test_the_network_is_open_to_keys_only(
    chat_model: Path, path: Path, tmp_path: Path, database: Database
) -> None:
    command = [*COMMAND, "serve", "--host", "0.0.0.0", "--port", "0", "-m", str(tmp_path / "none.gguf")]
    refused = subprocess.run([*command, "--database", str(path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "asks for no keys" in refused.stderr
    database.create_key("acme")
    keyed = subprocess.run([*command, "--database", str(path)], capture_output=True, text=True, check=False)
    assert keyed.returncode == 1 and "none.gguf" in keyed.stderr  # it came as far as loading the model
    server = start_server(chat_model, "--host", "0.0.0.0", "--database", str(path))
    port = server.url.rpartition(":")[2]
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    code, errors = server.interrupt()
    assert code == 0 and errors.startswith("warning: 0.0.0.0 is served without TLS")


def test_requests_are_logged_when_asked_and_only_then(
    start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    secret = "xyzzy-plugh"
    log = tmp_path / "logs" / "requests.jsonl"
    bodies: list[dict[str, Any]] = [
        {"prompt": secret, "max_tokens": 3}, {"prompt": secret, "max_tokens": 3, "stream": True},
        {"prompt": secret, "max_tokens": -1},
    ]  # fmt: skip
    quiet = start()
    for body in bodies:
        httpx.post(f"{quiet.url}/v1/completions", json=body)
    assert quiet.interrupt() == (0, "stopped\n")
    assert not any(secret.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    server = start("--log-requests", str(log))
    replies = [httpx.post(f"{server.url}/v1/completions", json=body) for body in bodies]
    httpx.get(f"{server.url}/v1/models")
    assert server.interrupt() == (0, "stopped\n")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["status"], line["request"]) for line in lines] == [
        (reply.status_code, body) for reply, body in zip(replies, bodies, strict=True)
    ]
    assert lines[0]["response"] == replies[0].json() and lines[1]["response"] == replies[1].text
    assert lines[0]["request_id"] == replies[0].headers["x-request-id"] and lines[2]["status"] == 400
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_kill_9_in_the_middle_of_load(
    start: Callable[..., ServerProcess], database: Database, path: Path
) -> None:
    """Whatever a client got completely is on record with its tokens; nothing counts twice or stays open."""
    key, _ = database.create_key("acme")
    got: dict[str, tuple[int, int]] = {}
    lock = threading.Lock()
    unheard = 0

    def client(server: ServerProcess, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=20) as http:
            while True:
                stream = rng.random() < 0.5
                body: dict[str, Any] = {
                    "prompt": [1] * rng.randrange(1, 9),
                    "max_tokens": rng.randrange(1, 20),
                }
                body |= {"stream": stream, "ignore_eos": True}
                if stream:
                    body["stream_options"] = {"include_usage": True}
                try:
                    reply = http.post("/v1/completions", json=body)
                    if stream:
                        events = reply.text.split("\n\n")
                        assert events[-2] == "data: [DONE]"
                        last = json.loads(events[-3].removeprefix("data: "))
                    else:
                        last = reply.json()
                except httpx.HTTPError:
                    return
                usage = last["usage"]
                with lock:
                    got[reply.headers["x-request-id"]] = (usage["prompt_tokens"], usage["completion_tokens"])

    for turn in range(3):
        server = start()
        threads = [threading.Thread(target=client, args=(server, 10 * turn + i)) for i in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.8)
        server.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        server.process.communicate()
        unheard += len(threads)
    final = start()
    rows = {row["request_id"]: row for row in rows_of(path)}
    assert len(got) > 15
    for request_id, tokens in got.items():
        row = rows[request_id]
        assert (row["prompt_tokens"], row["completion_tokens"], row["status"]) == (*tokens, "ok")
    ended = [row for row in rows.values() if row["status"] == "ok"]
    # an answer may have been on its way when the process died: one per client at most
    assert len(got) <= len(ended) <= len(got) + unheard
    assert {row["status"] for row in rows.values()} <= {"ok", "lost"}
    usage = httpx.get(f"{final.url}/v1/usage", headers={"x-api-key": key}).json()
    assert usage["month"]["tokens"] == sum(r["prompt_tokens"] + r["completion_tokens"] for r in ended)

"""Stored responses: whose they are, how long they stay, how many there may be, what they outlive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from hayai.server.responses_store import KEEP_SECONDS, TIDY_EVERY, ResponseStore, StoredResponse
from hayai.server.storage import Database
from server_process import InnerServer, start_server


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(str(tmp_path / "state.db")) as opened:
        yield opened


def response(number: int, previous: str | None = None, size: int = 10) -> StoredResponse:
    body = {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": "x" * size}]}
    return StoredResponse(f"resp_{number}", body, [{"id": f"in_{number}"}], previous)


def test_a_tenant_sees_its_own_and_nothing_else(database: Database) -> None:
    store = ResponseStore(database)
    store.put("a", response(1))
    assert store.get("a", "resp_1") == response(1)
    assert store.get("b", "resp_1") is None and store.chain("b", "resp_1") is None
    assert not store.delete("b", "resp_1") and store.get("a", "resp_1") is not None
    store.put("b", response(2, previous="resp_1"))  # by an id that it learned somehow
    assert store.chain("b", "resp_2") is None
    assert store.delete("a", "resp_1") and not store.delete("a", "resp_1")


def test_a_chain_is_whole_or_nothing(database: Database) -> None:
    store = ResponseStore(database)
    for number in range(5):
        store.put("a", response(number, f"resp_{number - 1}" if number else None))
    assert [r.id for r in store.chain("a", "resp_4") or ()] == [f"resp_{n}" for n in range(5)]
    store.delete("a", "resp_2")
    assert store.chain("a", "resp_4") is None and len(store.chain("a", "resp_1") or ()) == 2


def test_old_ones_go(database: Database) -> None:
    clock = Clock()
    store = ResponseStore(database, clock=clock)
    store.put("a", response(1))
    clock.now += KEEP_SECONDS
    store.put("b", response(2))
    store.tidy("b")
    assert store.get("a", "resp_1") is None and store.get("b", "resp_2") is not None


@pytest.mark.parametrize("limits", [{"max_responses": 10}, {"max_bytes": 1000}])
def test_a_tenant_that_stores_too_much_loses_its_oldest(database: Database, limits: dict[str, int]) -> None:
    store = ResponseStore(database, clock=Clock(), **limits)
    store.put("b", response(-1))
    for number in range(TIDY_EVERY + 1):
        store.put("a", response(number))
    kept = [n for n in range(TIDY_EVERY + 1) if store.get("a", f"resp_{n}") is not None]
    assert kept == list(range(kept[0], TIDY_EVERY + 1)) and 2 <= len(kept) <= 20
    assert store.get("b", "resp_-1") is not None


def test_they_outlive_the_server(chat_model: Path, tmp_path: Path) -> None:
    """`store` means stored: what was answered is there after kill -9."""
    body = {"input": "hi", "max_output_tokens": 4, "temperature": 0}
    first = start_server(chat_model, "--state-dir", str(tmp_path))
    try:
        made = httpx.post(f"{first.url}/v1/responses", json=body, timeout=30).json()
    finally:
        first.process.kill()
        first.process.communicate()
    second = start_server(chat_model, "--state-dir", str(tmp_path))
    try:
        url = f"{second.url}/v1/responses"
        assert httpx.get(f"{url}/{made['id']}", timeout=30).json() == made
        after = httpx.post(url, json=body | {"previous_response_id": made["id"]}, timeout=30)
        assert after.status_code == 200 and after.json()["previous_response_id"] == made["id"]
        assert second.interrupt() == (0, "stopped\n")
    finally:
        second.process.kill()
        second.process.communicate()


def test_a_store_that_fails_does_not_take_the_answer_with_it(
    inner_server: Callable[..., InnerServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(ResponseStore, "put", full)
    url = f"{inner_server().url}/v1/responses"
    reply = httpx.post(url, json={"input": "hi", "max_output_tokens": 2}, timeout=30)
    assert reply.status_code == 200 and reply.json()["store"] is False
    assert httpx.get(f"{url}/{reply.json()['id']}").status_code == 404
    assert "could not be stored" in caplog.text


def test_keys_of_other_tenants_find_nothing(chat_model: Path, tmp_path: Path) -> None:
    """Through the whole server, with the database that keys and ledger lie in."""
    path = tmp_path / "keys.db"
    with Database(str(path)) as database:
        mine, _ = database.create_key("acme")
        colleague, _ = database.create_key("acme")
        stranger, _ = database.create_key("other")
    server = start_server(chat_model, "--database", str(path), "--state-dir", str(tmp_path))
    try:
        url = f"{server.url}/v1/responses"

        def ask(method: str, key: str, where: str = "", **body: object) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.request(method, url + where, headers=headers, json=body or None, timeout=30)

        made = ask("POST", mine, input="secret", max_output_tokens=2).json()["id"]
        assert ask("GET", colleague, f"/{made}").status_code == 200
        for method, where in (("GET", ""), ("GET", "/input_items"), ("DELETE", ""), ("POST", "/cancel")):
            assert ask(method, stranger, f"/{made}{where}").status_code == 404
            assert httpx.request(method, f"{url}/{made}{where}", timeout=30).status_code == 401
        follow = ask("POST", stranger, input="x", previous_response_id=made)
        assert follow.status_code == 404 and "secret" not in follow.text
        assert ask("DELETE", colleague, f"/{made}").status_code == 200
        assert not (tmp_path / "responses.db").exists()
        assert server.interrupt() == (0, "stopped\n")
    finally:
        server.process.kill()
        server.process.communicate()

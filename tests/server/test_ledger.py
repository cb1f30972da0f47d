"""The ledger: one row per request whatever happens, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, text, update

import ledger_load
from hayai.config import ServerConfig
from hayai.server.access import Access, Principal, open_access
from hayai.server.ledger import Entry, Ledger
from hayai.server.quotas import month_of
from hayai.server.storage import Database, months, processes, requests

if TYPE_CHECKING:
    from postgres_process import Postgres

pytest_plugins = ["postgres_process"]

REQUEST = {"endpoint": "/v1/completions", "model": "m"}


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with Database(database_url) as opened:
        yield opened


@pytest.fixture
def access(database_url: str) -> Iterator[Access]:
    opened = open_access(ServerConfig(database=database_url, require_keys=False))
    yield opened
    opened.close()


def rows_of(database: Database) -> dict[str, dict[str, Any]]:
    with database.reading() as connection:
        return {row["request_id"]: dict(row) for row in connection.execute(select(requests)).mappings()}


def wait_for(database: Database, request_id: str, status: str) -> None:
    end = time.monotonic() + 10
    while rows_of(database).get(request_id, {}).get("status") != status:
        assert time.monotonic() < end, rows_of(database)
        time.sleep(0.01)


def entry_of(request_id: str, **more: Any) -> Entry:
    return replace(Entry(request_id, "acme", None, "/v1/completions", "m", time.time()), **more)


def closed(request_id: str, tokens: int = 5, **more: Any) -> Entry:
    return entry_of(request_id, finished=time.time(), status="ok", prompt_tokens=tokens, **more)


def check_sums(database: Database) -> None:
    """The months' sums are those of the closed rows."""
    with database.reading() as connection:
        query = select(
            func.count(), func.sum(requests.c.prompt_tokens), func.sum(requests.c.completion_tokens)
        ).where(requests.c.status.not_in(("open", "lost")))
        counted = select(
            func.sum(months.c.num_requests),
            func.sum(months.c.prompt_tokens),
            func.sum(months.c.completion_tokens),
        )
        assert tuple(connection.execute(query).one()) == tuple(connection.execute(counted).one())


async def test_a_request_is_one_row_and_settled_once(access: Access, database: Database) -> None:
    ticket = access.admit(Principal("acme", "abc"), request_id="r1", **REQUEST)
    wait_for(database, "r1", "open")
    ticket.settle(11, 4, 7, "ok", 12.5)
    ticket.settle(99, 0, 99, "error")
    await ticket.flushed()
    row = rows_of(database)["r1"]
    expected = {"tenant": "acme", "key_id": "abc", "endpoint": "/v1/completions", "model": "m"}
    expected |= {"prompt_tokens": 11, "cached_tokens": 4, "completion_tokens": 7, "status": "ok"}
    assert {name: row[name] for name in expected} == expected and row["first_token_ms"] == 12.5
    assert 0 <= row["duration_ms"] == pytest.approx(1e3 * (row["finished"] - row["started"]), abs=50)
    assert abs(row["started"] - time.time()) < 30
    check_sums(database)


async def test_flushed_means_durable(access: Access, database: Database) -> None:
    """With nothing between: the row is there when flushed returns, every time."""
    for number in range(50):
        ticket = access.admit(Principal("acme"), request_id=f"r{number}", **REQUEST)
        ticket.settle(1, 0, 1, "ok")
        await ticket.flushed()
        assert rows_of(database)[f"r{number}"]["status"] == "ok"
    await ticket.flushed()  # and it may be asked again
    check_sums(database)


async def test_closing_writes_everything_and_leaves_nothing_open(access: Access, database: Database) -> None:
    tickets = [access.admit(Principal(), request_id=f"r{i}", **REQUEST) for i in range(1200)]
    for ticket in tickets[:-1]:
        ticket.settle(1, 0, 2, "ok")
    access.close()
    rows = rows_of(database)
    assert len(rows) == 1200 and rows["r1199"]["status"] == "lost"
    assert sum(row["completion_tokens"] for row in rows.values()) == 2 * 1199
    tickets[-1].settle(1, 0, 1, "ok")  # too late, and no exception
    await tickets[-1].flushed()
    check_sums(database)


def test_an_id_counts_once(database: Database) -> None:
    """A batch that is written twice (its commit's answer was lost), a line that runs again after a crash."""
    ledger = Ledger(database)
    for _ in range(3):
        done = [ledger.write(closed(f"r{i}")) for i in range(3)]
        for future in done:
            assert future is not None
            future.result(10)
    ledger.close()
    assert len(rows_of(database)) == 3
    with database.reading() as connection:
        assert connection.execute(select(months.c.num_requests, months.c.prompt_tokens)).one() == (3, 15)


def test_hostile_text_is_written(database: Database) -> None:
    ledger = Ledger(database)
    names = ["a\0b", "x" * 1_000_000, "'); DROP TABLE requests; --", "\ud800", "日本語 ‮", ""]
    for number, name in enumerate(names):
        entry = closed(f"r{number}", model=name, endpoint=name)
        ledger.write(replace(entry, finished=None, status="open"))
        future = ledger.write(entry)
        assert future is not None
        future.result(10)
    ledger.close()
    rows = rows_of(database)
    assert [rows[f"r{i}"]["model"] for i in range(6)] == [
        "a\ufffdb", "x" * 200, "'); DROP TABLE requests; --", "?", "日本語 ‮", "",
    ]  # fmt: skip


def test_a_row_that_is_refused_holds_nobody_up(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(database)
    bad = closed("bad", tenant=None)
    futures = [ledger.write(entry) for entry in (closed("before"), bad, closed("after"))]
    for future in futures:
        assert future is not None
        future.result(10)
    ledger.close()
    assert set(rows_of(database)) == {"before", "after"}
    assert "refuses request bad" in caplog.text
    check_sums(database)


def test_a_locked_database_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Database(f"{tmp_path}/x.db") as database, database.engine.connect() as other:
        ledger = Ledger(database)
        other.execution_options(hayai_write=True).execute(text("SELECT 1"))
        done = ledger.write(closed("r"))
        assert done is not None
        time.sleep(0.3)
        assert not done.done()
        other.rollback()
        done.result(20)
        assert rows_of(database)["r"]["status"] == "ok"
        ledger.close()


def test_a_server_that_restarts_loses_no_row(postgres: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    """PostgreSQL goes away in the middle of load and comes back: every row once."""
    with Database(postgres.new_database()) as database:
        ledger = Ledger(database)
        futures = []
        for number in range(400):
            ledger.write(entry_of(f"r{number}"))
            futures.append(ledger.write(closed(f"r{number}")))
            if number == 200:
                postgres.stop()
            if number == 300:
                time.sleep(0.3)
                postgres.start()
            time.sleep(0.001)
        for future in futures:
            assert future is not None
            future.result(30)
        ledger.close()
        assert len(rows_of(database)) == 400
        check_sums(database)
    assert "trying again" in caplog.text


async def test_what_cant_be_counted_is_not_given_away(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database does not take rows, they wait; too many of them close the door."""
    access = open_access(ServerConfig(database=database_url))
    monkeypatch.setattr("hayai.server.ledger.MAX_PENDING", 20)
    assert access.database is not None
    with access.database.writing() as connection:
        lock = (
            "LOCK TABLE requests IN EXCLUSIVE MODE" if access.database.dialect == "postgresql" else "SELECT 1"
        )
        connection.execute(text(lock))
        time.sleep(0.05)
        refused = None
        for number in range(100):
            try:
                access.admit(Principal(), request_id=f"r{number}", **REQUEST).settle(1, 0, 1, "ok")
            except Exception as error:
                refused = error
                break
        assert getattr(refused, "status", None) == 503 and "can't be counted" in str(refused)
        assert getattr(refused, "headers", {}).get("Retry-After") == "5"
    await asyncio.sleep(0.5)
    ticket = access.admit(Principal(), request_id="later", **REQUEST)
    ticket.settle(1, 0, 1, "ok")
    await ticket.flushed()
    access.close()


@pytest.mark.parametrize("alive", [True, False])
def test_servers_elsewhere_are_dead_when_they_are_silent(database: Database, alive: bool) -> None:
    """Rows of a silent server are lost; if it was only slow, it closes them all the same."""
    first = Ledger(database)
    first.write(entry_of("r"))
    wait_for(database, "r", "open")
    with database.writing() as connection:
        seen = time.time() - (30 if alive else 90)
        connection.execute(update(processes).values(machine="elsewhere", seen=seen))
    second = Ledger(database)
    assert rows_of(database)["r"]["status"] == ("open" if alive else "lost")
    done = first.write(closed("r"))
    assert done is not None
    done.result(10)
    assert rows_of(database)["r"]["status"] == "ok"
    first.close()
    second.close()
    check_sums(database)


def test_kill_9_loses_nothing_that_a_client_got(database_url: str) -> None:
    """Two processes write, and are killed again and again: what was answered is on record, once and with its
    tokens; what was running is lost and costs nothing."""
    with Database(database_url) as database:
        key, _ = database.create_key("acme")
        got: dict[str, tuple[int, int]] = {}
        for turn in range(4):
            command = [sys.executable, ledger_load.__file__, database_url, key]
            loads = [
                subprocess.Popen([*command, f"{turn}-{i}", "3"], stdout=subprocess.PIPE, text=True)
                for i in range(2)
            ]
            for load in loads:
                assert load.stdout is not None and load.stdout.readline()
            time.sleep(0.4)
            for load in loads:
                load.send_signal(signal.SIGKILL)
            for load in loads:
                out, _ = load.communicate()
                for line in out.splitlines(keepends=True):
                    if line.endswith("\n"):
                        request_id, prompt_tokens, completion_tokens = line.split()
                        got[request_id] = (int(prompt_tokens), int(completion_tokens))
        before = rows_of(database)
        Ledger(database).close()
        rows = rows_of(database)
        assert len(got) > 50
        for request_id, tokens in got.items():
            row = rows[request_id]
            assert (row["prompt_tokens"], row["completion_tokens"], row["status"]) == (*tokens, "ok")
        # closed, but the client had not yet read or written it down when it died: one per client at most
        unheard = [r for i, r in rows.items() if r["status"] == "ok" and i not in got]
        assert len(unheard) <= 4 * 2 * 3 * 2
        lost = [row for row in rows.values() if row["status"] == "lost"]
        assert len(rows) == len(before) and all(row["status"] != "open" for row in rows.values())
        assert all(row["prompt_tokens"] == row["completion_tokens"] == 0 for row in lost)
        assert month_of(time.time()) in database_months(database)
        check_sums(database)


def database_months(database: Database) -> list[str]:
    with database.reading() as connection:
        return list(connection.execute(select(months.c.month)).scalars())

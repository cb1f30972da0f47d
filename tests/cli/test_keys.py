"""`hayai keys` and `hayai usage` from outside."""

from __future__ import annotations

import csv
import io
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from hayai.server.ledger import Entry, Ledger
from hayai.server.storage import Database
from hayai.server.tenants import digest_of
from hayai_process import Hayai

KEY = re.compile(r"hk-([a-z2-7]{16})-[A-Za-z0-9_-]{43}\n")
Call = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def call(hayai: Hayai, path: Path) -> Call:
    """`hayai` with the test's database."""

    def run(*args: str) -> CompletedProcess[str]:
        return hayai(*args, env={"HAYAI_DATABASE": str(path)})

    return run


def error_of(done: CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code and done.stdout == "" and done.stderr.startswith("error: ")
    return done.stderr


def test_a_key_is_shown_once_and_kept_as_a_hash(call: Call, path: Path) -> None:
    made = call("keys", "create", "--tenant", "acme", "--name", "ci", "--tokens-per-minute", "5000")
    found = KEY.fullmatch(made.stdout)
    assert made.returncode == 0 and found
    key = made.stdout.strip()
    assert "tokens_per_minute 5000" in made.stderr and key not in made.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = b"".join(p.read_bytes() for p in path.parent.glob("keys.db*"))
    assert key.encode() not in kept and key[-43:].encode() not in kept and digest_of(key).encode() in kept
    listed = call("keys", "list")
    assert found[1] in listed.stdout and key[-43:] not in listed.stdout
    second = call("keys", "create", "--tenant", "acme")
    assert KEY.fullmatch(second.stdout) and second.stdout != made.stdout
    assert json.loads(call("keys", "limits", "--format", "json").stdout)[0]["tokens_per_minute"] == 5000


def test_revoking(call: Call) -> None:
    key = call("keys", "create", "--tenant", "acme").stdout.strip()
    for name in (key[3:19], key):  # by its id, and by the key itself, twice without harm
        done = call("keys", "revoke", name)
        assert done.returncode == 0 and "is revoked" in done.stderr and key not in done.stderr
    (row,) = json.loads(call("keys", "list", "--format", "json").stdout)
    assert row["revoked"] is not None and row["last_used"] is None
    assert "no such key" in error_of(call("keys", "revoke", "hk-nonsense"))


def test_limits_are_a_tenants(call: Call) -> None:
    call("keys", "create", "--tenant", "acme", "--max-parallel", "3", "--models", "b,a")
    call("keys", "create", "--tenant", "acme", "--token-budget", "1000")
    shown = call(
        "keys", "limits", "acme", "--max-parallel", "none", "--priority", "batch", "--format", "json"
    )
    assert json.loads(shown.stdout) == [
        {
            "tenant": "acme",
            "requests_per_minute": None,
            "tokens_per_minute": None,
            "max_parallel": None,
            "token_budget": 1000,
            "priority": "batch",
            "models": "a,b",
        }
    ]
    assert "all" in call("keys", "limits", "acme", "--models", "all").stdout
    assert "no such tenant: 'acne'; there is: acme" in error_of(call("keys", "limits", "acne"))
    assert "not a whole number" in error_of(call("keys", "limits", "acme", "--max-parallel", "0"), 2)
    assert "name the tenant" in error_of(call("keys", "limits", "--max-parallel", "1"), 2)


@pytest.mark.parametrize(
    "name", ["日本 ü", "x'; DROP TABLE keys; --", '"; --', "%s {0}", "a" * 100, "=1+1", "Ａ"]
)
def test_names_are_only_names(call: Call, name: str) -> None:
    assert call("keys", "create", "--tenant", name, "--name", name).returncode == 0
    (row,) = json.loads(call("keys", "list", "--tenant", name, "--format", "json").stdout)
    assert (row["tenant"], row["name"]) == (name, name)
    assert name in call("keys", "list").stdout
    assert call("usage", "--tenant", name, "--format", "json").stdout == "[]\n"


@pytest.mark.parametrize("name", ["", " x", "x ", "a" * 101, "a\nb", "a\tb", "\u202ex", "\x1b[31mred"])
def test_names_that_cant_be_shown_are_refused(call: Call, name: str) -> None:
    assert "printable" in error_of(call("keys", "create", "--tenant", name))


def test_reading_verbs_make_no_database(call: Call, path: Path) -> None:
    for args in (("keys", "list"), ("keys", "limits"), ("keys", "revoke", "x"), ("usage",)):
        assert "no database yet" in error_of(call(*args))
    assert not path.exists()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mysql://u:secret@h/x", "no such kind of database"),
        ("postgresql://u:secret@127.0.0.1:1/x", "can't open the database postgresql://u:***@127.0.0.1:1/x"),
        ("sqlite://", "needs a file"),
        ("sqlite:////proc/nowhere/x.db", "can't open the database"),
        ("://", "not a database URL"),
    ],
)
def test_databases_that_cant_be_used(hayai: Hayai, url: str, text: str) -> None:
    error = error_of(hayai("keys", "create", "--tenant", "t", "--database", url))
    assert text in error and "secret" not in error


def test_a_file_that_is_no_database(call: Call, path: Path) -> None:
    path.write_text("this is not a database, and it is long enough to be looked at" * 100)
    assert "can't open the database" in error_of(call("keys", "list"))


def test_a_newer_database_is_left_alone(call: Call, path: Path) -> None:
    call("keys", "create", "--tenant", "t")
    with Database(str(path)) as database, database.writing() as connection:
        connection.exec_driver_sql("UPDATE meta SET value = '2' WHERE name = 'schema'")
    assert "has schema 2, this version of hayai knows 1" in error_of(call("keys", "list"))


def test_where_keys_are_kept(hayai: Hayai, tmp_path: Path) -> None:
    """A flag before the environment before the file before the state folder."""
    config = tmp_path / "hayai.toml"
    config.write_text('[database]\nurl = "file.db"\n[server]\nstate_dir = "state"\n')
    empty = tmp_path / "empty.toml"
    empty.write_text('[server]\nstate_dir = "state"\n')
    create = ("keys", "create", "--tenant", "t")
    env = {"HAYAI_DATABASE": str(tmp_path / "env.db")}
    hayai(*create, "--config", empty)
    assert [p.name for p in tmp_path.rglob("*.db")] == ["hayai.db"]
    hayai(*create, "--config", config)
    assert (tmp_path / "file.db").exists()
    hayai(*create, "--config", config, env=env)
    assert (tmp_path / "env.db").exists()
    hayai(*create, "--config", config, "--database", tmp_path / "flag.db", env=env)
    assert (tmp_path / "flag.db").exists()


def test_usage_is_exported(call: Call, path: Path) -> None:
    key_id = call("keys", "create", "--tenant", "acme").stdout[3:19]
    with Database(str(path)) as database:
        ledger = Ledger(database)
        day = 1_767_225_600.0  # 2026-01-01
        for number in range(6):
            tenant = "acme" if number < 4 else '=danger,"quoted"'
            entry = Entry(f"r{number}", tenant, key_id, "/v1/x", f"m{number % 2}", day + number * 43_200)
            status = "ok" if number != 2 else "cancelled"
            ledger.write(
                Entry(**{**vars(entry), "finished": entry.started + 1, "prompt_tokens": 10, "status": status})
            )
        ledger.write(Entry("open", "acme", key_id, "/v1/x", "m0", day))
        ledger.close()
    expected = {"requests": 5, "ok": 3, "prompt_tokens": 40, "cached_tokens": 0, "completion_tokens": 0}
    sums = json.loads(call("usage", "--format", "json").stdout)
    assert sums[1] == {"tenant": "acme"} | expected and sums[0]["tenant"] == '=danger,"quoted"'
    table = call("usage").stdout.splitlines()
    assert table[0].split() == ["tenant", *expected] and table[2].split() == [
        "acme",
        "5",
        "3",
        "40",
        "0",
        "0",
    ]
    rows = list(csv.DictReader(io.StringIO(call("usage", "--by", "request", "--format", "csv").stdout)))
    assert {row["request_id"]: row["status"] for row in rows} == {
        **{f"r{i}": "ok" for i in range(6)}, "r2": "cancelled", "open": "lost",
    }  # fmt: skip
    assert rows[-1]["tenant"] == '=danger,"quoted"' and rows[-1]["started"] == "2026-01-03T12:00:00.000Z"
    by_day = json.loads(call("usage", "--by", "day", "--tenant", "acme", "--format", "json").stdout)
    assert [(r["day"], r["requests"]) for r in by_day] == [("2026-01-01", 3), ("2026-01-02", 2)]
    some = call("usage", "--since", "2026-01-02", "--until", "2026-01-02T12:00", "--format", "json").stdout
    assert [row["requests"] for row in json.loads(some)] == [1]
    assert call("usage", "--since", "24h", "--format", "json").stdout == "[]\n"
    assert "not a date or time" in error_of(call("usage", "--since", "yesterday"), 2)
    listed = json.loads(call("keys", "list", "--format", "json").stdout)
    assert listed[0]["last_used"] == "2026-01-03T12:00:00.000Z"

"""Who may come in: keys, tenants, their changes while a server runs, and hostile headers."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from hayai.config import ServerConfig
from hayai.engine.request import BATCH, INTERACTIVE
from hayai.errors import ConfigError
from hayai.server.access import Access, Principal, open_access
from hayai.server.errors import ApiError
from hayai.server.storage import Database
from hayai.server.tenants import digest_of, key_id_of, make_key

pytest_plugins = ["postgres_process"]

ROOT = Path(__file__).resolve().parents[2]
WORK = {"endpoint": "/v1/completions", "model": "m"}


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with Database(database_url) as opened:
        yield opened


@pytest.fixture
def opened(database_url: str) -> Iterator[Callable[..., Access]]:
    """Call it with ServerConfig fields: a server's Access on the test's database."""
    servers: list[Access] = []

    def start(**config: Any) -> Access:
        servers.append(open_access(ServerConfig(database=database_url, **config)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def refused(access: Access, headers: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        access.authenticate(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    return caught.value


def wait_until(condition: Callable[[], bool], seconds: float = 3.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds
        time.sleep(0.01)
    return time.monotonic() - began


def test_an_open_server_takes_anybody() -> None:
    access = Access.open()
    for headers in ({}, bearer("anything"), {"x-api-key": "\0"}, {"authorization": "Basic x"}):
        assert access.authenticate(headers) == Principal("local", None, INTERACTIVE, "", None)
    assert not access.keyed
    ticket = access.admit(Principal(), request_id="r", **WORK)
    ticket.settle(1, 0, 1, "ok")
    asyncio.run(ticket.flushed())
    assert ticket.headers == {}
    access.close()


def test_what_a_key_says(database: Database, opened: Callable[..., Access]) -> None:
    changes = {"priority": "batch", "models": frozenset({"a", "b"})}
    key, record = database.create_key("acme", "ci", changes)
    other, _ = database.create_key("acme")
    third, _ = database.create_key("third")
    access = opened()
    assert access.keyed
    expected = Principal(
        "acme", record.key_id, BATCH, access.authenticate(bearer(key)).cache_salt, changes["models"]
    )
    for headers in (
        bearer(key),
        {"authorization": f"bearer  {key} "},
        {"x-api-key": key},
        {"api-key": key},
        {"authorization": "Bearer sk-other", "x-api-key": key},
        {"authorization": "Basic dTpw", "api-key": key},
        Headers({"X-Api-Key": key}),
        Headers({"AUTHORIZATION": f"Bearer {key}"}),
    ):
        assert access.authenticate(headers) == expected
    salts = [access.authenticate(bearer(k)).cache_salt for k in (key, other, third)]
    assert salts[0] == salts[1] != salts[2] and len(salts[0]) == 64
    assert [opened().authenticate(bearer(k)).cache_salt for k in (key, other, third)] == salts
    assert access.principal(record.key_id) == expected


HOSTILE = [
    "", " ", "\0", "hk-", "sk-abc", "x" * 1_000_000, "hk-" + "a" * 1_000_000, "' OR 1=1; --", "日本語",
    "\ud800", "hk-aaaaaaaaaaaaaaaa-" + "A" * 43, "Bearer", "None", "null", "*", "%", "hk-%-%",
]  # fmt: skip


def test_hostile_keys(database: Database, opened: Callable[..., Access]) -> None:
    key, record = database.create_key("acme")
    access = opened()
    flipped = key[:-1] + ("A" if key[-1] != "A" else "B")
    swapped = f"hk-{make_key()[1]}-{key[-43:]}"
    near = [flipped, swapped, key[:-1], key + "A", key.upper(), key + "\0", "\0" + key, key + "\n" + key]
    for bad in [*HOSTILE, *near, record.key_id, record.digest, digest_of(key)]:
        for headers in (bearer(bad), {"x-api-key": bad}, {"api-key": bad}):
            error = refused(access, headers)
            assert len(error.message) < 200 and key not in error.message
    assert "no API key" in refused(access, {}).message
    assert "no API key" in refused(access, {"authorization": "Basic dTpw"}).message
    access.authenticate(bearer(key))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), st.from_regex(r"hk-[a-z2-7]{0,18}-[\w-]{0,50}", fullmatch=True)))
def test_only_texts_of_the_right_form_are_looked_up(text: str) -> None:
    found = key_id_of(text)
    assert (found is not None) == bool(re.fullmatch(r"hk-[a-z2-7]{16}-[A-Za-z0-9_-]{43}", text, re.ASCII))


def test_keys_are_random_and_differ() -> None:
    made = [make_key() for _ in range(1000)]
    assert len({key for key, _ in made}) == len({key_id for _, key_id in made}) == 1000
    assert all(key_id_of(key) == key_id for key, key_id in made)


def test_a_running_server_follows_changes(database: Database, opened: Callable[..., Access]) -> None:
    """The first key closes the door, a revoked one is refused, both within about a second; revoking the last
    key opens nothing."""
    access = opened()
    assert access.authenticate({}).tenant == "local"
    key, record = database.create_key("acme")
    wait_until(lambda: access.keyed, 1.5)
    assert access.authenticate(bearer(key)).tenant == "acme"
    refused(access, {})
    database.set_tenant("acme", {"priority": "batch", "requests_per_minute": 1})
    wait_until(lambda: access.authenticate(bearer(key)).priority == BATCH, 1.5)
    principal = access.authenticate(bearer(key))
    access.admit(principal, request_id="r1", **WORK)
    with pytest.raises(ApiError, match="1 requests per minute"):
        access.admit(principal, request_id="r2", **WORK)
    database.revoke_key(record.key_id)
    wait_until(lambda: access.principal(record.key_id) is None, 1.5)
    assert "revoked" in refused(access, bearer(key)).message
    refused(access, {})
    assert opened().keyed


def test_keys_may_be_required_or_not(database: Database, opened: Callable[..., Access]) -> None:
    required = opened(require_keys=True)
    assert required.keyed
    refused(required, {})
    key, record = database.create_key("acme")
    never = opened(require_keys=False)
    assert not never.keyed and never.authenticate({}).tenant == "local"
    assert never.authenticate(bearer("nonsense")).tenant == "local"
    assert never.authenticate(bearer(key)).tenant == "acme"
    with pytest.raises(ConfigError, match="hayai keys create"):
        open_access(ServerConfig(require_keys=True))
    assert record.tenant == "acme"


async def test_servers_share_a_budget(
    database: Database, opened: Callable[..., Access], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hayai.server.access.REFRESH_SECONDS", 0.1)
    key, _ = database.create_key("acme", "", {"token_budget": 100})
    first, second = opened(), opened()
    ticket = first.admit(first.authenticate(bearer(key)), request_id="r1", prompt_tokens=40, **WORK)
    ticket.settle(40, 0, 50, "ok")
    await ticket.flushed()
    principal = second.authenticate(bearer(key))

    def is_full() -> bool:
        try:
            second.quotas.settle(second.quotas.admit("acme", 1, 11, 0), 0)
        except ApiError as error:
            assert error.code == "insufficient_quota" and error.headers["x-should-retry"] == "false"
            return True
        return False

    wait_until(is_full)
    second.admit(principal, request_id="r2", prompt_tokens=10, **WORK).settle(0, 0, 0, "error")
    later = opened()  # a server that starts knows what was spent
    with pytest.raises(ApiError, match="90 are spent"):
        later.admit(principal, request_id="r3", prompt_tokens=11, **WORK)


async def test_many_at_once_get_no_more_than_one(database: Database, opened: Callable[..., Access]) -> None:
    """200 clients of one tenant at once: 5 run at a time, and the tokens of a minute are shared."""
    key, _ = database.create_key("acme", "", {"max_parallel": 5, "tokens_per_minute": 1000})
    access = opened()
    principal = access.authenticate(bearer(key))
    running, most, used = 0, 0, 0
    codes: list[str] = []

    async def client(number: int) -> None:
        nonlocal running, most, used
        await asyncio.sleep(number % 20 / 200)
        try:
            ticket = access.admit(
                principal, request_id=f"r{number}", prompt_tokens=10, max_tokens=20, num_choices=1, **WORK
            )
        except ApiError as error:
            codes.append(str(error.code))
            assert error.status == 429 and int(error.headers["Retry-After"]) >= 1
            return
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        ticket.settle(10, 0, 15, "ok")
        used += 25
        await ticket.flushed()

    await asyncio.gather(*(client(number) for number in range(200)))
    assert (
        most == 5
        and used <= 1000 + 20
        and set(codes) <= {"too_many_parallel_requests", "rate_limit_exceeded"}
    )
    assert len(codes) == 200 - used // 25


def test_a_server_without_a_database_does_not_load_one() -> None:
    """28 MB that an open server does without."""
    code = (
        "import sys; from hayai.server.app import create_app; from hayai.cli.serve import command;"
        "from hayai.config import ServerConfig; from hayai.server.access import open_access;"
        "open_access(ServerConfig()).close(); print('sqlalchemy' in sys.modules, 'psycopg' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_nothing_unpickles() -> None:
    """Pickled data runs code of whoever wrote it; nothing here reads or writes any."""
    words = re.compile(
        r"\b(pickle|cPickle|dill|shelve|marshal|joblib|cloudpickle|torch\.load)\b|allow_pickle=True"
    )
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("native/*.cpp")]
    assert len(sources) > 100
    assert [p.name for p in sources if words.search(p.read_text())] == []

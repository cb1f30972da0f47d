"""Stored responses: what /v1/responses keeps so that a conversation can go on from an id.

One row per response: its body as the client got it, and the input items of that turn. A conversation is the
chain of rows by `previous_response_id`. Rows belong to a tenant, and nobody else can see that they exist.
They go after `KEEP_SECONDS`, and the oldest of a tenant before that, when it has too many or too large ones.

Lies in the database of keys and ledger where there is one, so that several servers may share it; else in a
SQLite file of its own. All methods block: callers on an event loop use a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import orjson
from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    func,
    insert,
    select,
)
from sqlalchemy import delete as delete_rows

from hayai.server.storage import Database

KEEP_SECONDS = 30 * 24 * 3600.0
"""As long as OpenAI keeps them."""
MAX_RESPONSES = 10_000
MAX_BYTES = 1 << 30
"""Of one tenant."""
MAX_CHAIN = 1024
"""Turns of one conversation."""
TIDY_EVERY = 64
"""Writes between two looks at what has to go."""

_tables = MetaData()
responses = Table(
    "responses",
    _tables,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(100), nullable=False),
    Column("created", Double, nullable=False),
    Column("previous", String(64)),
    Column("size", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Index("responses_of_tenant", "tenant", "created", "size"),
    Index("responses_by_time", "created"),
)


@dataclass(frozen=True)
class StoredResponse:
    """body: the Response object. items: input items of this turn alone, each with an id."""

    id: str
    body: dict[str, Any]
    items: list[dict[str, Any]]
    previous: str | None = None


class ResponseStore:
    """Responses of all tenants. Threads may share it."""

    def __init__(
        self,
        database: Database,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._clock = clock
        self._writes = count(1)
        with database.writing() as connection:
            _tables.create_all(connection)

    def put(self, tenant: str, response: StoredResponse) -> None:
        """Keep a response; now and then drop what is too old or too much."""
        body, items = orjson.dumps(response.body), orjson.dumps(response.items)
        with self._database.writing() as connection:
            connection.execute(
                insert(responses).values(
                    id=response.id,
                    tenant=tenant,
                    created=self._clock(),
                    previous=response.previous,
                    size=len(body) + len(items),
                    body=body,
                    input=items,
                )
            )
        if next(self._writes) % TIDY_EVERY == 0:
            self.tidy(tenant)

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A tenant's response; None where it has none of that id."""
        with self._database.reading() as connection:
            row = connection.execute(_row_of(tenant, response_id)).mappings().one_or_none()
        return None if row is None else _stored(dict(row))

    def chain(self, tenant: str, response_id: str) -> list[StoredResponse] | None:
        """A conversation up to and including `response_id`, oldest first; None where a part of it is gone."""
        found: list[StoredResponse] = []
        wanted: str | None = response_id
        with self._database.reading() as connection:
            while wanted is not None and len(found) < MAX_CHAIN:
                row = connection.execute(_row_of(tenant, wanted)).mappings().one_or_none()
                if row is None:
                    return None
                found.append(_stored(dict(row)))
                wanted = row["previous"]
        return found[::-1] if wanted is None else None

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a response; False where the tenant has none of that id."""
        query = delete_rows(responses).where(responses.c.id == response_id, responses.c.tenant == tenant)
        with self._database.writing() as connection:
            return connection.execute(query).rowcount > 0

    def tidy(self, tenant: str) -> None:
        """Drop what is too old, and the oldest of a tenant that has too much."""
        table, mine = responses, responses.c.tenant == tenant
        running = func.sum(table.c.size).over(order_by=(table.c.created.desc(), table.c.id))
        place = func.row_number().over(order_by=(table.c.created.desc(), table.c.id))
        ranked = select(table.c.id, running.label("total"), place.label("place")).where(mine).subquery()
        extra = select(ranked.c.id).where(
            (ranked.c.total > self._max_bytes) | (ranked.c.place > self._max_responses)
        )
        with self._database.writing() as connection:
            connection.execute(delete_rows(table).where(table.c.created < self._clock() - KEEP_SECONDS))
            connection.execute(delete_rows(table).where(table.c.id.in_(extra)))


def _row_of(tenant: str, response_id: str) -> Any:
    return select(responses).where(responses.c.id == response_id, responses.c.tenant == tenant)


def _stored(row: Mapping[str, Any]) -> StoredResponse:
    return StoredResponse(row["id"], orjson.loads(row["body"]), orjson.loads(row["input"]), row["previous"])

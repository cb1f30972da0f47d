"""Who used how much: sums and rows of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, select

from hayai.errors import ConfigError
from hayai.server.storage import Database, requests

_DAYS: Mapping[str, Callable[[ColumnElement[float]], ColumnElement[str]]] = {
    "sqlite": lambda seconds: func.date(seconds, "unixepoch"),
    "postgresql": lambda seconds: func.to_char(
        func.timezone("UTC", func.to_timestamp(seconds)), "YYYY-MM-DD"
    ),
}
"""Dialect -> '2026-11-24' (UTC) of seconds since 1970."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "tenant": ("tenant",),
    "key": ("tenant", "key_id"),
    "model": ("tenant", "model"),
    "endpoint": ("tenant", "endpoint"),
    "status": ("tenant", "status"),
    "day": ("day", "tenant"),
}
"""What sums can be made by -> its columns."""
SUMS = ("requests", "ok", "prompt_tokens", "cached_tokens", "completion_tokens")


def usage_sums(
    database: Database,
    by: str = "tenant",
    tenant: str | None = None,
    since: float | None = None,
    until: float | None = None,
) -> list[dict[str, Any]]:
    """Sums over requests that are over, begun in [since, until) (seconds since 1970); one dict per group.

    Columns: those of the group, then SUMS; ok: answered completely, cached_tokens: of the prompt tokens.
    """
    day = _DAYS[database.dialect](requests.c.started).label("day")
    columns = [day if name == "day" else requests.c[name] for name in GROUPS[by]]
    sums = [func.sum(requests.c[name]).label(name) for name in SUMS[2:]]
    ok = func.sum(case((requests.c.status == "ok", 1), else_=0)).label("ok")
    query = select(*columns, func.count().label("requests"), ok, *sums)
    query = _narrow(query, tenant, since, until).group_by(*columns).order_by(*columns)
    with database.reading() as connection:
        rows = connection.execute(query.where(requests.c.status != "open")).mappings()
        # PostgreSQL sums into its decimal type, and SQLAlchemy's names are no plain texts
        return [{str(n): int(v) if n in SUMS else v for n, v in row.items()} for row in rows]


def usage_rows(
    database: Database, tenant: str | None = None, since: float | None = None, until: float | None = None
) -> Iterator[dict[str, Any]]:
    """The rows themselves in the order of their start, times as ISO 8601 in UTC; read as they are used."""
    columns = [c for c in requests.c if c.name != "process"]
    query = _narrow(select(*columns), tenant, since, until)
    query = query.order_by(requests.c.started, requests.c.request_id)
    with database.reading() as connection:
        for row in connection.execution_options(yield_per=1000).execute(query).mappings():
            yield {**row, "started": iso_time(row["started"]), "finished": iso_time(row["finished"])}


def _narrow(query: Select[Any], tenant: str | None, since: float | None, until: float | None) -> Select[Any]:
    if tenant is not None:
        query = query.where(requests.c.tenant == tenant)
    if since is not None:
        query = query.where(requests.c.started >= since)
    if until is not None:
        query = query.where(requests.c.started < until)
    return query


def last_used(database: Database) -> dict[str, float]:
    """Key id -> the start of its newest request, in seconds since 1970."""
    query = select(requests.c.key_id, func.max(requests.c.started)).group_by(requests.c.key_id)
    with database.reading() as connection:
        return {key_id: started for key_id, started in connection.execute(query) if key_id is not None}


def iso_time(seconds: float | None) -> str | None:
    """'2026-11-24T13:59:01.250Z'"""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 date or time (UTC unless it says otherwise). ConfigError."""
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        known = "2026-11-24 or 2026-11-24T08:00"
        raise ConfigError(f"not a date or time such as {known}: {text[:50]!r}") from None

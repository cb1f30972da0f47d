"""The database: tenants, keys and the ledger's tables. SQLite by default, PostgreSQL by URL.

SQLite runs in WAL mode with synchronous=NORMAL: a commit is in the operating system's hands when it returns,
so `kill -9` of this process loses nothing and no commit waits for the disk; a power cut may lose the last
moments, but never corrupts the file. Who needs more than that takes PostgreSQL, whose commits wait for its
log to be on disk.

Importing this module imports SQLAlchemy (28 MB): only what has a database does it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from hayai.config import hide_password
from hayai.errors import ConfigError
from hayai.server.tenants import ApiKey, Limits, Snapshot, Tenant, check_name, digest_of, make_key

SCHEMA_VERSION = "1"
BUSY_SECONDS = 10
"""How long a write waits for another process's write before it is an error."""

tables = MetaData()

meta = Table(
    "meta", tables, Column("name", String(32), primary_key=True), Column("value", Text, nullable=False)
)
"""schema: SCHEMA_VERSION. revision: counts changes of tenants and keys. secret: hexadecimal, 256 bits."""

tenants = Table(
    "tenants",
    tables,
    Column("name", String(100), primary_key=True),
    Column("created", Double, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("max_parallel", BigInteger),
    Column("token_budget", BigInteger),
    Column("priority", String(16), nullable=False),
    Column("models", Text),  # one name per line; NULL = all
)

keys = Table(
    "keys",
    tables,
    Column("key_id", String(16), primary_key=True),
    Column("tenant", String(100), nullable=False),
    Column("name", String(100), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created", Double, nullable=False),
    Column("revoked", Double),
)

requests = Table(
    "requests",
    tables,
    Column("request_id", String(200), primary_key=True),
    Column("tenant", String(100), nullable=False),
    Column("key_id", String(16)),
    Column("process", String(32), nullable=False),
    Column("endpoint", String(200), nullable=False),
    Column("model", String(200), nullable=False),
    Column("started", Double, nullable=False),
    Column("finished", Double),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("status", String(32), nullable=False),
    Column("duration_ms", Double),
    Column("first_token_ms", Double),
    Index("requests_of_tenant", "tenant", "started"),
    Index("requests_by_time", "started"),
)
"""The ledger: one row per request that was let in. Times: seconds since 1970, UTC. status: 'open', 'lost'
(its process died, how it ended is unknown), or how it ended."""

months = Table(
    "months",
    tables,
    Column("tenant", String(100), primary_key=True),
    Column("month", String(7), primary_key=True),
    Column("num_requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
"""Sums of the closed rows per tenant and month ('2026-11') of their start, written in the same transaction as
the rows: a budget is one look-up however many rows there are."""

processes = Table(
    "processes",
    tables,
    Column("process", String(32), primary_key=True),
    Column("machine", String(200), nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("born", String(32), nullable=False),
    Column("seen", Double, nullable=False),
)
"""Servers that write the ledger, to know whose open rows are lost."""

UPSERTS: Mapping[str, Callable[[Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""Dialect -> its INSERT that knows ON CONFLICT; the dialects that are supported."""

_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_SCHEMES = "sqlite:///FILE, postgresql://USER@HOST/NAME, or a path of a SQLite file"


class Database:
    """One database, its tables made where they are missing. Threads may share it.

    `url` is shown without its password. create False: a SQLite file must exist. ConfigError where it can't be
    opened or was made by a newer version.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        parsed = parse_url(url)
        if not create and parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).exists():
            raise ConfigError(f"there is no database yet: {parsed.database}; `hayai keys create` makes one")
        self.url = hide_password(url)
        self.engine = _engine(parsed)
        # SQLite takes the lock at the start, or two transactions that read before they write could both fail
        self._writer = self.engine.execution_options(hayai_write=True)
        self.dialect = self.engine.dialect.name
        self.upsert = UPSERTS[self.dialect]
        try:
            with self.writing() as connection:
                self._make_tables(connection)
        except ConfigError:
            self.engine.dispose()
            raise
        except SQLAlchemyError as error:
            self.engine.dispose()
            raise ConfigError(f"can't open the database {self.url}: {reason_of(error)}") from None

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes; committed at the end, rolled back by an exception."""
        with self._writer.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads: one consistent view, and writers don't wait for it."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def _make_tables(self, connection: Connection) -> None:
        if self.dialect == "postgresql":  # two servers that start at once must not both create
            connection.execute(text("SELECT pg_advisory_xact_lock(4702111234474983745)"))
        tables.create_all(connection)
        first = {"schema": SCHEMA_VERSION, "revision": "0", "secret": secrets.token_hex(32)}
        rows = [{"name": name, "value": value} for name, value in first.items()]
        connection.execute(self.upsert(meta).on_conflict_do_nothing(), rows)
        found = connection.execute(select(meta.c.value).where(meta.c.name == "schema")).scalar_one()
        if found != SCHEMA_VERSION:
            raise ConfigError(
                f"the database {self.url} has schema {found}, this version of hayai knows {SCHEMA_VERSION}"
            )

    # Tenants and keys

    def revision(self) -> int:
        """Grows with every change of tenants or keys."""
        with self.reading() as connection:
            return _revision(connection)

    def snapshot(self) -> Snapshot:
        """All tenants and keys."""
        with self.reading() as connection:
            secret = connection.execute(select(meta.c.value).where(meta.c.name == "secret")).scalar_one()
            found = [_tenant(dict(row)) for row in connection.execute(select(tenants)).mappings()]
            made = [ApiKey(**row) for row in connection.execute(select(keys)).mappings()]
            return Snapshot(
                _revision(connection),
                bytes.fromhex(secret),
                {t.name: t for t in found},
                {k.key_id: k for k in made},
            )

    def tenant(self, name: str) -> Tenant:
        """One tenant; ConfigError where there is none of that name."""
        with self.reading() as connection:
            return _find_tenant(connection, check_name(name))

    def set_tenant(self, name: str, changes: Mapping[str, Any], *, create: bool = False) -> Tenant:
        """Change limits (fields of Limits), `priority` or `models`; what is not named stays.

        create: make the tenant where there is none; else that is a ConfigError. Running servers follow within
        about a second.
        """
        name = check_name(name)
        with self.writing() as connection:
            return self._set_tenant(connection, name, changes, create)

    def create_key(
        self, tenant: str, name: str = "", changes: Mapping[str, Any] | None = None
    ) -> tuple[str, ApiKey]:
        """A new key of a tenant, which is made where there is none of that name. The key itself is returned
        here and kept nowhere. changes: see `set_tenant`."""
        tenant = check_name(tenant)
        key, key_id = make_key()
        record = ApiKey(key_id, tenant, check_name(name, "key") if name else "", digest_of(key), time.time())
        with self.writing() as connection:
            self._set_tenant(connection, tenant, changes or {}, create=True)
            connection.execute(insert(keys).values(**asdict(record)))
            _touch(connection)
        return key, record

    def revoke_key(self, key_id: str) -> ApiKey:
        """End a key, by its id or by the key itself. ConfigError where there is none. It stays on record."""
        found = re.fullmatch(r"(?:hk-)?([a-z2-7]{16})(?:-.*)?", key_id)
        with self.writing() as connection:
            query = select(keys).where(keys.c.key_id == (found[1] if found else ""))
            row = connection.execute(query).mappings().one_or_none()
            if row is None:
                raise ConfigError("no such key; see `hayai keys list` for the ids")
            key = ApiKey(**row)
            if key.revoked is None:
                key = replace(key, revoked=time.time())
                connection.execute(
                    update(keys).where(keys.c.key_id == key.key_id).values(revoked=key.revoked)
                )
                _touch(connection)
        return key

    def spent(self, month: str, names: Collection[str]) -> dict[str, int]:
        """Tokens on record per tenant in a month ('2026-11'); 0 for tenants without any."""
        tokens = months.c.prompt_tokens + months.c.completion_tokens
        query = select(months.c.tenant, tokens).where(months.c.month == month, months.c.tenant.in_(names))
        with self.reading() as connection:
            return dict.fromkeys(names, 0) | {name: int(n) for name, n in connection.execute(query)}

    def _set_tenant(
        self, connection: Connection, name: str, changes: Mapping[str, Any], create: bool
    ) -> Tenant:
        if create:
            row = {"name": name, "created": time.time(), **_tenant_row(Tenant(name))}
            connection.execute(self.upsert(tenants).on_conflict_do_nothing(), row)
        tenant = _find_tenant(connection, name)
        fields = dict(changes)
        rest = {field: fields.pop(field) for field in ("priority", "models") if field in fields}
        tenant = replace(tenant, limits=replace(tenant.limits, **fields), **rest)
        connection.execute(update(tenants).where(tenants.c.name == name).values(**_tenant_row(tenant)))
        _touch(connection)
        return tenant


def parse_url(url: str) -> URL:
    """The URL with its driver; ConfigError for a database that is not supported."""
    if "://" not in url:
        return URL.create("sqlite", database=str(Path(url).expanduser()))
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"not a database URL; known: {_SCHEMES}") from None
    scheme = parsed.drivername.partition("+")[0]
    if scheme not in _DRIVERS:
        raise ConfigError(f"no such kind of database: {parsed.drivername!r}; known: {_SCHEMES}")
    if scheme == "sqlite" and not parsed.database:
        raise ConfigError("a SQLite database needs a file: sqlite:///FILE")
    return parsed.set(drivername=_DRIVERS[scheme])


def reason_of(error: BaseException) -> str:
    """The driver's own words, without SQL and parameters: they may hold what must not be printed."""
    return str(getattr(error, "orig", None) or error).strip() or type(error).__name__


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        return create_engine(
            url,
            pool_pre_ping=True,
            pool_size=2,
            max_overflow=4,
            connect_args={"connect_timeout": BUSY_SECONDS},
        )
    path = Path(str(url.database))
    _make_private(path)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by sqlite3's guesses
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("hayai_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _make_private(path: Path) -> None:
    """An empty file that only its owner may read, where there is none yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise ConfigError(f"can't open the database {path}: {error.strerror or error}") from None


def _revision(connection: Connection) -> int:
    return int(connection.execute(select(meta.c.value).where(meta.c.name == "revision")).scalar_one())


def _touch(connection: Connection) -> None:
    """Tell running servers that tenants or keys have changed."""
    query = select(meta.c.value).where(meta.c.name == "revision").with_for_update()
    new = int(connection.execute(query).scalar_one()) + 1
    connection.execute(update(meta).where(meta.c.name == "revision").values(value=str(new)))


def _find_tenant(connection: Connection, name: str) -> Tenant:
    row = connection.execute(select(tenants).where(tenants.c.name == name)).mappings().one_or_none()
    if row is None:
        known = connection.execute(select(tenants.c.name).order_by(tenants.c.name).limit(20)).scalars().all()
        raise ConfigError(f"no such tenant: {name!r}; there is: {', '.join(known) or 'none'}")
    return _tenant(dict(row))


def _tenant(row: Mapping[str, Any]) -> Tenant:
    limits = Limits(**{field: row[field] for field in Limits.__dataclass_fields__})
    models = None if row["models"] is None else frozenset(row["models"].split("\n"))
    return Tenant(row["name"], limits, row["priority"], models)


def _tenant_row(tenant: Tenant) -> dict[str, Any]:
    models = None if tenant.models is None else "\n".join(sorted(tenant.models))
    return {**asdict(tenant.limits), "priority": tenant.priority, "models": models}

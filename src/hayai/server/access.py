"""Who asks, what they may, and what it costs: keys, tenants, quotas and the ledger behind one small face.

A route calls `authenticate` before it reads a body, `admit` before it generates, and settles the ticket once
the answer is over. An open server (no keys) takes the same path; each step is then a constant.

Tenants and keys are held in memory: no request waits for the database to know who it is. The ledger's thread
looks twice a second whether they have changed, so a revoked key is refused within about a second.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hayai.config import ServerConfig
from hayai.engine.request import BATCH, INTERACTIVE
from hayai.errors import ConfigError
from hayai.server.errors import ApiError
from hayai.server.quotas import Quotas, Reservation
from hayai.server.tenants import Priority, Snapshot, digest_of, key_id_of

if TYPE_CHECKING:
    from hayai.server.ledger import Entry, Ledger
    from hayai.server.storage import Database

OPEN_TENANT = "local"
"""The tenant of everybody on a server without keys."""
FLUSH_SECONDS = 2.0
"""An answer waits no longer than this for its row, which is then written when the database is back."""
REFRESH_SECONDS = 5.0
"""How often spending of other servers on the same database is read."""

PRIORITIES: Mapping[Priority, int] = {"interactive": INTERACTIVE, "batch": BATCH}

_log = logging.getLogger("hayai.server")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Principal:
    """Who sent a request.

    priority: see engine.request.EngineRequest. cache_salt: cached prefixes are shared only inside it. models:
    the names that the tenant may ask for; None = all.
    """

    tenant: str = OPEN_TENANT
    key_id: str | None = None
    priority: int = INTERACTIVE
    cache_salt: str = ""
    models: frozenset[str] | None = None


EVERYBODY = Principal()


class Ticket:
    """A request that was let in. `headers` (x-ratelimit-*, empty without limits) belong in its response."""

    def __init__(
        self, access: Access, entry: Entry | None = None, reservation: Reservation | None = None
    ) -> None:
        self.headers: Mapping[str, str] = reservation.headers if reservation else {}
        self._access = access
        self._entry = entry
        self._reservation = reservation
        self._began = time.monotonic()
        self._settled = False
        self._done: Future[None] | None = None

    def settle(
        self,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        status: str,
        first_token_ms: float | None = None,
    ) -> None:
        """What the client got in the end. Quick and never raises; only the first call counts.

        Tokens are those of all choices, completion tokens those that were handed to the client. status: 'ok',
        'cancelled' (the client left), 'timeout', 'aborted' (the server closed), 'error'.
        """
        if self._settled:
            return
        self._settled = True
        if self._reservation is not None:
            self._access.quotas.settle(self._reservation, prompt_tokens + completion_tokens)
        if self._entry is not None:
            self._done = self._access.record(
                replace(
                    self._entry,
                    finished=time.time(),
                    prompt_tokens=prompt_tokens,
                    cached_tokens=cached_tokens,
                    completion_tokens=completion_tokens,
                    status=status,
                    duration_ms=1e3 * (time.monotonic() - self._began),
                    first_token_ms=first_token_ms,
                )
            )

    def __del__(self) -> None:
        """A ticket that is dropped (a bug between `admit` and the answer) gives its quota back."""
        if not self._settled:
            self.settle(0, 0, 0, "error")

    async def flushed(self) -> None:
        """Return once the ledger's row is durable; at once where there is no ledger, after FLUSH_SECONDS
        where its database does not answer."""
        if self._done is None or self._done.done():
            return
        done, _ = await asyncio.wait((asyncio.wrap_future(self._done),), timeout=FLUSH_SECONDS)
        if not done:
            _log.error("an answer is sent before its row is in the ledger: the database does not answer")


class Access:
    """The keys, quotas and ledger of one server. database None: everything is free, any key is accepted.

    require_keys: True, False, or None: keys are required from the moment that the database has one (a revoked
    one counts: revoking the last key opens nothing).
    """

    def __init__(self, database: Database | None = None, require_keys: bool | None = None) -> None:
        self.quotas = Quotas()
        self.database = database
        self._require_keys = require_keys
        self._ledger: Ledger | None = None
        self._snapshot: Snapshot | None = None
        self._principals: Mapping[str, Principal] = {}
        self._anonymous = EVERYBODY
        self._refreshed = 0.0
        self._closing = threading.Lock()
        if database is not None:
            # slow: SQLAlchemy, which a server without a database does without
            from hayai.server.ledger import Ledger

            self._load(database)
            self._refresh(database)
            self._ledger = Ledger(database, self._recorded, self._poll)

    @classmethod
    def open(cls) -> Access:
        """For a server without keys and without a ledger."""
        return cls()

    @property
    def keyed(self) -> bool:
        """Whether a request needs a valid key."""
        if self._require_keys is not None:
            return self._require_keys
        return self._snapshot is not None and bool(self._snapshot.keys)

    def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """Who sends these headers (names in lower case, or a case-insensitive mapping): `Authorization:
        Bearer`, `x-api-key` or `api-key`. ApiError 401 where keys are required and none of them is valid."""
        snapshot = self._snapshot
        candidates = _candidates(headers) if snapshot is not None else []
        for candidate in candidates:
            key_id = key_id_of(candidate)
            key = snapshot.keys.get(key_id) if snapshot is not None and key_id is not None else None
            digest = digest_of(candidate) if key_id is not None else _NO_DIGEST
            # also where there is no such key: a guess must not learn from the time that its id exists
            valid = hmac.compare_digest(digest, key.digest if key is not None else _NO_DIGEST)
            if key is None or not valid:
                continue
            if key.revoked is not None:
                raise _unauthorized("this API key has been revoked")
            return self._principals[key.key_id]
        if not self.keyed:
            return self._anonymous
        if any(candidates):
            raise _unauthorized("incorrect API key")
        raise _unauthorized(
            "no API key: send one as `Authorization: Bearer KEY` (or in the header x-api-key or api-key)"
        )

    def principal(self, key_id: str | None) -> Principal | None:
        """Who a key stands for now, for work that outlives its request (batches); None where the key is gone
        or revoked. key_id None: who came without one."""
        if key_id is None:
            return self._anonymous
        key = self._snapshot.keys.get(key_id) if self._snapshot is not None else None
        return None if key is None or key.revoked is not None else self._principals[key_id]

    def admit(
        self,
        principal: Principal,
        *,
        request_id: str,
        endpoint: str,
        model: str,
        num_choices: int = 1,
        prompt_tokens: int = 0,
        max_tokens: int = 0,
    ) -> Ticket:
        """Let a request in, or ApiError 429 with Retry-After (400 where it is too large to ever get in).

        prompt_tokens: of all its prompts; max_tokens: the most per choice. Both are reserved in the tenant's
        quota until the ticket is settled. request_id: unique for ever.
        """
        ledger = self._ledger
        if ledger is None:
            return Ticket(self)
        if not ledger.healthy:
            message = "the ledger's database does not answer; nothing is served that can't be counted"
            raise ApiError(503, message, code="ledger_unavailable", headers={"Retry-After": "5"})
        reservation = self.quotas.admit(principal.tenant, num_choices, prompt_tokens, max_tokens)
        entry = ledger.entry(request_id, principal.tenant, principal.key_id, endpoint, model)
        ledger.write(entry)
        return Ticket(self, entry, reservation)

    def record(self, entry: Entry) -> Future[None] | None:
        """Close a row of the ledger (a ticket does it). The future is done once it is durable."""
        ledger = self._ledger
        if ledger is None:
            _log.error("request %s ended after the ledger was closed", entry.request_id)
            return None
        return ledger.write(entry)

    def limits_of(self, principal: Principal) -> dict[str, Any]:
        """The tenant's limits by name, and its priority; None = no limit."""
        tenant = self._snapshot.tenants.get(principal.tenant) if self._snapshot else None
        return {} if tenant is None else {**vars(tenant.limits), "priority": tenant.priority}

    def usage_of(
        self, principal: Principal, since: str | None, until: str | None
    ) -> Callable[[], dict[str, Any]] | None:
        """A call that reads what the tenant has used, by model, and its limits; None without a database.

        since, until: ISO 8601, UTC; default: this month. ConfigError where they are no times. The call waits
        for the database: it is for another thread.
        """
        if self.database is None:
            return None
        # slow: SQLAlchemy, which a server without a database does without
        from hayai.server.reports import iso_time, parse_time, usage_sums

        database, tenant, month = self.database, principal.tenant, self.quotas.month()
        begin = parse_time(f"{month}-01" if since is None else since)
        end = None if until is None else parse_time(until)

        def read() -> dict[str, Any]:
            return {
                "object": "usage",
                "tenant": tenant,
                "since": iso_time(begin),
                "until": iso_time(end),
                "data": usage_sums(database, "model", tenant, begin, end),
                "month": {"month": month, "tokens": database.spent(month, [tenant])[tenant]},
                "limits": self.limits_of(principal),
            }

        return read

    def close(self) -> None:
        """Write what is left of the ledger. All tickets are settled by now; a second call does nothing."""
        with self._closing:
            ledger, self._ledger = self._ledger, None
            if ledger is not None:
                ledger.close()
            if self.database is not None:
                self.database.close()

    # What follows runs on the ledger's thread (and in the constructor)

    def _load(self, database: Database) -> None:
        snapshot = database.snapshot()
        self.quotas.configure(snapshot.tenants)
        principals = {}
        for key in snapshot.keys.values():
            tenant = snapshot.tenants[key.tenant]
            salt = snapshot.cache_salt(tenant.name)
            principals[key.key_id] = Principal(
                tenant.name, key.key_id, PRIORITIES[tenant.priority], salt, tenant.models
            )
        # first who they are, then that they exist: authenticate reads in the other order
        self._principals = principals
        self._snapshot = snapshot

    def _recorded(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.quotas.recorded(entry.tenant, entry.month, entry.prompt_tokens + entry.completion_tokens)

    def _poll(self) -> None:
        database, snapshot = self.database, self._snapshot
        assert database is not None and snapshot is not None
        if database.revision() != snapshot.revision:
            self._load(database)
        if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._refresh(database)

    def _refresh(self, database: Database) -> None:
        self._refreshed = time.monotonic()
        month = self.quotas.month()
        tenants = self.quotas.budgeted()
        if tenants:
            self.quotas.set_spent(month, database.spent(month, tenants))


def open_access(config: ServerConfig) -> Access:
    """What the configuration asks for: an open server without a database, else keys, quotas and ledger.

    ConfigError where the database can't be opened, or keys are required and there is none to hold them.
    """
    if config.database is None:
        if config.require_keys:
            raise ConfigError(
                "keys are required, but there is no database with keys; make one: hayai keys create"
            )
        return Access.open()
    # slow: SQLAlchemy, which a server without a database does without
    from hayai.server.storage import Database

    return Access(Database(config.database), config.require_keys)


def _candidates(headers: Mapping[str, str]) -> list[str]:
    """What the headers offer as keys, in the order of preference."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    found = [token.strip()] if scheme.lower() == "bearer" else []
    return found + [headers[name].strip() for name in ("x-api-key", "api-key") if name in headers]


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

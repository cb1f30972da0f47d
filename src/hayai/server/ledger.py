"""The usage ledger: exactly one row per request, written in batches by one thread.

A row is written when a request is let in ('open') and closed when it is settled, before the last bytes of its
answer are sent. So, whenever the process is killed:
* every answer that a client got completely has its closed row, with its tokens: nothing falls short;
* a request that was running stays 'open', costs nothing, and is marked 'lost' by the next server that sees
  its process dead;
* closing is one transaction for the row and the sums of its month, and a row is closed once: nothing is
  counted twice, also when a commit's answer was lost and the batch is written again.
The one thing that no ledger can know is whether last bytes that were handed to the network arrived.

When the database fails the thread tries again until it works; rows wait in memory, and once `MAX_PENDING` of
them do, `healthy` is false and no request is let in: what can't be counted is not given away.
"""

from __future__ import annotations

import logging
import os
import platform
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, delete, not_, or_, select, update
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError

from hayai.server.quotas import month_of
from hayai.server.storage import Database, months, processes, reason_of, requests

POLL_SECONDS = 0.5
"""How soon a running server follows a change of tenants and keys."""
SEEN_SECONDS = 10.0
"""How often a server says that it lives."""
DEAD_SECONDS = 60.0
"""A server on another machine that has not said so for this long is dead."""
MAX_PENDING = 10_000
MAX_BATCH = 500
CLOSE_SECONDS = 10.0

Item = tuple["Entry", "Future[None] | None"]

_log = logging.getLogger("hayai.server")
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_SUMS = ("num_requests", *_COUNTS)

UNSETTLED = or_(requests.c.status == "open", requests.c.status == "lost")
SETTLED = select(requests.c.request_id).where(
    requests.c.request_id.in_(bindparam("ids", expanding=True)), not_(UNSETTLED)
)
"""Which of `ids` are closed."""


@dataclass(frozen=True)
class Entry:
    """A row as it is written. finished None: the request is running. Times: seconds since 1970, UTC."""

    request_id: str
    tenant: str
    key_id: str | None
    endpoint: str
    model: str
    started: float
    finished: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    status: str = "open"
    duration_ms: float | None = None
    first_token_ms: float | None = None

    @property
    def month(self) -> str:
        """The month whose sums it counts in: that of its start."""
        return month_of(self.started)

    def row(self, process: str) -> dict[str, Any]:
        """As the table wants it; text that a database refuses (NUL, too long) is made fit."""
        row = {**vars(self), "process": process}
        for name in ("request_id", "endpoint", "model"):
            row[name] = row[name].encode("utf-8", "replace").decode().replace("\0", "\ufffd")[:200]
        row["status"] = row["status"][:32]
        return row


class Ledger:
    """The thread that writes.

    on_recorded is called with closed entries once they are on record, on_poll about every POLL_SECONDS; both
    on the thread.
    """

    def __init__(
        self,
        database: Database,
        on_recorded: Callable[[Sequence[Entry]], None] = lambda entries: None,
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.database = database
        self.process = uuid.uuid4().hex
        self._statements = _Statements(database)
        self._on_recorded = on_recorded
        self._on_poll = on_poll
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._polled = self._seen = 0.0
        self._report()
        self._thread = threading.Thread(target=self._run, name="hayai-ledger", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether rows are written as fast as they come."""
        return self._queue.qsize() < MAX_PENDING

    def entry(self, request_id: str, tenant: str, key_id: str | None, endpoint: str, model: str) -> Entry:
        """The row of a request that begins now; not yet written."""
        return Entry(request_id, tenant, key_id, endpoint, model, time.time())

    def write(self, entry: Entry) -> Future[None] | None:
        """Put an entry on record soon; the future of a closed one is done when it is durable."""
        done: Future[None] | None = None
        if entry.finished is not None:
            done = Future()
            done.set_running_or_notify_cancel()  # who waits for it may be cancelled; the entry may not
        self._queue.put((entry, done))
        return done

    def close(self) -> None:
        """Write what is waiting; open rows of this process become 'lost'. At most CLOSE_SECONDS."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.error("the ledger's database did not answer: up to %d rows are lost", self._queue.qsize())

    def _run(self) -> None:
        while True:
            batch = self._take()
            if batch:
                self._write(batch)
            elif self._stopping.is_set():
                break
            if time.monotonic() - self._polled >= POLL_SECONDS:
                self._poll()
        try:
            with self.database.writing() as connection:
                _mark_lost(connection, [self.process])
        except SQLAlchemyError as error:
            _log.error("the ledger was not closed: %s", reason_of(error))

    def _take(self) -> list[Item]:
        """What waits, in order; nothing after POLL_SECONDS, or when the thread has been told to stop."""
        batch: list[Item] = []
        with suppress(queue.Empty):
            item = self._queue.get(timeout=0.001 if self._stopping.is_set() else POLL_SECONDS)
            while item is not None:
                batch.append(item)
                if len(batch) == MAX_BATCH:
                    break
                item = self._queue.get_nowait()
        return batch

    def _write(self, batch: Sequence[Item]) -> None:
        """Write a batch, however long it takes; while stopping, a few times only."""
        entries = [entry for entry, _ in batch]
        attempt = 0
        while True:
            try:
                self._record(entries)
                break
            except (DataError, IntegrityError, ProgrammingError) as error:
                # the database refuses a row, and the others must not wait for it
                if len(batch) == 1:
                    _log.error("the ledger refuses request %s: %s", entries[0].request_id, reason_of(error))
                    break
                for item in batch:
                    self._write([item])
                return
            except SQLAlchemyError as error:  # away, locked, full: try again
                attempt += 1
                if attempt == 1:
                    _log.error("the ledger's database fails, trying again: %s", reason_of(error))
                if self._stopping.is_set() and attempt > 5:
                    _log.error("%d rows of the ledger were not written", len(entries))
                    return
                time.sleep(min(2.0, 0.02 * 2**attempt))
        self._on_recorded([entry for entry in entries if entry.finished is not None])
        for _, done in batch:
            if done is not None:
                done.set_result(None)

    def _record(self, entries: Sequence[Entry]) -> None:
        """One transaction; entries that are on record already change nothing."""
        closed = {e.request_id: e for e in entries if e.finished is not None}
        opened = [e.row(self.process) for e in entries if e.finished is None and e.request_id not in closed]
        with self.database.writing() as connection:
            if opened:
                connection.execute(self._statements.open, opened)
            if closed:
                for request_id in connection.execute(SETTLED, {"ids": list(closed)}).scalars():
                    del closed[request_id]
            if closed:
                self._close_rows(connection, closed.values())

    def _close_rows(self, connection: Connection, entries: Iterable[Entry]) -> None:
        rows = [entry.row(self.process) for entry in entries]
        connection.execute(self._statements.close, rows)
        sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for row in rows:
            totals = sums[row["tenant"], month_of(row["started"])]
            for i, amount in enumerate((1, *(row[name] for name in _COUNTS))):
                totals[i] += amount
        # in order, so that two servers can't wait for each other's rows
        added = [
            {"tenant": tenant, "month": month, **dict(zip(_SUMS, totals, strict=True))}
            for (tenant, month), totals in sorted(sums.items())
        ]
        connection.execute(self._statements.add, added)

    def _poll(self) -> None:
        self._polled = time.monotonic()
        try:
            if self._polled - self._seen >= SEEN_SECONDS:
                self._report()
            self._on_poll()
        except Exception as error:  # whatever it is, rows must be written on
            _log.error("the ledger's database fails: %s", reason_of(error))

    def _report(self) -> None:
        """Say that this server lives, and mark what dead ones have left open."""
        self._seen = time.monotonic()
        mine = {"process": self.process, **identity(), "seen": time.time()}
        with self.database.writing() as connection:
            report = self.database.upsert(processes)
            report = report.on_conflict_do_update(index_elements=["process"], set_={"seen": mine["seen"]})
            connection.execute(report, mine)
            others = connection.execute(select(processes).where(processes.c.process != self.process))
            dead = [row.process for row in others if not _alive(row, mine)]
            if dead:
                _mark_lost(connection, dead)


class _Statements:
    """What is run for every request, put together once: that takes longer than to run it."""

    def __init__(self, database: Database) -> None:
        self.open = database.upsert(requests).on_conflict_do_nothing()
        close = database.upsert(requests)
        new = {c.name: close.excluded[c.name] for c in requests.c if c.name != "request_id"}
        self.close = close.on_conflict_do_update(index_elements=["request_id"], set_=new, where=UNSETTLED)
        add = database.upsert(months)
        sums = {name: months.c[name] + add.excluded[name] for name in _SUMS}
        self.add = add.on_conflict_do_update(index_elements=["tenant", "month"], set_=sums)


def _mark_lost(connection: Connection, dead: Sequence[str]) -> None:
    ended = update(requests).where(requests.c.process.in_(dead), requests.c.status == "open")
    connection.execute(ended.values(status="lost", finished=time.time()))
    connection.execute(delete(processes).where(processes.c.process.in_(dead)))


def identity() -> dict[str, Any]:
    """This process: its machine (the boot, and the space that ids are unique in), its id, its birth."""
    pid = os.getpid()
    return {"machine": _machine(), "pid": pid, "born": _born(pid)}


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return platform.node()


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks; '' where it does not run or nobody says."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(row: Any, mine: dict[str, Any]) -> bool:
    """Whether another server's process runs. On this machine that is looked up; elsewhere it has to have said
    so lately. A server that is wrongly taken for dead does no harm: it closes its rows all the same."""
    if row.machine == mine["machine"] and mine["born"]:
        return bool(_born(row.pid) == row.born)
    return bool(mine["seen"] - row.seen < DEAD_SECONDS)

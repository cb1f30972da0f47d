"""Files and batches on disk: a folder of contents beside an SQLite database of their own.

What makes a batch survive `kill -9` and a power cut: a line's result is one row whose key is (batch, line),
so a line has one result or none, never two; rows are committed with synchronous=FULL before the batch counts
them. When every line has its row, the output files are written from the rows in the order of the input,
synced and renamed into place, and only then one transaction names them in the batch and drops the rows. A
process that dies anywhere in between leaves a state from which the same steps lead to the same files.

All methods block; callers on an event loop use a thread. One process at a time runs the batches of a folder
(`claim`); others may serve its files.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from hayai.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: no lock, so the operator sees to it that a folder has one server
    fcntl = None  # type: ignore[assignment]

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, purpose TEXT NOT NULL, filename TEXT NOT NULL,
  bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, created_at, id);
CREATE TABLE IF NOT EXISTS batches (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_at INTEGER NOT NULL, status TEXT NOT NULL,
  total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
  prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
  completion_tokens INTEGER NOT NULL DEFAULT 0, record TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, created_at, id);
CREATE TABLE IF NOT EXISTS results (
  batch_id TEXT NOT NULL, line INTEGER NOT NULL, ok INTEGER NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (batch_id, line));
"""
VERSION = 2

SWEEP_SECONDS = 3600
"""Age from which content without a file is nobody's."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
FINAL = ("completed", "failed", "expired", "cancelled")
"""States that a batch goes through, and those that it stays in."""


class StorageFull(Exception):
    """A tenant has no room for another file: it has `number` files of `size` bytes."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__(f"{number} files, {size} bytes")
        self.number = number
        self.size = size


@dataclass(frozen=True)
class StoredFile:
    """A file's card. Times: Unix seconds."""

    id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None


@dataclass(frozen=True)
class Batch:
    """A batch's card. key_id: whose work it is. times: when it came into each state. errors: those of
    validation: (code, message, param, line from 0). attempts: line -> how often a server that stopped has cut
    it off; lines that never were are not listed. engine_failures: the same, of the engine failing under it.
    outcome: the final state that a batch in 'finalizing' is on its way to."""

    id: str
    tenant: str
    created_at: int
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: int
    status: str = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_expires_after: int | None = None
    model: str | None = None
    times: Mapping[str, int] = field(default_factory=dict)
    errors: tuple[tuple[str, str, str | None, int | None], ...] = ()
    metadata: Mapping[str, str] | None = None
    key_id: str | None = None
    attempts: Mapping[str, int] = field(default_factory=dict)
    engine_failures: Mapping[str, int] = field(default_factory=dict)
    outcome: str | None = None

    @property
    def final(self) -> bool:
        return self.status in FINAL


@dataclass(frozen=True)
class Result:
    """What one input line came to: the line of the output file (ok) or of the error file."""

    line: int
    ok: bool
    data: bytes
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


_COLUMNS = (
    "id",
    "tenant",
    "created_at",
    "status",
    "total",
    "completed",
    "failed",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)
"""Of a batch: what is searched or counted in SQL. Everything else is in `record`, as JSON."""


class BatchStore:
    """The files and batches of one folder. ConfigError where it can't be used. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contents = folder / "files"
        self._lock = threading.RLock()
        self._claimed: BinaryIO | None = None
        try:
            self._contents.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                folder / "batches.sqlite", timeout=10, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise ConfigError(
                    f"{folder} was written by a newer Hayai (version {version}, ours {VERSION})"
                )
            self._db.executescript(SCHEMA)
            self._db.execute(f"PRAGMA user_version={VERSION}")
            self._db.commit()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"can't keep files and batches in {folder}: {error}") from None

    def close(self) -> None:
        with self._lock:
            self._db.close()
            if self._claimed is not None:
                self._claimed.close()
                self._claimed = None

    def claim(self) -> bool:
        """Whether this process is the one that runs the batches of the folder (until it ends)."""
        if self._claimed is None:
            handle = open(self.folder / "batches.lock", "ab")  # noqa: SIM115  (held until close)
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.close()
                return False
            self._claimed = handle
            self._sweep()
        return True

    def _sweep(self) -> None:
        """Drop contents that no file names and nobody writes: what a process left that died over them."""
        with self._lock:
            known = {row["id"] for row in self._db.execute("SELECT id FROM files")}
        for path in self._contents.iterdir():
            if path.name not in known and time.time() - path.stat().st_mtime > SWEEP_SECONDS:
                path.unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    def _all(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # ------------------------------------------------------------------ files

    def new_content(self) -> tuple[str, Path]:
        """A new file's id, and where its content is to be written before `add_file`."""
        file_id = f"file-{secrets.token_hex(16)}"
        return file_id, self._contents / f"{file_id}.part"

    def add_file(self, file: StoredFile, max_files: int | None = None, max_bytes: int | None = None) -> None:
        """The content at `new_content`'s path becomes a file: synced, renamed, entered.

        max_files, max_bytes: what the tenant may have with it. Where that is too little: StorageFull, and the
        content is gone. Checked in the transaction that enters it, so that parallel uploads count.
        """
        path = self.content_path(file.id)
        part = path.with_name(f"{file.id}.part")
        sync_file(part)
        os.replace(part, path)
        sync_folder(self._contents)
        try:
            with self._transaction() as db:
                number, size = self.usage(file.tenant)
                over = max_files is not None and number + 1 > max_files
                if over or (max_bytes is not None and size + file.bytes > max_bytes):
                    raise StorageFull(number, size)
                _insert_file(db, file)
        except StorageFull:
            path.unlink(missing_ok=True)
            raise

    def content_path(self, file_id: str) -> Path:
        """Where a file's content lies. The id is one of ours."""
        return self._contents / file_id

    def file(self, tenant: str, file_id: str) -> StoredFile | None:
        """A tenant's file; None where there is none of that id, or it is another's, or it expired."""
        rows = self._all("SELECT * FROM files WHERE id = ? AND tenant = ?", file_id, tenant)
        found = [StoredFile(**row) for row in rows]
        return found[0] if found and not _expired(found[0]) else None

    def files(
        self,
        tenant: str,
        limit: int,
        after: str | None,
        purpose: str | None = None,
        newest_first: bool = True,
    ) -> list[StoredFile]:
        """Up to `limit` of a tenant's files, those behind the file `after`."""
        rows = self._page("files", tenant, limit, after, newest_first, purpose)
        return [StoredFile(**row) for row in rows]

    def usage(self, tenant: str) -> tuple[int, int]:
        """How many files a tenant has, and their bytes."""
        row = self._all(
            "SELECT count(*) AS n, coalesce(sum(bytes), 0) AS b FROM files WHERE tenant = ?", tenant
        )[0]
        return row["n"], row["b"]

    def delete_file(self, file_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.content_path(file_id).unlink(missing_ok=True)

    def expired_files(self, now: float) -> list[str]:
        """Ids of files whose time is over."""
        return [row["id"] for row in self._all("SELECT id FROM files WHERE expires_at <= ?", now)]

    def _page(
        self,
        table: str,
        tenant: str,
        limit: int,
        after: str | None,
        newest_first: bool,
        purpose: str | None = None,
    ) -> list[sqlite3.Row]:
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        where = "tenant = ?"
        values: list[object] = [tenant]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        if after is not None:
            where += f" AND (created_at, rowid) {sign} (SELECT created_at, rowid FROM {table} WHERE id = ?)"
            values.append(after)
        if table == "files":
            where, values = f"{where} AND coalesce(expires_at, 1e18) > ?", [*values, time.time()]
        where += f" ORDER BY created_at {order}, rowid {order} LIMIT {int(limit)}"
        return self._all(f"SELECT * FROM {table} WHERE {where}", *values)

    # ------------------------------------------------------------------ batches

    def add_batch(self, batch: Batch) -> None:
        with self._transaction() as db:
            values = [getattr(batch, name) for name in _COLUMNS]
            marks = ", ".join("?" * (len(_COLUMNS) + 1))
            names = ", ".join((*_COLUMNS, "record"))
            db.execute(f"INSERT INTO batches ({names}) VALUES ({marks})", [*values, _record(batch)])

    def batch(self, tenant: str, batch_id: str) -> Batch | None:
        """A tenant's batch; None where there is none of that id, or it is another's."""
        rows = self._all("SELECT * FROM batches WHERE id = ? AND tenant = ?", batch_id, tenant)
        return _batch(rows[0]) if rows else None

    def batches(self, tenant: str, limit: int, after: str | None) -> list[Batch]:
        """Up to `limit` of a tenant's batches, newest first, those behind the batch `after`."""
        return [_batch(row) for row in self._page("batches", tenant, limit, after, True)]

    def unfinished(self) -> list[Batch]:
        """Batches of all tenants that are not in a final state, oldest first."""
        marks = ", ".join("?" * len(FINAL))
        query = f"SELECT * FROM batches WHERE status NOT IN ({marks}) ORDER BY created_at, rowid"
        return [_batch(row) for row in self._all(query, *FINAL)]

    def update_batch(self, batch_id: str, expected: Iterable[str], **changes: Any) -> Batch | None:
        """Change a batch that is in one of the states `expected`; None (and no change) where it is not.

        A change of `status` stamps the time of the new state.
        """
        with self._transaction() as db:
            row = db.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
            if row is None or row["status"] not in expected:
                return None
            batch = _changed(_batch(row), changes)
            _write_batch(db, batch)
            return batch

    def done_lines(self, batch_id: str) -> set[int]:
        """Lines that have their result."""
        return {row["line"] for row in self._all("SELECT line FROM results WHERE batch_id = ?", batch_id)}

    def add_results(self, batch_id: str, results: Iterable[Result]) -> None:
        """Enter results and count them. One that is there already stays as it is and counts once."""
        with self._transaction() as db:
            for result in results:
                row = (batch_id, result.line, int(result.ok), result.data)
                new = db.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", row).rowcount
                if new:
                    db.execute(
                        "UPDATE batches SET completed = completed + ?, failed = failed + ?, prompt_tokens = "
                        "prompt_tokens + ?, cached_tokens = cached_tokens + ?, completion_tokens = "
                        "completion_tokens + ? WHERE id = ?",
                        (
                            int(result.ok),
                            int(not result.ok),
                            result.prompt_tokens,
                            result.cached_tokens,
                            result.completion_tokens,
                            batch_id,
                        ),
                    )

    def finalize(self, batch: Batch, status: str) -> Batch:
        """Write the output and error files from the results, and put the batch into its final state.

        May be repeated after a crash: the files' ids come from the batch's, their bytes from the rows.
        """
        now = int(time.time())
        expires = None if batch.output_expires_after is None else now + batch.output_expires_after
        made: dict[str, StoredFile] = {}
        for kind, ok in (("output", 1), ("error", 0)):
            file_id = f"file-{batch.id.removeprefix('batch_')}-{kind}"
            size = self._export(batch.id, ok, file_id)
            if size:
                filename = f"{batch.id}_{kind}.jsonl"
                made[kind] = StoredFile(file_id, batch.tenant, "batch_output", filename, size, now, expires)
        sync_folder(self._contents)
        with self._transaction() as db:
            row = db.execute("SELECT * FROM batches WHERE id = ?", (batch.id,)).fetchone()
            changes: dict[str, Any] = {"status": status}
            for kind, file in made.items():
                _insert_file(db, file)
                changes[f"{kind}_file_id"] = file.id
            batch = _changed(_batch(row), changes)
            _write_batch(db, batch)
            db.execute("DELETE FROM results WHERE batch_id = ?", (batch.id,))
        return batch

    def _export(self, batch_id: str, ok: int, file_id: str) -> int:
        """Write the lines of one kind in the order of the input, whole or not at all; their bytes."""
        path = self.content_path(file_id)
        part = path.with_name(f"{file_id}.part")
        size, line = 0, -1
        with open(part, "wb") as out:
            while True:  # in pages, so that other users of the database get their turn
                rows = self._all(
                    "SELECT line, data FROM results WHERE batch_id = ? AND ok = ? AND line > ? "
                    "ORDER BY line LIMIT 256",
                    batch_id,
                    ok,
                    line,
                )
                if not rows:
                    break
                for row in rows:
                    size += out.write(row["data"] + b"\n")
                line = rows[-1]["line"]
            out.flush()
            os.fsync(out.fileno())
        if size:
            os.replace(part, path)
        else:
            part.unlink()
        return size

    def lines(self, file_id: str, max_bytes: int) -> Iterator[tuple[int, bytes]]:
        """(number from 0, bytes without the line end) of a file's lines that are not blank. A line that is
        longer than `max_bytes` comes in pieces of more than that."""
        with open(self.content_path(file_id), "rb") as content:
            number = 0
            while raw := content.readline(max_bytes + 2):
                line = raw.strip()
                if number == 0:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line:
                    yield number, line
                number += 1


def _insert_file(db: sqlite3.Connection, file: StoredFile) -> None:
    values = (file.id, file.tenant, file.purpose, file.filename, file.bytes, file.created_at, file.expires_at)
    db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _expired(file: StoredFile) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()


def _record(batch: Batch) -> str:
    rest = {k: v for k, v in vars(batch).items() if k not in _COLUMNS}
    return json.dumps(rest)


def _batch(row: sqlite3.Row) -> Batch:
    rest = json.loads(row["record"])
    rest["errors"] = tuple(tuple(e) for e in rest["errors"])
    return Batch(**{name: row[name] for name in _COLUMNS}, **rest)


def _changed(batch: Batch, changes: Mapping[str, Any]) -> Batch:
    status = changes.get("status", batch.status)
    times = dict(batch.times)
    if status != batch.status:
        times[status] = int(time.time())
    return replace(batch, **(dict(changes) | {"times": times}))


def _write_batch(db: sqlite3.Connection, batch: Batch) -> None:
    db.execute(
        "UPDATE batches SET status = ?, total = ?, record = ? WHERE id = ?",
        (batch.status, batch.total, _record(batch), batch.id),
    )


def sync_file(path: Path) -> None:
    """Have a file's bytes on the disk."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk (where folders can be opened: not on Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

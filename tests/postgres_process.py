"""A real PostgreSQL server for tests, and the fixture that runs a test on it and on SQLite.

The binaries are looked for on PATH, where Debian puts them, and in the PyPI package `pgserver`. PostgreSQL
refuses to run as root, so root starts it as another user. Use: pytest_plugins = ["postgres_process"].
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

PASSWORD = "s3cret-word"
_USERS = ("postgres", "nobody")


def find_binaries() -> Path | None:
    """The folder with initdb and postgres, the newest version where there are several."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).parent] if on_path else []
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(debian, key=lambda p: float(re.sub(r"[^\d.]", "", p.parent.name) or 0), reverse=True)
    package = importlib.util.find_spec("pgserver")
    for root in (package.submodule_search_locations or ()) if package else ():
        folders.append(Path(root) / "pginstall" / "bin")
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


@dataclass
class Postgres:
    """A running server; `url` is that of its maintenance database."""

    folder: Path
    binaries: Path
    port: int
    user: dict[str, object]
    process: subprocess.Popen[bytes] | None = None

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://hayai:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        options = ["-p", str(self.port), "-k", str(self.folder), "-c", "listen_addresses=127.0.0.1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(self.binaries / "postgres"),
                    "-D",
                    str(self.folder / "data"),
                    "-c",
                    "fsync=off",
                    *options,
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self.user,  # type: ignore[call-overload]
            )
        end = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < end, "PostgreSQL does not answer"
                time.sleep(0.05)

    def stop(self) -> None:
        """Fast shutdown: connections are cut, nothing is lost."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)

    def new_database(self) -> str:
        name = "t" + secrets.token_hex(6)
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return self.url(name)


def _prepare(folder: Path, binaries: Path) -> Postgres:
    user: dict[str, object] = {}
    if os.geteuid() == 0:
        entry = next(e for e in pwd.getpwall() if e.pw_name in _USERS)
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        command = [str(binaries / "postgres"), "--version"]
        try:
            subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]
        except PermissionError:  # a package in a folder of root's own
            shutil.copytree(binaries.parent, folder / "install")
            binaries = folder / "install" / "bin"
    (folder / "password").write_text(PASSWORD)
    os.chmod(folder / "password", 0o644)
    subprocess.run(
        [
            *(str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "hayai", "-A", "scram-sha-256"),
            *("--pwfile", str(folder / "password"), "-E", "UTF8", "--locale=C", "--no-sync"),
        ],
        check=True,
        capture_output=True,
        cwd=folder,
        **user,  # type: ignore[call-overload]
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return Postgres(folder, binaries, port, user)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(
            "no PostgreSQL: neither initdb on PATH, nor in its usual folder, nor the package pgserver"
        )
    with tempfile.TemporaryDirectory(prefix="hayai-pg-") as name:
        server = _prepare(Path(name), binaries)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/hayai.db"
    new_database: Callable[[], str] = request.getfixturevalue("postgres").new_database
    return new_database()

"""What soak and faults share: a server process, a client that can misbehave, the ledger, the report."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chat_model import write_chat_model
from hayai.config import read_environment
from hayai.weights.default_model import default_model_path

# ---------------------------------------------------------------- the server


@dataclass
class Server:
    """`hayai serve` in a process of its own."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def rss(self) -> int:
        """Resident bytes (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)
        assert found, status
        return int(found[1]) * 1024

    def scrape(self) -> dict[str, float]:
        """/metrics as name{labels} -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit code and what was logged."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        return code, self.log.read_text()


def start_server(model: Path, folder: Path, *options: str) -> Server:
    """A server whose state is in `folder`, once it listens."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "hayai.cli.main", "serve", "--port", "0", "--model", str(model)]
    command += ["--state-dir", str(folder), "--database", str(folder / "hayai.db"), *options]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}  # as deploy/ has it
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(rb"listening on http://([\d.]+):(\d+)", line)
        if found:
            return Server(process, found[1].decode(), int(found[2]), log)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


@contextmanager
def server_of(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """As `start_server`; killed at the end if it still runs."""
    server = start_server(model, folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


def tiny_model(folder: Path) -> Path:
    """Two random layers with the default model's vocabulary: the server is tested, not the kernels."""
    default = default_model_path(read_environment().home)
    if not default.exists():
        raise SystemExit(f"the default model is missing: {default}; run `make model`")
    return write_chat_model(default, folder / "tiny-chat.gguf")


# ---------------------------------------------------------------- a client


@dataclass
class Reply:
    """What a client got. status 0: no answer; complete: the last byte of the answer has come."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    seconds: float = 0.0
    first: float = 0.0

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    def events(self) -> list[dict[str, Any]]:
        """The JSON events of a stream that came whole."""
        found = []
        for line in self.body.split(b"\n"):
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                with suppress(json.JSONDecodeError):
                    found.append(json.loads(line[6:]))
        return found

    def usage(self) -> tuple[int, int] | None:
        """(prompt, completion) tokens of a complete answer."""
        bodies = self.events() if self.body.startswith(b"data: ") else [json.loads(self.body)]
        found = [b["usage"] for b in bodies if b.get("usage")]
        return (found[-1]["prompt_tokens"], found[-1]["completion_tokens"]) if found else None


@dataclass(frozen=True)
class Manners:
    """How a client behaves: it leaves after `leave_after` bytes of the answer, sends only `send` bytes of its
    request, waits `pause` seconds between small reads."""

    leave_after: int | None = None
    send: int | None = None
    pause: float = 0.0


POLITE = Manners()


def request_bytes(path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", "connection: close"]
    lines += [f"content-length: {len(body)}", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


async def send(server: Server, raw: bytes, manners: Manners = POLITE) -> Reply:
    """Send one request on a connection of its own and read the answer, as well as the manners allow."""
    reply = Reply()
    began = time.monotonic()
    limit = 2048 if manners.pause else 1 << 16
    try:
        reader, writer = await asyncio.open_connection(server.host, server.port, limit=limit)
    except OSError:
        return reply
    try:
        writer.write(raw if manners.send is None else raw[: manners.send])
        await writer.drain()
        if manners.send is not None:
            return reply
        data = b""
        while manners.leave_after is None or len(data) < manners.leave_after:
            part = await reader.read(512 if manners.pause else 1 << 16)
            if not part:
                break
            if not reply.first and b"\r\n\r\n" in data + part:
                reply.first = time.monotonic() - began
            data += part
            if manners.pause:
                await asyncio.sleep(manners.pause)
        _parse(data, reply)
    except OSError:
        pass
    finally:
        reply.seconds = time.monotonic() - began
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return reply


def _parse(data: bytes, reply: Reply) -> None:
    head, found, rest = data.partition(b"\r\n\r\n")
    if not found:
        return
    first, *lines = head.decode("latin-1").split("\r\n")
    reply.status = int(first.split(" ", 2)[1])
    reply.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    if reply.headers.get("transfer-encoding") != "chunked":
        reply.body = rest
        reply.complete = len(rest) == int(reply.headers.get("content-length", -1))
        return
    body = b""
    while True:
        size, found, rest = rest.partition(b"\r\n")
        if not found:
            break
        length = int(size, 16)
        if length == 0:
            reply.complete = True
            break
        body += rest[:length]
        rest = rest[length + 2 :]
    reply.body = body


# ---------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class LedgerRow:
    request_id: str
    endpoint: str
    status: str
    prompt_tokens: int
    completion_tokens: int


def ledger(folder: Path) -> dict[str, LedgerRow]:
    """Every row by its request's id."""
    query = "SELECT request_id, endpoint, status, prompt_tokens, completion_tokens FROM requests"
    with sqlite3.connect(folder / "hayai.db") as db:
        rows = [LedgerRow(*row) for row in db.execute(query)]
    db.close()
    assert len({row.request_id for row in rows}) == len(rows)
    return {row.request_id: row for row in rows}


def month_sums(folder: Path) -> tuple[int, int, int]:
    """(requests, prompt tokens, completion tokens) that the months add up to."""
    query = "SELECT sum(num_requests), sum(prompt_tokens), sum(completion_tokens) FROM months"
    with sqlite3.connect(folder / "hayai.db") as db:
        row = db.execute(query).fetchone()
    db.close()
    return tuple(value or 0 for value in row)  # type: ignore[return-value]


# ---------------------------------------------------------------- checks


class Checks:
    """Every check with its figures; the exit code says whether all held."""

    def __init__(self) -> None:
        self.failed = 0

    def that(self, holds: bool, what: str, *figures: object) -> None:
        self.failed += not holds
        print(
            f"{'ok  ' if holds else 'FAIL'} {what}{': ' if figures else ''}{', '.join(map(str, figures))}",
            flush=True,
        )

    def code(self) -> int:
        print("all checks hold" if not self.failed else f"{self.failed} checks failed")
        return int(bool(self.failed))


def options(text: str | None) -> argparse.ArgumentParser:
    """What all commands take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn by chance")
    parser.add_argument("--keep", type=Path, help="folder for state and logs (default: a temporary one)")
    return parser


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="hayai-soak-") as folder:
        yield Path(folder)


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def quantile(values: list[float], q: float) -> float:
    """The q-quantile (nearest rank); 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def words(rng: Random, count: int) -> str:
    """Text that no other prompt begins with."""
    return " ".join(f"{rng.randrange(1 << 20):x}" for _ in range(count))

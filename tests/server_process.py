"""Real servers for tests: `hayai serve` as a process, and what an inner one is known by."""

from __future__ import annotations

import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hayai.frontend import Frontend
from hayai_process import COMMAND


@dataclass(frozen=True)
class ServerProcess:
    process: subprocess.Popen[str]
    url: str
    head: str

    def interrupt(self) -> tuple[int, str]:
        """Send Ctrl-C; exit code and what was printed to stderr."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


def start_server(model: Path, *options: str, backend: str = "reference") -> ServerProcess:
    """`hayai serve` on a free port, once it listens."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--model", str(model), "--backend", backend, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    head = ""
    for line in process.stdout:
        head += line
        found = re.search(r"listening on (https?://\S+)", line)
        if found:
            return ServerProcess(process, found[1], head)
    raise AssertionError(f"the server did not start: {process.communicate()[1]}")


@dataclass(frozen=True)
class InnerServer:
    """A server on a thread of this process: its engine can be looked at."""

    frontend: Frontend
    url: str

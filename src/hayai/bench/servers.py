"""HTTP servers as sides: ours and llama-server, each in its own process, stopped when not its turn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hayai.bench.http_client import Event, HttpFailure, StreamResult, get_json, post_stream
from hayai.bench.load_client import Address
from hayai.bench.machine import cpu_seconds, status_kib
from hayai.bench.peers import Pausable, PeerFailure

HOST = "127.0.0.1"
START_SECONDS = 60.0


@dataclass(frozen=True)
class Streamed:
    """One streamed answer. `times` are the arrivals of content chunks, `num_tokens` the server's own count.

    tokens_per_chunk is disclosed beside every figure: with one token per chunk, gaps are token gaps.
    """

    sent: float
    times: tuple[float, ...]
    num_tokens: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def first(self) -> float:
        """Time to first token in seconds."""
        return self.times[0] - self.sent

    @property
    def rate(self) -> float:
        """Decode tokens per second: (n - 1) / (t_last - t_first), n in tokens."""
        return (self.num_tokens - 1) / (self.times[-1] - self.times[0])

    @property
    def tokens_per_chunk(self) -> float:
        return self.num_tokens / len(self.times)


Prompt = Sequence[int] | str
"""Token ids, or a text that the server tokenises."""


@dataclass(frozen=True)
class Dialect(ABC):
    """How a server is asked for a continuation, and how it answers. model: the name to ask for, '' = none."""

    path: str
    health: str
    model: str = ""

    @abstractmethod
    def payload(
        self, prompt: Prompt, max_tokens: int, *, forced: bool = True, cached: bool = False,
        stream: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Greedy. forced: go on after an end token, so that the length is exact. cached: the prompt may come
        from a prefix cache (where the request decides that)."""

    @abstractmethod
    def text(self, event: Event) -> str:
        """Generated text in an event."""

    @abstractmethod
    def counts(self, result: StreamResult) -> tuple[int, int, int]:
        """(output tokens, prompt tokens, cached prompt tokens) by the server's own account."""

    def content(self, event: Event) -> bool:
        """Whether an event carries generated text."""
        return bool(self.text(event))

    def timings(self, events: Sequence[Event]) -> Mapping[str, Any]:
        """The server's own clock, where it tells it without being asked."""
        return {}


class OpenAiCompletions(Dialect):
    """/v1/completions with `ignore_eos` as extension: our server, vLLM, SGLang, llama-server."""

    def payload(
        self, prompt: Prompt, max_tokens: int, *, forced: bool = True, cached: bool = False,
        stream: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        return self._fields({"prompt": prompt if isinstance(prompt, str) else list(prompt)}, max_tokens,
                            forced, stream)  # fmt: skip

    def _fields(
        self, start: dict[str, Any], max_tokens: int, forced: bool, stream: bool
    ) -> dict[str, Any]:  # fmt: skip
        fields = start | {"max_tokens": max_tokens, "temperature": 0.0}
        if self.model:
            fields["model"] = self.model
        if forced:
            fields["ignore_eos"] = True
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return fields

    def text(self, event: Event) -> str:
        return "".join(choice.get("text") or "" for choice in event.data.get("choices") or ())

    def counts(self, result: StreamResult) -> tuple[int, int, int]:
        usage = next(e.data["usage"] for e in reversed(result.events) if e.data.get("usage"))
        details = usage.get("prompt_tokens_details") or {}
        return usage["completion_tokens"], usage["prompt_tokens"], details.get("cached_tokens") or 0


class OpenAiChat(OpenAiCompletions):
    """/v1/chat/completions with the prompt as one user message; text only."""

    def payload(
        self, prompt: Prompt, max_tokens: int, *, forced: bool = True, cached: bool = False,
        stream: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        if not isinstance(prompt, str):
            raise ValueError("chat completions take text, not token ids")
        messages = [{"role": "user", "content": prompt}]
        return self._fields({"messages": messages}, max_tokens, forced, stream)

    def text(self, event: Event) -> str:
        parts = (
            choice.get("delta") or choice.get("message") or {} for choice in event.data.get("choices") or ()
        )
        return "".join(part.get("content") or "" for part in parts)


class LlamaCompletion(Dialect):
    """llama-server's own /completion, its shortest path to a token."""

    def payload(
        self, prompt: Prompt, max_tokens: int, *, forced: bool = True, cached: bool = False,
        stream: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": max_tokens,
            "temperature": 0.0,
            "ignore_eos": forced,
            "cache_prompt": cached,
            "stream": stream,
        }

    def text(self, event: Event) -> str:
        return str(event.data.get("content") or "")

    def counts(self, result: StreamResult) -> tuple[int, int, int]:
        # prompt_n is what was computed; the whole prompt is that and what the cache had
        timings = result.events[-1].data["timings"]
        cached = timings.get("cache_n", 0)
        return timings["predicted_n"], timings["prompt_n"] + cached, cached

    def timings(self, events: Sequence[Event]) -> Mapping[str, Any]:
        return dict(events[-1].data.get("timings") or {}) if events else {}


OPENAI = OpenAiCompletions("/v1/completions", "/health")
CHAT = OpenAiChat("/v1/chat/completions", "/health")
LLAMA = LlamaCompletion("/completion", "/health")


class Server(Pausable):
    """A server process on a free port of the loopback."""

    def __init__(
        self, label: str, peer: str, file: str, command: Sequence[str], port: int, dialect: Dialect,
        log: Path,
    ) -> None:  # fmt: skip
        self.label, self.peer, self.file = label, peer, file
        self.port, self.dialect = port, dialect
        self.facts = ""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab")
        self.log_path = log
        environment = {k: v for k, v in os.environ.items() if k != "HAYAI_DATABASE"}
        super().__init__(subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment))
        try:
            self._wait_ready()
        except PeerFailure:
            self.close()
            raise
        self.pause()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if get_json(HOST, self.port, self.dialect.health)[0] == 200:
                    return
            except (OSError, IndexError, ValueError):
                pass
            time.sleep(0.05)
        tail = " ".join(self.log_path.read_bytes()[-400:].decode(errors="replace").split())
        code = self.process.poll()
        what = f"did not get ready in {START_SECONDS:.0f} s" if code is None else f"ended with {code}"
        raise PeerFailure(f"{self.label} {what}: {tail}")

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Streamed:
        """One forced-length greedy answer. PeerFailure where it fails or is short."""
        payload = self.dialect.payload(prompt, max_tokens)
        self.resume()
        try:
            result = post_stream(HOST, self.port, self.dialect.path, payload)
        except HttpFailure as error:
            raise PeerFailure(f"{self.label}: {error}") from error
        finally:
            self.pause()
        times = tuple(e.time for e in result.events if self.dialect.content(e))
        tokens, prompted, cached = self.dialect.counts(result)
        if tokens != max_tokens or len(times) < 1:
            raise PeerFailure(f"{self.label}: {tokens} tokens in {len(times)} chunks, {max_tokens} asked")
        if cached:
            raise PeerFailure(f"{self.label}: {cached} prompt tokens came from a cache; the run is void")
        return Streamed(result.sent, times, tokens, prompted, cached)

    def settings(self, case: str) -> str:
        return self.facts

    @property
    def address(self) -> Address:
        return Address(HOST, self.port)

    def cpu(self) -> float:
        """CPU seconds that the process has used so far."""
        return cpu_seconds(self.process.pid)

    def peak_mb(self) -> float | None:
        """VmHWM in MB (1e6 bytes)."""
        kib = status_kib(self.process.pid, "VmHWM")
        return None if kib is None else kib * 1024 / 1e6

    def close(self) -> None:
        self.terminate()
        self._log.close()


def free_port() -> int:
    """A port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def hayai_command() -> list[str]:
    """How to start our own command line: the script of this environment, or the module it runs."""
    beside = Path(sys.executable).with_name("hayai")
    return [str(beside)] if os.access(beside, os.X_OK) else [sys.executable, "-m", "hayai.cli.main"]


def start_hayai(
    model: str, threads: int, context: int, log: Path, more: Sequence[str] = ()
) -> Server:  # fmt: skip
    """`hayai serve` on a free port, without the user's own keys and ledger. more: further options."""
    port = free_port()
    command = [
        *hayai_command(), "serve", "--model", model, "--host", HOST, "--port", str(port),
        "--threads", str(threads), "--context", str(context), "--state-dir", str(log.parent / "state"), *more,
    ]  # fmt: skip
    return Server("hayai serve", "hayai", "same", command, port, OPENAI, log)


def start_llama(
    label: str, file: str, binary: str, arguments: Sequence[str], places: Mapping[str, str], log: Path
) -> Server:
    """llama-server on a free port; `places` fills {model}, {threads}, {context} of the arguments."""
    port = free_port()
    filled = {**places, "host": HOST, "port": str(port)}
    command = [binary, *(argument.format(**filled) for argument in arguments)]
    return Server(label, "llama-server", file, command, port, LLAMA, log)

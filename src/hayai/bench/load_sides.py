"""The servers of a load as sides: ours, one given by URL, and the peers at the best of their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hayai.bench.load_client import Address
from hayai.bench.machine import cpu_seconds
from hayai.bench.peers import (
    HERE,
    Installation,
    PeerFailure,
    PeerSpec,
    Variant,
    find,
    read_specs,
    requantised,
    server_binary,
)
from hayai.bench.servers import (
    Dialect,
    OpenAiChat,
    OpenAiCompletions,
    Server,
    start_hayai,
    start_llama,
)
from hayai.bench.sides import Trial

LOAD_PEERS = HERE / "load_peers.toml"

DIALECTS: Mapping[str, Callable[[str], Dialect]] = {
    "completions": lambda model: OpenAiCompletions("/v1/completions", "/health", model),
    "chat": lambda model: OpenAiChat("/v1/chat/completions", "/health", model),
}
"""How a server given by URL can be asked."""

OUR_SEQUENCES = 16
"""What `hayai serve` runs at the same time unless it is told otherwise."""

Probe = Callable[["LoadSide"], float]
"""A short load of a side; higher is better."""


@dataclass(frozen=True)
class LoadOptions:
    """What `hayai bench load` was asked for.

    url: a server that runs already, instead of ours; server_pid: its process, if it is on this machine.
    serve_options: further options of `hayai serve`. text_prompts: prompts as text, for a server of another
    vocabulary. budget: seconds that a sweep over rates may take. length_factor: what trace lengths
    are divided by.
    """

    model: str
    home: Path
    threads: int
    pairs: int
    cases: tuple[str, ...] = ()
    peers: tuple[str, ...] = ("llama-server",)
    pythons: tuple[str, ...] = ()
    data: Path | None = None
    seed: int = 0
    url: str = ""
    server_pid: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    dialect: str = "completions"
    model_name: str = ""
    forced: bool = True
    text_prompts: bool = False
    serve_options: tuple[str, ...] = ()
    budget: float = 300.0
    length_factor: float = 32.0
    quick: bool = False


@dataclass(frozen=True)
class Room:
    """What a case needs of a server: tokens per sequence, sequences at a time, the kind of load (see
    load_peers.toml). Every side gets a KV cache of `kv_tokens` where the kind is "cached"."""

    context: int
    sequences: int
    kind: str

    @property
    def kv_tokens(self) -> int:
        return self.context * self.sequences


class LoadSide(Protocol):
    """A server under load; `peer` is 'hayai' for ours and for one given by URL."""

    label: str
    peer: str
    file: str
    dialect: Dialect

    @property
    def address(self) -> Address: ...

    def settings(self, case: str) -> str: ...

    def cpu(self) -> float: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Remote:
    """A server that somebody else started; it is never stopped."""

    def __init__(self, label: str, address: Address, dialect: Dialect, pid: int | None = None) -> None:
        self.label, self.peer, self.file = label, "hayai", "same"
        self.address, self.dialect = address, dialect
        self._pid = pid

    def settings(self, case: str) -> str:
        return "given by URL"

    def cpu(self) -> float:
        """CPU seconds of the process that was named; nan where none was."""
        return math.nan if self._pid is None else cpu_seconds(self._pid)

    def pause(self) -> None:
        """Not ours to stop."""

    def resume(self) -> None:
        """See `pause`."""

    def close(self) -> None:
        """Not ours to end."""


def our_side(options: LoadOptions, path: Path, logs: Path, room: Room, kv_token_bytes: float) -> LoadSide:
    """`hayai serve` with room for a case, or the server that was given by URL. kv_token_bytes: of one token's
    keys and values in our cache."""
    if options.url:
        address = Address.of(options.url.rstrip("/").removesuffix("/v1"), options.headers)
        dialect = DIALECTS[options.dialect](options.model_name)
        return Remote(f"{address.host}:{address.port}", address, dialect, options.server_pid)
    more = list(options.serve_options)
    if "--max-sequences" not in more and room.sequences > OUR_SEQUENCES:
        more += ["--max-sequences", str(room.sequences)]
    if "--kv-bytes" not in more and room.kind == "cached" and kv_token_bytes > 0:
        more += ["--kv-bytes", str(int(room.kv_tokens * kv_token_bytes))]
    server = start_hayai(str(path), options.threads, room.context, logs / "hayai-serve.log", more)
    server.facts = " ".join(more)
    return server


class Peers:
    """The peer of load_peers.toml: where it is installed, on which files, and which settings are best."""

    def __init__(self, options: LoadOptions, path: Path, logs: Path, say: Callable[[str], None]) -> None:
        self.spec: PeerSpec = read_specs(LOAD_PEERS)["llama-server"]
        self.files: dict[str, Path] = {"same": path}
        self.installations: tuple[Installation, ...] = ()
        self.trials: list[Trial] = []
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []
        self._options, self._logs, self._say = options, logs, say
        self._choices: dict[tuple[str, str], tuple[str, Variant]] = {}
        if self.spec.name in options.peers:
            self._find()

    def _find(self) -> None:
        self.installations = find(self.spec, self._options.pythons)
        if not self.installations:
            self.missing[self.spec.name] = self.spec.install
            return
        spec = read_specs()["llama.cpp"]
        quantisers = find(spec, self._options.pythons)
        if not quantisers:
            self.notes.append(f"no Q4_0 rows: llama.cpp's quantiser is missing; {spec.install}")
            return
        folder = self._options.home / "bench"
        try:
            python, threads = quantisers[0].python, self._options.threads
            self.files["q4_0"] = requantised(self.files["same"], folder, python, threads)
        except PeerFailure as error:
            self.notes.append(f"no Q4_0 rows: {error}")

    def wanted_files(self) -> Sequence[str]:
        """The files on which the peer runs here; none where it is not installed."""
        return [f for f in self.spec.files if f in self.files] if self.installations else []

    def best(self, room: Room, file: str, probe: Probe | None) -> Server:
        """Start every variant of the kind of load, try it, and keep the fastest running.

        Later cases of the kind start that one at once. PeerFailure where none runs.
        """
        key = (room.kind, file)
        if key in self._choices:
            return self._start(room, file, *self._choices[key])
        best: tuple[float, Server] | None = None
        variants = [v for v in self.spec.variants if v.serves(room.kind)]
        if probe is None or self._options.quick:
            variants = variants[:1]
        for installation in self.installations:
            binary = server_binary(installation)
            for variant in variants:
                server = self._start(room, file, binary, variant)
                score, error = _try(server, probe)
                where = (server.label, room.kind, installation.python, installation.version)
                self.trials.append(Trial(*where, variant.name, score, error))
                self._say(f"  {server.label}, {variant.name}: {error or f'{score:.4g}'}")
                if score is None or (best is not None and score <= best[0]):
                    server.close()
                    continue
                if best is not None:
                    best[1].close()
                best = (score, server)
                self._choices[key] = (binary, variant)
        if best is None:
            raise PeerFailure(f"{self.spec.name} runs with none of its settings")
        return best[1]

    def _start(self, room: Room, file: str, binary: str, variant: Variant) -> Server:
        places = {
            "model": str(self.files[file]),
            "threads": str(self._options.threads),
            "context": str(room.kv_tokens),
            "parallel": str(room.sequences),
        }
        arguments = [*self.spec.arguments, *variant.arguments]
        log = self._logs / "llama-server.log"
        server = start_llama(f"{self.spec.name} {file}", file, binary, arguments, places, log)
        version = ", ".join(sorted({i.version for i in self.installations}))
        server.facts = f"{self.spec.package} {version}, {room.sequences} slots, {variant.name}"
        return server


def _try(server: Server, probe: Probe | None) -> tuple[float | None, str]:
    """(score, '') or (None, why not); a server's first probe is its warm-up."""
    try:
        if probe is None:
            return 0.0, ""
        probe(server)
        return probe(server), ""
    except PeerFailure as error:
        return None, str(error)

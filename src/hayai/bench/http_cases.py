"""Cases over HTTP: time to first token against llama-server, and our own server against our own engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from hayai.bench.cases import DECODE_PROMPT, Outcome
from hayai.bench.inprocess import kv_tokens
from hayai.bench.peers import Installation, PeerFailure, PeerSpec, Variant, server_binary
from hayai.bench.servers import Server, Streamed, start_hayai, start_llama
from hayai.bench.session import Session
from hayai.bench.sides import Trial

TTFT_PROMPTS = (32, 512)
TTFT_TOKENS = 4
"""Tokens asked for where only the first one's time counts."""


def run(session: Session, groups: Sequence[str]) -> None:
    """The HTTP part of the groups `ttft` and `http`."""
    with open_servers(session) as servers:
        if "ttft" in groups:
            for tokens in TTFT_PROMPTS:
                time_to_first_token(session, servers, tokens)
        if "http" in groups:
            http_against_inprocess(session, servers)


@contextlib.contextmanager
def open_servers(session: Session) -> Iterator[list[Server]]:
    """Ours first, then llama-server on every file with its best settings; all stopped until their turn."""
    options = session.options
    context = max(TTFT_PROMPTS[-1] + TTFT_TOKENS, DECODE_PROMPT + options.sizes.decode_tokens + 1, 2048)
    model = str(session.files["same"])
    room = kv_tokens(context)
    kv_bytes = int(room * kv_bytes_per_token(session))
    more = ["--kv-bytes", str(kv_bytes)] if kv_bytes else []
    servers = [start_hayai(model, options.threads, context, session.logs / "hayai-serve.log", more)]
    try:
        for _ in range(-(-room // (context - 1))):  # as HayaiSide.touch_cache
            servers[0].stream(session.prompts.ids(context - 2), 1)
        spec = session.specs["llama-server"]
        if spec.name in session.installations:
            for file in (f for f in spec.files if f in session.files):
                with reported(session, f"{spec.name} {file}"):
                    servers.append(best_server(session, spec, file, context))
        yield servers
    finally:
        for server in servers:
            server.close()


def kv_bytes_per_token(session: Session) -> float:
    """Of our cache, as our engine in this process says; 0 where its backend doesn't."""
    said = session.ours.loaded.engine.runner.describe().get("kv_bytes_per_token", 0)
    return float(said) if isinstance(said, (int, float)) else 0.0


@contextlib.contextmanager
def reported(session: Session, what: str) -> Iterator[None]:
    """Write a peer's failure down and go on without it."""
    try:
        yield
    except PeerFailure as error:
        session.notes.append(f"{what}: {error}")
        session.say(session.notes[-1])


def best_server(session: Session, spec: PeerSpec, file: str, context: int) -> Server:
    """Start every variant, ask a few long prompts, keep the fastest running; later calls start it again."""
    if file in session.server_choices:
        binary, variant = session.server_choices[file]
        return start_variant(session, spec, binary, variant, file, context)
    best: tuple[float, Server] | None = None
    for installation in session.installations[spec.name]:
        binary = server_binary(installation)
        for variant in spec.variants:
            server = start_variant(session, spec, binary, variant, file, context)
            try:
                score = probe(session, server)
            except PeerFailure as error:
                server.close()
                note_trial(session, server, installation, variant, None, str(error))
                continue
            note_trial(session, server, installation, variant, score, "")
            if best is None or score > best[0]:
                if best is not None:
                    best[1].close()
                best = (score, server)
                session.server_choices[file] = (binary, variant)
            else:
                server.close()
    if best is None:
        raise PeerFailure(f"{spec.name} runs with none of its settings")
    return best[1]


def start_variant(
    session: Session, spec: PeerSpec, binary: str, variant: Variant, file: str, context: int
) -> Server:
    places = {
        "model": str(session.files[file]),
        "threads": str(session.options.threads),
        "context": str(context),
    }
    arguments = [*spec.arguments, *variant.arguments]
    log = session.logs / "llama-server.log"
    server = start_llama(f"{spec.name} {file}", file, binary, arguments, places, log)
    server.facts = f"{spec.package}, {variant.name}"
    return server


def probe(session: Session, server: Server) -> float:
    """Prompt tokens per second up to the first token, best of the calibration's rounds after a warm-up."""
    rounds = session.options.calibration_rounds + 1
    tokens = TTFT_PROMPTS[-1]
    times = [server.stream(session.prompts.ids(tokens), TTFT_TOKENS).first for _ in range(rounds)]
    return tokens / min(times[1:])


def note_trial(
    session: Session, server: Server, found: Installation, variant: Variant, score: float | None, error: str
) -> None:
    session.trials.append(
        Trial(server.label, "ttft-http", found.python, found.version, variant.name, score, error)
    )
    shown = f"failed: {error}" if score is None else f"{score:.0f} tok/s of prompt"
    session.say(f"  {server.label}, {variant.name}: {shown}")


def outcome(streamed: Streamed, value: float, *, steps: bool = False) -> Outcome:
    details = {
        "tokens": float(streamed.num_tokens),
        "chunks": float(len(streamed.times)),
        "tokens_per_chunk": streamed.tokens_per_chunk,
        "cached_tokens": float(streamed.cached_tokens),
    }
    return Outcome(value, streamed.sent, streamed.times, details=details)


def time_to_first_token(session: Session, servers: Sequence[Server], tokens: int) -> None:
    """Cold prompts of one length; the clock runs from the last byte sent to the first byte of content."""

    def ask(server: Server, prompt: Sequence[int]) -> Outcome:
        streamed = server.stream(prompt, TTFT_TOKENS)
        return outcome(streamed, streamed.first * 1e3)

    alternate(session, f"ttft-http-{tokens}", "ms", servers, tokens, ask)


def http_against_inprocess(session: Session, servers: Sequence[Server]) -> None:
    """Single-stream decode through the server, and the same prompts in process in the same pairs."""
    steps = session.options.sizes.decode_tokens
    ours = session.ours

    def ask(server: Server, prompt: Sequence[int]) -> Outcome:
        streamed = server.stream(prompt, steps + 1)
        return outcome(streamed, streamed.rate)

    def inprocess(pair: int, prompt: Sequence[int]) -> None:
        def work() -> Outcome:
            made = ours.generate(prompt, steps)
            return Outcome(made.rate, made.started, made.times, details=made.details)

        session.turn("http", ours, pair, "tok/s", work)

    alternate(session, "http", "tok/s", servers, DECODE_PROMPT, ask, inprocess)


def alternate(
    session: Session, case: str, unit: str, servers: Sequence[Server], tokens: int,
    ask: Callable[[Server, Sequence[int]], Outcome],
    besides: Callable[[int, Sequence[int]], None] | None = None,
) -> None:  # fmt: skip
    """A warm-up, then the servers in turn; `besides` runs right after the first one in every pair."""
    running = list(servers)
    session.say(f"{case}: {', '.join(s.label for s in running)}")
    for pair in range(-1, session.options.pairs):
        prompt = session.prompts.ids(tokens)
        for place, server in enumerate(tuple(running)):
            try:
                session.turn(case, server, pair, unit, partial(ask, server, prompt))
            except PeerFailure as error:
                running.remove(server)
                session.notes.append(f"{case}: {error}")
                session.say(session.notes[-1])
            if place == 0 and besides is not None:
                besides(pair, prompt)

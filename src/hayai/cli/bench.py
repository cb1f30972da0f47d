"""`hayai bench`: measure speed beside other engines, and check the arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hayai.cli.console import note
from hayai.config import read_environment

CASE_NAMES = ("decode", "decode-depth", "prefill", "batch", "ttft", "http", "memory", "start", "contention")
PEER_NAMES = ("llama.cpp", "ik_llama.cpp", "llama-server")


def _names(known: tuple[str, ...], text: str, option: str) -> tuple[str, ...]:
    """A comma-separated selection in the table's order; 'all' and 'none' are words of their own."""
    if text in ("all", "none"):
        return known if text == "all" else ()
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of: {', '.join(known)}", param_hint=option)
    return tuple(name for name in known if name in chosen)


@click.group()
def command() -> None:
    """Measure speed and accuracy. Definitions: docs/measuring.md."""


@command.command()
@click.option("--model", "-m", default="default", show_default=True, help="A .gguf file, or 'default'.")
@click.option(
    "--threads", "-t", type=click.IntRange(1, 1024), help="Threads of every side. [default: 2, or the cores]"
)
@click.option(
    "--pairs", type=click.IntRange(1, 1000), default=5, show_default=True, help="Interleaved repetitions."
)
@click.option("--cases", default="all", show_default=True, help=f"Some of: {','.join(CASE_NAMES)}.")
@click.option("--peers", default="all", show_default=True, help=f"Some of: {','.join(PEER_NAMES)}; or none.")
@click.option("--peer-python", "pythons", multiple=True, metavar="PATH",
              help="A Python with peers installed (may be given more than once).")  # fmt: skip
@click.option(
    "--depth", type=click.IntRange(1), default=1024, show_default=True, help="Context of decode-depth."
)
@click.option(
    "--decode-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens per decode."
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every row here."
)
@click.option("--quick", is_flag=True, help="Fewer pairs and shorter runs: a smoke test, not a claim.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the prompts.")
@click.option("--backend", type=click.Choice(("cpu", "reference")), default="cpu", show_default=True)
def speed(
    model: str,
    threads: int | None,
    pairs: int,
    cases: str,
    peers: str,
    pythons: tuple[str, ...],
    depth: int,
    decode_tokens: int,
    json_path: Path | None,
    quick: bool,
    seed: int,
    backend: str,
) -> None:
    """Decode, prefill, batch, first token, HTTP, memory, start and contention, beside peers in one run.

    Sides alternate; medians with their range, ratios pair by pair, the read roofline of the same minutes,
    and the CPU time of other processes. The table goes to stdout, progress to stderr.
    """
    from rich.console import Console  # slow, and only the bench needs it

    from hayai.bench.cases import Sizes
    from hayai.bench.machine import usable_cores
    from hayai.bench.report import print_report, write_json
    from hayai.bench.session import SpeedOptions
    from hayai.bench.speed import run

    environment = read_environment()
    tokens = min(decode_tokens, 48) if quick else decode_tokens
    options = SpeedOptions(
        model=model,
        home=environment.home,
        threads=threads or environment.threads or min(2, len(usable_cores())),
        pairs=min(pairs, 2) if quick else pairs,
        cases=_names(CASE_NAMES, cases, "--cases"),
        peers=_names(PEER_NAMES, peers, "--peers"),
        pythons=pythons,
        sizes=Sizes(depth=depth, decode_tokens=tokens, depth_tokens=tokens, batch_steps=16 if quick else 64),
        calibration_rounds=1 if quick else 2,
        seed=seed,
        backend=backend,
    )
    session = run(options, note)
    if json_path is not None:
        write_json(session, json_path)
    width = None if sys.stdout.isatty() else 200
    print_report(session, Console(width=width))

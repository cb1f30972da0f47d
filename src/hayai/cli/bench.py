"""`hayai bench`: measure speed beside other engines, and check the arithmetic."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hayai.backends.cores import find_cores
from hayai.cli.console import note
from hayai.config import read_environment

if TYPE_CHECKING:
    from hayai.bench.accuracy import Accuracy

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


def _names_help(**lists: tuple[str, ...]) -> str:
    """Lists of names at the end of a help page, no name broken (click keeps lines after `\\b`)."""
    return "\b\n" + "\n".join(
        textwrap.fill(f"{title}: {', '.join(names)}", 78, subsequent_indent="  ", break_on_hyphens=False)
        for title, names in lists.items()
    )


@click.group()
def command() -> None:
    """Measure speed and accuracy. Definitions: docs/measuring.md."""


@command.command(epilog=_names_help(Cases=CASE_NAMES, Peers=PEER_NAMES))
@click.option("--model", "-m", default="default", show_default=True, help="A .gguf file, or 'default'.")
@click.option(
    "--threads", "-t", type=click.IntRange(1, 1024), help="Threads of every side. [default: 2, or the cores]"
)
@click.option(
    "--pairs", type=click.IntRange(1, 1000), default=5, show_default=True, help="Interleaved repetitions."
)
@click.option("--cases", default="all", show_default=True, help="Which cases, by comma; listed below.")
@click.option("--peers", default="all", show_default=True, help="Which peers, by comma, or none.")
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
    from hayai.bench.cases import Sizes  # the bench imports the engine: slow, and other verbs don't need it
    from hayai.bench.report import text_report, write_json
    from hayai.bench.session import SpeedOptions
    from hayai.bench.speed import run

    environment = read_environment()
    tokens = min(decode_tokens, 48) if quick else decode_tokens
    options = SpeedOptions(
        model=model,
        home=environment.home,
        threads=threads or environment.threads or min(2, find_cores().usable),
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
    click.echo(text_report(session))


LOAD_CASES = ("parallel8", "freeze", "prefix", "bits", "overhead", "overload", "agent", "mooncake")
TRACE_NAMES = ("azure-conv", "azure-code", "mooncake", "mooncake-synthetic")
LOAD_PEERS = ("llama-server",)


@command.command(epilog=_names_help(Cases=LOAD_CASES, Peers=LOAD_PEERS, Traces=TRACE_NAMES))
@click.option("--model", "-m", default="default", show_default=True, help="A .gguf file, or 'default'.")
@click.option("--threads", "-t", type=click.IntRange(1, 1024), help="Threads of every server.")
@click.option("--pairs", type=click.IntRange(1, 1000), default=5, show_default=True,
              help="Interleaved repetitions.")  # fmt: skip
@click.option("--cases", default="all", show_default=True, help="Which named loads, by comma; listed below.")
@click.option("--peers", default="all", show_default=True, help="Which peers, by comma, or none.")
@click.option("--peer-python", "pythons", multiple=True, metavar="PATH",
              help="A Python with peers installed (may be given more than once).")  # fmt: skip
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder of recorded traces. [default: HAYAI_DATA]")  # fmt: skip
@click.option("--url", default="", help="Load this server instead of one of ours.")
@click.option("--server-pid", type=click.IntRange(1), help="Its process, to account for its CPU time.")
@click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Sent with every request.")
@click.option("--api", type=click.Choice(("completions", "chat")), default="completions", show_default=True,
              help="How a server given by URL is asked.")  # fmt: skip
@click.option("--model-name", default="", help="The model's name in requests to a URL. [default: none]")
@click.option("--text", "text_prompts", is_flag=True, help="Prompts as text instead of token ids.")
@click.option("--natural-stop", is_flag=True, help="Let answers end by themselves instead of forced lengths.")
@click.option("--concurrency", type=click.IntRange(1, 4096), help="A closed loop of so many users.")
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), help="An open loop, requests per second."
)
@click.option("--trace", type=click.Choice(TRACE_NAMES), help="Replay it at --rate, or swept over rates.")
@click.option("--requests", type=click.IntRange(1), default=32, show_default=True,
              help="How many, per repetition, of the three loads above.")  # fmt: skip
@click.option("--input", "prompt_tokens", type=click.IntRange(1), default=128, show_default=True,
              help="Prompt tokens.")  # fmt: skip
@click.option("--output", "output_tokens", type=click.IntRange(1), default=128, show_default=True,
              help="Answer tokens.")  # fmt: skip
@click.option("--scale", type=click.FloatRange(min=1), default=32.0, show_default=True,
              help="What the lengths of a trace are divided by.")  # fmt: skip
@click.option("--ttft-ms", type=click.FloatRange(min=0), default=2000.0, show_default=True,
              help="Service level of goodput and sweeps.")  # fmt: skip
@click.option("--tpot-ms", type=click.FloatRange(min=0), default=50.0, show_default=True,
              help="Service level of goodput and sweeps.")  # fmt: skip
@click.option("--budget", type=click.FloatRange(min=1), default=300.0, show_default=True,
              help="Seconds per side that one sweep over rates may take.")  # fmt: skip
@click.option("--serve-option", "serve_options", multiple=True, metavar="OPTION",
              help="Passed on to hayai serve (may be given more than once).")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write every request here.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Fewer pairs and shorter loads: a smoke test, not a claim.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of prompts and arrivals.")
def load(
    model: str, threads: int | None, pairs: int, cases: str, peers: str, pythons: tuple[str, ...],
    data: Path | None, url: str, server_pid: int | None, headers: tuple[str, ...], api: str, model_name: str,
    text_prompts: bool, natural_stop: bool, concurrency: int | None, rate: float | None, trace: str | None,
    requests: int, prompt_tokens: int, output_tokens: int, scale: float, ttft_ms: float, tpot_ms: float,
    budget: float, serve_options: tuple[str, ...], json_path: Path | None, quick: bool, seed: int,
) -> None:  # fmt: skip
    """Many requests at once: throughput, latencies, goodput, failures, beside llama-server in one run.

    Without --concurrency, --rate or --trace the named cases run, each with its bar. Ours is started for every
    case; --url takes a server that runs already.
    """
    from hayai.bench.load import (  # the bench imports the engine: slow, and other verbs don't need it
        Custom,
        run,
    )
    from hayai.bench.load_client import Address
    from hayai.bench.load_metrics import Slo
    from hayai.bench.load_report import text_report, write_json
    from hayai.bench.load_sides import LoadOptions

    environment = read_environment()
    if concurrency is not None and (rate is not None or trace is not None):
        raise click.UsageError(
            "--concurrency is a closed loop; --rate and --trace are open ones: give one kind"
        )
    try:
        Address.of(url or "http://localhost")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--url") from None
    custom = None
    if concurrency is not None or rate is not None or trace is not None:
        slo = Slo(ttft_ms / 1e3, tpot_ms / 1e3)
        custom = Custom(concurrency, rate, trace, requests, prompt_tokens, output_tokens, slo)
    options = LoadOptions(
        model=model, home=environment.home,
        threads=threads or environment.threads or min(2, find_cores().usable),
        pairs=min(pairs, 2) if quick else pairs,
        cases=_names(LOAD_CASES, cases, "--cases"), peers=_names(LOAD_PEERS, peers, "--peers"),
        pythons=pythons, data=data or environment.data, seed=seed, url=url, server_pid=server_pid,
        headers=_headers(headers), dialect=api, model_name=model_name, forced=not natural_stop,
        text_prompts=text_prompts or api == "chat", serve_options=serve_options, budget=budget,
        length_factor=scale, quick=quick,
    )  # fmt: skip
    session = run(options, note, custom)
    if json_path is not None:
        write_json(session, json_path, custom)
    click.echo(text_report(session, custom))


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    """'Name: value' pairs."""
    found = {}
    for text in given:
        name, separator, value = text.partition(":")
        if not separator or not name.strip() or any(c in text for c in "\r\n"):
            raise click.BadParameter(f"not 'NAME: VALUE': {text!r}", param_hint="--header")
        found[name.strip()] = value.strip()
    return found


@command.command()
@click.option("--model", "-m", default="default", show_default=True, help="A .gguf file, or 'default'.")
@click.option("--threads", "-t", type=click.IntRange(1, 1024), help="Compute threads. [default: the cores]")
@click.option("--isa", type=click.Choice(("scalar", "avx2", "avx512")), help="Lower the instruction set.")
@click.option("--tokens", type=click.IntRange(2), default=2560, show_default=True, help="Length of the text.")
@click.option("--data", type=click.Path(exists=True, path_type=Path),
              help="Text file or its folder. [default: HAYAI_DATA/wikitext2, or made-up]")  # fmt: skip
@click.option(
    "--peer-python", "pythons", multiple=True, metavar="PATH", help="A Python with peers installed."
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here."
)
def accuracy(
    model: str,
    threads: int | None,
    isa: str | None,
    tokens: int,
    data: Path | None,
    pythons: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Logits of the CPU backend against float32, teacher-forced; perplexity beside peers."""
    from hayai.bench.accuracy import measure, read_text  # slow imports, as above

    environment = read_environment()
    if data is None and environment.data is not None:
        data = environment.data / "wikitext2"
    text, source = read_text(data, 8 * tokens)
    # No word is shorter than a token; eight characters a token are plenty, and the rest is not tokenised.
    result = measure(
        model, threads or environment.threads or find_cores().usable, text[: 8 * tokens], tokens,
        pythons, environment.home / "bench" / "logs", note, source=source, isa=isa,
    )  # fmt: skip
    for line in accuracy_lines(result):
        click.echo(line)
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")


def accuracy_lines(result: Accuracy) -> list[str]:
    """The result as a table in plain text."""
    lines = [
        f"{result.text}: {result.num_tokens} predicted tokens, windows of 512; float32 perplexity "
        f"{result.reference_perplexity:.4f}",
        f"{'engine':<14}{'KL mean':>10}{'p99':>10}{'max':>10}{'noise':>8}{'argmax differs':>16}"
        f"{'beyond tie':>12}{'largest gap':>13}{'perplexity':>12}{'against float32':>20}",
    ]
    for e in result.engines:
        change = f"{e.excess:+.3%} +-{e.excess_error:.3%}"
        lines.append(
            f"{e.name:<14}{e.kl_mean:>10.2e}{e.kl_p99:>10.2e}{e.kl_max:>10.2e}{e.noise:>8.3f}"
            f"{e.disagreements:>16}{e.real_disagreements:>12}{e.largest_gap:>13.3f}{e.perplexity:>12.4f}{change:>20}"
        )
    for name, (change_, error) in result.over_peers.items():
        lines.append(f"our perplexity over {name}'s: {change_:+.3%} +-{error:.3%}")
    lines.append(f"top-1 agreement by the near-tie rule (0.2 logits): {result.agreement:.4%}")
    return lines

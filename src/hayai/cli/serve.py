"""`hayai serve`: the HTTP server."""

from __future__ import annotations

import json
from typing import Any

import click

import hayai
from hayai.cli.console import note
from hayai.cli.options import engine_options, load
from hayai.config import ServerConfig
from hayai.frontend import Frontend
from hayai.load import LoadedModel
from hayai.server.app import create_app
from hayai.server.run import bind, serve, url_of


@click.command()
@click.option("--host", default=ServerConfig.host, show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    "-p",
    type=click.IntRange(0, 65535),
    default=ServerConfig.port,
    show_default=True,
    help="Port to listen on; 0 = any free one.",
)
@click.option("--allow-remote", is_flag=True, help="Allow a --host that other machines can reach (no keys!).")
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Requests that run at the same time; more wait.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=ServerConfig.max_waiting,
    show_default=True,
    help="Requests in flight before new ones get 503.",
)
@engine_options
def command(
    host: str, port: int, allow_remote: bool, max_sequences: int, max_waiting: int, **engine: Any
) -> None:
    """Serve a model with OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models.

    Streams, log-probabilities, seeds and usage as OpenAI's; extensions: top_k, min_p,
    repetition_penalty, ignore_eos, stop_token_ids, timings. /health and /ready for supervisors.
    Ctrl-C stops running requests at the next token.
    """
    config = ServerConfig(host=host, port=port, max_waiting=max_waiting)
    sock = bind(config, allow_remote=allow_remote)
    with sock:
        loaded = load(**engine, max_sequences=max_sequences)
        frontend = Frontend(loaded)
        url = url_of(sock)
        print_configuration(loaded, config)
        serve(create_app(frontend, config), sock, on_ready=lambda: click.echo(ready_text(url)))
    note("stopped")


def print_configuration(loaded: LoadedModel, config: ServerConfig) -> None:
    """What was decided, one line each."""
    rows = {"hayai": hayai.__version__, **loaded.describe()}
    rows |= {"max_body_bytes": config.max_body_bytes, "max_waiting": config.max_waiting}
    width = max(map(len, rows))
    click.echo("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def ready_text(url: str) -> str:
    """The address, and a line to try it with."""
    body = {
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 64,
        "stream": True,
    }
    return (
        f"\nlistening on {url} (Ctrl-C stops)\n\ntry it:\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(body)}'\n"
    )

"""`hayai serve`: the HTTP server."""

from __future__ import annotations

import ctypes
import json
import platform
import struct
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import hayai
from hayai.cli.console import note
from hayai.cli.options import engine_options, load_engine
from hayai.config import EngineConfig, ServerConfig, read_environment
from hayai.config_file import Resolved, resolve
from hayai.errors import HayaiError
from hayai.frontend import Frontend
from hayai.load import LoadedModel
from hayai.server.access import Access, open_access
from hayai.server.app import create_app
from hayai.server.request_log import RequestLog
from hayai.server.run import bind, is_loopback, make_server, serve, url_of
from hayai.server.tls import certificate_of

FILE = click.Path(path_type=Path, dir_okay=False)
SECONDS = click.FloatRange(min=0.0)
SLICE_NS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number, by machine."""
SCHED_FLAG_RESET_ON_FORK = 1
M_ARENA_MAX = -8
"""mallopt's number for the most arenas (glibc's malloc.h)."""


class SettingOption(click.Option):
    """An option that sets `setting` of the configuration. Its default is said, not given: a file may have
    another."""

    def __init__(self, *names: Any, setting: str, said: Any = None, **options: Any) -> None:
        if said is not None:
            options["help"] += f"  [default: {said}]"
        super().__init__(*names, **options)
        self.setting = setting


def _flag(*names: str, **options: Any) -> Callable[..., Any]:
    return click.option(*names, cls=SettingOption, default=None, **options)


FLAGS = (
    _flag("--host", setting="server.host", said=ServerConfig.host, help="Address to listen on."),
    _flag(
        "--port",
        "-p",
        type=click.IntRange(0, 65535),
        setting="server.port",
        said=ServerConfig.port,
        help="Port to listen on; 0 = any free one.",
    ),
    _flag(
        "--max-sequences",
        type=click.IntRange(1, 1024),
        setting="engine.max_sequences",
        said=EngineConfig.max_sequences,
        help="Answers that are made at the same time; more wait.",
    ),
    _flag(
        "--max-waiting",
        type=click.IntRange(min=0),
        setting="server.max_waiting",
        said="half of --max-sequences",
        help="Answers that may wait; more are refused with 429.",
    ),
    _flag(
        "--queue-seconds",
        type=SECONDS,
        setting="server.queue_seconds",
        said=ServerConfig.queue_seconds,
        help="Longest estimated wait; more is refused with 429.",
    ),
    _flag(
        "--request-timeout",
        type=SECONDS,
        setting="server.request_timeout",
        said="none",
        help="Seconds after which a request ends.",
    ),
    _flag(
        "--drain-seconds",
        type=SECONDS,
        setting="server.drain_seconds",
        said=ServerConfig.drain_seconds,
        help="How long running requests may take to end after SIGTERM.",
    ),
    _flag(
        "--prefix-cache/--no-prefix-cache",
        setting="engine.prefix_cache",
        said="on",
        help="Keep the KV of finished requests for prompts that begin alike.",
    ),
    _flag(
        "--kv-format",
        type=click.Choice(("f16", "q8")),
        setting="engine.kv_format",
        said=EngineConfig.kv_format,
        help="Precision of the KV cache.",
    ),
    _flag(
        "--kv-bytes",
        type=click.IntRange(min=1),
        setting="engine.kv_bytes",
        said="room for the context of a few requests",
        help="Memory of the KV cache.",
    ),
    _flag(
        "--database",
        metavar="URL",
        setting="database.url",
        said="hayai.db in the state folder, if it exists",
        help="Keys and usage: a SQLite file, or postgresql://USER@HOST/NAME.",
    ),
    _flag(
        "--require-keys/--no-require-keys",
        setting="server.require_keys",
        said="as soon as the database has one",
        help="Whether requests need a key.",
    ),
    _flag(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        setting="server.state_dir",
        said="~/.local/state/hayai",
        help="Folder of keys, usage, stored responses, batches.",
    ),
    _flag("--tls-cert", type=FILE, setting="tls.cert", help="PEM file: certificate, and its chain."),
    _flag("--tls-key", type=FILE, setting="tls.key", help="PEM file: the certificate's key."),
    _flag(
        "--log-requests",
        type=FILE,
        setting="server.log_requests",
        said="nobody keeps them",
        help="Write every prompt and answer to this file, as JSON lines.",
    ),
)

ENGINE_FLAGS = {
    "model": "engine.model",
    "threads": "engine.threads",
    "context": "engine.context_length",
    "isa": "engine.isa",
    "backend": "engine.backend",
}
"""Parameter of cli/options.py -> setting."""


def _server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(FLAGS):
        function = option(function)
    return function


@click.command()
@click.option("--config", "-c", "file", type=FILE, help="Configuration file (TOML); flags override it.")
@_server_options
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME=MODEL",
    help="Serve MODEL ('default') to clients that ask for NAME; may be repeated.",
)
@click.option(
    "--allow-remote", is_flag=True, help="Allow a --host that other machines can reach, without keys."
)
@engine_options
def command(
    file: Path | None,
    aliases: tuple[str, ...],
    allow_remote: bool,
    pull: bool,
    **options: Any,
) -> None:
    """Serve a model with OpenAI's, Anthropic's and Azure's API; what there is: GET /openapi.json.

    /health, /ready and /metrics are for supervisors. Keys, limits and usage of tenants: `hayai keys` and
    `hayai usage`. SIGTERM lets running requests end, Ctrl-C stops them at the next token.
    """
    resolved = resolve(read_environment(), file, _given(click.get_current_context()), _parse_aliases(aliases))
    config = resolved.server
    few_malloc_arenas()
    certificate = certificate_of(config)
    with closing(open_access(config)) as access:
        sock = bind(config, keyed=access.keyed, allow_remote=allow_remote)
        with sock:
            loaded = load_engine(resolved.engine, pull=pull)
            frontend = Frontend(loaded, config.limits)
            wake_quickly()
            url = url_of(sock, tls=certificate is not None)
            print_configuration(loaded, resolved, access)
            app = create_app(frontend, config, access)
            if config.log_requests is not None:
                app.add_middleware(RequestLog, path=config.log_requests)
            server = make_server(
                app,
                lambda: click.echo(ready_text(url, access)),
                certificate=certificate,
                drain_seconds=config.drain_seconds,
                failure=lambda: frontend.service.failure,
            )
            serve(server, sock)
    if server.failure is not None:
        raise HayaiError(f"the engine failed, so the server stopped: {server.failure}")
    note("stopped")


def _given(context: click.Context) -> dict[str, tuple[str, Any]]:
    """The flags that the user gave: setting -> (flag, value)."""
    given = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        setting = parameter.setting if isinstance(parameter, SettingOption) else ENGINE_FLAGS.get(name)
        if setting is not None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            given[setting] = (parameter.opts[0], context.params[name])
    return given


def _parse_aliases(texts: tuple[str, ...]) -> dict[str, str]:
    parts = [text.partition("=") for text in texts]
    for name, _, model in parts:
        if not name or not model:
            raise click.BadParameter(f"must be NAME=MODEL: {name!r}", param_hint="--alias")
    return {name: model for name, _, model in parts}


def few_malloc_arenas() -> None:
    """Two arenas of glibc's malloc instead of eight per core: threads that come and go would leave memory
    behind in each (docs/operating.md). Elsewhere nothing is done."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def wake_quickly() -> None:
    """Ask for short time slices for this thread, the event loop's.

    A thread with a shorter slice gets a core at once when it wakes (Linux 6.12 and later), although the
    compute threads keep all of them busy. Threads that it starts have the usual slice again. Elsewhere
    nothing is done. First token over HTTP, 32-token prompt, 12 pairs: 10.3 (8.7-21.9) to 9.1 (8.7-14.0) ms.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return
    # struct sched_attr of sched_setattr(2): size, policy, flags, nice, priority, runtime, deadline, period
    attributes = struct.pack("IIQiIQQQ", 48, 0, SCHED_FLAG_RESET_ON_FORK, 0, 0, SLICE_NS, 0, 0)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


def print_configuration(loaded: LoadedModel, resolved: Resolved, access: Access) -> None:
    """What was decided, one line each: of the model, then every setting with where it comes from."""
    decided = {"hayai": hayai.__version__, **loaded.describe()}
    decided["keys"] = "required" if access.keyed else "not required: any key is accepted"
    rows = [(name, str(value), "") for name, value in decided.items()]
    rows += [(name, value, f"  ({source})") for name, value, source in resolved.rows()]
    width = max(len(name) for name, _, _ in rows)
    click.echo("\n".join(f"{name:<{width}}  {value}{source}" for name, value, source in rows))
    config = resolved.server
    if not is_loopback(config.host) and config.tls_cert is None:
        note(f"warning: {config.host} is served without TLS: keys and prompts can be read on their way")


def ready_text(url: str, access: Access) -> str:
    """The address, and a line to try it with."""
    body = {
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 64,
        "stream": True,
    }
    key = " -H 'Authorization: Bearer YOUR-KEY'" if access.keyed else ""
    return (
        f"\nlistening on {url} (Ctrl-C stops)\n\ntry it:\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{json.dumps(body)}'\n"
    )

"""`hayai`: one verb per file, and only the file of the verb in use is imported.

Exit codes: 0 done, 1 an error that is explained on stderr, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from gettext import gettext

import click

import hayai
from hayai.cli.console import print_error
from hayai.config import one_blas_thread
from hayai.errors import HayaiError

VERBS = {
    "serve": "Serve a model over HTTP with OpenAI's API.",
    "chat": "Talk to a model in the terminal.",
    "run": "Complete one prompt and print the answer.",
    "pull": "Fetch the default model into the cache.",
    "keys": "Make, list and revoke API keys; set limits of tenants.",
    "usage": "Show who used how much; export it as CSV or JSON.",
    "inspect": "Show what is in a model file, and what it needs.",
    "doctor": "Check this machine: processor, memory, speed, what is missing.",
    "bench": "Measure speed, beside other engines in the same run.",
    "claim": "Say whether a speed claim is physically possible.",
}
"""Verb -> one line of help. Verb X is the click command `command` of hayai.cli.X."""


ONE_BLAS_THREAD = ("run", "chat", "serve")
"""Verbs that compute in our own kernels: numpy's matrix threads would only hold memory there (0.6 MB)."""


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports one when it is used: start-up time is a feature."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in VERBS if importlib.util.find_spec(f"hayai.cli.{verb}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        if cmd_name in ONE_BLAS_THREAD:
            one_blas_thread()
        command = importlib.import_module(f"hayai.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(gettext("Commands")):
            formatter.write_dl([(verb, VERBS[verb]) for verb in self.list_commands(ctx)])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: hayai pull, then hayai chat. Help of a verb: hayai VERB --help.",
)
@click.version_option(hayai.__version__, prog_name="hayai", message="%(prog)s %(version)s")
def cli() -> None:
    """Hayai: an LLM inference engine and API server, built for the speed of one request."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Errors of the user's making are one line and a hint; bugs keep their traceback."""
    try:
        code = cli.main(args=args, prog_name="hayai", standalone_mode=False)
    except HayaiError as error:
        print_error(str(error))
        code = 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = error.exit_code
    except click.ClickException as error:
        hint = None
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"{error.ctx.command_path} --help"
        print_error(error.format_message(), hint)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:  # of writing what we print: the disk is full, or the reader is gone
        if not isinstance(error, BrokenPipeError):
            print_error(str(error))
        # the interpreter must not fail on its last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

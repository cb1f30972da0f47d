"""`hayai usage`: who used how much, from the ledger."""

from __future__ import annotations

import re
import time
from typing import Any

import click

from hayai.cli.keys import database_options
from hayai.cli.tables import format_option, show
from hayai.errors import ConfigError
from hayai.server.reports import GROUPS, SUMS, parse_time, usage_rows, usage_sums
from hayai.server.storage import Database, requests

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86_400.0}


class Moment(click.ParamType[float]):
    """A date or time (UTC), or how long ago."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        ago = re.fullmatch(r"(\d{1,6})([mhd])", str(value))
        if ago:
            return time.time() - int(ago[1]) * _UNITS[ago[2]]
        try:
            return parse_time(str(value))
        except ConfigError as error:
            self.fail(f"{error}; or how long ago: 90m, 24h, 7d", param, ctx)


@click.command()
@click.option("--tenant", help="Only this tenant's.")
@click.option("--since", type=Moment(), help="From this time on: 2026-11-24, 2026-11-24T08:00, 90m, 24h, 7d.")
@click.option("--until", type=Moment(), help="Before this time.")
@click.option(
    "--by",
    type=click.Choice((*GROUPS, "request")),
    default="tenant",
    show_default=True,
    help="One line for each of these; 'request': the ledger's rows.",
)
@format_option
@database_options
def command(
    database: str, tenant: str | None, since: float | None, until: float | None, by: str, form: str
) -> None:
    """Show who used how much. Times are UTC; a request counts where it began.

    Tokens are those that clients got: an answer that was cut off counts as far as it was sent.
    """
    with Database(database, create=False) as opened:
        if by == "request":
            columns = [c.name for c in requests.c if c.name != "process"]
            show(form, columns, usage_rows(opened, tenant, since, until))
        else:
            rows = usage_sums(opened, by, tenant, since, until)
            show(form, [*GROUPS[by], *SUMS], rows)

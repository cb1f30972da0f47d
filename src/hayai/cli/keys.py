"""`hayai keys`: API keys, and the limits of the tenants that they belong to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hayai.cli.console import note
from hayai.cli.tables import format_option, show
from hayai.config import read_environment
from hayai.config_file import default_database
from hayai.server.reports import iso_time, last_used
from hayai.server.storage import Database
from hayai.server.tenants import PRIORITIES, Tenant


class Limit(click.ParamType[int | None]):
    """A whole number above 0, or 'none'."""

    name = "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if str(value).lower() == "none":
            return None
        if not str(value).isdecimal() or int(value) == 0:
            self.fail(f"{value!r} is not a whole number above 0, nor 'none'", param, ctx)
        return int(value)


class Models(click.ParamType[frozenset[str] | None]):
    """Names with commas between them, or 'all'."""

    name = "names|all"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[str] | None:
        if str(value).lower() == "all":
            return None
        return frozenset(name.strip() for name in str(value).split(",") if name.strip())


LIMITS = (
    click.option("--requests-per-minute", type=Limit(), help="Requests that may begin in a minute."),
    click.option("--tokens-per-minute", type=Limit(), help="Tokens of prompts and answers in a minute."),
    click.option("--max-parallel", type=Limit(), help="Answers that are made at the same time."),
    click.option("--token-budget", type=Limit(), help="Tokens per calendar month (UTC)."),
    click.option("--priority", type=click.Choice(PRIORITIES), help="'batch' runs when nobody else waits."),
    click.option("--models", type=Models(), help="The models that it may ask for, aliases included."),
)
FIELDS = ("requests_per_minute", "tokens_per_minute", "max_parallel", "token_budget", "priority", "models")


def database_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--database and --config, as the argument `database`: its URL."""

    @functools.wraps(function)
    def call(*args: Any, url: str | None, file: Path | None, **more: Any) -> Any:
        return function(*args, database=default_database(read_environment(), file, url), **more)

    path = click.Path(path_type=Path, dir_okay=False)
    with_file = click.option("--config", "-c", "file", type=path, help="The server's configuration file.")
    with_url = click.option(
        "--database", "url", metavar="URL", help="Where keys are kept. [default: as `hayai serve` finds it]"
    )
    return with_url(with_file(call))


def limit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The limits that were given, as the argument `changes`."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        context = click.get_current_context()
        values = {name: options.pop(name) for name in FIELDS}
        given = {
            name: value
            for name, value in values.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        return function(*args, changes=given, **options)

    decorated: Callable[..., Any] = call
    for option in reversed(LIMITS):
        decorated = option(decorated)
    return decorated


@click.group()
def command() -> None:
    """API keys, and the limits of the tenants that they belong to.

    Limits are a tenant's: they hold for all its keys together. A server that runs with a database follows
    every change within about a second. One that was started without keys has none: start it again after the
    first `hayai keys create`.
    """


@command.command()
@click.option("--tenant", required=True, help="Who the key belongs to; made where it is new.")
@click.option("--name", default="", help="What the key is for, to know it again.")
@limit_options
@database_options
def create(database: str, tenant: str, name: str, changes: dict[str, Any]) -> None:
    """Make a key and print it, once. Limits given here change the tenant's."""
    with Database(database) as opened:
        key, record = opened.create_key(tenant, name, changes)
        click.echo(key)
        note(f"key {record.key_id} of tenant {record.tenant}; it is shown once and kept only as a hash")
        note(f"in {opened.url}; {_limits_text(opened.tenant(tenant))}")


@command.command(name="list")
@click.option("--tenant", help="Only this tenant's.")
@format_option
@database_options
def list_keys(database: str, tenant: str | None, form: str) -> None:
    """Show all keys: their ids, not the keys."""
    with Database(database, create=False) as opened:
        snapshot, used = opened.snapshot(), last_used(opened)
    rows = [
        {
            "id": key.key_id,
            "tenant": key.tenant,
            "name": key.name,
            "created": iso_time(key.created),
            "last_used": iso_time(used.get(key.key_id)),
            "revoked": iso_time(key.revoked),
        }
        for key in sorted(snapshot.keys.values(), key=lambda k: (k.tenant, k.created))
        if tenant in (None, key.tenant)
    ]
    show(form, ("id", "tenant", "name", "created", "last_used", "revoked"), rows)


@command.command()
@click.argument("key_id")
@database_options
def revoke(database: str, key_id: str) -> None:
    """End a key, by its id. It can't be brought back."""
    with Database(database, create=False) as opened:
        key = opened.revoke_key(key_id)
    note(f"key {key.key_id} of tenant {key.tenant} is revoked; servers refuse it within about a second")


@command.command()
@click.argument("tenant", required=False)
@limit_options
@format_option
@database_options
def limits(database: str, tenant: str | None, changes: dict[str, Any], form: str) -> None:
    """Show the limits of all tenants or of one, or change one's: a number, or 'none'."""
    if changes and tenant is None:
        raise click.UsageError("name the tenant whose limits are to change")
    with Database(database, create=False) as opened:
        if changes and tenant is not None:
            opened.set_tenant(tenant, changes)
        tenants = list(opened.snapshot().tenants.values()) if tenant is None else [opened.tenant(tenant)]
    show(form, ("tenant", *FIELDS), map(_row, sorted(tenants, key=lambda t: t.name)))


def _row(tenant: Tenant) -> dict[str, Any]:
    models = "all" if tenant.models is None else ",".join(sorted(tenant.models))
    return {"tenant": tenant.name, **vars(tenant.limits), "priority": tenant.priority, "models": models}


def _limits_text(tenant: Tenant) -> str:
    found = {name: value for name, value in vars(tenant.limits).items() if value is not None}
    return "limits: " + (", ".join(f"{n} {v}" for n, v in found.items()) or "none")

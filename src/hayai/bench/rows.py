"""The records of a run: one row per repetition, kept whole, and what the tables say about them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hayai.bench.inprocess import Roofline
from hayai.bench.machine import Load
from hayai.bench.stats import Spread, bootstrap, paired_ratios, spread


@dataclass(frozen=True)
class Row:
    """One repetition of one side.

    value in `unit`; repetition i of every side of a case belongs to pair i. times: clock points in seconds
    since `started` (per token, or per step in a batch). step_bytes: what one step reads, by claims.py, and
    steps_per_second: how often; both 0 where no roofline applies.
    """

    case: str
    side: str
    peer: str
    file: str
    pair: int
    value: float
    unit: str
    started: float
    times: tuple[float, ...]
    load: Load
    roofline_before: Roofline | None = None
    roofline_after: Roofline | None = None
    step_bytes: float = 0.0
    steps_per_second: float = 0.0
    threads: int = 0
    settings: str = ""
    extra: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """One side of one case over all pairs. `share`: of the read roofline, median over pairs, or None.

    ratio: the first side's value over this one's, pair by pair; None for the first side itself.
    interval: 95 % bootstrap interval of the median value.
    """

    case: str
    side: str
    peer: str
    file: str
    unit: str
    value: Spread
    interval: tuple[float, float]
    contaminated: int
    share: float | None
    ratio: Spread | None
    settings: str


def of(rows: Sequence[Row], case: str, side: str) -> list[Row]:
    return [row for row in rows if row.case == case and row.side == side]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """A summary per case and side, in the order in which they were measured."""
    order = dict.fromkeys((row.case, row.side) for row in rows)
    first: dict[str, str] = {}
    for case, side in order:
        first.setdefault(case, side)
    return [_summary(rows, case, side, first[case]) for case, side in order]


def _summary(rows: Sequence[Row], case: str, side: str, base: str) -> Summary:
    mine = of(rows, case, side)
    values = [row.value for row in mine]
    return Summary(
        case,
        side,
        mine[0].peer,
        mine[0].file,
        mine[0].unit,
        spread(values),
        bootstrap(values),
        sum(row.load.contaminated for row in mine),
        roofline_share(rows, mine),
        None if side == base else ratio_of(rows, case, base, side),
        mine[-1].settings,
    )


def ratio_of(rows: Sequence[Row], case: str, ours: str, theirs: str) -> Spread | None:
    """Ratio of two sides of one case, pair by pair; None where they share no pair."""
    left = {row.pair: row.value for row in of(rows, case, ours)}
    right = {row.pair: row.value for row in of(rows, case, theirs)}
    pairs = sorted(set(left) & set(right))
    return paired_ratios([left[p] for p in pairs], [right[p] for p in pairs]) if pairs else None


def pair_roofline(rows: Sequence[Row], case: str, pair: int, threads: int) -> float | None:
    """GB/s of a pair: the mean of the readings around our own turn."""
    readings = [
        reading.gb_per_second[threads]
        for row in rows
        if row.case == case and row.pair == pair
        for reading in (row.roofline_before, row.roofline_after)
        if reading is not None and threads in reading.gb_per_second
    ]
    return statistics.fmean(readings) if readings else None


def roofline_share(rows: Sequence[Row], mine: Sequence[Row]) -> float | None:
    """Median over pairs of bytes per step * steps per second / bandwidth of the same pair."""
    shares = []
    for row in mine:
        roof = pair_roofline(rows, row.case, row.pair, row.threads)
        if roof and row.step_bytes:
            shares.append(row.step_bytes * row.steps_per_second / (roof * 1e9))
    return statistics.median(shares) if shares else None

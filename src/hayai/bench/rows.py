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
    interval: 95 % bootstrap interval of the median value. quiet, quiet_ratio: the same over the repetitions
    (pairs) that nobody disturbed, None where there are none. remark: what a reader must know.
    """

    case: str
    side: str
    peer: str
    file: str
    unit: str
    value: Spread
    interval: tuple[float, float]
    contaminated: int
    quiet: Spread | None
    share: float | None
    ratio: Spread | None
    quiet_ratio: Spread | None
    settings: str
    remark: str


def of(rows: Sequence[Row], case: str, side: str) -> list[Row]:
    return [row for row in rows if row.case == case and row.side == side]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """A summary per case and side; cases and sides in the order in which they were first measured."""
    order = dict.fromkeys((row.case, row.side) for row in rows)
    cases = dict.fromkeys(case for case, _ in order)
    found = []
    for case in cases:
        sides = [side for name, side in order if name == case]
        found += [_summary(rows, case, side, sides[0]) for side in sides]
    return found


def _summary(rows: Sequence[Row], case: str, side: str, base: str) -> Summary:
    mine = of(rows, case, side)
    values = [row.value for row in mine]
    quiet = [row.value for row in mine if not row.load.contaminated]
    return Summary(
        case=case,
        side=side,
        peer=mine[0].peer,
        file=mine[0].file,
        unit=mine[0].unit,
        value=spread(values),
        interval=bootstrap(values),
        contaminated=len(values) - len(quiet),
        quiet=spread(quiet) if quiet else None,
        share=roofline_share(rows, mine),
        ratio=None if side == base else ratio_of(rows, case, base, side),
        quiet_ratio=None
        if side == base
        else ratio_of([r for r in rows if not r.load.contaminated], case, base, side),
        settings=mine[-1].settings,
        remark=remark(mine),
    )


def remark(mine: Sequence[Row]) -> str:
    """Tokens per chunk where answers came in chunks; threads where fewer were used than asked for."""
    words = []
    chunks = [float(row.extra["tokens_per_chunk"]) for row in mine if "tokens_per_chunk" in row.extra]
    if chunks:
        words.append(f"{statistics.fmean(chunks):.2f} tokens per chunk")
    threads = [float(row.extra["threads"]) for row in mine if "threads" in row.extra]
    if threads and statistics.fmean(threads) < 0.99 * mine[0].threads:
        words.append(f"used {statistics.fmean(threads):.2f} threads of {mine[0].threads}")
    gaps = [float(row.extra["longest_gap_ms"]) for row in mine if "longest_gap_ms" in row.extra]
    if gaps:
        words.append(f"longest gap {max(gaps):.0f} ms")
    return ", ".join(words)


def ratio_of(rows: Sequence[Row], case: str, ours: str, theirs: str) -> Spread | None:
    """Ratio of two sides of one case, pair by pair; None where they share no pair."""
    left = {row.pair: row.value for row in of(rows, case, ours)}
    right = {row.pair: row.value for row in of(rows, case, theirs)}
    pairs = sorted(set(left) & set(right))
    return paired_ratios([left[p] for p in pairs], [right[p] for p in pairs]) if pairs else None


# ---------------------------------------------------------------- the roofline of a pair

PARALLEL_GAIN = 1.15
"""Several threads that read no faster than this times one thread were not running at the same time."""


def ran_parallel(reading: Roofline, threads: int) -> bool:
    """Whether a reading's threads had a core each. Everything disturbs a reading downwards only."""
    rates = reading.gb_per_second
    return threads == 1 or 1 not in rates or rates[threads] >= PARALLEL_GAIN * rates[1]


def readings_of(rows: Sequence[Row], threads: int) -> list[Roofline]:
    found = (reading for row in rows for reading in (row.roofline_before, row.roofline_after))
    return [reading for reading in found if reading is not None and threads in reading.gb_per_second]


def pair_roofline(rows: Sequence[Row], case: str, pair: int, threads: int) -> float | None:
    """GB/s of a pair: the best reading around our own turn, None where none of them counts.

    Readings whose threads shared a core don't count, unless that is so in the whole run: then one thread
    saturates this memory.
    """
    parallel = [r for r in readings_of(rows, threads) if ran_parallel(r, threads)]
    mine = readings_of([row for row in rows if row.case == case and row.pair == pair], threads)
    usable = [r for r in mine if not parallel or ran_parallel(r, threads)]
    return max((r.gb_per_second[threads] for r in usable), default=None)


def roofline_share(rows: Sequence[Row], mine: Sequence[Row]) -> float | None:
    """Median over pairs of bytes per step * steps per second / bandwidth of the same pair."""
    shares = []
    for row in mine:
        roof = pair_roofline(rows, row.case, row.pair, row.threads)
        if roof and row.step_bytes:
            shares.append(row.step_bytes * row.steps_per_second / (roof * 1e9))
    return statistics.median(shares) if shares else None

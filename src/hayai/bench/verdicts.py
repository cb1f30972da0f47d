"""Judging a run against the bars of bars.toml."""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hayai.bench.rows import Row, Summary, of, pair_roofline

BARS = Path(__file__).parent / "bars.toml"


@dataclass(frozen=True)
class Verdict:
    """One bar: what was asked, what was found. passed None = not measured in this run."""

    case: str
    against: str
    asked: str
    found: str
    passed: bool | None


def judge(
    rows: Sequence[Row], summaries: Sequence[Summary], bars: Path = BARS, expected: Collection[str] = ()
) -> list[Verdict]:
    """Every bar that the run has a row for, and every bar of an `expected` case that has none."""
    table = tomllib.loads(bars.read_text())
    measured = {s.case for s in summaries}
    verdicts = [
        _ratio(rows, summaries, bar, table["roofline_share"])
        for bar in table["ratio"]
        if bar["case"] in measured
    ]
    verdicts += [_limit(summaries, bar) for bar in table["limit"] if bar["case"] in measured]
    return verdicts + [
        Verdict(bar["case"], bar.get("against", ""), _asked(bar), "not measured", None)
        for bar in (*table["ratio"], *table["limit"])
        if bar["case"] in expected and bar["case"] not in measured
    ]


def _asked(bar: Mapping[str, Any]) -> str:
    sign, wanted = ("<=", bar["at_most"]) if "at_most" in bar else (">=", bar["at_least"])
    return f"{sign} {wanted:g}{'x' if 'against' in bar else ' ' + bar['unit']}"


def _ratio(
    rows: Sequence[Row], summaries: Sequence[Summary], bar: Mapping[str, Any], share: float
) -> Verdict:
    lower = "at_most" in bar
    wanted = float(bar["at_most"] if lower else bar["at_least"])
    asked = _asked(bar)
    rival = _rival(summaries, bar["case"], bar["against"], lower)
    if rival is None or rival.ratio is None:
        return Verdict(bar["case"], bar["against"], asked, "not measured", None)
    found = rival.ratio.median
    passed = found <= wanted if lower else found >= wanted
    text = f"{found:.2f}x"
    if bar.get("roofline"):
        asked, text, passed = _with_roofline(rows, summaries, rival, wanted, share, asked, text, passed)
    return Verdict(bar["case"], rival.side, asked, text, passed)


def _with_roofline(
    rows: Sequence[Row], summaries: Sequence[Summary], rival: Summary, wanted: float, share: float,
    asked: str, text: str, passed: bool,
) -> tuple[str, str, bool]:  # fmt: skip
    """The bar of a decode row is the lower of the ratio and a share of the roofline."""
    ours = next(s for s in summaries if s.case == rival.case)
    if ours.share is None:
        return asked, text, passed
    text += f", {ours.share:.2f} of the roofline"
    ceiling = ceiling_rate(rows, ours)
    if ceiling is not None and wanted * rival.value.median > share * ceiling:
        asked = (
            f">= {share:g} of the roofline ({wanted:g}x would be {wanted * rival.value.median / ceiling:.2f})"
        )
        passed = ours.share >= share
    return asked, text, passed


def ceiling_rate(rows: Sequence[Row], ours: Summary) -> float | None:
    """Steps per second if the read bandwidth were fully used: median over pairs."""
    found = []
    for row in of(rows, ours.case, ours.side):
        roof = pair_roofline(rows, row.case, row.pair, row.threads)
        if roof and row.step_bytes:
            found.append(roof * 1e9 / row.step_bytes)
    return statistics.median(found) if found else None


def _rival(summaries: Sequence[Summary], case: str, against: str, lower: bool) -> Summary | None:
    """The row that a bar names: '<peer>:<file>', '<peer>:best' (lower: the smallest), or a side's label."""
    peer, _, file = against.partition(":")
    rows = [s for s in summaries if s.case == case]
    if not file:
        return next((s for s in rows if s.side == against), None)
    rows = [s for s in rows if s.peer == peer and file in ("best", s.file)]
    return (min if lower else max)(rows, key=lambda s: s.value.median, default=None)


def _limit(summaries: Sequence[Summary], bar: Mapping[str, Any]) -> Verdict:
    ours = next(s for s in summaries if s.case == bar["case"])
    asked = _asked(bar)
    found = f"{ours.value.median:.{1 if ours.value.median >= 10 else 3}f} {ours.unit}"
    if ours.peer != "hayai":
        return Verdict(bar["case"], "", asked, "not measured", None)
    return Verdict(bar["case"], "", asked, found, ours.value.median <= bar["at_most"])

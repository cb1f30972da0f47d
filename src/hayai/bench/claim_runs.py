"""Prediction beside measurement: rows of `hayai bench speed --json` against the roofline of that same run.

    prediction = bandwidth of the pair / bytes of the step  *  tokens per step

The bandwidth is what the same process read minutes apart at most, the bytes are claims.py's for the file, the
head as it was really read, and the cached positions (docs/measuring.md). Cases that no roofline applies to
(prefill, first token) have no prediction.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hayai.bench.inprocess import Roofline
from hayai.bench.machine import Load
from hayai.bench.rows import Row, pair_roofline
from hayai.errors import ConfigError


@dataclass(frozen=True)
class Predicted:
    """One case of one run, medians over its repetitions. share = measured / predicted.

    depth: of decode-depth, as the run was asked; None where the case is always shallow.
    """

    run: str
    model: str
    case: str
    depth: int | None
    n: int
    step_megabytes: float
    gb_per_second: float
    predicted: float
    measured: float
    share: float


def predictions(path: Path) -> list[Predicted]:
    """Cases of our own engine that have a roofline. ConfigError where the file is no run of `bench speed`."""
    try:
        document = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as JSON: {error}") from None
    wanted = ("rows", "options", "files")
    if not isinstance(document, dict) or any(name not in document for name in wanted):
        raise ConfigError(
            f"{path}: no {', '.join(wanted)}; supported: the file of `hayai bench speed --json`"
        )
    try:
        rows = [read_row(row) for row in document["rows"]]
        model = Path(document["files"]["same"]["path"]).name
        depth = int(document["options"]["sizes"]["depth"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a run of this version: {type(error).__name__}: {error}") from None
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case and row.peer == "hayai" and row.file == "same"]
        one = _predict(path.name, model, case, depth if case == "decode-depth" else None, rows, mine)
        if one is not None:
            found.append(one)
    if not found:
        raise ConfigError(
            f"{path}: no row of ours with a roofline; run a decode case: hayai bench speed --json"
        )
    return found


def read_row(row: Mapping[str, Any]) -> Row:
    """A row as report.py wrote it, back as the record it was."""
    names = {field.name for field in dataclasses.fields(Row)}
    values = {name: value for name, value in row.items() if name in names}
    loads = {field.name for field in dataclasses.fields(Load)}
    values["load"] = Load(**{k: v for k, v in row["load"].items() if k in loads})
    for name in ("roofline_before", "roofline_after"):
        values[name] = _roofline(row.get(name))
    values["times"] = tuple(row["times"])
    return Row(**values)


def _roofline(reading: Mapping[str, Any] | None) -> Roofline | None:
    """JSON turns the numbers of threads into text."""
    if reading is None:
        return None
    rates = {int(threads): float(rate) for threads, rate in reading["gb_per_second"].items()}
    return Roofline(rates, {int(n): tuple(passes) for n, passes in reading.get("passes", {}).items()})


def _predict(
    run: str, model: str, case: str, depth: int | None, rows: Sequence[Row], mine: Sequence[Row]
) -> Predicted | None:
    measured, ceilings, sizes, rates = [], [], [], []
    for row in mine:
        roof = pair_roofline(rows, case, row.pair, row.threads)
        if roof and row.step_bytes and row.steps_per_second:
            per_step = row.value / row.steps_per_second
            measured.append(row.value)
            ceilings.append(roof * 1e9 / row.step_bytes * per_step)
            sizes.append(row.step_bytes / 1e6)
            rates.append(roof)
    if not measured:
        return None
    shares = [value / bound for value, bound in zip(measured, ceilings, strict=True)]
    middle = statistics.median
    return Predicted(
        run, model, case, depth, len(measured), middle(sizes), middle(rates), middle(ceilings),
        middle(measured), middle(shares),
    )  # fmt: skip

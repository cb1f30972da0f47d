"""A load run as tables for people and as JSON for everyone else."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hayai.bench.load import Custom, expected, titles
from hayai.bench.load_metrics import Percentiles, measure
from hayai.bench.load_session import LoadSession, Repetition, repetition_json
from hayai.bench.report import (
    COLUMNS,
    CONTAMINATED_NOTE,
    RIGHT,
    number,
    raw_row,
    summary_section,
    verdict_table,
)
from hayai.bench.rows import summarise
from hayai.bench.stats import spread
from hayai.bench.table import WIDTH, Section, render, wrap
from hayai.bench.verdicts import Verdict, judge

SCHEMA = 1
P99_REQUESTS = 1000
"""Requests from which a p99 may be a headline (docs/measuring.md)."""


def document(session: LoadSession, custom: Custom | None = None) -> dict[str, Any]:
    """Everything about the run: identity, settings, calibration, every request, summaries, verdicts."""
    summaries = summarise(session.rows)
    options = dataclasses.asdict(session.options)
    options["headers"] = sorted(options["headers"])  # their values may be secrets
    return {
        "schema": SCHEMA,
        "kind": "load",
        "identity": session.identity,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        "files": {
            name: {"path": str(path), "bytes": path.stat().st_size}
            for name, path in session.peers.files.items()
        },
        "missing": session.peers.missing,
        "calibration": [dataclasses.asdict(trial) for trial in session.peers.trials],
        "bandwidth_gb_per_second": [dict(reading.gb_per_second) for reading in session.bandwidth],
        "repetitions": [repetition_json(found) for found in session.repetitions],
        "rows": [raw_row(row) for row in session.rows],
        "summary": [dataclasses.asdict(s) for s in summaries],
        "verdicts": [dataclasses.asdict(v) for v in judged(session, custom)],
        "notes": session.notes,
    }


def judged(session: LoadSession, custom: Custom | None) -> list[Verdict]:
    """Every bar of the cases that were asked for, also where nothing was measured."""
    wanted = expected(session.options, custom)
    return judge(session.rows, summarise(session.rows), expected=wanted)


def write_json(session: LoadSession, path: Path, custom: Custom | None = None) -> None:
    """Strict JSON: what could not be measured is null."""
    path.write_text(json.dumps(finite(document(session, custom)), indent=1, default=str) + "\n")


def finite(value: Any) -> Any:
    """nan and infinities, which JSON lacks, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def text_report(session: LoadSession, custom: Custom | None = None) -> str:
    """Identity, figures by case, latencies, accounting, verdicts, notes; at most a hundred columns."""
    summaries = summarise(session.rows)
    named = titles(custom)
    order = [name for name in named if any(s.case == name for s in summaries)]
    sections = [summary_section(f"{n}: {named[n]}", [s for s in summaries if s.case == n]) for n in order]
    parts = ["\n".join(textwrap.wrap(headline(session), WIDTH)), render(COLUMNS, sections, right=RIGHT)]
    if any(s.contaminated for s in summaries):
        parts.append("\n".join(textwrap.wrap(CONTAMINATED_NOTE, WIDTH)))
    parts += [latency_table(session.repetitions), accounting_table(session.repetitions)]
    verdicts = judged(session, custom)
    if verdicts:
        parts.append(verdict_table(verdicts))
    remarks = [f"{name}: not installed; {install}" for name, install in session.peers.missing.items()]
    remarks += [f"note: {note}" for note in session.notes]
    if "q4_0" in session.peers.files:
        remarks.append(
            "q4_0: the same weights, requantised by llama.cpp's own quantiser (embedding and head stay Q8_0)"
        )
    parts.append("\n".join(line for remark in remarks for line in textwrap.wrap(remark, WIDTH)))
    return "\n\n".join(part for part in parts if part)


def headline(session: LoadSession) -> str:
    machine = session.identity["machine"]
    assert isinstance(machine, dict)
    readings = [r.gb_per_second[max(r.gb_per_second)] for r in session.bandwidth]
    roof = ""
    if readings:
        found = spread(readings)
        roof = f"; read bandwidth in this run {found.median:.1f} GB/s ({found.low:.1f}-{found.high:.1f})"
    length = "forced lengths" if session.options.forced else "natural stops"
    options = session.options
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; {options.threads} threads; "
        f"{session.path.name}; {options.pairs} interleaved pairs, greedy, {length}, speculation off{roof}"
    )


def groups(repetitions: Sequence[Repetition]) -> dict[str, dict[str, list[Repetition]]]:
    """Repetitions by case and side, in order."""
    found: dict[str, dict[str, list[Repetition]]] = {}
    for repetition in repetitions:
        found.setdefault(repetition.case, {}).setdefault(repetition.side, []).append(repetition)
    return found


LATENCY = ("side", "n", "TTFT p50", "p90", "p99", "max", "ITL p50", "p90 ", "p99 ", "max ", "TPOT", "e2e p50")


def latency_table(repetitions: Sequence[Repetition]) -> str:
    """Percentiles in milliseconds over the requests of all repetitions together."""
    sections = []
    for case, sides in groups(repetitions).items():
        rows = []
        for side, mine in sides.items():
            stats = measure([r for repetition in mine for r in repetition.requests])
            rows.append(
                (
                    side,
                    str(stats.num_ok),
                    *(milliseconds(v) for v in quantiles(stats.ttft)),
                    *(milliseconds(v) for v in quantiles(stats.itl)),
                    milliseconds(stats.tpot.p50),
                    milliseconds(stats.e2e.p50),
                )
            )
        sections.append(Section(f"{case}: latencies over all repetitions [ms]", rows))
    if not sections:
        return ""
    text = render(LATENCY, sections, right=LATENCY[1:])
    note = (
        f"n: successful requests; a p99 is no headline below {P99_REQUESTS} of them; ITL: gaps of requests "
        "with one token per chunk"
    )
    return "\n".join([text, *wrap(note)])


def quantiles(found: Percentiles) -> tuple[float, float, float, float]:
    return found.p50, found.p90, found.p99, found.max


def milliseconds(seconds: float) -> str:
    return "" if math.isnan(seconds) else number(seconds * 1e3)


ACCOUNTING = (
    "side", "ok", "fail", "tok/s", "req/s", "flight", "hits", "chunk", "met", "good/s", "CPU c/s/o",
)  # fmt: skip
ACCOUNTING_NOTE = (
    "flight: mean number of requests in flight; hits: prompt tokens from a cache; chunk: tokens per chunk; "
    "met, good/s: requests that met every level, as a share and per second; CPU c/s/o: cores used by client, "
    "server, others"
)


def accounting_table(repetitions: Sequence[Repetition]) -> str:
    """Counts over all repetitions, and medians over repetitions of rates and CPU shares (of one core)."""
    sections = []
    for case, sides in groups(repetitions).items():
        rows = [accounting_row(side, mine) for side, mine in sides.items()]
        notes = [note for side, mine in sides.items() for note in accounting_notes(side, mine)]
        slo = next(iter(sides.values()))[0].slo
        sections.append(Section(f"{case}: requests, rates, CPU; levels: {slo}", rows, notes))
    if not sections:
        return ""
    return "\n".join([render(ACCOUNTING, sections, right=ACCOUNTING[1:]), *wrap(ACCOUNTING_NOTE)])


def accounting_row(side: str, mine: Sequence[Repetition]) -> tuple[str, ...]:
    stats = [r.stats for r in mine]
    prompts = sum(s.prompt_tokens for s in stats)
    foreign = [(r.load.others + r.load.steal) / max(r.load.wall, 1e-9) for r in mine]
    return (
        side,
        str(sum(s.num_ok for s in stats)),
        str(sum(s.num_requests - s.num_ok for s in stats)),
        middle([s.output_rate for s in stats]),
        middle([s.request_rate for s in stats]),
        middle([s.in_flight_mean for s in stats]),
        f"{sum(s.cached_tokens for s in stats) / prompts:.0%}" if prompts else "",
        middle([s.tokens_per_chunk for s in stats]),
        f"{statistics.median(s.met for s in stats):.0%}",
        middle([s.goodput for s in stats]),
        "/".join(share(v) for v in ([r.client_cpu for r in mine], [r.server_cpu for r in mine], foreign)),
    )


def accounting_notes(side: str, mine: Sequence[Repetition]) -> list[str]:
    """Failures by kind, and what could not be observed."""
    notes = []
    kinds: Counter[str] = Counter()
    for repetition in mine:
        kinds.update(repetition.stats.failures)
    if kinds:
        notes.append(f"{side} failures: {', '.join(f'{n} x {kind}' for kind, n in kinds.most_common())}")
    unseen = sum(r.stats.unseen_gaps for r in mine)
    if unseen:
        notes.append(f"{side}: gaps of {unseen} requests can't be seen: more tokens than chunks")
    return notes


def middle(values: Sequence[float]) -> str:
    seen = [v for v in values if math.isfinite(v)]
    return number(statistics.median(seen)) if seen else ""


def share(values: Sequence[float]) -> str:
    seen = [v for v in values if math.isfinite(v)]
    return f"{statistics.median(seen):.2f}" if seen else "?"

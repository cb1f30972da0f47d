"""The run as a table for people and as JSON for everyone else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hayai.bench.cases import RAW_CASES, Sizes
from hayai.bench.rows import Row, Summary, summarise
from hayai.bench.session import Session, quality_notes
from hayai.bench.stats import Spread
from hayai.bench.verdicts import Verdict, judge

SCHEMA = 1
TITLES = {case.name: case.title for case in RAW_CASES} | {
    "ttft-http-32": "time to first token over HTTP, 32-token prompt",
    "ttft-http-512": "time to first token over HTTP, 512-token prompt",
    "http": "decode over HTTP after a 32-token prompt, against in process",
    "start": "process start to first token",
    "memory-run": "peak memory of one process, 2048 tokens of context",
    "memory-serve": "peak memory of the server, 2048 tokens of context",
    "contention": "decode beside a busy loop on every core",
}
MARKS = {True: "pass", False: "SHORT", None: "-"}


def document(session: Session) -> dict[str, Any]:
    """Everything about the run: identity, settings, calibration, every repetition, summaries, verdicts."""
    summaries = summarise(session.rows)
    options = dataclasses.asdict(session.options)
    return {
        "schema": SCHEMA,
        "identity": session.identity,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        "files": {
            name: {"path": str(path), "bytes": path.stat().st_size} for name, path in session.files.items()
        },
        "step_bytes": {name: dataclasses.asdict(b) for name, b in session.bytes_of.items()},
        "installations": {
            name: [dataclasses.asdict(i) for i in found] for name, found in session.installations.items()
        },
        "builds": {side.label: side.builds for side in session.peers},
        "missing": session.missing,
        "idle_cpu_seconds": {side.label: side.idle_cpu() for side in session.peers},
        "calibration": [dataclasses.asdict(trial) for trial in session.trials],
        "rows": [raw_row(row) for row in session.rows],
        "summary": [dataclasses.asdict(s) for s in summaries],
        "verdicts": [dataclasses.asdict(v) for v in judge(session.rows, summaries)],
        "perplexity": session.perplexity,
        "notes": [*session.notes, *quality_notes(session)],
    }


def raw_row(row: Row) -> dict[str, Any]:
    """A repetition as JSON, its load with the derived mark."""
    return dataclasses.asdict(row) | {"contaminated": row.load.contaminated}


def write_json(session: Session, path: Path) -> None:
    path.write_text(json.dumps(document(session), indent=1, default=str) + "\n")


def print_report(session: Session, console: Console) -> None:
    """Identity, one table of all cases, verdicts, notes."""
    summaries = summarise(session.rows)
    machine = session.identity["machine"]
    assert isinstance(machine, dict)
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; "
        f"{session.options.threads} threads; {session.files['same'].name}; "
        f"{session.options.pairs} interleaved pairs, greedy, speculation off, prompts never reused"
    )
    console.print(case_table(session.options.sizes, summaries))
    verdicts = judge(session.rows, summaries)
    if verdicts:
        console.print(verdict_table(verdicts))
    for name, install in session.missing.items():
        console.print(f"{name}: not installed; {install}", markup=False)
    for note in (*session.notes, *quality_notes(session)):
        console.print(f"note: {note}", markup=False)
    if "q4_0" in session.files:
        console.print(
            "q4_0: the same weights, requantised by llama.cpp's own quantiser (embedding and head stay Q8_0)"
        )


def case_table(sizes: Sizes, summaries: Sequence[Summary]) -> Table:
    """One line per side and case. `vs`: hayai / side, pair by pair; `roof`: share of the read roofline."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("case", "side", "median", "min-max", "n", "roof", "vs (min-max)", "quiet vs", "settings"):
        right = name in ("median", "n", "roof", "quiet vs")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    last = None
    for summary in summaries:
        if last is not None and summary.case != last:
            table.add_section()
        table.add_row(
            title(summary.case, sizes) if summary.case != last else "",
            summary.side,
            f"{summary.value.median:.1f} {summary.unit}",
            f"{summary.value.low:.1f}-{summary.value.high:.1f}",
            f"{summary.value.n}" + (f" ({summary.contaminated}*)" if summary.contaminated else ""),
            "" if summary.share is None else f"{summary.share:.0%}",
            ratio_text(summary.ratio),
            quiet_text(summary),
            "; ".join(filter(None, (summary.settings, summary.remark))),
        )
        last = summary.case
    if any(s.contaminated for s in summaries):
        table.caption = (
            "* repetitions in which others used more than 12 % of a core (kept); "
            "quiet: median over the pairs without them, and how many"
        )
    return table


def title(case: str, sizes: Sizes) -> str:
    """The case in words, with the lengths of this run."""
    more = {
        "decode": f", {sizes.decode_tokens} tokens",
        "decode-depth": f" {sizes.depth}, {sizes.depth_tokens} tokens",
        "prefill": f" of {sizes.prefill_tokens} tokens",
        "batch": f" ({sizes.batch_sequences} x {sizes.batch_steps})",
    }
    return TITLES[case] + more.get(case, "")


def quiet_text(summary: Summary) -> str:
    ratio = summary.quiet_ratio
    if summary.ratio is None or ratio == summary.ratio:
        return ""
    return "none" if ratio is None else f"{ratio.median:.2f}x ({ratio.n})"


def ratio_text(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for name in ("bar", "against", "asked", "found", "verdict"):
        table.add_column(name, overflow="fold")
    for v in verdicts:
        table.add_row(v.case, v.against, v.asked, v.found, MARKS[v.passed])
    return table

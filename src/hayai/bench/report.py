"""The run as a table for people and as JSON for everyone else."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hayai.bench.cases import RAW_CASES, Sizes
from hayai.bench.rows import Row, Summary, summarise
from hayai.bench.session import Session, quality_notes
from hayai.bench.stats import Spread
from hayai.bench.table import WIDTH, Section, render
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


def text_report(session: Session) -> str:
    """Identity, one table of all cases, verdicts, notes; no line is longer than a hundred columns."""
    summaries = summarise(session.rows)
    machine = session.identity["machine"]
    assert isinstance(machine, dict)
    head = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; "
        f"{session.options.threads} threads; {session.files['same'].name}; "
        f"{session.options.pairs} interleaved pairs, greedy, speculation off, prompts never reused"
    )
    parts = ["\n".join(textwrap.wrap(head, WIDTH)), case_table(session.options.sizes, summaries)]
    verdicts = judge(session.rows, summaries)
    if verdicts:
        parts.append(verdict_table(verdicts))
    remarks = [f"{name}: not installed; {install}" for name, install in session.missing.items()]
    remarks += [f"note: {note}" for note in (*session.notes, *quality_notes(session))]
    if "q4_0" in session.files:
        remarks.append(
            "q4_0: the same weights, requantised by llama.cpp's own quantiser (embedding and head stay Q8_0)"
        )
    if remarks:
        parts.append("\n".join(line for remark in remarks for line in textwrap.wrap(remark, WIDTH)))
    return "\n\n".join(part for part in parts if part)


COLUMNS = ("side", "median", "min-max", "n", "roof", "vs (min-max)", "quiet vs")
RIGHT = ("median", "min-max", "n", "roof", "quiet vs")
CONTAMINATED_NOTE = (
    "* repetitions in which others used more than 12 % of a core (kept); quiet: median over the pairs "
    "without them, and how many"
)


def case_table(sizes: Sizes, summaries: Sequence[Summary]) -> str:
    """One line per side and case. `vs`: hayai / side, pair by pair; `roof`: share of the read roofline."""
    cases = dict.fromkeys(summary.case for summary in summaries)
    sections = [
        summary_section(title(case, sizes), [s for s in summaries if s.case == case]) for case in cases
    ]
    text = render(COLUMNS, sections, right=RIGHT)
    if any(s.contaminated for s in summaries):
        text += "\n\n" + "\n".join(textwrap.wrap(CONTAMINATED_NOTE, WIDTH))
    return text


def summary_section(head: str, summaries: Sequence[Summary]) -> Section:
    """The sides of one case: its unit in the title, settings and remarks below the rows."""
    rows = [
        (
            summary.side,
            number(summary.value.median),
            f"{number(summary.value.low)}-{number(summary.value.high)}",
            f"{summary.value.n}" + (f" ({summary.contaminated}*)" if summary.contaminated else ""),
            "" if summary.share is None else f"{summary.share:.0%}",
            ratio_text(summary.ratio),
            quiet_text(summary),
        )
        for summary in summaries
    ]
    notes = [
        f"{summary.side}: {'; '.join(filter(None, (summary.settings, summary.remark)))}"
        for summary in summaries
        if summary.settings or summary.remark
    ]
    return Section(f"{head} [{summaries[0].unit}]" if summaries else head, rows, notes)


def number(value: float) -> str:
    """Four digits that count, no exponent: 1234, 123.4, 12.34, 1.234."""
    size = abs(value)
    return f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"


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


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [(v.case, v.against, v.asked, v.found, MARKS[v.passed]) for v in verdicts]
    return render(("bar", "against", "asked", "found", "verdict"), [Section("", rows)])

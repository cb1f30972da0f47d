"""What `hayai claim` prints: tables of a hundred columns, and the same figures as JSON values."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hayai.bench.claim import (
    PARALLEL,
    PRECISIONS,
    Ceiling,
    Setup,
    Verdict,
    compute_rate,
    describe,
)
from hayai.bench.claim_models import shape_rows
from hayai.bench.claim_points import Checked, Provider, best_point, hardware_table
from hayai.bench.table import WIDTH, Section, render, wrap


def claim_text(setup: Setup, bound: Ceiling, verdict: Verdict | None) -> str:
    """The setup, its floor by parts, the ceiling, and what the claim asks for."""
    parts = [_head(setup), _floor_table(setup, bound), _ceiling_lines(setup, bound)]
    if verdict is not None:
        parts.append(_verdict_lines(setup, verdict))
    return "\n\n".join(parts)


def _head(setup: Setup) -> str:
    model, hardware = setup.model, setup.hardware
    words = [
        f"{model.title} ({model.source})",
        f"{setup.devices} x {hardware.title}, {setup.parallel} ({hardware.source}"
        + (f", {hardware.date})" if hardware.date else ")"),
        f"weights {setup.precision or 'as in the file'}, cache {setup.kv}, batch {setup.batch}, "
        f"context {setup.context:g}",
    ]
    if setup.drafts:
        cost = "as counted" if setup.step_cost is None else f"{setup.step_cost:g} plain steps"
        words.append(
            f"speculation: {setup.drafts} drafts, {setup.tokens_per_step:g} tokens/step, cost {cost}"
        )
    if model.note:
        words.append(f"note: {model.note}")
    return "\n".join(line for word in words for line in textwrap.wrap(word, WIDTH, subsequent_indent="  "))


def _floor_table(setup: Setup, bound: Ceiling) -> str:
    """Bytes and times of a plain step, and beside it of the verification and a draft where there are any."""
    steps = [("plain step", bound.plain)]
    if bound.verify is not bound.plain:
        steps.append((f"verify {1 + setup.drafts} rows", bound.verify))
    if bound.draft is not None:
        steps.append(("one draft", bound.draft))
    parts = [
        part for part in bound.plain.weights if any(step.weights.get(part, 0) >= 5e4 for _, step in steps)
    ]
    rows = [(part, *(size(step.weights.get(part, 0.0)) for _, step in steps)) for part in parts]
    rows += [
        ("keys, values, index", *(size(step.kv_bytes) for _, step in steps)),
        ("all bytes", *(size(step.total_bytes) for _, step in steps)),
        ("memory time", *(micro(step.memory_s) for _, step in steps)),
        ("compute time", *(micro(step.compute_s) for _, step in steps)),
        ("link time", *(micro(step.link_s) for _, step in steps)),
        ("collectives", *(f"{step.collectives}, {micro(step.latency_s)}" for _, step in steps)),
        ("floor of the step", *(micro(step.seconds) for _, step in steps)),
    ]
    names = tuple(name for name, _ in steps)
    rate = compute_rate(setup)
    notes = []
    if rate is None:
        notes.append(
            "compute time: the peak rate of this hardware is not known to the table, so it bounds nothing"
        )
    else:
        notes.append(f"compute time at {rate[1]:g} TFLOP/s per device ({rate[0]})")
    if bound.plain.collectives and not setup.collective_us:
        notes.append("collectives are taken as free; --collective-us gives them a latency")
    return render(("floor", *names), [Section("", rows, notes)], right=names)


def _ceiling_lines(setup: Setup, bound: Ceiling) -> str:
    lines = [f"ceiling   {number(bound.per_request)} tok/s for one request (bound by {bound.verify.bound})"]
    if setup.batch > 1:
        lines.append(f"          {number(bound.total)} tok/s in all, {setup.batch} requests")
    if bound.hard > 1.001 * bound.per_request:
        words = "if all tokens of a step chose the same experts: the hard limit"
        lines.append(f"          {number(bound.hard)} tok/s {words}")
    memory = setup.hardware.memory_gb
    room = "memory of the hardware unknown" if memory is None else f"of {number(memory * setup.devices)} GB"
    fits = {True: "", False: ": DOES NOT FIT", None: ""}[bound.fits]
    held = f"{bound.weight_footprint / 1e9:,.1f} GB of weights, {size(bound.kv_footprint)} of cache"
    lines.append(f"memory    {held}, {room}{fits}")
    return "\n".join(lines)


def _verdict_lines(setup: Setup, verdict: Verdict) -> str:
    title = f"claim     {number(verdict.claim)} tok/s: {verdict.share:.0%} of the ceiling, {verdict.possible}"
    lines = [title, "what would have to be true"]
    for need in verdict.needs:
        lines += wrap(f"- {need}")
    best = best_point(setup)
    if best is not None and best.share is not None:
        point = best.point
        lines += wrap(
            f"- for comparison, the best public point of this hardware reaches {best.share:.0%} of its own "
            f"ceiling: {number(point.tok_s)} tok/s, {point.model}, {point.title}"
        )
    return "\n".join(lines)


def claim_json(setup: Setup, bound: Ceiling, verdict: Verdict | None) -> dict[str, Any]:
    """Everything that claim_text shows, as numbers in base units."""
    model = setup.model
    return {
        "schema": "hayai.claim/1",
        "model": {"name": model.name, "title": model.title, "source": model.source, "note": model.note,
                  "layers": model.config.num_layers},
        "hardware": dataclasses.asdict(setup.hardware),
        "setup": {
            field.name: getattr(setup, field.name)
            for field in dataclasses.fields(setup)
            if field.name not in ("model", "hardware")
        },
        "steps": {
            "plain": describe(bound.plain),
            "verify": None if bound.verify is bound.plain else describe(bound.verify),
            "draft": None if bound.draft is None else describe(bound.draft),
        },
        "ceiling": {
            "step_s": bound.step_s, "step_cost": bound.step_cost, "tok_s_per_request": bound.per_request,
            "tok_s_total": bound.total, "tok_s_shared_experts": bound.hard,
            "weight_bytes": bound.weight_footprint, "cache_bytes": bound.kv_footprint, "fits": bound.fits,
        },
        "claim": None if verdict is None else dataclasses.asdict(verdict),
    }  # fmt: skip


# ---------------------------------------------------------------- lists


def list_text() -> str:
    """Models, precisions, parallelism, hardware with sources."""
    models = [(name, row["title"]) for name, row in shape_rows().items()]
    files = ("or a .gguf, a config.json, a .toml of ModelConfig",)
    precisions = [(name, row.title) for name, row in PRECISIONS.items()]
    hardware = [
        (
            h.name, h.title, known(h.memory_gb), number(h.bandwidth_gb_s),
            ", ".join(f"{k} {v:g}" for k, v in h.tflops.items()) or "unknown",
            known(h.link_gb_s),
        )
        for h in hardware_table().values()
    ]  # fmt: skip
    sources = [line for h in hardware_table().values() for line in wrap(f"{h.name}: {h.source}, {h.date}")]
    return "\n\n".join(
        (
            render(("model", "shape"), [Section("", models, files)]),
            render(("precision", "what is stored how"), [Section("", precisions)]),
            render(("parallel", "how devices share the work"), [Section("", list(PARALLEL.items()))]),
            render(
                ("hardware", "title", "GB", "GB/s", "TFLOP/s dense", "link GB/s"),
                [Section("", hardware)], right=("GB", "GB/s", "link GB/s"),
            ),
            "\n".join(("sources", *sources)),
        )
    )  # fmt: skip


def points_text(checked: Sequence[Checked]) -> str:
    """Every public point with the share of its ceiling; those that can't be counted, with what is missing."""
    rows = []
    for one in checked:
        point = one.point
        if one.ceiling is None or one.share is None:
            continue
        rows.append(
            (
                point.model, point.title, f"{point.devices} {point.hardware} {point.precision}",
                ("~" if point.best else "") + number(point.tok_s), number(one.ceiling.per_request),
                f"{one.share:.1%}",
            )
        )  # fmt: skip
    missing = [
        (c.point.model, c.point.title, number(c.point.tok_s), c.point.missing)
        for c in checked
        if c.point.missing
    ]
    table = render(
        ("model", "point", "on", "tok/s", "ceiling", "share"), [Section("", rows)],
        right=("tok/s", "ceiling", "share"),
    )  # fmt: skip
    other = render(
        ("model", "not checkable", "tok/s", "not stated"), [Section("", missing)], right=("tok/s",)
    )
    counts = Counter(c.point.source for c in checked)
    sources = [line for source, count in counts.items() for line in wrap(f"{source} ({count})")]
    note = (
        "What a point does not state is taken as what gives the highest ceiling: context 1, a 4-bit cache, "
        "every draft accepted. None of these figures is ours. ~ = about, or up to."
    )
    return "\n\n".join((table, textwrap.fill(note, WIDTH), other, "\n".join(("sources (points)", *sources))))


def providers_text(rows: Sequence[Provider]) -> str:
    """Claims of the press report, what nobody said, and what we measured."""
    cells = [
        (
            p.model, ("about " if p.approximate else "") + f"{p.claimed_tok_s:g}", p.claimed_by, p.measured,
            ", ".join(p.undisclosed),
        )
        for p in rows
    ]  # fmt: skip
    names = ("model", "claimed tok/s", "by whom", "measured by us", "undisclosed")
    lines = []
    for row in cells:
        lines.append(f"{row[0]}: {row[1]} tok/s claimed")
        for name, cell in zip(names[2:], row[2:], strict=True):
            lines += textwrap.wrap(
                f"  {name}: {cell}", WIDTH, subsequent_indent="    ", break_on_hyphens=False
            )
    return "\n".join(lines)


def known(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def number(value: float) -> str:
    """Four digits that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def size(value: float) -> str:
    """Bytes in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return (
                f"{value / scale:.{0 if value >= 100 * scale else 1 if value >= 10 * scale else 2}f} {unit}"
            )
    return f"{value:.0f} B"


def micro(seconds: float | None) -> str:
    """Microseconds; None = unknown."""
    if seconds is None:
        return "unknown"
    value = seconds * 1e6
    return f"{value:,.0f} us" if value >= 10 else f"{value:.2f} us" if value else "0 us"

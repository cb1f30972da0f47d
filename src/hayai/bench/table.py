"""Plain text tables that fit a hundred columns, for terminals, files and pull requests alike."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 100
GAP = "  "
INDENT = "  "


@dataclass(frozen=True)
class Section:
    """A title line, rows below it, and notes that belong to them (wrapped at WIDTH)."""

    title: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)


def render(
    columns: Sequence[str], sections: Sequence[Section], *, right: Sequence[str] = (), width: int = WIDTH
) -> str:
    """Sections under one head, every column as wide as its widest cell in the whole table.

    right: columns that are aligned right. A row that would pass `width` has its last cell wrapped, and the
    other cells are cut with an ellipsis only where even that is not enough.
    """
    used = [i for i, _ in enumerate(columns) if any(row[i] for s in sections for row in s.rows)]
    rows = [[row[i] for i in used] for s in sections for row in s.rows]
    names = [columns[i] for i in used]
    if not names:
        return ""
    widths = [max(len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(names)]
    _shrink(widths, names, width)
    aligned = [name in right for name in names]
    lines = [*_line(names, widths, aligned), "-" * (sum(widths) + len(GAP) * (len(widths) - 1))]
    for number, section in enumerate(sections):
        if number:
            lines.append("")
        if section.title:
            lines += textwrap.wrap(section.title, width)
        for row in section.rows:
            lines += _line([row[i] for i in used], widths, aligned)
        for note in section.notes:
            lines += wrap(note, width)
    return "\n".join(lines)


def wrap(text: str, width: int = WIDTH) -> list[str]:
    """A remark, indented below the rows it belongs to; never broken inside a word that would fit a line."""
    return textwrap.wrap(
        text, width, initial_indent=INDENT, subsequent_indent=INDENT * 2, break_on_hyphens=False
    )


def _shrink(widths: list[int], names: Sequence[str], width: int) -> None:
    """Take from the widest column, but never less than its name, until the line fits."""
    room = width - len(GAP) * (len(widths) - 1)
    while sum(widths) > room:
        spare = [w - len(n) for w, n in zip(widths, names, strict=True)]
        widest = max(range(len(widths)), key=lambda i: (spare[i] > 0, widths[i]))
        if spare[widest] <= 0:
            return
        widths[widest] -= 1


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    """The lines of one row: more than one where a cell was made narrower than its text."""
    parts = [
        textwrap.wrap(cell, w, break_on_hyphens=False) or [""] for cell, w in zip(cells, widths, strict=True)
    ]
    lines = []
    for number in range(max(map(len, parts))):
        found = [
            (p[number] if number < len(p) else "").rjust(w) if r else
            (p[number] if number < len(p) else "").ljust(w)
            for p, w, r in zip(parts, widths, right, strict=True)
        ]  # fmt: skip
        lines.append(GAP.join(found).rstrip())
    return lines

"""The op list is frozen: the table of the decision note says what ops.py says, row by row."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from hayai.plan.ops import ALL_OPS, Op

NOTE = Path(__file__).parents[2] / "docs" / "decisions" / "001-op-list.md"


def row(op: type[Op]) -> str:
    """name | reads | writes | weight slots | settings; `?` may be absent, `*` a tuple."""
    by_name = {field.name: field for field in fields(op)}

    def operands(names: tuple[str, ...]) -> str:
        shown = []
        for name in names:
            kind = str(by_name[name].type) if name in by_name else "str | None"
            mark = "*" if kind.startswith("tuple") else "?" if kind.endswith("None") else ""
            shown.append(name + mark)
        return ", ".join(shown)

    settings = []
    for name, field in by_name.items():
        if name in (*op.reads, *op.writes, *op.slots):
            continue
        default = "" if field.default is MISSING else f"={field.default}"
        settings.append(f"{name}: {field.type}{default}".replace(" | None", "?"))
    cells = (op.__name__, operands(op.reads), operands(op.writes), operands(op.slots), ", ".join(settings))
    return "| " + " | ".join(cell or "-" for cell in cells) + " |"


def test_the_note_and_the_code_agree() -> None:
    lines = NOTE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| op |")) + 2
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append(line)
    assert table == [row(op) for op in ALL_OPS]

"""Text tables: widths, alignment, wrapping, and the speed report's line length."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from hayai.bench.cases import Sizes
from hayai.bench.machine import Load
from hayai.bench.report import case_table, number
from hayai.bench.rows import Row, summarise
from hayai.bench.table import WIDTH, Section, render, wrap
from hayai.cli.bench import CASE_NAMES, PEER_NAMES, command


def test_columns_are_as_wide_as_their_widest_cell_and_empty_ones_are_left_out() -> None:
    text = render(
        ("side", "value", "never"),
        [Section("one", [("a", "1.0", "")]), Section("two", [("longer", "200.0", "")], ["a remark"])],
        right=("value",),
    )
    assert text.splitlines() == [
        "side    value",
        "-------------",
        "one",
        "a         1.0",
        "",
        "two",
        "longer  200.0",
        "  a remark",
    ]


def test_a_table_that_is_too_wide_wraps_cells_and_loses_no_word() -> None:
    words = "every word of a long cell stays readable in a narrow table whatever its width"
    text = render(("name", "what"), [Section("", [("x", words)])], width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert text.split("\n", 2)[2].split()[1:] == words.split()


def test_remarks_are_wrapped_between_words() -> None:
    lines = wrap("llama-server " * 20)
    assert max(map(len, lines)) <= WIDTH
    assert all(word == "llama-server" for line in lines for word in line.split())


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12346"), (123.45, "123.5"), (12.345, "12.35"), (1.2345, "1.234")]
)
def test_numbers_carry_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_speed_table_fits_with_the_longest_names_and_numbers() -> None:
    rows = [
        Row(
            "decode-depth", side, side.split()[0], "same", pair, 123456.7 * (1 + pair), "tok/s", 0.0, (),
            Load(1.0, 0.5 * pair, 0.0), settings="a peer's package 0.3.36, " + "many settings, " * 12,
        )
        for pair in range(3)
        for side in ("hayai, 2 threads", "ik_llama.cpp same", "llama-server q4_0")
    ]  # fmt: skip
    text = case_table(Sizes(), summarise(rows))
    assert "decode at depth 1024, 128 tokens [tok/s]" in text
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("verb", ["speed"])
def test_help_breaks_no_name(verb: str) -> None:
    text = CliRunner().invoke(command, [verb, "--help"]).output
    for name in (*CASE_NAMES, *PEER_NAMES):
        assert name in text

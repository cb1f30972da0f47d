"""Bars: ratios pair by pair, the roofline rule, the best of several rows."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from hayai.bench.cases import GROUPS, RAW_CASES
from hayai.bench.inprocess import Roofline, typical
from hayai.bench.load import titles
from hayai.bench.load_sides import LOAD_PEERS
from hayai.bench.machine import Load
from hayai.bench.peers import read_specs
from hayai.bench.report import TITLES
from hayai.bench.rows import Row, pair_roofline, summarise
from hayai.bench.verdicts import BARS, Verdict, judge
from hayai.cli.bench import CASE_NAMES, PEER_NAMES
from hayai.cli.bench import LOAD_PEERS as LOAD_PEER_NAMES

LOAD_TITLES = titles()
QUIET = Load(1.0, 0.0, 0.0)


def row(side: str, peer: str, file: str, pair: int, value: float, roof: float | None = None) -> Row:
    """A decode repetition that reads 0.1 GB a step."""
    reading = None if roof is None else Roofline({2: roof})
    return Row(
        "decode", side, peer, file, pair, value, "tok/s", 0.0, (), QUIET, reading, reading,
        step_bytes=1e8, steps_per_second=value, threads=2,
    )  # fmt: skip


def rows(ours: list[float], theirs: list[float], best: list[float], roof: float) -> list[Row]:
    found = [row("hayai", "hayai", "same", i, v, roof) for i, v in enumerate(ours)]
    found += [row("llama.cpp same", "llama.cpp", "same", i, v) for i, v in enumerate(theirs)]
    found += [row("ik_llama.cpp same", "ik_llama.cpp", "same", i, v) for i, v in enumerate(theirs)]
    return found + [row("ik_llama.cpp q4_0", "ik_llama.cpp", "q4_0", i, v) for i, v in enumerate(best)]


def verdict(found: list[Verdict], against: str) -> Verdict:
    return next(v for v in found if v.against == against)


def test_ratios_and_the_best_row_of_a_peer() -> None:
    measured = rows([220.0, 440.0, 330.0], [100.0, 200.0, 100.0], [110.0, 220.0, 200.0], roof=1000.0)
    summaries = summarise(measured)
    found = judge(measured, summaries)
    same = verdict(found, "llama.cpp same")
    assert same.passed and same.found.startswith("2.20x")
    best = verdict(found, "ik_llama.cpp q4_0")
    assert best.passed and best.found.startswith("2.00x")
    assert verdict(found, "llama.cpp:q4_0") == Verdict(
        "decode", "llama.cpp:q4_0", ">= 1.7x", "not measured", None
    )
    assert summaries[0].share == pytest.approx(330 * 1e8 / 1000e9)


@pytest.mark.parametrize(("ours", "passed"), [(340.0, True), (320.0, False)])
def test_where_a_ratio_would_ask_for_too_much_of_the_roofline_the_share_is_the_bar(
    ours: float, passed: bool
) -> None:
    """40 GB/s allow 400 steps of 0.1 GB; 2.2 times 200 is more than 0.82 of it, which is 328."""
    measured = rows([ours] * 3, [200.0] * 3, [100.0] * 3, roof=40.0)
    found = verdict(judge(measured, summarise(measured)), "llama.cpp same")
    assert found.passed is passed
    assert found.asked.startswith(">= 0.82 of the roofline")


def test_contaminated_repetitions_are_kept_and_counted() -> None:
    measured = rows([1.0, 2.0, 3.0], [1.0] * 3, [1.0] * 3, roof=1.0)
    loud = Row(**{**vars(measured[1]), "load": Load(1.0, 0.5, 0.0)})
    summaries = summarise([measured[0], loud, *measured[2:]])
    assert (summaries[0].value.n, summaries[0].contaminated) == (3, 1)
    assert summaries[0].quiet is not None and summaries[0].quiet.n == 2
    assert summaries[1].ratio is not None and summaries[1].ratio.n == 3
    assert summaries[1].quiet_ratio is not None and summaries[1].quiet_ratio.n == 2


def test_a_reading_whose_threads_shared_a_core_does_not_count() -> None:
    """Bandwidth that two threads could not use is no roofline: the share would flatter us."""

    def with_roofs(pair: int, before: dict[int, float], after: dict[int, float]) -> Row:
        whole = vars(row("hayai", "hayai", "same", pair, 400.0))
        return Row(**{**whole, "roofline_before": Roofline(before), "roofline_after": Roofline(after)})

    mixed = [
        with_roofs(0, {1: 50.0, 2: 50.0}, {1: 50.0, 2: 80.0}),
        with_roofs(1, {1: 50.0, 2: 51.0}, {1: 50.0, 2: 49.0}),
    ]
    assert pair_roofline(mixed, "decode", 0, 2) == 80.0
    assert pair_roofline(mixed, "decode", 1, 2) is None
    assert summarise(mixed)[0].share == pytest.approx(0.1 * 400 / 80)
    saturated = [with_roofs(0, {1: 50.0, 2: 51.0}, {1: 50.0, 2: 52.0})]
    assert pair_roofline(saturated, "decode", 0, 2) == 52.0


def test_stacked_passes_do_not_count() -> None:
    assert typical([40.0, 100.0, 102.0, 98.0, 55.0]) == 100.0
    assert typical([50.0]) == 50.0


def test_the_data_files_speak_of_cases_and_peers_that_exist() -> None:
    table = tomllib.loads(Path(BARS).read_text())
    specs = read_specs()
    assert tuple(specs) == PEER_NAMES
    assert CASE_NAMES == GROUPS
    for bar in [*table["ratio"], *table["limit"]]:
        assert bar["case"] in {**TITLES, **LOAD_TITLES}
        assert ("at_least" in bar) != ("at_most" in bar)
        peer, _, file = bar.get("against", "").partition(":")
        if file:
            assert file == "best" or file in specs[peer].files
    for spec in specs.values():
        for variant in spec.variants:
            assert set(variant.cases) <= {case.name for case in RAW_CASES}
    loaded = read_specs(LOAD_PEERS)
    assert tuple(loaded) == LOAD_PEER_NAMES
    for variant in loaded["llama-server"].variants:
        assert variant.cases and set(variant.cases) <= {"batch", "freeze", "cached"}


def test_a_case_that_gave_no_row_is_not_measured() -> None:
    """A peer that did not run, or a case that broke, must not look like a bar that was met."""
    found = judge([], [], expected={"parallel8", "bits"})
    assert {(v.case, v.asked, v.passed) for v in found} == {
        ("parallel8", ">= 6x", None),
        ("parallel8", ">= 3.2x", None),
        ("bits", "<= 0 changed", None),
    }


@pytest.mark.parametrize(
    ("case", "ours", "passed"), [("parallel8-ttft", 20.0, True), ("parallel8-ttft", 30.0, False)]
)
def test_the_best_row_of_a_time_is_the_shortest(case: str, ours: float, passed: bool) -> None:
    """Against 200 and 50 ms: at most a quarter of the first and half of the better one."""
    measured = []
    for side, peer, file, value in (
        ("hayai serve", "hayai", "same", ours),
        ("llama-server same", "llama-server", "same", 200.0),
        ("llama-server q4_0", "llama-server", "q4_0", 50.0),
    ):
        measured.append(Row("parallel8-ttft", side, peer, file, 0, value, "ms", 0.0, (), QUIET))
    found = {v.asked: v for v in judge(measured, summarise(measured))}
    assert found["<= 0.25x"].passed
    assert found["<= 0.5x"].against == "llama-server q4_0"
    assert found["<= 0.5x"].passed is passed

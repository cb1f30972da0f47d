"""The search for the highest rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayai.bench.sweep import RateSearch


def search(limit: float, start: float, probes: int = 40) -> RateSearch:
    found = RateSearch(start, max_probes=probes)
    while (rate := found.next_rate()) is not None:
        found.record(rate, rate <= limit)
    return found


@given(limit=st.floats(0.05, 200.0), start=st.floats(0.05, 200.0))
def test_it_ends_within_its_precision_below_the_limit(limit: float, start: float) -> None:
    found = search(limit, start, probes=60)
    assert found.bracketed
    assert found.passed <= limit < found.failed <= found.passed * found.precision


def test_a_few_probes_are_enough_from_a_near_guess() -> None:
    assert len(search(3.0, 2.0).probes) <= 6
    assert len(search(3.0, 6.0).probes) <= 7


def test_it_stops_when_its_probes_are_used_up() -> None:
    found = search(1000.0, 1.0, probes=4)
    assert [rate for rate, _ in found.probes] == pytest.approx([1.0, 1.5, 2.25, 3.375])
    assert found.passed == pytest.approx(3.375) and math.isinf(found.failed) and not found.bracketed


def test_nothing_passes() -> None:
    found = search(0.0, 1.0, probes=5)
    assert found.passed == 0.0 and not found.bracketed
    assert found.failed == pytest.approx(1.0 / 1.5**4)


def test_a_lucky_pass_above_a_failure_moves_nothing() -> None:
    found = RateSearch(1.0)
    found.record(1.0, True)
    found.record(2.0, False)
    found.record(2.5, True)
    assert (found.passed, found.failed) == (1.0, 2.0)

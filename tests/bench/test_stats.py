"""Medians, paired ratios and bootstrap intervals."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from hayai.bench.stats import Spread, bootstrap, paired_ratios, quantile, spread


def test_spread_of_known_values() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_ratios_are_taken_pair_by_pair() -> None:
    """A slow minute slows both halves of a pair: the ratios stay, the ratio of medians would not."""
    ours, theirs = [10.0, 20.0, 60.0], [5.0, 10.0, 15.0]
    assert paired_ratios(ours, theirs) == Spread(2.0, 2.0, 4.0, 3)
    with pytest.raises(ValueError, match="equal numbers"):
        paired_ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        paired_ratios([1.0], [0.0])


@pytest.mark.parametrize("q", [0.0, 0.025, 0.5, 0.99, 1.0])
def test_quantile_is_numpys(q: float) -> None:
    rng = random.Random(5)
    for n in (1, 2, 5, 100):
        values = [rng.uniform(-3, 9) for _ in range(n)]
        assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)))


def test_bootstrap_repeats_and_covers_the_median() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(100):
        values = [rng.gauss(5.0, 1.0) for _ in range(25)]
        low, high = bootstrap(values, rounds=300)
        assert (low, high) == bootstrap(values, rounds=300)
        assert low <= statistics.median(values) <= high
        covered += low <= 5.0 <= high
    assert 85 <= covered <= 100

"""The few statistics that the reports use: medians with their range, paired ratios, bootstrap intervals."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of n values."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Median with its range; ValueError on an empty sample."""
    if not values:
        raise ValueError("a spread needs at least one value")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ratio ours / theirs pair by pair: repetition i of one side against repetition i of the other.

    The sides alternate, so the two halves of a pair are neighbours in time. Both sequences have the same
    length, and no zero stands in the denominator.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"pairs need equal numbers of repetitions: {len(ours)} and {len(theirs)}")
    if any(value <= 0.0 for value in theirs):
        raise ValueError("a ratio needs positive values in the denominator")
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation between order statistics (numpy's default)."""
    if not values or not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile {q} of {len(values)} values")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    *,
    level: float = 0.95,
    rounds: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic (Efron 1979); resampling is seeded, so it repeats."""
    if not values:
        raise ValueError("a bootstrap needs at least one value")
    rng = random.Random(seed)
    drawn = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(rounds))
    tail = (1.0 - level) / 2.0
    return quantile(drawn, tail), quantile(drawn, 1.0 - tail)

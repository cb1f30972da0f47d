"""The search for the highest rate that a server stands: by steps until it is bracketed, then by bisection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

GROWTH = 1.5
PRECISION = 1.12
"""The search ends when the lowest rate that failed is at most this much above the highest that passed."""


@dataclass
class RateSearch:
    """Asks for rates (`next_rate`), is told whether they were stood (`record`), and narrows down.

    start: the first guess, requests per second. max_probes bounds the search; its result is then the
    highest rate that passed, however wide the bracket still is. A rate that passed above one that failed
    (noise) moves nothing: the lower of the two counts.
    """

    start: float
    growth: float = GROWTH
    precision: float = PRECISION
    max_probes: int = 10
    passed: float = 0.0
    failed: float = math.inf
    probes: list[tuple[float, bool]] = field(default_factory=list)

    def next_rate(self) -> float | None:
        """The rate to try now; None when the search is over."""
        if len(self.probes) >= self.max_probes:
            return None
        if not self.probes:
            return self.start
        if self.passed == 0.0:
            return self.failed / self.growth
        if math.isinf(self.failed):
            return self.passed * self.growth
        if self.failed / self.passed <= self.precision:
            return None
        return math.sqrt(self.passed * self.failed)

    def record(self, rate: float, stood: bool) -> None:
        self.probes.append((rate, stood))
        if stood and rate < self.failed:
            self.passed = max(self.passed, rate)
        elif not stood:
            self.failed = min(self.failed, rate)

    @property
    def bracketed(self) -> bool:
        """Whether a rate passed and a higher one failed."""
        return self.passed > 0.0 and math.isfinite(self.failed)

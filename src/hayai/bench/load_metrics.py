"""What a load amounts to: latencies, throughput, goodput, failures. Definitions: docs/measuring.md."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hayai.bench.load_requests import Request
from hayai.bench.stats import quantile


@dataclass(frozen=True)
class Slo:
    """Service levels of one request, in seconds; all that are given must be met. A failed request meets none.

    tpot applies from two tokens on; itl is the longest gap of the request, where gaps can be seen.
    """

    ttft: float = math.inf
    tpot: float = math.inf
    e2e: float = math.inf

    def met(self, request: Request) -> bool:
        if not request.ok or request.ttft > self.ttft or request.e2e > self.e2e:
            return False
        return math.isnan(request.tpot) or request.tpot <= self.tpot

    def latest(self, num_tokens: int) -> float:
        """Seconds after which a request of so many tokens that is not over has missed one of its levels."""
        return min(self.e2e, self.ttft + max(0, num_tokens - 1) * self.tpot)

    def __str__(self) -> str:
        parts = [
            f"{name.upper()} <= {value * 1e3:g} ms"
            for name, value in (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e))
            if math.isfinite(value)
        ]
        return ", ".join(parts) or "no failure"


@dataclass(frozen=True)
class Percentiles:
    """Of n values, in the unit of the values; all nan where n is 0."""

    p50: float
    p90: float
    p99: float
    max: float
    n: int


def percentiles(values: Sequence[float]) -> Percentiles:
    """Quantiles by linear interpolation; nan values (not observable) are left out and not counted."""
    seen = [value for value in values if not math.isnan(value)]
    if not seen:
        return Percentiles(math.nan, math.nan, math.nan, math.nan, 0)
    return Percentiles(quantile(seen, 0.5), quantile(seen, 0.9), quantile(seen, 0.99), max(seen), len(seen))


@dataclass(frozen=True)
class LoadStats:
    """One repetition of a load. Latencies in seconds over the successful requests.

    window: wall time of the measured window, from the first request's begin to the last one's end.
    output_rate: output tokens of the successful requests per second of the window; request_rate: those
    requests; offered_rate: requests begun per second between the first and the last begin. met: the share of
    all requests that met the levels; goodput: their number per second. in_flight: requests begun and not
    over. unseen_gaps: successful requests whose gaps can't be seen, so that `itl` is without them.
    """

    num_requests: int
    num_ok: int
    failures: Mapping[str, int]
    window: float
    ttft: Percentiles
    itl: Percentiles
    tpot: Percentiles
    e2e: Percentiles
    decode_rate: Percentiles
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    output_rate: float
    request_rate: float
    offered_rate: float
    met: float
    goodput: float
    in_flight_mean: float
    in_flight_max: int
    tokens_per_chunk: float
    unseen_gaps: int
    lag_max: float


def measure(requests: Sequence[Request], slo: Slo | None = None) -> LoadStats:
    """The figures of a load; ValueError without a request."""
    if not requests:
        raise ValueError("a load needs at least one request")
    slo = slo or Slo()
    good = [r for r in requests if r.ok]
    begun = [r.begun for r in requests]
    window = max(r.finished for r in requests) - min(begun)
    span = max(begun) - min(begun)
    output = sum(r.num_tokens for r in good)
    chunks = sum(len(r.times) for r in good)
    met = sum(slo.met(r) for r in requests)

    def of(value: Callable[[Request], float]) -> Percentiles:
        return percentiles([value(r) for r in good])

    return LoadStats(
        num_requests=len(requests),
        num_ok=len(good),
        failures=dict(Counter(r.failure for r in requests if not r.ok).most_common()),
        window=window,
        ttft=of(lambda r: r.ttft),
        itl=percentiles([gap for r in good for gap in r.gaps]),
        tpot=of(lambda r: r.tpot),
        e2e=of(lambda r: r.e2e),
        decode_rate=of(lambda r: r.rate),
        output_tokens=output,
        prompt_tokens=sum(r.prompt_tokens for r in good),
        cached_tokens=sum(r.cached_tokens for r in good),
        output_rate=output / window if window > 0 else math.nan,
        request_rate=len(good) / window if window > 0 else math.nan,
        offered_rate=(len(requests) - 1) / span if span > 0 else math.nan,
        met=met / len(requests),
        goodput=met / window if window > 0 else math.nan,
        in_flight_mean=sum(r.finished - r.begun for r in requests) / window if window > 0 else math.nan,
        in_flight_max=most_in_flight(requests),
        tokens_per_chunk=output / chunks if chunks else math.nan,
        unseen_gaps=sum(1 for r in good if r.times and r.num_tokens > 1 and not r.gaps),
        lag_max=max((r.lag for r in requests if not math.isnan(r.lag)), default=math.nan),
    )


def most_in_flight(requests: Sequence[Request]) -> int:
    """The most requests that were begun and not over at the same moment."""
    changes = sorted([(r.begun, 1) for r in requests] + [(r.finished, -1) for r in requests])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def median(values: Sequence[float]) -> float:
    """Median without the values that were not observable; nan where there is none."""
    seen = [value for value in values if not math.isnan(value)]
    return statistics.median(seen) if seen else math.nan

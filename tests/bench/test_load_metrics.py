"""The figures of a load against cases that were computed by hand."""

from __future__ import annotations

import math

import pytest

from hayai.bench.load_metrics import Slo, measure, most_in_flight, percentiles
from hayai.bench.load_requests import Request


def request(
    begun: float, times: tuple[float, ...], *, tokens: int | None = None, finished: float | None = None,
    failure: str = "", cached: int = 0,
) -> Request:  # fmt: skip
    end = finished if finished is not None else (times[-1] if times else begun)
    count = len(times) if tokens is None else tokens
    return Request(0, 0, count, begun, begun + 0.5, end, 0.5, 200, times, count, 10, cached, failure)


TWO = [
    # 4 tokens: first after 1 s, then gaps of 0.5, 0.5 and 1 s
    request(0.0, (1.0, 1.5, 2.0, 3.0), cached=4),
    # 2 tokens: first after 3 s, a gap of 1 s
    request(2.0, (5.0, 6.0), finished=10.0),
]


def test_latencies_of_two_requests() -> None:
    stats = measure(TWO)
    first, second = TWO
    assert (first.ttft, second.ttft) == (1.0, 3.0)
    assert (first.e2e, second.e2e) == (3.0, 4.0)
    assert first.tpot == pytest.approx(2.0 / 3)
    assert first.rate == pytest.approx(1.5)
    assert second.tpot == second.rate == 1.0
    assert stats.ttft.p50 == 2.0 and stats.ttft.max == 3.0
    assert stats.itl.n == 4 and stats.itl.p50 == 0.75 and stats.itl.max == 1.0
    # the second smallest and the largest of 0.5 0.5 1 1 lie around 0.9 x 3 = 2.7
    assert stats.itl.p90 == pytest.approx(1.0)
    assert stats.tpot.p50 == pytest.approx((2.0 / 3 + 1.0) / 2)


def test_throughput_counts_tokens_over_the_whole_window() -> None:
    stats = measure(TWO)
    assert stats.window == 10.0
    assert stats.output_tokens == 6 and stats.output_rate == pytest.approx(0.6)
    assert stats.request_rate == pytest.approx(0.2)
    assert stats.offered_rate == pytest.approx(0.5)
    assert (stats.prompt_tokens, stats.cached_tokens) == (20, 4)
    # Little: 3 s and 8 s of requests in 10 s
    assert stats.in_flight_mean == pytest.approx(1.1)
    assert stats.in_flight_max == 2
    assert stats.lag_max == 0.5


def test_failures_stand_beside_the_percentiles_and_meet_no_level() -> None:
    failed = [
        request(0.0, (0.1,), tokens=3, failure="short", finished=1.0),
        request(0.0, (), failure="status 429", finished=0.01),
        request(0.0, (), failure="status 429", finished=0.01),
    ]
    stats = measure([*TWO, *failed], Slo(ttft=2.0))
    assert stats.failures == {"status 429": 2, "short": 1}
    assert (stats.num_requests, stats.num_ok) == (5, 2)
    assert stats.ttft.n == 2, "a failed request's time is no latency"
    assert stats.output_tokens == 6, "a failed request's tokens are no throughput"
    assert stats.met == pytest.approx(1 / 5)
    assert stats.goodput == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), 2),
        (Slo(ttft=1.0), 1),
        (Slo(ttft=0.5), 0),
        (Slo(tpot=0.7), 1),
        (Slo(e2e=3.5), 1),
        (Slo(ttft=3.0, tpot=1.0, e2e=4.0), 2),
        (Slo(ttft=1.0, tpot=0.5), 0),
    ],
)
def test_goodput_needs_all_levels(slo: Slo, met: int) -> None:
    assert measure(TWO, slo).met * 2 == met


def test_a_single_token_has_no_tpot_and_fails_no_level_of_it() -> None:
    one = request(0.0, (1.0,))
    assert math.isnan(one.tpot) and math.isnan(one.rate) and one.gaps == ()
    assert Slo(ttft=1.0, tpot=0.001).met(one)
    stats = measure([one])
    assert stats.tpot.n == 0 and math.isnan(stats.tpot.p50)
    assert stats.ttft.n == 1


def test_gaps_inside_a_chunk_are_not_made_up() -> None:
    """Three tokens in two chunks: TPOT is known, the gaps between tokens are not."""
    merged = request(0.0, (1.0, 3.0), tokens=3)
    stats = measure([merged, *TWO])
    assert merged.tpot == 1.0
    assert merged.gaps == () and merged.pauses == (2.0,)
    assert TWO[0].pauses == TWO[0].gaps == (0.5, 0.5, 1.0)
    assert stats.itl.n == 4 and stats.unseen_gaps == 1
    assert stats.tokens_per_chunk == pytest.approx(9 / 8)


def test_the_latest_moment_of_a_request_that_meets_its_levels() -> None:
    slo = Slo(ttft=2.0, tpot=0.05)
    assert slo.latest(1) == 2.0
    assert slo.latest(21) == pytest.approx(3.0)
    assert math.isinf(Slo().latest(5))
    assert Slo(e2e=1.0).latest(100) == 1.0


def test_percentiles_leave_out_what_was_not_seen() -> None:
    found = percentiles([math.nan, 1.0, 3.0])
    assert (found.p50, found.max, found.n) == (2.0, 3.0, 2)
    assert percentiles([math.nan]).n == 0
    with pytest.raises(ValueError, match="at least one"):
        measure([])


def test_in_flight_counts_overlaps() -> None:
    spans = [(0.0, 4.0), (1.0, 2.0), (2.0, 3.0), (5.0, 6.0)]
    assert most_in_flight([request(a, (b,)) for a, b in spans]) == 2

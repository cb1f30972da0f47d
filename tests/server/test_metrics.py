"""Counting and timing of requests, and the text that Prometheus reads."""

from __future__ import annotations

import timeit

from prometheus_client.parser import text_string_to_metric_families

from hayai.engine.request import RequestTiming
from hayai.frontend import Usage
from hayai.server.metrics import OTHER, Histogram, Metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """name{labels} -> value of one exposition, read by Prometheus' own parser."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_request_is_counted_and_timed() -> None:
    metrics = Metrics()
    meter = metrics.request_started("chat", "acme", arrived=0.0)
    assert samples(metrics)["hayai_requests_in_flight{endpoint=chat}"] == 1
    meter.first_token()
    for _ in range(3):
        meter.tokens(1)
    meter.tokens(2)
    timing = RequestTiming(1.0, 1.5, 2.5, 4.5, 10, 4, 5, num_steps=5, sum_batch=15, max_batch=4)
    meter.finished("ok", Usage(10, 5, 4), timing)
    meter.finished("error", Usage(10, 5, 4), timing)
    found = samples(metrics)
    assert found["hayai_requests_total{endpoint=chat,status=ok,tenant=acme}"] == 1
    assert not [name for name in found if "status=error" in name]
    assert found["hayai_requests_in_flight{endpoint=chat}"] == 0
    assert found["hayai_prompt_tokens_total{tenant=acme}"] == 10
    assert found["hayai_cached_prompt_tokens_total{tenant=acme}"] == 4
    assert found["hayai_completion_tokens_total{tenant=acme}"] == 5
    assert found["hayai_written_tokens_total"] == 5 and found["hayai_writes_total"] == 4
    assert found["hayai_inter_token_seconds_count"] == 3
    assert found["hayai_time_to_first_token_seconds_count{endpoint=chat}"] == 1
    assert found["hayai_queue_seconds_sum"] == 0.5 and found["hayai_prefill_seconds_sum"] == 1.0
    assert found["hayai_decode_seconds_per_token_sum"] == 0.5
    assert found["hayai_request_batch_size_sum"] == 3.0


def test_gaps_are_those_of_one_choice() -> None:
    """Two choices that take turns: each has one gap, not three between them."""
    metrics = Metrics()
    meter = metrics.request_started("chat", "")
    for choice in (0, 1, 0, 1):
        meter.tokens(1, choice)
    assert sum(metrics.inter_token.counts) == 2
    assert samples(metrics)["hayai_time_to_first_token_seconds_count{endpoint=chat}"] == 1


def test_a_request_that_never_ran_leaves_no_times() -> None:
    metrics = Metrics()
    metrics.request_started("chat", "").finished("cancelled")
    found = samples(metrics)
    assert found["hayai_requests_total{endpoint=chat,status=cancelled,tenant=}"] == 1
    assert "hayai_queue_seconds_count" not in found


def test_a_histogram_has_inclusive_upper_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert histogram.cumulative() == [("1", 2.0), ("2", 4.0), ("+Inf", 5.0)]
    assert histogram.total == 7.5


def test_tenants_with_a_label_of_their_own_are_bounded() -> None:
    metrics = Metrics(max_tenants=3)
    for i in range(50):
        metrics.request_started("chat", f"tenant-{i}").finished("ok", Usage(1, 1))
    metrics.request_started("chat", "tenant-1").finished("ok", Usage(1, 1))
    found = {k: v for k, v in samples(metrics).items() if k.startswith("hayai_completion_tokens_total")}
    assert len(found) == 4
    assert found[f"hayai_completion_tokens_total{{tenant={OTHER}}}"] == 47
    assert found["hayai_completion_tokens_total{tenant=tenant-1}"] == 2


def test_two_servers_in_one_process_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.rejected("overloaded")
    assert samples(one)["hayai_rejected_total{reason=overloaded}"] == 1
    assert "hayai_rejected_total{reason=overloaded}" not in samples(other)


def test_a_token_costs_next_to_nothing() -> None:
    """A bound that holds on a busy machine too: the fastest token of the default model takes 2,500 us."""
    meter = Metrics().request_started("chat", "")
    best = min(timeit.repeat(lambda: meter.tokens(1), number=2000, repeat=5)) / 2000
    assert best < 10e-6

"""What happened, in numbers: requests counted and timed here, the engine's counters read when asked.

Prometheus' data model and, through `prometheus_client`, its text format; the registry is this object's own,
so that two servers in one process do not mix. All methods run on the event loop's thread, so nothing is
locked: a token costs one look at the clock, one search among some twenty bounds and a few additions.

Times follow docs/measuring.md as far as a server can: they end when the event is handed to the socket, not
when a client has read it. Every metric is described in docs/operating.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from hayai.engine.request import RequestTiming
from hayai.frontend import Usage

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FAST = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.0,
)
"""Bounds in seconds for what happens once per token."""
SLOW = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds in seconds for what happens once per request."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Bounds for numbers of tokens, and of sequences in a step."""

MAX_TENANTS = 100
"""Tenants with a label of their own; later ones share `OTHER`, so that keys can't grow the exposition."""
OTHER = "(other)"

Labels = tuple[str, ...]


class Histogram:
    """Counts of values by upper bound. Bounds ascend; the last bucket, +Inf, is not among them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, how many values up to it), as Prometheus wants them."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        seen = 0
        rows: list[tuple[str, float]] = []
        for name, count in zip(names, self.counts, strict=True):
            seen += count
            rows.append((name, float(seen)))
        return rows


HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...], Sequence[float]]] = {
    "hayai_time_to_first_token_seconds": (
        "From the request's arrival to its first token, queue included",
        ("endpoint",),
        SLOW,
    ),
    "hayai_inter_token_seconds": (
        "Gap between two successive writes of one answer; a write is one token unless the server fell behind",
        (),
        FAST,
    ),
    "hayai_request_seconds": ("From arrival to the last token", ("endpoint",), SLOW),
    "hayai_queue_seconds": ("From arrival to the first step that the request ran in", (), SLOW),
    "hayai_prefill_seconds": ("From the first step to the first token", (), SLOW),
    "hayai_decode_seconds_per_token": (
        "Per request: (last token - first token) / (tokens - 1), by the engine's clock",
        (),
        FAST,
    ),
    "hayai_request_batch_size": ("Mean number of sequences in the steps that a request ran in", (), COUNTS),
    "hayai_request_prompt_tokens": ("Tokens of a request's prompts", (), COUNTS),
    "hayai_request_completion_tokens": ("Tokens of a request's answers", (), COUNTS),
}
"""name -> (help, labels, bounds)."""

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "hayai_requests": ("Requests that ended", ("endpoint", "tenant", "status")),
    "hayai_rejected": ("Requests refused before they ran", ("reason",)),
    "hayai_prompt_tokens": ("Prompt tokens of requests that ended", ("tenant",)),
    "hayai_cached_prompt_tokens": ("Those of them that the prefix cache had", ("tenant",)),
    "hayai_completion_tokens": ("Tokens that clients were sent", ("tenant",)),
    "hayai_written_tokens": ("Tokens written to sockets, of running requests as well", ()),
    "hayai_writes": ("Writes that carried them", ()),
}
"""name (without Prometheus' `_total`) -> (help, labels)."""

Collect = Callable[[], Iterable["Metric"]]
OnFinished = Callable[["RequestMeter", str, Usage | None, RequestTiming | None], None]


class Metrics:
    """All that one server counts. `exposition` is what `/metrics` answers."""

    def __init__(self, max_tenants: int = MAX_TENANTS) -> None:
        self.in_flight: Counter[str] = Counter()
        self.written_tokens = 0
        self.writes = 0
        self.inter_token = Histogram(FAST)
        self._counters: dict[str, Counter[Labels]] = {name: Counter() for name in COUNTERS}
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in HISTOGRAMS}
        self._histograms["hayai_inter_token_seconds"][()] = self.inter_token
        self.on_finished: OnFinished | None = None
        """Told of every request that is over (tracing)."""
        self._tenants: set[str] = set()
        self._max_tenants = max_tenants
        self._collectors: list[Collect] = []
        self._registry: CollectorRegistry | None = None

    # ------------------------------------------------------------------ what happens

    def request_started(self, endpoint: str, tenant: str, arrived: float | None = None) -> RequestMeter:
        """A request was taken. arrived: monotonic seconds when it came in, if that was before now.

        endpoint: the route, never a path that a client made up. The meter's `finished` has to be called.
        """
        self.in_flight[endpoint] += 1
        return RequestMeter(self, endpoint, self._tenant(tenant), monotonic() if arrived is None else arrived)

    def rejected(self, reason: str) -> None:
        """A request was refused before it ran. reason: an error code of ours, so there are few."""
        self.count("hayai_rejected", (reason,))

    def count(self, name: str, labels: Labels = (), amount: int = 1) -> None:
        self._counters[name][labels] += amount

    def observe(self, name: str, value: float, labels: Labels = ()) -> None:
        found = self._histograms[name]
        histogram = found.get(labels)
        if histogram is None:
            histogram = found[labels] = Histogram(HISTOGRAMS[name][2])
        histogram.observe(value)

    def value(self, name: str, labels: Labels = ()) -> int:
        """A counter's value now."""
        return self._counters[name][labels]

    def histogram(self, name: str, labels: Labels = ()) -> Histogram | None:
        """A histogram as it is now; None while nothing was observed."""
        return self._histograms[name].get(labels)

    def _tenant(self, tenant: str) -> str:
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) >= self._max_tenants:
            return OTHER
        self._tenants.add(tenant)
        return tenant

    # ------------------------------------------------------------------ what a scrape shows

    def watch(self, collect: Collect) -> None:
        """Add metrics that are read at each scrape (the engine's, the queue's)."""
        self._collectors.append(collect)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format (CONTENT_TYPE)."""
        from prometheus_client.exposition import (
            generate_latest,
        )  # 50 ms, which only a first scrape should pay

        return generate_latest(self.registry)

    @property
    def loaded(self) -> bool:
        """Whether the registry's packages have been imported."""
        return self._registry is not None

    @property
    def registry(self) -> CollectorRegistry:
        """Our own registry: this object, and what the system knows of the process."""
        if self._registry is None:
            from prometheus_client import CollectorRegistry, ProcessCollector  # as above

            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(self)
            ProcessCollector(registry=self._registry)
        return self._registry

    def describe(self) -> list[Metric]:
        """Nothing in advance: names are known, label values are not."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The families, as prometheus_client asks for them."""
        from prometheus_client.metrics_core import (  # as above
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        self._counters["hayai_written_tokens"][()] = self.written_tokens
        self._counters["hayai_writes"][()] = self.writes
        for name, (text, labels) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for values, amount in list(self._counters[name].items()):
                counter.add_metric(values, amount)
            yield counter
        gauge = GaugeMetricFamily(
            "hayai_requests_in_flight", "Requests taken and not ended", labels=["endpoint"]
        )
        for endpoint, number in list(self.in_flight.items()):
            gauge.add_metric((endpoint,), number)
        yield gauge
        for name, (text, labels, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, text, labels=labels)
            for values, histogram in list(self._histograms[name].items()):
                family.add_metric(values, histogram.cumulative(), histogram.total)
            yield family
        for collect in self._collectors:
            yield from collect()


class RequestMeter:
    """One request's clock. `tokens` may be called as often as there are writes; `finished` counts once."""

    __slots__ = (
        "_done",
        "_last",
        "_metrics",
        "arrived",
        "endpoint",
        "first",
        "num_tokens",
        "tenant",
        "traceparent",
    )

    def __init__(self, metrics: Metrics, endpoint: str, tenant: str, arrived: float) -> None:
        self._metrics = metrics
        self._last: dict[int, float] = {}
        self._done = False
        self.endpoint = endpoint
        self.tenant = tenant
        self.arrived = arrived
        self.first = 0.0
        self.num_tokens = 0
        self.traceparent: str | None = None

    def first_token(self) -> None:
        """The first token is about to be written. Again: nothing. `tokens` does it where it was forgotten."""
        if not self.first:
            self.first = monotonic()
            waited = self.first - self.arrived
            self._metrics.observe("hayai_time_to_first_token_seconds", waited, (self.endpoint,))

    def tokens(self, n: int, choice: int = 0, at: float | None = None) -> None:
        """A write with `n` tokens of one choice; `at`: monotonic seconds, if that was before now."""
        metrics = self._metrics
        now = monotonic() if at is None else at
        last = self._last.get(choice)
        if last is not None:
            metrics.inter_token.observe(now - last)
        elif not self.first:
            self.first_token()
        self._last[choice] = now
        self.num_tokens += n
        metrics.written_tokens += n
        metrics.writes += 1

    def finished(self, status: str, usage: Usage | None = None, timing: RequestTiming | None = None) -> None:
        """The request is over; the first call counts.

        status: 'ok', 'cancelled' (the client left), 'timeout', 'aborted' (shutdown) or 'error'. usage: of all
        choices together. timing: of one choice (the first), by the engine's clock.
        """
        if self._done:
            return
        self._done = True
        metrics = self._metrics
        metrics.in_flight[self.endpoint] -= 1
        metrics.count("hayai_requests", (self.endpoint, self.tenant, status))
        metrics.observe("hayai_request_seconds", monotonic() - self.arrived, (self.endpoint,))
        if usage is not None:
            metrics.count("hayai_prompt_tokens", (self.tenant,), usage.prompt_tokens)
            metrics.count("hayai_cached_prompt_tokens", (self.tenant,), usage.cached_tokens)
            metrics.count("hayai_completion_tokens", (self.tenant,), usage.completion_tokens)
            metrics.observe("hayai_request_prompt_tokens", usage.prompt_tokens)
            metrics.observe("hayai_request_completion_tokens", usage.completion_tokens)
        if timing is not None and timing.scheduled:
            _observe_timing(metrics, timing)
        if metrics.on_finished is not None:
            metrics.on_finished(self, status, usage, timing)


def _observe_timing(metrics: Metrics, timing: RequestTiming) -> None:
    metrics.observe("hayai_queue_seconds", max(0.0, timing.scheduled - timing.arrived))
    if timing.first_token:
        metrics.observe("hayai_prefill_seconds", timing.first_token - timing.scheduled)
        if timing.output_tokens > 1 and timing.finished:
            seconds = timing.finished - timing.first_token
            metrics.observe("hayai_decode_seconds_per_token", seconds / (timing.output_tokens - 1))
    if timing.num_steps:
        metrics.observe("hayai_request_batch_size", timing.sum_batch / timing.num_steps)


def gauge(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> Any:
    """A family with one value, for collectors given to `Metrics.watch`."""
    from prometheus_client.metrics_core import GaugeMetricFamily  # as above

    family = GaugeMetricFamily(name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family

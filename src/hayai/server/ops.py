"""For supervisors and monitoring: /health, /ready, /metrics, and what the engine and the queue have to show.

/health answers as long as the event loop turns, /ready as long as a request would be taken; neither touches
the model. /metrics reads counters that are kept anyway.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import hayai
from hayai.engine.request import BATCH
from hayai.server.batch_runner import BatchRunner
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError, as_api_error
from hayai.server.metrics import CONTENT_TYPE
from hayai.server.openai_routes import json_response

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


def routes(context: ServerContext, runner: BatchRunner) -> list[BaseRoute]:
    """The routes of this surface; from now on a scrape shows the engine as well."""
    ops = _Ops(context)
    context.metrics.watch(lambda: collect(context, runner))
    return [Route("/health", ops.health), Route("/ready", ops.ready), Route("/metrics", ops.metrics)]


class _Ops:
    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def health(self, request: Request) -> Response:
        """Whether the process answers; says nothing of the model."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether a request would be taken now, and if not, why. Never generates."""
        reason = self._not_ready()
        if reason is None:
            return json_response({"status": "ready"})
        return json_response({"status": "unavailable", "reason": reason}, 503)

    def _not_ready(self) -> str | None:
        if self.context.gate.closing:
            return "draining"
        return None if self.context.frontend.alive else "the engine has stopped"

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format. On a server with keys: for this machine, and for one tenant's keys."""
        if self.context.access.keyed and not _is_local(request):
            principal = self.context.access.authenticate(request.headers)
            if principal.tenant != self.context.config.metrics_tenant:
                message = "this key may not read the metrics (they show every tenant): see metrics_tenant"
                raise ApiError(403, message, code="not_allowed")
        metrics = self.context.metrics
        if not metrics.loaded:
            await asyncio.to_thread(lambda: metrics.registry)  # its import would hold the event loop up
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)


def _is_local(request: Request) -> bool:
    """Whether a request comes from this machine and was not handed on by a proxy."""
    if request.client is None or any(name in request.headers for name in ("forwarded", "x-forwarded-for")):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------- what the engine shows

ENGINE: tuple[tuple[str, str, str, str], ...] = (
    ("hayai_engine_steps", "counter", "num_steps", "Steps of the engine"),
    ("hayai_engine_step_seconds", "counter", "step_seconds", "Seconds inside the backend, over all steps"),
    ("hayai_engine_read_bytes", "counter", "bytes_read", "Estimate of what steps have read: weights and KV"),
    ("hayai_engine_prompt_tokens", "counter", "prompt_tokens", "Prompt tokens computed, again if preempted"),
    ("hayai_engine_output_tokens", "counter", "output_tokens", "Tokens generated"),
    ("hayai_engine_preemptions", "counter", "num_preemptions", "Sequences put back for want of KV blocks"),
    ("hayai_engine_timeouts", "counter", "timeouts", "Sequences that ended at their deadline"),
    (
        "hayai_engine_grammar_failures",
        "counter",
        "grammar_failures",
        "Sequences whose grammar came to no end",
    ),
    ("hayai_engine_running", "gauge", "running", "Sequences that run"),
    ("hayai_step_bytes", "gauge", "step_bytes", "Bytes of weights that one step reads"),
    ("hayai_kv_bytes_per_token", "gauge", "kv_bytes_per_token", "Size of a token in the KV cache"),
    ("hayai_kv_evicted_blocks", "counter", "kv_evictions", "Cached blocks that had to make room"),
    (
        "hayai_prefix_queried_tokens",
        "counter",
        "prefix_queried_tokens",
        "Prompt tokens looked up in the cache",
    ),
    ("hayai_prefix_hit_tokens", "counter", "prefix_cached_tokens", "Of these, found there"),
)
"""(name, kind, attribute of the engine's stats, help)."""

KV: tuple[tuple[str, str, str], ...] = (
    ("hayai_kv_tokens", "kv_blocks", "Tokens that the KV cache can hold"),
    ("hayai_kv_used_tokens", "kv_blocks_used", "Of these, in blocks of running sequences"),
    ("hayai_kv_cached_tokens", "kv_blocks_cached", "Of these, kept for prompts to come"),
)
"""(name, attribute that counts blocks, help)."""


def collect(context: ServerContext, runner: BatchRunner) -> Iterable[Metric]:
    """The families that are read at each scrape."""
    from prometheus_client.metrics_core import (  # 50 ms, which only a first scrape should pay
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )

    families = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    stats, gate = context.frontend.stats(), context.gate
    for name, kind, attribute, text in ENGINE:
        yield families[kind](name, text, value=getattr(stats, attribute))
    for name, attribute, text in KV:
        yield GaugeMetricFamily(name, text, value=getattr(stats, attribute) * stats.kv_block_tokens)
    waiting = GaugeMetricFamily(
        "hayai_engine_waiting", "Sequences that wait for a place", labels=["priority"]
    )
    by_class = {"interactive": 0, "batch": 0}
    for priority, number in stats.waiting_by_priority.items():
        by_class["batch" if priority >= BATCH else "interactive"] += number
    for label, number in by_class.items():
        waiting.add_metric([label], number)
    yield waiting
    finished = CounterMetricFamily("hayai_engine_finished", "Sequences that ended", labels=["reason"])
    for reason, number in stats.finished.items():
        finished.add_metric([reason], number)
    yield finished
    sizes = HistogramMetricFamily("hayai_engine_batch_size", "Sequences in a step")
    sizes.add_metric([], *_batch_sizes(stats.batch_sizes))
    yield sizes
    queue: tuple[tuple[str, str, float], ...] = (
        ("hayai_engine_up", "1 while the engine takes requests", context.frontend.alive),
        ("hayai_draining", "1 while the server lets nobody in any more", gate.closing),
        ("hayai_queue_choices", "Choices in flight beyond those that run at once", gate.num_waiting),
        ("hayai_queue_limit_choices", "The most that may wait", gate.max_waiting),
        ("hayai_in_flight_choices", "Choices that run or wait", gate.num_choices),
        ("hayai_running_limit_choices", "The most that run at once", gate.max_running),
        ("hayai_service_rate_choices", "Choices per second when busy; Retry-After is made of it", gate.rate),
        ("hayai_batch_running_lines", "Lines of batches that run", runner.num_running),
    )
    for name, text, now in queue:
        yield GaugeMetricFamily(name, text, value=float(now))
    text = "Lines of batches that have their result"
    yield CounterMetricFamily("hayai_batch_lines", text, value=runner.num_lines)
    bandwidth = context.config.read_bandwidth
    if bandwidth is not None:
        text = "Read bandwidth of this machine as it was measured or configured"
        yield GaugeMetricFamily("hayai_read_bandwidth_bytes_per_second", text, value=bandwidth * 1e9)
    yield InfoMetricFamily("hayai_build", "What runs here", value=_build(context))


def _batch_sizes(steps: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets (powers of two) and the sum, of steps by size."""
    buckets: list[tuple[str, float]] = []
    bound = 1
    largest = max(steps, default=1)
    while True:
        buckets.append((str(bound), float(sum(n for size, n in steps.items() if size <= bound))))
        if bound >= largest and bound >= 16:
            break
        bound *= 2
    buckets.append(("+Inf", float(sum(steps.values()))))
    return buckets, float(sum(size * n for size, n in steps.items()))


def _build(context: ServerContext) -> dict[str, str]:
    described = {str(k): str(v) for k, v in context.machine.items() if v is not None}
    return {"version": hayai.__version__, "model": context.frontend.model_name, **described}


def count_refusal(context: ServerContext, error: Exception) -> None:
    """Enter an error that was answered instead of a request: by its code, of which there are few."""
    shown = as_api_error(error)
    context.metrics.rejected(shown.code or str(shown.status))

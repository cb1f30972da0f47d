"""OpenTelemetry: one span per request with its queue, prefill and decode, made when the request is over.

Nothing is done while a request runs: the engine's own clock (RequestTiming) says afterwards when it did what.
Names of attributes follow OpenTelemetry's conventions for generative AI where there are some. A caller's
`traceparent` header makes the span a child of the caller's. Needs the extra `otel`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import hayai
from hayai.engine.request import RequestTiming
from hayai.errors import ConfigError
from hayai.frontend import Usage
from hayai.server.metrics import RequestMeter

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

PHASES = (
    ("queue", "arrived", "scheduled"),
    ("prefill", "scheduled", "first_token"),
    ("decode", "first_token", "finished"),
)
"""Child spans: (name, when it began, when it ended), as RequestTiming calls them."""


class Tracer:
    """Makes spans of finished requests. It owns its provider: nothing of the process is changed."""

    def __init__(self, processor: SpanProcessor, model: str) -> None:
        # optional packages, and half a second to import
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create({"service.name": "hayai", "service.version": hayai.__version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("hayai", hayai.__version__)
        self._model = model

    def request(
        self, meter: RequestMeter, status: str, usage: Usage | None, timing: RequestTiming | None
    ) -> None:
        """A request is over (see Metrics.on_finished)."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context  # as above
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        offset = time.time_ns() - time.monotonic_ns()
        carrier = {"traceparent": meter.traceparent} if meter.traceparent else {}
        span = self._tracer.start_span(
            meter.endpoint,
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            start_time=offset + _ns(meter.arrived),
            attributes={
                "http.route": meter.endpoint,
                "gen_ai.provider.name": "hayai",
                "gen_ai.request.model": self._model,
                "hayai.tenant": meter.tenant,
                "hayai.status": status,
            },
        )
        if usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            span.set_attribute("hayai.cached_tokens", usage.cached_tokens)
        if timing is not None and timing.num_steps:
            span.set_attribute("hayai.mean_batch_size", timing.sum_batch / timing.num_steps)
            span.set_attribute("hayai.preemptions", timing.num_preemptions)
        if status in ("error", "timeout", "aborted"):
            span.set_status(StatusCode.ERROR, status)
        inside = set_span_in_context(span)
        for name, begin, end in PHASES:
            began, ended = (getattr(timing, field, 0.0) for field in (begin, end))
            if began and ended:
                child = self._tracer.start_span(name, context=inside, start_time=offset + _ns(began))
                child.end(offset + _ns(ended))
        span.end()

    def close(self) -> None:
        """Send what has not been sent, for a few seconds at most."""
        self._provider.shutdown()


def open_tracer(endpoint: str, model: str) -> Tracer:
    """A tracer that sends to `endpoint` (OTLP over HTTP, e.g. http://localhost:4318). ConfigError where the
    packages are missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # optional
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"traces need OpenTelemetry: pip install 'hayai[otel]' ({error})") from None
    url = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(url if url.endswith("/v1/traces") else f"{url}/v1/traces")
    return Tracer(BatchSpanProcessor(exporter), model)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

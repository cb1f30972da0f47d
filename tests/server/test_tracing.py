"""Spans of requests, by the SDK's own in-memory exporter and over OTLP to a listening socket."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hayai.engine.request import RequestTiming
from hayai.frontend import Usage
from hayai.server.metrics import Metrics
from hayai.server.tracing import Tracer, open_tracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_span_with_its_phases() -> None:
    exporter = InMemorySpanExporter()
    tracer = Tracer(SimpleSpanProcessor(exporter), "smol")
    metrics = Metrics()
    metrics.on_finished = tracer.request
    now = time.monotonic()
    meter = metrics.request_started("/v1/completions", "acme", now - 4)
    meter.traceparent = PARENT
    timing = RequestTiming(now - 4, now - 3, now - 1, now, 10, 4, 5, num_steps=5, sum_batch=10)
    meter.finished("ok", Usage(10, 5, 4), timing)
    meter.finished("error")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"queue", "prefill", "decode", "/v1/completions"}
    root = spans["/v1/completions"]
    assert root.kind is SpanKind.SERVER and root.status.status_code is StatusCode.UNSET
    assert root.parent is not None
    assert format(root.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(root.parent.span_id, "016x") == PARENT.split("-")[2]
    assert root.attributes == {
        "http.route": "/v1/completions",
        "gen_ai.provider.name": "hayai",
        "gen_ai.request.model": "smol",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "hayai.cached_tokens": 4,
        "hayai.mean_batch_size": 2.0,
        "hayai.preemptions": 0,
        "hayai.tenant": "acme",
        "hayai.status": "ok",
    }
    seconds = {}
    for name in ("queue", "prefill", "decode"):
        span = spans[name]
        assert span.parent is not None and span.parent.span_id == root.context.span_id
        seconds[name] = round((span.end_time - span.start_time) / 1e9, 3)
    assert seconds == {"queue": 1.0, "prefill": 2.0, "decode": 1.0}
    assert abs(root.start_time / 1e9 - (time.time() - 4)) < 1.0
    assert root.start_time <= spans["queue"].start_time + 1000
    tracer.close()


def test_a_failed_request_is_an_error_without_phases() -> None:
    exporter = InMemorySpanExporter()
    tracer = Tracer(SimpleSpanProcessor(exporter), "smol")
    metrics = Metrics()
    metrics.on_finished = tracer.request
    meter = metrics.request_started("/v1/completions", "acme")
    meter.traceparent = "nonsense"
    meter.finished("timeout")
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR and span.parent is None
    tracer.close()


def test_spans_leave_over_http() -> None:
    posted: list[tuple[str, int]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            posted.append((self.path, len(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        tracer = open_tracer(f"http://127.0.0.1:{collector.server_port}", "smol")
        metrics = Metrics()
        metrics.on_finished = tracer.request
        metrics.request_started("/v1/completions", "").finished("ok")
        tracer.close()
        collector.shutdown()
        thread.join()
    assert [path for path, _ in posted] == ["/v1/traces"] and posted[0][1] > 100

"""Health, readiness and metrics of real servers; deadlines and refusals as clients meet them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from hayai.server import ops
from hayai.server.metrics import CONTENT_TYPE
from server_process import InnerServer

StartServer = Callable[..., InnerServer]
LONG = {"prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def scrape(url: str, **options: Any) -> dict[str, float]:
    """name{labels} -> value."""
    reply = httpx.get(f"{url}/metrics", **options)
    assert reply.status_code == 200 and reply.headers["content-type"] == CONTENT_TYPE
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(reply.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_scrape_shows_requests_queue_engine_and_machine(inner_server: StartServer) -> None:
    server = inner_server(read_bandwidth=20.0)
    empty = scrape(server.url)
    assert empty["hayai_engine_up"] == 1 and empty["hayai_engine_steps_total"] == 0
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        chat: Any = [{"role": "user", "content": "hi"}]
        client.chat.completions.create(
            model="default", messages=chat, max_tokens=5, extra_body={"ignore_eos": True}
        )
        for _ in client.completions.create(model="default", prompt=[1, 2, 3], max_tokens=6, stream=True):
            pass
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "temperature": 9})
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "model": "gpt-9"})
    found = scrape(server.url)
    chat_route, text_route = "/v1/chat/completions", "/v1/completions"
    assert found[f"hayai_requests_total{{endpoint={chat_route},status=ok,tenant=local}}"] == 1
    assert found[f"hayai_requests_total{{endpoint={text_route},status=ok,tenant=local}}"] == 1
    assert found[f"hayai_requests_in_flight{{endpoint={text_route}}}"] == 0
    assert found["hayai_rejected_total{reason=invalid_value}"] == 1
    assert found["hayai_rejected_total{reason=model_not_found}"] == 1
    assert found["hayai_completion_tokens_total{tenant=local}"] >= 5
    assert found[f"hayai_time_to_first_token_seconds_count{{endpoint={text_route}}}"] == 1
    assert found["hayai_queue_seconds_count"] == 2 and found["hayai_prefill_seconds_count"] == 2
    assert found["hayai_decode_seconds_per_token_count"] >= 1
    assert found["hayai_engine_steps_total"] >= 5
    assert found["hayai_engine_batch_size_count"] == found["hayai_engine_steps_total"]
    assert found["hayai_engine_batch_size_bucket{le=1}"] == found["hayai_engine_steps_total"]
    assert found["hayai_engine_finished_total{reason=length}"] >= 1
    assert found["hayai_kv_tokens"] > 0 and found["hayai_kv_used_tokens"] == 0
    assert found["hayai_read_bandwidth_bytes_per_second"] == 20e9
    assert found["hayai_in_flight_choices"] == 0 and found["hayai_running_limit_choices"] == 16
    assert any(name.startswith("hayai_build_info{") for name in found)
    assert found["process_resident_memory_bytes"] > 1e7


def test_ready_says_why_not(inner_server: StartServer) -> None:
    server = inner_server()
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
    server.frontend.close()
    reply = httpx.get(f"{server.url}/ready")
    assert reply.status_code == 503 and reply.json()["reason"] == "the engine has stopped"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert scrape(server.url)["hayai_engine_up"] == 0


def test_a_deadline_ends_a_request(inner_server: StartServer) -> None:
    server = inner_server()
    headers = {"x-hayai-timeout-ms": "150"}
    began = time.monotonic()
    reply = httpx.post(f"{server.url}/v1/completions", json=LONG, headers=headers, timeout=30)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 5
    reply = httpx.post(
        f"{server.url}/v1/completions", json=LONG | {"stream": True}, headers=headers, timeout=30
    )
    assert "deadline_exceeded" in reply.text and "[DONE]" not in reply.text
    bad = httpx.post(f"{server.url}/v1/completions", json=LONG, headers={"x-hayai-timeout-ms": "soon"})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "x-hayai-timeout-ms"
    found = scrape(server.url)
    assert found["hayai_requests_total{endpoint=/v1/completions,status=timeout,tenant=local}"] == 2
    assert found["hayai_engine_timeouts_total"] == 2 and found["hayai_kv_used_tokens"] == 0


def test_a_full_server_refuses_at_once_and_says_when(inner_server: StartServer) -> None:
    server = inner_server(max_waiting=1)
    stop = threading.Event()

    def occupy() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as reply:
            for _ in reply.iter_lines():
                if stop.is_set():
                    return

    threads = [threading.Thread(target=occupy) for _ in range(17)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while scrape(server.url)["hayai_in_flight_choices"] < 17 and time.monotonic() < end:
        time.sleep(0.01)
    began = time.monotonic()
    reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=20)
    assert time.monotonic() - began < 2
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
    assert 1 <= int(reply.headers["retry-after"]) <= 60 and int(reply.headers["retry-after-ms"]) >= 1
    assert scrape(server.url)["hayai_queue_choices"] == 1
    stop.set()
    for thread in threads:
        thread.join(30)
    found = scrape(server.url)
    assert found["hayai_rejected_total{reason=overloaded}"] == 1


@pytest.mark.parametrize(
    ("host", "headers", "local"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("10.0.0.1", {}, False),
        ("127.0.0.1", {"x-forwarded-for": "10.0.0.1"}, False),
        ("127.0.0.1", {"forwarded": "for=10.0.0.1"}, False),
        ("testclient", {}, False),
    ],
)
def test_who_is_this_machine(host: str, headers: dict[str, str], local: bool) -> None:
    request: Any = SimpleNamespace(client=SimpleNamespace(host=host), headers=headers)
    assert ops._is_local(request) is local
    request.client = None
    assert not ops._is_local(request)

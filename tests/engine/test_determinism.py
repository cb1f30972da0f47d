"""The determinism contract, seen from the engine: a request's tokens and log-probabilities do not depend on
what else runs, how its prompt is chunked, or whether it was preempted.

The native backend keeps it to the bit. The reference backend's matrix products are a BLAS library's, whose
last bits may change with the number of rows, and such a bit decides how a key is rounded to the float16 it is
stored in: there log-probabilities agree to that rounding (a relative 2^-11 of a key).
"""

from __future__ import annotations

import functools
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine_fakes import drain, request, tokens_of
from hayai.config import EngineConfig
from hayai.engine.engine import Engine
from hayai.engine.request import EngineRequest
from hayai.load import load_model

RNG = np.random.default_rng(11)


def prompt(length: int) -> list[int]:
    return RNG.integers(0, 512, length).tolist()


REQUESTS = (
    request("one", prompt(1), max_tokens=24, logprobs=2),
    request("greedy", prompt(17), max_tokens=40, logprobs=3),
    request("plain", prompt(5), max_tokens=40),
    request("warm", prompt(33), max_tokens=30, temperature=0.9, top_p=0.9, seed=5, logprobs=0),
    request("top_k", prompt(70), max_tokens=30, temperature=1.3, top_k=20, min_p=0.01, seed=6, logprobs=1),
    request(
        "penalties", prompt(48), max_tokens=40, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=0
    ),
    request(
        "bias", prompt(16), max_tokens=20, logit_bias={7: 5.0, 9: -5.0}, presence_penalty=1.0, logprobs=0
    ),
)

Outcome = dict[str, tuple[list[int], list[float]]]


def engine_for(path: Path, backend: str, **options: int) -> Engine:
    return load_model(EngineConfig(model=str(path), backend=backend, **options)).engine


def run(engine: Engine, requests: tuple[EngineRequest, ...]) -> Outcome:
    """Tokens and log-probabilities (chosen and alternatives) of each request."""
    for r in requests:
        engine.add(r)
    events = drain(engine)
    outcome: Outcome = {}
    for r in requests:
        logprobs = [e.logprob for e in events if e.request_id == r.request_id and e.logprob]
        values = [v for p in logprobs for v in (p.logprob, *(x for _, x in p.top))]
        outcome[r.request_id] = (tokens_of(events, r.request_id), values)
    return outcome


def assert_same(found: Outcome, expected: Outcome, backend: str) -> None:
    for name, (tokens, logprobs) in expected.items():
        assert found[name][0] == tokens, f"{name}: other tokens"
        if backend == "reference":
            np.testing.assert_allclose(found[name][1], logprobs, atol=2e-3, err_msg=name)
        else:
            assert found[name][1] == logprobs, f"{name}: other log-probabilities"


@functools.cache
def run_alone(path: Path, backend: str) -> Outcome:
    """Each request on its own, its prompt in one piece."""
    with closing(engine_for(path, backend)) as engine:
        outcome: Outcome = {}
        for r in REQUESTS:
            outcome |= run(engine, (r,))
    assert all(len(tokens) == r.params.max_tokens for r in REQUESTS for tokens in [outcome[r.request_id][0]])
    return outcome


def test_in_a_batch_as_alone(tiny_model: Path, backend: str) -> None:
    with closing(engine_for(tiny_model, backend)) as engine:
        together = run(engine, REQUESTS)
        assert engine.stats().max_batch == len(REQUESTS)
    assert_same(together, run_alone(tiny_model, backend), backend)


@pytest.mark.parametrize("chunk", [7, 16, 33, 64])
def test_in_chunks_as_in_one_piece(tiny_model: Path, backend: str, chunk: int) -> None:
    with closing(engine_for(tiny_model, backend, max_step_tokens=chunk, max_sequences=7)) as engine:
        chunked = run(engine, REQUESTS)
    assert_same(chunked, run_alone(tiny_model, backend), backend)


def test_preempted_as_undisturbed(tiny_model: Path, backend: str) -> None:
    options = {"kv_tokens": 160, "context_length": 128, "max_step_tokens": 32}
    with closing(engine_for(tiny_model, backend, **options)) as engine:
        engine.scheduler.headroom = 0
        squeezed = run(engine, REQUESTS)
        assert engine.stats().num_preemptions >= 2
        assert engine.stats().kv_blocks_used == 0
    assert_same(squeezed, run_alone(tiny_model, backend), backend)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(tiny_model: Path, backend: str, threads: int) -> None:
    if backend == "reference":
        pytest.skip("the reference backend has no threads of its own")
    with closing(engine_for(tiny_model, backend, threads=threads)) as engine:
        assert_same(run(engine, REQUESTS), run_alone(tiny_model, backend), backend)


def test_again_as_before(tiny_model: Path, backend: str) -> None:
    """A used cache leaves no trace, and another engine of the same file answers the same."""
    with closing(engine_for(tiny_model, backend)) as engine:
        first, second = run(engine, REQUESTS), run(engine, REQUESTS)
        assert engine.stats().prefix_cached_tokens > 0
    assert_same(second, first, backend)
    with closing(engine_for(tiny_model, backend)) as engine:
        assert run(engine, REQUESTS) == first

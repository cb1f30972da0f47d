"""Log-probabilities of the prompt: every token once, whatever is chunked, preempted or cached around it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine_fakes import FULL, alone, drain, logprob_of, make_engine, request, tokens_of
from hayai.config import EngineConfig
from hayai.engine.request import Logprob, TokenEvent
from hayai.load import load_model

PAGES = [10 + i * 7 % 300 for i in range(100)]


def expected(prompt: list[int]) -> list[float | None]:
    return [None, *(logprob_of(prompt[:i], prompt[i]) for i in range(1, len(prompt)))]


def check(events: list[TokenEvent], name: str, prompt: list[int], tokens: int) -> tuple[Logprob | None, ...]:
    """The first event has them all, no other has any, and the answer is the usual one."""
    mine = [e for e in events if e.request_id == name]
    found = mine[0].prompt_logprobs
    assert found is not None and not any(e.prompt_logprobs for e in mine[1:])
    assert [p and p.token_id for p in found] == [None, *prompt[1:]]
    assert [p and p.logprob for p in found] == expected(prompt)
    assert tokens_of(events, name) == alone(prompt, tokens)
    return found


@pytest.mark.parametrize("length", [1, 2, 16, 33, 100])
@pytest.mark.parametrize(("max_tokens", "max_rows"), [(128, 128), (7, 7), (32, 8), (4, 64)])
def test_every_prompt_token_has_one(length: int, max_tokens: int, max_rows: int) -> None:
    engine, runner = make_engine(max_tokens=max_tokens, max_rows=max_rows)
    prompt = PAGES[:length]
    engine.add(request("a", prompt, max_tokens=3, prompt_logprobs=2))
    found = check(drain(engine), "a", prompt, 3)
    assert all(len(p.top) == 2 for p in found if p is not None)
    assert sum(tokens for _, tokens in runner.steps) == length + 2


def test_beside_others_with_and_without() -> None:
    engine, _ = make_engine(max_tokens=24, max_rows=10)
    engine.add(request("plain", PAGES[:50], max_tokens=20))
    engine.step()
    engine.add(request("a", PAGES[:40], max_tokens=5, prompt_logprobs=0))
    engine.add(request("b", PAGES[1:70], max_tokens=5, prompt_logprobs=1, logprobs=2, frequency_penalty=0.5))
    events = drain(engine)
    check(events, "a", PAGES[:40], 5)
    check(events, "b", PAGES[1:70], 5)
    assert all(e.logprob is not None and len(e.logprob.top) == 2 for e in events if e.request_id == "b")


def test_the_only_event_has_them() -> None:
    engine, _ = make_engine()
    engine.add(request("a", PAGES[:20], max_tokens=1, prompt_logprobs=0))
    events = drain(engine)
    assert len(events) == 1 and events[0].finish_reason == "length"
    check(events, "a", PAGES[:20], 1)


def test_a_cached_prefix_is_not_used() -> None:
    engine, _ = make_engine(max_tokens=128, max_rows=128)
    engine.add(request("before", PAGES, max_tokens=3))
    drain(engine)
    engine.add(request("a", PAGES, max_tokens=3, prompt_logprobs=0))
    events = drain(engine)
    check(events, "a", PAGES, 3)
    assert events[-1].timing is not None and events[-1].timing.cached_tokens == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_computes_none_twice(prefix_cache: bool) -> None:
    engine, runner = make_engine(num_blocks=16, max_tokens=16, max_rows=8, prefix_cache=prefix_cache)
    engine.scheduler.headroom = 0
    rows = 0
    step = runner.step

    def counting(batch, plan="main"):  # type: ignore[no-untyped-def]
        nonlocal rows
        rows += 0 if batch.targets is None else int((batch.targets >= 0).sum())
        return step(batch, plan)

    runner.step = counting  # type: ignore[method-assign]
    engine.add(request("old", PAGES[:20], max_tokens=120))
    prompts = {"a": [7, *PAGES[:60]], "b": [8, *PAGES[:60]]}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, max_tokens=60, prompt_logprobs=0))
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
        if len(events) == 10:
            # In the middle of a prompt as well as in the middle of an answer.
            engine.scheduler._preempt(engine.scheduler.running[-1])
    assert engine.stats().num_preemptions >= 2
    for name, prompt in prompts.items():
        check(events, name, prompt, 60)
    assert rows == 2 * 60


def test_a_window_of_rows_that_others_use_up() -> None:
    """Every row is taken by decoding sequences but one: the prompt goes on by one token per step."""
    engine, _ = make_engine(FULL, max_tokens=32, max_sequences=4, max_rows=4)
    for i in range(3):
        engine.add(request(f"d{i}", PAGES[i : i + 5], max_tokens=40))
    engine.step()
    engine.add(request("a", PAGES[:20], max_tokens=2, prompt_logprobs=0))
    events = drain(engine)
    check(events, "a", PAGES[:20], 2)


def test_a_real_model_gives_what_decoding_gives(tiny_model: Path, backend: str) -> None:
    """The log-probability of a prompt's token is that of the same token when it was chosen."""
    options = {"model": str(tiny_model), "backend": backend}
    with closing(load_model(EngineConfig(**options)).engine) as engine:  # type: ignore[arg-type]
        engine.add(request("chosen", PAGES[:30], max_tokens=40, logprobs=2))
        chosen = drain(engine)
        prompt = [*PAGES[:30], *tokens_of(chosen, "chosen")]
        engine.add(request("given", prompt, max_tokens=2, prompt_logprobs=2))
        engine.add(request("beside", PAGES[3:90], max_tokens=4))
        given = next(e for e in drain(engine) if e.request_id == "given").prompt_logprobs
    assert given is not None and len(given) == 70
    as_chosen = [e.logprob for e in chosen]
    as_given = list(given[30:])
    if backend == "reference":  # its sums depend on the number of rows, see test_determinism.py
        for p, q in zip(as_chosen, as_given, strict=True):
            assert p is not None and q is not None and p.token_id == q.token_id
            np.testing.assert_allclose(q.logprob, p.logprob, atol=2e-3)
    else:
        assert as_given == as_chosen

"""Grammars in the engine: masks come from a worker thread, follow every token once, and fail alone."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from engine_fakes import VOCAB, alone, drain, make_engine, request, tokens_of
from hayai.engine.request import TokenEvent

PROMPT = [10, 11, 12]


class Script:
    """A grammar that allows exactly these tokens, one after the other."""

    def __init__(self, *tokens: int, slow: float = 0.0) -> None:
        self.tokens = tokens
        self.slow = slow
        self.accepted: list[int] = []
        self.threads: set[str] = set()

    def fill(self, words: NDArray[np.uint32]) -> None:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.slow)
        token = self.tokens[len(self.accepted)]
        words.fill(0)
        words[token // 32] = 1 << token % 32

    def accept(self, token: int) -> None:
        if token != self.tokens[len(self.accepted)]:
            raise ValueError(f"token {token} is not allowed here")
        self.accepted.append(token)

    def rollback(self, count: int) -> None:
        del self.accepted[-count:]


class Broken(Script):
    """Fails at the third mask, or at the first token."""

    def __init__(self, *tokens: int, at: str) -> None:
        super().__init__(*tokens)
        self.at = at

    def fill(self, words: NDArray[np.uint32]) -> None:
        if self.at == "fill" and len(self.accepted) == 2:
            raise RuntimeError("too many states")
        super().fill(words)
        if self.at == "empty" and len(self.accepted) == 2:
            words.fill(0)

    def accept(self, token: int) -> None:
        if self.at == "accept":
            raise ValueError("no such rule")
        super().accept(token)


def test_the_mask_chooses_and_the_grammar_ends_the_request() -> None:
    engine, runner = make_engine()
    grammar = Script(50, 60, 70, 2)
    engine.add(request("a", PROMPT, mask=grammar))
    engine.add(request("b", PROMPT, max_tokens=6))
    events = drain(engine)
    assert tokens_of(events, "a") == [50, 60, 70, 2]
    assert [e.finish_reason for e in events if e.request_id == "a"] == [None, None, None, "stop"]
    assert grammar.accepted == [50, 60, 70], "the end token ends the request, not the grammar"
    assert tokens_of(events, "b") == alone(PROMPT, 6), "nobody else is restricted"
    assert grammar.threads == {"hayai-masks"}
    engine.close()
    assert runner.closed


def test_an_end_token_ends_a_grammar_even_where_ends_are_ignored() -> None:
    engine, _ = make_engine()
    engine.add(request("a", PROMPT, mask=Script(50, 2, 60), ignore_eos=True, max_tokens=9))
    events = drain(engine)
    assert tokens_of(events, "a") == [50, 2] and events[-1].finish_reason == "stop"


def test_a_steady_batch_keeps_its_arrays() -> None:
    engine, _ = make_engine()
    engine.add(request("a", PROMPT, mask=Script(*range(50, 80)), max_tokens=30))
    steps = set()
    engine.step()
    for _ in range(20):
        batch = engine.schedule()
        assert batch is not None
        steps.add(id(batch.step))
        engine.run(batch)
    assert len(steps) == 1


def test_preemption_does_not_disturb_a_grammar() -> None:
    engine, _ = make_engine(num_blocks=12, max_sequences=3)
    scripts = [[100 + i * 100 + k % 90 for k in range(110)] for i in range(3)]
    grammars = [Script(*script) for script in scripts]
    for i, grammar in enumerate(grammars):
        engine.add(request(f"r{i}", [5 + i] * 20, max_tokens=110, mask=grammar))
    events = drain(engine)
    assert engine.stats().num_preemptions > 0
    for i, grammar in enumerate(grammars):
        assert tokens_of(events, f"r{i}") == scripts[i] and grammar.accepted == scripts[i][:-1]


@pytest.mark.parametrize(
    ("at", "words", "tokens"),
    [
        ("fill", "RuntimeError: too many states", [50, 60]),
        ("empty", "the grammar allows no token", [50, 60]),
        ("accept", "ValueError: no such rule", [50]),
    ],
)
def test_a_grammar_that_fails_ends_its_request_alone(at: str, words: str, tokens: list[int]) -> None:
    engine, _ = make_engine()
    engine.add(request("bad", PROMPT, mask=Broken(50, 60, 70, 80, at=at)))
    engine.add(request("good", PROMPT, mask=Script(90, 91, 92, 93, 94, 2)))
    engine.add(request("plain", PROMPT, max_tokens=8))
    events = drain(engine)
    last = next(e for e in events if e.request_id == "bad" and e.finish_reason)
    assert (
        (last.token_id, last.finish_reason) == (-1, "error")
        and last.error is not None
        and words in last.error
    )
    assert last.own_fault
    assert tokens_of(events, "bad") == tokens
    assert last.timing is not None and last.timing.output_tokens == len(tokens)
    assert tokens_of(events, "good") == [90, 91, 92, 93, 94, 2]
    assert tokens_of(events, "plain") == alone(PROMPT, 8)
    stats = engine.stats()
    assert (stats.grammar_failures, stats.finished) == (1, {"error": 1, "stop": 1, "length": 1})
    engine.check_integrity()


def test_the_mask_is_computed_while_the_engine_does_other_things() -> None:
    """Scheduling does not wait for it; the backend call does."""
    gate = threading.Semaphore(0)

    class Gated(Script):
        def fill(self, words: NDArray[np.uint32]) -> None:
            assert gate.acquire(timeout=10)
            super().fill(words)

    engine, _ = make_engine()
    engine.add(request("a", PROMPT, mask=Gated(*range(50, 60)), max_tokens=8))
    events = []
    for _ in range(7):
        batch = engine.schedule()
        gate.release()  # until here the mask of this step could not be finished
        events += engine.run(batch)
    gate.release()
    events += drain(engine)
    assert tokens_of(events, "a") == list(range(50, 58))


def test_an_abort_in_the_middle_of_a_mask() -> None:
    engine, _ = make_engine()
    engine.add(request("a", PROMPT, mask=Script(*range(50, 60), slow=0.02), max_tokens=8))
    engine.step()
    engine.abort("a")
    engine.add(request("a", PROMPT, mask=Script(70, 71, 72), max_tokens=3))
    assert tokens_of(drain(engine), "a") == [70, 71, 72]
    engine.close()


def test_masks_cover_the_vocabulary_in_whole_words() -> None:
    sizes = []

    class Measure(Script):
        def fill(self, words: NDArray[np.uint32]) -> None:
            sizes.append(len(words))
            super().fill(words)

    engine, _ = make_engine()
    engine.add(request("a", PROMPT, mask=Measure(499), max_tokens=1))
    assert tokens_of(drain(engine), "a") == [499] and sizes == [-(-VOCAB // 32)]


def test_a_late_mask_holds_up_its_own_request_only() -> None:
    gate = threading.Event()

    class Gated(Script):
        def fill(self, words: NDArray[np.uint32]) -> None:
            if len(self.accepted) == 2:
                assert gate.wait(60)
            super().fill(words)

    engine, _ = make_engine()
    engine.add(request("slow", PROMPT, mask=Gated(50, 60, 70, 80, 2)))
    engine.add(request("plain", PROMPT, max_tokens=30))
    events: list[TokenEvent] = []
    while not any(e.finish_reason for e in events):
        events += engine.step()
    assert tokens_of(events, "plain") == alone(PROMPT, 30)
    assert tokens_of(events, "slow") == [50, 60]
    engine.add(request("later", PROMPT, max_tokens=4))
    while sum(e.request_id == "later" for e in events) < 4:
        events += engine.step()
    assert engine.step() == [] and engine.has_work, "alone, it is waited for a little in every step"
    engine.check_integrity()
    gate.set()
    events += drain(engine)
    assert tokens_of(events, "slow") == [50, 60, 70, 80, 2]
    assert tokens_of(events, "later") == alone(PROMPT, 4)
    assert engine.stats().grammar_failures == 0, "waiting costs nothing: only the worker's own time counts"
    engine.check_integrity()
    engine.close()


def test_late_first_masks_and_an_abort_beside_them() -> None:
    gate = threading.Event()

    class Gated(Script):
        def fill(self, words: NDArray[np.uint32]) -> None:
            assert gate.wait(60)
            super().fill(words)

    engine, _ = make_engine()
    engine.add(request("gone", PROMPT, mask=Gated(50, 2)))
    engine.add(request("stays", PROMPT, mask=Gated(60, 61, 2)))
    assert [engine.step() for _ in range(3)] == [[], [], []]
    engine.abort("gone")
    assert [e.finish_reason for e in engine.step()] == ["abort"]
    gate.set()
    assert tokens_of(drain(engine), "stays") == [60, 61, 2]
    engine.close()


@pytest.mark.parametrize(
    ("cost", "words", "most"), [(0.3, "one token's mask took", 1), (0.1, "5 ms each", 12)]
)
def test_a_grammar_whose_masks_cost_too_much_ends_its_request_alone(
    cost: float, words: str, most: int
) -> None:
    class Costly(Script):
        def fill(self, words: NDArray[np.uint32]) -> None:
            until = time.thread_time() + cost
            while time.thread_time() < until:
                np.sort(np.arange(100_000, 0, -1))
            super().fill(words)

    engine, _ = make_engine()
    engine.add(request("bad", PROMPT, mask=Costly(*range(50, 90))))
    engine.add(request("good", PROMPT, mask=Script(90, 91, 92, 2)))
    events = drain(engine)
    last = next(e for e in events if e.request_id == "bad" and e.finish_reason)
    assert last.finish_reason == "error" and last.own_fault and last.error is not None
    assert "too expensive" in last.error and words in last.error
    assert len(tokens_of(events, "bad")) < most
    assert tokens_of(events, "good") == [90, 91, 92, 2]
    engine.close()

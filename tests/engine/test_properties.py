"""Whatever is submitted, aborted, timed out, preempted, evicted and finished in whatever order: the books are
in order after every step, every request gets the tokens that it would get alone (with the prefix cache as
without), and in the end no block has an owner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine_fakes import (
    FULL,
    INDEX,
    LATENT,
    STATE,
    WINDOW,
    alone,
    first_allowed,
    hashed,
    logprob_of,
    make_engine,
    request,
)
from hayai.engine.pacing import Pacer
from hayai.engine.request import TokenEvent
from hayai.plan.plan import CacheGroup

GROUPS = st.sampled_from(
    [(FULL,), (FULL, WINDOW), (LATENT, INDEX), (LATENT, INDEX, WINDOW), (FULL, STATE), (FULL, WINDOW, STATE)]
)
COMMON = [3 + i * 11 % 390 for i in range(80)]
"""What prompts begin with, so that they meet in the prefix cache."""


@dataclass(frozen=True)
class Submit:
    shared: int
    suffix: tuple[int, ...]
    max_tokens: int
    penalty: bool
    priority: int
    tenant: str
    masked: bool
    prompt_logprobs: int | None
    overdue: bool

    @property
    def prompt(self) -> list[int]:
        return COMMON[: self.shared] + list(self.suffix)


class EvenTokens:
    """A grammar without an end: even tokens only, and never 0."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def fill(self, words: NDArray[np.uint32]) -> None:
        words.fill(0x55555554)

    def accept(self, token: int) -> None:
        if token % 2:
            raise ValueError(f"token {token} is odd")
        self.accepted.append(token)

    def rollback(self, count: int) -> None:
        del self.accepted[-count:]


def reply(past: list[int]) -> int:
    return hashed(past)


def reply_masked(past: list[int]) -> int:
    words = np.zeros(16, np.uint32)
    EvenTokens().fill(words)
    return first_allowed(words, hashed(past))


SUBMITS = st.builds(
    Submit,
    shared=st.sampled_from([0, 33, 64, 70]),
    suffix=st.lists(st.integers(3, 400), min_size=1, max_size=40).map(tuple),
    max_tokens=st.integers(1, 90),
    penalty=st.booleans(),
    priority=st.sampled_from([0, 0, 10]),
    tenant=st.sampled_from(["", "", "a", "b"]),
    masked=st.booleans(),
    prompt_logprobs=st.sampled_from([None, None, None, 0, 2]),
    overdue=st.sampled_from([False] * 7 + [True]),
)
ABORTS = st.integers(0, 7)  # one of the last requests
STEPS = st.just("step")
# Many requests at first, so that most histories fill the cache.
ACTIONS = st.tuples(
    st.lists(SUBMITS, min_size=2, max_size=8), st.lists(st.one_of(STEPS, STEPS, SUBMITS, ABORTS), max_size=70)
).map(lambda parts: [*parts[0], *parts[1]])


class History:
    """Runs actions on an engine and checks everything after each of them."""

    def __init__(self, groups: tuple[CacheGroup, ...], prefix_cache: bool, paced: bool, **sizes: int) -> None:
        self.headroom = sizes.pop("headroom")
        self.engine, _ = make_engine(
            *groups,
            max_context=150,
            end_ids=(),
            prefix_cache=prefix_cache,
            pacer=Pacer() if paced else None,
            **sizes,  # type: ignore[arg-type]
        )
        self.engine.scheduler.headroom = self.headroom
        self.submitted: dict[str, Submit] = {}
        self.grammars: dict[str, EvenTokens] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, TokenEvent] = {}
        self.prompts: dict[str, tuple[object, ...]] = {}

    def act(self, action: object) -> None:
        if isinstance(action, Submit):
            self.submit(action)
        elif isinstance(action, int):
            self.engine.abort(f"r{len(self.submitted) - 1 - action}")
        elif self.engine.has_work:
            self.step()
        self.engine.check_integrity()

    def submit(self, asked: Submit) -> None:
        if len(asked.prompt) + 1 > self.engine.max_length:
            return
        name = f"r{len(self.submitted)}"
        self.submitted[name], self.got[name] = asked, []
        if asked.masked:
            self.grammars[name] = EvenTokens()
        self.engine.add(
            request(
                name,
                asked.prompt,
                max_tokens=asked.max_tokens,
                frequency_penalty=0.5 if asked.penalty else 0.0,
                priority=asked.priority,
                tenant=asked.tenant,
                cache_salt="salt" if asked.tenant == "b" else "",
                mask=self.grammars.get(name),
                prompt_logprobs=asked.prompt_logprobs,
                deadline=0.0 if asked.overdue else None,
            )
        )

    def step(self) -> None:
        before = self.engine.stats().num_steps
        events = self.engine.step()
        self.engine.check_integrity()
        for e in events:
            assert e.request_id not in self.ended, "an event after the last one"
            if e.token_id >= 0:
                if not self.got[e.request_id] and e.prompt_logprobs is not None:
                    self.prompts[e.request_id] = e.prompt_logprobs
                else:
                    assert e.prompt_logprobs is None
                self.got[e.request_id].append(e.token_id)
            if e.finish_reason is not None:
                self.ended[e.request_id] = e
        if self.engine.has_work and before == self.engine.stats().num_steps:
            assert events, "a step without any progress"

    def finish(self) -> None:
        steps = 0
        while self.engine.has_work:
            self.step()
            steps += 1
            assert steps < 20_000, "it does not end"
        self.engine.close()
        stats = self.engine.stats()
        assert stats.kv_blocks_used == 0 and set(self.ended) == set(self.submitted)
        assert sum(stats.batch_sizes.values()) == stats.num_steps
        for name, asked in self.submitted.items():
            self.check(name, asked)

    def check(self, name: str, asked: Submit) -> None:
        last, got = self.ended[name], self.got[name]
        count = min(asked.max_tokens, self.engine.max_length - len(asked.prompt))
        expected = alone(asked.prompt, count, reply_masked if asked.masked else reply)
        assert got == (expected if last.finish_reason == "length" else expected[: len(got)])
        assert (last.finish_reason == "timeout") == (asked.overdue and last.finish_reason != "abort")
        if asked.masked and last.finish_reason == "length":
            assert self.grammars[name].accepted == got[:-1], "accepted once each, in order"
        if asked.prompt_logprobs is not None and got:
            values = [p.logprob for p in self.prompts[name] if p is not None]  # type: ignore[attr-defined]
            prompt = asked.prompt
            assert values == [logprob_of(prompt[:i], prompt[i]) for i in range(1, len(prompt))]
        assert last.timing is not None and last.timing.output_tokens == len(got)
        assert last.timing.num_steps >= len(got) and last.timing.max_batch * len(got) >= len(got)


@settings(max_examples=200, deadline=None)
@given(
    actions=ACTIONS,
    groups=GROUPS,
    prefix_cache=st.sampled_from([True, True, False]),
    paced=st.booleans(),
    num_blocks=st.integers(6, 12),
    max_sequences=st.integers(2, 5),
    max_tokens=st.integers(5, 40),
    max_rows=st.integers(5, 9),
    headroom=st.sampled_from([0, 0, 16]),
)
def test_any_history_keeps_the_books_and_the_tokens(
    actions: list[object],
    groups: tuple[CacheGroup, ...],
    prefix_cache: bool,
    paced: bool,
    **sizes: int,
) -> None:
    history = History(groups, prefix_cache, paced, **sizes)
    for action in actions:
        history.act(action)
    history.finish()
    stats = history.engine.stats()
    event(f"preemptions: {min(3, stats.num_preemptions)}")
    event(f"evictions: {stats.kv_evictions > 0}, cached tokens: {stats.prefix_cached_tokens > 0}")

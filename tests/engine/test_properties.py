"""Whatever is submitted, aborted, preempted and finished in whatever order: the books are in order after
every step, every request gets the tokens that it would get alone, and in the end every block is free."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine_fakes import FULL, STATE, WINDOW, alone, make_engine, request

GROUPS = st.sampled_from([(FULL,), (FULL, WINDOW), (FULL, STATE), (FULL, WINDOW, STATE)])


@dataclass(frozen=True)
class Submit:
    prompt: tuple[int, ...]
    max_tokens: int
    penalty: bool


SUBMITS = st.builds(
    Submit,
    st.lists(st.integers(3, 400), min_size=1, max_size=70).map(tuple),
    st.integers(1, 90),
    st.booleans(),
)
ABORTS = st.integers(0, 7)  # one of the last requests
STEPS = st.just("step")
# Many requests at first, so that most histories fill the cache.
ACTIONS = st.tuples(
    st.lists(SUBMITS, min_size=2, max_size=8), st.lists(st.one_of(STEPS, STEPS, SUBMITS, ABORTS), max_size=50)
).map(lambda parts: [*parts[0], *parts[1]])


@settings(max_examples=200, deadline=None)
@given(
    actions=ACTIONS,
    groups=GROUPS,
    num_blocks=st.integers(5, 10),
    max_sequences=st.integers(2, 5),
    max_tokens=st.integers(5, 40),
    headroom=st.sampled_from([0, 0, 16]),
)
def test_any_history_keeps_the_books_and_the_tokens(
    actions: list[object],
    groups: tuple[object, ...],
    num_blocks: int,
    max_sequences: int,
    max_tokens: int,
    headroom: int,
) -> None:
    engine, _ = make_engine(
        *groups,  # type: ignore[arg-type]
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        max_context=150,
        end_ids=(),
    )
    engine.scheduler.headroom = headroom
    submitted: dict[str, Submit] = {}
    got: dict[str, list[int]] = {}
    ended: dict[str, str] = {}

    def step() -> None:
        before = engine.stats().num_steps
        events = engine.step()
        engine.check_integrity()
        for e in events:
            assert e.request_id not in ended, "an event after the last one"
            if e.token_id >= 0:
                got[e.request_id].append(e.token_id)
            if e.finish_reason is not None:
                ended[e.request_id] = e.finish_reason
        if engine.has_work and before == engine.stats().num_steps:
            assert events, "a step without any progress"

    for action in actions:
        if isinstance(action, Submit):
            name = f"r{len(submitted)}"
            if len(action.prompt) + 1 > engine.max_length:
                continue
            submitted[name] = action
            got[name] = []
            penalty = 0.5 if action.penalty else 0.0
            engine.add(request(name, action.prompt, max_tokens=action.max_tokens, frequency_penalty=penalty))
        elif isinstance(action, int):
            engine.abort(f"r{len(submitted) - 1 - action}")
        elif engine.has_work:
            step()
        engine.check_integrity()
    steps = 0
    while engine.has_work:
        step()
        steps += 1
        assert steps < 20_000, "it does not end"

    event(f"preemptions: {min(3, engine.stats().num_preemptions)}")
    assert engine.cache.used_blocks() == 0
    assert set(ended) == set(submitted)
    for name, asked in submitted.items():
        count = min(asked.max_tokens, engine.max_length - len(asked.prompt))
        expected = alone(list(asked.prompt), count)
        assert got[name] == (expected if ended[name] == "length" else expected[: len(got[name])])

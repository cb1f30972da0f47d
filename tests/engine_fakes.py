"""A runner without a model, for tests of everything above it.

It keeps real paged caches whose content is the token that was written, reads every sequence's past back
through its block tables, and answers with a function of that past. So a wrong table, a block given away too
early, a missed copy or a wrong position gives wrong tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE, Limits, StepInput, StepOutput
from hayai.engine.engine import Engine
from hayai.engine.pacing import Pacer
from hayai.engine.request import EngineRequest, SamplingParams, TokenEvent
from hayai.plan.plan import CacheGroup

VOCAB = 500
FULL = CacheGroup("kv", "full", 2, 1, 8, 8)
WINDOW = CacheGroup("local", "window", 2, 1, 8, 8, window=20)
LATENT = CacheGroup("latent", "mla", 2, 1, 8, 4)
INDEX = CacheGroup("index", "index", 1, 1, 8, 0)
STATE = CacheGroup("state", "state", 1, 1, 8, 8, can_rollback=False)

Reply = Callable[[list[int]], int]


def first_allowed(mask: NDArray[np.uint32], token: int) -> int:
    """The token, or the lowest one that the mask allows where it does not allow this one."""
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return token if token in allowed else int(allowed[0])


def logprob_of(past: list[int], token: int) -> float:
    """A log-probability that depends on the whole past and the token; exact in float32."""
    return -float(hashed([*past, token])) / 64


def hashed(past: list[int]) -> int:
    """A reply that depends on the whole past. Never 0, 1 or 2."""
    return 3 + zlib.crc32(np.array(past, np.int32).tobytes()) % (VOCAB - 3)


def scripted(*replies: int) -> Reply:
    """Give these tokens one after the other after a prompt that ends with token 1."""
    return lambda past: replies[len(past) - 1 - past.index(1)]


class FakeRunner:
    """See the module. `steps` keeps (sequences, tokens) of every step."""

    def __init__(self, groups: Mapping[str, CacheGroup], num_blocks: int, reply: Reply = hashed) -> None:
        self.groups = groups
        self.reply = reply
        self.caches = {name: np.full((num_blocks, BLOCK_SIZE), -1) for name in groups}
        self.states: dict[int, list[int]] = {}
        self.steps: list[tuple[int, int]] = []
        self.fail_with: BaseException | None = None
        self.closed = False

    @property
    def vocab_size(self) -> int:
        return VOCAB

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        if self.fail_with is not None:
            raise self.fail_with
        sequences = len(step.query_start) - 1
        self.steps.append((sequences, len(step.token_ids)))
        pasts: dict[int, list[int]] = {}
        for s in range(sequences):
            rows = range(int(step.query_start[s]), int(step.query_start[s + 1]))
            tokens, positions = step.token_ids[rows], step.positions[rows]
            assert positions.tolist() == list(range(positions[0], positions[0] + len(rows)))
            past = self._write_and_read(step, s, tokens, positions)
            for row in rows:
                pasts[row] = past[: int(step.positions[row]) + 1]
        rows = step.logit_rows.tolist()
        tokens = [self.reply(pasts[row]) for row in rows]
        for r, mask in enumerate(step.masks):
            if mask is not None:
                tokens[r] = first_allowed(mask, tokens[r])
        logprobs = [-1.0 if r.num_logprobs >= 0 else np.nan for r in step.sampling]
        if step.targets is not None:
            for r, target in enumerate(step.targets.tolist()):
                if target >= 0:
                    logprobs[r] = logprob_of(pasts[rows[r]], target)
        return StepOutput(
            np.array(tokens, np.int32),
            np.array(logprobs, np.float32),
            tuple(np.arange(max(0, r.num_logprobs), dtype=np.int32) for r in step.sampling),
            tuple(np.zeros(max(0, r.num_logprobs), np.float32) for r in step.sampling),
        )

    def _write_and_read(
        self, step: StepInput, s: int, tokens: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> list[int]:
        """Store the tokens in every cache; the past as the first cache has it, and the others agree."""
        end = int(positions[-1]) + 1
        found: list[int] = []
        for name, group in self.groups.items():
            table = step.block_tables[name][s]
            if group.kind == "state":
                state = [] if positions[0] == 0 else self.states[int(table[0])]
                assert len(state) == positions[0]
                self.states[int(table[0])] = state + tokens.tolist()
                continue
            self.caches[name][table[positions // BLOCK_SIZE], positions % BLOCK_SIZE] = tokens
            wanted = np.arange(max(0, positions[0] - group.window + 1) if group.kind == "window" else 0, end)
            past = self.caches[name][table[wanted // BLOCK_SIZE], wanted % BLOCK_SIZE].tolist()
            if not found:  # the first group is one that keeps everything
                found = past
            assert past == found[-len(past) :], f"the cache of {name} has other tokens"
        for name, group in self.groups.items():
            if group.kind == "state":
                assert self.states[int(step.block_tables[name][s][0])] == found
        return found

    def copy_blocks(self, group: str, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        if self.groups[group].kind == "state":
            self.states.update(
                {int(t): list(self.states[int(s)]) for s, t in zip(sources, targets, strict=True)}
            )
        else:
            self.caches[group][targets] = self.caches[group][sources]

    def describe(self) -> Mapping[str, str | int | float]:
        return {"backend": "fake"}

    def close(self) -> None:
        self.closed = True


def make_engine(
    *groups: CacheGroup,
    reply: Reply = hashed,
    num_blocks: int = 64,
    max_sequences: int = 4,
    max_tokens: int = 32,
    max_context: int = 256,
    end_ids: tuple[int, ...] = (2,),
    seed: int | None = 7,
    max_rows: int | None = None,
    prefix_cache: bool = True,
    pacer: Pacer | None = None,
) -> tuple[Engine, FakeRunner]:
    """An engine on a fake runner; groups default to one full group."""
    table = {group.name: group for group in groups or (FULL,)}
    runner = FakeRunner(table, num_blocks, reply)
    limits = Limits(max_tokens, max_sequences, max_rows or max_sequences, num_blocks, max_context)
    engine = Engine(runner, limits, table, end_ids=end_ids, seed=seed, prefix_cache=prefix_cache, pacer=pacer)
    return engine, runner


REQUEST_FIELDS = frozenset(field.name for field in fields(EngineRequest))


def request(name: str, prompt: list[int] | tuple[int, ...], **options: Any) -> EngineRequest:
    """A greedy request unless `options` (fields of the request or of its sampling) say otherwise."""
    own = {key: value for key, value in options.items() if key in REQUEST_FIELDS}
    params = {key: value for key, value in options.items() if key not in REQUEST_FIELDS}
    return EngineRequest(name, tuple(prompt), SamplingParams(**({"temperature": 0.0} | params)), **own)


def drain(engine: Engine, check: bool = True) -> list[TokenEvent]:
    """Run until there is nothing to do; all events."""
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
        if check:
            engine.check_integrity()
    return events


def tokens_of(events: list[TokenEvent], name: str) -> list[int]:
    """The tokens of one request."""
    return [e.token_id for e in events if e.request_id == name and e.token_id >= 0]


def alone(prompt: list[int], count: int, reply: Reply = hashed) -> list[int]:
    """What the reply function gives when nothing else runs."""
    past = list(prompt)
    for _ in range(count):
        past.append(reply(past))
    return past[len(prompt) :]

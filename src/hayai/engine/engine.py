"""The step loop: schedule, run, commit.

An Engine is owned by one thread at a time (see service.py). It knows token ids, block numbers and
sampling parameters; text, files and threads are other rooms.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import monotonic, perf_counter

from hayai.backends.base import Limits, Runner, StepOutput
from hayai.engine.kv_cache import KvCache
from hayai.engine.request import EngineRequest, Logprob, RequestTiming, TokenEvent
from hayai.engine.scheduler import Batch, Scheduler
from hayai.engine.sequence import Sequence
from hayai.engine.step_builder import StepBuilder
from hayai.errors import ConfigError, RequestError
from hayai.plan.plan import CacheGroup


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the state of now.

    prompt_tokens counts tokens that were run without being decoded, so recomputed ones count again.
    step_seconds: time inside the backend. finished: requests by finish reason.
    """

    num_steps: int
    prompt_tokens: int
    output_tokens: int
    step_seconds: float
    max_batch: int
    num_preemptions: int
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    finished: Mapping[str, int]


class Engine:
    """Runs many requests on one runner.

    groups: the cache groups of the plans, by name. end_ids: tokens that end a turn, unless a request
    ignores them. seed: where the seeds of requests that name none come from (None: the system).
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        groups: Mapping[str, CacheGroup],
        *,
        end_ids: Iterable[int] = (),
        seed: int | None = None,
    ) -> None:
        if min(limits.max_tokens, limits.max_rows) < limits.max_sequences:
            raise ConfigError(
                f"max_step_tokens ({limits.max_tokens}) must be at least max_sequences "
                f"({limits.max_sequences}): every running sequence decodes in every step"
            )
        self.runner = runner
        self.limits = limits
        self.groups = dict(groups)
        self.end_ids = frozenset(end_ids)
        self.vocab_size = runner.vocab_size
        self._next_seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._finished: Counter[str] = Counter()
        self._num_steps = 0
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._step_seconds = 0.0
        self._max_batch = 0
        self._preemptions_before = 0
        self._start_empty()
        self.max_length = min(limits.max_context, self.cache.capacity())

    def _start_empty(self) -> None:
        limits = self.limits
        self.cache = KvCache(
            tuple(self.groups.values()),
            limits.num_blocks,
            limits.max_sequences,
            limits.max_context,
            limits.max_tokens,
        )
        self.scheduler = Scheduler(self.cache, limits.max_tokens)
        self._builder = StepBuilder(self.cache)
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[TokenEvent] = []

    # ------------------------------------------------------------------ requests

    def check(self, request: EngineRequest) -> None:
        """RequestError when the request can't ever be served. Safe to call from any thread."""
        prompt = request.prompt_ids
        if not prompt:
            raise RequestError("the prompt is empty: at least one token is needed", param="prompt")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise RequestError(
                f"token id {low if low < 0 else high} is not in the vocabulary: ids go from 0 to "
                f"{self.vocab_size - 1}",
                param="prompt",
                code="invalid_value",
            )
        if len(prompt) + 1 > self.max_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and with at least one to generate it must fit the "
                f"context of {self.max_length} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        worst = max(request.params.logit_bias, default=0)
        if worst >= self.vocab_size:
            raise RequestError(
                f"logit_bias names token {worst}; the vocabulary has {self.vocab_size}",
                param="logit_bias",
                code="invalid_value",
            )

    def add(self, request: EngineRequest, arrived: float | None = None) -> None:
        """Queue a request. RequestError when it can't be served or its id is in use.

        arrived: monotonic seconds when it came in, if that was before now.
        """
        self.check(request)
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        seed = request.params.seed
        sequence = Sequence(
            request,
            self._draw_seed() if seed is None else seed,
            self.end_ids,
            self.max_length,
            monotonic() if arrived is None else arrived,
        )
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)

    def _draw_seed(self) -> int:
        """The next 64-bit seed: splitmix64 (Steele, Lea, Flood 2014)."""
        mask = (1 << 64) - 1
        self._next_seed = z = (self._next_seed + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def abort(self, request_id: str) -> None:
        """Stop a request before the next step; its last event says 'abort'. Unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._pending.append(self._finish(sequence, -1, "abort", None))

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._sequences or self._pending)

    # ------------------------------------------------------------------ the step

    def step(self) -> list[TokenEvent]:
        """Run one step; what came out of it, in batch order."""
        return self.run(self.schedule())

    def schedule(self) -> Batch | None:
        """The first half of a step, up to the point where the backend can be called."""
        batch = self.scheduler.schedule()
        if batch is not None:
            self._builder.build(batch)
        return batch

    def run(self, batch: Batch | None) -> list[TokenEvent]:
        """The second half: call the backend, commit. No request may be added or aborted in between."""
        if batch is None:
            return self._take_pending()
        assert batch.step is not None
        if self.cache.has_copies:
            for group, sources, targets in self.cache.take_copies():
                self.runner.copy_blocks(group, sources, targets)
        began = perf_counter()
        output = self.runner.step(batch.step)
        self._step_seconds += perf_counter() - began
        return self._commit(batch, output)

    def _commit(self, batch: Batch, output: StepOutput) -> list[TokenEvent]:
        """Record computed tokens and new ones; finish what is finished."""
        events = self._take_pending() if self._pending else []
        if batch.decode_only:
            for sequence in batch.sequences:
                sequence.num_computed += 1
        else:
            for sequence, count in zip(batch.sequences, batch.counts, strict=True):
                sequence.num_computed += count
        samplers = batch.samplers
        for row, token in enumerate(output.tokens.tolist()):
            sequence = samplers[row]
            sequence.tokens.append(token)
            logprob, timing = (None, None) if sequence.plain else _note(sequence, token, output, row)
            if token in sequence.stop_ids:
                events.append(self._finish(sequence, token, "stop", logprob))
            elif len(sequence.tokens) >= sequence.max_length:
                events.append(self._finish(sequence, token, "length", logprob))
            else:
                events.append(TokenEvent(sequence.request_id, token, None, logprob, None, timing))
        self._num_steps += 1
        self._output_tokens += len(samplers)
        if not batch.decode_only:
            self._prompt_tokens += sum(c for c in batch.counts if c > 1)
        if len(batch.sequences) > self._max_batch:
            self._max_batch = len(batch.sequences)
        return events

    def _finish(self, sequence: Sequence, token: int, reason: str, logprob: Logprob | None) -> TokenEvent:
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        self._finished[reason] += 1
        return TokenEvent(sequence.request_id, token, reason, logprob, timing=sequence.timing())

    def _take_pending(self) -> list[TokenEvent]:
        pending = self._pending
        if pending:
            self._pending = []
            return pending
        return []

    # ------------------------------------------------------------------ state

    def reset(self) -> None:
        """Drop every request and start empty: the way back after a step was torn apart by an interrupt."""
        self._finished["abort"] += len(self._sequences)
        self._preemptions_before += self.scheduler.num_preemptions
        self._start_empty()

    def stats(self) -> EngineStats:
        """A snapshot; may be taken from any thread."""
        return EngineStats(
            num_steps=self._num_steps,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            step_seconds=self._step_seconds,
            max_batch=self._max_batch,
            num_preemptions=self._preemptions_before + self.scheduler.num_preemptions,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks=self.cache.num_blocks,
            kv_blocks_used=self.cache.used_blocks(),
            finished=dict(self._finished),
        )

    def check_integrity(self) -> None:
        """Every block, slot and sequence is where it should be; AssertionError says what is not."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        self.cache.check_integrity(s.blocks for s in running if s.blocks is not None)
        assert all(s.blocks is not None for s in running), "a running sequence without blocks"
        assert all(s.blocks is None for s in waiting), "a waiting sequence holds blocks"
        assert sorted(self._sequences) == sorted(s.request_id for s in [*running, *waiting]), "sequences lost"
        assert all(0 <= s.num_computed < len(s.tokens) for s in [*running, *waiting]), "computed past the end"

    def close(self) -> None:
        """Free the backend."""
        self.runner.close()


def _note(
    sequence: Sequence, token: int, output: StepOutput, row: int
) -> tuple[Logprob | None, RequestTiming | None]:
    """What only some tokens need: penalty counts, log-probabilities, the time of the first token."""
    if sequence.history is not None:
        sequence.history.add(token)
    logprob = None
    if sequence.row.num_logprobs >= 0:
        top: tuple[tuple[int, float], ...] = ()
        if row < len(output.top_ids):
            ids, values = output.top_ids[row].tolist(), output.top_logprobs[row].tolist()
            top = tuple(zip(ids, values, strict=True))
        logprob = Logprob(token, float(output.logprobs[row]), top)
    if sequence.first_token:
        return logprob, None
    sequence.first_token = monotonic()
    sequence.plain = sequence.history is None and sequence.row.num_logprobs < 0
    return logprob, sequence.timing()

"""The step loop: schedule, run, commit.

An Engine is owned by one thread at a time (see service.py). It knows token ids, block numbers and
sampling parameters; text, files and threads are other rooms.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from time import monotonic, perf_counter

from hayai.backends.base import Limits, Runner, StepOutput
from hayai.engine.kv_cache import KvCache
from hayai.engine.mask_worker import START, Grammar, MaskWorker
from hayai.engine.pacing import FASTER, SLOWER, Pacer
from hayai.engine.request import MAX_LOGPROBS, EngineRequest, Logprob, RequestTiming, TokenEvent
from hayai.engine.scheduler import Batch, Scheduler
from hayai.engine.sequence import Sequence
from hayai.engine.stats import Books, EngineStats
from hayai.engine.step_builder import StepBuilder
from hayai.errors import ConfigError, RequestError
from hayai.plan.plan import CacheGroup

__all__ = ["Engine", "EngineStats"]

MANY_DEADLINES = 64
"""Stale entries that the heap of deadlines may hold before it is cleaned."""

LATE_SECONDS = 0.01
"""How long a step waits for masks; common ones take tens of microseconds."""

Noted = tuple[Logprob | None, RequestTiming | None, tuple[Logprob | None, ...] | None]
"""Of an event: logprob, timing, prompt_logprobs."""
NOTHING: Noted = (None, None, None)


class Engine:
    """Runs many requests on one runner.

    groups: the cache groups of the plans, by name. end_ids: tokens that end a turn, unless a request
    ignores them. seed: where the seeds of requests that name none come from (None: the system).
    prefix_cache: keep finished sequences' keys and values for prompts that begin alike. pacer: how much of a
    prompt runs beside decoding sequences (None: as much as a step holds).
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        groups: Mapping[str, CacheGroup],
        *,
        end_ids: Iterable[int] = (),
        seed: int | None = None,
        prefix_cache: bool = True,
        pacer: Pacer | None = None,
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
        self.pacer = pacer
        self._prefix_cache = prefix_cache
        self._next_seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._next_number = 0
        self._books = Books(runner.describe(), pacer)
        self._masks = MaskWorker()
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
            self._prefix_cache,
        )
        self.scheduler = Scheduler(self.cache, limits.max_tokens, limits.max_rows, self.pacer)
        self._builder = StepBuilder(self.cache)
        self._sequences: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._pending: list[TokenEvent] = []
        self._batch: Batch | None = None

    @property
    def keeps_prefixes(self) -> bool:
        """Whether there is a prefix cache: it was asked for, and the plan's caches allow it."""
        return self.cache.keeps_prefixes

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
        asked = request.prompt_logprobs
        if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
            raise RequestError(
                f"prompt_logprobs must be from 0 to {MAX_LOGPROBS}: {asked}",
                param="prompt_logprobs",
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
            self._next_number,
        )
        self._next_number += 1
        self._books.settle(self._batch)  # what its steps took decides how much of the new prompt goes beside
        sequence.chain = self.cache.chain(sequence.tokens, request.cache_salt)
        if request.mask is not None:
            sequence.grammar = Grammar(request.mask, self.vocab_size)
            self._masks.advance(sequence.grammar, START)
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)
        if request.deadline is not None:
            self._watch(request.request_id, request.deadline)

    def _watch(self, request_id: str, deadline: float) -> None:
        if len(self._deadlines) > 2 * len(self._sequences) + MANY_DEADLINES:
            # Most of them belong to requests that ended in time.
            self._deadlines = [entry for entry in self._deadlines if self._is_due(*entry)]
            heapify(self._deadlines)
        heappush(self._deadlines, (deadline, request_id))

    def _is_due(self, deadline: float, request_id: str) -> bool:
        """Whether an entry is still that of a request: its id may have been used again."""
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.deadline == deadline

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
            self._pending.append(self._finish(sequence, -1, "abort"))

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
        if self._deadlines and self._deadlines[0][0] <= monotonic():
            self._expire()
        batch = self.scheduler.schedule()
        if batch is not None:
            self._builder.build(batch)
        return batch

    def _expire(self) -> None:
        now = monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heappop(self._deadlines)
            if self._is_due(deadline, request_id):
                self._pending.append(self._finish(self._sequences[request_id], -1, "timeout"))

    def run(self, batch: Batch | None) -> list[TokenEvent]:
        """The second half: call the backend, commit. No request may be added or aborted in between."""
        if batch is not None and batch.grammars:
            batch = self._with_masks(batch)
        if batch is None:
            if not self._pending:
                self.scheduler.wait_for_late(LATE_SECONDS)
            return self._take_pending()
        assert batch.step is not None
        if batch is not self._batch:
            self._books.turn(self._batch, batch)
            self._batch = batch
        if self.cache.has_copies:
            for group, sources, targets in self.cache.take_copies():
                self.runner.copy_blocks(group, sources, targets)
        began = perf_counter()
        output = self.runner.step(batch.step)
        seconds = perf_counter() - began
        books = self._books
        books.step_seconds += seconds
        books.num_steps += 1
        if batch.typical:
            batch.typical *= SLOWER if seconds > batch.typical else FASTER
        else:
            batch.typical = seconds
        return self._commit(batch, output)

    def _with_masks(self, batch: Batch) -> Batch | None:
        """The batch once all its masks are there; or, where some take long, one without their sequences, so
        that a mask holds up nobody but its own request."""
        until = monotonic() + LATE_SECONDS
        ready: Batch | None = batch
        while ready is not None and not self.scheduler.wait_for_masks(ready, until):
            ready = self.schedule()
        return ready

    def _commit(self, batch: Batch, output: StepOutput) -> list[TokenEvent]:
        """Record computed tokens and new ones; finish what is finished."""
        events = self._take_pending() if self._pending else []
        tokens: list[int] = output.tokens.tolist()
        rows: list[int] | None = None
        if batch.decode_only:
            for sequence in batch.sequences:
                sequence.num_computed += 1
        else:
            self._books.settle(batch)
            if batch.num_prompt_rows:
                rows = _take_prompt_rows(batch, output)
                tokens = [tokens[row] for row in rows]
            for sequence, count in zip(batch.sequences, batch.counts, strict=True):
                sequence.num_computed += count
            self.scheduler.computed(batch)
        samplers = batch.samplers
        failed = self._end_failed(batch, events) if batch.grammars else ()
        for at, token in enumerate(tokens):
            sequence = samplers[at]
            if failed and sequence in failed:
                continue
            sequence.tokens.append(token)
            noted = (
                NOTHING if sequence.plain else self._note(sequence, output, at if rows is None else rows[at])
            )
            if token in sequence.stop_ids:
                events.append(self._finish(sequence, token, "stop", noted))
            elif len(sequence.tokens) >= sequence.max_length:
                events.append(self._finish(sequence, token, "length", noted))
            else:
                logprob, timing, prompt = noted
                events.append(TokenEvent(sequence.request_id, token, None, logprob, None, timing, prompt))
        if batch.grammars:
            self._advance_masks(batch)
        self._books.output_tokens += len(samplers)
        return events

    def _note(self, sequence: Sequence, output: StepOutput, row: int) -> Noted:
        """What only some tokens need: penalty counts, log-probabilities; with the first token the times."""
        token = sequence.tokens[-1]
        if sequence.history is not None:
            sequence.history.add(token)
        logprob = _logprob(token, output, row) if sequence.row.num_logprobs >= 0 else None
        if sequence.first_token:
            return logprob, None, None
        sequence.first_token = monotonic()
        sequence.plain = sequence.history is None and sequence.row.num_logprobs < 0
        self._books.settle(self._batch)
        prompt = None if sequence.prompt_row is None else tuple(sequence.prompt_logprobs)
        return logprob, sequence.timing(), prompt

    def _end_failed(self, batch: Batch, events: list[TokenEvent]) -> set[Sequence]:
        """End the requests whose grammar failed: their token of this step was not restricted."""
        failed = {s for s in batch.grammars if s.grammar is not None and s.grammar.error is not None}
        for sequence in failed:
            assert sequence.grammar is not None
            self._books.grammar_failures += 1
            event = self._finish(sequence, -1, "error", error=sequence.grammar.error)
            events.append(event._replace(own_fault=True))
        return failed

    def _advance_masks(self, batch: Batch) -> None:
        """Start on the next masks of those that go on."""
        for sequence in batch.grammars:
            if sequence.blocks is not None:
                assert sequence.grammar is not None
                self._masks.advance(sequence.grammar, sequence.tokens[-1])

    def _finish(
        self,
        sequence: Sequence,
        token: int,
        reason: str,
        noted: Noted = NOTHING,
        error: str | None = None,
    ) -> TokenEvent:
        self._books.settle(self._batch)
        self._books.finished[reason] += 1
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        logprob, _, prompt = noted
        return TokenEvent(sequence.request_id, token, reason, logprob, error, sequence.timing(), prompt)

    def _take_pending(self) -> list[TokenEvent]:
        pending = self._pending
        if pending:
            self._pending = []
            return pending
        return []

    # ------------------------------------------------------------------ state

    def reset(self, reason: str = "abort") -> None:
        """Drop every request and start empty: the way back after a step was torn apart by an interrupt or an
        error. The dropped requests are counted as finished for `reason`; no event tells of them."""
        books = self._books
        books.finished[reason] += len(self._sequences)
        books.close_cache(self.cache, self.scheduler)
        self._start_empty()

    def stats(self) -> EngineStats:
        """A snapshot; may be taken from any thread."""
        return self._books.snapshot(self.cache, self.scheduler, self._batch)

    def check_integrity(self) -> None:
        """Every block, slot and sequence is where it should be; AssertionError says what is not."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        self.cache.check_integrity(s.blocks for s in running if s.blocks is not None)
        assert all(s.blocks is not None for s in running), "a running sequence without blocks"
        assert all(s.blocks is None for s in waiting), "a waiting sequence holds blocks"
        assert self.scheduler.queue.num_tokens == sum(len(s.tokens) for s in waiting), "waiting tokens"
        assert sorted(self._sequences) == sorted(s.request_id for s in [*running, *waiting]), "sequences lost"
        assert all(0 <= s.num_computed < len(s.tokens) for s in [*running, *waiting]), "computed past the end"

    def close(self) -> None:
        """Free the backend."""
        self._masks.close()
        self.runner.close()


def _logprob(token: int, output: StepOutput, row: int) -> Logprob:
    """A row's log-probability of `token`, and its alternatives."""
    top: tuple[tuple[int, float], ...] = ()
    if row < len(output.top_ids):
        ids, values = output.top_ids[row].tolist(), output.top_logprobs[row].tolist()
        top = tuple(zip(ids, values, strict=True))
    return Logprob(token, float(output.logprobs[row]), top)


def _take_prompt_rows(batch: Batch, output: StepOutput) -> list[int]:
    """Keep the log-probabilities of prompts, before `num_computed` moves on; the samplers' rows remain."""
    left: list[int] = []
    row = 0
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        start = sequence.num_computed
        for position in sequence.prompt_rows(start, count):
            sequence.prompt_logprobs.append(_logprob(sequence.tokens[position + 1], output, row))
            row += 1
        if start + count == len(sequence.tokens):
            left.append(row)
            row += 1
    return left

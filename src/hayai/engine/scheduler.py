"""What runs in the next step: continuous batching with chunked prompts.

Rules, in this order:
1. Waiting requests are admitted first come, first served, while there is a slot and room in the KV cache
   for all their known tokens, beside what the running ones still need for theirs.
2. Every sequence that lacks one token runs it (decode), oldest first. When no block is free, the newest
   running sequence is preempted: it gives its blocks back and waits at the front to be computed again.
3. What is left of the token budget goes to prompts, oldest first, in chunks.

The oldest sequence is never preempted for another, and a sequence alone always fits (a request that could
not is refused when it is added), so every step makes progress and nothing can wait for ever.

A sequence may get more than one token per step, so a speculative decoder has its place here: k drafted
tokens count against the budget and the reservation as k more tokens of the sequence.
"""

from __future__ import annotations

import time
from collections import deque

from hayai.backends.base import BLOCK_SIZE, StepInput
from hayai.engine.kv_cache import KvCache
from hayai.engine.sequence import Sequence

HEADROOM = 4 * BLOCK_SIZE
"""Positions kept free for each running sequence when another one is admitted, so that a sequence which was
preempted does not come back only to be thrown out again a few steps later."""


class Batch:
    """The work of one step: counts[i] tokens of sequences[i], from its num_computed on.

    samplers: the sequences that reach their last token and so get a new one, in batch order.
    decode_only: every sequence runs one token and samples. step: the arrays for the backend.
    """

    __slots__ = ("counts", "decode_only", "samplers", "sequences", "step")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.counts: list[int] = []
        self.samplers: list[Sequence] = []
        self.decode_only = True
        self.step: StepInput | None = None

    def add(self, sequence: Sequence, count: int) -> None:
        """Take `count` tokens of a sequence into the step."""
        self.sequences.append(sequence)
        self.counts.append(count)
        if sequence.num_computed + count == len(sequence.tokens):
            self.samplers.append(sequence)
        if count != 1:
            self.decode_only = False
        if not sequence.scheduled:
            sequence.scheduled = time.monotonic()


class Scheduler:
    """Waiting and running sequences. Not thread-safe: one thread owns an engine."""

    def __init__(self, cache: KvCache, max_step_tokens: int, headroom: int = HEADROOM) -> None:
        self.cache = cache
        self.max_step_tokens = max_step_tokens
        self.headroom = headroom
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._steady: Batch | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits the cache when it is alone."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out, wherever it is."""
        if sequence.blocks is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def schedule(self) -> Batch | None:
        """The next step, or None when there is nothing to run.

        While the same sequences decode on, the same Batch object comes back, so that everything derived
        from it can be kept.
        """
        batch = self._steady
        if batch is not None and not (self.waiting and self._has_room()):
            reserve = self.cache.reserve
            for sequence in batch.sequences:
                at, blocks = sequence.num_computed, sequence.blocks
                assert blocks is not None
                if at >= blocks.writable and not reserve(blocks, at, at + 1):
                    break
            else:
                return batch
        return self._plan()

    def _plan(self) -> Batch | None:
        self._steady = None
        while self.waiting and self._has_room():
            sequence = self.waiting.popleft()
            sequence.blocks = self.cache.open()
            self.running.append(sequence)
        while self.running:
            batch = Batch()
            self._add_decodes(batch)
            self._add_prompts(batch)
            if batch.sequences:
                if batch.decode_only and len(batch.samplers) == len(self.running):
                    self._steady = batch
                return batch
            assert len(self.running) > 1, "a sequence that is alone must fit"
            self._preempt(self.running[-1])
        assert not self.waiting, "a request waits although nothing runs"
        return None

    def _has_room(self) -> bool:
        """Whether the first waiting sequence can be admitted."""
        if not self.cache.has_slot():
            return False
        others = [
            (s.blocks, min(len(s.tokens) + self.headroom, s.max_length))
            for s in self.running
            if s.blocks is not None
        ]
        return self.cache.fits(others, len(self.waiting[0].tokens))

    def _add_decodes(self, batch: Batch) -> None:
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if len(sequence.tokens) - sequence.num_computed == 1 and self._make_room(sequence):
                batch.add(sequence, 1)
            index += 1

    def _make_room(self, sequence: Sequence) -> bool:
        """Reserve one more position, at the cost of newer sequences; False if it was preempted itself."""
        blocks, at = sequence.blocks, sequence.num_computed
        assert blocks is not None
        while not self.cache.reserve(blocks, at, at + 1):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _add_prompts(self, batch: Batch) -> None:
        budget = self.max_step_tokens - len(batch.sequences)
        for sequence in self.running:
            at = sequence.num_computed
            count = min(len(sequence.tokens) - at, budget)
            if count <= 0 or len(sequence.tokens) - at == 1:
                continue
            assert sequence.blocks is not None
            if self.cache.reserve(sequence.blocks, at, at + count):
                batch.add(sequence, count)
                budget -= count

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.blocks is not None
        self.cache.close(sequence.blocks)
        sequence.blocks = None
        sequence.num_computed = 0
        self._steady = None

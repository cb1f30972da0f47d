"""What runs in the next step: continuous batching with chunked prompts.

Rules, in this order:
1. Waiting requests are admitted by priority, then by fairness between tenants (fairness.py), then first come,
   first served, while there is a slot and room in the KV cache for all their known tokens, beside what the
   running ones still need for theirs. The first that does not fit holds back those behind it. It may displace
   running ones of lower priority, and one of a tenant that runs several while its own runs none.
   A request whose prompt begins like one that is being computed waits for those blocks and shares them.
2. Every sequence that lacks one token runs it (decode). When no block is available, a running sequence is
   preempted: of the lowest priority, of the tenant that runs the most, the newest. It gives its blocks back
   (the prefix cache keeps them as long as it can) and waits to be computed again.
3. What is left of the token budget goes to prompts, in chunks: by priority, fairness, then the highest
   response ratio (Brinch Hansen 1971): short prompts go first, but nobody waits for ever. While somebody
   waits for the tokens of a decoding sequence, the pacer limits the chunk.
A sequence whose grammar mask is late sits out 2 and 3 until it is there.

The oldest sequence of the highest priority is never preempted, and a sequence alone always fits (a request
that could not is refused when it is added), so every step makes progress and nothing can wait for ever.

A sequence may get more than one token per step, so a speculative decoder has its place here: k drafted
tokens count against the budget and the reservation as k more tokens of the sequence.
"""

from __future__ import annotations

import time
from collections import Counter

from hayai.backends.base import BLOCK_SIZE, StepInput
from hayai.engine.fairness import Queue
from hayai.engine.kv_cache import KvCache
from hayai.engine.pacing import Pacer
from hayai.engine.request import BATCH
from hayai.engine.sequence import Sequence

HEADROOM = 4 * BLOCK_SIZE
"""Positions kept free for each running sequence when another one is admitted, so that a sequence which was
preempted does not come back only to be thrown out again a few steps later."""

LEAST_WAIT = 1e-3
"""Seconds that every prompt counts as having waited, for its response ratio."""


class Batch:
    """The work of one step: counts[i] tokens of sequences[i], from its num_computed on.

    samplers: the sequences that reach their last token and so get a new one, in batch order. grammars: those
    of them with a mask. decode_only: every sequence runs one token and samples. num_prompt_rows: logit rows
    besides the samplers', for log-probabilities of prompts. step: the arrays for the backend.
    counted_steps: up to which step this batch is in the engine's books. typical: seconds of its steps, see
    pacing.py.
    """

    __slots__ = (
        "counted_steps",
        "counts",
        "decode_only",
        "grammars",
        "num_prompt_rows",
        "samplers",
        "sequences",
        "step",
        "typical",
    )

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.counts: list[int] = []
        self.samplers: list[Sequence] = []
        self.grammars: list[Sequence] = []
        self.decode_only = True
        self.num_prompt_rows = 0
        self.step: StepInput | None = None
        self.counted_steps = 0
        self.typical = 0.0

    def add(self, sequence: Sequence, count: int) -> None:
        """Take `count` tokens of a sequence into the step."""
        self.sequences.append(sequence)
        self.counts.append(count)
        if sequence.num_computed + count == len(sequence.tokens):
            self.samplers.append(sequence)
            if sequence.grammar is not None:
                self.grammars.append(sequence)
        else:
            self.decode_only = False
        if sequence.prompt_row is not None:
            self.num_prompt_rows += len(sequence.prompt_rows(sequence.num_computed, count))
        if count != 1:
            self.decode_only = False
        if not sequence.scheduled:
            sequence.scheduled = time.monotonic()


class Scheduler:
    """Waiting and running sequences. Not thread-safe: one thread owns an engine.

    max_rows: logit rows of a step. pacer: how much of a prompt goes beside decoding sequences; None: as much
    as the step holds.
    """

    def __init__(
        self,
        cache: KvCache,
        max_step_tokens: int,
        max_rows: int | None = None,
        pacer: Pacer | None = None,
        headroom: int = HEADROOM,
    ) -> None:
        self.cache = cache
        self.max_step_tokens = max_step_tokens
        self.max_rows = max_step_tokens if max_rows is None else max_rows
        self.pacer = pacer
        self.headroom = headroom
        self.queue = Queue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queried = 0
        self.prefix_cached = 0
        self._steady: Batch | None = None
        # Whether anything happened that may let a waiting sequence in. Decoding never does.
        self._changed = False

    @property
    def waiting(self) -> list[Sequence]:
        """The waiting sequences, by priority and tenant."""
        return self.queue.everything()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits the cache when it is alone."""
        self.queue.add(sequence, self.running)
        self._changed = True

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out, wherever it is."""
        if sequence.blocks is None:
            self.queue.remove(sequence)
        else:
            self._leave(sequence)
        self._changed = True

    def schedule(self) -> Batch | None:
        """The next step, or None when there is nothing to run.

        While the same sequences decode on, the same Batch object comes back, so that everything derived
        from it can be kept.
        """
        batch = self._steady
        if batch is not None and not self._changed:
            reserve = self.cache.reserve
            for sequence in batch.sequences:
                at, blocks = sequence.num_computed, sequence.blocks
                assert blocks is not None
                if at >= blocks.writable and not reserve(blocks, at, at + 1):
                    break
            else:
                return batch
        return self._plan()

    def computed(self, batch: Batch) -> None:
        """A step with prompts has run and was committed: what it completed can be shared."""
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            if count > 1 and sequence.blocks is not None:
                self.cache.publish(sequence.blocks, sequence.num_computed)
        self._changed = True

    def wait_for_masks(self, batch: Batch, until: float) -> bool:
        """Wait for the masks of a batch, at most until then (monotonic seconds). False: some are late, and
        their sequences sit out the steps that are scheduled from now on until they have them."""
        late = False
        for sequence in batch.grammars:
            assert sequence.grammar is not None
            late |= not sequence.grammar.wait(until - time.monotonic())
        if late:
            self._steady = None
        return not late

    def wait_for_late(self, seconds: float) -> None:
        """Wait for the mask of a sequence that sits out, if there is one: nothing else can run."""
        late = next((s for s in self.running if _sits_out(s)), None)
        if late is not None and late.grammar is not None:
            late.grammar.wait(seconds)

    def _plan(self) -> Batch | None:
        self._steady = None
        if self._changed:
            self._changed = False
            self._admit()
        while self.running:
            batch = Batch()
            if not self._add_decodes(batch):
                continue  # somebody lost its place, maybe one that was in the batch already
            self._add_prompts(batch)
            if batch.sequences:
                if batch.decode_only and len(batch.samplers) == len(self.running):
                    self._steady = batch
                return batch
            if any(_sits_out(s) for s in self.running):
                return None
            assert len(self.running) > 1, "a sequence that is alone must fit"
            self._preempt(self._victim(self.running))
        assert not self.queue, "a request waits although nothing runs"
        return None

    # ------------------------------------------------------------------ admission

    def _admit(self) -> None:
        """Let waiting sequences in, in the queue's order."""
        while self.queue:
            ready = (s for s in self.queue.order(self.running) if not self._waits_for_prefix(s))
            sequence = next(ready, None)
            if sequence is None:
                return
            shared = 0 if sequence.chain is None else self.cache.match(sequence.chain, sequence.most_shared())
            if not self._fits(sequence, shared, []):
                leaving = self._displaced(sequence, shared)
                if not leaving:
                    return
                for victim in leaving:
                    self._preempt(victim)
            self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        self.queue.start(sequence)
        sequence.blocks = blocks = self.cache.open(sequence.chain)
        self.running.append(sequence)
        shared = 0 if sequence.chain is None else self.cache.match(sequence.chain, sequence.most_shared())
        if shared:
            self.cache.attach(blocks, shared)
            sequence.num_computed = shared * BLOCK_SIZE
        if sequence.chain is not None and not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed
            self.prefix_queried += sequence.num_prompt
            self.prefix_cached += sequence.num_cached

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether the next block of this prompt is just being computed for another one."""
        chain = sequence.chain
        if chain is None:
            return False
        makers = [
            s
            for s in self.running
            if s.chain is not None and s.priority <= sequence.priority and len(s.tokens) - s.num_computed > 1
        ]
        most = sequence.most_shared()
        at = self.cache.match(chain, most) if makers else most
        if at == most:
            return False
        end, name = (at + 1) * BLOCK_SIZE, chain.names[at]
        return any(
            s.num_computed < end <= len(s.tokens) and s.chain is not None and s.chain.upto(at + 1)[at] == name
            for s in makers
        )

    def _fits(self, sequence: Sequence, shared: int, leaving: list[Sequence]) -> bool:
        """Whether a waiting sequence can be admitted once `leaving` have been preempted."""
        if not leaving and not self.cache.has_slot():
            return False
        others = [
            (s.blocks, min(len(s.tokens) + self.headroom, s.max_length))
            for s in self.running
            if s.blocks is not None and s not in leaving
        ]
        gone = [s.blocks for s in leaving if s.blocks is not None]
        return self.cache.fits(others, len(sequence.tokens), sequence.chain, shared, gone)

    def _displaced(self, sequence: Sequence, shared: int) -> list[Sequence]:
        """Running sequences whose place this one may take, or none when that would not be enough."""
        own = self.queue.share(sequence)
        kept = list(self.running)
        leaving: list[Sequence] = []
        while not leaving or not self._fits(sequence, shared, leaving):
            runs = Counter((s.priority, s.tenant) for s in kept)
            allowed = [
                s
                for s in kept
                if s.priority > sequence.priority
                or (
                    s.priority == sequence.priority
                    and own.num_running == 0
                    and s.tenant != sequence.tenant
                    and runs[s.priority, s.tenant] > 1
                )
            ]
            if not allowed:
                return []
            victim = self._victim(allowed, kept)
            kept.remove(victim)
            leaving.append(victim)
        return leaving

    # ------------------------------------------------------------------ the step

    def _add_decodes(self, batch: Batch) -> bool:
        """Take in every sequence that lacks one token; False when one had to be preempted for it."""
        for sequence in self.running:
            at, blocks = sequence.num_computed, sequence.blocks
            assert blocks is not None
            if len(sequence.tokens) - at == 1 and not _sits_out(sequence):
                if at >= blocks.writable and not self.cache.reserve(blocks, at, at + 1):
                    self._preempt(self._victim(self.running))
                    return False
                batch.add(sequence, 1)
        return True

    def _add_prompts(self, batch: Batch) -> None:
        prompts = [s for s in self.running if len(s.tokens) - s.num_computed > 1 and not _sits_out(s)]
        if not prompts:
            return
        if len(prompts) > 1:
            self.queue.settle(self.running)
            now = time.monotonic()
            prompts.sort(
                key=lambda s: (
                    s.priority,
                    self.queue.share(s).served,
                    (len(s.tokens) - s.num_computed) / max(now - s.arrived, LEAST_WAIT),
                    s.number,
                )
            )
        num_decodes = len(batch.sequences)
        budget = self.max_step_tokens - num_decodes
        if self.pacer is not None and any(s.priority < BATCH for s in batch.sequences):
            backlog = self.queue.num_tokens + sum(len(s.tokens) - s.num_computed for s in prompts)
            paced = self.pacer.prompt_tokens(num_decodes, prompts[0].num_computed, backlog)
            budget = min(budget, paced)
        rows = self.max_rows - num_decodes
        for sequence in prompts:
            at = sequence.num_computed
            count, used = _rows_fit(sequence, min(len(sequence.tokens) - at, budget), rows)
            assert sequence.blocks is not None
            if count > 0 and self.cache.reserve(sequence.blocks, at, at + count):
                batch.add(sequence, count)
                self.queue.charge_prompt(sequence, at, at + count)
                budget -= count
                rows -= used

    # ------------------------------------------------------------------ leaving

    def _victim(self, among: list[Sequence], running: list[Sequence] | None = None) -> Sequence:
        """Who loses its place first: see rule 2."""
        runs = Counter((s.priority, s.tenant) for s in running or among)
        return max(among, key=lambda s: (s.priority, runs[s.priority, s.tenant], s.number))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self._release(sequence)
        self.queue.put_back(sequence)
        self._changed = True

    def _leave(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.queue.left(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.blocks is not None
        self.running.remove(sequence)
        self._steady = None
        self.cache.publish(sequence.blocks, sequence.num_computed)
        self.cache.close(sequence.blocks)
        sequence.blocks = None
        sequence.num_computed = 0


def _sits_out(sequence: Sequence) -> bool:
    return sequence.grammar is not None and sequence.grammar.is_late()


def _rows_fit(sequence: Sequence, count: int, rows: int) -> tuple[int, int]:
    """(tokens, logit rows) of a chunk of at most `count` tokens for which `rows` logit rows are left."""
    at = sequence.num_computed
    if sequence.prompt_row is not None and count > 0:
        # Every position from the first whose log-probability lacks has one row: the prompt's or its own.
        without = max(0, len(sequence.prompt_logprobs) - 1 - at)
        if len(sequence.prompt_logprobs) < sequence.num_prompt:
            count = min(count, without + rows)
    samples = at + count == len(sequence.tokens)
    if samples and len(sequence.prompt_rows(at, count)) + 1 > rows:
        count -= 1
        samples = False
    return count, (len(sequence.prompt_rows(at, count)) if count > 0 else 0) + samples

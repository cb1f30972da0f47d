"""What the engine counts: for metrics, and for the timing of a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from hayai.backends.base import BLOCK_SIZE
from hayai.engine.kv_cache import KvCache
from hayai.engine.pacing import Pacer
from hayai.engine.scheduler import Batch, Scheduler


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the state of now.

    prompt_tokens counts tokens that were run without being decoded, so recomputed ones count again.
    step_seconds: time inside the backend. batch_sizes: steps by number of sequences. finished: requests by
    finish reason. timeouts and grammar_failures: requests that ended so. waiting_by_priority: as it says.

    prefix_queried_tokens: prompt tokens of the requests that were admitted with the prefix cache;
    prefix_cached_tokens: those of them that were found there. kv_blocks_used have an owner, kv_blocks_cached
    have none and are kept for prompts to come, kv_evictions counts those that had to make room.

    step_bytes: weights that one step reads; bytes_read: an estimate of all reads since the start (weights
    once per step, keys and values once per sequence and step), for a share of the read roofline.
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
    kv_blocks_cached: int = 0
    kv_block_tokens: int = 0
    kv_bytes_per_token: int = 0
    kv_evictions: int = 0
    prefix_queried_tokens: int = 0
    prefix_cached_tokens: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    waiting_by_priority: Mapping[int, int] = field(default_factory=dict)
    timeouts: int = 0
    grammar_failures: int = 0
    step_bytes: int = 0
    bytes_read: int = 0


class Books:
    """The counters of one engine. While a batch goes on nothing but `num_steps`, `step_seconds` and
    `output_tokens` is touched per step; the rest is booked when the batch changes (`turn`) or when somebody
    wants to know (`settle`)."""

    def __init__(self, runner: Mapping[str, str | int | float], pacer: Pacer | None) -> None:
        self._pacer = pacer
        self._step_bytes = _number(runner, "step_bytes")
        self._kv_bytes = _number(runner, "kv_bytes_per_token")
        self._sizes: Counter[int] = Counter()
        self._bytes_read = 0
        self._prompt_tokens = 0
        self._before: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.grammar_failures = 0
        self.num_steps = 0
        self.output_tokens = 0
        self.step_seconds = 0.0

    def turn(self, before: Batch | None, batch: Batch) -> None:
        """Another batch begins."""
        self.settle(before)
        batch.counted_steps = self.num_steps
        if self._pacer is not None and batch.decode_only:
            batch.typical = self._pacer.known(len(batch.sequences))

    def settle(self, batch: Batch | None) -> None:
        """Book the steps that a batch has run since the last time."""
        if batch is None or batch.counted_steps == self.num_steps:
            return
        runs = self.num_steps - batch.counted_steps
        batch.counted_steps = self.num_steps
        size = len(batch.sequences)
        for sequence in batch.sequences:
            sequence.num_steps += runs
            sequence.sum_batch += runs * size
            sequence.max_batch = max(sequence.max_batch, size)
        self._sizes[size] += runs
        self._bytes_read += self._estimate(batch, runs)
        if batch.decode_only:
            if self._pacer is not None:
                self._pacer.observe_decode(size, batch.typical)
            return
        # With prompts a batch runs once, and is booked before its sequences move on.
        prompts = [(s.num_computed, n) for s, n in zip(batch.sequences, batch.counts, strict=True) if n > 1]
        tokens = sum(n for _, n in prompts)
        self._prompt_tokens += tokens
        if self._pacer is not None and tokens:
            position = sum(n * (at + n / 2) for at, n in prompts) / tokens
            self._pacer.observe_prompt(size - len(prompts), tokens, position, batch.typical)

    def _estimate(self, batch: Batch, runs: int) -> int:
        """Bytes that `runs` steps of a batch, which end now, have read."""
        positions = sum(len(s.tokens) for s in batch.sequences) - len(batch.sequences) * (runs // 2)
        return runs * (self._step_bytes + self._kv_bytes * positions)

    def close_cache(self, cache: KvCache, scheduler: Scheduler) -> None:
        """Keep the counters of a cache and a scheduler that are dropped."""
        self._before.update(_counters(cache, scheduler))

    def snapshot(self, cache: KvCache, scheduler: Scheduler, batch: Batch | None) -> EngineStats:
        """Everything, the steps of the running batch included. Changes nothing: any thread may ask."""
        counted = Counter(self._before)
        counted.update(_counters(cache, scheduler))
        sizes, bytes_read = dict(self._sizes), self._bytes_read
        if batch is not None:
            runs = self.num_steps - batch.counted_steps
            if runs > 0:
                size = len(batch.sequences)
                sizes[size] = sizes.get(size, 0) + runs
                bytes_read += self._estimate(batch, runs)
        finished = dict(self.finished)
        return EngineStats(
            num_steps=self.num_steps,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self.output_tokens,
            step_seconds=self.step_seconds,
            max_batch=max(sizes, default=0),
            num_preemptions=counted["preemptions"],
            running=len(scheduler.running),
            waiting=len(scheduler.queue),
            kv_blocks=cache.num_blocks,
            kv_blocks_used=cache.used_blocks(),
            finished=finished,
            kv_blocks_cached=cache.cached_blocks(),
            kv_block_tokens=BLOCK_SIZE,
            kv_bytes_per_token=self._kv_bytes,
            kv_evictions=counted["evictions"],
            prefix_queried_tokens=counted["queried"],
            prefix_cached_tokens=counted["cached"],
            batch_sizes=sizes,
            waiting_by_priority=scheduler.queue.by_priority(),
            timeouts=finished.get("timeout", 0),
            grammar_failures=self.grammar_failures,
            step_bytes=self._step_bytes,
            bytes_read=bytes_read,
        )


def _counters(cache: KvCache, scheduler: Scheduler) -> dict[str, int]:
    return {
        "preemptions": scheduler.num_preemptions,
        "evictions": cache.num_evictions(),
        "queried": scheduler.prefix_queried,
        "cached": scheduler.prefix_cached,
    }


def _number(values: Mapping[str, str | int | float], name: str) -> int:
    value = values.get(name, 0)
    return int(value) if isinstance(value, (int, float)) else 0

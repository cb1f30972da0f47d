"""Our own engine in this process, stepped directly, and the read bandwidth of this process.

The only file of the bench that drives the engine or a backend without HTTP. It goes through
`load_model`, as every front does, and then calls `Engine.step()` in a plain loop.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE, Runner, SamplingRow, StepInput, StepOutput
from hayai.bench.prompts import PromptSource
from hayai.bench.sides import Batched, Generated, Shape
from hayai.config import EngineConfig
from hayai.engine.request import EngineRequest, SamplingParams, TokenEvent
from hayai.frontend import Frontend
from hayai.load import LoadedModel, load_model

clock = time.perf_counter

ROOFLINE_PASSES = 15
ROOFLINE_BYTES = (64 << 20, 1 << 30)
"""Bounds of the bandwidth test's buffer, which otherwise is as large as what one step reads: a cache that
keeps a part of the weights keeps as much of the buffer."""
STACKED = 1.5
"""A pass that takes this much longer than the fastest one had its threads on one core, and does not count."""
WINDOW = 512
LOGIT_ROWS = 64
"""Rows of logits per step: 64 x 49152 floats are 12 MB."""
SPARE_TOKENS = 24
"""Room that a batched sequence keeps, so that none ends before the measured steps are over."""


@dataclass(frozen=True)
class Roofline:
    """Read bandwidth in GB/s (1e9 bytes) by number of threads: the median of the passes that count.

    passes: every single one, in GB/s.
    """

    gb_per_second: Mapping[int, float]
    passes: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


class RecordingRunner:
    """A runner that keeps the native figures of each step, among them `survivors` (head rows scored exactly)
    and `threads` (used)."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        # a runner may say more than the protocol asks; the reference backend has nothing to say
        self._stats: Callable[[], Mapping[str, float]] | None = getattr(inner, "stats", None)
        self.steps: list[Mapping[str, float]] = []

    @property
    def vocab_size(self) -> int:
        return self._inner.vocab_size

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        output = self._inner.step(step, plan)
        if self._stats is not None:
            self.steps.append(self._stats())
        return output

    def means(self, skip: int) -> dict[str, float]:
        """Mean of each figure over the steps from `skip` on; empty without such steps."""
        steps = self.steps[skip:]
        return {name: statistics.fmean(step[name] for step in steps) for name in (steps[0] if steps else ())}

    def copy_blocks(self, group: str, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        self._inner.copy_blocks(group, sources, targets)

    def describe(self) -> Mapping[str, str | int | float]:
        return self._inner.describe()

    def close(self) -> None:
        self._inner.close()


def kv_tokens(context: int) -> int:
    """Room of our KV cache wherever speed is compared, in process and over HTTP."""
    return max(context, 4096)


class HayaiSide:
    """Our engine on one file with a number of threads."""

    def __init__(
        self,
        model: str,
        threads: int | None,
        *,
        context: int = 2048,
        sequences: int = 8,
        backend: str = "cpu",
    ) -> None:
        config = EngineConfig(
            model=model,
            backend=backend,
            threads=threads,
            context_length=context,
            max_sequences=sequences,
            kv_tokens=kv_tokens(context),
        )
        self.loaded: LoadedModel = load_model(config)
        self.label, self.peer, self.file = "hayai", "hayai", "same"
        self._engine = self.loaded.engine
        self._recorder = RecordingRunner(self._engine.runner)
        self._engine.runner = self._recorder
        self._ids = itertools.count()

    def touch_cache(self, prompts: PromptSource) -> None:
        """Write every KV block once. Blocks of finished prompts are kept, so that each new prompt would get
        memory that the system has not handed out yet: the peers wrote all of theirs when they started."""
        limits = self.loaded.engine.limits
        for _ in range(-(-limits.num_blocks * BLOCK_SIZE // (limits.max_context - 1))):
            self.generate(prompts.ids(limits.max_context - 1), 0)

    def prepare(self, case: str, shape: Shape) -> None:
        """Nothing to do: one engine serves every case."""

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        name = self._add(prompt, steps + 1)
        engine = self._engine
        times: list[float] = []
        tokens: list[int] = []
        self._recorder.steps.clear()
        started = clock()
        while len(times) <= steps:
            for event in engine.step():
                times.append(clock())
                tokens.append(checked(event, name))
        # the figures of the decode steps; without any, those of the prompt
        prompt_steps = len(self._recorder.steps) - steps if steps else 0
        return Generated(started, tuple(times), tuple(tokens), self._recorder.means(prompt_steps))

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> Batched:
        engine = self._engine
        names = {self._add(prompt, steps + 1 + SPARE_TOKENS) for prompt in prompts}
        waiting = set(names)
        started = clock()
        while waiting:
            for event in engine.step():
                checked(event)
                waiting.discard(event.request_id)
        times = [clock()]
        self._recorder.steps.clear()
        for _ in range(steps):
            events = engine.step()
            times.append(clock())
            for event in events:
                checked(event)
            if len(events) != len(names):
                raise RuntimeError(f"a batched step gave {len(events)} tokens for {len(names)} sequences")
        details = self._recorder.means(0)
        for name in names:
            engine.abort(name)
        while engine.has_work:
            engine.step()
        return Batched(started, tuple(times), len(names), details)

    def settings(self, case: str) -> str:
        facts = self._engine.runner.describe()
        return ", ".join(f"{name} {facts[name]}" for name in ("isa", "threads") if name in facts)

    def pause(self) -> None:
        """Our threads sleep between steps; nothing to stop."""

    def resume(self) -> None:
        """See `pause`."""

    def close(self) -> None:
        self._engine.close()

    def _add(self, prompt: Sequence[int], max_tokens: int) -> str:
        name = f"bench-{next(self._ids)}"
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.add(EngineRequest(name, tuple(prompt), params))
        return name


def checked(event: TokenEvent, name: str | None = None) -> int:
    """The event's token; RuntimeError where the engine gave something else than a token."""
    if event.error or event.token_id < 0 or (name is not None and event.request_id != name):
        raise RuntimeError(f"the engine gave {event} instead of a token")
    return event.token_id


class LogitRunner:
    """Teacher-forced logits of a backend, window by window, by calling its runner directly."""

    def __init__(self, model: str, backend: str, threads: int | None, isa: str | None = None) -> None:
        self.loaded: LoadedModel = load_model(
            EngineConfig(
                model=model,
                backend=backend,
                threads=threads,
                isa=isa,
                context_length=WINDOW,
                max_sequences=LOGIT_ROWS,
                max_step_tokens=LOGIT_ROWS,
                kv_tokens=WINDOW,
            )
        )

    def logits(self, window: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits (at most LOGIT_ROWS, vocab) of a window of at most WINDOW tokens, from an empty cache."""
        engine = self.loaded.engine
        blocks = np.arange(-(-WINDOW // BLOCK_SIZE), dtype=np.int32)[None]
        for start in range(0, len(window), LOGIT_ROWS):
            chunk = np.asarray(window[start : start + LOGIT_ROWS], np.int32)
            n = len(chunk)
            step = StepInput(
                token_ids=chunk,
                positions=np.arange(start, start + n, dtype=np.int32),
                query_start=np.array([0, n], np.int32),
                block_tables=dict.fromkeys(engine.groups, blocks),
                logit_rows=np.arange(n, dtype=np.int32),
                sampling=(SamplingRow(),) * n,
                want_logits=True,
            )
            found = engine.runner.step(step).logits
            assert found is not None
            yield found

    def close(self) -> None:
        self.loaded.engine.close()


def load_frontend(model: str) -> Frontend:
    """The file's tokenizer and chat template, as the server uses them; its engine is never run."""
    return Frontend(load_model(EngineConfig(model=model, threads=1, max_sequences=1)))


def measure_roofline(threads: Sequence[int], step_bytes: float) -> Roofline | None:
    """Read bandwidth of this process, with the page size of our weights; None without the native core.

    step_bytes: what one step of the model reads.
    """
    try:
        # optional: the reference backend runs where the native core was not built
        from hayai._native import read_bandwidth
    except ImportError:
        return None
    low, high = ROOFLINE_BYTES
    size = int(min(max(step_bytes, low), high)) >> 12 << 12
    passes: dict[int, tuple[float, ...]] = {}
    for count in threads:
        passes[count] = tuple(size / s / 1e9 for s in read_bandwidth(size, count, True, ROOFLINE_PASSES))
    return Roofline({count: typical(values) for count, values in passes.items()}, passes)


def typical(rates: Sequence[float]) -> float:
    """Median of the passes whose threads ran at the same time."""
    return statistics.median(rate for rate in rates if rate * STACKED >= max(rates))

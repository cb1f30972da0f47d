"""The native CPU backend: plans are lowered once, and a step is one call with the GIL released."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hayai._native as _native
from hayai.backends.base import (
    BLOCK_SIZE,
    KV_FORMATS,
    Limits,
    SamplingRow,
    StepInput,
    StepOutput,
    WeightSource,
    kv_bytes_per_token,
)
from hayai.backends.cores import find_cores
from hayai.backends.cpu_build import BLOCK, LAYOUTS, ProgramBuilder, Report
from hayai.errors import ConfigError, PlanError
from hayai.logs import log
from hayai.plan.plan import Plan, WeightSlot

SPEC_DTYPE = np.dtype(
    [
        ("temperature", "<f4"), ("top_p", "<f4"), ("min_p", "<f4"), ("repetition_penalty", "<f4"),
        ("presence_penalty", "<f4"), ("frequency_penalty", "<f4"), ("top_k", "<i4"), ("num_logprobs", "<i4"),
        ("plain_greedy", "<i4"), ("has_extras", "<i4"), ("seed", "<u8"),
    ]
)  # fmt: skip
"""One row's parameters as native/sampling.h, SamplingSpec, has them."""

MAX_CACHED_SPECS = 256

OVERSUBSCRIPTION = 8
"""Most threads per usable core. More would only wait for each other, for minutes where it is hundreds."""


def thread_count(asked: int | None) -> int:
    """Compute threads: the usable cores, or what is asked for, within OVERSUBSCRIPTION of them."""
    usable = find_cores().usable
    if asked is None:
        return usable
    if not 1 <= asked <= 1024:
        raise ConfigError(f"threads must be from 1 to 1024: {asked}")
    threads = min(asked, OVERSUBSCRIPTION * usable)
    if asked > usable:
        kept = f"; {threads} are used" if threads < asked else ""
        log("warning", "hayai", "%d threads are more than the %d usable cores%s", asked, usable, kept)
    return threads


class CpuBackend:
    """Compiles plans for this machine.

    threads: compute threads, default the usable cores; more than these are allowed, with a warning, up to
    OVERSUBSCRIPTION times as many (threads_asked keeps the number asked for). isa: lower the instruction set
    ('scalar', 'avx2', 'avx512'), never raise it. progress: called with (phases done, phases in all) while
    packing.
    """

    name = "cpu"

    def __init__(
        self,
        threads: int | None = None,
        isa: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.threads = thread_count(threads)
        self.threads_asked = self.threads if threads is None else threads
        self.isa = isa or ""
        self.progress = progress

    def compile(self, plans: Mapping[str, Plan], weights: WeightSource, limits: Limits) -> CpuRunner:
        """Pack the weights of plan 'main' and lower it. PlanError names an op that the backend lacks."""
        if "main" not in plans:
            raise PlanError(f"plans {sorted(plans)} hold no 'main'")
        if limits.kv_format not in KV_FORMATS:
            raise PlanError(
                f"the cpu backend has the KV formats {', '.join(KV_FORMATS)}: {limits.kv_format!r}"
            )
        try:
            executor = _native.Executor(
                self.isa, self.threads, limits.max_tokens, limits.max_rows, limits.max_context
            )
        except (ValueError, RuntimeError) as error:  # unknown isa, bad limits; threads that can't be started
            raise ConfigError(f"{error} (isa {self.isa!r}, {self.threads} threads, {limits})") from None
        plan = plans["main"]
        builder = ProgramBuilder(executor, plan, weights, limits, self.progress)
        most = sum(_most_bytes(slot) for slot in plan.slots.values())
        try:
            # Address space only: pages are touched as weights are packed.
            executor.reserve_weights(most + (64 << 20))
            builder.build()
        except MemoryError as error:
            raise ConfigError(
                f"no memory for up to {most / 1e9:.1f} GB of weights and a cache of "
                f"{_kv_bytes(plan, limits) * BLOCK_SIZE * limits.num_blocks / 1e9:.1f} GB ({limits}): {error}"
            ) from None
        return CpuRunner(executor, plan, limits, builder.report, self)


def _most_bytes(slot: WeightSlot) -> int:
    """An upper bound of a slot's packed size: f32, every dimension padded to a group."""
    if len(slot.shape) < 2:
        return 0
    rows = 1
    for size in slot.shape[:-1]:
        rows *= size
    return (rows + 16) * (slot.shape[-1] + 32) * 4 + 4096


def _kv_bytes(plan: Plan, limits: Limits) -> int:
    """Bytes of one token's keys and values in all cache groups."""
    return kv_bytes_per_token(plan.groups.values(), limits.kv_format)


class CpuRunner:
    """A compiled model on the native executor; see backends.base.Runner."""

    def __init__(
        self, executor: _native.Executor, plan: Plan, limits: Limits, report: Report, backend: CpuBackend
    ) -> None:
        self._executor: _native.Executor | None = executor
        self._step = executor.step
        self._plan = plan
        self._limits = limits
        self._report = report
        self._threads, self._threads_asked = backend.threads, backend.threads_asked
        self._groups = tuple(plan.groups)
        size = plan.buffers["logits"].shape[-1]
        assert isinstance(size, int)
        self._vocab = size
        self._specs: dict[SamplingRow, NDArray[np.uint8]] = {}
        self._last: StepInput | None = None
        self._last_args: tuple[Any, ...] = ()
        self._last_options: dict[str, Any] = {}
        self._last_output = StepOutput(np.empty(0, np.int32), np.empty(0, np.float32))

    @property
    def vocab_size(self) -> int:
        return self._vocab

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        """Run one step; see backends.base.StepInput. ValueError where the arrays disagree.

        The output's arrays are reused when the same StepInput object comes again.
        """
        if step is self._last:
            # The engine hands over one object, its arrays changed in place, while the batch stays the same:
            # nothing has to be looked up again. Python between two native calls is time lost to decoding.
            self._step(*self._last_args, **self._last_options)
            return self._last_output
        if plan != "main":
            raise PlanError(f"the cpu backend compiled plan 'main' only, not {plan!r}")
        sampling = step.sampling
        rows = len(sampling)
        tokens, logprobs = np.empty(rows, np.int32), np.full(rows, np.nan, np.float32)
        args = (
            step.token_ids, step.positions, step.query_start,
            [step.block_tables[group] for group in self._groups], step.logit_rows, self._packed(sampling),
            tokens, logprobs,
        )  # fmt: skip
        options, output = self._options(step, tokens, logprobs)
        self._step(*args, **options)
        self._last = step
        self._last_args, self._last_options, self._last_output = args, options, output
        return output

    def _options(
        self, step: StepInput, tokens: NDArray[np.int32], logprobs: NDArray[np.float32]
    ) -> tuple[dict[str, Any], StepOutput]:
        """What greedy rows do without: biases, histories, masks, alternatives, logits."""
        sampling = step.sampling
        if not (step.want_logits or step.masks or step.targets is not None) and all(
            row.plain_greedy for row in sampling
        ):
            return {}, StepOutput(tokens, logprobs)
        rows = len(sampling)
        most = max((row.num_logprobs for row in sampling), default=-1)
        options = {**_bias_arrays(sampling), **_history_arrays(step), "masks": list(step.masks)}
        if step.targets is not None:
            options["targets"] = step.targets
        top_ids: tuple[NDArray[np.int32], ...] = ()
        top_logprobs: tuple[NDArray[np.float32], ...] = ()
        if most > 0:
            ids, values = np.empty((rows, most), np.int32), np.empty((rows, most), np.float32)
            options.update(top_ids=ids, top_logprobs=values)
            counts = [min(max(0, row.num_logprobs), self._vocab) for row in sampling]
            top_ids = tuple(ids[r, :n] for r, n in enumerate(counts))
            top_logprobs = tuple(values[r, :n] for r, n in enumerate(counts))
        logits = np.empty((rows, self._vocab), np.float32) if step.want_logits else None
        return {**options, "out_logits": logits}, StepOutput(tokens, logprobs, top_ids, top_logprobs, logits)

    def _packed(self, sampling: tuple[SamplingRow, ...]) -> NDArray[np.uint8]:
        if len(sampling) == 1:
            return self._spec(sampling[0])
        if not sampling:
            return np.empty(0, np.uint8)
        return np.concatenate([self._spec(row) for row in sampling])

    def _spec(self, row: SamplingRow) -> NDArray[np.uint8]:
        found = self._specs.get(row)
        if found is None:
            if len(self._specs) >= MAX_CACHED_SPECS:
                self._specs.clear()
            found = self._specs[row] = _pack_spec(row)
        return found

    def stats(self) -> Mapping[str, float]:
        """Of the last step: threads, step_ns, lost_ns, waited_ns, survivors (head rows scored exactly).

        lost_ns is the most that one thread lost to others on its core, waited_ns all waits at barriers
        beyond spinning.
        """
        assert self._executor is not None
        stats: dict[str, float] = self._executor.stats()
        return stats

    def copy_blocks(self, group: str, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        """Copy whole KV blocks (copy on write)."""
        assert self._executor is not None
        index = self._groups.index(group)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._executor.copy_blocks(index, source, target)

    def describe(self) -> Mapping[str, str | int | float]:
        """ISA, threads, formats, and the bytes that one decode step reads (without KV).

        step_bytes: without survivors, of which each adds survivor_row_bytes.
        """
        assert self._executor is not None
        report = self._report
        head, survivor = report.head_bytes, 0
        if report.screened:  # the high plane and one block of outliers; scored rows come on top
            width = self._plan.buffers["rows"].shape[-1]
            assert isinstance(width, int)
            group_rows = self._executor.group_rows
            head = _native.group_bytes(LAYOUTS["q4_0"], group_rows, width + BLOCK) * self._vocab // group_rows
            survivor = _native.head_low_row_bytes(width)
        kv = _kv_bytes(self._plan, self._limits)
        return {
            "backend": "cpu",
            "isa": self._executor.isa,
            "threads": self._threads,
            "threads_asked": self._threads_asked,
            "weight_bytes": self._executor.weight_bytes,
            "step_bytes": report.matrix_bytes + head,
            "survivor_row_bytes": survivor,
            "full_head_step_bytes": report.matrix_bytes + report.head_bytes,
            "kv_bytes_per_token": kv,
            "kv_format": self._limits.kv_format,
            "kv_memory_bytes": kv * BLOCK_SIZE * self._limits.num_blocks,
            "activations": "int8 per 32, fp32 accumulation",
            "head": "screened (exact)" if report.screened else "full",
            "formats": ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in report.formats.items()),
            "expanded": ", ".join(f"{count} x {name}" for name, count in report.expanded.items()) or "none",
        }

    def close(self) -> None:
        """Free the weights and the threads."""
        self._executor = None
        self._last, self._last_args, self._last_options = None, (), {}
        del self._step


def _pack_spec(row: SamplingRow) -> NDArray[np.uint8]:
    spec = np.zeros(1, SPEC_DTYPE)
    for name in SPEC_DTYPE.names or ():
        if name not in ("plain_greedy", "has_extras"):
            spec[name] = getattr(row, name)
    spec["plain_greedy"] = row.plain_greedy
    spec["has_extras"] = bool(row.bias) or (
        row.repetition_penalty != 1.0 or row.presence_penalty != 0.0 or row.frequency_penalty != 0.0
    )
    return spec.view(np.uint8)


def _bias_arrays(sampling: tuple[SamplingRow, ...]) -> dict[str, Any]:
    if not any(row.bias for row in sampling):
        return {}
    pairs = [pair for row in sampling for pair in row.bias]
    return {
        "bias_start": np.cumsum([0, *(len(row.bias) for row in sampling)], dtype=np.int32),
        "bias_ids": np.array([token for token, _ in pairs], np.int32),
        "bias_values": np.array([value for _, value in pairs], np.float32),
    }


def _history_arrays(step: StepInput) -> dict[str, Any]:
    found = [history for history in step.histories if history is not None]
    if not found:
        return {}
    lengths = [0 if history is None else len(history.ids) for history in step.histories]
    return {
        "history_start": np.cumsum([0, *lengths], dtype=np.int32),
        "history_ids": np.concatenate([history.ids for history in found]),
        "history_counts": np.concatenate([history.counts for history in found]),
    }

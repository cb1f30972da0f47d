"""The reference backend: every op in numpy float32, plainly. The oracle of all other backends.

Weights are dequantised to float32. Keys and values of full and window groups are stored as Limits.kv_format
says and read back as stored, as the CPU backend does (`kv_dtype` 'f32' in place of 'f16' for comparisons with
other programs); latent and index caches and states are float32. `quantize_activations` rounds the inputs of
integer-format matrices to int8 per 32 values, as the native kernels do, so that these can be compared
closely.

The matrix products are the BLAS library's, whose sums may differ in the last bits with the number of rows:
results here agree over chunking and batching to rounding, not to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE, KV_FORMATS, Limits, StepInput, StepOutput, WeightSource
from hayai.backends.reference_cache import ByteCache, Cache, PagedCache, StateCache
from hayai.backends.reference_context import StepContext, Weights
from hayai.backends.reference_ops import run_lockstep
from hayai.errors import ConfigError, PlanError
from hayai.plan import ops
from hayai.plan.plan import CacheGroup, Plan
from hayai.plan.validate import validate

KV_DTYPES: Mapping[str, type[np.floating[Any]]] = {"f16": np.float16, "f32": np.float32}
_NO_LOGITS = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class ReferenceBackend:
    """See the module. `kv_dtype` is 'f16' or 'f32'."""

    kv_dtype: str = "f16"
    quantize_activations: bool = False
    name: str = "reference"

    def compile(self, plans: Mapping[str, Plan], weights: WeightSource, limits: Limits) -> ReferenceRunner:
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"kv_dtype must be {' or '.join(KV_DTYPES)}: {self.kv_dtype!r}")
        if limits.kv_format not in KV_FORMATS:
            raise PlanError(
                f"the reference backend has the KV formats {', '.join(KV_FORMATS)}: {limits.kv_format!r}"
            )
        for plan in plans.values():
            validate(plan)
        return ReferenceRunner(
            plans, Weights(plans, weights), limits, self.kv_dtype, self.quantize_activations
        )


class ReferenceRunner:
    """A compiled model; see base.Runner."""

    def __init__(
        self,
        plans: Mapping[str, Plan],
        weights: Weights,
        limits: Limits,
        kv_dtype: str,
        quantize_activations: bool,
    ) -> None:
        self._plans = dict(plans)
        self._weights = weights
        self._limits = limits
        self._kv_dtype = kv_dtype
        self._quantize = quantize_activations
        self._carry: dict[str, NDArray[np.float32]] = {}
        self._groups: dict[str, CacheGroup] = {}
        for plan in plans.values():
            for name, group in plan.groups.items():
                if self._groups.setdefault(name, group) != group:
                    raise PlanError(f"cache group {name} differs between plans {', '.join(plans)}")
        self._caches: dict[str, Cache] = {name: self._cache(group) for name, group in self._groups.items()}
        self._vocab = _vocab_size(plans)

    def _cache(self, group: CacheGroup) -> Cache:
        if group.kind == "state":
            return StateCache(group)
        if group.kind not in ("full", "window"):
            return PagedCache(group, self._limits.num_blocks, np.float32)
        if self._limits.kv_format == "q8":
            return ByteCache(group, self._limits.num_blocks)
        return PagedCache(group, self._limits.num_blocks, KV_DTYPES[self._kv_dtype])

    @property
    def vocab_size(self) -> int:
        return self._vocab

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        started = time.perf_counter()
        ctx = self.begin(step, plan)
        run_lockstep([ctx])
        return self.finish(ctx, time.perf_counter() - started)

    def begin(self, step: StepInput, plan: str = "main") -> StepContext:
        """Check a step and lay out its inputs. `step` is begin, run_lockstep, finish (in parts: ranks)."""
        if plan not in self._plans:
            raise PlanError(f"there is no plan {plan!r}; plans: {', '.join(self._plans)}")
        found = self._plans[plan]
        check_step(step, found, self._limits, self._vocab)
        env: dict[str, NDArray[Any]] = {
            "tokens": step.token_ids,
            "positions": step.positions,
            "logit_rows": step.logit_rows,
        }
        for name, array in (("carry_rows", step.carry_rows), ("tree_mask", step.tree_mask)):
            if array is not None:
                env[name] = array
        for buffer in found.buffers.values():
            if buffer.carry:
                width = tuple(dim for dim in buffer.shape[1:] if isinstance(dim, int))
                env[buffer.name] = self._carry.get(buffer.name, np.zeros((0, *width), np.float32))
        return StepContext(found, step, self._weights, self._caches, self._quantize, env)

    def finish(self, ctx: StepContext, seconds: float = 0.0) -> StepOutput:
        """Keep the carry buffers and gather what the step gives back."""
        for buffer in ctx.plan.buffers.values():
            if buffer.carry:
                self._carry[buffer.name] = ctx.env[buffer.name]
        rows = ctx.samples
        logits = ctx.logits if ctx.logits is not None else _NO_LOGITS
        return StepOutput(
            tokens=np.array([row.token for row in rows], np.int32),
            logprobs=np.array([row.logprob for row in rows], np.float32),
            top_ids=tuple(row.top_ids for row in rows),
            top_logprobs=tuple(row.top_logprobs for row in rows),
            logits=logits if ctx.step.want_logits else None,
            stats={"seconds": seconds},
        )

    def copy_blocks(self, group: str, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        self._caches[group].copy_blocks(sources, targets)

    def describe(self) -> Mapping[str, str | int | float]:
        return {
            "backend": "reference",
            "kernels": "numpy float32",
            "kv_format": "q8" if self._limits.kv_format == "q8" else self._kv_dtype,
            "quantize_activations": int(self._quantize),
            "plans": ", ".join(self._plans),
            "ops": sum(len(plan.ops) for plan in self._plans.values()),
        }

    def close(self) -> None:
        self._caches.clear()


def _vocab_size(plans: Mapping[str, Plan]) -> int:
    for plan in plans.values():
        for op in plan.ops:
            if isinstance(op, ops.Sample):
                width = plan.buffers[op.logits].shape[-1]
                assert isinstance(width, int)
                return width
    raise PlanError(f"no plan samples a token: {', '.join(plans)}")


def check_step(step: StepInput, plan: Plan, limits: Limits, vocab: int) -> None:
    """ValueError where a step breaks the contract of StepInput (a bug of whoever made it)."""
    tokens, rows, sequences = len(step.token_ids), len(step.logit_rows), len(step.query_start) - 1

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"step of {tokens} tokens, {sequences} sequences, {rows} rows: {message}")

    for name in ("token_ids", "positions", "query_start", "logit_rows"):
        array = getattr(step, name)
        need(array.dtype == np.int32 and array.ndim == 1, f"{name} must be a vector of int32")
    need(0 < tokens <= limits.max_tokens, f"at most {limits.max_tokens} tokens are allowed, at least 1")
    need(rows <= limits.max_rows, f"at most {limits.max_rows} rows are allowed")
    need(0 < sequences <= limits.max_sequences, f"at most {limits.max_sequences} sequences are allowed")
    need(len(step.positions) == tokens, "positions and token_ids differ in length")
    starts = step.query_start
    need(
        int(starts[0]) == 0 and int(starts[-1]) == tokens and bool(np.all(np.diff(starts) >= 0)),
        f"query_start {starts.tolist()} does not cut the tokens into sequences",
    )
    need(_within(step.token_ids, vocab), f"token ids must be from 0 to {vocab - 1}")
    need(_within(step.positions, limits.max_context), f"positions must be below {limits.max_context}")
    need(_within(step.logit_rows, tokens), "logit_rows must index tokens")
    need(len(step.sampling) == rows, f"{len(step.sampling)} sampling rows")
    for name in ("histories", "masks"):
        need(len(getattr(step, name)) in (0, rows), f"{name} must be empty or have one entry per row")
    if step.targets is not None:
        need(len(step.targets) == rows, f"{len(step.targets)} targets")
        need(rows == 0 or int(step.targets.max()) < vocab, f"targets must be below {vocab}")
    for name in ("carry_rows", "tree_mask"):
        if name in plan.buffers:
            array = getattr(step, name)
            need(array is not None and len(array) == tokens, f"plan {plan.name} needs {name}")
    for index in range(sequences):
        start, stop = int(starts[index]), int(starts[index + 1])
        if start == stop:
            continue
        first = int(step.positions[start])
        if step.tree_mask is None:
            straight = np.arange(first, first + stop - start)
            need(
                np.array_equal(step.positions[start:stop], straight),
                f"positions of sequence {index} are not consecutive",
            )
        blocks = -(-(first + stop - start) // BLOCK_SIZE)
        for name, group in plan.groups.items():
            need(name in step.block_tables, f"no block table for group {name}")
            used = step.block_tables[name][index][: 1 if group.kind == "state" else blocks]
            need(group.kind == "state" or len(used) == blocks, f"group {name}: {blocks} blocks are needed")
            need(_within(used, limits.num_blocks), f"group {name}: block numbers {used.tolist()}")


def _within(array: NDArray[np.int32], stop: int) -> bool:
    return len(array) == 0 or (int(array.min()) >= 0 and int(array.max()) < stop)

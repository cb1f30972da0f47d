"""What the engine and a backend say to each other: plain frozen data, and two small protocols.

A backend compiles the plans of one model once (`Backend.compile`) and gives back a `Runner`; the runner
executes one step per call. All arrays are numpy, C-contiguous. T tokens, S sequences, R logit rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hayai.formats import QuantTensor
from hayai.plan.plan import CacheGroup, Plan, WeightSlot

BLOCK_SIZE = 16
"""Positions per KV block, for every backend."""

KV_FORMATS = ("f16", "q8")
"""q8: signed bytes with one fp16 scale per token and head, max |x| / 127, rounded half to even.

What is stored is finite: numbers beyond a format, and NaN, become its largest (65504; q8: 127 times that)."""


KV_VECTOR_BYTES: Mapping[str, Callable[[int], int]] = {
    "f16": lambda size: 2 * size,
    "q8": lambda size: size + 2,
}
"""Bytes of one head's key or value of `size` numbers."""


def kv_bytes_per_token(groups: Iterable[CacheGroup], kv_format: str = "f16") -> int:
    """Bytes that the caches keep per position; states, which do not grow, are left out."""
    size_of = KV_VECTOR_BYTES[kv_format]
    total = 0
    for group in groups:
        if group.kind != "state":
            heads = group.num_heads if group.kind in ("full", "window") else 1
            sizes = [group.key_dim] if group.kind == "index" else [group.key_dim, group.value_dim]
            total += group.num_layers * heads * sum(map(size_of, sizes))
    return total


@dataclass(frozen=True)
class Limits:
    """Sizes that a runner must be ready for. Memory for `num_blocks` may be touched lazily.

    kv_format: how keys and values are kept, one of KV_FORMATS. PlanError where a backend lacks it.
    """

    max_tokens: int
    max_sequences: int
    max_rows: int
    num_blocks: int
    max_context: int
    kv_format: str = "f16"


@dataclass(frozen=True)
class SamplingRow:
    """How one row's token is chosen. Order: penalties, bias, temperature, min_p, top_k, top_p.

    temperature 0 = greedy (argmax, ties to the lowest id). top_k 0 = off. `seed` with the row's position
    keys a counter-based generator, so the choice depends on nothing else.
    num_logprobs: -1 none, 0 the chosen token's only, n the n best as well; of the raw logits (before
    penalties, bias and temperature), natural log.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    num_logprobs: int = -1

    @property
    def plain_greedy(self) -> bool:
        """True where the argmax of the raw logits is all that is asked (the screened head may serve it)."""
        return (
            self.temperature == 0.0
            and self.num_logprobs < 0
            and not self.bias
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
        )


@dataclass(frozen=True)
class TokenHistory:
    """Distinct tokens of a sequence for penalties: ids (N) int32, counts (N) int32 in the output.

    count 0 = seen in the prompt only: repetition penalty applies, presence and frequency do not.
    """

    ids: NDArray[np.int32]
    counts: NDArray[np.int32]


@dataclass(frozen=True)
class StepInput:
    """One step: the tokens to run, whose they are, where their cache lies, which rows want a token.

    token_ids, positions (T) int32; the tokens of sequence s are query_start[s]:query_start[s+1], their
    positions consecutive. block_tables[group] (S, max_blocks) int32: block b of sequence s holds its
    positions 16b .. 16b+15; entries past the last position are ignored. logit_rows (R) int32 index
    tokens; sampling, histories and masks have R entries (histories and masks may be empty = none).
    masks[r]: packed bits (vocab/32 uint32), bit i = token i allowed; None = all.
    targets (R) int32 or None: where targets[r] >= 0, logprobs[r] is that of token targets[r] and not of the
    chosen one (log-probabilities of a prompt); the row's choice is then of no use.
    carry_rows (T), tree_mask (T, T) int32: only for plans that declare these inputs (plan.OPTIONAL_INPUTS).
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    query_start: NDArray[np.int32]
    block_tables: Mapping[str, NDArray[np.int32]]
    logit_rows: NDArray[np.int32]
    sampling: tuple[SamplingRow, ...]
    histories: tuple[TokenHistory | None, ...] = ()
    masks: tuple[NDArray[np.uint32] | None, ...] = ()
    want_logits: bool = False
    carry_rows: NDArray[np.int32] | None = None
    tree_mask: NDArray[np.int32] | None = None
    targets: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class StepOutput:
    """tokens (R) int32. logprobs (R) f32 of the chosen tokens, NaN where not asked.

    top_ids, top_logprobs: per row the n best, best first (empty where not asked). logits (R, vocab) f32
    only with want_logits.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top_ids: tuple[NDArray[np.int32], ...] = ()
    top_logprobs: tuple[NDArray[np.float32], ...] = ()
    logits: NDArray[np.float32] | None = None
    stats: Mapping[str, float] = field(default_factory=dict)


class WeightSource(Protocol):
    """Fills weight slots, one at a time, so that a backend can pack and drop each."""

    def fetch(self, slot: WeightSlot) -> QuantTensor:
        """The slot's array with its transforms applied; ModelError where the file lacks it."""
        ...

    def has(self, slot: WeightSlot) -> bool:
        """Whether the file holds the slot (optional slots may be missing)."""
        ...


class Runner(Protocol):
    """A compiled model."""

    @property
    def vocab_size(self) -> int: ...

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        """Run one step. Writes the KV of every token, returns one token per logit row."""
        ...

    def copy_blocks(self, group: str, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        """Copy whole KV blocks (copy on write)."""
        ...

    def describe(self) -> Mapping[str, str | int | float]:
        """For `inspect`, `doctor` and the run card: ISA, threads, kernels, bytes per step, fallbacks."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """How plans are run."""

    @property
    def name(self) -> str: ...

    def compile(self, plans: Mapping[str, Plan], weights: WeightSource, limits: Limits) -> Runner:
        """Load weights and prepare. PlanError names an op that this backend lacks."""
        ...

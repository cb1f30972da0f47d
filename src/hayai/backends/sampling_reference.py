"""Sampling, exactly as `base.SamplingRow` promises it: the oracle of every backend's sampler.

Order on one row of logits, in float32: repetition penalty (seen tokens: positive logits divided, others
multiplied), presence and frequency penalty (tokens of the output), bias, mask. Temperature 0 takes the
largest, ties to the lowest id. Where all that a mask allows is NaN or -infinity, the lowest id that it allows
is taken, and id 0 where it allows none. Otherwise weights w = exp((x - max) / temperature), candidates sorted
by descending logit, ties by ascending id; min_p keeps w >= min_p, top_k the first k, top_p the shortest
prefix that holds at least top_p of the mass that is left; the token is the first candidate whose running sum
exceeds u times the mass kept. Sums are in float64.

u = (splitmix64(splitmix64(seed) ^ position) >> 40) / 2^24: a counter-based generator (Steele, Lea and
Flood, 2014), so that a choice depends on the request's seed and position and on nothing else. `position`
is that of the token whose row this is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import SamplingRow, StepInput, TokenHistory

_MASK64 = (1 << 64) - 1
_NONE_I32 = np.empty(0, np.int32)
_NONE_F32 = np.empty(0, np.float32)


@dataclass(frozen=True)
class SampledRow:
    """One row's choice. logprob NaN and top_* empty where they were not asked for."""

    token: int
    logprob: float
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides a token: 24 bits, exact in float32."""
    return (splitmix64(splitmix64(seed & _MASK64) ^ (position & _MASK64)) >> 40) / float(1 << 24)


def unpack_mask(mask: NDArray[np.uint32], vocab: int) -> NDArray[np.bool_]:
    """Allowed tokens (vocab) of packed bits: bit i % 32 of word i // 32."""
    ids = np.arange(vocab)
    allowed: NDArray[np.bool_] = (mask[ids // 32] >> (ids % 32).astype(np.uint32)) & np.uint32(1) != 0
    return allowed


def argmax(logits: NDArray[np.float32]) -> int:
    """Largest, lowest id on ties; NaN never wins."""
    return int(np.argmax(np.where(np.isnan(logits), -np.inf, logits)))


def adjust(
    logits: NDArray[np.float32],
    row: SamplingRow,
    history: TokenHistory | None,
    mask: NDArray[np.uint32] | None,
) -> NDArray[np.float32]:
    """Logits (vocab) after penalties, bias and mask; the input is left as it is."""
    x = logits.astype(np.float32)
    if history is not None and len(history.ids):
        seen = x[history.ids]
        penalty = np.float32(row.repetition_penalty)
        seen = np.where(seen > 0, seen / penalty, seen * penalty)
        counts = history.counts.astype(np.float32)
        taken = np.float32(row.presence_penalty) + np.float32(row.frequency_penalty) * counts
        x[history.ids] = seen - np.where(history.counts > 0, taken, np.float32(0))
    for token, value in row.bias:
        x[token] += np.float32(value)
    if mask is not None:
        x[~unpack_mask(mask, len(x))] = -np.inf
    return x


def _choose(x: NDArray[np.float32], row: SamplingRow, position: int) -> int:
    best = argmax(x)
    if row.temperature == 0.0 or not np.isfinite(x[best]):
        return best
    clean = np.where(np.isnan(x), -np.inf, x).astype(np.float64)
    order = np.argsort(-clean, kind="stable")
    weights = np.exp((clean[order] - clean[order[0]]) / row.temperature)
    count = int(np.count_nonzero((weights > 0) & (weights >= row.min_p)))
    if row.top_k > 0:
        count = min(count, row.top_k)
    sums = np.cumsum(weights[:count])
    if row.top_p < 1.0:
        count = min(count, int(np.searchsorted(sums, row.top_p * sums[-1], side="left")) + 1)
    target = uniform(row.seed, position) * sums[count - 1]
    return int(order[min(count - 1, int(np.searchsorted(sums[:count], target, side="right")))])


def sample_row(
    logits: NDArray[np.float32],
    row: SamplingRow,
    position: int,
    history: TokenHistory | None = None,
    mask: NDArray[np.uint32] | None = None,
    target: int = -1,
) -> SampledRow:
    """Choose one token from logits (vocab). Log-probabilities are of the raw logits.

    target: whose log-probability is given, -1 = the choice's; with one, the choice is the raw logits' best.
    """
    if target >= 0:
        token = argmax(logits)
    else:
        x = adjust(logits, row, history, mask)
        token = target = _choose(x, row, position)
        if mask is not None and not x[token] > -np.inf:
            token = target = int(np.argmax(unpack_mask(mask, len(x))))
        if row.num_logprobs < 0:
            return SampledRow(token, float("nan"), _NONE_I32, _NONE_F32)
    clean = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    largest = clean.max()
    with np.errstate(invalid="ignore"):
        logprobs = clean - (largest + np.log(np.exp(clean - largest).sum()))
    top = np.argsort(-clean, kind="stable")[: max(0, row.num_logprobs)]
    return SampledRow(token, float(logprobs[target]), top.astype(np.int32), logprobs[top].astype(np.float32))


def sample_step(logits: NDArray[np.float32], step: StepInput) -> list[SampledRow]:
    """Choose the tokens of all rows of a step; logits (R, vocab)."""
    rows = []
    for r, params in enumerate(step.sampling):
        history = step.histories[r] if step.histories else None
        mask = step.masks[r] if step.masks else None
        position = int(step.positions[step.logit_rows[r]])
        target = -1 if step.targets is None else int(step.targets[r])
        rows.append(sample_row(logits[r], params, position, history, mask, target))
    return rows

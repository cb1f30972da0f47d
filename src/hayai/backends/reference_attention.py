"""Caches and attention of the reference backend: KvAppend, Attention, IndexTopk, LinearState."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hayai.backends.reference_cache import Floats, Ints, PagedCache, StateCache
from hayai.backends.reference_context import StepContext
from hayai.plan import ops

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Span:
    """The tokens that one sequence has in the step: rows [start, stop), cache positions first + i."""

    index: int
    start: int
    stop: int
    first: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def length(self) -> int:
        """Positions in the cache after the step's tokens are stored."""
        return self.first + self.stop - self.start

    @property
    def slots(self) -> Ints:
        return np.arange(self.first, self.length, dtype=np.int32)


def spans(ctx: StepContext) -> Iterator[Span]:
    step = ctx.step
    for index in range(len(step.query_start) - 1):
        start, stop = int(step.query_start[index]), int(step.query_start[index + 1])
        if stop > start:
            yield Span(index, start, stop, int(step.positions[start]))


def _paged(ctx: StepContext, group: str) -> PagedCache:
    cache = ctx.caches[group]
    assert isinstance(cache, PagedCache)
    return cache


def kv_append(ctx: StepContext, op: ops.KvAppend) -> None:
    cache = _paged(ctx, op.group)
    parts = [ctx.env[name] for name in op.names("reads")]
    for span in spans(ctx):
        table = ctx.step.block_tables[op.group][span.index]
        cache.append(op.layer, span.slots, table, [part[span.rows] for part in parts])


def visible(ctx: StepContext, span: Span, tree_mask: str | None) -> Bools:
    """(tokens of the span, cache positions): which positions a token may see, window and select aside."""
    past = np.arange(span.length)[None, :]
    if tree_mask is None:
        return past <= span.slots[:, None]
    seen = np.repeat(past < span.first, span.stop - span.start, axis=0)
    seen[:, span.first :] = ctx.env[tree_mask][span.rows, span.rows] != 0
    return seen


def attention(ctx: StepContext, op: ops.Attention) -> None:
    cache = _paged(ctx, op.group)
    q = ctx.env[op.q]
    out = np.zeros((len(q), op.num_heads * op.value_dim), np.float32)
    sinks = None if op.sinks is None else ctx.weights.get(op.sinks)
    for span in spans(ctx):
        parts = cache.read(op.layer, ctx.step.block_tables[op.group][span.index], span.length)
        allowed = visible(ctx, span, op.tree_mask)
        if op.window > 0:
            own = ctx.step.positions[span.rows][:, None]
            allowed &= np.arange(span.length)[None, :] > own - op.window
        if op.select is not None:
            allowed &= _selected(ctx.env[op.select][span.rows], span.length)
        scores, values = _scores(ctx, op, span, parts)
        if op.softcap:
            scores = np.float32(op.softcap) * np.tanh(scores / np.float32(op.softcap))
        probabilities = masked_softmax(scores, allowed, sinks)
        groups = op.num_kv_heads
        shape = (groups, op.num_heads // groups * (span.stop - span.start), span.length)
        mixed = probabilities.reshape(shape) @ values  # (kv heads, heads per kv * tokens, value_dim)
        mixed = mixed.reshape(op.num_heads, -1, op.value_dim).transpose(1, 0, 2)
        out[span.rows] = mixed.reshape(-1, op.num_heads * op.value_dim)
    ctx.env[op.out] = out


def _scores(ctx: StepContext, op: ops.Attention, span: Span, parts: list[Floats]) -> tuple[Floats, Floats]:
    """Scaled scores (heads, tokens, positions) and values (kv heads, positions, value_dim)."""
    tokens = span.stop - span.start
    groups = op.num_kv_heads

    def by_head(rows: Floats) -> Floats:
        """(tokens, heads * dim) -> (kv heads, heads per kv * tokens, dim)."""
        heads = rows.reshape(tokens, op.num_heads, -1).transpose(1, 0, 2)
        return np.ascontiguousarray(heads).reshape(groups, op.num_heads // groups * tokens, -1)

    def by_kv_head(rows: Floats) -> Floats:
        return rows.reshape(span.length, groups, -1).transpose(1, 0, 2)

    queries = by_head(ctx.env[op.q][span.rows])
    if op.q_rope is None:
        keys, values = by_kv_head(parts[0]), by_kv_head(parts[1])
        scores = queries @ keys.transpose(0, 2, 1)
    else:
        latent, rope = parts
        values = latent[None]
        scores = queries @ latent.T + by_head(ctx.env[op.q_rope][span.rows]) @ rope.T
    scores = scores.reshape(op.num_heads, tokens, span.length) * np.float32(op.scale)
    return scores, values


def _selected(select: Ints, length: int) -> Bools:
    """select (tokens, topk), -1 = none -> (tokens, positions)."""
    allowed = np.zeros((len(select), length + 1), np.bool_)
    rows = np.broadcast_to(np.arange(len(select))[:, None], select.shape)
    allowed[rows, np.where(select < 0, length, select)] = True
    return allowed[:, :length]


def masked_softmax(scores: Floats, allowed: Bools, sinks: Floats | None) -> Floats:
    """Softmax over the last axis of (heads, tokens, positions); a row that sees nothing gives zeros."""
    scores = np.where(allowed[None], scores, np.float32(-np.inf))
    largest: Floats = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = np.maximum(largest, sinks[:, None, None])
    largest = np.where(np.isneginf(largest), np.float32(0), largest)
    weights = np.exp(scores - largest)
    total: Floats = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - largest)
    total[total == 0] = 1
    shares: Floats = weights / total
    return shares


def index_topk(ctx: StepContext, op: ops.IndexTopk) -> None:
    cache = _paged(ctx, op.group)
    q = ctx.env[op.q].reshape(-1, op.num_heads, op.head_dim)
    out = np.full((len(q), op.topk), -1, np.int32)
    for span in spans(ctx):
        (keys,) = cache.read(op.layer, ctx.step.block_tables[op.group][span.index], span.length)
        dots = np.maximum(q[span.rows] @ keys.T * np.float32(op.scale), np.float32(0))
        scores = (ctx.env[op.weights][span.rows][:, None, :] @ dots)[:, 0]  # (tokens, positions)
        allowed = visible(ctx, span, op.tree_mask)
        for row in range(len(scores)):
            candidates = np.flatnonzero(allowed[row])
            best = np.argsort(-scores[row, candidates], kind="stable")[: op.topk]
            out[span.start + row, : len(best)] = np.sort(candidates[best])
    ctx.env[op.out] = out


def linear_state(ctx: StepContext, op: ops.LinearState) -> None:
    """The recurrence itself, token by token: the sum that a chunked kernel must come near to."""
    cache = ctx.caches[op.group]
    assert isinstance(cache, StateCache)
    q, k, decay = (ctx.env[name].reshape(-1, op.num_heads, op.key_dim) for name in (op.q, op.k, op.decay))
    v = ctx.env[op.v].reshape(-1, op.num_heads, op.value_dim)
    out = np.zeros(v.shape, np.float32)
    for span in spans(ctx):
        block = int(ctx.step.block_tables[op.group][span.index][0])
        state = cache.get(block, op.layer) if span.first > 0 else np.zeros_like(cache.get(-1, 0))
        for t in range(span.start, span.stop):
            state = np.exp(decay[t])[:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
            out[t] = (q[t][:, None, :] @ state)[:, 0]
        cache.put(block, op.layer, state)
    ctx.env[op.out] = out.reshape(len(out), -1)

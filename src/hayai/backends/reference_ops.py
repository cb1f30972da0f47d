"""Ops of the reference backend but for caches and attention: numpy float32, written for clarity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hayai.backends.reference_attention import attention, index_topk, kv_append, linear_state
from hayai.backends.reference_context import StepContext
from hayai.backends.rope import rope_frequencies
from hayai.backends.sampling_reference import sample_step
from hayai.plan import ops

Floats = NDArray[np.float32]

ACT_BLOCK = 32
"""Inputs that share one activation scale."""


# ---------------------------------------------------------------- elementwise


def sigmoid(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _erf(x: Floats) -> Floats:
    return np.array([math.erf(v) for v in x.ravel()], np.float32).reshape(x.shape)


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * (_erf(x * np.float32(0.5**0.5)) + 1) * np.float32(0.5),
    "gelu_tanh": lambda x: (
        (x * (np.tanh(np.float32((2 / math.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)) + 1))
        * np.float32(0.5)
    ),
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "sigmoid": sigmoid,
}


def _embed(ctx: StepContext, op: ops.Embed) -> None:
    ctx.env[op.out] = ctx.weights.need(op.table)[ctx.env[op.ids]] * np.float32(op.scale)


def rms(x: Floats, weight: Floats, offset: float, eps: float) -> Floats:
    """Root mean square norm over the last axis, the sum in float64."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    scaled: Floats = (x / np.sqrt(mean + eps)).astype(np.float32)
    gain: Floats = weight + np.float32(offset)
    return scaled * gain


def _rms_norm(ctx: StepContext, op: ops.RmsNorm) -> None:
    ctx.env[op.out] = rms(ctx.env[op.x], ctx.weights.need(op.weight), op.weight_offset, op.eps)


def _head_norm(ctx: StepContext, op: ops.HeadNorm) -> None:
    x = ctx.env[op.x]
    heads = x.reshape(len(x), -1, op.head_dim)
    ctx.env[op.out] = rms(heads, ctx.weights.need(op.weight), op.weight_offset, op.eps).reshape(x.shape)


def _layer_norm(ctx: StepContext, op: ops.LayerNorm) -> None:
    x = ctx.env[op.x].astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + op.eps)
    out = scaled.astype(np.float32) * ctx.weights.need(op.weight)
    bias = None if op.bias is None else ctx.weights.get(op.bias)
    ctx.env[op.out] = out if bias is None else out + bias


def _rope(ctx: StepContext, op: ops.Rope) -> None:
    x = ctx.env[op.x]
    factors = None if op.factors_slot is None else ctx.weights.get(op.factors_slot)
    angles = ctx.env[op.positions].astype(np.float64)[:, None] * rope_frequencies(op, factors)
    cosine = np.cos(angles).astype(np.float32)[:, None]  # (T, 1, pairs)
    sine = np.sin(angles).astype(np.float32)[:, None]
    out = x.reshape(len(x), -1, op.head_dim).copy()
    part = out[..., op.start : op.start + op.rotary_dim]
    half = op.rotary_dim // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if op.interleaved else (
        slice(0, half), slice(half, None)
    )  # fmt: skip
    a, b = part[..., first].copy(), part[..., second].copy()
    part[..., first] = a * cosine - b * sine
    part[..., second] = b * cosine + a * sine
    ctx.env[op.out] = out.reshape(x.shape)


def _glu(ctx: StepContext, op: ops.Glu) -> None:
    ctx.env[op.out] = ACTIVATIONS[op.act](ctx.env[op.gate]) * ctx.env[op.up]


def _activation(ctx: StepContext, op: ops.Activation) -> None:
    ctx.env[op.out] = ACTIVATIONS[op.act](ctx.env[op.x])


def _add(ctx: StepContext, op: ops.Add) -> None:
    ctx.env[op.out] = ctx.env[op.a] + ctx.env[op.b]


def _scale(ctx: StepContext, op: ops.Scale) -> None:
    ctx.env[op.out] = ctx.env[op.x] * np.float32(op.factor)


def softcap(x: Floats, cap: float) -> Floats:
    capped: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return capped


def _softcap(ctx: StepContext, op: ops.Softcap) -> None:
    ctx.env[op.out] = softcap(ctx.env[op.x], op.cap)


def _copy(ctx: StepContext, op: ops.Copy) -> None:
    ctx.env[op.out] = ctx.env[op.x].copy()


def _gather_rows(ctx: StepContext, op: ops.GatherRows) -> None:
    ctx.env[op.out] = ctx.env[op.x][ctx.env[op.rows]]


# ---------------------------------------------------------------- matrices


def rounded(x: Floats) -> Floats:
    """x as int8 codes per 32 inputs see it: scale = max|x| / 127, round half to even, times scale.

    A block whose largest value is at most 1e-35 becomes zero (the inverse of its scale would overflow).
    """
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // ACT_BLOCK, ACT_BLOCK)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 1e-35)
    out: Floats = np.rint(blocks * inverse) * (largest / np.float32(127))
    return out.reshape(x.shape)


def _input(ctx: StepContext, x: Floats, weight: str) -> Floats:
    """What a matrix of this format multiplies: x itself, or x rounded to int8."""
    return rounded(x) if ctx.quantize_activations and ctx.weights.is_integer(weight) else x


def _linear(ctx: StepContext, op: ops.Linear) -> None:
    x = ctx.env[op.x]
    biases = op.biases or (None,) * len(op.weights)
    for weight, bias, out in zip(op.weights, biases, op.outs, strict=True):
        y = _input(ctx, x, weight) @ ctx.weights.need(weight).T
        values = None if bias is None else ctx.weights.get(bias)
        ctx.env[out] = y if values is None else y + values


def _head_linear(ctx: StepContext, op: ops.HeadLinear) -> None:
    x = ctx.env[op.x]
    heads = x.reshape(len(x), op.num_heads, -1).transpose(1, 0, 2)
    out = heads @ ctx.weights.need(op.weight).transpose(0, 2, 1)  # (heads, T, out)
    ctx.env[op.out] = out.transpose(1, 0, 2).reshape(len(x), -1)


def _lm_head(ctx: StepContext, op: ops.LmHead) -> None:
    logits = _input(ctx, ctx.env[op.x], op.weight) @ ctx.weights.need(op.weight).T
    ctx.env[op.out] = softcap(logits, op.softcap) if op.softcap else logits


# ---------------------------------------------------------------- experts


def top_columns(x: Floats, count: int) -> NDArray[np.intp]:
    """Columns of the `count` largest of each row, largest first, ties to the lowest column."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :count]


def _route(ctx: StepContext, op: ops.Route) -> None:
    logits = ctx.env[op.logits]
    if op.score == "sigmoid":
        scores = sigmoid(logits)
    else:
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = scores / scores.sum(axis=-1, keepdims=True)
    bias = None if op.bias is None else ctx.weights.get(op.bias)
    choice = scores if bias is None else scores + bias
    if op.num_groups > 1:
        grouped = choice.reshape(len(choice), op.num_groups, -1)
        group_scores = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        kept = np.zeros(group_scores.shape, np.bool_)
        np.put_along_axis(kept, top_columns(group_scores, op.top_groups), True, axis=-1)
        choice = np.where(kept[..., None], grouped, np.float32(-np.inf)).reshape(choice.shape)
    ids = top_columns(choice, op.top_k)
    weights = np.take_along_axis(scores, ids, axis=-1)
    if op.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    ctx.env[op.ids] = ids.astype(np.int32)
    ctx.env[op.weights] = weights * np.float32(op.scaling)


def _moe_linear(ctx: StepContext, op: ops.MoeLinear) -> None:
    x, ids = ctx.env[op.x], ctx.env[op.ids]
    for name, out in zip(op.weights, op.outs, strict=True):
        weight = ctx.weights.need(name)
        y = np.zeros((*ids.shape, weight.shape[1]), np.float32)
        inputs = _input(ctx, x, name)
        for expert in np.unique(ids):
            tokens, places = np.nonzero(ids == expert)
            rows = inputs[tokens, places] if op.per_expert else inputs[tokens]
            y[tokens, places] = rows @ weight[expert].T
        ctx.env[out] = y


def _moe_combine(ctx: StepContext, op: ops.MoeCombine) -> None:
    x, weights = ctx.env[op.x], ctx.env[op.weights]
    out = np.zeros((x.shape[0], x.shape[2]), np.float32)
    for j in range(x.shape[1]):
        out += weights[:, j, None] * x[:, j]
    ctx.env[op.out] = out


# ---------------------------------------------------------------- sampling


def _sample(ctx: StepContext, op: ops.Sample) -> None:
    ctx.logits = ctx.env[op.logits]
    ctx.samples = sample_step(ctx.logits, ctx.step)
    ctx.env[op.out] = np.array([row.token for row in ctx.samples], np.int32)


# ---------------------------------------------------------------- collectives: all ranks at once


def _all_reduce(parts: list[NDArray[Any]], op: ops.AllReduce) -> list[NDArray[Any]]:
    total = parts[0].copy()
    for part in parts[1:]:  # in rank order: float sums depend on it
        total = total + part
    return [total.copy() for _ in parts]


def _all_gather(parts: list[NDArray[Any]], op: ops.AllGather) -> list[NDArray[Any]]:
    return [np.concatenate(parts, axis=op.dim) for _ in parts]


def _reduce_scatter(parts: list[NDArray[Any]], op: ops.ReduceScatter) -> list[NDArray[Any]]:
    total = _all_reduce(parts, ops.AllReduce(op.x, op.out))[0]
    return [np.ascontiguousarray(part) for part in np.split(total, len(parts), axis=op.dim)]


def _all_to_all(parts: list[NDArray[Any]], op: ops.AllToAll) -> list[NDArray[Any]]:
    blocks = [np.split(part, len(parts)) for part in parts]
    return [np.concatenate([rows[rank] for rows in blocks]) for rank in range(len(parts))]


OPS: Mapping[type[ops.Op], Callable[[StepContext, Any], None]] = {
    ops.Embed: _embed,
    ops.RmsNorm: _rms_norm,
    ops.LayerNorm: _layer_norm,
    ops.HeadNorm: _head_norm,
    ops.Rope: _rope,
    ops.Glu: _glu,
    ops.Activation: _activation,
    ops.Add: _add,
    ops.Scale: _scale,
    ops.Softcap: _softcap,
    ops.Copy: _copy,
    ops.GatherRows: _gather_rows,
    ops.Linear: _linear,
    ops.HeadLinear: _head_linear,
    ops.LmHead: _lm_head,
    ops.KvAppend: kv_append,
    ops.Attention: attention,
    ops.IndexTopk: index_topk,
    ops.Route: _route,
    ops.MoeLinear: _moe_linear,
    ops.MoeCombine: _moe_combine,
    ops.LinearState: linear_state,
    ops.Sample: _sample,
}

COLLECTIVES: Mapping[type[ops.Op], Callable[[list[NDArray[Any]], Any], list[NDArray[Any]]]] = {
    ops.AllReduce: _all_reduce,
    ops.AllGather: _all_gather,
    ops.ReduceScatter: _reduce_scatter,
    ops.AllToAll: _all_to_all,
}


def run_lockstep(ranks: Sequence[StepContext]) -> None:
    """Run one step of all ranks op by op; a collective takes every rank's array at once."""
    for index, op in enumerate(ranks[0].plan.ops):
        if type(op) in COLLECTIVES:
            mine: list[Any] = [ctx.plan.ops[index] for ctx in ranks]
            results = COLLECTIVES[type(op)]([c.env[o.x] for c, o in zip(ranks, mine, strict=True)], op)
            for ctx, rank_op, result in zip(ranks, mine, results, strict=True):
                ctx.env[rank_op.out] = result
            continue
        for ctx in ranks:
            OPS[type(op)](ctx, ctx.plan.ops[index])

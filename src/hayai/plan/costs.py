"""What an op costs: floating-point operations and bytes moved, one table row per op class.

A multiply-add counts two, any other elementary function one. Bytes are the least that a step must move:
every weight once per step (of expert weights the expected share, routing being uniform), keys and values
once per sequence, buffers read and written at 4 bytes an element. A fused kernel moves fewer activations;
weights and KV are what the roofline of a step is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hayai.plan import ops
from hayai.plan.plan import CacheGroup, Dim, Plan

ELEMENT_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """A step: T tokens of S sequences, R logit rows; a token sees `context` positions in the mean, itself
    included (decode at depth n: n + 1; prefill of n tokens: (n + 1) / 2)."""

    T: int
    S: int
    R: int
    context: float

    def count(self, shape: tuple[Dim, ...]) -> int:
        """Elements of a buffer."""
        values = {"T": self.T, "S": self.S, "R": self.R}
        return math.prod(values[dim] if isinstance(dim, str) else dim for dim in shape)

    @property
    def length(self) -> float:
        """Cached positions per sequence at the end of the step (its tokens are consecutive)."""
        return self.context + (self.T / max(1, self.S) - 1) / 2


@dataclass(frozen=True)
class Traffic:
    """Bytes of one op in one step."""

    weights: float = 0.0
    kv: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.kv + self.activations

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.weights + other.weights, self.kv + other.kv, self.activations + other.activations)


def flops(op: ops.Op, plan: Plan, T: int, S: int, R: int, context: float) -> float:
    """Floating-point operations of one op in a step of these sizes (see Sizes)."""
    return COSTS[type(op)].flops(op, plan, Sizes(T, S, R, context))


def bytes_moved(
    op: ops.Op,
    plan: Plan,
    T: int,
    S: int,
    R: int,
    context: float,
    *,
    weight_bits: Mapping[str, float] | float = 16.0,
    kv_bytes: float = 2.0,
) -> Traffic:
    """Bytes of one op in a step. weight_bits: per weight, of all slots or by slot name; kv_bytes: per
    cached element."""
    cost, sizes = COSTS[type(op)], Sizes(T, S, R, context)

    def bits(name: str) -> float:
        return weight_bits[name] if isinstance(weight_bits, Mapping) else weight_bits

    weights = sum(
        math.prod(plan.slots[name].shape) * bits(name) / 8 * cost.share(op, plan, sizes)
        for name in op.names("slots")
    )
    buffers = sum(sizes.count(plan.buffers[name].shape) for name in op.names("writes"))
    if not isinstance(op, ops.GatherRows):
        buffers += sum(sizes.count(plan.buffers[name].shape) for name in op.names("reads"))
    else:
        buffers *= 2
    return Traffic(weights, cost.kv(op, plan, sizes) * kv_bytes, float(buffers * ELEMENT_BYTES))


# ---------------------------------------------------------------- flops


def _written(factor: float) -> Callable[[Any, Plan, Sizes], float]:
    """`factor` operations per element written."""

    def cost(op: Any, plan: Plan, sizes: Sizes) -> float:
        return factor * sum(sizes.count(plan.buffers[name].shape) for name in op.names("writes"))

    return cost


def _matrices(op: Any, plan: Plan, sizes: Sizes) -> float:
    """2 * rows * in per output row: of Linear, LmHead, HeadLinear and MoeLinear, whose slots end in
    (out, in)."""
    matrices = op.names("slots")[: len(op.names("writes"))]
    outs = op.names("writes")
    return float(
        sum(
            2 * sizes.count(plan.buffers[out].shape) * plan.slots[weight].shape[-1]
            for weight, out in zip(matrices, outs, strict=True)
        )
    )


def _seen(op: ops.Attention, plan: Plan, sizes: Sizes) -> float:
    """Positions that a token attends to, in the mean."""
    seen = sizes.context
    if op.window:
        seen = min(seen, op.window)
    if op.select is not None:
        topk = plan.buffers[op.select].shape[1]
        assert isinstance(topk, int)
        seen = min(seen, topk)
    return seen


def _attention(op: ops.Attention, plan: Plan, sizes: Sizes) -> float:
    rope = plan.groups[op.group].value_dim if op.q_rope is not None else 0
    per_pair = 2 * (op.head_dim + rope) + 2 * op.value_dim + 3
    return sizes.T * op.num_heads * per_pair * _seen(op, plan, sizes)


def _index(op: ops.IndexTopk, plan: Plan, sizes: Sizes) -> float:
    return sizes.T * op.num_heads * (2 * op.head_dim + 3) * sizes.context


def _state(op: ops.LinearState, plan: Plan, sizes: Sizes) -> float:
    return 5.0 * sizes.T * op.num_heads * op.key_dim * op.value_dim


def _combine(op: ops.MoeCombine, plan: Plan, sizes: Sizes) -> float:
    return 2.0 * sizes.count(plan.buffers[op.x].shape)


def _logits(op: Any, plan: Plan, sizes: Sizes) -> float:
    return float(sizes.count(plan.buffers[op.logits].shape))


def _none(op: Any, plan: Plan, sizes: Sizes) -> float:
    return 0.0


# ---------------------------------------------------------------- cached elements and weight shares


def _width(group: CacheGroup) -> int:
    """Cached elements per position and layer."""
    if group.kind == "index":
        return group.key_dim
    heads = group.num_heads if group.kind in ("full", "window") else 1
    return heads * (group.key_dim + group.value_dim)


def _kv_written(op: ops.KvAppend, plan: Plan, sizes: Sizes) -> float:
    return float(sizes.T * _width(plan.groups[op.group]))


def _kv_read(op: ops.Attention, plan: Plan, sizes: Sizes) -> float:
    length, tokens = sizes.length, sizes.T / max(1, sizes.S)
    if op.window:
        length = min(length, op.window + tokens - 1)
    if op.select is not None:
        length = min(length, _seen(op, plan, sizes) * tokens)
    return sizes.S * length * _width(plan.groups[op.group])


def _index_read(op: ops.IndexTopk, plan: Plan, sizes: Sizes) -> float:
    return sizes.S * sizes.length * _width(plan.groups[op.group])


def _state_kv(op: ops.LinearState, plan: Plan, sizes: Sizes) -> float:
    return 2.0 * sizes.S * op.num_heads * op.key_dim * op.value_dim


def _whole(op: Any, plan: Plan, sizes: Sizes) -> float:
    return 1.0


def _rows_looked_up(op: ops.Embed, plan: Plan, sizes: Sizes) -> float:
    return min(1.0, sizes.count(plan.buffers[op.ids].shape) / plan.slots[op.table].shape[0])


def _experts_hit(op: ops.MoeLinear, plan: Plan, sizes: Sizes) -> float:
    experts = plan.slots[op.weights[0]].shape[0]
    tokens, top_k = plan.buffers[op.ids].shape
    assert isinstance(top_k, int)
    return 1.0 - (1.0 - top_k / experts) ** sizes.count((tokens,))


@dataclass(frozen=True)
class _Cost:
    """flops, cached elements moved, and the share of the weight slots that is read."""

    flops: Callable[[Any, Plan, Sizes], float]
    kv: Callable[[Any, Plan, Sizes], float] = _none
    share: Callable[[Any, Plan, Sizes], float] = _whole


COSTS: dict[type[ops.Op], _Cost] = {
    ops.Embed: _Cost(_none, share=_rows_looked_up),
    ops.RmsNorm: _Cost(_written(4)),
    ops.LayerNorm: _Cost(_written(7)),
    ops.HeadNorm: _Cost(_written(4)),
    ops.Rope: _Cost(_written(3)),
    ops.Glu: _Cost(_written(5)),
    ops.Activation: _Cost(_written(4)),
    ops.Add: _Cost(_written(1)),
    ops.Scale: _Cost(_written(1)),
    ops.Softcap: _Cost(_written(3)),
    ops.Copy: _Cost(_none),
    ops.GatherRows: _Cost(_none),
    ops.Linear: _Cost(_matrices),
    ops.HeadLinear: _Cost(_matrices),
    ops.LmHead: _Cost(_matrices),
    ops.KvAppend: _Cost(_none, _kv_written),
    ops.Attention: _Cost(_attention, _kv_read),
    ops.IndexTopk: _Cost(_index, _index_read),
    ops.Route: _Cost(_logits),
    ops.MoeLinear: _Cost(_matrices, share=_experts_hit),
    ops.MoeCombine: _Cost(_combine),
    ops.LinearState: _Cost(_state, _state_kv),
    ops.Sample: _Cost(_logits),
    ops.AllReduce: _Cost(_written(1)),
    ops.AllGather: _Cost(_none),
    ops.ReduceScatter: _Cost(_written(1)),
    ops.AllToAll: _Cost(_none),
}

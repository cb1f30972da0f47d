"""What each op expects of its operands: one shape rule per op class, in one table.

A rule yields `(field, name, expected shape)` for the operands whose shape follows from the others, and
raises `ShapeError` where an operand can't be right whatever the others are. `validate` compares. What an
op costs (`flops`, `bytes_moved`) is worked out from the same shapes in `costs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hayai.plan import ops
from hayai.plan.costs import Traffic, bytes_moved, flops
from hayai.plan.plan import CacheGroup, Dim, Plan

__all__ = [
    "ANY_DTYPE",
    "GROUP_KINDS",
    "INTEGER_FIELDS",
    "SHAPE_RULES",
    "ShapeError",
    "Traffic",
    "bytes_moved",
    "flops",
    "shape_text",
]

Shape = tuple[Dim, ...]
Expected = Iterator[tuple[str, str, Shape]]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
GLU_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROUTE_SCORES = ("sigmoid", "softmax")
ROPE_SCALINGS = ("linear", "llama3", "factors")
GROUP_KINDS = ("full", "window", "mla", "index", "state")


class ShapeError(Exception):
    """An operand that breaks its op's rule: (field, what is wrong)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def _need(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ShapeError(field, message)


def _buffer(plan: Plan, field: str, name: str, rank: int | None = None) -> Shape:
    shape = plan.buffers[name].shape
    if rank is not None:
        _need(len(shape) == rank, field, f"{name} {shape_text(shape)} must have {rank} dimensions")
    return shape


def _slot(plan: Plan, field: str, name: str, rank: int) -> tuple[int, ...]:
    shape = plan.slots[name].shape
    _need(len(shape) == rank, field, f"slot {name} {shape_text(shape)} must have {rank} dimensions")
    return shape


def _number(dim: Dim, field: str, name: str) -> int:
    if not isinstance(dim, int):
        raise ShapeError(field, f"the last dimension of {name} must be a number, not {dim}")
    return dim


def _heads(plan: Plan, field: str, name: str, head_dim: int) -> Shape:
    """Shape of a (T, heads * head_dim) buffer."""
    shape = _buffer(plan, field, name, 2)
    width = _number(shape[1], field, name)
    _need(head_dim > 0 and width % head_dim == 0, field, f"{name} width {width} is not heads of {head_dim}")
    return shape


def _one_of(value: str, known: tuple[str, ...], field: str) -> None:
    _need(value in known, field, f"{value!r} is not one of {', '.join(known)}")


def _group(plan: Plan, name: str, layer: int, kinds: tuple[str, ...]) -> CacheGroup:
    group = plan.groups[name]
    _need(group.kind in kinds, "group", f"group {name} is of kind {group.kind}, needs {' or '.join(kinds)}")
    _need(
        0 <= layer < group.num_layers,
        "layer",
        f"layer {layer} is outside group {name} of {group.num_layers} layers",
    )
    return group


# ---------------------------------------------------------------- elementwise and rows


def _embed(op: ops.Embed, plan: Plan) -> Expected:
    (tokens,) = _buffer(plan, "ids", op.ids, 1)
    yield "out", op.out, (tokens, _slot(plan, "table", op.table, 2)[1])


def _norm(op: ops.RmsNorm | ops.LayerNorm, plan: Plan) -> Expected:
    shape = _buffer(plan, "x", op.x)
    width = _number(shape[-1], "x", op.x)
    yield "weight", op.weight, (width,)
    if isinstance(op, ops.LayerNorm) and op.bias is not None:
        yield "bias", op.bias, (width,)
    yield "out", op.out, shape


def _head_norm(op: ops.HeadNorm, plan: Plan) -> Expected:
    shape = _heads(plan, "x", op.x, op.head_dim)
    yield "weight", op.weight, (op.head_dim,)
    yield "out", op.out, shape


def _rope(op: ops.Rope, plan: Plan) -> Expected:
    shape = _heads(plan, "x", op.x, op.head_dim)
    _need(op.rotary_dim > 0 and op.rotary_dim % 2 == 0, "rotary_dim", f"{op.rotary_dim} is not even and > 0")
    _need(
        op.start >= 0 and op.start + op.rotary_dim <= op.head_dim,
        "rotary_dim",
        f"dims {op.start}..{op.start + op.rotary_dim - 1} are outside a head of {op.head_dim}",
    )
    if op.scaling is not None:
        _one_of(op.scaling.kind, ROPE_SCALINGS, "scaling")
        _need(
            (op.scaling.kind == "factors") == (op.scaling.factors_slot is not None),
            "scaling",
            "a factors slot belongs to kind 'factors' and to no other",
        )
        if op.scaling.factors_slot is not None:
            yield "factors_slot", op.scaling.factors_slot, (op.rotary_dim // 2,)
    yield "positions", op.positions, shape[:1]
    yield "out", op.out, shape


def _glu(op: ops.Glu, plan: Plan) -> Expected:
    _one_of(op.act, GLU_ACTIVATIONS, "act")
    shape = _buffer(plan, "gate", op.gate)
    yield "up", op.up, shape
    yield "out", op.out, shape


def _same(op: Any, plan: Plan) -> Expected:
    if isinstance(op, ops.Activation):
        _one_of(op.act, ACTIVATIONS, "act")
    yield "out", op.out, _buffer(plan, "x", op.x)


def _add(op: ops.Add, plan: Plan) -> Expected:
    shape = _buffer(plan, "a", op.a)
    yield "b", op.b, shape
    yield "out", op.out, shape


def _gather_rows(op: ops.GatherRows, plan: Plan) -> Expected:
    width = _buffer(plan, "x", op.x, 2)[1]
    (rows,) = _buffer(plan, "rows", op.rows, 1)
    yield "out", op.out, (rows, width)


# ---------------------------------------------------------------- matrices


def _linear(op: ops.Linear, plan: Plan) -> Expected:
    tokens, width = _buffer(plan, "x", op.x, 2)
    _need(len(op.weights) > 0, "weights", "no matrix is given")
    _need(len(op.outs) == len(op.weights), "outs", f"{len(op.outs)} outputs for {len(op.weights)} matrices")
    _need(
        len(op.biases) in (0, len(op.weights)),
        "biases",
        f"{len(op.biases)} biases for {len(op.weights)} matrices",
    )
    for weight, out in zip(op.weights, op.outs, strict=True):
        rows = _slot(plan, "weights", weight, 2)[0]
        yield "weights", weight, (rows, width)
        yield "outs", out, (tokens, rows)
    for weight, bias in zip(op.weights, op.biases, strict=False):
        if bias is not None:
            yield "biases", bias, (plan.slots[weight].shape[0],)


def _head_linear(op: ops.HeadLinear, plan: Plan) -> Expected:
    heads, rows, columns = _slot(plan, "weight", op.weight, 3)
    _need(heads == op.num_heads, "weight", f"slot {op.weight} has {heads} heads, the op {op.num_heads}")
    tokens = _buffer(plan, "x", op.x, 2)[0]
    yield "x", op.x, (tokens, heads * columns)
    yield "out", op.out, (tokens, heads * rows)


def _lm_head(op: ops.LmHead, plan: Plan) -> Expected:
    vocab, hidden = _slot(plan, "weight", op.weight, 2)
    rows = _buffer(plan, "x", op.x, 2)[0]
    yield "x", op.x, (rows, hidden)
    yield "out", op.out, (rows, vocab)


# ---------------------------------------------------------------- caches and attention


def _kv_append(op: ops.KvAppend, plan: Plan) -> Expected:
    group = _group(plan, op.group, op.layer, ("full", "window", "mla", "index"))
    tokens = _buffer(plan, "k", op.k, 2)[0]
    heads = group.num_heads if group.kind in ("full", "window") else 1
    _need((op.v is None) == (group.kind == "index"), "v", f"does not fit a group of kind {group.kind}")
    yield "k", op.k, (tokens, heads * group.key_dim)
    if op.v is not None:
        yield "v", op.v, (tokens, heads * group.value_dim)


def _attention(op: ops.Attention, plan: Plan) -> Expected:
    group = _group(plan, op.group, op.layer, ("full", "window", "mla"))
    tokens = _buffer(plan, "q", op.q, 2)[0]
    _need(
        op.num_kv_heads > 0 and op.num_heads % op.num_kv_heads == 0,
        "num_kv_heads",
        f"{op.num_heads} query heads can't be shared out over {op.num_kv_heads} kv heads",
    )
    mla = group.kind == "mla"
    _need((op.q_rope is not None) == mla, "q_rope", f"does not fit a group of kind {group.kind}")
    _need(op.window >= 0, "window", f"{op.window} is negative")
    _need(
        op.window == 0 or not group.window or op.window <= group.window,
        "window",
        f"{op.window} reads more than the {group.window} positions that group {op.group} keeps",
    )
    value_dim = group.key_dim if mla else group.value_dim
    for field, found, wanted in (
        ("num_kv_heads", op.num_kv_heads, 1 if mla else group.num_heads),
        ("head_dim", op.head_dim, group.key_dim),
        ("value_dim", op.value_dim, value_dim),
    ):
        _need(found == wanted, field, f"{found}, but group {op.group} says {wanted}")
    yield "q", op.q, (tokens, op.num_heads * op.head_dim)
    if op.q_rope is not None:
        yield "q_rope", op.q_rope, (tokens, op.num_heads * group.value_dim)
    if op.select is not None:
        yield "select", op.select, (tokens, _buffer(plan, "select", op.select, 2)[1])
    if op.sinks is not None:
        yield "sinks", op.sinks, (op.num_heads,)
    if op.tree_mask is not None:
        yield "tree_mask", op.tree_mask, (tokens, tokens)
    yield "out", op.out, (tokens, op.num_heads * op.value_dim)


def _index_topk(op: ops.IndexTopk, plan: Plan) -> Expected:
    group = _group(plan, op.group, op.layer, ("index",))
    _need(op.topk > 0, "topk", f"{op.topk} is not above 0")
    _need(
        op.head_dim == group.key_dim, "head_dim", f"{op.head_dim}, but group {op.group} says {group.key_dim}"
    )
    tokens = _buffer(plan, "q", op.q, 2)[0]
    yield "q", op.q, (tokens, op.num_heads * op.head_dim)
    yield "weights", op.weights, (tokens, op.num_heads)
    if op.tree_mask is not None:
        yield "tree_mask", op.tree_mask, (tokens, tokens)
    yield "out", op.out, (tokens, op.topk)


def _linear_state(op: ops.LinearState, plan: Plan) -> Expected:
    group = _group(plan, op.group, op.layer, ("state",))
    for field, found, wanted in (
        ("num_heads", op.num_heads, group.num_heads),
        ("key_dim", op.key_dim, group.key_dim),
        ("value_dim", op.value_dim, group.value_dim),
    ):
        _need(found == wanted, field, f"{found}, but group {op.group} says {wanted}")
    tokens = _buffer(plan, "q", op.q, 2)[0]
    keys, values = (tokens, op.num_heads * op.key_dim), (tokens, op.num_heads * op.value_dim)
    yield from (("q", op.q, keys), ("k", op.k, keys), ("decay", op.decay, keys))
    yield from (("v", op.v, values), ("out", op.out, values))


# ---------------------------------------------------------------- experts, sampling


def _route(op: ops.Route, plan: Plan) -> Expected:
    _one_of(op.score, ROUTE_SCORES, "score")
    tokens, width = _buffer(plan, "logits", op.logits, 2)
    experts = _number(width, "logits", op.logits)
    _need(op.num_groups > 0 and experts % op.num_groups == 0, "num_groups", f"{experts} / {op.num_groups}")
    _need(0 < op.top_groups <= op.num_groups, "top_groups", f"{op.top_groups} of {op.num_groups} groups")
    most = experts // op.num_groups * op.top_groups
    _need(0 < op.top_k <= most, "top_k", f"{op.top_k} of {most} experts that may be chosen")
    if op.bias is not None:
        yield "bias", op.bias, (experts,)
    yield "ids", op.ids, (tokens, op.top_k)
    yield "weights", op.weights, (tokens, op.top_k)


def _moe_linear(op: ops.MoeLinear, plan: Plan) -> Expected:
    tokens, top_k = _buffer(plan, "ids", op.ids, 2)
    _need(len(op.weights) > 0, "weights", "no matrix is given")
    _need(len(op.outs) == len(op.weights), "outs", f"{len(op.outs)} outputs for {len(op.weights)} matrices")
    experts, _, width = _slot(plan, "weights", op.weights[0], 3)
    yield "x", op.x, (tokens, top_k, width) if op.per_expert else (tokens, width)
    for weight, out in zip(op.weights, op.outs, strict=True):
        rows = _slot(plan, "weights", weight, 3)[1]
        yield "weights", weight, (experts, rows, width)
        yield "outs", out, (tokens, top_k, rows)


def _moe_combine(op: ops.MoeCombine, plan: Plan) -> Expected:
    tokens, top_k, width = _buffer(plan, "x", op.x, 3)
    yield "weights", op.weights, (tokens, top_k)
    yield "out", op.out, (tokens, width)


def _sample(op: ops.Sample, plan: Plan) -> Expected:
    yield "out", op.out, _buffer(plan, "logits", op.logits, 2)[:1]


# ---------------------------------------------------------------- collectives


def _resized(op: ops.AllGather | ops.ReduceScatter, plan: Plan) -> Expected:
    """One dimension grows or shrinks by the number of ranks; the others stay."""
    x, out = _buffer(plan, "x", op.x), _buffer(plan, "out", op.out)
    _need(len(x) == len(out) and -len(x) <= op.dim < len(x), "dim", f"{op.dim} of {shape_text(x)}")
    dim = op.dim % len(x)
    small, large = (x[dim], out[dim]) if isinstance(op, ops.AllGather) else (out[dim], x[dim])
    if isinstance(small, int) and isinstance(large, int):
        _need(small > 0 and large % small == 0, "out", f"{large} is not a multiple of {small}")
    yield "out", op.out, (*x[:dim], out[dim], *x[dim + 1 :])


SHAPE_RULES: dict[type[ops.Op], Callable[[Any, Plan], Expected]] = {
    ops.Embed: _embed,
    ops.RmsNorm: _norm,
    ops.LayerNorm: _norm,
    ops.HeadNorm: _head_norm,
    ops.Rope: _rope,
    ops.Glu: _glu,
    ops.Activation: _same,
    ops.Add: _add,
    ops.Scale: _same,
    ops.Softcap: _same,
    ops.Copy: _same,
    ops.GatherRows: _gather_rows,
    ops.Linear: _linear,
    ops.HeadLinear: _head_linear,
    ops.LmHead: _lm_head,
    ops.KvAppend: _kv_append,
    ops.Attention: _attention,
    ops.IndexTopk: _index_topk,
    ops.Route: _route,
    ops.MoeLinear: _moe_linear,
    ops.MoeCombine: _moe_combine,
    ops.LinearState: _linear_state,
    ops.Sample: _sample,
    ops.AllReduce: _same,
    ops.AllGather: _resized,
    ops.ReduceScatter: _resized,
    ops.AllToAll: _same,
}

INTEGER_FIELDS: dict[type[ops.Op], tuple[str, ...]] = {
    ops.Embed: ("ids",),
    ops.Rope: ("positions",),
    ops.GatherRows: ("rows",),
    ops.Attention: ("select", "tree_mask"),
    ops.IndexTopk: ("tree_mask", "out"),
    ops.Route: ("ids",),
    ops.MoeLinear: ("ids",),
    ops.Sample: ("out",),
}
"""Fields that hold int32 buffers; every other buffer an op touches is float32."""

ANY_DTYPE: tuple[type[ops.Op], ...] = (ops.Copy, ops.AllGather, ops.AllToAll)
"""Ops that move elements without looking at them: the output has the input's dtype."""


def shape_text(shape: Shape) -> str:
    return "(" + ",".join(str(dim) for dim in shape) + ")"

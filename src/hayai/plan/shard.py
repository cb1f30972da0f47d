"""Tensor parallelism as a rewrite: the plan of one rank, with its share of the weights and collectives.

Slots say how they are cut (`WeightSlot.shard`), cache groups too. The pass follows what each buffer then
holds: the whole rows, this rank's `split` of the columns (heads), or a `partial` sum. Matrices cut by rows
turn whole into split; cut by columns, split into partial. A partial sum goes through linear ops as it is (so
that routed and shared experts share one sum) and is reduced where whole rows are needed; logits are gathered.
Method: Shoeybi et al., Megatron-LM, 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hayai.errors import PlanError
from hayai.plan import ops
from hayai.plan.plan import Buffer, CacheGroup, Plan, Transform, WeightSlot
from hayai.plan.validate import validate

WHOLE, SPLIT, PARTIAL = "whole", "split", "partial"


def shard(plan: Plan, rank: int, world: int) -> Plan:
    """The plan that rank `rank` of `world` runs. Every rank's plan has the same ops in the same order.

    PlanError where a size is not a multiple of `world`, or an op can't be cut.
    """
    if not 0 <= rank < world:
        raise PlanError(f"rank {rank} is not one of {world} ranks")
    if world == 1:
        return plan
    cut = _Sharder(plan, rank, world)
    for group in plan.groups.values():
        cut.groups[group.name] = cut.group(group)
    for index, op in enumerate(plan.ops):
        rule = _RULES.get(type(op))
        if rule is None:
            raise PlanError(f"plan {plan.name}, op {index} {op.kind}: can't be cut for tensor parallelism")
        try:
            rule(cut, op)
        except _CutError as error:
            raise PlanError(f"plan {plan.name}, op {index} {op.kind}: {error}") from None
    for name in plan.outputs:
        cut.whole(name)
    # The buffers in their old order, so that the dumps of both plans read alike.
    buffers = {name: cut.buffers.pop(name) for name in plan.buffers if name in cut.buffers} | cut.buffers
    result = Plan(plan.name, buffers, cut.slots, cut.groups, tuple(cut.ops), plan.outputs)
    validate(result)
    return result


class _CutError(Exception):
    """Why one op can't be cut."""


@dataclass
class _Sharder:
    """The new plan while it grows, and what every buffer holds."""

    plan: Plan
    rank: int
    world: int
    state: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    slots: dict[str, WeightSlot] = field(default_factory=dict)
    groups: dict[str, CacheGroup] = field(default_factory=dict)
    ops: list[ops.Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, buffer in self.plan.buffers.items():
            if buffer.carry or not any(name in op.names("writes") for op in self.plan.ops):
                self.state[name], self.buffers[name] = WHOLE, buffer

    def share(self, size: int, what: str) -> int:
        if size % self.world:
            raise _CutError(f"{what}: {size} can't be shared out to {self.world} ranks")
        return size // self.world

    def group(self, group: CacheGroup) -> CacheGroup:
        if group.sharded != "heads":
            return group
        try:
            return replace(group, num_heads=self.share(group.num_heads, f"heads of group {group.name}"))
        except _CutError as error:
            raise PlanError(f"plan {self.plan.name}: {error}") from None

    def whole(self, name: str) -> None:
        """Make sure that a buffer holds whole rows; sums up a partial one in place."""
        state = self.state[name]
        if state == SPLIT:
            raise _CutError(f"needs the whole rows of {name}, of which a rank has its share")
        if state == PARTIAL:
            self.ops.append(ops.AllReduce(name, name))
            self.state[name] = WHOLE

    def split(self, name: str) -> None:
        if self.state[name] != SPLIT:
            raise _CutError(f"needs a rank's share of {name}, which holds {self.state[name]} rows")

    def write(self, name: str, state: str) -> None:
        """Declare what an op writes: the buffer as it is, or a rank's share of its columns."""
        buffer = self.plan.buffers[name]
        if state == SPLIT:
            width = buffer.shape[-1]
            assert isinstance(width, int)
            buffer = replace(buffer, shape=(*buffer.shape[:-1], self.share(width, f"width of {name}")))
        if self.buffers.setdefault(name, buffer) != buffer:
            raise _CutError(f"buffer {name} is whole in one place and split in another")
        self.state[name] = state

    def slot(self, name: str) -> WeightSlot:
        """A rank's part of a slot, and of its fallbacks."""
        slot = self.plan.slots[name]
        self.slots[name] = self._cut(slot, slot.shard, name)
        return slot

    def _cut(self, slot: WeightSlot, how: str | None, suffix: str) -> WeightSlot:
        """Cut `slot` as `how` says. A fallback is cut like the slot it stands for, under its own name."""
        if how is not None:
            axis = _AXES[how](slot)
            part = self.share(slot.shape[axis], f"{how} of weight {slot.name}")
            shape = (*slot.shape[:axis], part, *slot.shape[axis + 1 :])
            transforms = _with_cut(slot, how, self.rank * part, part)
            slot = replace(slot, shape=shape, transforms=transforms, shard=None)
        if slot.fallback is None:
            return slot
        other = self.plan.slots[slot.fallback]
        if how is not None:
            other = replace(other, name=f"{other.name}@{suffix}")
        self.slots[other.name] = self._cut(other, how, suffix)
        return replace(slot, fallback=other.name)


_AXES: dict[str, Callable[[WeightSlot], int]] = {
    "rows": lambda slot: max(0, len(slot.shape) - 2),
    "columns": lambda slot: len(slot.shape) - 1,
    "heads": lambda slot: 0,
}


def _with_cut(slot: WeightSlot, how: str, start: int, part: int) -> tuple[Transform, ...]:
    """The slot's transforms with the cut put in: at the end, but heads are cut as rows before they form."""
    if how != "heads":
        return (*slot.transforms, Transform(how, start, start + part))
    place = next(i for i, t in enumerate(slot.transforms) if t.kind in ("heads", "heads_t"))
    heads = slot.transforms[place]
    rows = slot.shape[1] if heads.kind == "heads" else slot.shape[2]
    cut = Transform("rows", start * rows, (start + part) * rows)
    return (*slot.transforms[:place], cut, replace(heads, heads=part), *slot.transforms[place + 1 :])


# ---------------------------------------------------------------- one rule per op class


def _copied(cut: _Sharder, op: Any) -> None:
    """Needs whole rows, gives whole rows: embedding, norms over the width, routing, sampling."""
    for name in op.names("reads"):
        cut.whole(name)
    for name in op.names("slots"):
        cut.slot(name)
    for name in op.names("writes"):
        cut.write(name, WHOLE)
    cut.ops.append(op)


def _per_head(cut: _Sharder, op: Any) -> None:
    """Works within heads or elements: the result is split where the input is (never on partial sums)."""
    inputs = [name for name in op.names("reads") if name != getattr(op, "positions", None)]
    states = {cut.state[name] for name in inputs}
    if states != {SPLIT}:
        for name in inputs:
            cut.whole(name)
    for name in op.names("slots"):
        cut.slot(name)
    cut.write(op.out, SPLIT if states == {SPLIT} else WHOLE)
    cut.ops.append(op)


def _linear_op(cut: _Sharder, op: Any) -> None:
    """Add, Scale, Copy, GatherRows: any state goes through, unlike ones are made whole first."""
    inputs = [name for name in op.names("reads") if name != getattr(op, "rows", None)]
    states = {cut.state[name] for name in inputs}
    if len(states) > 1 or cut.plan.buffers[op.out].carry:
        for name in inputs:
            cut.whole(name)
        states = {WHOLE}
    cut.write(op.out, states.pop())
    cut.ops.append(op)


def _matrices(cut: _Sharder, op: Any) -> None:
    """Linear, MoeLinear: by rows gives split, by columns takes split and gives partial sums."""
    ways = {cut.slot(name).shard for name in op.weights}
    if len(ways) != 1:
        raise _CutError(f"its matrices are cut in unlike ways: {', '.join(map(str, ways))}")
    how = ways.pop()
    biases = [name for name in getattr(op, "biases", ()) if name is not None]
    for name in biases:
        cut.slot(name)
    if how == "columns":
        if biases:
            raise _CutError("a bias would be added once per rank to a matrix that is cut by columns")
        cut.split(op.x)
    else:
        cut.whole(op.x)
    state = {"rows": SPLIT, "columns": PARTIAL, None: WHOLE}.get(how)
    if state is None:
        raise _CutError(f"its matrices can't be cut by {how}")
    for name in op.outs:
        cut.write(name, state)
    cut.ops.append(op)


def _head_linear(cut: _Sharder, op: ops.HeadLinear) -> None:
    if cut.slot(op.weight).shard != "heads":
        _copied(cut, op)
        return
    cut.split(op.x)
    cut.write(op.out, SPLIT)
    cut.ops.append(replace(op, num_heads=cut.share(op.num_heads, "heads")))


def _lm_head(cut: _Sharder, op: ops.LmHead) -> None:
    """Each rank makes its share of the vocabulary's logits; all get all of them."""
    if cut.slot(op.weight).shard is None:
        _copied(cut, op)
        return
    cut.whole(op.x)
    buffer = cut.plan.buffers[op.out]
    part = f"{op.out}.part"
    rows, vocab = cut.slots[op.weight].shape[0], buffer.shape[0]
    cut.buffers[part] = replace(buffer, name=part, shape=(vocab, rows))
    cut.ops.append(replace(op, out=part))
    cut.write(op.out, WHOLE)
    cut.ops.append(ops.AllGather(part, op.out))


def _kv_append(cut: _Sharder, op: ops.KvAppend) -> None:
    for name in op.names("reads"):
        if cut.plan.groups[op.group].sharded == "heads":
            cut.split(name)
        else:
            cut.whole(name)
    cut.ops.append(op)


def _attention(cut: _Sharder, op: ops.Attention) -> None:
    """Query heads are shared out; kv heads too, unless the group is replicated (one latent for all)."""
    by_heads = cut.plan.groups[op.group].sharded == "heads"
    if op.sinks is not None:
        cut.slot(op.sinks)
    for name in (op.q, op.q_rope):
        if name is not None:
            cut.split(name)
    for name in (op.select, op.tree_mask):
        if name is not None:
            cut.whole(name)
    cut.write(op.out, SPLIT)
    kv_heads = cut.share(op.num_kv_heads, "kv heads") if by_heads else op.num_kv_heads
    cut.ops.append(replace(op, num_heads=cut.share(op.num_heads, "query heads"), num_kv_heads=kv_heads))


def _moe_combine(cut: _Sharder, op: ops.MoeCombine) -> None:
    cut.whole(op.weights)
    if cut.state[op.x] == SPLIT:
        raise _CutError(f"needs whole rows or partial sums of {op.x}")
    cut.write(op.out, cut.state[op.x])
    cut.ops.append(op)


_RULES: dict[type[ops.Op], Callable[[_Sharder, Any], None]] = {
    ops.Embed: _copied,
    ops.RmsNorm: _copied,
    ops.LayerNorm: _copied,
    ops.HeadNorm: _per_head,
    ops.Rope: _per_head,
    ops.Glu: _per_head,
    ops.Activation: _per_head,
    ops.Softcap: _per_head,
    ops.Add: _linear_op,
    ops.Scale: _linear_op,
    ops.Copy: _linear_op,
    ops.GatherRows: _linear_op,
    ops.Linear: _matrices,
    ops.MoeLinear: _matrices,
    ops.HeadLinear: _head_linear,
    ops.LmHead: _lm_head,
    ops.KvAppend: _kv_append,
    ops.Attention: _attention,
    ops.IndexTopk: _copied,
    ops.Route: _copied,
    ops.MoeCombine: _moe_combine,
    ops.Sample: _copied,
}

"""Rewrites of a plan into another that computes the same: dead ops out, fewer buffers.

Each pass is tested by running the plan before and after on the reference backend. Tensor parallelism is
the pass in `shard.py`. Fusion is private to each backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hayai.plan import ops
from hayai.plan.plan import INPUTS, OPTIONAL_INPUTS, Buffer, Plan
from hayai.plan.shard import shard
from hayai.plan.validate import used_slots, validate

__all__ = ["remove_dead", "rename_buffers", "reuse_buffers", "shard"]

EFFECTS: tuple[type[ops.Op], ...] = (ops.KvAppend, ops.LinearState)
"""Ops that change a cache: never dead."""


def remove_dead(plan: Plan) -> Plan:
    """Leave out ops whose results nothing reads, and the buffers and slots that only they used.

    Outputs, carry buffers and caches are what a plan is run for; cache groups stay (other plans share them).
    """
    live = set(plan.outputs) | {name for name, buffer in plan.buffers.items() if buffer.carry}
    kept: list[ops.Op] = []
    for op in reversed(plan.ops):
        written = set(op.names("writes"))
        if not isinstance(op, EFFECTS) and not written & live:
            continue
        kept.append(op)
        live = (live - written) | set(op.names("reads"))
    touched = {name for op in kept for table in ("reads", "writes") for name in op.names(table)}
    buffers = {
        name: buffer
        for name, buffer in plan.buffers.items()
        if name in touched or name in INPUTS or name in plan.outputs or buffer.carry
    }
    smaller = replace(plan, ops=tuple(reversed(kept)), buffers=buffers)
    used = used_slots(smaller)
    result = replace(smaller, slots={name: slot for name, slot in plan.slots.items() if name in used})
    validate(result)
    return result


@dataclass(frozen=True)
class _Life:
    """One value of a buffer: written by op `start`, last read by op `stop`."""

    name: str
    start: int
    stop: int


def reuse_buffers(plan: Plan) -> Plan:
    """Let buffers of one shape and dtype share storage where their lives don't overlap.

    Inputs, outputs, carry buffers and `logits` keep their names. An op that works in place still does.
    """
    fixed = {*INPUTS, *OPTIONAL_INPUTS, *plan.outputs, "logits"}
    fixed |= {name for name, buffer in plan.buffers.items() if buffer.carry}
    lives = [life for life in _lives(plan) if life.name not in fixed]
    free: dict[tuple[Any, ...], list[str]] = {}
    ending: dict[int, list[tuple[tuple[Any, ...], str]]] = {}
    home: dict[tuple[str, int], str] = {}
    buffers: dict[str, Buffer] = {name: b for name, b in plan.buffers.items() if name in fixed}
    now = 0
    for life in lives:
        for op in range(now, life.start):
            for kind, name in ending.pop(op, ()):
                free[kind].append(name)
        now = max(now, life.start)
        buffer = plan.buffers[life.name]
        kind = (buffer.shape, buffer.dtype)
        pool = free.setdefault(kind, [])
        name = (
            pool.pop() if pool else life.name if life.name not in buffers else f"{life.name}.{len(buffers)}"
        )
        buffers.setdefault(name, replace(buffer, name=name))
        home[life.name, life.start] = name
        ending.setdefault(life.stop, []).append((kind, name))
    result = replace(plan, buffers=buffers, ops=_renamed(plan, home))
    validate(result)
    return result


def _lives(plan: Plan) -> list[_Life]:
    """Every value of every buffer in the order they are written; an update in place goes on with one."""
    open_: dict[str, tuple[int, int]] = {}
    lives: list[_Life] = []
    for index, op in enumerate(plan.ops):
        reads, writes = op.names("reads"), op.names("writes")
        for name in reads:
            if name in open_:
                open_[name] = (open_[name][0], index)
        for name in writes:
            if name in reads and name in open_:
                continue
            if name in open_:
                lives.append(_Life(name, *open_[name]))
            open_[name] = (index, index)
    lives += [_Life(name, *span) for name, span in open_.items()]
    return sorted(lives, key=lambda life: life.start)


def _renamed(plan: Plan, home: Mapping[tuple[str, int], str]) -> tuple[ops.Op, ...]:
    """The ops with each value in its home: `home` maps (buffer, op that starts the value) to a buffer."""
    current: dict[str, str] = {}
    result = []
    for index, op in enumerate(plan.ops):
        before = dict(current)
        for name in op.names("writes"):
            if (name, index) in home:
                current[name] = home[name, index]
        result.append(rename_buffers(op, before, current))
    return tuple(result)


def rename_buffers(op: ops.Op, reads: Mapping[str, str], writes: Mapping[str, str]) -> ops.Op:
    """The op with other buffers: those it reads by one table, those it writes by the other."""
    changes: dict[str, Any] = {}
    for fields, table in ((op.reads, reads), (op.writes, writes)):
        for field in fields:
            value = getattr(op, field)
            if isinstance(value, str):
                changes[field] = table.get(value, value)
            elif value is not None:
                changes[field] = tuple(table.get(name, name) for name in value)
    return replace(op, **changes)

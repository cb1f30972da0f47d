"""`validate`: does a plan hold together?  `dump`: a plan as text for review and snapshots."""

from __future__ import annotations

from dataclasses import fields

from hayai.errors import PlanError
from hayai.plan.ops import ALL_OPS, Op
from hayai.plan.plan import INPUTS, OPTIONAL_INPUTS, Plan, Transform, WeightSlot
from hayai.plan.shapes import ANY_DTYPE, GROUP_KINDS, INTEGER_FIELDS, SHAPE_RULES, ShapeError, shape_text

TRANSFORM_KINDS = ("rows", "columns", "stack", "heads", "heads_t")


def validate(plan: Plan) -> None:
    """Check a whole plan; PlanError names the op's index, the op and the field.

    Every name is declared; buffers are read after they are written (inputs and carry buffers come
    filled); shapes and dtypes follow each op's rule; cache layers exist; outputs are written; no weight
    slot is left unused.
    """
    _check_slots(plan)
    for group in plan.groups.values():
        if group.kind not in GROUP_KINDS:
            raise PlanError(
                f"plan {plan.name}: cache group {group.name}: kind {group.kind!r} is not one of "
                f"{', '.join(GROUP_KINDS)}"
            )
    inputs = {name for name in (*INPUTS, *OPTIONAL_INPUTS) if name in plan.buffers}
    written = inputs | {name for name, buffer in plan.buffers.items() if buffer.carry}
    for index, op in enumerate(plan.ops):
        _check_names(plan, index, op)
        for field in op.reads:
            for name in field_names(op, field):
                if name not in written:
                    raise _fault(plan, index, op, field, f"buffer {name} is read before it is written")
        _check_shapes(plan, index, op)
        _check_dtypes(plan, index, op)
        for field in op.writes:
            for name in field_names(op, field):
                if name in inputs:
                    raise _fault(plan, index, op, field, f"{name} is an input of the step and is read only")
                written.add(name)
    for name in plan.outputs:
        if name not in plan.buffers:
            raise PlanError(f"plan {plan.name}: output {name} is not a declared buffer")
        if name not in written:
            raise PlanError(f"plan {plan.name}: output {name} is never written")
    unused = sorted(set(plan.slots) - used_slots(plan))
    if unused:
        raise PlanError(f"plan {plan.name}: weight slot {unused[0]} is not used ({len(unused)} in all)")


def used_slots(plan: Plan) -> set[str]:
    """Slots that some op names, and their fallbacks."""
    used = {name for op in plan.ops for name in op.names("slots")}
    pending = list(used)
    while pending:
        fallback = plan.slots[pending.pop()].fallback
        if fallback is not None and fallback not in used:
            used.add(fallback)
            pending.append(fallback)
    return used


def field_names(op: Op, field: str) -> tuple[str, ...]:
    """The buffer or slot names that one field of an op holds."""
    value = getattr(op, field)
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(name for name in value if name is not None)


def _fault(plan: Plan, index: int, op: Op, field: str, message: str) -> PlanError:
    return PlanError(f"plan {plan.name}, op {index} {op.kind}, field {field}: {message}")


def _check_names(plan: Plan, index: int, op: Op) -> None:
    if type(op) not in ALL_OPS:
        raise PlanError(f"plan {plan.name}, op {index}: {type(op).__name__} is not in the op list")
    for field in (*op.reads, *op.writes):
        for name in field_names(op, field):
            if name not in plan.buffers:
                raise _fault(plan, index, op, field, f"buffer {name} is not declared")
    for field in op.slots:
        for name in field_names(op, field):
            if name not in plan.slots:
                raise _fault(plan, index, op, field, f"weight slot {name} is not declared")
    group = getattr(op, "group", None)
    if group is not None and group not in plan.groups:
        raise _fault(plan, index, op, "group", f"cache group {group} is not declared")


def _check_shapes(plan: Plan, index: int, op: Op) -> None:
    try:
        for field, name, expected in SHAPE_RULES[type(op)](op, plan):
            found = plan.slots[name].shape if field in op.slots else plan.buffers[name].shape
            if found != expected:
                raise ShapeError(
                    field, f"{name} has shape {shape_text(found)}, must be {shape_text(expected)}"
                )
    except ShapeError as error:
        raise _fault(plan, index, op, error.field, error.message) from None


def _check_dtypes(plan: Plan, index: int, op: Op) -> None:
    if isinstance(op, ANY_DTYPE):
        source, target = (plan.buffers[op.names(table)[0]] for table in ("reads", "writes"))
        if source.dtype != target.dtype:
            raise _fault(
                plan,
                index,
                op,
                "out",
                f"{target.name} is {target.dtype}, {source.name} is {source.dtype}",
            )
        return
    integers = INTEGER_FIELDS.get(type(op), ())
    for field in (*op.reads, *op.writes):
        wanted = "i32" if field in integers else "f32"
        for name in field_names(op, field):
            if plan.buffers[name].dtype != wanted:
                raise _fault(
                    plan, index, op, field, f"{name} is {plan.buffers[name].dtype}, must be {wanted}"
                )


def _check_slots(plan: Plan) -> None:
    for slot in plan.slots.values():
        where = f"plan {plan.name}, weight slot {slot.name}"
        if any(dim <= 0 for dim in slot.shape):
            raise PlanError(f"{where}: shape {shape_text(slot.shape)} has an empty dimension")
        if not any(slot.sources.values()):
            raise PlanError(f"{where}: no container names a source tensor")
        for transform in slot.transforms:
            if transform.kind not in TRANSFORM_KINDS:
                raise PlanError(
                    f"{where}: transform {transform.kind!r} is not one of {', '.join(TRANSFORM_KINDS)}"
                )
        seen = {slot.name}
        follow = slot
        while follow.fallback is not None:
            if follow.fallback not in plan.slots:
                raise PlanError(f"{where}: fallback {follow.fallback} is not declared")
            follow = plan.slots[follow.fallback]
            if follow.name in seen:
                raise PlanError(f"{where}: fallbacks form a circle")
            seen.add(follow.name)
            if follow.shape != slot.shape:
                raise PlanError(
                    f"{where}: fallback {follow.name} has shape {shape_text(follow.shape)}, "
                    f"must be {shape_text(slot.shape)}"
                )


# ---------------------------------------------------------------- dump


def dump(plan: Plan) -> str:
    """The whole plan as text, one line an op, nothing collapsed; stable, so that it can be a snapshot."""
    lines = [f"plan {plan.name} -> {', '.join(plan.outputs)}", "", "cache groups"]
    for group in plan.groups.values():
        window = f" window={group.window}" if group.window else ""
        lines.append(
            f"  {group.name}: {group.kind} layers={group.num_layers} heads={group.num_heads} "
            f"key_dim={group.key_dim} value_dim={group.value_dim}{window} "
            f"sharded={group.sharded} rollback={'yes' if group.can_rollback else 'no'}"
        )
    lines += ["", "buffers"]
    for buffer in plan.buffers.values():
        role = "input" if buffer.name in INPUTS or buffer.name in OPTIONAL_INPUTS else ""
        role = "carry" if buffer.carry else role
        lines.append(f"  {buffer.name} {shape_text(buffer.shape)} {buffer.dtype} {role}".rstrip())
    lines += ["", "weight slots"]
    lines += [f"  {_slot_text(slot)}" for slot in plan.slots.values()]
    lines += ["", "ops"]
    width = len(str(len(plan.ops)))
    lines += [f"  {index:{width}} {_op_text(plan, op)}" for index, op in enumerate(plan.ops)]
    return "\n".join(lines) + "\n"


def _slot_text(slot: WeightSlot) -> str:
    parts = [f"{slot.name} {shape_text(slot.shape)}"]
    for container, names in slot.sources.items():
        shown = names if len(names) <= 2 else (names[0], f"... {len(names)} tensors ...", names[-1])
        parts.append(f"{container}: {', '.join(shown)}")
    text = " | ".join(parts)
    for transform in slot.transforms:
        text += " | " + _transform_text(transform)
    for name in ("optional", "fallback", "shard"):
        value = getattr(slot, name)
        if value:
            text += f" | {name}" + ("" if value is True else f"={value}")
    return text


def _transform_text(transform: Transform) -> str:
    if transform.kind in ("rows", "columns"):
        block = f" of every {transform.block}" if transform.block else ""
        return f"{transform.kind} {transform.start}..{transform.stop}{block}"
    return transform.kind + (f" {transform.heads}" if transform.heads else "")


def _op_text(plan: Plan, op: Op) -> str:
    def buffers(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} {shape_text(plan.buffers[name].shape)}" for name in names)

    text = f"{op.kind}: {buffers(op.names('reads'))}"
    if op.names("writes"):
        text += f" -> {buffers(op.names('writes'))}"
    for name in op.names("slots"):
        text += f" | {name} {shape_text(plan.slots[name].shape)}"
    operands = {*op.reads, *op.writes, *op.slots}
    settings = []
    for field in fields(op):
        value = getattr(op, field.name)
        if field.name not in operands and value is not None:
            shown = f"{value:.9g}" if isinstance(value, float) else f"{value}"
            settings.append(f"{field.name}={shown}")
    return text + (f" | {' '.join(settings)}" if settings else "")

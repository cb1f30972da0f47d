"""PlanBuilder: what a model file writes its plan with."""

from __future__ import annotations

from dataclasses import dataclass, field

from hayai.errors import PlanError
from hayai.plan.ops import ALL_OPS, Op
from hayai.plan.plan import INPUTS, OPTIONAL_INPUTS, Buffer, CacheGroup, Dim, Plan, WeightSlot
from hayai.plan.validate import validate


@dataclass
class PlanBuilder:
    """Collects a plan while a model function runs. Every method returns the name it declared."""

    name: str
    buffers: dict[str, Buffer] = field(default_factory=dict)
    slots: dict[str, WeightSlot] = field(default_factory=dict)
    groups: dict[str, CacheGroup] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, (shape, dtype) in INPUTS.items():
            self.buffers[name] = Buffer(name, shape, dtype)

    def buffer(self, name: str, *shape: Dim, dtype: str = "f32", carry: bool = False) -> str:
        """Declare a buffer; declaring it again with the same shape is allowed and returns it."""
        new = Buffer(name, shape, dtype, carry)
        if self.buffers.setdefault(name, new) != new:
            raise PlanError(f"buffer {name} declared twice: {self.buffers[name]} and {new}")
        return name

    def input(self, name: str) -> str:
        """Declare one of the optional inputs of a step (plan.OPTIONAL_INPUTS)."""
        shape, dtype = OPTIONAL_INPUTS[name]
        return self.buffer(name, *shape, dtype=dtype)

    def slot(self, slot: WeightSlot) -> str:
        if self.slots.setdefault(slot.name, slot) != slot:
            raise PlanError(f"weight slot {slot.name} declared twice with different content")
        return slot.name

    def group(self, group: CacheGroup) -> str:
        if self.groups.setdefault(group.name, group) != group:
            raise PlanError(f"cache group {group.name} declared twice with different content")
        return group.name

    def add(self, op: Op) -> None:
        if type(op) not in ALL_OPS:
            raise PlanError(f"{type(op).__name__} is not in the op list")
        self.ops.append(op)

    def build(self, *outputs: str) -> Plan:
        plan = Plan(
            self.name, dict(self.buffers), dict(self.slots), dict(self.groups), tuple(self.ops), outputs
        )
        validate(plan)
        return plan

"""What a step must read: the bytes behind every "share of the roofline", from the plan and the file.

A decode step of one sequence reads every matrix of the plan once, the head as it is really read (whole, or
by the screen's plane plus the survivors), the norms, one embedding row, and all cached keys and values:

    bytes(context) = matrices + head + small + kv_bytes_per_position * context
    ceiling        = bandwidth / bytes                     (tokens per second)
    share          = bytes * tokens per second / bandwidth

The bandwidth is measured in the same process, minutes apart at most (docs/measuring.md). Peers read the
whole head of their own file and fp16 keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hayai.formats import FORMATS
from hayai.models.registry import build_plans
from hayai.plan.ops import Attention, Embed, HeadLinear, Linear, LmHead, MoeLinear
from hayai.plan.plan import Plan
from hayai.weights.gguf import GgufFile, TensorInfo, model_config

KV_BYTES = 2
"""Bytes of one cached number: fp16, ours and the peers' default."""
SCREEN_BLOCK = 32
"""Inputs per block of the screened head's high plane; its outlier block is one more (native/kernels.h)."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step of one sequence reads.

    head: the lm_head read whole; screened_head: its high plane with the outlier block, without survivors
    (None where the head's format can't be screened); survivor_row: bytes read to rescore one row.
    """

    matrices: int
    head: int
    screened_head: int | None
    survivor_row: int
    small: int
    kv_per_position: int

    def total(self, context: float, *, screened: bool = False, survivors: float = 0.0) -> float:
        """Bytes at a mean context of `context` positions."""
        head: float = self.head
        if screened and self.screened_head is not None:
            head = self.screened_head + survivors * self.survivor_row
        return self.matrices + head + self.small + self.kv_per_position * context


def step_bytes(path: Path) -> StepBytes:
    """Count a GGUF file's decode step by its main plan. ModelError where the file can't be read."""
    with GgufFile(path) as file:
        plan = build_plans(model_config(file))["main"]
        return count(plan, file.tensors)


def count(plan: Plan, tensors: Mapping[str, TensorInfo]) -> StepBytes:
    """Count a plan over a file's tensors. Mixture-of-experts matrices count by the experts chosen."""
    matrices = small = kv = head = survivor_row = 0
    screened: int | None = None
    seen: set[str] = set()
    for op in plan.ops:
        if isinstance(op, (Linear, HeadLinear)):
            matrices += sum(slot_bytes(plan, tensors, name) for name in fresh(op.names("slots"), seen))
        elif isinstance(op, MoeLinear):
            matrices += moe_bytes(plan, tensors, op)
        elif isinstance(op, LmHead):
            head = slot_bytes(plan, tensors, op.weight)
            screened, survivor_row = screened_bytes(plan, tensors, op.weight)
        elif isinstance(op, Embed):
            small += slot_bytes(plan, tensors, op.table) // plan.slots[op.table].shape[0]
        else:
            small += sum(slot_bytes(plan, tensors, name) for name in fresh(op.names("slots"), seen))
        if isinstance(op, Attention):
            group = plan.groups[op.group]
            kv += group.num_heads * (group.key_dim + group.value_dim) * KV_BYTES
    return StepBytes(matrices, head, screened, survivor_row, small, kv)


def fresh(names: tuple[str, ...], seen: set[str]) -> list[str]:
    """Names not met before: a slot that several ops share is read once per step at most."""
    new = [name for name in dict.fromkeys(names) if name not in seen]
    seen.update(new)
    return new


def tensor_format(plan: Plan, tensors: Mapping[str, TensorInfo], name: str) -> str | None:
    """Format of the first tensor behind a slot (or its fallback); None for an absent optional slot."""
    slot = plan.slots[name]
    for source in slot.sources.get("gguf", ()):
        if source in tensors:
            return tensors[source].format
    return tensor_format(plan, tensors, slot.fallback) if slot.fallback is not None else None


def slot_bytes(plan: Plan, tensors: Mapping[str, TensorInfo], name: str) -> int:
    """Bytes of a slot in the file's own format: packing is a permutation and keeps them."""
    found = tensor_format(plan, tensors, name)
    if found is None:
        return 0
    kind = FORMATS[found]
    return math.prod(plan.slots[name].shape) * kind.block_bytes // kind.block_elements


def moe_bytes(plan: Plan, tensors: Mapping[str, TensorInfo], op: MoeLinear) -> int:
    """The chosen experts only: the routing op of the same ids says how many."""
    top_k = next(o.top_k for o in plan.ops if o.kind == "route" and getattr(o, "ids", None) == op.ids)  # type: ignore[attr-defined]
    return sum(
        slot_bytes(plan, tensors, name) * top_k // plan.slots[name].shape[0] for name in op.names("slots")
    )


def screened_bytes(plan: Plan, tensors: Mapping[str, TensorInfo], name: str) -> tuple[int | None, int]:
    """(high plane with its outlier block, bytes of one rescored row); (None, 0) where it is not screened."""
    if tensor_format(plan, tensors, name) != "q8_0":
        return None, 0
    rows, cols = plan.slots[name].shape
    blocks = cols // SCREEN_BLOCK
    packed = SCREEN_BLOCK // 2 + 2  # nibbles and a scale
    # a rescored row reads the low plane only, which is padded to whole pairs of blocks
    return rows * (blocks + 1) * packed, (blocks + blocks % 2) * packed

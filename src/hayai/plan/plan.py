"""Plans: a flat list of ops over named buffers and weight slots, plus the caches they need.

A `Plan` is data. It is made by a `builder.PlanBuilder` inside a model file, rewritten by `passes`, checked by
`validate.validate()`, printed by `validate.dump()`, compiled by a backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hayai.plan.ops import Op

Dim = int | str
"""A size: a number, or one of the symbols 'T', 'S', 'R'."""

INPUTS: dict[str, tuple[tuple[Dim, ...], str]] = {
    "tokens": (("T",), "i32"),
    "positions": (("T",), "i32"),
    "logit_rows": (("R",), "i32"),
}
"""Buffers that every plan is given by the step: name -> (shape, dtype)."""

OPTIONAL_INPUTS: dict[str, tuple[tuple[Dim, ...], str]] = {
    "carry_rows": (("T",), "i32"),
    "tree_mask": (("T", "T"), "i32"),
}
"""Inputs that a plan asks for by declaring them (`PlanBuilder.input`).

carry_rows: for each token of this step, the row of the carry buffers (as the step before left them) that
belongs to it.  tree_mask: see ops.Attention.
"""


@dataclass(frozen=True)
class Buffer:
    """A named array of the step. `carry` buffers outlive a step (hidden rows for a draft model)."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "f32"
    carry: bool = False


@dataclass(frozen=True)
class Transform:
    """What to do with the source tensors of a slot to get the slot's array.

    kind:
      'rows'     rows [start, stop) of every block of `block` rows (0 = the whole matrix is one block)
      'columns'  columns [start, stop)
      'stack'    stack the sources along a new first axis (one tensor per expert)
      'heads'    reshape (heads*out, in) to (heads, out, in) after 'rows' selection
      'heads_t'  as 'heads', then transpose each head's matrix (MLA: W_UK)
    'rows' and 'stack' are pure selections and keep the file's bits; 'columns' does so when start and stop
    lie on block borders; 'heads_t' needs a dequantised copy.
    """

    kind: str
    start: int = 0
    stop: int = 0
    block: int = 0
    heads: int = 0


@dataclass(frozen=True)
class WeightSlot:
    """A weight that a plan needs, and where a container keeps it.

    sources: container ('gguf', 'hf') -> tensor names, first one that exists wins unless the transform
    stacks. `optional` slots may be missing in the file; `fallback` names a slot to use instead (a tied
    head). `shard` says how tensor parallelism cuts it: 'rows', 'columns', 'heads', 'experts' or None.
    """

    name: str
    shape: tuple[int, ...]
    sources: Mapping[str, tuple[str, ...]]
    transforms: tuple[Transform, ...] = ()
    optional: bool = False
    fallback: str | None = None
    shard: str | None = None


@dataclass(frozen=True)
class CacheGroup:
    """A set of layers whose caches have one shape and one lifetime.

    kind: 'full' | 'window' | 'mla' | 'index' | 'state'.
    full, window: num_heads kv heads of key_dim and value_dim.  mla: key_dim = latent, value_dim = rope.
    index: key_dim.  state: num_heads matrices key_dim x value_dim, one per sequence.
    """

    name: str
    kind: str
    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    sharded: str = "heads"
    can_rollback: bool = True


@dataclass(frozen=True)
class Plan:
    """One computation, complete: nothing else is needed to compile it but the weights."""

    name: str
    buffers: Mapping[str, Buffer]
    slots: Mapping[str, WeightSlot]
    groups: Mapping[str, CacheGroup]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...] = ()

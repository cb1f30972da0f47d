"""Which neighbouring ops of a plan the CPU executor runs as one phase.

Pure pattern matching on the plan: no weights, no native code. `match_plan` turns the op list into a list of
phases; whatever fits no pattern becomes a `Plain` phase of its own, so every supported op runs fused or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from hayai.errors import PlanError
from hayai.plan import ops
from hayai.plan.plan import Plan

_OpT = TypeVar("_OpT", bound=ops.Op)


@dataclass(frozen=True)
class EmbedPhase:
    op: ops.Embed


@dataclass(frozen=True)
class LinearPhase:
    """[norm +] linear + one of: store, add to a residual buffer, GLU."""

    linear: ops.Linear
    norm: ops.RmsNorm | None = None
    add: ops.Add | None = None
    glu: ops.Glu | None = None


@dataclass(frozen=True)
class QkvPhase:
    """[norm +] q, k, v + [head norms +] rope + store in the cache."""

    linear: ops.Linear
    norm: ops.RmsNorm | None
    q_norm: ops.HeadNorm | None
    k_norm: ops.HeadNorm | None
    q_rope: ops.Rope | None
    k_rope: ops.Rope | None
    append: ops.KvAppend

    def parts(self) -> list[ops.Op]:
        """The ops behind the linear, in order, for running them one by one."""
        steps = [self.q_norm, self.k_norm, self.q_rope, self.k_rope, self.append]
        return [op for op in steps if op is not None]


@dataclass(frozen=True)
class AttentionPhase:
    op: ops.Attention


@dataclass(frozen=True)
class HeadPhase:
    """Gather the wanted rows [+ norm] + logits + sample."""

    gather: ops.GatherRows
    norm: ops.RmsNorm | None
    head: ops.LmHead


@dataclass(frozen=True)
class PlainPhase:
    op: ops.Op


Phase = EmbedPhase | LinearPhase | QkvPhase | AttentionPhase | HeadPhase | PlainPhase

PLAIN_OPS: tuple[type[ops.Op], ...] = (
    ops.RmsNorm, ops.LayerNorm, ops.HeadNorm, ops.Rope, ops.KvAppend, ops.Glu, ops.Activation, ops.Add,
    ops.Scale, ops.Softcap, ops.Copy,
)  # fmt: skip
"""Ops that have a phase kind of their own."""


def match_plan(plan: Plan) -> list[Phase]:
    """Cut the plan into phases. PlanError names the first op that the CPU backend lacks."""
    matcher = _Matcher(plan)
    phases: list[Phase] = []
    at = 0
    while at < len(plan.ops):
        phase, used = matcher.match(at)
        phases.append(phase)
        at += used
    return phases


class _Matcher:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ops = plan.ops

    def match(self, at: int) -> tuple[Phase, int]:
        op = self.ops[at]
        if isinstance(op, ops.Embed):
            return EmbedPhase(op), 1
        if isinstance(op, ops.GatherRows):
            return self._head(at)
        if isinstance(op, ops.RmsNorm) and self._feeds_only(at, at + 1):
            follower = self.ops[at + 1]
            if isinstance(follower, ops.Linear):
                phase, used = self._linear(at + 1, op)
                return phase, used + 1
        if isinstance(op, ops.Linear):
            return self._linear(at, None)
        if isinstance(op, ops.Attention):
            self._check_attention(at, op)
            return AttentionPhase(op), 1
        if isinstance(op, PLAIN_OPS):
            return PlainPhase(op), 1
        supported = sorted(
            kind.__name__ for kind in (*PLAIN_OPS, ops.Embed, ops.Linear, ops.Attention, ops.LmHead)
        )
        raise PlanError(
            f"op {at} of plan {self.plan.name}: the cpu backend lacks {type(op).__name__}; "
            f"it has {', '.join(supported)}"
        )

    def _check_attention(self, at: int, op: ops.Attention) -> None:
        kind = self.plan.groups[op.group].kind
        for what, found in (
            (f"cache groups of kind {kind}", kind not in ("full", "window")),
            ("sparse selection", op.select is not None),
            ("tree masks", op.tree_mask is not None),
        ):
            if found:
                raise PlanError(f"op {at} of plan {self.plan.name}: the cpu backend's attention lacks {what}")

    def _linear(self, at: int, norm: ops.RmsNorm | None) -> tuple[Phase, int]:
        linear = self.ops[at]
        assert isinstance(linear, ops.Linear)
        for attempt in (self._qkv, self._glu, self._add):
            found = attempt(at, linear, norm)
            if found is not None:
                return found
        return LinearPhase(linear, norm), 1

    def _add(self, at: int, linear: ops.Linear, norm: ops.RmsNorm | None) -> tuple[Phase, int] | None:
        add = self._op(at + 1, ops.Add)
        if add is None or len(linear.outs) != 1 or norm is not None or not self._feeds_only(at, at + 1):
            return None
        if linear.outs[0] not in (add.a, add.b) or add.a == add.b:
            return None
        other = add.b if add.a == linear.outs[0] else add.a
        return (LinearPhase(linear, norm, add=add), 2) if add.out == other else None

    def _glu(self, at: int, linear: ops.Linear, norm: ops.RmsNorm | None) -> tuple[Phase, int] | None:
        glu = self._op(at + 1, ops.Glu)
        if glu is None or len(linear.outs) != 2 or any(linear.biases):
            return None
        if (glu.gate, glu.up) != linear.outs or not all(self._only(out, at, {at + 1}) for out in linear.outs):
            return None
        return LinearPhase(linear, norm, glu=glu), 2

    def _qkv(self, at: int, linear: ops.Linear, norm: ops.RmsNorm | None) -> tuple[Phase, int] | None:
        if len(linear.outs) != 3:
            return None
        q, k, v = linear.outs
        found: dict[str, ops.Op | None] = dict.fromkeys(("q_norm", "k_norm", "q_rope", "k_rope"))
        end = at + 1
        while True:
            op = self.ops[end] if end < len(self.ops) else None
            if isinstance(op, ops.HeadNorm | ops.Rope) and op.x == op.out and op.x in (q, k):
                key = ("q" if op.x == q else "k") + ("_norm" if isinstance(op, ops.HeadNorm) else "_rope")
                if found[key] is not None or (key.endswith("norm") and found[key[0] + "_rope"] is not None):
                    return None
                found[key] = op
                end += 1
                continue
            break
        append = self._op(end, ops.KvAppend)
        if append is None or (append.k, append.v) != (k, v):
            return None
        inside = set(range(at + 1, end + 1))
        if not (self._only(k, at, inside) and self._only(v, at, inside)):
            return None
        q_rope, k_rope = found["q_rope"], found["k_rope"]
        assert q_rope is None or isinstance(q_rope, ops.Rope)
        assert k_rope is None or isinstance(k_rope, ops.Rope)
        if _rope_key(q_rope) != _rope_key(k_rope) or (q_rope is not None and q_rope.start != 0):
            return None
        q_norm, k_norm = found["q_norm"], found["k_norm"]
        assert q_norm is None or isinstance(q_norm, ops.HeadNorm)
        assert k_norm is None or isinstance(k_norm, ops.HeadNorm)
        if q_norm and k_norm and (q_norm.eps, q_norm.weight_offset) != (k_norm.eps, k_norm.weight_offset):
            return None
        return QkvPhase(linear, norm, q_norm, k_norm, q_rope, k_rope, append), end - at + 1

    def _head(self, at: int) -> tuple[Phase, int]:
        gather = self.ops[at]
        assert isinstance(gather, ops.GatherRows)
        norm = self._op(at + 1, ops.RmsNorm)
        head_at = at + 1 + (norm is not None)
        head, sample = self._op(head_at, ops.LmHead), self._op(head_at + 1, ops.Sample)
        source = norm.out if norm is not None else gather.out
        if head is None or sample is None or head.x != source or head_at + 2 != len(self.ops):
            raise PlanError(
                f"op {at} of plan {self.plan.name}: the cpu backend runs gather_rows only as the start of "
                "gather_rows, [rms_norm,] lm_head, sample at the end of a plan"
            )
        return HeadPhase(gather, norm, head), head_at + 2 - at

    def _op(self, at: int, kind: type[_OpT]) -> _OpT | None:
        op = self.ops[at] if at < len(self.ops) else None
        return op if isinstance(op, kind) else None

    def _feeds_only(self, at: int, reader: int) -> bool:
        """What op `at` writes is read by op `reader` and by nobody else."""
        outs = self.ops[at].names("writes")
        return reader < len(self.ops) and all(
            out in self.ops[reader].names("reads") and self._only(out, at, {reader}) for out in outs
        )

    def _only(self, name: str, at: int, readers: set[int]) -> bool:
        """The value of `name` written by op `at` is read by no op outside `readers`."""
        if name in self.plan.outputs or self.plan.buffers[name].carry:
            return False
        for i in range(at + 1, len(self.ops)):
            op = self.ops[i]
            if name in op.names("reads") and i not in readers:
                return False
            if name in op.names("writes") and i not in readers:
                return True
        return True


def _rope_key(rope: ops.Rope | None) -> tuple[object, ...] | None:
    if rope is None:
        return None
    return (
        rope.head_dim,
        rope.rotary_dim,
        rope.theta,
        rope.interleaved,
        rope.start,
        rope.scaling,
        rope.factors_slot,
    )

"""From matched phases to a native program: fetches each weight once, packs it, and lets it go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hayai._native as _native
from hayai.backends import cpu_match as match
from hayai.backends.base import BLOCK_SIZE, Limits, WeightSource
from hayai.backends.rope import rope_frequencies
from hayai.errors import PlanError
from hayai.formats import QuantTensor
from hayai.logs import log
from hayai.plan import ops
from hayai.plan.plan import Plan

Fields = dict[str, Any]
"""Keyword arguments of one native call."""

LAYOUTS: Mapping[str, int] = {"q4_0": 0, "q4_1": 1, "q8_0": 2, "f16": 3, "bf16": 4, "f32": 5}
"""Formats with a packed layout of their own (native/kernels.h, Layout). Others are expanded to f32."""

INTEGER_LAYOUTS = frozenset({"q4_0", "q4_1", "q8_0"})
SUM_FACTOR: Mapping[str, float] = {"q4_0": -8.0, "q4_1": 1.0, "q8_0": 1.0}
ACTS: Mapping[str, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4}

BLOCK = 32
NUM_OUTLIERS = 32
NUM_CALIBRATION_TOKENS = 48
CHUNK_BYTES = 12 << 10
"""Weights per chunk of work: small enough to even out the threads, large enough to read linearly."""
HEAD_CHUNK_BYTES = 96 << 10


@dataclass
class Report:
    """What became of the weights, for `describe()`."""

    matrix_bytes: int = 0
    head_bytes: int = 0
    screened: bool = False
    formats: dict[str, int] = field(default_factory=dict)
    expanded: dict[str, int] = field(default_factory=dict)


class ProgramBuilder:
    """Emits one plan into a native executor."""

    def __init__(
        self,
        executor: _native.Executor,
        plan: Plan,
        weights: WeightSource,
        limits: Limits,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.executor = executor
        self.plan = plan
        self.weights = weights
        self.limits = limits
        self.progress = progress
        self.report = Report()
        self.group_rows: int = executor.group_rows
        head = next((op for op in plan.ops if isinstance(op, ops.LmHead)), None)
        if head is None:
            raise PlanError(f"plan {plan.name}: the cpu backend needs an lm_head")
        self.lm_head = head
        self.groups = {name: i for i, name in enumerate(plan.groups)}
        self._buffers: dict[str, int] = {}
        self._vectors: dict[str, int] = {}
        self._matrices: dict[str, tuple[int, str]] = {}
        self._tensors: dict[str, QuantTensor] = {}
        self._ropes: dict[object, int] = {}
        self._screened: dict[str, int] = {}
        self._quantised: str | None = None  # buffer that lies quantised in the executor's own store

    # ------------------------------------------------------------ weights

    def resolve(self, slot_name: str) -> str:
        """The slot that really holds the weights: itself, or its fallback where the file lacks it."""
        slot = self.plan.slots[slot_name]
        if not self.weights.has(slot) and slot.fallback is not None:
            return self.resolve(slot.fallback)
        return slot_name

    def tensor(self, slot_name: str) -> QuantTensor:
        """The slot's tensor in a format that has a layout; kept until `release`."""
        name = self.resolve(slot_name)
        if name not in self._tensors:
            found = self.weights.fetch(self.plan.slots[name])
            usable = found.format in LAYOUTS and (
                found.format not in INTEGER_LAYOUTS or found.cols % BLOCK == 0
            )
            if not usable:
                self.report.expanded[found.format] = self.report.expanded.get(found.format, 0) + 1
                found = QuantTensor.from_float(found.dequantize(), "f32")
            self._tensors[name] = found
        return self._tensors[name]

    def release(self, *slot_names: str) -> None:
        for slot_name in slot_names:
            self._tensors.pop(self.resolve(slot_name), None)

    def vector(self, slot_name: str | None) -> int:
        """Native id of a float vector; -1 for None."""
        if slot_name is None:
            return -1
        name = self.resolve(slot_name)
        if name not in self._vectors:
            values = self.weights.fetch(self.plan.slots[name]).dequantize().reshape(-1)
            self._vectors[name] = self.executor.add_vector(np.ascontiguousarray(values, np.float32))
        return self._vectors[name]

    def matrix(self, slot_names: tuple[str, ...], *, interleave: bool = False) -> tuple[int, str]:
        """Pack one matrix, or several of one format under each other (or group by group)."""
        key = ("|".join(self.resolve(name) for name in slot_names)) + ("/interleaved" if interleave else "")
        if key in self._matrices:
            return self._matrices[key]
        tensors = [self.tensor(name) for name in slot_names]
        layout, cols = tensors[0].format, tensors[0].cols
        groups = [-(-tensor.rows // self.group_rows) for tensor in tensors]
        weight = self.executor.add_weight(LAYOUTS[layout], sum(groups), cols)
        first = 0
        for i, tensor in enumerate(tensors):
            start, step = (i, len(tensors)) if interleave else (first, 1)
            self.executor.fill_weight(weight, tensor.data, tensor.rows, start, step)
            first += groups[i]
            self._count(tensor)
        self.release(*slot_names)
        self._matrices[key] = (weight, layout)
        return weight, layout

    def _count(self, tensor: QuantTensor, head: bool = False) -> None:
        size = int(tensor.nbytes)
        if head:
            self.report.head_bytes += size
        else:
            self.report.matrix_bytes += size
        self.report.formats[tensor.format] = self.report.formats.get(tensor.format, 0) + size

    def screened_head(self, slot_name: str) -> int | None:
        """Native id of the head's planes, or None where its format can't be screened."""
        name = self.resolve(slot_name)
        if name in self._screened:
            return self._screened[name]
        tensor = self.tensor(slot_name)
        if tensor.format != "q8_0" or tensor.cols < NUM_OUTLIERS:
            return None
        self._screened[name] = self.executor.add_head(tensor.data, tensor.cols)
        self.report.screened = True
        self._count(tensor, head=True)
        self.release(slot_name)
        return self._screened[name]

    def _calibrate(self) -> None:
        """Let each screened head choose its outlier inputs on a few tokens spread over the vocabulary."""
        vocab = self.width(self.lm_head.out)
        limits = self.limits
        count = min(NUM_CALIBRATION_TOKENS, limits.max_tokens, limits.max_context)
        count = min(count, (limits.num_blocks - 1) * BLOCK_SIZE)
        tokens = (np.arange(max(0, count), dtype=np.int64) * 7919 + 13) % vocab
        for head in self._screened.values():
            self.executor.calibrate_head(head, tokens.astype(np.int32))

    # ------------------------------------------------------------ buffers and tables

    def buffer(self, name: str) -> int:
        if name not in self._buffers:
            shape = self.plan.buffers[name].shape
            if len(shape) != 2 or shape[0] not in ("T", "R") or not isinstance(shape[1], int):
                raise PlanError(f"buffer {name}: the cpu backend runs (T, n) and (R, n) buffers, not {shape}")
            self._buffers[name] = self.executor.add_buffer(shape[1], shape[0] == "R")
        return self._buffers[name]

    def width(self, name: str) -> int:
        size = self.plan.buffers[name].shape[-1]
        assert isinstance(size, int)
        return size

    def rope(self, op: ops.Rope | None) -> int:
        if op is None:
            return -1
        key = (op.rotary_dim, op.theta, op.interleaved, op.start, op.scaling, op.factors_slot)
        if key not in self._ropes:
            factors = None
            if op.factors_slot is not None:
                slot = self.plan.slots[op.factors_slot]
                factors = (
                    self.weights.fetch(slot).dequantize().reshape(-1) if self.weights.has(slot) else None
                )
            cosine, sine = rope_tables(op, self.limits.max_context, factors)
            self._ropes[key] = self.executor.add_rope(cosine, sine, op.start, op.interleaved)
        return self._ropes[key]

    def chunk_groups(self, weight_format: str, cols: int, unit: int = 1) -> int:
        """Groups per chunk, a multiple of `unit`, of about CHUNK_BYTES."""
        size = _native.group_bytes(LAYOUTS[weight_format], self.group_rows, cols)
        return max(1, round(CHUNK_BYTES / (size * unit))) * unit

    # ------------------------------------------------------------ phases

    def build(self) -> None:
        for group in self.plan.groups.values():
            self.executor.add_group(
                self.limits.kv_format, group.num_layers, group.num_heads, group.key_dim, group.value_dim,
                self.limits.num_blocks,
            )  # fmt: skip
        phases = match.match_plan(self.plan)
        for i, phase in enumerate(phases):
            following = phases[i + 1] if i + 1 < len(phases) else None
            self._emit(phase, following)
            if self.progress is not None:
                self.progress(i + 1, len(phases))
        self.executor.finish(self.width(self.lm_head.out))
        self._calibrate()
        _native.release_free_memory()  # of reading and packing: the KV cache will want as much
        for name, count in self.report.expanded.items():
            log("warning", "hayai",
                "%d tensors of format %s have no packed layout here and were expanded to f32; layouts: %s",
                count, name, ", ".join(LAYOUTS),
            )  # fmt: skip

    def _emit(self, phase: match.Phase, following: match.Phase | None) -> None:
        if isinstance(phase, match.EmbedPhase):
            self._embed(phase.op)
        elif isinstance(phase, match.QkvPhase):
            self._qkv(phase)
        elif isinstance(phase, match.LinearPhase):
            self._linear(phase, following)
        elif isinstance(phase, match.AttentionPhase):
            self._attend(phase.op)
        elif isinstance(phase, match.HeadPhase):
            self._head(phase)
        else:
            self._plain(phase.op)

    def _embed(self, op: ops.Embed) -> None:
        head = None
        if self.resolve(self.lm_head.weight) == self.resolve(op.table):  # tied: one copy serves both
            head = self.screened_head(op.table)
        weight = -1 if head is not None else self.matrix((op.table,))[0]
        self.executor.add_embed(weight, -1 if head is None else head, self.buffer(op.out), op.scale)

    def _norm(self, norm: ops.RmsNorm | None) -> tuple[int, float, float]:
        return (-1, 0.0, 0.0) if norm is None else (self.vector(norm.weight), norm.weight_offset, norm.eps)

    def _bias(self, linear: ops.Linear) -> int:
        """One vector for the rows of all the group's matrices."""
        if not any(linear.biases):
            return -1
        parts = []
        for bias, out in zip(linear.biases, linear.outs, strict=True):
            width = self.width(out)
            part = np.zeros(width, np.float32)
            if bias is not None:
                part = self.weights.fetch(self.plan.slots[bias]).dequantize().reshape(-1)
            parts.append(part)
        return self.executor.add_vector(np.ascontiguousarray(np.concatenate(parts), np.float32))

    def _groups_well(self, linear: ops.Linear) -> bool:
        """The matrices may lie under each other: one format, and whole groups of rows."""
        tensors = [self.tensor(name) for name in linear.weights]
        return all(
            t.format == tensors[0].format and (t.rows % self.group_rows == 0 or t is tensors[-1])
            for t in tensors
        )

    def _qkv(self, phase: match.QkvPhase) -> None:
        linear, append = phase.linear, phase.append
        group = self.plan.groups[append.group]
        dim, value_dim, rope = group.key_dim, group.value_dim, phase.q_rope
        whole_heads = phase.q_norm is not None or phase.k_norm is not None or (rope and not rope.interleaved)
        one_scale = self.limits.kv_format == "q8"  # per head: its vector must be known as a whole
        rows = dim if whole_heads or one_scale else BLOCK
        fits = rows % self.group_rows == 0 and dim % rows == 0 and value_dim % rows == 0
        if one_scale and value_dim != dim:
            fits = False
        if rope is not None and rope.head_dim != dim:
            fits = False
        if not (fits and self._groups_well(linear)):
            self._store(linear, phase.norm)
            for op in phase.parts():
                self._plain(op)
            return
        weight, _ = self.matrix(linear.weights)
        norm, offset, eps = self._norm(phase.norm)
        source = linear.x if phase.norm is None else phase.norm.x
        head_norm = phase.q_norm or phase.k_norm
        self.executor.add_qkv(
            weight=weight, x=self.buffer(source), norm=norm, norm_offset=offset, norm_eps=eps,
            bias=self._bias(linear), q_out=self.buffer(linear.outs[0]),
            num_heads=self.width(linear.outs[0]) // dim, num_kv_heads=group.num_heads, head_dim=dim,
            value_dim=value_dim, rope=self.rope(rope),
            q_norm=self.vector(phase.q_norm.weight if phase.q_norm else None),
            k_norm=self.vector(phase.k_norm.weight if phase.k_norm else None),
            head_norm_offset=head_norm.weight_offset if head_norm else 0.0,
            head_norm_eps=head_norm.eps if head_norm else 0.0,
            group=self.groups[append.group], layer=append.layer, chunk_groups=rows // self.group_rows,
        )  # fmt: skip

    def _linear(self, phase: match.LinearPhase, following: match.Phase | None) -> None:
        if phase.glu is not None:
            self._glu(phase, following)
        elif phase.add is not None:
            self._store(phase.linear, phase.norm, add_to=phase.add.out)
        else:
            self._store(phase.linear, phase.norm)

    def _input(self, linear: ops.Linear, norm: ops.RmsNorm | None) -> Fields:
        """Where a linear phase takes its input from."""
        source = linear.x if norm is None else norm.x
        weight, offset, eps = self._norm(norm)
        fields: Fields = {"norm": weight, "norm_offset": offset, "norm_eps": eps}
        if self._quantised == source:
            self._quantised = None  # the next layer's buffer of this name may lie in plain floats
            return {**fields, "x": -1, "quantised": True}
        fields["x"] = self.buffer(source)
        return fields

    def _store(self, linear: ops.Linear, norm: ops.RmsNorm | None, add_to: str | None = None) -> None:
        source = self._input(linear, norm)
        grouped = self._groups_well(linear)
        parts = [tuple(range(len(linear.outs)))] if grouped else [(i,) for i in range(len(linear.outs))]
        for part in parts:
            names = tuple(linear.weights[i] for i in part)
            cols = self.tensor(names[0]).cols
            weight, layout = self.matrix(names)
            biases = tuple(linear.biases[i] for i in part) if linear.biases else ()
            outs = tuple(linear.outs[i] for i in part)
            buffers = [(self.buffer(add_to if add_to is not None else out), self.width(out)) for out in outs]
            self.executor.add_linear(
                weight=weight, bias=self._bias(ops.Linear(linear.x, names, outs, biases)),
                epilogue="store" if add_to is None else "add", outs=buffers,
                chunk_groups=self.chunk_groups(layout, cols), **source,
            )  # fmt: skip

    def _glu(self, phase: match.LinearPhase, following: match.Phase | None) -> None:
        linear, glu = phase.linear, phase.glu
        assert glu is not None
        tensors = [self.tensor(name) for name in linear.weights]
        width = self.width(glu.out)
        if tensors[0].format != tensors[1].format or width % self.group_rows:
            self._store(linear, phase.norm)
            self._plain(glu)
            return
        source = self._input(linear, phase.norm)
        consumer = self._quantised_consumer(glu.out, following)
        cols = tensors[0].cols
        weight, layout = self.matrix(linear.weights, interleave=True)
        unit = 2 * BLOCK // self.group_rows
        self.executor.add_linear(
            weight=weight, epilogue="glu", outs=[(self.buffer(glu.out), width)], act=ACTS[glu.act],
            chunk_groups=min(self.chunk_groups(layout, cols, unit), 16 * unit),
            glu_quantise=consumer is not None, glu_factor=SUM_FACTOR[consumer] if consumer else 1.0, **source,
        )  # fmt: skip
        self._quantised = glu.out if consumer is not None else None

    def _quantised_consumer(self, buffer: str, following: match.Phase | None) -> str | None:
        """The format of the one linear that reads a GLU's output next, if that takes int8 inputs."""
        if not isinstance(following, match.LinearPhase) or following.norm is not None:
            return None
        if (
            following.linear.x != buffer
            or following.glu is not None
            or not self._groups_well(following.linear)
        ):
            return None
        layout = self.tensor(following.linear.weights[0]).format
        if layout not in INTEGER_LAYOUTS or self.width(buffer) % BLOCK:
            return None
        readers = sum(buffer in op.names("reads") for op in self.plan.ops)
        writers = sum(buffer in op.names("writes") for op in self.plan.ops)
        return layout if readers <= writers else None

    def _attend(self, op: ops.Attention) -> None:
        self.executor.add_attention(
            q=self.buffer(op.q), out=self.buffer(op.out), group=self.groups[op.group], layer=op.layer,
            num_heads=op.num_heads, num_kv_heads=op.num_kv_heads, head_dim=op.head_dim,
            value_dim=op.value_dim, scale=op.scale, softcap=op.softcap, window=op.window,
            sinks=self.vector(op.sinks),
        )  # fmt: skip

    def _head(self, phase: match.HeadPhase) -> None:
        head = self.screened_head(phase.head.weight)
        weight, layout = (-1, "q8_0") if head is not None else self.matrix((phase.head.weight,))
        cols = self.width(phase.gather.out)
        size = _native.group_bytes(LAYOUTS[layout], self.group_rows, cols)
        norm, offset, eps = self._norm(phase.norm)
        if head is None:
            self.report.head_bytes = self.width(phase.head.out) // self.group_rows * size
        self.executor.add_lm_head(
            weight=weight, head=-1 if head is None else head, x=self.buffer(phase.gather.x), norm=norm,
            norm_offset=offset, norm_eps=eps, softcap=phase.head.softcap,
            chunk_groups=max(1, round(HEAD_CHUNK_BYTES / size)),
        )  # fmt: skip

    def _plain(self, op: ops.Op) -> None:
        emit = _PLAIN.get(type(op))
        if emit is None:
            raise PlanError(f"the cpu backend lacks {type(op).__name__}")
        self.executor.add_plain(op.kind, **emit(self, op))


def rope_tables(
    op: ops.Rope, positions: int, factors: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position * frequency, (positions, rotary_dim / 2); computed in double."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * rope_frequencies(op, factors)[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rms(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.RmsNorm)
    return {"x": b.buffer(op.x), "out": b.buffer(op.out), "weight": b.vector(op.weight), "eps": op.eps,
            "offset": op.weight_offset}  # fmt: skip


def _layer_norm(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.LayerNorm)
    return {"x": b.buffer(op.x), "out": b.buffer(op.out), "weight": b.vector(op.weight),
            "bias": b.vector(op.bias), "eps": op.eps}  # fmt: skip


def _head_norm(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.HeadNorm)
    return {"x": b.buffer(op.x), "out": b.buffer(op.out), "weight": b.vector(op.weight), "eps": op.eps,
            "offset": op.weight_offset, "head_dim": op.head_dim}  # fmt: skip


def _rope(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.Rope)
    return {"x": b.buffer(op.x), "out": b.buffer(op.out), "head_dim": op.head_dim, "rope": b.rope(op)}


def _kv_append(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.KvAppend)
    assert op.v is not None
    group = b.plan.groups[op.group]
    return {"x": b.buffer(op.k), "y": b.buffer(op.v), "head_dim": group.key_dim, "value_dim": group.value_dim,
            "num_kv_heads": group.num_heads, "group": b.groups[op.group], "layer": op.layer}  # fmt: skip


def _glu_op(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.Glu)
    return {"x": b.buffer(op.gate), "y": b.buffer(op.up), "out": b.buffer(op.out), "act": ACTS[op.act]}


def _activation(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.Activation)
    return {"x": b.buffer(op.x), "out": b.buffer(op.out), "act": ACTS[op.act]}


def _add(b: ProgramBuilder, op: ops.Op) -> Fields:
    assert isinstance(op, ops.Add)
    return {"x": b.buffer(op.a), "y": b.buffer(op.b), "out": b.buffer(op.out)}


def _unary(factor: str | None) -> Callable[[ProgramBuilder, ops.Op], Fields]:
    def emit(b: ProgramBuilder, op: ops.Op) -> Fields:
        assert isinstance(op, ops.Scale | ops.Softcap | ops.Copy)
        fields: Fields = {"x": b.buffer(op.x), "out": b.buffer(op.out)}
        if factor is not None:
            fields["factor"] = getattr(op, factor)
        return fields

    return emit


_PLAIN: Mapping[type[ops.Op], Callable[[ProgramBuilder, ops.Op], Fields]] = {
    ops.RmsNorm: _rms,
    ops.LayerNorm: _layer_norm,
    ops.HeadNorm: _head_norm,
    ops.Rope: _rope,
    ops.KvAppend: _kv_append,
    ops.Glu: _glu_op,
    ops.Activation: _activation,
    ops.Add: _add,
    ops.Scale: _unary("factor"),
    ops.Softcap: _unary("cap"),
    ops.Copy: _unary(None),
}

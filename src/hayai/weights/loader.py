"""Fills the weight slots of a plan from a model file.

A slot says where each container keeps it and how to get from the file's tensors to the slot's array. Rows
that are only selected or stacked keep the file's bits; where a transform has to take blocks apart, the
weights are decoded to float32 first, which loses nothing. The shape is checked at the end against the slot's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from hayai.errors import ModelError
from hayai.formats import FORMATS, QuantTensor
from hayai.plan.plan import Transform, WeightSlot


class TensorFile(Protocol):
    """What a container must offer: names and tensors (GgufFile does)."""

    @property
    def tensors(self) -> Mapping[str, object]: ...

    def read(self, name: str) -> QuantTensor: ...


class FileWeights:
    """Weights out of one file; implements `backends.base.WeightSource`.

    container: the key of `WeightSlot.sources`. slots: the plan's, needed only for slots with a `fallback`
    that is fetched through this object (a backend may resolve fallbacks itself, to share the copy).
    """

    def __init__(
        self, file: TensorFile, container: str = "gguf", slots: Mapping[str, WeightSlot] | None = None
    ) -> None:
        self.file = file
        self.container = container
        self.slots = dict(slots or {})

    def has(self, slot: WeightSlot) -> bool:
        """Whether the file itself holds the slot (its fallback does not count)."""
        return self._sources(slot) is not None

    def fetch(self, slot: WeightSlot) -> QuantTensor:
        """The slot's array, transforms applied. ModelError: not in the file, or of another shape."""
        names = self._sources(slot)
        if names is None:
            if slot.fallback in self.slots:
                return self.fetch(self.slots[slot.fallback])
            wanted = " or ".join(repr(name) for name in slot.sources.get(self.container, ()))
            raise ModelError(f"weight {slot.name}: the file lacks tensor {wanted or '(no source named)'}")
        tensors = [self.file.read(name) for name in names]
        label = f"weight {slot.name} (tensor {names[0]!r})"
        tensor = _stack(tensors, label) if _stacks(slot) else tensors[0]
        for transform in slot.transforms:
            if transform.kind != "stack":
                tensor = _TRANSFORMS[transform.kind](tensor, transform, label)
        return _shaped(tensor, slot, label)

    def _sources(self, slot: WeightSlot) -> tuple[str, ...] | None:
        """The tensors to read: all for a stack, else the first that exists; None where they are missing."""
        names = slot.sources.get(self.container, ())
        found = [name for name in names if name in self.file.tensors]
        if _stacks(slot):
            if found and len(found) < len(names):
                missing = next(name for name in names if name not in self.file.tensors)
                raise ModelError(f"weight {slot.name}: the file lacks tensor {missing!r} of {len(names)}")
            return names if found else None
        return (found[0],) if found else None


def _stacks(slot: WeightSlot) -> bool:
    return any(transform.kind == "stack" for transform in slot.transforms)


def _shaped(tensor: QuantTensor, slot: WeightSlot, label: str) -> QuantTensor:
    """Check the shape; leading dimensions of size 1 may differ (a bias kept as one row)."""

    def core(shape: tuple[int, ...]) -> tuple[int, ...]:
        lead = next((i for i, n in enumerate(shape[:-1]) if n != 1), len(shape) - 1)
        return shape[lead:]

    if core(tensor.shape) != core(slot.shape):
        raise ModelError(f"{label} has shape {list(tensor.shape)}; the model needs {list(slot.shape)}")
    return QuantTensor(tensor.format, slot.shape, tensor.data)


def _stack(tensors: list[QuantTensor], label: str) -> QuantTensor:
    """Stack along a new first axis; tensors of unlike formats become float32."""
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        shapes = sorted({str(list(tensor.shape)) for tensor in tensors})
        raise ModelError(f"{label} stacks tensors of unlike shapes: {', '.join(shapes)}")
    if any(tensor.format != first.format for tensor in tensors):
        tensors = [QuantTensor.from_float(tensor.dequantize(), "f32") for tensor in tensors]
    data = np.concatenate([tensor.data for tensor in tensors])
    return QuantTensor(tensors[0].format, (len(tensors), *first.shape), data)


def _select_rows(tensor: QuantTensor, transform: Transform, label: str) -> QuantTensor:
    """Rows [start, stop) of every block of `block` rows of each matrix; of a vector, its elements."""
    if len(tensor.shape) == 1:
        values = QuantTensor.from_float(tensor.dequantize()[:, None], "f32")
        column = _select_rows(values, transform, label)
        return QuantTensor("f32", (column.rows,), column.data.reshape(1, -1))
    *lead, rows, cols = tensor.shape
    start, stop, block = transform.start, transform.stop, transform.block or rows
    if rows % block or not 0 <= start < stop <= block:
        raise ModelError(f"{label} has {rows} rows; can't take rows {start} to {stop} of every {block}")
    width = tensor.data.shape[1]
    data = np.ascontiguousarray(tensor.data.reshape(-1, block, width)[:, start:stop]).reshape(-1, width)
    return QuantTensor(tensor.format, (*lead, rows // block * (stop - start), cols), data)


def _select_columns(tensor: QuantTensor, transform: Transform, label: str) -> QuantTensor:
    """Columns [start, stop); between block borders the weights are decoded."""
    start, stop = transform.start, transform.stop
    if not 0 <= start < stop <= tensor.cols:
        raise ModelError(f"{label} has {tensor.cols} columns; can't take columns {start} to {stop}")
    fmt = FORMATS[tensor.format]
    if start % fmt.block_elements or stop % fmt.block_elements:
        return QuantTensor.from_float(tensor.dequantize()[..., start:stop], "f32")
    data = np.ascontiguousarray(tensor.data[:, fmt.row_bytes(start) : fmt.row_bytes(stop)])
    return QuantTensor(tensor.format, (*tensor.shape[:-1], stop - start), data)


def _split_heads(tensor: QuantTensor, transform: Transform, label: str) -> QuantTensor:
    """(heads * out, in) -> (heads, out, in)."""
    heads = transform.heads
    if len(tensor.shape) == 3 and tensor.shape[0] == heads:
        return tensor
    if len(tensor.shape) != 2 or heads < 1 or tensor.shape[0] % heads:
        raise ModelError(f"{label} of shape {list(tensor.shape)} can't be cut into {heads} heads")
    return QuantTensor(tensor.format, (heads, tensor.shape[0] // heads, tensor.cols), tensor.data)


def _transpose_heads(tensor: QuantTensor, transform: Transform, label: str) -> QuantTensor:
    """(heads * out, in) -> (heads, in, out), as float32."""
    heads = _split_heads(tensor, transform, label)
    return QuantTensor.from_float(heads.dequantize().transpose(0, 2, 1), "f32")


_TRANSFORMS: Mapping[str, Callable[[QuantTensor, Transform, str], QuantTensor]] = {
    "rows": _select_rows,
    "columns": _select_columns,
    "heads": _split_heads,
    "heads_t": _transpose_heads,
}

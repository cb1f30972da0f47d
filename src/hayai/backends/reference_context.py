"""What an op of the reference backend works on: the step's buffers, the weights, the caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import StepInput, WeightSource
from hayai.backends.reference_cache import Cache
from hayai.backends.sampling_reference import SampledRow
from hayai.errors import ModelError, PlanError
from hayai.formats import QuantTensor
from hayai.plan.plan import Plan, WeightSlot

FLOAT_FORMATS = ("f32", "f16", "bf16")


class Weights:
    """The slots of all plans: fetched at once, made float32 when first asked for, then kept."""

    def __init__(self, plans: Mapping[str, Plan], source: WeightSource) -> None:
        self._slots: dict[str, WeightSlot] = {}
        for plan in plans.values():
            for name, slot in plan.slots.items():
                if self._slots.setdefault(name, slot) != slot:
                    raise PlanError(f"weight slot {name} differs between plans {', '.join(plans)}")
        self._formats: dict[str, str] = {}
        self._raw: dict[str, QuantTensor] = {}
        self._floats: dict[str, NDArray[np.float32]] = {}
        self._holder: dict[str, str | None] = {name: self._find(name, source) for name in self._slots}
        for name in sorted({holder for holder in self._holder.values() if holder is not None}):
            tensor = source.fetch(self._slots[name])
            if tensor.shape != self._slots[name].shape:
                raise ModelError(
                    f"weight {name}: the file gives shape {tensor.shape}, the model needs "
                    f"{self._slots[name].shape}"
                )
            self._raw[name], self._formats[name] = tensor, tensor.format

    def _find(self, name: str, source: WeightSource) -> str | None:
        """The slot that really holds the weight: itself, or its fallback; None for an optional one."""
        slot = self._slots[name]
        if source.has(slot):
            return name
        if slot.fallback is not None:
            return self._find(slot.fallback, source)
        if slot.optional:
            return None
        names = sorted({tensor for names in slot.sources.values() for tensor in names})
        raise ModelError(f"the file has no tensor for weight {name}; looked for: {', '.join(names[:4])}")

    def get(self, name: str) -> NDArray[np.float32] | None:
        """The slot as float32; None for an optional slot that the file lacks."""
        holder = self._holder[name]
        if holder is None:
            return None
        if holder not in self._floats:
            self._floats[holder] = self._raw.pop(holder).dequantize()
        return self._floats[holder]

    def need(self, name: str) -> NDArray[np.float32]:
        found = self.get(name)
        if found is None:
            raise ModelError(f"the file has no tensor for weight {name}, and this op can't do without")
        return found

    def is_integer(self, name: str) -> bool:
        """Whether the slot's format is an integer one (its kernels take int8 activations)."""
        holder = self._holder[name]
        return holder is not None and self._formats[holder] not in FLOAT_FORMATS


@dataclass
class StepContext:
    """One step of one rank: `env` maps buffer names to arrays; ops read from it and write to it."""

    plan: Plan
    step: StepInput
    weights: Weights
    caches: Mapping[str, Cache]
    quantize_activations: bool
    env: dict[str, NDArray[Any]] = field(default_factory=dict)
    samples: list[SampledRow] = field(default_factory=list)
    logits: NDArray[np.float32] | None = None

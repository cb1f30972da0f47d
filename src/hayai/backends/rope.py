"""Rotary frequencies with their scaling: one definition for every backend.

Sources: Su et al. 2021 (rotary embedding); Llama 3.1's reference code (scaling "llama3").
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hayai.plan import ops


def rope_frequencies(op: ops.Rope, factors: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """Radians per position of each rotated pair (rotary_dim / 2), scaling applied."""
    freqs = op.theta ** (-2.0 * np.arange(op.rotary_dim // 2) / op.rotary_dim)
    scaling = op.scaling
    if scaling is None:
        return freqs
    if scaling.kind == "factors":
        return freqs if factors is None else freqs / factors.astype(np.float64)
    if scaling.kind == "linear":
        return freqs / scaling.factor
    context, low, high = scaling.original_context, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / freqs
    blend = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * freqs / scaling.factor + blend * freqs

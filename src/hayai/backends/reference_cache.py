"""Paged caches of the reference backend: keys and values by block table, as plain arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE
from hayai.plan.plan import CacheGroup

HALF_MAX = 65504.0

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class PagedCache:
    """Blocks of 16 positions of every layer of one group (kinds full, window, mla and index).

    Each stored vector of a position is an array of its own: (blocks, layers, 16, width). full, window:
    keys and values of all kv heads; mla: latent and rope part; index: keys only.
    """

    def __init__(self, group: CacheGroup, num_blocks: int, dtype: type[np.floating] | type[np.int8]) -> None:
        heads = group.num_heads if group.kind in ("full", "window") else 1
        widths = [heads * group.key_dim]
        if group.kind != "index":
            widths.append(heads * group.value_dim)
        self.group = group
        self.arrays = [np.zeros((num_blocks, group.num_layers, BLOCK_SIZE, w), dtype) for w in widths]

    def append(self, layer: int, slots: Ints, table: Ints, parts: list[Floats]) -> None:
        """Store rows (N, width) of each part at cache positions `slots` (N) of one sequence."""
        blocks = table[slots // BLOCK_SIZE]
        for array, rows in zip(self.arrays, parts, strict=True):
            array[blocks, layer, slots % BLOCK_SIZE] = clamp(rows, float(np.finfo(array.dtype).max))

    def read(self, layer: int, table: Ints, length: int) -> list[Floats]:
        """Positions 0 .. length-1 of one sequence as float32 (length, width), one array per part."""
        blocks = table[: -(-length // BLOCK_SIZE)]
        return [
            array[blocks, layer].reshape(-1, array.shape[-1])[:length].astype(np.float32)
            for array in self.arrays
        ]

    def copy_blocks(self, sources: Ints, targets: Ints) -> None:
        for array in self.arrays:
            array[targets] = array[sources]


class ByteCache(PagedCache):
    """Keys and values as base.KV_FORMATS['q8'] has them: codes, and scales of their own per head."""

    def __init__(self, group: CacheGroup, num_blocks: int) -> None:
        super().__init__(group, num_blocks, np.int8)
        shape = (num_blocks, group.num_layers, BLOCK_SIZE, group.num_heads)
        self.scales = [np.zeros(shape, np.float16) for _ in self.arrays]

    def append(self, layer: int, slots: Ints, table: Ints, parts: list[Floats]) -> None:
        at = (table[slots // BLOCK_SIZE], layer, slots % BLOCK_SIZE)
        for array, scales, rows in zip(self.arrays, self.scales, parts, strict=True):
            codes, scale = encode_q8(rows.reshape(len(rows), self.group.num_heads, -1))
            array[at], scales[at] = codes.reshape(rows.shape), scale

    def read(self, layer: int, table: Ints, length: int) -> list[Floats]:
        blocks = table[: -(-length // BLOCK_SIZE)]
        found = []
        for codes, scales in zip(super().read(layer, table, length), self.scales, strict=True):
            scale = scales[blocks, layer].reshape(-1, self.group.num_heads, 1)[:length].astype(np.float32)
            found.append((codes.reshape(length, self.group.num_heads, -1) * scale).reshape(codes.shape))
        return found

    def copy_blocks(self, sources: Ints, targets: Ints) -> None:
        super().copy_blocks(sources, targets)
        for array in self.scales:
            array[targets] = array[sources]


def clamp(x: Floats, most: float) -> Floats:
    """Within [-most, most], NaN as `most`: a cache holds finite numbers only (base.KV_FORMATS)."""
    return np.clip(np.where(np.isnan(x), np.float32(most), x), -np.float32(most), np.float32(most))


def encode_q8(x: Floats) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """x (..., dims) to codes (..., dims) and scales (...)."""
    x = clamp(x, 127 * HALF_MAX)
    scale = (np.abs(x).max(axis=-1) / np.float32(127)).astype(np.float16)
    divisor = scale.astype(np.float32)[..., None]
    ratio = np.divide(x, divisor, out=np.zeros_like(x), where=divisor > 0)
    return np.rint(np.clip(ratio, -127, 127)).astype(np.int8), scale


class StateCache:
    """Recurrent states (group kind state): block_tables[group][s, 0] is the state's number.

    A state is (heads, key_dim, value_dim) float32 per layer, zero before position 0.
    """

    def __init__(self, group: CacheGroup) -> None:
        self.group = group
        self.states: dict[tuple[int, int], Floats] = {}

    def get(self, block: int, layer: int) -> Floats:
        shape = (self.group.num_heads, self.group.key_dim, self.group.value_dim)
        return self.states.get((block, layer), np.zeros(shape, np.float32))

    def put(self, block: int, layer: int, state: Floats) -> None:
        self.states[block, layer] = state

    def copy_blocks(self, sources: Ints, targets: Ints) -> None:
        found = {
            (int(target), layer): self.get(int(source), layer).copy()
            for source, target in zip(sources, targets, strict=True)
            for layer in range(self.group.num_layers)
        }
        self.states.update(found)


Cache = PagedCache | StateCache

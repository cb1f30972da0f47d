"""Paged caches of the reference backend: keys and values by block table, as plain arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE
from hayai.plan.plan import CacheGroup

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class PagedCache:
    """Blocks of 16 positions of every layer of one group (kinds full, window, mla and index).

    Each stored vector of a position is an array of its own: (blocks, layers, 16, width). full, window:
    keys and values of all kv heads; mla: latent and rope part; index: keys only.
    """

    def __init__(self, group: CacheGroup, num_blocks: int, dtype: type[np.floating]) -> None:
        heads = group.num_heads if group.kind in ("full", "window") else 1
        widths = [heads * group.key_dim]
        if group.kind != "index":
            widths.append(heads * group.value_dim)
        self.group = group
        self.arrays = [np.zeros((num_blocks, group.num_layers, BLOCK_SIZE, w), dtype) for w in widths]

    def append(self, layer: int, slots: Ints, table: Ints, parts: list[Floats]) -> None:
        """Store rows (N, width) of each part at cache positions `slots` (N) of one sequence."""
        blocks = table[slots // BLOCK_SIZE]
        # A value beyond float16 becomes infinite in the cache, as it does on any backend.
        with np.errstate(over="ignore"):
            for array, rows in zip(self.arrays, parts, strict=True):
                array[blocks, layer, slots % BLOCK_SIZE] = rows

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

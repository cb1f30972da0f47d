"""Packing: a permutation of the file's bytes, and back."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import (
    ISAS,
    KERNELS,
    LAYOUTS,
    ROW_COUNTS,
    Array,
    Layout,
    aligned,
    even_up,
    group_bytes,
    pack,
)

from hayai import _native

SHAPES = {"q4_0": (1, 4), "q4_1": (2, 4), "q8_0": (1, 8)}
"""fp16 values and 4-byte words of a file block."""


def packed_twin(layout: Layout, group_rows: int, rows: Array, cols: int) -> Array:
    count = even_up(len(rows), group_rows)
    padded = np.zeros((count, rows.shape[1]), np.uint8)
    padded[: len(rows)] = rows
    if layout.is_float:
        size = rows.shape[1] // cols
        return padded.reshape(-1, group_rows, cols, size).transpose(0, 2, 1, 3).reshape(-1)
    scales, words = SHAPES[layout.name]
    blocks = padded.reshape(-1, group_rows, cols // 32, 2 * scales + 4 * words).transpose(0, 2, 1, 3)
    parts = []
    for s in range(scales):
        parts.append(blocks[..., 2 * s : 2 * s + 2].reshape(*blocks.shape[:2], -1))
    codes = blocks[..., 2 * scales :].reshape(*blocks.shape[:3], words, 4).transpose(0, 1, 3, 2, 4)
    parts.append(codes.reshape(*blocks.shape[:2], -1))
    return np.concatenate(parts, axis=2).reshape(-1)


@pytest.mark.parametrize("group_rows", [8, 16])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_permutation(group_rows: int, name: str, num_rows: int) -> None:
    layout, cols = LAYOUTS[name], 96
    rows = layout.random(np.random.default_rng(num_rows), num_rows, cols)
    assert np.array_equal(pack(layout, group_rows, rows, cols), packed_twin(layout, group_rows, rows, cols))


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrices_are_concatenated_in_the_middle_of_a_group(name: str) -> None:
    layout, cols = LAYOUTS[name], 64
    rows = layout.random(np.random.default_rng(0), 29, cols)
    stride = group_bytes(layout, 8, cols)
    out = aligned(4 * stride, np.uint8, 0xFF)
    for first, last in ((0, 5), (5, 19), (19, 29)):
        _native.pack_rows(layout.id, 8, rows[first:last], cols, first, out, stride)
    assert np.array_equal(out, packed_twin(layout, 8, rows, cols))


def test_two_matrices_are_interleaved_by_groups() -> None:
    layout, cols, rng = LAYOUTS["q4_1"], 64, np.random.default_rng(0)
    gate, up = layout.random(rng, 24, cols), layout.random(rng, 24, cols)
    size = group_bytes(layout, 8, cols)
    out = aligned(6 * size, np.uint8, 0xFF)
    _native.pack_rows(layout.id, 8, gate, cols, 0, out[: 5 * size], 2 * size)
    _native.pack_rows(layout.id, 8, up, cols, 0, out[size:], 2 * size)
    groups = out.reshape(3, 2, size)
    assert np.array_equal(groups[:, 0].reshape(-1), pack(layout, 8, gate, cols))
    assert np.array_equal(groups[:, 1].reshape(-1), pack(layout, 8, up, cols))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_unpack_row(isa: str, name: str) -> None:
    layout, cols, kernels = LAYOUTS[name], 96, KERNELS[isa]
    rows = layout.random(np.random.default_rng(1), 19, cols)
    packed = pack(layout, kernels.group_rows, rows, cols)
    want = layout.decode(rows)
    out = aligned(cols)
    for row in range(19):
        kernels.unpack_row(layout.id, packed, row, cols, out)
        # At most two roundings: of the product and of the minimum's sum.
        np.testing.assert_allclose(out, want[row], rtol=0, atol=2.0**-23 * np.abs(want[row]).max())


def test_arguments_that_do_not_fit_are_refused() -> None:
    rows = LAYOUTS["q4_1"].random(np.random.default_rng(1), 8, 64)
    with pytest.raises(ValueError, match="layout"):
        _native.pack_rows(9, 8, rows, 64, 0, aligned(4096, np.uint8), 320)
    with pytest.raises(ValueError, match="fit"):
        _native.pack_rows(1, 8, rows, 64, 0, aligned(100, np.uint8), 320)
    with pytest.raises(ValueError, match="unknown"):
        _native.Kernels("avx1024")

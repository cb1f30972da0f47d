"""What the kernel tests share: weight formats as numpy, memory with a guard page, twins of the layouts.

A kernel's result is compared with float64 arithmetic on the same quantised operands. The bound is that of a
chain of n rounded operations, n * 2^-24 times the sum of the absolute terms; `CHAIN` says how n follows from
the number of inputs for each format.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hayai import _native

Array = NDArray[Any]

ISAS: tuple[str, ...] = tuple(_native.kernel_isas())
KERNELS = {isa: _native.Kernels(isa) for isa in ISAS}
EPS = 2.0**-24
ROW_COUNTS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33)
TOKEN_COUNTS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 15, 16, 17, 31, 33)
COLUMN_COUNTS = (32, 64, 96, 160, 576, 1536)


def even_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------- memory


def aligned(shape: int | tuple[int, ...], dtype: Any = np.float32, fill: float | None = None) -> Array:
    """An array on a 64-byte boundary; `fill` None leaves zeros."""
    count = int(np.prod(shape))
    size = np.dtype(dtype).itemsize
    raw = np.zeros(count * size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + count * size].view(dtype).reshape(shape)
    if fill is not None:
        out[...] = fill
    return out


class Guarded:
    """Copies of arrays that end exactly where a page without access begins: reading past them is a crash."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def __call__(self, array: Array) -> Array:
        page = mmap.PAGESIZE
        body = max(even_up(array.nbytes, page), page)
        region = mmap.mmap(-1, body + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + body), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self._maps.append(region)
        start = body - array.nbytes
        out = np.frombuffer(region, array.dtype, array.size, start).reshape(array.shape)
        out[...] = array
        return out


# ---------------------------------------------------------------- weight formats


@dataclass(frozen=True)
class Layout:
    """One packed layout. `random(rng, rows, cols)` gives file bytes, `decode` the weights in float64."""

    name: str
    id: int
    is_float: bool
    factor: float
    decode: Callable[[Array], Array]
    random: Callable[[np.random.Generator, int, int], Array]


def _scales(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (rng.normal(size=shape) * 0.01).astype(np.float16)[..., None].view(np.uint8)


def _random_blocks(num_scales: int, code_bytes: int) -> Callable[[np.random.Generator, int, int], Array]:
    def make(rng: np.random.Generator, rows: int, cols: int) -> Array:
        shape = (rows, cols // 32)
        parts = [_scales(rng, shape) for _ in range(num_scales)]
        parts.append(rng.integers(0, 256, (*shape, code_bytes), np.uint8))
        return np.concatenate(parts, axis=2).reshape(rows, -1)

    return make


def _blocks(rows: Array, block_bytes: int) -> Array:
    return rows.reshape(len(rows), -1, block_bytes)


def _half(blocks: Array, at: int) -> Array:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float64)


def nibbles(codes: Array) -> Array:
    return np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float64)


def _decode_q4_0(rows: Array) -> Array:
    b = _blocks(rows, 18)
    return (_half(b, 0) * (nibbles(b[..., 2:]) - 8)).reshape(len(rows), -1)


def _decode_q4_1(rows: Array) -> Array:
    b = _blocks(rows, 20)
    return (_half(b, 0) * nibbles(b[..., 4:]) + _half(b, 2)).reshape(len(rows), -1)


def _decode_q8_0(rows: Array) -> Array:
    b = _blocks(rows, 34)
    codes = np.ascontiguousarray(b[..., 2:]).view(np.int8)
    return (_half(b, 0) * codes.astype(np.float64)).reshape(len(rows), -1)


def _random_float(dtype: Any) -> Callable[[np.random.Generator, int, int], Array]:
    def make(rng: np.random.Generator, rows: int, cols: int) -> Array:
        values = rng.normal(size=(rows, cols)).astype(np.float32)
        if dtype == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, -1)
        return values.astype(dtype).view(np.uint8).reshape(rows, -1)

    return make


def _decode_bf16(rows: Array) -> Array:
    bits = np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("q4_0", 0, False, -8, _decode_q4_0, _random_blocks(1, 16)),
        Layout("q4_1", 1, False, 1, _decode_q4_1, _random_blocks(2, 16)),
        Layout("q8_0", 2, False, 1, _decode_q8_0, _random_blocks(1, 32)),
        Layout("f16", 3, True, 1, lambda r: r.view(np.float16).astype(np.float64), _random_float(np.float16)),
        Layout("bf16", 4, True, 1, _decode_bf16, _random_float("bf16")),
        Layout("f32", 5, True, 1, lambda r: r.view(np.float32).astype(np.float64), _random_float(np.float32)),
    )
}
INTEGER_LAYOUTS = tuple(name for name, layout in LAYOUTS.items() if not layout.is_float)


# Rounded operations in one output's chain, from the number of inputs.
CHAIN: dict[str, Callable[[int], int]] = {
    "q4_0": lambda cols: 2 * cols // 32 + 4,
    "q4_1": lambda cols: 2 * cols // 32 + 4,
    "q8_0": lambda cols: 2 * cols // 32 + 4,
    "f16": lambda cols: 2 * cols,
    "bf16": lambda cols: 2 * cols,
    "f32": lambda cols: 2 * cols,
}


def pack(layout: Layout, group_rows: int, rows: Array, cols: int) -> Array:
    """Packed bytes of whole groups."""
    groups = even_up(len(rows), group_rows) // group_rows
    stride = group_bytes(layout, group_rows, cols)
    out = aligned(groups * stride, np.uint8, 0xFF)
    _native.pack_rows(layout.id, group_rows, rows, cols, 0, out, stride)
    return out


BITS_PER_BLOCK = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


def group_bytes(layout: Layout, group_rows: int, cols: int) -> int:
    if layout.is_float:
        return ELEMENT_BYTES[layout.name] * group_rows * cols
    return BITS_PER_BLOCK[layout.name] * group_rows * (cols // 32)


# ---------------------------------------------------------------- activations


@dataclass(frozen=True)
class Activations:
    """`x` (tokens, cols) fp32, and q, scale, sum of each token for one layout."""

    x: Array
    q: Array
    scale: Array
    sum: Array

    @property
    def tokens(self) -> int:
        return len(self.x)

    def tiles(self) -> tuple[Array, Array, Array]:
        """q, scale and sum in tiles of four tokens, missing ones zero."""
        tokens, cols = self.x.shape
        tiles, blocks = even_up(tokens, 4) // 4, cols // 32
        padded = np.zeros((tiles * 4, cols), np.int8)
        padded[:tokens] = self.q
        q = padded.reshape(tiles, 4, blocks, 8, 4).transpose(0, 2, 3, 1, 4)
        out_q = aligned(tiles * 4 * cols, np.int8)
        out_q[...] = q.reshape(-1)

        def per_block(values: Array) -> Array:
            full = np.zeros((tiles * 4, blocks), np.float32)
            full[:tokens] = values
            return np.ascontiguousarray(full.reshape(tiles, 4, blocks).transpose(0, 2, 1)).reshape(-1)

        return out_q, per_block(self.scale), per_block(self.sum)


def quantize(kernels: Any, x: Array, factor: float) -> Activations:
    tokens, cols = x.shape
    blocks = cols // 32
    q = aligned((tokens, cols), np.int8)
    scale, total = aligned((tokens, blocks)), aligned((tokens, blocks))
    for t in range(tokens):
        kernels.quantize(np.ascontiguousarray(x[t]), factor, q[t], scale[t], total[t])
    return Activations(np.ascontiguousarray(x, np.float32), q, scale, total)


def from_codes(q: Array, scale: Array, factor: float) -> Activations:
    """Activations with chosen codes and scales."""
    blocks = q.reshape(len(q), -1, 32).astype(np.float64).sum(axis=2)
    total = (np.float32(factor) * scale * blocks.astype(np.float32)).astype(np.float32)
    x = (q.reshape(*scale.shape, 32) * scale[..., None]).reshape(q.shape).astype(np.float32)
    return Activations(x, np.ascontiguousarray(q, np.int8), np.ascontiguousarray(scale, np.float32), total)


def random_activations(
    kernels: Any, rng: np.random.Generator, tokens: int, cols: int, layout: Layout
) -> Activations:
    x = rng.normal(size=(tokens, cols)).astype(np.float32)
    if layout.is_float:
        return Activations(
            x,
            np.zeros((tokens, 0), np.int8),
            np.zeros((tokens, 0), np.float32),
            np.zeros((tokens, 0), np.float32),
        )
    return quantize(kernels, x, layout.factor)


def expected(layout: Layout, rows: Array, a: Activations) -> tuple[Array, Array]:
    """Outputs (tokens, rows) in float64 and the sums of absolute terms that the error bound scales with."""
    w = layout.decode(rows)
    if layout.is_float:
        x = a.x.astype(np.float64)
        return x @ w.T, np.abs(x) @ np.abs(w).T
    x = (a.q.reshape(*a.scale.shape, 32).astype(np.float64) * a.scale[..., None]).reshape(a.q.shape)
    magnitude = np.abs(x) @ np.abs(w).T
    # Offsets and minima enter through the rounded `sum`, so their part has its own magnitude.
    blocks = rows.reshape(len(rows), a.scale.shape[1], -1)
    if layout.name == "q4_0":
        magnitude = magnitude + 2 * np.abs(a.sum.astype(np.float64)) @ np.abs(_half(blocks, 0)[..., 0]).T
        codes = nibbles(blocks[..., 2:]).reshape(len(rows), -1)
        magnitude = magnitude + np.abs(x) @ np.abs(np.repeat(_half(blocks, 0)[..., 0], 32, axis=1) * codes).T
    if layout.name == "q4_1":
        codes = nibbles(blocks[..., 4:]).reshape(len(rows), -1)
        magnitude = magnitude + np.abs(x) @ np.abs(np.repeat(_half(blocks, 0)[..., 0], 32, axis=1) * codes).T
        magnitude = magnitude + np.abs(a.sum.astype(np.float64)) @ np.abs(_half(blocks, 2)[..., 0]).T
    return x @ w.T, magnitude


# ---------------------------------------------------------------- calls


def gemv(kernels: Any, layout: Layout, packed: Array, cols: int, a: Activations, token: int = 0) -> Array:
    groups = len(packed) // group_bytes(layout, kernels.group_rows, cols)
    y = aligned(groups * kernels.group_rows, fill=np.nan)
    kernels.gemv(layout.id, packed, cols, a.q[token], a.scale[token], a.sum[token], a.x[token], y)
    return y


def gemm(kernels: Any, layout: Layout, packed: Array, cols: int, a: Activations) -> Array:
    groups = len(packed) // group_bytes(layout, kernels.group_rows, cols)
    rows = groups * kernels.group_rows
    y = aligned((a.tokens, even_up(rows, 16) + 16), fill=np.nan)
    empty_q, empty = np.zeros(0, np.int8), np.zeros(0, np.float32)
    q, scale, total = (empty_q, empty, empty) if layout.is_float else a.tiles()
    kernels.gemm(layout.id, packed, cols, a.tokens, q, scale, total, a.x, y)
    assert np.isnan(y[:, rows:]).all(), "wrote behind the last row"
    return y[:, :rows]


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()

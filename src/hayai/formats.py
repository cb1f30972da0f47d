"""Weight formats: how a tensor's bits become numbers. The truth about bits for every other room.

A row of a tensor is a run of blocks; a block is `block_elements` weights in `block_bytes` bytes. The layouts
are those of GGML (ggml-common.h, block_q4_0 and its siblings); numbers are little-endian.

  f32, f16, bf16         plain elements
  q8_0, q4_0, q5_0       32 weights: fp16 scale d,             w = d * (code - offset)
  q4_1, q5_1             32 weights: fp16 d, fp16 minimum m,   w = d * code + m
  q2_k .. q6_k           256 weights ("superblock"): fp16 d (and dmin), small integer scales per 16 or 32
                         weights,                              w = (d * scale) * code - (dmin * min)

`decode` computes in float32 in exactly that order, so that it gives the bits of GGML's own dequantiser.
Scales that are infinite or NaN decode as the formula says (inf * 0 = NaN) and raise nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hayai.errors import ModelError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_ELEMENTS = 1 << 20
"""Weights that are coded at once: temporaries stay in the cache and small beside the result."""


@dataclass(frozen=True)
class Format:
    """One weight format.

    decode: blocks (N, block_bytes) uint8 -> weights (N, block_elements) float32.
    encode: the reverse. Up to q5_1 with the bits of GGML's reference quantiser; the superblock formats are
      rounded to nearest from each run's extremes, without GGML's search for better scales.
    ggml_type: the format's number in a GGUF file.
    """

    name: str
    block_elements: int
    block_bytes: int
    ggml_type: int
    decode: Callable[[Bytes], Floats]
    encode: Callable[[Floats], Bytes]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_elements

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights; ModelError where they are not a whole number of blocks."""
        if cols % self.block_elements:
            raise ModelError(
                f"a row of {cols} weights can't be {self.name}: its blocks hold {self.block_elements} each"
            )
        return cols // self.block_elements * self.block_bytes


def get_format(name: str) -> Format:
    """The format called `name`; ModelError names what is supported."""
    if name not in FORMATS:
        raise ModelError(f"unknown weight format {name!r}; supported: {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A tensor as its file keeps it: `data` (prod(shape[:-1]), row_bytes) uint8, rows in C order."""

    format: str
    shape: tuple[int, ...]
    data: Bytes

    def __post_init__(self) -> None:
        wanted = (self.rows, get_format(self.format).row_bytes(self.cols))
        if self.data.dtype != np.uint8 or self.data.shape != wanted:
            raise ValueError(
                f"{self.format} of shape {self.shape} needs uint8 data {wanted}, "
                f"not {self.data.dtype} {self.data.shape}"
            )

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last (1 for a vector)."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def dequantize(self) -> Floats:
        """The weights as float32 of `shape`; always a new array."""
        fmt = FORMATS[self.format]
        blocks = np.ascontiguousarray(self.data).reshape(-1, fmt.block_bytes)
        out = np.empty((len(blocks), fmt.block_elements), np.float32)
        step = max(1, _CHUNK_ELEMENTS // fmt.block_elements)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), step):
                out[start : start + step] = fmt.decode(blocks[start : start + step])
        return out.reshape(self.shape)

    @classmethod
    def from_float(cls, array: ArrayLike, format: str) -> QuantTensor:
        """Encode float weights of any shape. ModelError: unknown format, or a row is not whole blocks."""
        fmt = get_format(format)
        values = np.ascontiguousarray(array, dtype=np.float32)
        shape = values.shape or (1,)
        row_bytes = fmt.row_bytes(shape[-1])
        blocks = values.reshape(-1, fmt.block_elements)
        out = np.empty((len(blocks), fmt.block_bytes), np.uint8)
        step = max(1, _CHUNK_ELEMENTS // fmt.block_elements)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), step):
                out[start : start + step] = fmt.encode(blocks[start : start + step])
        return cls(format, tuple(shape), out.reshape(math.prod(shape[:-1]), row_bytes))


# ---------------------------------------------------------------- parts shared by the decoders


def _half(blocks: Bytes, start: int) -> Floats:
    """The fp16 number at byte `start` of every block, as float32 (N, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _half_bytes(values: Floats) -> Bytes:
    """float32 (N, 1) -> fp16 bytes (N, 2), rounded to nearest even."""
    return values.astype("<f2").view(np.uint8)


def _fields(packed: Bytes, group: int, bits: int) -> Bytes:
    """Split bytes into fields of `bits`, lowest first: all first fields of a group, then its second ones ...

    packed (N, k * group) -> codes (N, k * group * 8/bits), the order of the weights in every GGML format.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    split = packed.reshape(len(packed), -1, 1, group) >> shifts  # (N, k, fields, group)
    return (split & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _pack(codes: Bytes, group: int, bits: int) -> Bytes:
    """The reverse of `_fields`; bits of a code above the field are dropped."""
    fields = 8 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    split = (codes & np.uint8((1 << bits) - 1)).reshape(len(codes), -1, fields, group) << shifts
    packed: Bytes = np.bitwise_or.reduce(split, axis=2)
    return packed.reshape(len(codes), -1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """q5_0, q5_1: 32 bits at byte `start` of every block -> bit 4 of 32 codes (N, 32)."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _pack_fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=-1, bitorder="little")


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """q4_k, q5_k: 12 bytes -> eight 6-bit scales and eight 6-bit minima, each (N, 8).

    Scales 0-3 are the low six bits of bytes 0-3, minima 0-3 those of bytes 4-7. Scales 4-7 (minima 4-7) have
    their low four bits in the low (high) halves of bytes 8-11, their high two on top of bytes 0-3 (4-7).
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scales, minima


def _pack_k_scales(scales: Bytes, minima: Bytes) -> Bytes:
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    third = (scales[:, 4:] & 15) | (minima[:, 4:] << 4)
    return np.concatenate([first, second, third], axis=-1)


def _scaled(scale: Floats, codes: NDArray[np.uint8] | NDArray[np.int8]) -> Floats:
    """scale (N, g) times codes (N, g * m), each scale for its run of m codes -> (N, g, m)."""
    return scale[:, :, None] * codes.reshape(*scale.shape, -1).astype(np.float32)


# ---------------------------------------------------------------- plain elements


def _decode_f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32, copy=False)


def _encode_f32(values: Floats) -> Bytes:
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)


def _decode_f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _encode_f16(values: Floats) -> Bytes:
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def _decode_bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _encode_bf16(values: Floats) -> Bytes:
    """Round to nearest even; NaN stays NaN (made quiet), overflow becomes infinity."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 64, rounded).astype("<u2").view(np.uint8)


# ---------------------------------------------------------------- blocks of 32


def _decode_q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _decode_q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 16, 4).astype(np.float32) - 8)


def _decode_q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _fields(blocks[:, 4:], 16, 4).astype(np.float32) + _half(blocks, 2)


def _decode_q5_0(blocks: Bytes) -> Floats:
    codes = _fields(blocks[:, 6:], 16, 4) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _decode_q5_1(blocks: Bytes) -> Floats:
    codes = _fields(blocks[:, 8:], 16, 4) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where the scale is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _codes_about_zero(values: Floats, bits: int) -> tuple[Floats, Bytes]:
    """Scale (N, 1) and codes 0 .. 2^bits-1, zero at 2^(bits-1), the extreme value exact at code 0."""
    middle = 1 << (bits - 1)
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=-1, keepdims=True), axis=-1)
    scale = extreme / np.float32(-middle)
    codes = np.trunc(values * _inverse(scale) + np.float32(middle + 0.5))
    return scale, np.nan_to_num(codes).clip(0, 2 * middle - 1).astype(np.uint8)


def _codes_above_minimum(values: Floats, bits: int) -> tuple[Floats, Floats, Bytes]:
    """Scale (N, 1), minimum (N, 1) and codes 0 .. 2^bits-1."""
    top = (1 << bits) - 1
    low = values.min(axis=-1, keepdims=True)
    scale = (values.max(axis=-1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((values - low) * _inverse(scale) + np.float32(0.5))
    return scale, low, np.nan_to_num(codes).clip(0, top).astype(np.uint8)


def _encode_q8_0(values: Floats) -> Bytes:
    scale = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(scale)
    # GGML rounds halves away from zero (roundf), numpy's rint to even.
    whole = np.trunc(scaled)
    codes = whole + np.trunc(2 * (scaled - whole))
    return np.concatenate([_half_bytes(scale), np.nan_to_num(codes).astype(np.int8).view(np.uint8)], axis=-1)


def _encode_q4_0(values: Floats) -> Bytes:
    scale, codes = _codes_about_zero(values, 4)
    return np.concatenate([_half_bytes(scale), _pack(codes, 16, 4)], axis=-1)


def _encode_q4_1(values: Floats) -> Bytes:
    scale, low, codes = _codes_above_minimum(values, 4)
    return np.concatenate([_half_bytes(scale), _half_bytes(low), _pack(codes, 16, 4)], axis=-1)


def _encode_q5_0(values: Floats) -> Bytes:
    scale, codes = _codes_about_zero(values, 5)
    return np.concatenate([_half_bytes(scale), _pack_fifth_bits(codes), _pack(codes, 16, 4)], axis=-1)


def _encode_q5_1(values: Floats) -> Bytes:
    scale, low, codes = _codes_above_minimum(values, 5)
    parts = [_half_bytes(scale), _half_bytes(low), _pack_fifth_bits(codes), _pack(codes, 16, 4)]
    return np.concatenate(parts, axis=-1)


# ---------------------------------------------------------------- superblocks of 256


def _decode_q2_k(blocks: Bytes) -> Floats:
    """scales and minima 16 x (4 + 4 bits) | codes 64 bytes | d | dmin."""
    scale = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    low = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    codes = _fields(blocks[:, 16:80], 32, 2)
    return (_scaled(scale, codes) - low[:, :, None]).reshape(len(blocks), -1)


def _decode_q3_k(blocks: Bytes) -> Floats:
    """high bits 32 bytes | low two bits 64 bytes | 16 scales of 6 bits in 12 bytes | d.

    code = low bits - (high bit ? 0 : 4). Scale i: low four bits in the halves of bytes 0-7, high two in bytes
    8-11, minus 32.
    """
    scales = _fields(blocks[:, 96:104], 8, 4) | (_fields(blocks[:, 104:108], 4, 2) << np.uint8(4))
    scale = _half(blocks, 108) * (scales.astype(np.float32) - 32)
    codes = _fields(blocks[:, 32:96], 32, 2) | (_fields(blocks[:, :32], 32, 1) << np.uint8(2))
    return _scaled(scale, codes.view(np.int8) - np.int8(4)).reshape(len(blocks), -1)


def _decode_q4_k(blocks: Bytes) -> Floats:
    """d | dmin | 8 scales and 8 minima of 6 bits in 12 bytes | codes 128 bytes."""
    scales, minima = _k_scales(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    low = _half(blocks, 2) * minima.astype(np.float32)
    codes = _fields(blocks[:, 16:], 32, 4)
    return (_scaled(scale, codes) - low[:, :, None]).reshape(len(blocks), -1)


def _decode_q5_k(blocks: Bytes) -> Floats:
    """As q4_k, with the codes' fifth bits in 32 bytes before the low four."""
    scales, minima = _k_scales(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    low = _half(blocks, 2) * minima.astype(np.float32)
    codes = _fields(blocks[:, 48:], 32, 4) | (_fields(blocks[:, 16:48], 32, 1) << np.uint8(4))
    return (_scaled(scale, codes) - low[:, :, None]).reshape(len(blocks), -1)


def _decode_q6_k(blocks: Bytes) -> Floats:
    """low four bits 128 bytes | high two bits 64 bytes | 16 int8 scales | d;   code - 32."""
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    scale = _half(blocks, 208) * scales.astype(np.float32)
    codes = _fields(blocks[:, :128], 64, 4) | (_fields(blocks[:, 128:192], 32, 2) << np.uint8(4))
    return _scaled(scale, codes.view(np.int8) - np.int8(32)).reshape(len(blocks), -1)


# ---------------------------------------------------------------- superblocks, encoding


def _runs_above_minimum(
    values: Floats, run: int, top: int, scale_top: int
) -> tuple[Floats, Floats, Bytes, Bytes, Bytes]:
    """d, dmin (N, 1); scales, minima (N, runs) up to `scale_top`; codes (N, 256) up to `top`.

    A run's minimum is at most 0, so that it is stored as -dmin * min with min >= 0.
    """
    runs = values.reshape(len(values), -1, run)
    low = np.minimum(runs.min(axis=-1), 0)
    step = (runs.max(axis=-1) - low).clip(0) / np.float32(top)
    d, scales = _quantised(step, scale_top)
    dmin, minima = _quantised(-low, scale_top)
    shifted = runs + (dmin * minima)[:, :, None]
    codes = np.rint(shifted * _inverse(d * scales)[:, :, None])
    return d, dmin, scales, minima, _whole(codes, 0, top).astype(np.uint8).reshape(len(values), -1)


def _quantised(parts: Floats, top: int) -> tuple[Floats, Bytes]:
    """Non-negative numbers (N, runs) as d * code: d (N, 1) rounded to fp16, codes 0 .. top."""
    d = (parts.max(axis=-1, keepdims=True) / np.float32(top)).astype(np.float16).astype(np.float32)
    return d, _whole(np.rint(parts * _inverse(d)), 0, top).astype(np.uint8)


def _runs_about_zero(values: Floats, middle: int, low: int, high: int) -> tuple[Floats, Floats, Bytes]:
    """d (N, 1); whole scales (N, 16) in [low, high]; codes (N, 256) below 2 * middle, zero at middle."""
    runs = values.reshape(len(values), 16, 16)
    extreme = np.take_along_axis(runs, np.abs(runs).argmax(axis=-1)[:, :, None], axis=-1)[:, :, 0]
    step = extreme / np.float32(-middle)
    largest = np.take_along_axis(step, np.abs(step).argmax(axis=-1)[:, None], axis=-1)
    d = (largest / np.float32(low)).astype(np.float16).astype(np.float32)
    scales = _whole(np.rint(step * _inverse(d)), low, high)
    codes = np.rint(runs * _inverse(d * scales)[:, :, None]) + np.float32(middle)
    return d, scales, _whole(codes, 0, 2 * middle - 1).astype(np.uint8).reshape(len(values), -1)


def _whole(values: Floats, low: int, high: int) -> Floats:
    """NaN becomes 0, the rest is cut to [low, high]."""
    return np.nan_to_num(values).clip(low, high).astype(np.float32)


def _encode_q2_k(values: Floats) -> Bytes:
    d, dmin, scales, minima, codes = _runs_above_minimum(values, 16, 3, 15)
    parts = [scales | (minima << 4), _pack(codes, 32, 2), _half_bytes(d), _half_bytes(dmin)]
    return np.concatenate(parts, axis=-1)


def _encode_q3_k(values: Floats) -> Bytes:
    d, scales, codes = _runs_about_zero(values, 4, -32, 31)
    stored = (scales + 32).astype(np.uint8)
    parts = [
        _pack(codes >> np.uint8(2), 32, 1),
        _pack(codes, 32, 2),
        _pack(stored, 8, 4),
        _pack(stored >> np.uint8(4), 4, 2),
    ]
    return np.concatenate([*parts, _half_bytes(d)], axis=-1)


def _encode_q4_k(values: Floats) -> Bytes:
    d, dmin, scales, minima, codes = _runs_above_minimum(values, 32, 15, 63)
    parts = [_half_bytes(d), _half_bytes(dmin), _pack_k_scales(scales, minima), _pack(codes, 32, 4)]
    return np.concatenate(parts, axis=-1)


def _encode_q5_k(values: Floats) -> Bytes:
    d, dmin, scales, minima, codes = _runs_above_minimum(values, 32, 31, 63)
    parts = [_half_bytes(d), _half_bytes(dmin), _pack_k_scales(scales, minima)]
    return np.concatenate([*parts, _pack(codes >> np.uint8(4), 32, 1), _pack(codes, 32, 4)], axis=-1)


def _encode_q6_k(values: Floats) -> Bytes:
    d, scales, codes = _runs_about_zero(values, 32, -128, 127)
    packed = [_pack(codes, 64, 4), _pack(codes >> np.uint8(4), 32, 2), scales.astype(np.int8).view(np.uint8)]
    return np.concatenate([*packed, _half_bytes(d)], axis=-1)


# ---------------------------------------------------------------- the table

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            Format("f32", 1, 4, 0, _decode_f32, _encode_f32),
            Format("f16", 1, 2, 1, _decode_f16, _encode_f16),
            Format("bf16", 1, 2, 30, _decode_bf16, _encode_bf16),
            Format("q8_0", 32, 34, 8, _decode_q8_0, _encode_q8_0),
            Format("q4_0", 32, 18, 2, _decode_q4_0, _encode_q4_0),
            Format("q4_1", 32, 20, 3, _decode_q4_1, _encode_q4_1),
            Format("q5_0", 32, 22, 6, _decode_q5_0, _encode_q5_0),
            Format("q5_1", 32, 24, 7, _decode_q5_1, _encode_q5_1),
            Format("q2_k", 256, 84, 10, _decode_q2_k, _encode_q2_k),
            Format("q3_k", 256, 110, 11, _decode_q3_k, _encode_q3_k),
            Format("q4_k", 256, 144, 12, _decode_q4_k, _encode_q4_k),
            Format("q5_k", 256, 176, 13, _decode_q5_k, _encode_q5_k),
            Format("q6_k", 256, 210, 14, _decode_q6_k, _encode_q6_k),
        )
    }
)

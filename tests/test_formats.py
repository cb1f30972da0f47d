"""Formats against the `gguf` package's own quantiser and dequantiser, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from hayai.errors import ModelError
from hayai.formats import FORMATS, Format, QuantTensor

ALL = list(FORMATS.values())
BIT_EXACT_ENCODERS = [f for f in ALL if f.block_elements < 256]

# Relative RMS error of encoding standard normal weights; the theory is about step / sqrt(12).
ENCODE_ERROR = {
    "f32": 0.0, "f16": 3e-4, "bf16": 2e-3, "q8_0": 6e-3, "q4_0": 0.09, "q4_1": 0.08, "q5_0": 0.045,
    "q5_1": 0.04, "q2_k": 0.35, "q3_k": 0.17, "q4_k": 0.08, "q5_k": 0.04, "q6_k": 0.02,
}  # fmt: skip


def their_type(fmt: Format) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(fmt.ggml_type)


def random_tensor(fmt: Format, rows: int, blocks: int, seed: int) -> QuantTensor:
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * fmt.block_bytes), dtype=np.uint8)
    return QuantTensor(fmt.name, (rows, blocks * fmt.block_elements), data)


def same_bits(got: NDArray[np.float32], want: NDArray[np.float32]) -> bool:
    """Equal bits; a NaN counts as equal to any NaN (its payload is the processor's affair)."""
    nan = np.isnan(want)
    return bool(
        np.array_equal(np.isnan(got), nan) and np.array_equal(got.view("u4")[~nan], want.view("u4")[~nan])
    )


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_table_agrees_with_gguf(fmt: Format) -> None:
    kind = their_type(fmt)
    assert kind.name.lower() == fmt.name
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block_elements, fmt.block_bytes)
    assert fmt.bits_per_weight == 8 * fmt.block_bytes / fmt.block_elements


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_decode_of_random_bytes_is_bit_exact(fmt: Format) -> None:
    """Random bytes hold every code, and scales that are zero, tiny, negative, infinite and NaN."""
    tensor = random_tensor(fmt, rows=96, blocks=41, seed=fmt.ggml_type)
    with np.errstate(all="ignore"):
        want = dequantize(tensor.data, their_type(fmt))
    assert np.isnan(want).any(), "the sample must hold special values"
    assert same_bits(tensor.dequantize(), want)


@pytest.mark.parametrize("scale", [0x7C00, 0xFC00, 0x7E00, 0x0000, 0x8000, 0x0001, 0x7BFF])
@pytest.mark.parametrize("fmt", [f for f in ALL if f.block_elements > 1], ids=lambda f: f.name)
def test_decode_of_special_scales_is_bit_exact(fmt: Format, scale: int) -> None:
    """Infinite, NaN, zero, subnormal and largest scales, wherever the format keeps its scales."""
    tensor = random_tensor(fmt, rows=4, blocks=4, seed=1)
    blocks = tensor.data.reshape(-1, fmt.block_bytes)
    for start in range(0, fmt.block_bytes - 1, 2):
        blocks[start // 2 % len(blocks), start : start + 2] = np.array([scale], "<u2").view("u1")
    with np.errstate(all="ignore"):
        want = dequantize(tensor.data, their_type(fmt))
    assert same_bits(tensor.dequantize(), want)


@pytest.mark.parametrize("fmt", BIT_EXACT_ENCODERS, ids=lambda f: f.name)
def test_encode_is_bit_exact(fmt: Format) -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((64, 320)).astype(np.float32) * rng.uniform(1e-4, 40, (64, 1)).astype("f4")
    values[0] = 0
    values[1] = np.rint(values[1] * 4) / 2  # halves: ties of the rounding
    values[2] = 3.0  # no spread
    values[3, ::7] = -values[3, ::7].min()
    encoded = QuantTensor.from_float(values, fmt.name)
    assert np.array_equal(encoded.data, quantize(values, their_type(fmt)).view(np.uint8))


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_encode_then_decode_is_near(fmt: Format) -> None:
    values = np.random.default_rng(3).standard_normal((32, 1024)).astype(np.float32)
    decoded = QuantTensor.from_float(values, fmt.name).dequantize()
    assert np.sqrt(np.mean((decoded - values) ** 2)) <= ENCODE_ERROR[fmt.name]
    one_sided = QuantTensor.from_float(np.abs(values), fmt.name).dequantize()
    assert np.sqrt(np.mean((one_sided - np.abs(values)) ** 2)) <= 1.2 * ENCODE_ERROR[fmt.name]


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_encode_of_zeros_and_of_what_is_not_finite(fmt: Format) -> None:
    zeros = QuantTensor.from_float(np.zeros((2, 256), np.float32), fmt.name)
    assert not zeros.dequantize().any()
    wild = np.zeros((3, 256), np.float32)
    wild[0, 5], wild[1, 6], wild[2, 7] = np.inf, -np.inf, np.nan
    QuantTensor.from_float(wild, fmt.name).dequantize()  # warnings are errors: none may be raised


def test_bf16_rounds_to_nearest_even_and_keeps_nan() -> None:
    bits = np.array(
        [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x7F800001], "u4"
    )
    encoded = QuantTensor.from_float(bits.view(np.float32), "bf16").data.view("<u2")[0]
    assert encoded.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x7FC0]


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_long_tensors_are_decoded_as_short_ones(fmt: Format) -> None:
    """Tensors are coded in pieces; the piece borders must not show."""
    rows = (1 << 20) // fmt.block_elements + 3
    tensor = random_tensor(fmt, rows=rows, blocks=1, seed=4)
    whole = tensor.dequantize()
    for start in (0, rows - 5):
        part = QuantTensor(fmt.name, (5, fmt.block_elements), tensor.data[start : start + 5])
        assert same_bits(whole[start : start + 5], part.dequantize())


def test_shapes() -> None:
    vector = QuantTensor.from_float(np.arange(64), "q8_0")
    assert (vector.shape, vector.rows, vector.cols, vector.data.shape) == ((64,), 1, 64, (1, 68))
    cube = QuantTensor.from_float(np.ones((3, 5, 64)), "q4_1")
    assert (cube.rows, cube.cols, cube.nbytes) == (15, 64, 15 * 40)
    assert cube.dequantize().shape == (3, 5, 64)
    number = QuantTensor.from_float(7.0, "f16")
    assert number.shape == (1,) and number.dequantize().tolist() == [7.0]
    empty = QuantTensor.from_float(np.empty((0, 32)), "q5_0")
    assert empty.dequantize().shape == (0, 32)


def test_data_that_is_a_view_is_decoded() -> None:
    tensor = random_tensor(FORMATS["q5_k"], rows=6, blocks=2, seed=5)
    wide = np.zeros((6, tensor.data.shape[1] + 3), np.uint8)
    wide[:, 1:-2] = tensor.data
    view = QuantTensor("q5_k", tensor.shape, wide[:, 1:-2])
    assert same_bits(view.dequantize(), tensor.dequantize())


def test_errors_name_what_is_supported() -> None:
    with pytest.raises(ModelError, match=r"unknown weight format 'iq4_xs'; supported: f32, f16"):
        QuantTensor.from_float(np.ones(32), "iq4_xs")
    with pytest.raises(ModelError, match=r"row of 33 weights can't be q4_0: its blocks hold 32"):
        QuantTensor.from_float(np.ones(33), "q4_0")
    with pytest.raises(ValueError, match=r"needs uint8 data \(2, 34\)"):
        QuantTensor("q8_0", (2, 32), np.zeros((2, 33), np.uint8))
    with pytest.raises(ValueError, match="not float32"):
        QuantTensor("f32", (1, 1), np.zeros((1, 4), np.float32))  # type: ignore[arg-type]

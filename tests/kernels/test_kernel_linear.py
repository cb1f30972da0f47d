"""gemv, gemm and the float layouts against float64, and against each other bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import (
    CHAIN,
    COLUMN_COUNTS,
    EPS,
    INTEGER_LAYOUTS,
    ISAS,
    KERNELS,
    LAYOUTS,
    ROW_COUNTS,
    TOKEN_COUNTS,
    Activations,
    Guarded,
    Layout,
    aligned,
    expected,
    from_codes,
    gemm,
    gemv,
    pack,
    quantize,
    random_activations,
    same_bits,
)

pytestmark = pytest.mark.parametrize("isa", ISAS)


def check_values(isa: str, layout: Layout, rows: np.ndarray, cols: int, a: Activations) -> None:
    """gemm against the twin, and every token of it against gemv."""
    kernels = KERNELS[isa]
    packed = pack(layout, kernels.group_rows, rows, cols)
    got = gemm(kernels, layout, packed, cols, a)
    want, magnitude = expected(layout, rows, a)
    error = np.abs(got[:, : len(rows)] - want)
    bound = CHAIN[layout.name](cols) * EPS * magnitude + 1e-37
    assert (error <= bound).all(), float((error / bound).max())
    assert not got[:, len(rows) :].any(), "rows of padding must be zero"
    for t in range(a.tokens):
        assert same_bits(got[t], gemv(kernels, layout, packed, cols, a, t)), f"token {t} differs from gemv"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_rows(isa: str, name: str, num_rows: int) -> None:
    layout, cols = LAYOUTS[name], 96
    rng = np.random.default_rng(num_rows)
    rows = layout.random(rng, num_rows, cols)
    check_values(isa, layout, rows, cols, random_activations(KERNELS[isa], rng, 5, cols, layout))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tokens", TOKEN_COUNTS)
def test_tokens(isa: str, name: str, tokens: int) -> None:
    layout, cols = LAYOUTS[name], 160
    rng = np.random.default_rng(tokens)
    rows = layout.random(rng, 49, cols)
    check_values(isa, layout, rows, cols, random_activations(KERNELS[isa], rng, tokens, cols, layout))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("cols", COLUMN_COUNTS)
def test_columns(isa: str, name: str, cols: int) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(cols)
    rows = layout.random(rng, 40, cols)
    check_values(isa, layout, rows, cols, random_activations(KERNELS[isa], rng, 9, cols, layout))


@pytest.mark.parametrize("name", [n for n in LAYOUTS if LAYOUTS[n].is_float])
@pytest.mark.parametrize("cols", [1, 2, 7, 31, 33])
def test_float_layouts_take_any_number_of_columns(isa: str, name: str, cols: int) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(cols)
    rows = layout.random(rng, 19, cols)
    check_values(isa, layout, rows, cols, random_activations(KERNELS[isa], rng, 7, cols, layout))


def extreme_rows(name: str, code: int, num_rows: int, cols: int) -> np.ndarray:
    layout = LAYOUTS[name]
    rows = layout.random(np.random.default_rng(0), num_rows, cols)
    block = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[name]
    rows.reshape(num_rows, -1, block)[..., 4 if name == "q4_1" else 2 :] = code
    return rows


@pytest.mark.parametrize("name", INTEGER_LAYOUTS)
@pytest.mark.parametrize("code", [0x00, 0x7F, 0x80, 0x81, 0xFF])
@pytest.mark.parametrize("activation", [-127, 127])
def test_full_range_does_not_saturate(isa: str, name: str, code: int, activation: int) -> None:
    cols, tokens = 64, 9
    rows = extreme_rows(name, code, 18, cols)
    scale = np.full((tokens, cols // 32), 0.5, np.float32)
    q = np.full((tokens, cols), activation, np.int8)
    check_values(isa, LAYOUTS[name], rows, cols, from_codes(q, scale, LAYOUTS[name].factor))


@pytest.mark.parametrize("name", INTEGER_LAYOUTS)
def test_random_extremes_are_exact_integers(isa: str, name: str) -> None:
    """Codes and activations at their limits in random order: with scales of one the result is exact."""
    layout, cols = LAYOUTS[name], 64
    rng = np.random.default_rng(7)
    rows = layout.random(rng, 33, cols)
    block = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[name]
    blocks = rows.reshape(33, -1, block)
    blocks[..., 0:2] = np.array([1], np.float16).view(np.uint8)
    first = 4 if name == "q4_1" else 2
    if name == "q4_1":
        blocks[..., 2:4] = np.array([-3], np.float16).view(np.uint8)
    values = [0x80, 0x7F, 0x81, 0x00] if name == "q8_0" else [0xFF, 0xF0, 0x0F, 0x00]
    blocks[..., first:] = rng.choice(np.array(values, np.uint8), blocks[..., first:].shape)
    q = rng.choice(np.array([-127, 127, 126, 0], np.int8), (11, cols))
    a = from_codes(q, np.ones((11, cols // 32), np.float32), layout.factor)
    kernels = KERNELS[isa]
    got = gemm(kernels, layout, pack(layout, kernels.group_rows, rows, cols), cols, a)
    want = q.astype(np.int64) @ layout.decode(rows).astype(np.int64).T
    assert np.array_equal(got[:, :33].astype(np.int64), want)


@pytest.mark.parametrize("name", INTEGER_LAYOUTS)
@pytest.mark.parametrize("exponent", [-30, 30])
def test_extreme_scales(isa: str, name: str, exponent: int) -> None:
    layout, cols = LAYOUTS[name], 96
    rng = np.random.default_rng(3)
    rows = layout.random(rng, 17, cols)
    scale = (rng.random((6, cols // 32)) * 2.0**exponent).astype(np.float32)
    q = rng.integers(-127, 128, (6, cols), np.int8)
    check_values(isa, layout, rows, cols, from_codes(q, scale, layout.factor))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_nan_reaches_every_output_of_its_token_only(isa: str, name: str) -> None:
    layout, cols, kernels = LAYOUTS[name], 64, KERNELS[isa]
    rng = np.random.default_rng(5)
    rows = layout.random(rng, 16, cols)
    x = rng.normal(size=(6, cols)).astype(np.float32)
    x[2, 40] = np.nan
    a = (
        random_activations(kernels, rng, 6, cols, layout)
        if layout.is_float
        else quantize(kernels, x, layout.factor)
    )
    if layout.is_float:
        a = Activations(x, a.q, a.scale, a.sum)
    got = gemm(kernels, layout, pack(layout, kernels.group_rows, rows, cols), cols, a)
    assert np.isnan(got[2]).all()
    assert np.isfinite(np.delete(got, 2, axis=0)).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 9, 17])
def test_reads_nothing_behind_its_arguments(isa: str, name: str, tokens: int) -> None:
    layout, cols, kernels = LAYOUTS[name], 96, KERNELS[isa]
    rng = np.random.default_rng(11)
    rows = layout.random(rng, 3 * kernels.group_rows, cols)
    packed = pack(layout, kernels.group_rows, rows, cols)
    a = random_activations(kernels, rng, tokens, cols, layout)
    want = gemm(kernels, layout, packed, cols, a)
    guard = Guarded()
    y = guard(np.full((tokens, even := want.shape[1] + 16 - want.shape[1] % 16), np.nan, np.float32))
    q, scale, total = (
        (a.q.reshape(-1), a.scale.reshape(-1), a.sum.reshape(-1)) if layout.is_float else a.tiles()
    )
    kernels.gemm(layout.id, guard(packed), cols, tokens, guard(q), guard(scale), guard(total), guard(a.x), y)
    assert same_bits(y[:, : want.shape[1]], want)
    assert even % 16 == 0
    row = guard(np.zeros(want.shape[1], np.float32))
    kernels.gemv(
        layout.id, guard(packed), cols, guard(a.q[0]), guard(a.scale[0]), guard(a.sum[0]), guard(a.x[0]), row
    )
    assert same_bits(row, want[0])


@pytest.mark.parametrize("factor", [1.0, -8.0, -128.0])
@pytest.mark.parametrize("cols", [32, 96, 576])
def test_quantize(isa: str, factor: float, cols: int) -> None:
    kernels = KERNELS[isa]
    rng = np.random.default_rng(cols)
    x = (rng.normal(size=(4, cols)) * np.exp(rng.normal(size=(4, 1)) * 4)).astype(np.float32)
    x[1, :32] = 0
    x[2, 32:64] = 1e-38
    a = quantize(kernels, x, factor)
    blocks = x.reshape(4, -1, 32)
    top = np.abs(blocks).max(axis=2)
    normal = top > 1e-35
    assert np.array_equal(a.scale, np.where(normal, top / np.float32(127), 0).astype(np.float32))
    inverse = np.where(normal, np.float32(127) / np.where(normal, top, 1), 0).astype(np.float32)
    q = np.rint(blocks * inverse[..., None]).astype(np.int8)
    assert np.array_equal(a.q.reshape(blocks.shape), q)
    assert np.abs(a.q.astype(int)).max() <= 127
    want = (np.float32(factor) * a.scale * q.astype(np.int32).sum(axis=2).astype(np.float32)).astype(
        np.float32
    )
    assert np.array_equal(a.sum, want)


def test_quantize_tile_is_quantize(isa: str) -> None:
    kernels, cols = KERNELS[isa], 96
    x = np.random.default_rng(2).normal(size=(4, cols)).astype(np.float32)
    a = quantize(kernels, x, -8)
    q, scale, total = aligned(4 * cols, np.int8), aligned(cols // 8), aligned(cols // 8)
    for slot in (2, 0, 3, 1):
        kernels.quantize_tile(x[slot], -8, slot, q, scale, total)
    want_q, want_scale, want_sum = a.tiles()
    assert same_bits(q, want_q) and same_bits(scale, want_scale) and same_bits(total, want_sum)


def test_quantize_carries_nan_and_infinity_into_the_scale(isa: str) -> None:
    x = np.ones((2, 64), np.float32)
    x[0, 3], x[1, 40] = np.nan, np.inf
    a = quantize(KERNELS[isa], x, 1)
    assert np.isnan(a.scale[0, 0]) and np.isfinite(a.scale[0, 1])
    assert np.isinf(a.scale[1, 1]) and np.isfinite(a.scale[1, 0])

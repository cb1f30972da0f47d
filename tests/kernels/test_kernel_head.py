"""The screened head: a lossless split, a bound that holds, and exact logits with one set of bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_harness import (
    EPS,
    ISAS,
    KERNELS,
    LAYOUTS,
    Activations,
    Array,
    aligned,
    even_up,
    gemv,
    pack,
    quantize,
    same_bits,
)

from hayai import _native

Q8 = LAYOUTS["q8_0"]

pytestmark = pytest.mark.parametrize("isa", ISAS)


@dataclass(frozen=True)
class Head:
    """A random head of `num_rows` x `cols`, packed."""

    kernels: Any
    rows: Array
    cols: int
    outliers: Array
    high: Array
    outlier: Array
    low: Array
    rest_error: Array
    outlier_error: Array
    code_norm: float

    @property
    def groups(self) -> int:
        return even_up(len(self.rows), self.kernels.group_rows) // self.kernels.group_rows


def make_head(isa: str, num_rows: int, cols: int) -> Head:
    kernels = KERNELS[isa]
    rng = np.random.default_rng(num_rows + cols)
    rows = Q8.random(rng, num_rows, cols)
    outliers = rng.permutation(cols)[:32].astype(np.int32)
    g = kernels.group_rows
    groups = even_up(num_rows, g) // g
    high = aligned(groups * 18 * g * (cols // 32), np.uint8, 0xFF)
    outlier = aligned(groups * 18 * g, np.uint8, 0xFF)
    low = aligned(num_rows * 18 * even_up(cols // 32, 2), np.uint8, 0xFF)
    rest, left_over = aligned(num_rows), aligned(num_rows)
    norm = _native.pack_head_planes(g, rows, cols, outliers, high, outlier, low, rest, left_over)
    return Head(kernels, rows, cols, outliers, high, outlier, low, rest, left_over, norm)


@dataclass(frozen=True)
class Input:
    """One token's input, quantised, for the three planes."""

    q: Array
    scale: Array
    total: Array

    @property
    def seen(self) -> Array:
        """The values that the quantised input stands for."""
        return (
            self.q[: 32 * len(self.scale)].reshape(-1, 32) * self.scale[:, None].astype(np.float64)
        ).reshape(-1)


def make_input(head: Head, x: Array) -> Input:
    a = quantize(head.kernels, x.astype(np.float32)[None], 1)
    q = aligned(even_up(head.cols, 64), np.int8)
    q[: head.cols] = a.q[0]
    return Input(q, a.scale[0], a.sum[0])


def random_input(head: Head, seed: int = 1) -> Input:
    return make_input(head, np.random.default_rng(seed).normal(size=head.cols))


def plane_product(kernels: Any, plane: Array, cols: int, q: Array, scale: Array, total: Array) -> Array:
    x = np.zeros((1, cols), np.float32)
    row = Activations(x, q[None, :cols], scale[None].astype(np.float32), total[None].astype(np.float32))
    return gemv(kernels, LAYOUTS["q4_0"], plane, cols, row)


def high_part(head: Head, a: Input) -> Array:
    sums = a.total * np.float32(-120.5)
    return plane_product(head.kernels, head.high, head.cols, a.q, a.scale * np.float32(16), sums)


def low_group(head: Head, first: int, count: int, rows: Array | None = None) -> Array:
    """Rows of the low plane as one packed group."""
    out = aligned(18 * head.kernels.group_rows * (head.cols // 32), np.uint8, 0xFF)
    head.kernels.low_group(head.high, head.low, head.cols, rows, first, count, out)
    return out


def low_rows(head: Head) -> Array:
    """The low plane as Q4_0 rows of a file: what low_group has to pack."""
    blocks = head.cols // 32
    rows = head.low.reshape(len(head.rows), -1)
    scales = rows[:, : 2 * blocks].reshape(len(rows), blocks, 2)
    codes = rows[:, 2 * even_up(blocks, 2) :][:, : 16 * blocks].reshape(len(rows), blocks, 16)
    return np.ascontiguousarray(np.concatenate([scales, codes], axis=2).reshape(len(rows), -1))


def logits(head: Head, a: Input, rows: Array | None = None) -> Array:
    """Exact logits of some rows: the high part, and the low part on top."""
    picks = np.arange(len(head.rows)) if rows is None else rows
    y = high_part(head, a)[picks]
    for at in range(0, len(picks), head.kernels.group_rows):
        some = picks[at : at + head.kernels.group_rows]
        group = low_group(head, 0, len(some), some)
        low = plane_product(head.kernels, group, head.cols, a.q, a.scale, a.total * np.float32(-7.5))
        y[at : at + len(some)] += low[: len(some)]
    return y


@pytest.mark.parametrize("num_rows,cols", [(1, 32), (7, 64), (40, 96), (33, 576), (50, 1536)])
def test_groups_of_the_low_plane_are_packed_rows(isa: str, num_rows: int, cols: int) -> None:
    """The same bytes as packing the rows one would have in a file, neighbouring or picked."""
    head = make_head(isa, num_rows, cols)
    g, file = head.kernels.group_rows, low_rows(head)
    for first in range(0, num_rows, g):
        count = min(g, num_rows - first)
        last = np.minimum(np.arange(first, first + g), num_rows - 1)  # spare lanes repeat the last row
        found = low_group(head, first, count).reshape(cols // 32, -1)
        want = pack(LAYOUTS["q4_0"], g, file[last], cols).reshape(cols // 32, -1)
        assert np.array_equal(found[:, 2 * g :], want[:, 2 * g :])
        assert np.array_equal(found[:, : 2 * count], want[:, : 2 * count])
    rng = np.random.default_rng(cols)
    for count in range(1, g + 1):
        picks = rng.integers(0, num_rows, count)
        spare = np.concatenate([picks, np.full(g - count, picks[-1])])
        assert np.array_equal(low_group(head, 0, count, picks), pack(LAYOUTS["q4_0"], g, file[spare], cols))


@pytest.mark.parametrize("num_rows,cols", [(1, 32), (7, 64), (16, 96), (33, 576), (50, 1536)])
def test_planes_are_lossless(isa: str, num_rows: int, cols: int) -> None:
    head = make_head(isa, num_rows, cols)
    want = Q8.decode(head.rows).astype(np.float32)
    out = aligned(cols)
    for row in range(num_rows):
        head.kernels.unpack_head_row(head.high, head.low, cols, row, out)
        assert np.array_equal(out, want[row])


@pytest.mark.parametrize("num_rows,cols", [(1, 32), (7, 64), (40, 96), (33, 576), (50, 1536)])
def test_exact_logits(isa: str, num_rows: int, cols: int) -> None:
    head = make_head(isa, num_rows, cols)
    a = random_input(head)
    w = Q8.decode(head.rows)
    # The zero point of 120.5 makes the intermediate terms up to 256 times larger than a code of 1.
    scales = np.ascontiguousarray(head.rows.reshape(num_rows, -1, 34)[..., :2]).view(np.float16)[..., 0]
    size = np.abs(scales.astype(np.float64)) @ (np.abs(a.seen).reshape(-1, 32).sum(axis=1) * 256)
    bound = (2 * cols // 32 + 4) * EPS * size
    assert (np.abs(logits(head, a) - w @ a.seen) <= bound).all()


@pytest.mark.parametrize("cols", [32, 96, 576])
def test_the_low_part_of_a_row_has_one_set_of_bits(isa: str, cols: int) -> None:
    head = make_head(isa, 75, cols)
    for seed in range(3):
        a = random_input(head, seed)
        want = logits(head, a)
        for picks in ([0], [3, 3, 70, 5], list(range(75)), [74, 17, 16, 15, 9, 8, 7]):
            assert same_bits(logits(head, a, np.array(picks)), want[picks])


@pytest.mark.parametrize("cols", [64, 576])
@pytest.mark.parametrize("kind", ["normal", "outliers", "spike"])
def test_the_bound_holds_for_every_row(isa: str, cols: int, kind: str) -> None:
    head = make_head(isa, 300, cols)
    kernels = head.kernels
    x = np.random.default_rng(1).normal(size=cols)
    if kind == "outliers":
        x[head.outliers] *= 30
    if kind == "spike":
        x *= 1e-3
        x[5] = 7
    a = make_input(head, x)
    exact = logits(head, a)
    seen = a.seen
    tail = quantize(kernels, np.ascontiguousarray(seen[head.outliers], np.float32)[None], -7.5)
    lost = seen[head.outliers] - (tail.q[0] * tail.scale[0].astype(np.float64))
    correction = plane_product(kernels, head.outlier, 32, tail.q[0], tail.scale[0], tail.sum[0])
    estimate = (high_part(head, a) + correction)[: len(head.rows)]
    outlier_norm = float(np.linalg.norm(seen[head.outliers]))
    rest = np.delete(seen, head.outliers)
    slack = float(np.linalg.norm(lost)) * head.code_norm + 1e-5
    bound = aligned(len(head.rows), fill=np.nan)
    best = kernels.screen_bounds(
        np.ascontiguousarray(estimate), head.rest_error, head.outlier_error,
        float(np.linalg.norm(rest)), outlier_norm, slack, bound,
    )  # fmt: skip
    assert best == int(estimate.argmax())
    assert (bound >= exact).all()
    assert (2 * estimate - bound <= exact).all()
    want = (
        estimate.astype(np.float64)
        + np.linalg.norm(rest) * head.rest_error
        + outlier_norm * head.outlier_error
    )
    np.testing.assert_allclose(bound, want + slack, rtol=1e-5, atol=1e-5)


def test_error_norms(isa: str) -> None:
    """The norms against their definition in float64: never below, at most 0.02 % above."""
    head = make_head(isa, 40, 96)
    blocks = head.rows.reshape(40, -1, 34)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float64)
    error = (d * ((blocks[..., 2:] & 15) - 7.5)).reshape(40, -1)
    rest = np.linalg.norm(np.delete(error, head.outliers, axis=1), axis=1)
    assert (head.rest_error >= rest).all() and (head.rest_error <= rest * 1.0002).all()
    outlier = np.linalg.norm(error[:, head.outliers], axis=1)
    assert (head.outlier_error < 0.3 * outlier).all(), "the outlier block should take most of the error"


@pytest.mark.parametrize("n", [1, 7, 8, 17, 40])
def test_screen_bounds_takes_the_lowest_of_equals(isa: str, n: int) -> None:
    y, zeros, bound = np.zeros(n, np.float32), np.zeros(n, np.float32), aligned(n)
    assert KERNELS[isa].screen_bounds(y, zeros, zeros, 1.0, 1.0, 0.25, bound) == 0
    assert (bound == 0.25).all()

"""The screened head: a lossless split, a bound that holds, and exact logits with one set of bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_harness import EPS, ISAS, KERNELS, LAYOUTS, Array, aligned, even_up, gemv, quantize, same_bits

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
    high = aligned(groups * 18 * g * (cols // 32 + 1), np.uint8, 0xFF)
    low = aligned(groups * 16 * g * (cols // 32), np.uint8, 0xFF)
    rest, outlier = aligned(num_rows), aligned(num_rows)
    norm = _native.pack_head_planes(g, rows, cols, outliers, high, low, rest, outlier)
    return Head(kernels, rows, cols, outliers, high, low, rest, outlier, norm)


def logits(head: Head, a: Any, first: int = 0, groups: int | None = None) -> Array:
    groups = head.groups - first if groups is None else groups
    y = aligned(groups * head.kernels.group_rows, fill=np.nan)
    head.kernels.head_gemv(head.high, head.low, head.cols, first, groups, a.q[0], a.scale[0], a.sum[0], y)
    return y


def make_input(head: Head, tokens: int) -> Any:
    x = np.random.default_rng(tokens).normal(size=(tokens, head.cols)).astype(np.float32)
    return quantize(head.kernels, x, -128)


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
    a = make_input(head, 1)
    x = (a.q.reshape(1, -1, 32) * a.scale[..., None].astype(np.float64)).reshape(-1)
    w = Q8.decode(head.rows)
    # The offset of 128 makes the intermediate terms up to 256 times larger than a code of 1.
    scales = np.ascontiguousarray(head.rows.reshape(num_rows, -1, 34)[..., :2]).view(np.float16)[..., 0]
    size = np.abs(scales.astype(np.float64)) @ (np.abs(x).reshape(-1, 32).sum(axis=1) * 256)
    bound = (2 * cols // 32 + 4) * EPS * size
    assert (np.abs(logits(head, a)[:num_rows] - w @ x) <= bound).all()
    assert not logits(head, a)[num_rows:].any()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9])
def test_all_routes_give_the_same_bits(isa: str, tokens: int) -> None:
    head = make_head(isa, 75, 96)
    a = make_input(head, tokens)
    rows = head.groups * head.kernels.group_rows
    y = aligned((tokens, even_up(rows, 16)), fill=np.nan)
    q, scale, off = a.tiles()
    head.kernels.head_gemm(head.high, head.low, head.cols, 0, head.groups, tokens, q, scale, off, y)
    for t in range(tokens):
        single = type(a)(a.x[t : t + 1], a.q[t : t + 1], a.scale[t : t + 1], a.sum[t : t + 1])
        want = logits(head, single)
        assert same_bits(y[t, :rows], want)
        assert same_bits(
            logits(head, single, 1, 2), want[head.kernels.group_rows : 3 * head.kernels.group_rows]
        )
        for picks in ([0], [3, 3, 70, 5], list(range(75)), [74, 17, 16, 15, 9, 8, 7]):
            out = aligned(len(picks), fill=np.nan)
            head.kernels.head_rows(
                head.high,
                head.low,
                head.cols,
                np.array(picks),
                single.q[0],
                single.scale[0],
                single.sum[0],
                out,
            )
            assert same_bits(out, want[picks])


@pytest.mark.parametrize("cols", [64, 576])
@pytest.mark.parametrize("kind", ["normal", "outliers", "spike"])
def test_the_bound_holds_for_every_row(isa: str, cols: int, kind: str) -> None:
    head = make_head(isa, 300, cols)
    kernels = head.kernels
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, cols)).astype(np.float32)
    if kind == "outliers":
        x[0, head.outliers] *= 30
    if kind == "spike":
        x[0] *= 1e-3
        x[0, 5] = 7
    a = quantize(kernels, x, -128)
    exact = logits(head, a)
    seen = (a.q.reshape(-1, 32) * a.scale[0][:, None]).reshape(-1).astype(np.float32)
    tail = quantize(kernels, np.ascontiguousarray(seen[head.outliers])[None], -7.5)
    lost = seen[head.outliers] - (tail.q[0] * tail.scale[0])
    total = a.sum[0] / np.float32(-128)
    q = aligned(cols + 32, np.int8)
    q[:cols], q[cols:] = a.q[0], tail.q[0]
    row = type(a)(
        np.zeros((1, cols + 32), np.float32),
        q[None],
        np.concatenate([a.scale[0] * 16, tail.scale[0]])[None].astype(np.float32),
        np.concatenate([total * np.float32(-120.5), tail.sum[0]])[None].astype(np.float32),
    )
    estimate = gemv(kernels, LAYOUTS["q4_0"], head.high, cols + 32, row)[: len(head.rows)]
    outlier_norm = float(np.linalg.norm(seen[head.outliers].astype(np.float64)))
    rest = np.delete(seen.astype(np.float64), head.outliers)
    slack = float(np.linalg.norm(lost.astype(np.float64))) * head.code_norm + 1e-5
    bound = aligned(len(head.rows), fill=np.nan)
    best = kernels.screen_bounds(
        np.ascontiguousarray(estimate), head.rest_error, head.outlier_error,
        float(np.linalg.norm(rest)), outlier_norm, slack, bound,
    )  # fmt: skip
    assert best == int(estimate.argmax())
    assert (bound >= exact[: len(head.rows)]).all()
    assert (2 * estimate - bound <= exact[: len(head.rows)]).all()
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

"""Norms, activations, rotary embedding and reductions against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_harness import ISAS, KERNELS, Array, Guarded, aligned

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 576, 1000)
ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4}

pytestmark = pytest.mark.parametrize("isa", ISAS)


def normal(n: int, size: float = 1.0, seed: int = 0) -> Array:
    return (np.random.default_rng(n + seed).normal(size=n) * size).astype(np.float32)


def act_twin(name: str, x: Array) -> Array:
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-x))
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x])
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    table = {"silu": x * sigmoid, "gelu": 0.5 * x * (1 + erf), "gelu_tanh": 0.5 * x * (1 + tanh)}
    return table.get(name, np.maximum(x, 0) if name == "relu" else sigmoid)


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(isa: str, n: int) -> None:
    guard = Guarded()
    x, w, y = guard(normal(n, 3)), guard(normal(n, seed=1)), guard(np.full(n, np.nan, np.float32))
    KERNELS[isa].rms_norm(x, w, 1.0, 1e-5, y)
    x64 = x.astype(np.float64)
    want = x64 / np.sqrt((x64**2).mean() + 1e-5) * (w.astype(np.float64) + 1)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-7)
    KERNELS[isa].rms_norm(x, w, 1.0, 1e-5, x)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(isa: str, n: int, bias: bool) -> None:
    guard = Guarded()
    x, w, b = guard(normal(n, 3) + 5), guard(normal(n, seed=1)), guard(normal(n, seed=2))
    y = guard(np.full(n, np.nan, np.float32))
    KERNELS[isa].layer_norm(x, w, b if bias else None, 1e-5, y)
    x64 = x.astype(np.float64)
    want = (x64 - x64.mean()) / np.sqrt(x64.var() + 1e-5) * w + (b if bias else 0)
    # A single element is all rounding error of its mean, divided by sqrt(eps).
    np.testing.assert_allclose(y, want, rtol=2e-6, atol=3e-4 if n == 1 else 5e-6)


@pytest.mark.parametrize("n", SIZES)
def test_add_scale_softcap(isa: str, n: int) -> None:
    guard = Guarded()
    a, b, y = guard(normal(n, 9)), guard(normal(n, 30, seed=1)), guard(np.full(n, np.nan, np.float32))
    KERNELS[isa].add(a, b, y)
    assert np.array_equal(y, a + b)
    KERNELS[isa].scale(a, 0.3, y)
    assert np.array_equal(y, a * np.float32(0.3))
    KERNELS[isa].softcap(b, 30.0, y)
    np.testing.assert_allclose(y, 30 * np.tanh(b.astype(np.float64) / 30), rtol=6e-7)


@pytest.mark.parametrize("cap", [1.0, 50.0])
def test_softcap_is_accurate_and_bounded(isa: str, cap: float) -> None:
    x = np.concatenate([np.linspace(-3, 3, 4001), [1e30, -1e30, 1e-30, np.inf, -np.inf]]).astype(np.float32)
    y = aligned(len(x))
    KERNELS[isa].softcap(x, cap, y)
    np.testing.assert_allclose(y, cap * np.tanh(x.astype(np.float64) / cap), rtol=6e-7, atol=1e-37)
    assert (np.abs(y) <= cap).all()


@pytest.mark.parametrize("name", ACTS)
def test_activation(isa: str, name: str) -> None:
    x = np.concatenate([np.linspace(-20, 20, 9999), [-1e4, 1e4, 0, 88, -88, 104, -104]]).astype(np.float32)
    y = aligned(len(x))
    KERNELS[isa].activation(ACTS[name], x, y)
    want = act_twin(name, x)
    assert (np.abs(y - want) <= 3e-7 * np.maximum(1, np.abs(x))).all(), np.abs(y - want).max()
    nan = np.array([np.nan], np.float32)
    KERNELS[isa].activation(ACTS[name], nan, nan)
    assert np.isnan(nan[0])


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("n", [1, 8, 17, 33, 64])
def test_glu(isa: str, name: str, n: int) -> None:
    guard = Guarded()
    gate, up, y = guard(normal(n, 3)), guard(normal(n, seed=1)), guard(np.full(n, np.nan, np.float32))
    KERNELS[isa].glu(ACTS[name], gate, up, y)
    np.testing.assert_allclose(y, act_twin(name, gate) * up, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_glu_groups_is_glu(isa: str, name: str, pairs: int) -> None:
    kernels = KERNELS[isa]
    g = kernels.group_rows
    y = normal(2 * g * pairs, 2)
    out, want = aligned(g * pairs), aligned(g * pairs)
    kernels.glu_groups(ACTS[name], y, out)
    halves = y.reshape(pairs, 2, g)
    kernels.glu(
        ACTS[name],
        np.ascontiguousarray(halves[:, 0]).reshape(-1),
        np.ascontiguousarray(halves[:, 1]).reshape(-1),
        want,
    )
    assert np.array_equal(out, want)


@pytest.mark.parametrize("dim", [2, 6, 16, 20, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(isa: str, dim: int, interleaved: bool) -> None:
    guard = Guarded()
    x = guard(normal(dim))
    angle = np.random.default_rng(dim).normal(size=dim // 2) * 3
    cosine, sine = guard(np.cos(angle).astype(np.float32)), guard(np.sin(angle).astype(np.float32))
    pairs = x.astype(np.float64).reshape((dim // 2, 2) if interleaved else (2, dim // 2))
    a, b = (pairs[:, 0], pairs[:, 1]) if interleaved else pairs
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    KERNELS[isa].rope(x, cosine, sine, interleaved)
    np.testing.assert_allclose(x, np.stack(turned, axis=1 if interleaved else 0).reshape(-1), atol=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_argmax(isa: str, n: int) -> None:
    kernels, guard = KERNELS[isa], Guarded()
    x = guard(normal(n))
    assert kernels.argmax(x) == int(x.argmax())
    for at in (0, n // 2, n - 1):
        x[at] = x[n - 1] = 100
        assert kernels.argmax(x) == int(np.nanargmax(x))
        x[at] = x[n - 1] = np.nan
    x[:] = np.nan
    assert kernels.argmax(x) == 0
    x[n - 1] = -np.inf
    assert kernels.argmax(x) == n - 1


@pytest.mark.parametrize("n", SIZES)
def test_exp_sum(isa: str, n: int) -> None:
    guard = Guarded()
    x, y = guard(normal(n, 20)), guard(np.full(n, np.nan, np.float32))
    top = float(x.max())
    total = KERNELS[isa].exp_sum(x, top, 0.5, y)
    want = np.exp((x.astype(np.float64) - top) * 0.5)
    np.testing.assert_allclose(y, want, rtol=3e-6)
    assert abs(total - want.sum()) <= 3e-6 * want.sum()
    assert y[x.argmax()] == 1


def test_exp_is_exactly_zero_when_masked(isa: str) -> None:
    x = np.array([0, -86.9, -87.1, -200, -1e30, -np.inf], np.float32)
    y = aligned(len(x))
    KERNELS[isa].exp_sum(x, 0.0, 1.0, y)
    assert y[0] == 1 and y[1] > 0 and not y[2:].any()


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 4096])
def test_read_bytes_sees_every_byte(isa: str, n: int) -> None:
    data = Guarded()(np.zeros(n, np.uint8))
    before = KERNELS[isa].read_bytes(data)
    for at in {0, n // 2, n - 1} if n else ():
        data[at] += 1
        after = KERNELS[isa].read_bytes(data)
        assert after != before
        before = after

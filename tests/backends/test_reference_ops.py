"""Ops of the reference backend, each against its definition written out in loops over small odd sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hayai.backends.base import StepInput
from hayai.backends.reference_context import StepContext, Weights
from hayai.backends.reference_ops import COLLECTIVES, OPS, rounded, run_lockstep
from hayai.formats import QuantTensor
from hayai.plan import ops
from hayai.plan.ops import ALL_OPS, RopeScaling
from hayai.plan.plan import Plan, WeightSlot
from hayai.weights.loader import FileWeights
from tiny_models import MemoryFile

Arrays = dict[str, NDArray[Any]]

RNG = np.random.default_rng(0)
NO_STEP = StepInput(*(np.zeros(0, np.int32),) * 3, {}, np.zeros(0, np.int32), ())


def randoms(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def context(
    op: ops.Op, env: Arrays, weights: Arrays | None = None, *, format: str = "f32", quantize: bool = False
) -> StepContext:
    """A step of one op on given buffers and weights; slots that are not given are optional ones."""
    given = weights or {}
    slots = {
        name: WeightSlot(name, given[name].shape if name in given else (1,), {"hf": (name,)}, optional=True)
        for name in op.names("slots")
    }
    plan = Plan("main", {}, slots, {}, (op,))
    source = FileWeights(MemoryFile(given, format), "hf")
    return StepContext(plan, NO_STEP, Weights({"main": plan}, source), {}, quantize, dict(env))


def run(op: ops.Op, env: Arrays, weights: Arrays | None = None, **options: Any) -> Arrays:
    ctx = context(op, env, weights, **options)
    before = {name: array.copy() for name, array in env.items()}
    run_lockstep([ctx])
    for name, array in before.items():
        np.testing.assert_array_equal(array, env[name], err_msg=f"{name} was changed behind its name")
    return ctx.env


def test_every_op_is_here() -> None:
    assert set(OPS) | set(COLLECTIVES) == set(ALL_OPS)
    assert not set(OPS) & set(COLLECTIVES)


# ---------------------------------------------------------------- elementwise


def test_embed() -> None:
    table = randoms(11, 5)
    ids = np.array([3, 0, 10, 3], np.int32)
    out = run(ops.Embed("ids", "t", "out", 1.5), {"ids": ids}, {"t": table})["out"]
    for row, token in zip(out, ids, strict=True):
        np.testing.assert_allclose(row, table[token] * 1.5, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    x, w = randoms(3, 7), randoms(7)
    out = run(ops.RmsNorm("x", "w", "x", 1e-3, offset), {"x": x}, {"w": w})["x"]
    for row, result in zip(x, out, strict=True):
        size = math.sqrt(sum(float(v) ** 2 for v in row) / 7 + 1e-3)
        np.testing.assert_allclose(result, row / size * (w + offset), rtol=1e-5)


def test_head_norm_is_a_norm_of_each_head() -> None:
    x, w = randoms(3, 10), randoms(5)
    out = run(ops.HeadNorm("x", "w", "out", 5, 1e-3, 0.5), {"x": x}, {"w": w})["out"]
    for head in (slice(0, 5), slice(5, 10)):
        one = run(ops.RmsNorm("x", "w", "out", 1e-3, 0.5), {"x": x[:, head]}, {"w": w})["out"]
        np.testing.assert_allclose(out[:, head], one, rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias: bool) -> None:
    x, w, b = randoms(3, 7) + 5, randoms(7), randoms(7)
    op = ops.LayerNorm("x", "w", "b", "out", 1e-3)
    out = run(op, {"x": x}, {"w": w, "b": b} if bias else {"w": w})["out"]
    for row, result in zip(x, out, strict=True):
        mean = sum(map(float, row)) / 7
        size = math.sqrt(sum((float(v) - mean) ** 2 for v in row) / 7 + 1e-3)
        np.testing.assert_allclose(result, (row - mean) / size * w + (b if bias else 0), atol=1e-5)


SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    "factors": RopeScaling("factors", factors_slot="f"),
    "factors that the file lacks": RopeScaling("factors", factors_slot="absent"),
}


def scaled_frequency(
    freq: float, pair: int, scaling: RopeScaling | None, factors: NDArray[np.float32]
) -> float:
    if scaling is None or scaling.factors_slot == "absent":
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind == "factors":
        return freq / float(factors[pair])
    wavelength = 2 * math.pi / freq
    if wavelength < scaling.original_context / scaling.high_freq_factor:
        return freq
    if wavelength > scaling.original_context / scaling.low_freq_factor:
        return freq / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context / wavelength - low) / (high - low)
    return (1 - smooth) * freq / scaling.factor + smooth * freq


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("start", [0, 2])
def test_rope(scaling: RopeScaling | None, interleaved: bool, start: int) -> None:
    head_dim, rotary, heads = 10, 6, 3
    x, positions = randoms(4, heads * head_dim), np.array([0, 1, 17, 300], np.int32)
    factors = np.array([1.0, 2.0, 3.5], np.float32)
    op = ops.Rope("x", "p", "x", head_dim, rotary, 100.0, interleaved, start, scaling)
    out = run(op, {"x": x, "p": positions}, {"f": factors})["x"]
    expected = x.astype(np.float64)
    for t, position in enumerate(positions):
        for head in range(heads):
            for pair in range(rotary // 2):
                freq = scaled_frequency(100.0 ** (-2 * pair / rotary), pair, scaling, factors)
                a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary // 2)
                i, j = (head * head_dim + start + k for k in (a, b))
                c, s = math.cos(position * freq), math.sin(position * freq)
                expected[t, i] = float(x[t, i]) * c - float(x[t, j]) * s
                expected[t, j] = float(x[t, j]) * c + float(x[t, i]) * s
    np.testing.assert_allclose(out, expected, atol=1e-5)


ACTIVATIONS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: max(v, 0.0),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation(act: str) -> None:
    x = np.concatenate([randoms(40) * 4, np.array([0.0, 50.0, -50.0], np.float32)]).reshape(1, -1)
    expected = [[ACTIVATIONS[act](float(v)) for v in x[0]]]
    out = run(ops.Activation("x", "out", act), {"x": x})["out"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=1e-5)
    if act in ("silu", "gelu", "gelu_tanh"):
        up = randoms(*x.shape)
        out = run(ops.Glu("x", "up", "x", act), {"x": x, "up": up})["x"]
        np.testing.assert_allclose(out, expected * up, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [1e4, -1e4, np.inf, -np.inf])
def test_activations_of_huge_inputs_raise_no_warning(value: float) -> None:
    x = np.array([[value]], np.float32)
    assert run(ops.Activation("x", "out", "sigmoid"), {"x": x})["out"][0, 0] == (1.0 if value > 0 else 0.0)


def test_add_scale_softcap_copy_gather() -> None:
    a, b = randoms(5, 3), randoms(5, 3)
    np.testing.assert_array_equal(run(ops.Add("a", "b", "a"), {"a": a, "b": b})["a"], a + b)
    np.testing.assert_allclose(run(ops.Scale("a", "a", 0.3), {"a": a})["a"], a * 0.3, rtol=1e-6)
    capped = run(ops.Softcap("a", "out", 2.0), {"a": a * 10})["out"]
    np.testing.assert_allclose(capped, 2 * np.tanh(a * 5), rtol=1e-5)
    copied = run(ops.Copy("a", "out"), {"a": a})["out"]
    np.testing.assert_array_equal(copied, a)
    assert not np.shares_memory(copied, a)
    rows = np.array([4, 0, 4], np.int32)
    out = run(ops.GatherRows("a", "r", "out"), {"a": a, "r": rows})["out"]
    np.testing.assert_array_equal(out, np.stack([a[4], a[0], a[4]]))


# ---------------------------------------------------------------- matrices


def test_linear_of_a_group_with_some_biases() -> None:
    x, weights = randoms(3, 5), {"u": randoms(4, 5), "v": randoms(7, 5), "b": randoms(7)}
    out = run(ops.Linear("x", ("u", "v"), ("y", "z"), (None, "b")), {"x": x}, weights)
    np.testing.assert_allclose(out["y"], np.einsum("ti,oi->to", x, weights["u"]), atol=1e-5)
    np.testing.assert_allclose(out["z"], np.einsum("ti,oi->to", x, weights["v"]) + weights["b"], atol=1e-5)


def test_head_linear() -> None:
    x, w = randoms(3, 2 * 5), randoms(2, 4, 5)
    out = run(ops.HeadLinear("x", "w", "out", 2), {"x": x}, {"w": w})["out"]
    expected = np.concatenate([x[:, :5] @ w[0].T, x[:, 5:] @ w[1].T], axis=1)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_lm_head(cap: float) -> None:
    x, w = randoms(2, 5) * 3, randoms(9, 5)
    out = run(ops.LmHead("x", "w", "out", cap), {"x": x}, {"w": w})["out"]
    plain = x @ w.T
    np.testing.assert_allclose(out, cap * np.tanh(plain / cap) if cap else plain, atol=1e-4)


def test_activations_are_rounded_to_int8_per_32() -> None:
    x = randoms(3, 96)
    x[1, 32:64] = 0
    out = rounded(x)
    for row in range(3):
        for block in range(0, 96, 32):
            part = x[row, block : block + 32]
            largest = float(np.abs(part).max())
            if largest == 0:
                np.testing.assert_array_equal(out[row, block : block + 32], 0)
                continue
            codes = out[row, block : block + 32] / (largest / 127)
            np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
            assert np.abs(codes).max() == pytest.approx(127, abs=1e-4)
            assert np.abs(out[row, block : block + 32] - part).max() <= largest / 254 * (1 + 1e-5)


def test_rounding_is_half_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = [127, 0.5, 1.5, 2.5, -0.5]
    assert rounded(x)[0, :5].tolist() == [127, 0, 2, 2, 0]


def test_rounding_of_next_to_nothing_is_zero() -> None:
    x = np.full((2, 32), 1e-39, np.float32)
    x[1, 0] = 1.0
    out = rounded(x)
    np.testing.assert_array_equal(out[0], 0)
    assert out[1, 0] == 1.0
    assert rounded(np.zeros((0, 64), np.float32)).shape == (0, 64)


@pytest.mark.parametrize(("format", "changes"), [("q8_0", True), ("q4_0", True), ("f16", False)])
def test_only_integer_formats_take_rounded_activations(format: str, changes: bool) -> None:
    x, w = randoms(3, 64), randoms(7, 64)
    stored = QuantTensor.from_float(w, format).dequantize()
    exact, coarse = (
        run(ops.Linear("x", ("w",), ("y",)), {"x": x}, {"w": w}, format=format, quantize=quantize)["y"]
        for quantize in (False, True)
    )
    np.testing.assert_allclose(exact, x @ stored.T, atol=1e-5)
    np.testing.assert_allclose(coarse, (rounded(x) if changes else x) @ stored.T, atol=1e-5)
    assert np.array_equal(exact, coarse) != changes


# ---------------------------------------------------------------- experts


def plain_route(logits: NDArray[np.float32], op: ops.Route, bias: NDArray[np.float32] | None) -> Any:
    """One token at a time, as the definition reads."""
    for row in logits.astype(np.float64):
        if op.score == "sigmoid":
            scores = 1 / (1 + np.exp(-row))
        else:
            scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        choice = scores + (0 if bias is None else bias)
        size = len(row) // op.num_groups
        strength = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(op.num_groups)]
        kept = sorted(range(op.num_groups), key=lambda g: (-strength[g], g))[: op.top_groups]
        open_ = [e for e in range(len(row)) if e // size in kept]
        ids = sorted(open_, key=lambda e: (-choice[e], e))[: op.top_k]
        weights = scores[ids]
        yield ids, (weights / weights.sum() if op.normalize else weights) * op.scaling


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(score: str, bias: bool, groups: int, top_groups: int, normalize: bool) -> None:
    logits, b = randoms(20, 12), randoms(12) * 0.3
    op = ops.Route("l", "i", "w", 3, score, "b" if bias else None, groups, top_groups, normalize, scaling=2.5)
    env = run(op, {"l": logits}, {"b": b})
    assert env["i"].dtype == np.int32
    for t, (ids, weights) in enumerate(plain_route(logits, op, b if bias else None)):
        assert env["i"][t].tolist() == ids
        np.testing.assert_allclose(env["w"][t], weights, rtol=1e-5)


def test_route_gives_ties_to_the_lowest() -> None:
    op = ops.Route("l", "i", "w", 2, "sigmoid")
    assert run(op, {"l": np.zeros((1, 5), np.float32)})["i"].tolist() == [[0, 1]]
    grouped = replace(op, num_groups=3, top_groups=1)
    assert run(grouped, {"l": np.zeros((1, 6), np.float32)})["i"].tolist() == [[0, 1]]


def test_moe_linear_and_combine() -> None:
    x, ids = randoms(6, 5), RNG.integers(0, 4, (6, 2)).astype(np.int32)
    gate, up = randoms(4, 7, 5), randoms(4, 7, 5)
    env = run(ops.MoeLinear("x", "i", ("g", "u"), ("y", "z")), {"x": x, "i": ids}, {"g": gate, "u": up})
    down, weights = randoms(4, 5, 7), randoms(6, 2)
    each = run(ops.MoeLinear("y", "i", ("d",), ("o",), True), {"y": env["y"], "i": ids}, {"d": down})["o"]
    out = run(ops.MoeCombine("o", "w", "out"), {"o": each, "w": weights})["out"]
    for t in range(6):
        total = np.zeros(5)
        for j, e in enumerate(ids[t]):
            np.testing.assert_allclose(env["y"][t, j], gate[e] @ x[t], atol=1e-5)
            np.testing.assert_allclose(env["z"][t, j], up[e] @ x[t], atol=1e-5)
            np.testing.assert_allclose(each[t, j], down[e] @ env["y"][t, j], atol=1e-5)
            total += weights[t, j] * each[t, j].astype(np.float64)
        np.testing.assert_allclose(out[t], total, atol=1e-5)


# ---------------------------------------------------------------- collectives


def collective(op: ops.Op, parts: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    ranks = [context(op, {"x": part}) for part in parts]
    run_lockstep(ranks)
    return [ctx.env["out"] for ctx in ranks]


def test_collectives() -> None:
    parts = [randoms(6, 4) for _ in range(3)]
    total = parts[0] + parts[1] + parts[2]
    for out in collective(ops.AllReduce("x", "out"), parts):
        np.testing.assert_array_equal(out, total)
    for out in collective(ops.AllGather("x", "out"), parts):
        np.testing.assert_array_equal(out, np.hstack(parts))
    for out in collective(ops.AllGather("x", "out", 0), parts):
        np.testing.assert_array_equal(out, np.vstack(parts))
    for rank, out in enumerate(collective(ops.ReduceScatter("x", "out", 0), parts)):
        np.testing.assert_array_equal(out, total[2 * rank : 2 * rank + 2])
    for rank, out in enumerate(collective(ops.AllToAll("x", "out"), parts)):
        np.testing.assert_array_equal(out, np.vstack([part[2 * rank : 2 * rank + 2] for part in parts]))


def test_collectives_of_one_rank_change_nothing() -> None:
    part = randoms(6, 4)
    for op in (ops.AllReduce, ops.AllGather, ops.ReduceScatter, ops.AllToAll):
        np.testing.assert_array_equal(collective(op("x", "out"), [part])[0], part)
